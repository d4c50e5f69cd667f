"""Measures of the stages before paging: batching policies, time per token over the context, cost of recording."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from stepengine.bench import runs, workloads
from stepengine.bench.batching import continuous_steps, expected_max_over_mean, static_steps
from stepengine.bench.measure import alternate
from stepengine.bench.options import Options, bar_text, ratio_text, told_of
from stepengine.core.engine import Step
from stepengine.core.plan import Chunk, StepPlan
from stepengine.core.runner import StepResult
from stepengine.llm import LLM
from stepengine.trace import Trace

BATCHING = ("1a", "1b")  # the same cache and attention: static and continuous batching


def static(options: Options) -> dict[str, Any]:
    """Static against continuous batching: decode steps against their formulas, wall clock against the bound.

    Formulas: the sum of each batch's longest, and list scheduling of the drawn lengths. Bound: E[longest
    of a batch] / E[length]; prompts run alone, and larger batches cost more per step, so less is reached.
    """
    slots = 4 if options.fast else 8
    count = 16 if options.fast else 48
    most = 64 if options.fast else 96
    engines = {name: runs.build(options.model, name, slots, 24 + most) for name in BATCHING}
    llm = engines["1b"]
    ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
    prompt = (8, 24)
    sets = {
        "uniform": workloads.uniform(ids, options.seed, count, prompt, (1, most // 2)),
        "exponential": workloads.exponential(ids, options.seed, count, prompt, most / 4, most),
    }
    result: dict[str, Any] = {"what": "static", "slots": slots}
    for name, work in sets.items():
        steps: dict[str, int] = {}

        def arm(stage: str, work: workloads.Workload = work, steps: dict[str, int] = steps) -> float:
            done = runs.run(engines[stage], work)
            steps[stage] = len(done.step_ms[1])
            return float(done.summary["busy_s"])

        arms: dict[str, Callable[[], float]] = {"1a": lambda: arm("1a"), "1b": lambda: arm("1b")}  # noqa: B023
        with told_of(options, f"{name}: static, continuous", 2 * options.rounds) as told:
            timed = alternate(arms, options.rounds, warmup=0, told=told)
        formula = {
            "1a": static_steps(work.output_lens, slots),
            "1b": continuous_steps(work.output_lens, slots),
        }
        result[name] = {
            "workload": work.describe(),
            "decode_steps": steps,
            "formula": formula,
            "met": all(abs(steps[stage] - formula[stage]) <= 0.02 * formula[stage] for stage in BATCHING),
            "steps_ratio": steps["1a"] / steps["1b"],
            "seconds": timed.values,
            "wall_ratio": vars(timed.ratio("1a", "1b")),
            "bound": expected_max_over_mean(work.output_lens, slots),
        }
    return result


def context(options: Options) -> dict[str, Any]:
    """Milliseconds per token of one request at 1024 tokens of context against 128, and of 4 requests together."""
    short, long, tokens = 128, 1024, 8 if options.fast else 24
    result: dict[str, Any] = {"what": "context", "stage": options.stage, "bar": 1.5}
    for rows in (1, 4):
        llm = runs.build(options.model, options.stage, rows, long + tokens)
        ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)

        def arm(length: int, llm: LLM = llm, ids: Any = ids, rows: int = rows) -> float:
            prompt = (length - tokens // 2,) * 2  # so that the decodes lie around `length`
            work = workloads.uniform(ids, options.seed, rows, prompt, (tokens, tokens))
            return median(runs.run(llm, work).step_ms[1])

        arms: dict[str, Callable[[], float]] = {"128": lambda: arm(short), "1024": lambda: arm(long)}  # noqa: B023
        with told_of(options, f"{rows} at once: context {short}, {long}", 2 * (options.rounds + 1)) as told:
            timed = alternate(arms, options.rounds, told=told)
        result[f"{rows} at once"] = {
            "ms_per_token": {name: timed.median(name) for name in timed.values},
            "ratio": vars(timed.ratio(str(long), str(short))),
        }
    result["met"] = result["1 at once"]["ratio"]["median"] <= result["bar"]
    return result


def trace(options: Options) -> dict[str, Any]:
    """Microseconds to record a step of 256 rows, and the same call with recording off."""
    rows, steps = 256, 1000
    llm = LLM("tiny-random", stage=options.stage, max_num_seqs=1, max_model_len=16)
    plan = StepPlan(0, tuple(Chunk(row, 100, 1) for row in range(rows)))
    step, result = Step(0.0, 0.0), StepResult(list(range(rows)), {}, 1.0, 2.0, 1.0, 2.0, 0)

    def arm(recorder: Trace | None) -> float:
        engine = llm.engine
        engine.recorder = recorder
        began = time.perf_counter()
        for _ in range(steps):
            engine._record(step, plan, result, [])  # the engine's own call, once a step
        return 1e6 * (time.perf_counter() - began) / steps

    timed = alternate({"on": lambda: arm(Trace({})), "off": lambda: arm(None)}, options.rounds)
    on, off = timed.median("on"), timed.median("off")
    return {"what": "trace", "rows": rows, "us": {"on": on, "off": off}, "bar": 10.0, "met": on < 10 and off < on}


def text_static(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    lines = [f"static (1a) against continuous batching (1b), {result['slots']} slots"]
    for name in ("uniform", "exponential"):
        part = result[name]
        steps, formula = part["decode_steps"], part["formula"]
        lines += [
            f"  {name}, {part['workload']['requests']} requests",
            f"    decode steps: static {steps['1a']} (formula {formula['1a']}), continuous {steps['1b']} "
            f"(list scheduling {formula['1b']}): {'within' if part['met'] else 'NOT within'} 2 %",
            f"    steps {part['steps_ratio']:.2f}x, wall clock {ratio_text(part['wall_ratio'])}; "
            f"bound E[max]/E[mean] {part['bound']:.2f}x",
        ]
    return "\n".join(lines)


def text_context(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    lines = [f"time per token at 1024 tokens of context against 128, stage {result['stage']}"]
    for name in ("1 at once", "4 at once"):
        part = result[name]
        times = ", ".join(f"{ms:.1f} ms at {length}" for length, ms in part["ms_per_token"].items())
        lines.append(f"  {name}: {times}: {ratio_text(part['ratio'])}")
    return "\n".join([*lines, f"  one at once: {bar_text(result, '<=')}"])


def text_trace(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    us = result["us"]
    return f"recording a step of {result['rows']} rows: {us['on']:.2f} us, off {us['off']:.2f} us; bar < 10 us: " + (
        "met" if result["met"] else "MISSED"
    )
