"""`llm.stream` hands out the text of `generate` in pieces, and cleans up when it is left."""

from collections.abc import Callable
from typing import Any

import pytest

from stepengine import LLM, SamplingParams

PROMPTS = ["Once upon a time", "你好，世界", "emoji 😀", [5, 6, 7]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_are_the_text(prompt: Any, seed: int, texts: Callable[..., LLM]):
    llm = texts()
    params = SamplingParams(temperature=1.3, seed=seed, max_tokens=30, ignore_eos=True)
    whole = llm.generate([prompt], params)[0].outputs[0]
    pieces = list(llm.stream(prompt, params))
    assert "".join(piece.outputs[0].text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.outputs[0].token_ids] == whole.token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("min_tokens", [0, 6])
def test_a_stop_string_is_never_half_handed_out(min_tokens: int, texts: Callable[..., LLM]):
    llm = texts()
    params = SamplingParams(temperature=1.3, seed=1, max_tokens=16, ignore_eos=True)
    text = llm.generate(["Once"], params)[0].outputs[0].text
    for at in range(0, len(text) - 6, 11):
        ending = params.replace(stop=[text[at : at + 6], text[-3:] + "never"], min_tokens=min_tokens)
        whole = llm.generate(["Once"], ending)[0].outputs[0]
        pieces = list(llm.stream("Once", ending))
        assert "".join(piece.outputs[0].text for piece in pieces) == whole.text
        assert pieces[-1].outputs[0].stop_reason == whole.stop_reason
        if min_tokens == 0:
            assert whole.text == text[: text.index(text[at : at + 6])]


def test_what_was_held_back_is_released_at_the_end(texts: Callable[..., LLM]):
    llm = texts()
    params = SamplingParams(temperature=1.3, seed=1, max_tokens=16, ignore_eos=True)
    text = llm.generate(["Once"], params)[0].outputs[0].text
    pieces = list(llm.stream("Once", params.replace(stop=text[-5:] + "never")))
    assert "".join(piece.outputs[0].text for piece in pieces) == text
    assert pieces[-1].outputs[0].text.endswith(text[-5:])


def test_every_sample_streams(texts: Callable[..., LLM]):
    llm = texts(max_num_seqs=2)
    params = SamplingParams(n=3, temperature=1.3, seed=1, max_tokens=9, ignore_eos=True)
    whole = llm.generate(["Once"], params)[0]
    pieces = list(llm.stream("Once", params))
    for index, sample in enumerate(whole.outputs):
        assert "".join(piece.outputs[index].text for piece in pieces) == sample.text


def test_leaving_the_loop_early_aborts(tiny: Callable[..., LLM], usable: Callable[[LLM], None]):
    llm = tiny(stage="1b")
    params = SamplingParams(max_tokens=30, ignore_eos=True, seed=1)
    for number, piece in enumerate(llm.stream([5, 6, 7], params)):
        assert len(piece.outputs[0].token_ids) == 1
        if number == 3:
            break
    assert llm.trace.steps[-1].aborted and llm.trace.steps[-1].aborted[0][1] == "abort"
    usable(llm)


def test_a_stream_that_is_never_read_schedules_nothing(tiny: Callable[..., LLM], usable: Callable[[LLM], None]):
    llm = tiny(stage="1b")
    llm.stream([5, 6, 7])
    usable(llm)


def test_streams_and_requests_side_by_side(tiny: Callable[..., LLM]):
    llm = tiny(stage="1b")
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    alone = {prompt: llm.generate([[prompt]], params)[0].outputs[0].token_ids for prompt in (5, 6, 7)}
    waiting = llm.engine.add_request([7], params)
    got: dict[int, list[int]] = {5: [], 6: []}
    streams = {prompt: llm.stream([prompt], params) for prompt in got}
    while streams:
        for prompt in list(streams):
            piece = next(streams[prompt], None)
            if piece is None:
                del streams[prompt]
            else:
                got[prompt] += piece.outputs[0].token_ids
    assert got == {prompt: alone[prompt] for prompt in got}
    while llm.engine.has_unfinished():
        llm.engine.advance()
    (out,) = llm.engine.collect()
    assert (out.request_id, out.outputs[0].token_ids) == (waiting, alone[7])


def test_chat_goes_through_the_template(texts: Callable[..., LLM]):
    llm = texts(max_model_len=128)
    if not llm.tokenizer.chat_template:
        pytest.skip("the tokenizer was saved without its chat template")
    talk = [{"role": "user", "content": "你好"}]
    params = SamplingParams(temperature=0, max_tokens=3)
    ids = llm.tokenizer.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert llm.chat(talk, params)[0].prompt_token_ids == ids
    assert len(llm.chat([talk, talk], params)) == 2


def test_a_step_between_two_pieces_leaves_the_stream_its_output(tiny):
    llm = tiny()
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    other = llm.engine.add_request([9, 8, 7], params)
    tokens, handed_out = [], []
    for piece in llm.stream([5, 6, 7], params):
        tokens += piece.outputs[0].token_ids
        handed_out += llm.engine.step()
    assert len(tokens) == 4
    handed_out += llm.engine.collect()
    assert [output.request_id for output in handed_out] == [other]
