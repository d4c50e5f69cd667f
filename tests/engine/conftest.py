"""transformers as the judge of tokens and log probabilities."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stepengine import LLM
from stepengine.core.request import CompletionOutput
from stepengine.stage1_kvcache.scheduler import ContinuousScheduler

CLOSE = 1e-4  # logits closer than this are equal but for rounding


class Judge:
    """One checkpoint in transformers, eager attention, fp32, no cache."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        self.model.eval()

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], outputs: Sequence[int]) -> torch.Tensor:
        """The logits [len(outputs), vocab] that each output token was chosen from."""
        ids = torch.tensor([[*prompt, *outputs]])
        return self.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """`model.generate`'s own greedy continuation."""
        ids = torch.tensor([list(prompt)])
        self.model.generation_config.eos_token_id = None
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()

    def check_greedy(self, prompt: Sequence[int], outputs: Sequence[int]) -> None:
        """Every token is the most likely one after all before it, or within rounding of it."""
        assert len(outputs) > 0
        for at, (line, token) in enumerate(zip(self.logits(prompt, outputs), outputs, strict=True)):
            gap = float(line.max() - line[token])
            assert gap < CLOSE, f"output {at}: token {token} lies {gap} below {int(line.argmax())}"

    def check_same(self, prompt: Sequence[int], got: Sequence[int], want: Sequence[int]) -> None:
        """Two greedy runs agree; where they part, both tokens must be within rounding of the maximum."""
        assert len(got) == len(want)
        if list(got) != list(want):
            self.check_greedy(prompt, got)
            self.check_greedy(prompt, want)

    def check_logprobs(self, prompt: Sequence[int], sample: CompletionOutput, top: int) -> None:
        """Values, order, ranks and the sum, against log_softmax of transformers' logits."""
        assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
        total = 0.0
        right = self.logits(prompt, sample.token_ids).log_softmax(-1)
        for line, entry, token in zip(right, sample.logprobs, sample.token_ids, strict=True):
            total += float(line[token])
            assert token in entry
            for other, said in entry.items():
                assert abs(said.logprob - float(line[other])) < CLOSE
                surely = int((line > line[other] + CLOSE).sum())
                perhaps = int((line > line[other] - CLOSE).sum())
                assert surely < said.rank <= max(perhaps, surely + 1)
            listed = {said.rank for said in entry.values()}
            assert set(range(1, top + 1)) <= listed and top <= len(entry) <= top + 1
            floor = float(line.topk(top).values[-1]) - CLOSE if top else -math.inf
            assert all(float(line[t]) > floor for t in entry if entry[t].rank <= top)
        assert sample.cumulative_logprob == pytest.approx(total, abs=CLOSE * len(sample.token_ids))


@pytest.fixture(scope="session")
def judge() -> Callable[[Path], Judge]:
    """judge(folder) -> the `Judge` of that checkpoint, loaded once a session."""
    loaded: dict[Path, Judge] = {}

    def of(folder: Path) -> Judge:
        if folder not in loaded:
            loaded[folder] = Judge(folder)
        return loaded[folder]

    return of


COMBINATIONS: dict[str, dict[str, Any]] = {
    "static, no cache (0)": {"stage": "0"},
    "continuous, no cache": {"stage": "0", "scheduler": ContinuousScheduler},
    "static, slots (1a)": {"stage": "1a"},
    "continuous, slots (1b)": {"stage": "1b"},
    "paged (2)": {"stage": "2"},
    "paged, blocks of 5, a pool for one or two, recompute": {"stage": "2", "block_size": 5, "num_blocks": 20},
    "paged, blocks of 4, a pool for one or two, swap": {
        "stage": "2",
        "block_size": 4,
        "num_blocks": 25,
        "preemption": "swap",
    },
    "continuous, paged": {"stage": "2", "scheduler": ContinuousScheduler},
    "flash, blocks of 7 (3)": {"stage": "3", "block_size": 7, "num_blocks": 21},
    "chunks of at most 8 (4a)": {"stage": "4a", "max_num_batched_tokens": 8, "block_size": 7, "num_blocks": 21},
    "prefixes, blocks of 3, a tree (4b)": {"stage": "4b", "block_size": 3, "num_blocks": 34, "prefix_index": "radix"},
    "chunks and prefixes (4)": {"stage": "4", "max_num_batched_tokens": 17, "block_size": 4, "num_blocks": 25},
    "flash, padded steps": {"stage": "3", "block_size": 7, "num_blocks": 21, "cuda_graphs": "padded"},
    "flash, pipelined, a pool for one or two, recompute": {
        "stage": "3",
        "block_size": 5,
        "num_blocks": 20,
        "pipelined": True,
    },
    "flash, pipelined and padded, a pool for one or two, swap": {
        "stage": "3",
        "block_size": 4,
        "num_blocks": 25,
        "preemption": "swap",
        "pipelined": True,
        "cuda_graphs": "padded",
    },
}


@pytest.fixture(params=list(COMBINATIONS))
def combination(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of one combination of scheduler and (cache, attention); a test runs with each."""
    return COMBINATIONS[request.param]


@pytest.fixture(scope="session")
def combinations() -> dict[str, dict[str, Any]]:
    return COMBINATIONS


@pytest.fixture
def usable() -> Callable[[LLM], None]:
    """usable(llm): nothing is left behind in the engine, and it still answers as a fresh one does."""

    def check(llm: LLM) -> None:
        from stepengine import SamplingParams

        engine = llm.engine
        assert not engine.has_unfinished() and not engine.requests
        assert engine.cache.free_tokens == engine.cache.capacity_tokens
        assert engine.collect() == []
        greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        prompts = [[7, 8, 9], [11] * 6]
        fresh = LLM(llm.name, stage="0", max_model_len=64)
        want = [out.outputs[0].token_ids for out in fresh.generate(prompts, greedy)]
        assert [out.outputs[0].token_ids for out in llm.generate(prompts, greedy)] == want
        assert engine.cache.free_tokens == engine.cache.capacity_tokens

    return check
