"""Greedy fp32 tokens and log probabilities equal transformers', in every combination of parts."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 3 heads of 16": (
        "llama",
        dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=48, vocab_size=307),
    ),
    "llama, 8 queries a K/V head, llama3": (
        "llama",
        dict(
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=34,
            hidden_size=72,
            vocab_size=1009,
            rope_scaling=LLAMA3,
        ),
    ),
    "mistral, 6 on 2 heads of 64": (
        "mistral",
        dict(num_attention_heads=6, num_key_value_heads=2, head_dim=64, hidden_size=56, vocab_size=211),
    ),
    "qwen2, 7 on 1 heads of 80": (
        "qwen2",
        dict(num_attention_heads=7, num_key_value_heads=1, head_dim=80, hidden_size=560, vocab_size=401),
    ),
    "qwen3, 5 heads of 128, tied": (
        "qwen3",
        dict(num_attention_heads=5, num_key_value_heads=5, head_dim=128, hidden_size=40, vocab_size=613),
    ),
    "qwen3, 10 on 2 heads of 18, 3 layers": (
        "qwen3",
        dict(num_attention_heads=10, num_key_value_heads=2, head_dim=18, num_hidden_layers=3, vocab_size=97),
    ),
}


def prompts_of(vocab_size: int, lengths: tuple[int, ...] = (1, 2, 17, 30, 9)) -> list[list[int]]:
    draw = random.Random(vocab_size)
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_logprobs_are_those_of_transformers(
    shape: str, combination: dict[str, Any], checkpoint: Callable[..., Path], judge: Callable[[Path], Any]
):
    family, config = SHAPES[shape]
    folder = checkpoint(family, **config)
    llm = LLM(folder, max_model_len=48, max_num_seqs=3, dtype="float32", **combination)
    prompts = prompts_of(config["vocab_size"])
    counts = [9, 4, 1, 12, 7]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=4) for n in counts]
    for prompt, count, out in zip(prompts, counts, llm.generate(prompts, params), strict=True):
        sample = out.outputs[0]
        assert (len(sample.token_ids), sample.finish_reason) == (count, "length")
        judge(folder).check_greedy(prompt, sample.token_ids)
        judge(folder).check_logprobs(prompt, sample, 4)
        judge(folder).check_same(prompt, sample.token_ids, judge(folder).generate(prompt, count))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_prompt_as_long_as_the_model_allows(
    family: str, combination: dict[str, Any], checkpoint: Callable[..., Path], judge: Callable[[Path], Any]
):
    folder = checkpoint(family)
    llm = LLM(folder, max_model_len=48, max_num_seqs=2, **combination)
    prompts = prompts_of(499, (47, 46, 47))
    for prompt, out in zip(prompts, llm.generate(prompts, SamplingParams(temperature=0, ignore_eos=True)), strict=True):
        assert len(out.outputs[0].token_ids) == 48 - len(prompt)
        assert out.outputs[0].finish_reason == "length"
        judge(folder).check_greedy(prompt, out.outputs[0].token_ids)


def test_eos_ends_a_request_and_is_its_last_token(
    combination: dict[str, Any], checkpoint: Callable[..., Path], judge: Callable[[Path], Any]
):
    prompt = [5, 6, 7, 8]
    free = judge(checkpoint("qwen2")).generate(prompt, 12)
    for eos in dict.fromkeys(free):
        folder = checkpoint("qwen2", eos_token_id=[eos, 498 if eos != 498 else 497])
        llm = LLM(folder, max_model_len=48, max_num_seqs=2, **combination)
        greedy = SamplingParams(temperature=0, max_tokens=12)
        out, on = llm.generate([prompt, prompt], [greedy, greedy.replace(ignore_eos=True)])
        assert out.outputs[0].token_ids == free[: free.index(eos) + 1]
        assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", None)
        assert on.outputs[0].token_ids == free and on.outputs[0].finish_reason == "length"


def test_the_judge_refuses_a_wrong_token(checkpoint: Callable[..., Path], judge: Callable[[Path], Any]):
    right = judge(checkpoint()).generate([5, 6, 7], 6)
    for at in range(6):
        wrong = [*right]
        wrong[at] = (wrong[at] + 1) % 499
        with pytest.raises(AssertionError):
            judge(checkpoint()).check_greedy([5, 6, 7], wrong)
        with pytest.raises(AssertionError):
            judge(checkpoint()).check_same([5, 6, 7], wrong, right)
