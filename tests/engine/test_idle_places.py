"""Static against continuous batching on sets whose step counts can be worked out by hand."""

import heapq
from collections.abc import Callable

import pytest

from stepengine import LLM, SamplingParams
from stepengine.trace import summarize

SETS = {
    "one long among short": ([8, 1, 1, 1, 1, 1, 1, 1], 2),
    "falling": ([8, 7, 6, 5, 4, 3, 2, 1], 3),
    "equal": ([4] * 6, 3),
    "one place": ([3, 1, 2], 1),
    "more places than requests": ([5, 2], 4),
}


def run(llm: LLM, lengths: list[int]) -> None:
    prompts = [[10 + number] * (1 + number % 3) for number in range(len(lengths))]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    outs = llm.generate(prompts, params)
    assert [len(out.outputs[0].token_ids) for out in outs] == lengths


def decode_steps(llm: LLM) -> int:
    """Steps that begin no request."""
    return sum(all(chunk.start > 0 for chunk in record.plan.chunks) for record in llm.trace.steps)


@pytest.mark.parametrize("name", SETS)
def test_static_batches_last_as_long_as_their_longest(name: str, tiny: Callable[..., LLM]):
    lengths, places = SETS[name]
    llm = tiny(stage="1a", max_num_seqs=places)
    run(llm, lengths)
    batches = [lengths[at : at + places] for at in range(0, len(lengths), places)]
    assert decode_steps(llm) == sum(max(batch) - 1 for batch in batches)
    idle = sum(sum(max(batch) - length for length in batch) for batch in batches)
    assert summarize(llm.trace)["idle_slot_steps"] == idle


@pytest.mark.parametrize("name", SETS)
def test_continuous_batching_is_list_scheduling(name: str, tiny: Callable[..., LLM]):
    lengths, places = SETS[name]
    llm = tiny(stage="1b", max_num_seqs=places)
    run(llm, lengths)
    free = [0] * places  # when each place falls free, in decode steps; a prompt's own step takes none
    heapq.heapify(free)
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length - 1)
    assert decode_steps(llm) == max(free)
    assert summarize(llm.trace)["idle_slot_steps"] == 0


@pytest.mark.parametrize("stage", ["0", "1a", "1b"])
def test_computed_tokens_are_the_formula(stage: str, tiny: Callable[..., LLM]):
    llm = tiny(stage=stage, max_num_seqs=2)
    lengths = [6, 2, 4]
    run(llm, lengths)
    prompt = [1 + number % 3 for number in range(3)]
    naive = sum(n * p + n * (n - 1) // 2 for p, n in zip(prompt, lengths, strict=True))
    once = sum(p + n - 1 for p, n in zip(prompt, lengths, strict=True))
    assert summarize(llm.trace)["tokens_computed"] == (naive if stage == "0" else once)
    assert llm.stats()["tokens_computed"] == (naive if stage == "0" else once)
