"""The first cache and batches: claims C1, C2, C4, C18."""

import random
from collections.abc import Callable
from typing import Any

from stepengine.bench import batching, runs, workloads
from stepengine.bench.evidence.common import TINY, Evidence, Number, Workbench
from stepengine.bench.workloads import Workload
from stepengine.calculator import kv_bytes_by_hidden_size, kv_bytes_per_token, shape_of
from stepengine.core.request import Request, SamplingParams
from stepengine.core.seams import Limits
from stepengine.llm import LLM
from stepengine.stage0_naive.scheduler import StaticScheduler
from stepengine.stage1_kvcache.cache import SlotCache
from stepengine.stage1_kvcache.scheduler import ContinuousScheduler
from stepengine.trace import idle_rows


def hidden_size(bench: Workbench) -> Evidence:
    """C1: bytes by hidden_size over bytes by K/V heads, and the storage of a running engine."""
    numbers = []
    for name in ("SmolLM2-135M", "Qwen3-0.6B", "Llama-2-7B", "Llama-3-8B"):
        shape = shape_of(name)
        ratio = kv_bytes_by_hidden_size(shape) / kv_bytes_per_token(shape)
        numbers.append(Number(f"{name}, hidden_size over truth", ratio, "times"))
    llm = runs.build(TINY, "2", 2, 64)
    pool = llm.engine.runner.pool
    stored = pool.block_bytes / llm.engine.limits.block_size
    numbers.append(Number("an engine's storage over 2 x layers x K/V heads x head_dim", stored / _kv(llm), "times"))
    values = [number.value for number in numbers]
    return Evidence(
        "by formula on published configs", tuple(numbers), values[1] == values[2] == values[4] == 1 < values[3]
    )


def _kv(llm: LLM) -> float:
    config = llm.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4


def per_step(bench: Workbench) -> Evidence:
    """C2: tokens run and (query, key) pairs scored for one answer and for one twice as long."""
    counts = {}
    for stage in ("0", "1a"):
        for answer in (48, 96):
            llm = runs.build(TINY, stage, 1, answer + 1)
            done = runs.run(llm, Workload("answer", ((7,),), (answer,), 0))
            chunks = [chunk for record in done.trace.steps for chunk in record.plan.chunks]
            pairs = sum(chunk.length * chunk.end for chunk in chunks)
            counts[stage, answer] = sum(chunk.length for chunk in chunks), pairs
    numbers = []
    for stage, name in (("0", "without a cache"), ("1a", "with a cache")):
        tokens, pairs = (counts[stage, 96][at] / counts[stage, 48][at] for at in (0, 1))
        numbers += [Number(f"{name}, tokens run", tokens, "times"), Number(f"{name}, pairs scored", pairs, "times")]
    agrees = abs(numbers[2].value - 2) < 0.05 and abs(numbers[3].value - 4) < 0.1
    return Evidence("counted: an answer twice as long takes", tuple(numbers), agrees)


def bounded_gain(bench: Workbench) -> Evidence:
    """C4: static over continuous decode steps of the real schedulers without a model, and the bound of the lengths."""
    rng, numbers, agrees = random.Random(bench.seed), [], True
    slots, count = 64, 640
    mixes = {
        "uniform 100..1024": lambda: rng.randint(100, 1024),
        "exponential, mean 200": lambda: max(1, round(rng.expovariate(1 / 200))),
    }
    for name, draw in mixes.items():
        bound = batching.expected_max_over_mean([draw() for _ in range(20_000)], slots)
        lengths = [draw() for _ in range(count)]
        static, continuous = (decode_steps(each, lengths, slots) for each in (StaticScheduler, ContinuousScheduler))
        numbers.append(Number(f"{name}, gain", static / continuous, "times"))
        numbers.append(Number(f"{name}, bound", bound, "times"))
        agrees &= 1 < static / continuous < 1.05 * bound  # the bound holds for averages
    return Evidence(
        f"schedulers without a model, {count} requests on {slots} slots, decode steps", tuple(numbers), agrees
    )


def decode_steps(scheduler: Callable[..., Any], lengths: list[int], slots: int) -> int:
    """Steps without a prompt that a scheduler over slots takes for answers of these lengths, all there at once."""
    room = max(lengths) + 2
    limits = Limits(slots, 10**6, room, block_size=room, num_blocks=slots)
    queue = scheduler(limits, SlotCache(limits))
    for number, length in enumerate(lengths):
        queue.add(Request(number, [1], SamplingParams(max_tokens=length), max_len=length + 1))
    steps = 0
    while not queue.idle():
        plan = queue.plan()
        steps += all(chunk.start > 0 for chunk in plan.chunks)
        queue.update(plan, [1] * len(plan.chunks))
    return steps


def no_padding(bench: Workbench) -> Evidence:
    """C18: tokens that a run computed, and those of the same run as rectangles."""
    llm = runs.build(TINY, "1a", 4, 64)
    ids = workloads.corpus(None, llm.config.vocab_size)
    done = runs.run(llm, workloads.uniform(ids, bench.seed, 8, (4, 24), (4, 24)))
    needed = sum(len(prompt) + outputs - 1 for prompt, outputs in done.workload.sequences)
    ours = sum(record.plan.num_tokens for record in done.trace.steps)
    padded = 0
    for record, idle in zip(done.trace.steps, idle_rows(done.trace), strict=True):
        chunks = record.plan.chunks
        padded += (len(chunks) + idle) * max(chunk.length for chunk in chunks)
    first = max(done.trace.steps, key=lambda record: record.plan.num_tokens).plan.chunks
    lengths = {chunk.length for chunk in first}
    numbers = (
        Number("tokens needed", needed), Number("tokens our batch computes", ours),
        Number("tokens as padded rectangles", padded), Number("different lengths in one step", len(lengths)),
    )  # fmt: skip
    return Evidence("counted in one run, static batches", numbers, ours == needed < padded and len(lengths) > 1)
