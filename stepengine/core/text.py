"""Incremental detokenisation: token ids in, text out, never half a character, never half a stop string."""

from typing import Protocol


class Tokenizer(Protocol):
    """The little that text needs of a tokenizer (transformers' have it)."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str: ...


class Detokenizer:
    """The text of one growing sequence.

    A character may be spread over several byte-level tokens, and a token's text may depend on the one
    before it; so the last few tokens are decoded together, and what ends in U+FFFD waits for more.
    `text` grows by whole characters and holds back a tail that could become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.stopped_by: str | None = None
        self._ids = prompt_ids[-6:]  # enough context for a tokenizer that drops leading spaces
        self._read = len(self._ids)  # tokens whose text is already out
        self._from = 0  # the window that is decoded begins here
        self._done = ""  # characters that are final
        self._held = 0  # of those, how many could begin a stop string

    @property
    def text(self) -> str:
        return self._done[: len(self._done) - self._held]

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Take one token; True when a stop string has appeared (the text then ends before it)."""
        self._ids.append(token)
        before = self.tokenizer.decode(self._ids[self._from : self._read], skip_special_tokens=True)
        after = self.tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        if after.endswith("\ufffd") and len(self._ids) - self._read < 8:
            return False  # a character still lacks bytes; after 8 tokens the bytes are simply invalid
        return self._take(after[len(before) :], may_stop)

    def close(self) -> None:
        """Release what was held back, the replacement character of an unfinished one included."""
        if self.stopped_by is not None:
            return
        before = self.tokenizer.decode(self._ids[self._from : self._read], skip_special_tokens=True)
        after = self.tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        self._take(after[len(before) :], may_stop=False)
        self._held = 0

    def _take(self, piece: str, may_stop: bool) -> bool:
        self._from, self._read = self._read, len(self._ids)
        search_from = max(0, len(self._done) - max(map(len, self.stop), default=0) + 1)
        self._done += piece
        if not may_stop:
            return False
        found = [(self._done.find(text, search_from), text) for text in self.stop]
        hits = [(at, text) for at, text in found if at >= 0]
        if hits:
            at, self.stopped_by = min(hits)
            self._done, self._held = self._done[:at], 0
            return True
        self._held = max((_overlap(self._done, text) for text in self.stop), default=0)
        return False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` with which `text` ends."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
