"""The ladder: every stage on the same requests, and each stage's own metric against the stage before it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from stepengine.bench import report, runs, verify, workloads
from stepengine.bench.measure import Ratio, machine
from stepengine.bench.metrics import METRICS, SPEED, Metric, common_set
from stepengine.bench.runs import Run
from stepengine.bench.workloads import Workload
from stepengine.llm import LLM
from stepengine.model import store
from stepengine.model.catalog import resolve
from stepengine.stages import STAGES, Stage, find_stage

SLOTS = 4  # requests of MAX_MODEL_LEN tokens for which every stage has K/V memory
PLACES = 32  # requests that may run at once from stage 2 on, if that memory holds them
MAX_MODEL_LEN = 128  # no set below asks for more
ROUNDS = 3  # of runs whose medians are shown; the fast form makes one
PATIENCE_S = 110.0  # on a machine so slow or busy that this much has passed, no further round begins


def run(
    model: str = "smollm2-135m",
    fast: bool = False,
    out: str | Path | None = None,
    stages: list[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Climb the stages on `model` in fp32; the result as plain data, written to `out` as well.

    `out` is the folder of `ladder.json` and `ladder.html`, by default a new one below `runs`. `stages`
    leaves out all stages that it does not name, but for the first: it is the reference. A stage that others are
    held against runs as well, and has no row.
    """
    named = {find_stage(name) for name in stages or [stage.name for stage in STAGES]}
    began = time.perf_counter()
    climb = _Climb(model, fast, progress)
    order = [stage for stage in STAGES if stage in named or stage is STAGES[0]]
    rows = [
        climb.stage(stage, [held_against(later) for later in order[turn + 1 :]]) for turn, stage in enumerate(order)
    ]
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


def held_against(stage: Stage) -> str:
    """The stage whose numbers a stage's own metric is compared with; the first one stands alone."""
    above = STAGES[max(0, STAGES.index(stage) - 1)].name
    return METRICS.get(stage.name, SPEED).against or above


render = report.render


