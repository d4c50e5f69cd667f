"""A driver that steps an engine by hand and knows what stage 0 would have answered."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from stepengine import LLM, SamplingParams

Outputs = dict[int, list[list[int]]]


@pytest.fixture
def drain() -> Callable[[LLM], Outputs]:
    """drain(llm) -> {request id: token ids of each sample} of all that is left in the engine, run to its end."""

    def run(llm: LLM) -> Outputs:
        outputs: Outputs = {}
        while llm.engine.has_unfinished():
            for output in llm.engine.step():
                outputs[output.request_id] = [sample.token_ids for sample in output.outputs]
        assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens
        assert not llm.engine.requests
        return outputs

    return run


@pytest.fixture
def naive(tiny: Callable[..., LLM]) -> Callable[..., list[list[int]]]:
    """naive(prompt, params) -> token ids of each sample, by stage 0, which keeps nothing."""
    llm = tiny(stage="0")

    def answer(prompt: Sequence[int], params: SamplingParams) -> list[list[int]]:
        return [sample.token_ids for sample in llm.generate([list(prompt)], params)[0].outputs]

    return answer


@pytest.fixture
def greedy() -> Callable[..., SamplingParams]:
    """greedy(max_tokens, **changes) -> parameters that run to their length."""

    def make(max_tokens: int, **changes: Any) -> SamplingParams:
        return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **changes})

    return make
