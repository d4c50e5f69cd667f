"""Incremental detokenisation: token ids in, text out, never half a character, never half a stop string."""

from typing import Protocol

UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are no character
LONGEST = 8  # tokens to wait for a character; 4 bytes are the most that one has


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
        self._open = 0  # 1: the last U+FFFD of the window is not out, it may become a character
        self._held = 0  # of those, how many could begin a stop string

    @property
    def text(self) -> str:
        return self._done[: len(self._done) - self._held]

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Take one token; True when a stop string has appeared (the text then ends before it)."""
        self._ids.append(token)
        piece = self._unread()
        if not piece.endswith(UNKNOWN):
            self._from, self._read, self._open = self._read, len(self._ids), 0
            return self._take(piece, may_stop)
        if len(self._ids) - self._read < LONGEST and not self._open:
            return False  # a character still lacks bytes
        # So many bytes are invalid, but the last ones may yet begin a character: their U+FFFD stays open,
        # and the window keeps its beginning, so that it is read the same way again.
        self._read, self._open = len(self._ids), 1
        return self._take(piece[:-1], may_stop)

    def close(self) -> None:
        """Release what was held back, the replacement character of an unfinished one included."""
        if self.stopped_by is None:
            self._take(self._unread(), may_stop=False)
            self._read, self._open, self._held = len(self._ids), 0, 0

    def _unread(self) -> str:
        """Text of the window that is not out yet."""
        before = self.tokenizer.decode(self._ids[self._from : self._read], skip_special_tokens=True)
        after = self.tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        return after[len(before) - self._open :]

    def _take(self, piece: str, may_stop: bool) -> bool:
        known = len(self._done)
        self._done += piece
        if may_stop:
            # A stop string counts when its last character is new: an earlier one came before min_tokens.
            found = [(self._done.find(text, max(0, known - len(text) + 1)), text) for text in self.stop]
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
