"""Milliseconds per decode step at a fixed number of rows and a fixed context, several engines in turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from stepengine.bench import runs, workloads
from stepengine.bench.measure import Paired, alternate
from stepengine.core.request import SamplingParams, State
from stepengine.llm import LLM

STEPS = 3  # decode steps in a round; the fastest counts, so that a step someone else disturbed does not


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
    import time

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
