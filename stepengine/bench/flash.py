"""Stage 3 against stage 2 on a CPU: prompts and decodes, what attention moves, and the scores it never writes."""

import time
from typing import Any
from unittest import mock

from torch import Tensor

from stepengine.bench import decoding, runs, traffic, workloads
from stepengine.bench.measure import Paired, alternate
from stepengine.bench.options import Options, bar_text, ratio_text, told_of
from stepengine.bench.workloads import Workload
from stepengine.llm import LLM

STAGES = ("2", "3")  # the same blocks: scores written out, and never
BAR = 0.95  # speed of a step: not slower where little can be gained, in short prompts and in decodes


def flash(options: Options) -> dict[str, Any]:
    """Two parts: the step that runs one prompt, by its length; a decode step, by rows and context."""
    return {"what": "flash", "prompt": prompt(options), "decode": decoding.compare(options, STAGES, BAR)}


def prompt(options: Options) -> dict[str, Any]:
    """One prompt alone: milliseconds of its step and of attention in it (all layers), and bytes, counted apart."""
    lengths = (24, 40) if options.fast else (128, 256, 512, 1024, 2048)
    engines = {stage: runs.build(options.model, stage, 1, max(lengths) + 16) for stage in STAGES}
    runs.share_weights(engines.values())
    llm = engines["3"]
    ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
    cells: list[dict[str, Any]] = []
    with told_of(options, "prompts: stage 2, 3", len(lengths) * len(STAGES) * (options.rounds + 1)) as told:
        for length in lengths:
            work = workloads.uniform(ids, options.seed, 1, (length, length), (1, 1))
            inside: dict[str, list[float]] = {stage: [] for stage in STAGES}

            def arm(stage: str, work: Workload = work, inside: dict[str, list[float]] = inside) -> float:
                whole, attention = prompt_ms(engines[stage], work)
                inside[stage].append(attention)
                return whole

            arms = {stage: lambda stage=stage: arm(stage) for stage in STAGES}  # noqa: B023
            steps = alternate(arms, options.rounds, told=told)
            attention = Paired({stage: values[-steps.rounds :] for stage, values in inside.items()})
            cells.append(
                {
                    "tokens": length,
                    "ms": {stage: steps.median(stage) for stage in STAGES},
                    "attention_ms": {stage: attention.median(stage) for stage in STAGES},
                    "speed": vars(steps.ratio(*STAGES)),
                    "attention_speed": vars(attention.ratio(*STAGES)),
                    "moved": {stage: moved(engines[stage], work) for stage in STAGES},
                }
            )
    slowest = min(float(cell["speed"]["median"]) for cell in cells)
    scores_gone = all(cell["moved"]["3"]["score_bytes"] == 0 for cell in cells)
    return {"cells": cells, "slowest": slowest, "bar": BAR, "met": slowest >= BAR and scores_gone}


def prompt_ms(llm: LLM, work: Workload) -> tuple[float, float]:
    """Milliseconds of the one step of `work`, a prompt with one token to give, and of attention in all its layers."""
    attention, inside = llm.engine.runner.attention, [0.0]
    attend = attention.forward

    def timed(*args: Any) -> Tensor:
        began = time.perf_counter()
        out = attend(*args)
        inside[0] += time.perf_counter() - began
        return out

    with mock.patch.object(attention, "forward", timed):
        (record,) = runs.run(llm, work).trace.steps
    return 1e3 * (record.t_done - record.t_plan), 1e3 * inside[0]


def moved(llm: LLM, work: Workload) -> dict[str, int]:
    """Bytes that attention reads and writes in the step of a prompt, and bytes of scores in memory, all layers."""
    with traffic.counted(llm) as found:
        runs.run(llm, work)
    return {"attention_bytes": found.attention_bytes, "score_bytes": found.score_bytes}


def text(result: dict[str, Any]) -> str:
    """The result as lines of at most 120 columns."""
    found = result["prompt"]
    lines = [
        "flash attention (stage 3) against scores in memory (stage 2), the same blocks",
        f"  the step of one prompt, and attention in it: slowest {found['slowest']:.2f}x; {bar_text(found, '>=')}",
    ]
    for cell in found["cells"]:
        ms, inside, bytes_of = cell["ms"], cell["attention_ms"], cell["moved"]
        lines += [
            f"    {cell['tokens']:5} tokens: {ms['2']:.0f} ms, stage 3 {ms['3']:.0f} ms, {ratio_text(cell['speed'])}",
            f"      in attention: {inside['2']:.0f} ms, {inside['3']:.0f} ms, {ratio_text(cell['attention_speed'])}; "
            f"moves {_megabytes(bytes_of['2']['attention_bytes'])}, {_megabytes(bytes_of['3']['attention_bytes'])}",
            f"      scores never written: {_megabytes(bytes_of['2']['score_bytes'] - bytes_of['3']['score_bytes'])}",
        ]
    lines.append("  a decode step at the same rows and contexts")
    return "\n".join([*lines, *decoding.compare_text(result["decode"])])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
