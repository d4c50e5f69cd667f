"""Bad input: the project's own exception, one sentence with value, limit and remedy, and nothing touched."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepengine import LLM, SamplingParams
from stepengine.core.plan import StepPlan
from stepengine.core.request import Request
from stepengine.errors import InvalidRequest, InvalidSetting, ModelError, NoProgress, StepEngineError
from stepengine.stage0_naive.cache import NoCache
from stepengine.stage1_kvcache.attention import SlotAttention
from stepengine.stage1_kvcache.cache import SlotCache
from stepengine.stage1_kvcache.scheduler import ContinuousScheduler

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)

# What is wrong with a prompt (max_model_len 64, vocabulary 499), and words that the sentence must hold.
PROMPTS: dict[str, tuple[Any, list[str]]] = {
    "empty list": ([], ["empty", "at least one"]),
    "too long": ([1] * 64, ["64", "max_model_len", "shorten"]),
    "far too long": ([1] * 5000, ["5000", "64", "shorten"]),
    "id beyond the vocabulary": ([3, 499], ["499", "0 to 498"]),
    "negative id": ([3, -1], ["-1", "0 to 498"]),
    "huge id": ([2**70], [str(2**70), "0 to 498"]),
    "float id": ([3, 1.0], ["1.0", "whole"]),
    "bool id": ([3, True], ["True", "whole"]),
    "text id": ([3, "4"], ["'4'", "whole"]),
    "None id": ([None], ["None", "whole"]),
    "nested list": ([[3, 4]], ["[3, 4]", "whole"]),
    "None": (None, ["NoneType"]),
    "bytes": (b"abc", ["bytes"]),
    "number": (7, ["int"]),
    "float": (7.5, ["float"]),
    "dict": ({"prompt": [3]}, ["dict"]),
    "text without tokenizer": ("hello", ["tokenizer", "token ids"]),
    "numpy floats": (np.array([1.0, 2.0]), ["1.0"]),
}
PARAMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "temperature below 0": ({"temperature": -0.1}, ["temperature", "-0.1", "at least 0"]),
    "temperature NaN": ({"temperature": float("nan")}, ["temperature", "nan"]),
    "temperature infinite": ({"temperature": float("inf")}, ["temperature", "inf"]),
    "temperature beyond floats": ({"temperature": 10**400}, ["temperature"]),
    "temperature text": ({"temperature": "1"}, ["temperature", "'1'"]),
    "temperature bool": ({"temperature": True}, ["temperature", "True"]),
    "top_p 0": ({"top_p": 0.0}, ["top_p", "0.0", "at most 1"]),
    "top_p above 1": ({"top_p": 1.01}, ["top_p", "1.01", "at most 1"]),
    "top_p NaN": ({"top_p": float("nan")}, ["top_p", "nan"]),
    "top_p None": ({"top_p": None}, ["top_p", "None"]),
    "top_k -2": ({"top_k": -2}, ["top_k", "-2"]),
    "top_k float": ({"top_k": 3.0}, ["top_k", "3.0", "whole"]),
    "min_p above 1": ({"min_p": 1.5}, ["min_p", "1.5"]),
    "min_p NaN": ({"min_p": float("nan")}, ["min_p", "nan"]),
    "n 0": ({"n": 0}, ["n is 0", "at least 1"]),
    "n -1": ({"n": -1}, ["n is -1", "at least 1"]),
    "n float": ({"n": 2.0}, ["n is 2.0"]),
    "n bool": ({"n": True}, ["n is True"]),
    "max_tokens 0": ({"max_tokens": 0}, ["max_tokens", "0", "at least 1"]),
    "max_tokens float": ({"max_tokens": 1e3}, ["max_tokens", "1000.0"]),
    "min_tokens above max_tokens": ({"min_tokens": 9, "max_tokens": 4}, ["9", "4", "lower"]),
    "min_tokens negative": ({"min_tokens": -1}, ["min_tokens", "-1"]),
    "repetition_penalty 0": ({"repetition_penalty": 0}, ["repetition_penalty", "0"]),
    "presence_penalty 3": ({"presence_penalty": 3}, ["presence_penalty", "3", "-2 to 2"]),
    "frequency_penalty NaN": ({"frequency_penalty": float("nan")}, ["frequency_penalty", "nan"]),
    "seed float": ({"seed": 1.5}, ["seed", "1.5"]),
    "logprobs -1": ({"logprobs": -1}, ["logprobs", "-1"]),
    "logprobs bool": ({"logprobs": True}, ["logprobs", "True"]),
    "stop empty text": ({"stop": ["a", ""]}, ["stop", "empty"]),
    "stop number": ({"stop": 5}, ["stop", "5"]),
    "stop_token_ids negative": ({"stop_token_ids": [-3]}, ["stop_token_ids", "-3"]),
    "stop_token_ids text": ({"stop_token_ids": "ab"}, ["stop_token_ids", "ab"]),
    "ignore_eos number": ({"ignore_eos": 1}, ["ignore_eos", "1"]),
}


def sentence(caught: pytest.ExceptionInfo[BaseException], words: list[str]) -> None:
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.endswith((".", "?")) and "\n" not in text and len(text) > 25


@pytest.mark.parametrize("kind", PARAMS)
def test_sampling_parameters(kind: str):
    settings, words = PARAMS[kind]
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**settings)
    sentence(caught, words)
    with pytest.raises(InvalidRequest):
        SamplingParams().replace(**settings)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("index", [0, 2])
def test_generate_names_the_index_and_schedules_nothing(
    kind: str, index: int, tiny: Callable[..., LLM], usable: Callable[[LLM], None]
):
    llm = tiny(stage="1b")
    prompt, words = PROMPTS[kind]
    batch: list[Any] = [[5, 6], [7], [8, 9], [10]]
    batch[index] = prompt
    others = [llm.engine.add_request(ids, GREEDY) for ids in ([20, 21], [22] * 9)]
    llm.engine.step()
    before = (llm.stats(), len(llm.trace.steps), len(llm.trace.requests))
    with pytest.raises(InvalidRequest, match=rf"^Prompt {index}: ") as caught:
        llm.generate(batch, GREEDY)
    sentence(caught, words)
    assert (llm.stats(), len(llm.trace.steps), len(llm.trace.requests)) == before
    ended = []
    while llm.engine.has_unfinished():
        ended += [out.request_id for out in llm.engine.step()]
    assert sorted(ended) == others
    usable(llm)


@pytest.mark.parametrize("kind", [kind for kind in PROMPTS if kind not in ("text without tokenizer",)])
def test_add_request_and_stream_refuse_the_same(kind: str, tiny: Callable[..., LLM]):
    llm = tiny(stage="1b")
    for refuse in (llm.engine.add_request, llm.stream):
        with pytest.raises(InvalidRequest):
            refuse(PROMPTS[kind][0])
    assert not llm.engine.requests and not llm.trace.requests


@pytest.mark.parametrize("prompts", [None, 5, 5.5, b"abc", {"a": [1]}, True, np.int64(3), torch.tensor(3)], ids=repr)
def test_prompts_of_the_wrong_type(prompts: Any, tiny: Callable[..., LLM]):
    with pytest.raises(InvalidRequest) as caught:
        tiny().generate(prompts)
    sentence(caught, ["prompts", "list"])


def test_lists_that_do_not_match_the_prompts(tiny: Callable[..., LLM], usable: Callable[[LLM], None]):
    llm = tiny()
    for wrong in ({"params": [GREEDY]}, {"params": [GREEDY] * 3}, {"priority": [1]}):
        with pytest.raises(InvalidRequest, match="for 2 prompts"):
            llm.generate([[1], [2]], **wrong)
    for params in ({"temperature": 0}, "greedy", [GREEDY, None], [None, GREEDY]):
        with pytest.raises(InvalidRequest):
            llm.generate([[1], [2]], params)
    for priority in ([0, "x"], [0, 1.5], [0, True], None):
        with pytest.raises(InvalidRequest, match="Prompt [01]: priority"):
            llm.generate([[1], [2]], GREEDY, priority=priority)
    with pytest.raises(InvalidRequest, match="Prompt 1: .*499"):
        llm.generate([[1], [2]], [GREEDY, GREEDY.replace(stop_token_ids=[499])])
    with pytest.raises(InvalidRequest, match="Prompt 0: .*tokenizer"):
        llm.generate([[1]], GREEDY.replace(stop="x"))
    with pytest.raises(InvalidRequest, match="chat template"):
        llm.chat([{"role": "user", "content": "Hi"}])
    usable(llm)


def test_what_is_accepted(tiny: Callable[..., LLM]):
    llm = tiny(stage="1b")
    want = llm.generate([[3, 4]], GREEDY)[0].outputs[0].token_ids
    same: list[Any] = [[3, 4], (3, 4), [np.int64(3), np.int32(4)], np.array([3, 4]), [[3, 4]], ([3, 4],)]
    same += [torch.tensor([3, 4]), torch.tensor([[3, 4]]), [torch.tensor([3, 4])], np.array([[3, 4]])]
    assert [llm.generate(prompts, GREEDY)[0].outputs[0].token_ids for prompts in same] == [want] * len(same)
    assert llm.generate([np.array([3, 4])], GREEDY)[0].prompt_token_ids == [3, 4]
    assert all(type(token) is int for token in llm.generate([np.int64(3)], GREEDY)[0].prompt_token_ids)
    assert llm.generate([], GREEDY) == [] == llm.generate([])
    assert len(llm.generate([[1] * 63], SamplingParams(max_tokens=500))[0].outputs[0].token_ids) == 1
    assert len(llm.generate([[1]], GREEDY.replace(max_tokens=1))[0].outputs[0].token_ids) == 1
    assert len(llm.generate([[1]], GREEDY.replace(max_tokens=10**9))[0].outputs[0].token_ids) == 63
    odd = SamplingParams(top_k=10**12, temperature=np.float32(0.5), seed=np.int64(3), stop=None, stop_token_ids=None)
    even = SamplingParams(temperature=0.5, seed=3)
    ids = [llm.generate([[1]], params)[0].outputs[0].token_ids for params in (odd, even)]
    assert ids[0] == ids[1]


# -- settings -----------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown stage": ({"stage": "9"}, ["'9'", "0, 1a, 1b"]),
    "stage bool": ({"stage": True}, ["True"]),
    "stage None": ({"stage": None}, ["None"]),
    "stage folder": ({"stage": "stage7_magic"}, ["stage7_magic"]),
    "unknown setting": ({"blok_size": 16}, ["blok_size", "block_size"]),
    "nonsense setting": ({"zzzzzz": 16}, ["zzzzzz"]),
    "block_size before stage 2": ({"block_size": 16}, ["block_size", "16", "stage 2"]),
    "num_blocks before stage 2": ({"num_blocks": 16, "stage": "1a"}, ["num_blocks", "stage 2"]),
    "cuda_graphs before stage 3": ({"cuda_graphs": True}, ["cuda_graphs", "stage 3"]),
    "kv_cache_memory in stage 0": ({"kv_cache_memory": 2**20, "stage": "0"}, ["kv_cache_memory", "stage 1"]),
    "max_num_seqs 0": ({"max_num_seqs": 0}, ["max_num_seqs", "0"]),
    "max_num_seqs float": ({"max_num_seqs": 2.0}, ["max_num_seqs", "2.0"]),
    "max_num_seqs too many": ({"max_num_seqs": 10**9}, ["max_num_seqs", str(10**9)]),
    "max_num_seqs too many, stage 0": ({"max_num_seqs": 10**9, "stage": "0"}, ["max_num_seqs", str(10**9)]),
    "slots beyond the budget": (
        {"max_num_seqs": 9, "kv_cache_memory": 2**17},
        ["9", "max_num_seqs", "kv_cache_memory"],
    ),
    "no slot fits": ({"max_num_seqs": None, "kv_cache_memory": 100}, ["max_model_len", "kv_cache_memory"]),
    "max_model_len negative": ({"max_model_len": -5}, ["max_model_len", "-5"]),
    "max_model_len beyond the model": ({"max_model_len": 5000}, ["5000", "4096", "lower"]),
    "budget below max_model_len": ({"max_num_batched_tokens": 63}, ["63", "64", "raise"]),
    "dtype": ({"dtype": "int8"}, ["int8", "float32"]),
    "dtype torch": ({"dtype": torch.float64}, ["float64", "float32"]),
    "device": ({"device": "tpu"}, ["tpu", "cuda"]),
    "device None": ({"device": None}, ["None", "cuda"]),
    "seed": ({"seed": "x"}, ["seed", "'x'"]),
    "cache that stores, without storage": (
        {"stage": "0", "cache": SlotCache, "attention": SlotAttention},
        ["stage 1a"],
    ),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings(kind: str, tiny: Callable[..., LLM]):
    settings, words = SETTINGS[kind]
    with pytest.raises(InvalidSetting) as caught:
        tiny(**settings)
    sentence(caught, words)


def test_a_gpu_that_is_not_there(tiny: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidSetting) as caught:
        tiny(device="cuda")
    sentence(caught, ["cuda", "no GPU", "cpu"])


@pytest.mark.parametrize("name", ["tiny-randon", "no/such/folder", "", None, 5], ids=repr)
def test_models_that_are_not_there(name: Any):
    with pytest.raises(ModelError) as caught:
        LLM(name)
    assert len(str(caught.value)) > 25


def test_folders_that_are_not_models(tmp_path: Path):
    with pytest.raises(ModelError, match="config.json"):
        LLM(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        LLM(tmp_path / "none")


# -- abort --------------------------------------------------------------------------------------------


def test_abort_is_harmless_and_ends_a_whole_group(tiny: Callable[..., LLM], usable: Callable[[LLM], None]):
    llm = tiny(stage="1b", max_num_seqs=2)
    engine = llm.engine
    for unknown in (-1, 0, 99, 10**30):
        engine.abort(unknown)
    assert engine.collect() == [] and llm.trace.steps == []
    group = engine.add_request([5, 6], GREEDY.replace(n=3))
    other = engine.add_request([7], GREEDY)
    engine.step()
    engine.abort(group)
    engine.abort(group)
    (out,) = engine.step()
    assert out.request_id == group and out.finished
    assert [sample.finish_reason for sample in out.outputs] == ["abort"] * 3
    assert sorted(len(sample.token_ids) for sample in out.outputs) == [0, 1, 1]
    engine.abort(group)
    (last,) = [ended for _ in range(6) for ended in engine.step()]
    assert last.request_id == other and len(last.outputs[0].token_ids) == 5
    engine.abort(other)
    usable(llm)


# -- parts that break their promises --------------------------------------------------------------------


class OneMore(SlotCache):
    def commit(self, request: Request, upto: int) -> int:
        return upto + 1 if request.num_outputs == 2 else upto


class OneLess(SlotCache):
    def commit(self, request: Request, upto: int) -> int:
        return upto - 1


class Nothing(SlotCache):
    def commit(self, request: Request, upto: int) -> int:
        return 0


class Lazy(ContinuousScheduler):
    """Plans nothing while `asleep`."""

    asleep = True

    def plan(self) -> StepPlan:
        if not self.asleep:
            return super().plan()
        arrived, self.arrived = tuple(self.arrived), []
        return StepPlan(self.steps, (), arrived)


def test_a_cache_that_claims_too_much_is_refused(tiny: Callable[..., LLM], usable: Callable[[LLM], None]):
    llm = tiny(stage="1b", cache=OneMore)
    other = llm.engine.add_request([9, 10], GREEDY.replace(max_tokens=2))
    with pytest.raises(StepEngineError, match="at most upto") as caught:
        llm.generate([[5, 6], [7]], GREEDY)
    sentence(caught, ["commit", "survive"])
    ended = []
    while llm.engine.has_unfinished():
        ended += [out.request_id for out in llm.engine.step()]
    assert ended + [out.request_id for out in llm.engine.collect()] == [other]
    llm.engine.cache.commit = lambda request, upto: upto
    usable(llm)


@pytest.mark.parametrize("stage", ["1a", "1b"])
@pytest.mark.parametrize(("cache", "again"), [(SlotCache, 0), (OneLess, 1)])
def test_a_cache_that_forgets_one_token_costs_one_a_step(stage: str, cache: Any, again: int, tiny: Callable[..., LLM]):
    prompts = [[5, 6, 7], [8, 9]]
    want = [out.outputs[0].token_ids for out in tiny(stage="0").generate(prompts, GREEDY)]
    llm = tiny(stage=stage, cache=cache)
    assert [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY)] == want
    assert llm.stats()["tokens_computed"] == sum(map(len, prompts)) + 2 * 4 * (1 + again)


def test_a_cache_that_forgets_all_is_stage_0(tiny: Callable[..., LLM]):
    prompts = [[5, 6, 7], [8, 9]]
    runs = [tiny(stage="0"), tiny(stage="1a", cache=Nothing)]
    outs = [[out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY)] for llm in runs]
    assert outs[0] == outs[1]
    assert runs[0].stats()["tokens_computed"] == runs[1].stats()["tokens_computed"]


def test_a_cache_that_grants_nothing_is_refused_where_k_and_v_are_stored(tiny: Callable[..., LLM]):
    llm = tiny(stage="1b", cache=NoCache)
    with pytest.raises(StepEngineError, match="grow") as caught:
        llm.generate([[5, 6, 7], [8, 9]], GREEDY)
    sentence(caught, ["3 tokens", "room"])


def test_a_scheduler_that_plans_nothing(tiny: Callable[..., LLM], usable: Callable[[LLM], None]):
    llm = tiny(scheduler=Lazy)
    with pytest.raises(NoProgress, match="Abort a request"):
        llm.generate([[5]], GREEDY)
    waiting = llm.engine.add_request([6], GREEDY)
    with pytest.raises(NoProgress):
        llm.engine.step()
    llm.engine.scheduler.asleep = False
    ended = [out.request_id for _ in range(8) for out in llm.engine.step()]
    assert ended == [waiting]
    from stepengine.trace import Replay

    assert [snapshot.index for snapshot in Replay(llm.trace)] == list(range(len(llm.trace.steps)))
    usable(llm)


def test_every_exception_is_the_projects_own_and_a_usual_one():
    assert issubclass(InvalidRequest, ValueError) and issubclass(InvalidSetting, ValueError)
    assert issubclass(NoProgress, RuntimeError) and issubclass(ModelError, StepEngineError)
    assert re.match(r"temperature is -1", str(pytest.raises(ValueError, SamplingParams, temperature=-1).value))


def test_a_scheduler_that_forgets_a_request_is_named(tiny):
    class Forgets(ContinuousScheduler):
        def update(self, plan, token_ids):
            self.running.clear()
            return []

    llm = tiny(stage="1b", scheduler=Forgets)
    with pytest.raises(NoProgress, match=r"requests \[0\] have not ended"):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
