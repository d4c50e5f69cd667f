"""What `LLM` takes and refuses from stage 4 on, and that a salt keeps tenants apart."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.errors import InvalidRequest, InvalidSetting
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage4_chunked_prefix.block_pool import LeastRecentlyUsed
from stepengine.stage4_chunked_prefix.prefix_index import RadixPrefixIndex
from stepengine.stage4_chunked_prefix.scheduler import BudgetScheduler
from stepengine.trace import Replay, load, save

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": "4b", "max_num_batched_tokens": 16}, "without chunked prefill"),
        ({"stage": 3, "max_num_batched_tokens": 16}, "without chunked prefill"),
        ({"stage": 3, "long_prefill_token_threshold": 8}, "stage 3 does not have it"),
        ({"stage": "4b", "long_prefill_token_threshold": 8}, "in one piece"),
        ({"stage": 4, "long_prefill_token_threshold": 0}, "long_prefill_token_threshold is 0"),
        ({"stage": 4, "max_num_batched_tokens": 3, "max_num_seqs": 4}, "below max_num_seqs 4"),
        ({"stage": "4a", "prefix_index": "hash"}, "no prefix cache"),
        ({"stage": "4a", "evictor": LeastRecentlyUsed}, "no prefix cache"),
        ({"stage": 4, "prefix_index": "trie"}, "'hash', 'radix'"),
        ({"stage": 4, "evictor": 3}, "evictor is 3"),
        ({"stage": 4, "prefix_index": "hash", "block_pool": BlockPool}, "leave one of them out"),
        ({"stage": 4, "block_pool": BlockPool}, "without find"),
        ({"stage": 3, "prefix_index": "hash"}, "use stage 4"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str, tiny: Callable[..., LLM]):
    with pytest.raises(InvalidSetting, match=words):
        tiny(**settings)


def test_a_budget_alone_bounds_the_places(tiny: Callable[..., LLM]):
    llm = tiny(stage=4, max_num_batched_tokens=5, max_num_seqs=None)
    assert llm.engine.limits.max_num_seqs == 5
    assert len(llm.generate([[1] * 40] * 7, GREEDY)) == 7


def test_a_scheduler_with_some_arguments_filled_in_still_chunks(tiny: Callable[..., LLM]):
    oldest = partial(BudgetScheduler, pick_victim=lambda candidates: candidates[0])
    llm = tiny(stage=4, scheduler=oldest, max_num_batched_tokens=5)
    assert llm.trace is not None and llm.trace.meta["chunked"]
    assert len(llm.generate([1] * 30, GREEDY)[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("index", ["hash", "radix", RadixPrefixIndex])
def test_only_the_same_salt_finds_a_prefix(index: Any, tiny: Callable[..., LLM]):
    llm = tiny(stage="4b", prefix_index=index, evictor=LeastRecentlyUsed, block_size=4)
    prompt = [5] * 17

    def hits(**salt: Any) -> int:
        before = llm.stats()["prefix_hit_tokens"]
        llm.generate(prompt, GREEDY, **salt)
        return llm.stats()["prefix_hit_tokens"] - before

    assert [hits(), hits(), hits(cache_salt="a"), hits(cache_salt="b"), hits(cache_salt="a")] == [0, 16, 0, 0, 16]
    llm.generate([prompt, prompt], GREEDY, cache_salt=["a", "c"])
    with pytest.raises(InvalidRequest, match="Prompt 0: cache_salt is 7"):
        llm.generate([prompt], GREEDY, cache_salt=[7])
    with pytest.raises(InvalidRequest, match="1 entries for 2 prompts"):
        llm.generate([prompt, prompt], GREEDY, cache_salt=["a"])


def test_a_fork_keeps_its_parents_salt(tiny: Callable[..., LLM]):
    engine = tiny(stage=4, block_size=4).engine
    parent = engine.add_request([5] * 9, GREEDY, cache_salt="a")
    engine.step()
    child = engine.fork(parent)
    assert engine.requests[child].cache_salt == "a"


def test_a_trace_with_salts_replays_and_survives_saving(tiny: Callable[..., LLM], tmp_path: Path):
    llm = tiny(stage="4b", block_size=4)
    for salt in ("a", "b", "a"):
        llm.generate([5] * 17, GREEDY, cache_salt=salt)
    assert llm.trace is not None
    loaded = load(save(llm.trace, tmp_path / "salts.jsonl"))
    assert [info.cache_salt for info in loaded.requests.values()] == ["a", "b", "a"]
    assert [len(seen.hit_blocks) for seen in Replay(loaded)][::4] == [0, 0, 4]
