"""Sampled tokens: a function of model, prompt and settings alone; and how a request ends."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.core.sampler import noise_key
from tests.noise import noise

VARIED = [
    SamplingParams(temperature=1.0, seed=1, max_tokens=9),
    SamplingParams(temperature=0.7, top_k=20, seed=1, max_tokens=8),
    SamplingParams(temperature=1.5, top_p=0.8, seed=2, max_tokens=7),
    SamplingParams(temperature=1.2, min_p=0.02, seed=3, max_tokens=9, repetition_penalty=1.3),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=4, max_tokens=6, presence_penalty=0.8),
    SamplingParams(temperature=0.0, max_tokens=9, frequency_penalty=1.5),
    SamplingParams(temperature=2.0, seed=-(2**70), max_tokens=3, min_tokens=2),
]
VARIED = [params.replace(ignore_eos=True) for params in VARIED]
PROMPTS = [random.Random(number).choices(range(499), k=3 + 5 * number) for number in range(len(VARIED))]


def scores(
    line: Sequence[float], params: SamplingParams, key: int, prompt: list[int], outputs: list[int]
) -> list[float]:
    """What each token of one row is ranked by, in plain Python: penalties, temperature, the three cuts, noise."""
    values = []
    for token, value in enumerate(line):
        if token in prompt or token in outputs:
            value = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
        times = outputs.count(token)
        values.append(value - times * params.frequency_penalty - (params.presence_penalty if times else 0.0))
    if params.temperature == 0:
        return values
    weight = [math.exp((value - max(values)) / params.temperature) for value in values]
    alive = [token for token in range(len(weight)) if weight[token] >= params.min_p]
    alive.sort(key=lambda token: -weight[token])
    alive = alive[: params.top_k] if params.top_k > 0 else alive
    total, reached, kept = sum(weight[token] for token in alive), 0.0, []
    for token in alive:
        if params.top_p < 1 and reached >= params.top_p:
            break
        kept.append(token)
        reached += weight[token] / total
    position = len(prompt) + len(outputs)
    ranked = [-math.inf] * len(values)
    for token in kept:
        ranked[token] = values[token] / params.temperature + noise(key, position, token)
    return ranked


def test_each_token_is_the_one_that_plain_python_draws(
    combination: dict[str, Any], checkpoint: Callable[..., Path], judge: Callable[[Path], Any]
):
    llm = LLM(checkpoint(), max_model_len=64, max_num_seqs=3, **combination)
    for prompt, params, out in zip(PROMPTS, VARIED, llm.generate(PROMPTS, VARIED), strict=True):
        tokens = out.outputs[0].token_ids
        assert len(tokens) == params.max_tokens
        key = noise_key(params.seed or 0, 0)
        for at, line in enumerate(judge(checkpoint()).logits(prompt, tokens).tolist()):
            ranked = scores(line, params, key, prompt, tokens[:at])
            assert ranked[tokens[at]] > max(ranked) - 1e-3


@pytest.mark.parametrize("max_num_seqs", [1, 2, 7])
def test_a_seed_gives_the_same_tokens_in_any_company(
    max_num_seqs: int, combination: dict[str, Any], tiny: Callable[..., LLM]
):
    alone = tiny(stage="0", max_num_seqs=1)
    want = [alone.generate([p], s)[0].outputs[0].token_ids for p, s in zip(PROMPTS, VARIED, strict=True)]
    order = random.Random(max_num_seqs).sample(range(len(VARIED)), len(VARIED))
    engine = tiny(max_num_seqs=max_num_seqs, **combination).engine
    numbers, got = {}, {}
    for number in order:
        numbers[engine.add_request(PROMPTS[number], VARIED[number])] = number
        engine.add_request([9] * number or [9], SamplingParams(seed=number, max_tokens=4))
        got |= {out.request_id: out for out in engine.step()}
    while engine.has_unfinished():
        got |= {out.request_id: out for out in engine.step()}
    assert {number: got[i].outputs[0].token_ids for i, number in numbers.items()} == dict(enumerate(want))


def test_different_seeds_differ_and_an_engine_repeats_itself(tiny: Callable[..., LLM]):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, again, other = tiny(seed=5), tiny(seed=5), tiny(seed=500)
    runs = [[out.outputs[0].token_ids for out in llm.generate([[3, 4]] * 5, params)] for llm in (first, again, other)]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(tokens) for tokens in runs[0]}) == 5, "requests without a seed must not all say the same"


def test_sample_i_of_n_is_its_own_draw(
    combination: dict[str, Any], tiny: Callable[..., LLM], checkpoint: Callable[..., Path], judge: Callable[[Path], Any]
):
    llm = tiny(max_num_seqs=3, **combination)
    params = SamplingParams(n=5, seed=11, max_tokens=6, ignore_eos=True, logprobs=0)
    five, one, other = llm.generate(
        [[5, 6, 7], [5, 6, 7], [5, 6, 7]], [params, params.replace(n=1), params.replace(n=2)]
    )
    samples = [sample.token_ids for sample in five.outputs]
    assert [sample.index for sample in five.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(tokens) for tokens in samples}) == 5
    assert one.outputs[0].token_ids == samples[0]
    assert [sample.token_ids for sample in other.outputs] == samples[:2]
    assert five.finished and five.e2e_ms is not None and five.ttft_ms is not None and five.ttft_ms <= five.e2e_ms
    for index, tokens in enumerate(samples):
        for at, line in enumerate(judge(checkpoint()).logits([5, 6, 7], tokens).tolist()):
            ranked = scores(line, params, noise_key(11, index), [5, 6, 7], tokens[:at])
            assert ranked[tokens[at]] > max(ranked) - 1e-3
    assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens


def test_samples_of_a_group_may_end_at_different_steps(tiny: Callable[..., LLM]):
    llm = tiny(stage="1b", max_num_seqs=2)
    free = llm.generate([[5, 6]], SamplingParams(n=4, seed=3, max_tokens=8, ignore_eos=True))[0]
    stop = free.outputs[2].token_ids[3]
    out = llm.generate([[5, 6]], SamplingParams(n=4, seed=3, max_tokens=8, ignore_eos=True, stop_token_ids=[stop]))[0]
    for before, after in zip(free.outputs, out.outputs, strict=True):
        whole = before.token_ids
        want = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert after.token_ids == want
        assert after.stop_reason == (stop if stop in whole else None)


# -- how a request ends -------------------------------------------------------------------------------


def test_stop_tokens_ignore_eos_and_min_tokens(checkpoint: Callable[..., Path], judge: Callable[[Path], Any]):
    prompt = [5, 6, 7, 8]
    free = judge(checkpoint("mistral")).generate(prompt, 10)
    eos = free[2]
    llm = LLM(checkpoint("mistral", eos_token_id=eos), max_model_len=64, max_num_seqs=2)
    greedy = SamplingParams(temperature=0, max_tokens=10)
    first = free.index(eos)

    def run(**changes: Any) -> Any:
        return llm.generate([prompt], greedy.replace(**changes))[0].outputs[0]

    assert (run().token_ids, run().finish_reason, run().stop_reason) == (free[: first + 1], "stop", None)
    assert (run(ignore_eos=True).token_ids, run(ignore_eos=True).finish_reason) == (free, "length")
    stopped = run(ignore_eos=True, stop_token_ids=[eos])
    assert (stopped.token_ids, stopped.stop_reason) == (free[: first + 1], eos)
    held = run(min_tokens=8)
    assert eos not in held.token_ids[:8] and len(held.token_ids) >= 8
    logits = judge(checkpoint("mistral")).logits(prompt, held.token_ids).clone()
    logits[:8, eos] = -math.inf
    assert held.token_ids == logits.argmax(-1).tolist()
    assert run(max_tokens=first + 1).finish_reason == "stop", "a stop token in the last place still is a stop"
    assert run(max_tokens=1).token_ids == free[:1]


def brute_force(tokenizer: Any, prompt: list[int], ids: list[int], stop: str, min_tokens: int = 0) -> tuple[int, str]:
    """How many tokens until the text holds `stop`, and the text before it, decoding everything at every length."""
    start = len(tokenizer.decode(prompt, skip_special_tokens=True))
    for count in range(min_tokens + 1, len(ids) + 1):
        text = tokenizer.decode(prompt + ids[:count], skip_special_tokens=True)[start:]
        if stop in text:
            return count, text[: text.index(stop)]
    raise AssertionError(f"{stop!r} does not occur")


def test_stop_strings_wherever_they_lie(texts: Callable[..., LLM], combination: dict[str, Any]):
    llm = texts(max_num_seqs=3, **combination)
    params = SamplingParams(temperature=1.2, seed=4, max_tokens=24, ignore_eos=True)
    free = llm.generate(["Once upon"], params)[0]
    ids, text, tokenizer = free.outputs[0].token_ids, free.outputs[0].text, llm.tokenizer
    prompt = free.prompt_token_ids
    start = len(tokenizer.decode(prompt, skip_special_tokens=True))
    assert text == tokenizer.decode(prompt + ids, skip_special_tokens=True)[start:]
    places = [text[at : at + length] for at in (0, 1, 5, 11, len(text) // 2, len(text) - 4) for length in (1, 3, 7)]
    places = [place for place in dict.fromkeys(places) if place and "\ufffd" not in place]
    assert len(places) > 10
    outs = llm.generate(["Once upon"] * len(places), [params.replace(stop=place) for place in places])
    for place, out in zip(places, outs, strict=True):
        sample = out.outputs[0]
        count, want = brute_force(tokenizer, prompt, ids, place)
        assert (sample.token_ids, sample.text) == (ids[:count], want)
        assert (sample.finish_reason, sample.stop_reason) == ("stop", place)


def test_a_stop_string_before_min_tokens_does_not_end_the_text(texts: Callable[..., LLM]):
    llm = texts()
    params = SamplingParams(temperature=1.2, seed=4, max_tokens=12, ignore_eos=True)
    sample = llm.generate(["Once upon"], params)[0].outputs[0]
    piece = sample.text[:2]
    assert piece not in sample.text[2:]
    later = llm.generate(["Once upon"], params.replace(stop=[piece, "~" * 30], min_tokens=4))[0].outputs[0]
    assert (later.token_ids, later.text, later.finish_reason) == (sample.token_ids, sample.text, "length")


def test_the_stop_token_is_in_the_ids_and_not_in_the_text(texts: Callable[..., LLM]):
    llm = texts()
    params = SamplingParams(temperature=1.2, seed=4, max_tokens=12, ignore_eos=True)
    free = llm.generate(["Once upon"], params)[0]
    ids = free.outputs[0].token_ids
    sample = llm.generate(["Once upon"], params.replace(stop_token_ids=[ids[5]]))[0].outputs[0]
    assert sample.token_ids == ids[: ids.index(ids[5]) + 1] and sample.stop_reason == ids[5]
    shorter = llm.generate(["Once upon"], params.replace(max_tokens=ids.index(ids[5])))[0].outputs[0]
    assert sample.text == shorter.text


@pytest.mark.parametrize("count", [0, 1, 5, 499, 1000])
def test_logprobs_of_sampled_tokens(
    count: int, tiny: Callable[..., LLM], checkpoint: Callable[..., Path], judge: Callable[[Path], Any]
):
    params = SamplingParams(
        temperature=1.7, top_k=30, repetition_penalty=1.4, seed=2, max_tokens=5, ignore_eos=True, logprobs=count
    )
    for stage in ("0", "1b"):
        llm = tiny(stage=stage)
        for prompt, out in zip(PROMPTS[:3], llm.generate(PROMPTS[:3], params), strict=True):
            judge(checkpoint()).check_logprobs(prompt, out.outputs[0], min(count, 499))
    plain = llm.generate([[5]], params.replace(logprobs=None))[0].outputs[0]
    assert plain.logprobs is None and plain.cumulative_logprob is None


def test_logprobs_say_the_token_in_words(texts: Callable[..., LLM]):
    llm = texts()
    sample = llm.generate(["Hello"], SamplingParams(max_tokens=4, seed=1, logprobs=2))[0].outputs[0]
    assert sample.logprobs is not None
    for entry in sample.logprobs:
        assert all(said.decoded_token == llm.tokenizer.decode([token]) for token, said in entry.items())
