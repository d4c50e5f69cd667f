"""Text of a growing token sequence, one piece per token, without cutting a character in two."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders print for bytes that are not a whole character
CONTEXT = 6  # prompt tokens decoded along, so that a leading space survives


def token_pieces(decode: Callable[[list[int]], str], prompt: Sequence[int], output: Sequence[int]) -> tuple[str, ...]:
    """One piece per output token; a character whose bytes span several tokens appears with the last of them."""
    pieces = Pieces(decode, prompt)
    pieces.extend(output)
    return pieces.texts


class Pieces:
    """`token_pieces` of a text that grows. Each time a window is decoded: the piece before, and what came since."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode, self._ids = decode, list(prompt)
        self._begin, self._read = max(0, len(prompt) - CONTEXT), len(prompt)
        self._whole: list[str] = []  # "" for a token whose character later tokens complete
        self._open = ""  # what the last token shows while its character is incomplete and nothing follows

    def __len__(self) -> int:
        return len(self._whole)

    @property
    def texts(self) -> tuple[str, ...]:
        """The pieces so far."""
        return (*self._whole[:-1], self._open) if self._open else tuple(self._whole)

    def extend(self, tokens: Sequence[int]) -> None:
        """Further output tokens."""
        for token in tokens:
            self._ids.append(token)
            known, text = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
            if not text.startswith(known):  # the prompt ended within a character, which is now whole
                known = known.rstrip(REPLACEMENT)
            if text.endswith(REPLACEMENT):
                self._whole.append("")
                self._open = text[len(known) :]
                continue
            self._whole.append(text[len(known) :])
            self._open = ""
            self._begin, self._read = self._read, len(self._ids)
