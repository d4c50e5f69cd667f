"""Part of the GPU suite for stage 5, end to end: a decode step with weights of 4 bits against one with 16."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from stepengine.bench import workloads
from stepengine.bench.gpu_engine import steps_s
from stepengine.bench.gpu_setup import Setup, attempt, best_switches, engine
from stepengine.bench.measure import alternate
from stepengine.llm import LLM

Entries = Iterator[tuple[str, Any]]
BASE = "4"  # the same engine, its weights of 16 bits
ARMS: dict[str, dict[str, Any]] = {BASE: {}, "5": {}, "5, int8 head": {"int8_head": True}}


def quantized(setup: Setup) -> Entries:
    """ms of a decode step around context 512, by batch, the stages in turns; graphs and pipelining on.

    Weights are rounded to nearest: what a step takes does not depend on their values. With the tables in 8 bits
    too ("int8 head") at batch 1, where they are a large part of what is read.
    """
    for batch, arms in ((1, tuple(ARMS)), (setup.of(256, 3), (BASE, "5"))):
        yield str(batch), attempt(lambda b=batch, a=arms: _decode(setup, b, a))


def _decode(setup: Setup, batch: int, arms: tuple[str, ...]) -> dict[str, Any]:
    context, steps, rounds, warmup = setup.of((512, 32, 5, 8), (8, 2, 2, 1))
    outputs = warmup + (rounds + 1) * steps + 8
    length = max(1, context - outputs // 2)
    engines = {name: _running(setup, name, batch, length, outputs, warmup) for name in arms}
    timed = alternate(
        {name: lambda llm=llm: 1e3 * steps_s(setup, llm, steps) / steps for name, llm in engines.items()}, rounds
    )
    weights = {name: sum(w.nbytes for w in llm.engine.runner.model.parameters()) for name, llm in engines.items()}
    return {
        "ms": timed.values,
        "ms_per_step": {name: median(values) for name, values in timed.values.items()},
        "speed": {name: vars(timed.ratio(BASE, name)) for name in arms if name != BASE},
        "weight_bytes": weights,
    }


def _running(setup: Setup, arm: str, batch: int, length: int, outputs: int, warmup: int) -> LLM:
    """An engine whose `batch` requests of `length` tokens have all run their prompts and some decode steps."""
    stage, longest = arm[0], length + outputs
    budget = setup.of(8192, None)
    llm = engine(setup, stage, batch, longest, max_num_batched_tokens=budget, **best_switches(stage), **ARMS[arm])
    needed = batch * -(-longest // llm.engine.limits.block_size)
    if llm.engine.limits.num_blocks < needed:
        raise MemoryError(f"{llm.engine.limits.num_blocks} blocks fit here, and a batch of {batch} needs {needed}")
    work = workloads.uniform(
        workloads.corpus(None, llm.config.vocab_size), 0, batch, (length, length), (outputs, outputs)
    )
    for prompt, params in zip(work.prompts, work.params(), strict=True):
        llm.engine.add_request(list(prompt), params)
    while llm.engine.counters["tokens_generated"] < batch * warmup:
        llm.engine.advance()
    return llm