class _Climb:
    """The reference stays loaded, for it judges tokens, and so does every stage that a later one is held against."""

    def __init__(self, model: str, fast: bool, progress: bool) -> None:
        self.model, self.fast, self.progress = model, fast, progress
        self.climbed: dict[str, tuple[LLM, Run]] = {}  # in order, the first is the reference
        self.above = ""  # the stage of the last row
        self.rooms: dict[Callable[..., Any], dict[str, LLM]] = {}  # by settings: engines for sets that do not fit
        self.began = time.perf_counter()

    def stage(self, stage: Stage, wanted: Sequence[str] = ()) -> dict[str, Any]:
        """Measure one stage; its row of the result. Of those before it, only `wanted` ones are needed later."""
        before, is_first = held_against(stage), not self.climbed
        made_s = self._quantise(stage) if runs.own_weights(stage) else 0.0
        if not is_first and before not in self.climbed:
            self._climb(find_stage(before))
        done = self._climb(stage)
        _, middle = self.climbed[stage.name]
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
            "agreement": None,
            "own_agreement": None,
            "note": "",
        }
        if runs.own_weights(stage):
            (reference, _), (llm, _) = next(iter(self.climbed.values())), self.climbed[stage.name]
            own = verify.agreement(llm, middle)
            row |= {"agreement": verify.agreement(reference, middle), "own_agreement": own}
            row["same_tokens"] = None if own >= verify.OWN else False
        elif not is_first:
            found = verify.differences(*next(iter(self.climbed.values())), middle)
            row |= {"same_tokens": found.wrong == 0, "near_ties": found.near}
        if not is_first:
            row |= self._gain(stage, before)
        if made_s:
            row["note"] += f"{' ' if row['note'] else ''}Before that, quantising took {made_s:.0f} s, once: it is kept."
        self.above, first = stage.name, next(iter(self.climbed))
        for name in [name for name in self.climbed if name not in (first, stage.name, *wanted)]:
            del self.climbed[name]
        return row

    def _quantise(self, stage: Stage) -> float:
        """Seconds that it took to quantise the model, which has a progress bar of its own; 0 where that is done."""
        from stepengine.stage5_gptq.loader import quantized_folder, recipe_of

        began, clock = time.time(), time.perf_counter()
        folder = quantized_folder(resolve(self.model), recipe_of())
        if (folder / store.MANIFEST).stat().st_mtime < began:
            return 0.0
        seconds = time.perf_counter() - clock
        self.began += seconds  # it is no reason for fewer rounds
        return seconds

    def _climb(self, stage: Stage) -> list[Run]:
        """Run the common set on a stage, which stays loaded; the runs, of which the middle one is remembered."""
        llm = self._load(stage)
        # Without a cache a run takes long enough to be timed once, and is no close call.
        done = list(self._rounds(lambda: self._run(llm, self.common, "common set"), once=not self.climbed))
        self.climbed[stage.name] = (llm, sorted(done, key=lambda run: run.tokens_per_s)[len(done) // 2])
        return done

    def _gain(self, stage: Stage, before: str) -> dict[str, Any]:
        """The stage's metric, before and after, and a reason where tokens/s did not move."""
        metric = METRICS.get(stage.name, SPEED)
        (other, run_before), (llm, middle) = self.climbed[before], self.climbed[stage.name]
        arms: tuple[LLM, LLM] = (other, llm)
        pairs, own = [(run_before, middle)], None
        if metric.own_set is not None:
            own = metric.own_set(self.ids, self.fast)
            arms = self._own_engines(metric, (before, stage.name)) if metric.settings else arms
            pairs = list(self._rounds(lambda: (self._run(arms[0], own, "own set"), self._run(arms[1], own, "own set"))))
        speed = Ratio.of([after.tokens_per_s / first.tokens_per_s for first, after in pairs])
        first, after = sorted(pairs, key=lambda pair: pair[1].tokens_per_s / pair[0].tokens_per_s)[len(pairs) // 2]
        if metric.counted:
            pairs = [(runs.run_counted(arms[0], after.workload), runs.run_counted(arms[1], after.workload))]
        values = [
            {
                "name": number.name,
                "unit": number.unit,
                "before": median(number.value(first) for first, _ in pairs),
                "after": median(number.value(after) for _, after in pairs),
                "better": number.better,
            }
            for number in metric.numbers
        ]
        return {
            "metric": {
                **values[0],
                "also": values[1:],
                "against": before,
                "note": (f"against stage {before}: " if before != self.above else "")
                + f"{_requests(after.workload)}, {'' if after.workload.after else 'outputs '}"
                + after.workload.name
                + (f"; tokens/s {speed.median:.2f}x" if own is not None else ""),
                "workload": after.workload.describe(),
                "tokens_per_s": {"before": first.tokens_per_s, "after": after.tokens_per_s, "ratio": vars(speed)},
            },
            "note": report.why(run_before, middle),
        }

    def _own_engines(self, metric: Metric, names: tuple[str, str]) -> tuple[LLM, LLM]:
        """Engines for a set that does not fit into those of the common one; they run one copy of the same weights."""
        assert metric.settings is not None
        rooms = self.rooms.setdefault(metric.settings, {})
        for name in names:
            if name not in rooms:
                with _bar(self.progress, f"stage {name:<3} loading {self.model}", 0):
                    rooms[name] = runs.build(self.model, name, **metric.settings(name, self.fast))
                    if not runs.own_weights(find_stage(name)):
                        runs.share_weights(llm for llm in rooms.values() if not runs.own_weights(llm.stage))
                    runs.warm(rooms[name], self.common)
        return rooms[names[0]], rooms[names[1]]

    def _rounds(self, measure: Callable[[], Any], once: bool = False) -> Iterator[Any]:
        for turn in range(1 if once or self.fast else ROUNDS):
            if turn and time.perf_counter() - self.began > PATIENCE_S:
                return
            yield measure()

    def _load(self, stage: Stage) -> LLM:
        with _bar(self.progress, f"stage {stage.name:<3} loading {self.model}", 0):
            llm = runs.build(self.model, stage.name, SLOTS, MAX_MODEL_LEN, places=PLACES)
            if not self.climbed:
                self.ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
                self.common = common_set(self.ids, self.fast)
            runs.warm(llm, self.common)
        return llm

    def _run(self, llm: LLM, workload: Workload, what: str) -> Run:
        with _bar(self.progress, f"stage {llm.stage.name:<3} {what}", workload.num_outputs) as told:
            return runs.run(llm, workload, told)


def _requests(workload: Workload) -> str:
    count = len(workload.prompts)
    return f"{count} requests" if count != 1 else "one request"


@contextmanager
def _bar(shown: bool, text: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    form = "{desc}: {n_fmt} of {total_fmt} tokens |{bar}| {remaining} left" if total else "{desc} ..."
    with tqdm(total=total or None, desc=text, bar_format=form, leave=False, disable=not shown, ncols=90) as bar:
        yield bar.update
