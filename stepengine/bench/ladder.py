"""The ladder: every stage on the same requests, and each stage's own metric against the stage before it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from stepengine.bench import report, runs, verify, workloads
from stepengine.bench.measure import Ratio, machine
from stepengine.bench.runs import Run
from stepengine.bench.usage import usage
from stepengine.bench.workloads import Workload
from stepengine.llm import LLM
from stepengine.stages import STAGES, Stage, find_stage

SLOTS = 4  # requests of MAX_MODEL_LEN tokens for which every stage has K/V memory
PLACES = 32  # requests that may run at once from stage 2 on, if that memory holds them
MAX_MODEL_LEN = 128  # no set below asks for more
ROUNDS = 3  # of runs whose medians are shown; the fast form makes one
PATIENCE_S = 120.0  # on a machine so slow or busy that this much has passed, no further round begins


@dataclass(frozen=True)
class Metric:
    """What a stage exists for: a number of a run, on a set of its own or (own_set None) on the common one."""

    name: str
    unit: str
    better: str  # "lower" | "higher"
    value: Callable[[Run], float]
    own_set: Callable[[Any, bool], Workload] | None = None  # (corpus, fast) -> requests


def common_set(ids: Any, fast: bool) -> Workload:
    """The requests that all stages run; in the fast form, stage 0 computes fewer than 12,000 tokens on them."""
    if fast:
        return workloads.uniform(ids, seed=1, count=8, prompt=(24, 48), output=(8, 32))
    return workloads.uniform(ids, seed=1, count=16, prompt=(32, 64), output=(16, 48))


def uneven_set(ids: Any, fast: bool) -> Workload:
    """Short prompts and outputs of very different lengths, which is what static batching is bad at."""
    return workloads.exponential(ids, seed=2, count=12 if fast else 24, prompt=(8, 24), mean=20, most=96)


def long_tailed_set(ids: Any, fast: bool) -> Workload:
    """Most requests short, a few as long as a slot."""
    return workloads.lognormal(ids, seed=3, count=12 if fast else 20, prompt_mean=24, output_mean=32, most=128)


METRICS = {
    "1a": Metric("tokens computed", "tokens", "lower", lambda run: run.summary["tokens_computed"]),
    "1b": Metric("idle slot-steps", "slot-steps", "lower", lambda run: run.summary["idle_slot_steps"], uneven_set),
    "2": Metric(
        "sequences that fit in the same K/V bytes",
        "sequences",
        "higher",
        lambda run: usage(run.trace).fits,
        long_tailed_set,
    ),
}
"""By stage name. A stage that is not listed is measured by its speed."""

SPEED = Metric("tokens per second", "tokens/s", "higher", lambda run: run.tokens_per_s)


def run(
    model: str = "smollm2-135m",
    fast: bool = False,
    out: str | Path | None = None,
    stages: list[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Climb the stages on `model` in fp32; the result as plain data, written to `out` as well.

    `out` is the folder of `ladder.json` and `ladder.html`, by default a new one below `runs`. `stages`
    leaves out all stages that it does not name, but for the first: it is the reference.
    """
    named = {find_stage(name) for name in stages or [stage.name for stage in STAGES]}
    began = time.perf_counter()
    climb = _Climb(model, fast, progress)
    rows = [climb.stage(stage) for stage in STAGES if stage in named or stage is STAGES[0]]
    fingerprint = machine()
    result = {
        "model": model,
        "dtype": "float32",
        "fast": fast,
        "slots": SLOTS,
        "max_model_len": MAX_MODEL_LEN,
        "workload": climb.common.describe(),
        "machine": fingerprint,
        "versions": fingerprint["versions"],
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": time.perf_counter() - began,
        "stages": rows,
    }
    report.write(result, Path(out) if out is not None else Path("runs") / time.strftime("%Y-%m-%d_%H%M%S"))
    return result


render = report.render


