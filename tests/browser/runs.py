"""Short real runs of the engine on tiny random weights, whose traces the pages show."""

from collections.abc import Callable
from typing import Any

from stepengine import LLM, SamplingParams
from stepengine.trace import Trace

PROMPTS = [[5 + (7 * i + 3 * k) % 90 for k in range(length)] for i, length in enumerate((9, 14, 6, 11, 8))]
SHARED = list(range(20, 32))


def run(stage: str, **settings: Any) -> Trace:
    """Five requests of unlike lengths through one stage, until all have ended."""
    llm = LLM("tiny-random", stage=stage, max_model_len=64, trace=True, **settings)
    params = [SamplingParams(temperature=0.0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    prompts = [SHARED + prompt for prompt in PROMPTS] if stage == "4" else PROMPTS
    llm.generate(prompts, params)
    return llm.trace


def naive() -> Trace:
    return run("0", max_num_seqs=3)


def continuous() -> Trace:
    return run("1b", max_num_seqs=3)


def swapping() -> Trace:
    """A pool that is too small for all five, so that requests give way to the host and come back."""
    trace = run("2", max_num_seqs=4, block_size=4, num_blocks=14, preemption="swap", swap_space=1 << 20)
    assert any(record.plan.swapped_out for record in trace.steps), "nothing was swapped: the pool is too large"
    return trace


def chunked() -> Trace:
    trace = run("4", max_num_seqs=4, block_size=4, max_num_batched_tokens=16)
    assert any(chunk.length > 1 and chunk.start > 0 for record in trace.steps for chunk in record.plan.chunks)
    return trace


RUNS: dict[str, Callable[[], Trace]] = {"0": naive, "1b": continuous, "2": swapping, "4": chunked}
