"""Tokens become text piece by piece, and the pieces are the text."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from stepengine.core.text import Detokenizer

SAMPLES = [
    "推理引擎一次只多算一个词元，缓存里留着其余的键和值。",
    "emoji 😀👍🏽 and a family 👨‍👩‍👧‍👦, a flag 🇨🇳",
    "combining: e\u0301 a\u0308\u0304 क्षि नमस्ते ｶﾞ",
    "mixed 混合 текст\n\n\ttabs  two spaces , comma . ' s n't",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱 \u200b\u200d",
]


def whole(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """What the outputs add to the prompt when everything is decoded at once."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + ids, skip_special_tokens=True)[len(before) :]


def feed(tokenizer: Any, prompt: list[int], ids: list[int], **settings: Any) -> tuple[str, list[str]]:
    """The final text and the pieces, each checked to extend the text before it."""
    stream = Detokenizer(tokenizer, prompt, **settings)
    texts = [""]
    for token in ids:
        ended = stream.push(token)
        texts.append(stream.text)
        if ended:
            break
    stream.close()
    texts.append(stream.text)
    for earlier, later in zip(texts, texts[1:], strict=False):
        assert later.startswith(earlier)
    return stream.text, [later[len(earlier) :] for earlier, later in zip(texts, texts[1:], strict=False)]


@pytest.fixture(scope="module")
def byte_token(smollm2_tokenizer: Any) -> dict[int, int]:
    """Token of each single byte that the vocabulary has: byte-level BPE writes printable bytes as themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in plain}
    names |= {byte: chr(256 + at) for at, byte in enumerate(b for b in range(256) if b not in plain)}
    vocab = smollm2_tokenizer.get_vocab()
    return {byte: vocab[name] for byte, name in names.items() if name in vocab}


@pytest.mark.parametrize("text", SAMPLES)
def test_pieces_are_the_text_and_never_half_a_character(text: str, smollm2_tokenizer: Any):
    ids = smollm2_tokenizer.encode(text)
    for prompt in ([1], smollm2_tokenizer.encode("Say: "), smollm2_tokenizer.encode("你好")):
        final, pieces = feed(smollm2_tokenizer, prompt, ids)
        assert final == "".join(pieces) == whole(smollm2_tokenizer, prompt, ids) == text
        assert "\ufffd" not in final and all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("text", SAMPLES)
def test_characters_that_come_byte_by_byte(text: str, smollm2_tokenizer: Any, byte_token: dict[int, int]):
    raw = text.encode()
    if not all(byte in byte_token for byte in raw):
        raw = bytes(byte for char in text for byte in char.encode() if all(b in byte_token for b in char.encode()))
    final, pieces = feed(smollm2_tokenizer, [1], [byte_token[byte] for byte in raw])
    assert final == raw.decode() and all("\ufffd" not in piece for piece in pieces)


def test_random_tokens_special_ones_included(smollm2_tokenizer: Any):
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(len(smollm2_tokenizer)) for _ in range(12)]
        prompt = [draw.randrange(3, len(smollm2_tokenizer)) for _ in range(draw.randrange(1, 9))]
        ids[draw.randrange(12)] = draw.choice(smollm2_tokenizer.all_special_ids)
        assert feed(smollm2_tokenizer, prompt, ids)[0] == whole(smollm2_tokenizer, prompt, ids)


def test_invalid_bytes_among_valid_characters(smollm2_tokenizer: Any, byte_token: dict[int, int]):
    draw = random.Random(0)
    letters = ["字", "é", "😀", "a", "क्षि", "👨‍👩‍👧", "\u0301"]
    for _ in range(600):
        raw = b""
        while len(raw) < 24:
            valid = draw.random() < 0.6
            bad = bytes([draw.randrange(128, 256)]) * draw.choice([1, 1, 2, 9])
            raw += draw.choice(letters).encode() if valid else bad
        ids = [byte_token[byte] for byte in raw if byte in byte_token]
        assert feed(smollm2_tokenizer, [1], ids)[0] == whole(smollm2_tokenizer, [1], ids)


def test_an_unfinished_character_appears_once_nothing_can_follow(smollm2_tokenizer: Any, byte_token: dict[int, int]):
    final, pieces = feed(smollm2_tokenizer, [1], [byte_token[byte] for byte in "好😀".encode()[:-1]])
    assert final == "好\ufffd" and pieces[-1] == "\ufffd" and "\ufffd" not in "".join(pieces[:-1])


class Letters:
    """A tokenizer whose token ids are code points."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))


def shown(text: str, stop: tuple[str, ...], min_tokens: int = 0) -> tuple[str, str | None, int]:
    """By brute force: the text, what stopped it, tokens taken. A stop counts if its last letter is after min_tokens."""
    for taken in range(min_tokens + 1, len(text) + 1):
        hits = [(text[:taken].find(s, max(0, taken - len(s))), s) for s in stop]
        hits = [(at, s) for at, s in hits if at >= 0]
        if hits:
            return text[: min(hits)[0]], min(hits)[1], taken
    return text, None, len(text)


@pytest.mark.parametrize("min_tokens", [0, 1, 3, 5])
def test_stop_strings_against_brute_force(min_tokens: int):
    draw = random.Random(min_tokens)
    stopped = 0
    for _ in range(3000):
        text = "".join(draw.choice("ab") for _ in range(draw.randrange(1, 12)))
        stop = tuple({"".join(draw.choice("abc") for _ in range(draw.randrange(1, 5))) for _ in range(3)})
        stream, out, taken = Detokenizer(Letters(), [], stop), "", 0
        for number, letter in enumerate(text, 1):
            ended = stream.push(ord(letter), may_stop=number > min_tokens)
            assert stream.text.startswith(out), "what was handed out cannot be taken back"
            out, taken = stream.text, number
            if ended:
                break
        stream.close()
        assert (stream.text, stream.stopped_by, taken) == shown(text, stop, min_tokens)
        stopped += stream.stopped_by is not None
    assert 300 < stopped < 2990


def test_what_could_begin_a_stop_string_waits_and_is_released(push_all: Callable[..., list[str]]):
    assert push_all("xaab", ("aab!",)) == ["x", "x", "x", "x", "xaab"]
    assert push_all("aaab", ("aab",)) == ["", "", "a", "a", "a"]
    assert push_all("abcabd", ("abcabx", "bd")) == ["", "", "", "", "", "abca", "abca"]


@pytest.fixture
def push_all() -> Callable[..., list[str]]:
    """push_all(text, stop) -> what is shown after each letter, and after the end."""

    def run(text: str, stop: tuple[str, ...]) -> list[str]:
        stream, seen = Detokenizer(Letters(), [], stop), []
        for letter in text:
            stream.push(ord(letter))
            seen.append(stream.text)
        stream.close()
        return [*seen, stream.text]

    return run
