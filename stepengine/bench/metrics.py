"""What each stage of the ladder exists for: a number of a run, and requests on which it shows."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from stepengine.bench import workloads
from stepengine.bench.runs import Run
from stepengine.bench.usage import usage
from stepengine.bench.workloads import Workload


class Number(NamedTuple):
    """One number of a run."""

    name: str
    unit: str
    better: str  # "lower" | "higher"
    value: Callable[[Run], float]


@dataclass(frozen=True)
class Metric:
    """A stage's numbers, the first of which is drawn; on a set of its own or (own_set None) on the common one.

    `counted`: runs of their own, whose operators are counted, give the numbers. `against`: the stage before,
    where that is not the one above it in the table. `settings`: (stage, fast) -> what `runs.build` is given for
    a set that needs engines of its own.
    """

    numbers: tuple[Number, ...]
    own_set: Callable[[Any, bool], Workload] | None = None  # (corpus, fast) -> requests
    counted: bool = False
    against: str | None = None
    settings: Callable[[str, bool], dict[str, Any]] | None = None


def common_set(ids: Any, fast: bool) -> Workload:
    """The requests that all stages run; in the fast form, stage 0 computes fewer than 5,000 tokens on them."""
    if fast:
        return workloads.uniform(ids, seed=1, count=6, prompt=(24, 48), output=(6, 24))
    return workloads.uniform(ids, seed=1, count=12, prompt=(32, 64), output=(16, 48))


def uneven_set(ids: Any, fast: bool) -> Workload:
    """Short prompts and outputs of very different lengths, which is what static batching is bad at."""
    return workloads.exponential(ids, seed=2, count=8 if fast else 24, prompt=(8, 24), mean=20, most=96)


def long_tailed_set(ids: Any, fast: bool) -> Workload:
    """Most requests short, a few as long as a slot."""
    size = {"count": 9, "output_mean": 20} if fast else {"count": 20, "output_mean": 32}
    return workloads.lognormal(ids, seed=3, prompt_mean=24, most=128, **size)


def prompts_set(ids: Any, fast: bool) -> Workload:
    """Long prompts and short answers: scores grow with the square of a prompt."""
    long = LONG[fast]
    return workloads.uniform(ids, seed=4, count=2, prompt=(long - 32, long), output=(2, 2))


LONG = {False: 448, True: 224}  # tokens of a long prompt; fast: True
BUDGET = 64  # tokens a step of the stages that chunk


def interrupted_set(ids: Any, fast: bool) -> Workload:
    """Decodes on which long prompts come in."""
    runs_on = {"outputs": 16, "count": 1} if fast else {"outputs": 48, "count": 2}
    return workloads.long_arrivals(ids, 5, running=3, long=LONG[fast], **runs_on)


def interrupted_again_set(ids: Any, fast: bool) -> Workload:
    """The same, but that the long prompts begin alike."""
    long = LONG[fast]
    return workloads.long_arrivals(ids, 5, running=3, outputs=16 if fast else 48, long=long, count=2, shared=long - 32)


def few_shot_set(ids: Any, fast: bool) -> Workload:
    """Questions behind the same examples."""
    return workloads.few_shot(ids, seed=6, count=6 if fast else 12, shared=96, own=16, output=4)


def alone_set(ids: Any, fast: bool) -> Workload:
    """One request: a step of it reads all weights for one row."""
    return workloads.uniform(ids, seed=7, count=1, prompt=(32, 32), output=(16, 16) if fast else (48, 48))


def _room(stage: str, fast: bool) -> dict[str, Any]:
    """Engines for sets with long prompts."""
    chunks = {"max_num_batched_tokens": BUDGET} if stage in ("4a", "4") else {}
    return {"slots": 4, "max_model_len": LONG[fast] + 64, "places": 8, **chunks}


def _waited(quantile: str) -> Callable[[Run], float]:
    return lambda run: run.itl_ms("running")[quantile]


_COMPUTED = Number("tokens computed", "tokens", "lower", lambda run: run.summary["tokens_computed"])
_WORST_GAP = Number("ITL p99 of running decodes", "ms", "lower", _waited("p99"))
_FIRST = Number("TTFT p50", "ms", "lower", lambda run: run.summary["ttft_ms"]["p50"])

METRICS = {
    "1a": Metric((_COMPUTED,)),
    "1b": Metric(
        (Number("idle slot-steps", "slot-steps", "lower", lambda run: run.summary["idle_slot_steps"]),), uneven_set
    ),
    "2": Metric(
        (
            Number(
                "sequences that fit in the same K/V bytes",
                "sequences",
                "higher",
                lambda run: usage(run.trace).fits,
            ),
        ),
        long_tailed_set,
    ),
    "3": Metric(
        (
            Number("MB moved by attention", "MB", "lower", lambda run: run.counts.attention_bytes / 1e6),
            Number("operators a decode step", "operators", "lower", lambda run: run.counts.decode_operators),
        ),
        prompts_set,
        counted=True,
        settings=_room,
    ),
    "4a": Metric(
        (_WORST_GAP, Number("its p50", "ms", "lower", _waited("p50"))),
        interrupted_set,
        against="3",
        settings=_room,
    ),
    "4b": Metric(
        (_COMPUTED, Number("prompt tokens found", "tokens", "higher", lambda run: run.hit_tokens), _FIRST),
        few_shot_set,
        against="3",
    ),
    "4": Metric(
        (_WORST_GAP, Number("TTFT p50 of the long prompts", "ms", "lower", lambda run: run.ttft_ms("long")["p50"])),
        interrupted_again_set,
        against="3",
        settings=_room,
    ),
    "5": Metric(
        (
            Number("MB of weights", "MB", "lower", lambda run: run.weight_bytes / 1e6),
            Number("a decode step", "ms", "lower", lambda run: median(run.step_ms[1])),
        ),
        alone_set,
    ),
}
"""By stage name. A stage that is not listed is measured by its speed."""

SPEED = Metric((Number("tokens per second", "tokens/s", "higher", lambda run: run.tokens_per_s),))
