"""Pieces of text against the decoder's own answer for the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.core.plan import Chunk, RequestInfo, StepPlan, StepRecord
from stepengine.errors import TraceError
from stepengine.trace import Trace, load, save


class Bytes:
    """A tokenizer whose tokens are bytes, so that most characters of most scripts span several tokens."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def generated(prompt: bytes, output: bytes, tokenizer=None) -> Trace:
    trace = Trace({"stage": "0"}, tokenizer)
    trace.add_request(RequestInfo(0, tuple(prompt), len(output)))
    for t, token in enumerate(output):
        trace.append(StepRecord(StepPlan(t, (Chunk(0, 0, len(prompt) + t),)), (token,)))
    return trace


def test_characters_appear_whole():
    prompt, pieces = generated("问".encode(), "你好, ☕!".encode(), Bytes()).text(0)
    assert prompt == "问"
    assert pieces == ("", "", "你", "", "", "好", ",", " ", "", "", "☕", "!")


def test_a_character_begun_in_the_prompt():
    cafe = "é".encode()
    _, pieces = generated(b"caf" + cafe[:1], cafe[1:] + b"!", Bytes()).text(0)
    assert pieces == ("é", "!")


@given(st.text(max_size=12), st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_pieces_make_the_text(prompt, output):
    _, pieces = generated(prompt.encode(), output.encode(), Bytes()).text(0)
    assert len(pieces) == len(output.encode()) and "".join(pieces) == output


def test_an_unfinished_character_is_shown_at_the_end():
    _, pieces = generated(b"a", "b你".encode()[:-1], Bytes()).text(0)
    assert "".join(pieces) == "b\ufffd"


def test_saved_text_needs_no_tokenizer(tmp_path):
    live = generated("问".encode(), "你好".encode(), Bytes())
    loaded = load(save(live, tmp_path / "run.jsonl.gz"))
    assert loaded.tokenizer is None and loaded.text(0) == live.text(0)
    assert load(save(loaded, tmp_path / "again.jsonl.gz")).text(0) == live.text(0)


def test_without_tokenizer_and_without_request():
    trace = generated(b"a", b"b")
    assert trace.text(0) == ("", ())
    with pytest.raises(TraceError, match="Request 5 is not in this trace"):
        trace.text(5)
