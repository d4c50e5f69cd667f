"""Milliseconds per decode step at a fixed number of rows and a fixed context, several engines in turns."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from stepengine.bench import runs, workloads
from stepengine.bench.measure import Paired, alternate
from stepengine.bench.options import Options, bar_text, ratio_text, told_of
from stepengine.core.request import SamplingParams, State
from stepengine.llm import LLM

STEPS = 3  # decode steps in a round; the fastest counts, so that a step someone else disturbed does not


def compare(options: Options, stages: tuple[str, str], bar: float, copies: bool = False) -> dict[str, Any]:
    """One decode step of two stages at the same rows and contexts, in turns: the first's time over the second's.

    `copies` also times copying the second stage's blocks alone. The bar holds for the slowest.
    """
    rows, contexts = ((1, 4), (24,)) if options.fast else ((1, 4, 16, 32), (128, 256, 512))
    rounds = options.rounds if options.fast else max(options.rounds, 7)
    longest = -(-(max(contexts) + drift(rounds, rows) + 16) // 16) * 16
    engines = {stage: runs.build(options.model, stage, max(rows), longest) for stage in stages}
    runs.share_weights(engines.values())
    cells: list[dict[str, Any]] = []
    what, total = f"decode steps: stage {', '.join(stages)}", len(rows) * len(contexts) * len(stages) * (rounds + 1)
    with told_of(options, what, total) as told:
        for count, context, timed in decode_times(engines, rows, contexts, rounds, options.seed, told):
            cell = {
                "rows": count,
                "context": context,
                "ms": {stage: timed.median(stage) for stage in stages},
                "speed": vars(timed.ratio(*stages)),
            }
            if copies:
                cell["copy_ms"] = median(copy_ms(engines[stages[1]]) for _ in range(rounds))
            cells.append(cell)
    slowest = min(float(cell["speed"]["median"]) for cell in cells)
    return {"stages": list(stages), "cells": cells, "slowest": slowest, "bar": bar, "met": slowest >= bar}


def compare_text(result: Mapping[str, Any]) -> list[str]:
    """A comparison as lines of at most 120 columns."""
    first, second = result["stages"]
    lines = [f"    slowest {result['slowest']:.2f}x; {bar_text(dict(result), '>=')}"]
    for cell in result["cells"]:
        ms = cell["ms"]
        lines.append(
            f"    {cell['rows']:3} rows at {cell['context']:4}: {ms[first]:6.1f} ms, stage {second} "
            f"{ms[second]:6.1f} ms, speed {ratio_text(cell['speed'])}"
            + (f"; copying alone {cell['copy_ms']:.1f} ms" if "copy_ms" in cell else "")
        )
    return lines


def drift(rounds: int, rows: Sequence[int]) -> int:
    """Tokens by which every request grows while it is measured with `rounds` rounds at each of `rows`."""
    return (rounds + 1) * STEPS * len(rows)


def decode_times(
    engines: Mapping[str, LLM],
    rows: Sequence[int],
    contexts: Sequence[int],
    rounds: int,
    seed: int = 0,
    told: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, int, Paired]]:
    """(rows, context, milliseconds of each engine's steps in turns) for every pair of them.

    The prompts of one context run once: `rows` are taken in falling order, and requests that are too
    many are dropped. A context is the middle of what it grows through. The engines are left empty.
    """
    ids = workloads.corpus(None, next(iter(engines.values())).config.vocab_size)
    grows = drift(rounds, rows)
    for context in contexts:
        for llm in engines.values():
            _fill(llm, ids, max(rows), max(1, context - grows // 2), grows, seed)
        for count in sorted(rows, reverse=True):
            for llm in engines.values():
                _thin(llm, count)
            arms = {name: lambda llm=llm: min(_step(llm) for _ in range(STEPS)) for name, llm in engines.items()}
            yield count, context, alternate(arms, rounds, told=told)
        for llm in engines.values():
            _thin(llm, 0)


def copy_ms(llm: LLM) -> float:
    """Milliseconds to copy the blocks of all running requests together once, in all layers: what a gather costs."""
    blocks = [block for request in llm.engine.requests.values() for block in request.blocks]
    pool = llm.engine.runner.pool
    heads = pool.storage.shape[3]
    table = torch.tensor(blocks)[:, None] * 2 * heads + torch.arange(heads)
    keys = table.flatten()
    began = time.perf_counter()
    for storage in pool.layers:
        tiles = storage.view(-1, storage.shape[-2] * storage.shape[-1])
        tiles.index_select(0, keys)
        tiles.index_select(0, keys + heads)
    return 1e3 * (time.perf_counter() - began)


def _fill(llm: LLM, ids: np.ndarray, rows: int, context: int, grows: int, seed: int) -> None:
    """Let `rows` requests run their prompts of `context` tokens, no decode yet."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=grows + 2)
    work = workloads.uniform(ids, seed, rows, (context, context), (1, 1))
    for prompt in work.prompts:
        llm.engine.add_request(list(prompt), params)
    while any(request.state is not State.RUNNING for request in llm.engine.requests.values()):
        llm.engine.advance()


def _thin(llm: LLM, rows: int) -> None:
    """Drop the last requests, so that the first `rows` remain, in slots and blocks side by side."""
    for request in sorted(llm.engine.requests)[rows:]:
        llm.engine.abort(request)
    llm.engine.collect()


def _step(llm: LLM) -> float:
    llm.engine.advance()
    record = runs.trace_of(llm).steps[-1]
    return 1e3 * (record.t_done - record.t_plan)