class _Climb:
    """The reference and the stage before this one stay loaded: the one judges tokens, the other runs in pairs."""

    def __init__(self, model: str, fast: bool, progress: bool) -> None:
        self.model, self.fast, self.progress = model, fast, progress
        self.reference: tuple[LLM, Run] | None = None
        self.before: tuple[LLM, Run] | None = None
        self.began = time.perf_counter()

    def stage(self, stage: Stage) -> dict[str, Any]:
        """Measure one stage; its row of the result."""
        llm = self._load(stage)
        # Without a cache a run takes long enough to be timed once, and is no close call.
        done = list(self._rounds(lambda: self._run(llm, self.common, "common set"), once=self.reference is None))
        middle = sorted(done, key=lambda run: run.tokens_per_s)[len(done) // 2]
        summary = middle.summary
        row: dict[str, Any] = {
            "stage": stage.name,
            "title": stage.title,
            "metric": None,
            **{name: summary[name] for name in ("tokens_per_s", "ttft_ms", "itl_ms", "tokens_computed", "steps")},
            "idle_slot_steps": summary["idle_slot_steps"],
            "rounds": len(done),
            "same_tokens": True,
            "near_ties": 0,
            "note": "",
        }
        if self.reference is None or self.before is None:
            self.reference = (llm, middle)
        else:
            found = verify.differences(*self.reference, middle)
            row |= {"same_tokens": found.wrong == 0, "near_ties": found.near}
            row |= self._gain(stage, llm, middle, *self.before)
        self.before = (llm, middle)
        return row

    def _gain(self, stage: Stage, llm: LLM, middle: Run, other: LLM, before: Run) -> dict[str, Any]:
        """The stage's metric, before and after, and a reason where tokens/s did not move."""
        metric = METRICS.get(stage.name, SPEED)
        pairs = [(before, middle)]
        if metric.own_set is not None:
            own = metric.own_set(self.ids, self.fast)
            pairs = list(self._rounds(lambda: (self._run(other, own, "own set"), self._run(llm, own, "own set"))))
        speed = Ratio.of([after.tokens_per_s / first.tokens_per_s for first, after in pairs])
        first, after = sorted(pairs, key=lambda pair: pair[1].tokens_per_s / pair[0].tokens_per_s)[len(pairs) // 2]
        return {
            "metric": {
                "name": metric.name,
                "unit": metric.unit,
                "before": median(metric.value(first) for first, _ in pairs),
                "after": median(metric.value(after) for _, after in pairs),
                "better": metric.better,
                "note": f"{len(after.workload.prompts)} requests, outputs {after.workload.name}"
                + (f"; tokens/s {speed.median:.2f}x" if metric.own_set is not None else ""),
                "workload": after.workload.describe(),
                "tokens_per_s": {"before": first.tokens_per_s, "after": after.tokens_per_s, "ratio": vars(speed)},
            },
            "note": report.why(before, middle),
        }

    def _rounds(self, measure: Callable[[], Any], once: bool = False) -> Iterator[Any]:
        for turn in range(1 if once or self.fast else ROUNDS):
            if turn and time.perf_counter() - self.began > PATIENCE_S:
                return
            yield measure()

    def _load(self, stage: Stage) -> LLM:
        with _bar(self.progress, f"stage {stage.name:<3} loading {self.model}", 0):
            llm = runs.build(self.model, stage.name, SLOTS, MAX_MODEL_LEN, places=PLACES)
            if self.reference is None:
                self.ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
                self.common = common_set(self.ids, self.fast)
            runs.warm(llm, self.common)
        return llm

    def _run(self, llm: LLM, workload: Workload, what: str) -> Run:
        with _bar(self.progress, f"stage {llm.stage.name:<3} {what}", workload.num_outputs) as told:
            return runs.run(llm, workload, told)


@contextmanager
def _bar(shown: bool, text: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    form = "{desc}: {n_fmt} of {total_fmt} tokens |{bar}| {remaining} left" if total else "{desc} ..."
    with tqdm(total=total or None, desc=text, bar_format=form, leave=False, disable=not shown, ncols=90) as bar:
        yield bar.update
