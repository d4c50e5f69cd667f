"""Checks of the exercises of notebook 03b: the size of a captured step, and the idle time of the device."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from stepengine.contracts.report import Promise, Report, called, expect, run_promises, whole_number
from stepengine.core import graphs
from stepengine.core.plan import Chunk, StepPlan, StepRecord
from stepengine.core.request import SamplingParams
from stepengine.trace import Trace

MOST = 64  # rows, in the cases


@contextmanager
def padded_by(bucket: Callable[[int], int]) -> Iterator[None]:
    """Within the block, stage 3's engine pads a step of decodes to `bucket(rows)` rows, `max_num_seqs` at most."""
    with mock.patch.object(graphs, "decode_bucket", lambda rows, most: min(most, bucket(rows))):
        yield


def check_bucket(bucket: Callable[[int], int]) -> Report:
    """Notebook 03b: `bucket(batch)` against all sizes (1, 2, 4 and the multiples of 8), and in stage 3's engine."""
    sizes = [1, 2, 4, *range(8, MOST + 1, 8)]

    def each(holds: Callable[[int, int], str]) -> Callable[[], None]:
        def check() -> None:
            for batch in range(1, MOST + 1):
                call = f"bucket({batch})"
                got = whole_number(called(call, bucket, batch), call)
                wrong = holds(batch, got)
                expect(not wrong, f"{call}: got {got}, {wrong}")

        return check

    def large_enough(batch: int, got: int) -> str:
        return "which is too small" if got < batch else ""

    def listed(batch: int, got: int) -> str:
        return "" if got in sizes else "which is neither 1, 2, 4 nor a multiple of 8"

    def smallest(batch: int, got: int) -> str:
        right = min(size for size in sizes if size >= batch)
        return "" if got == right else f"and {right} would do"

    def tokens() -> None:
        from stepengine.llm import LLM

        for batch in range(1, 13):
            call = f"bucket({batch})"
            size = whole_number(called(call, bucket, batch), call)
            expect(size >= batch, f"{call}: got {size}; the engine cannot run {batch} rows with that")
        prompts = [[5 + number, 9, 2, 7, 3][: 2 + number % 4] for number in range(12)]
        params = [SamplingParams(temperature=0.0, max_tokens=3 + n, ignore_eos=True) for n in range(12)]
        sizes_of: dict[str, Any] = {"max_num_seqs": 12, "max_model_len": 32}
        right = [out.outputs[0].token_ids for out in LLM("tiny-random", stage=0, **sizes_of).generate(prompts, params)]
        with padded_by(bucket):
            llm = LLM("tiny-random", stage=3, cuda_graphs="padded", trace=True, **sizes_of)
            outs = llm.generate(prompts, params)
        assert llm.trace is not None
        for record in llm.trace.steps:
            rows = len(record.plan.chunks)
            if record.plan.num_tokens == rows:  # a step of decodes
                ran, wanted = record.replayed, min(12, bucket(rows))
                expect(ran == wanted, f"a step of {rows} decodes ran with {ran} rows, bucket({rows}) is {wanted}")
        for number, (out, wanted_ids) in enumerate(zip(outs, right, strict=True)):
            got = out.outputs[0].token_ids
            expect(got == wanted_ids, f"request {number}: got {got}, stage 0 gives {wanted_ids}")

    return run_promises(
        "bucket",
        [
            Promise("the bucket holds the batch", each(large_enough), "round up, not down"),
            Promise("it is 1, 2, 4 or a multiple of 8", each(listed), "above 4 the next multiple of 8 comes"),
            Promise("no smaller one would do", each(smallest), "8 itself is a multiple of 8; 3 fits into 4"),
            Promise("in the engine, padding changes no token", tokens, "first make the promises above hold"),
        ],
    )


def _trace_of(spans: Sequence[tuple[int, int] | None]) -> Trace:
    """One decode step for each (begin, end) on the device, in ms after second 100; None: a step without times."""
    trace = Trace({"device": "cuda"})
    for step, span in enumerate(spans):
        began, ended = (100 + at / 1e3 for at in span) if span else (0.0, 0.0)
        plan = StepPlan(step, (Chunk(0, step, 1),))
        trace.append(StepRecord(plan, (5,), device_began=began, device_ended=ended))
    return trace


def check_idle_fraction(idle_fraction: Callable[[Trace], float | None]) -> Report:
    """Notebook 03b: `idle_fraction(trace)` on hand-made traces, against counting the idle milliseconds one by one."""

    def counted(spans: Sequence[tuple[int, int] | None]) -> float | None:
        timed = [span for span in spans if span]
        if not timed:
            return None
        first, last = min(begin for begin, _ in timed), max(end for _, end in timed)
        idle = sum(not any(begin <= at < end for begin, end in timed) for at in range(first, last))
        return idle / (last - first)

    def compare(*cases: Sequence[tuple[int, int] | None]) -> Callable[[], None]:
        def check() -> None:
            for spans in cases:
                said = ", ".join(f"{span[0]} to {span[1]} ms" if span else "no times" for span in spans) or "no steps"
                got, wanted = called(said, idle_fraction, _trace_of(spans)), counted(spans)
                if wanted is None:
                    expect(got is None, f"{said}: got {got!r}, and nothing can be said: return None")
                    continue
                number = isinstance(got, int | float) and not isinstance(got, bool)
                right = bool(number and abs(got - wanted) < 1e-6)
                expect(right, f"{said}: got {got!r}, counted {wanted:.4f}")

        return check

    def many() -> None:
        rng = random.Random(3)
        for _ in range(60):
            spans = [(begin, begin + rng.randint(1, 9)) for begin in rng.choices(range(60), k=rng.randint(1, 8))]
            compare([*spans, *[None] * rng.randint(0, 2)])()

    return run_promises(
        "idle_fraction",
        [
            Promise("a gap between two steps is idle time", compare([(0, 4), (6, 10)]), "idle time over all time"),
            Promise(
                "the clock starts with the first device work", compare([(3, 5), (7, 9)], [(5, 6)]), "not at second 0"
            ),
            Promise("steps back to back leave no idle time", compare([(0, 4), (4, 8), (8, 9)]), "0.0 here"),
            Promise(
                "time that two steps share is busy once",
                compare([(0, 6), (4, 9), (11, 13)]),
                "1 - sum of lengths / all is wrong here: keep the end of what is covered so far",
            ),
            Promise(
                "a step inside another adds nothing",
                compare([(0, 20), (3, 5), (22, 24)], [(2, 9), (3, 4), (5, 6), (12, 14)]),
                "what is covered so far never moves back: max(end so far, this end)",
            ),
            Promise(
                "steps come in any order", compare([(6, 10), (0, 4)], [(8, 9), (2, 3), (5, 6)]), "sort by begin first"
            ),
            Promise(
                "a step without times is passed over",
                compare([None, (0, 4), (6, 10)], [(0, 4), None, (6, 10), None]),
                "both fields are 0.0 there: device_ended > device_began tells",
            ),
            Promise("without any times the answer is None", compare([], [None, None]), "None, not 0.0"),
            Promise("every trace", many, "which of the promises above does the example touch?"),
        ],
    )
