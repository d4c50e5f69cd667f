"""Engines of stage 4 with any of its parts changed, and the same driver as for stage 2."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stepengine import LLM
from stepengine.core.seams import Limits
from stepengine.stage4_chunked_prefix.scheduler import BudgetScheduler
from tests.paged.conftest import drain, greedy, naive  # noqa: F401  fixtures


def budget(tokens: int, longest_chunk: int = 0, **how: Any) -> Callable[..., BudgetScheduler]:
    """A scheduler with a budget of its own, whatever the engine's limits say."""

    def make(limits: Limits, cache: Any) -> BudgetScheduler:
        limits = replace(limits, max_num_batched_tokens=tokens, long_prefill_token_threshold=longest_chunk)
        return BudgetScheduler(limits, cache, **how)

    return make


@pytest.fixture
def chunked(tiny: Callable[..., LLM]) -> Callable[..., LLM]:
    """chunked(budget, **settings) -> an engine of stage 4 (or the `stage` given) whose steps run so many tokens."""

    def make(tokens: int, longest_chunk: int = 0, **settings: Any) -> LLM:
        return tiny(**{"stage": "4", "scheduler": budget(tokens, longest_chunk), **settings})

    return make
