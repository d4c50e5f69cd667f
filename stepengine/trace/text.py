"""Text of a growing token sequence, one piece per token, without cutting a character in two."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders print for bytes that are not a whole character
CONTEXT = 6  # prompt tokens decoded along, so that a leading space survives


def token_pieces(decode: Callable[[list[int]], str], prompt: Sequence[int], output: Sequence[int]) -> tuple[str, ...]:
    """One piece per output token; a character whose bytes span several tokens appears with the last of them.

    Only a window of tokens is decoded each time: the tokens of the piece before, and those since.
    """
    ids = [*prompt, *output]
    begin, read = max(0, len(prompt) - CONTEXT), len(prompt)
    pieces = []
    for end in range(len(prompt) + 1, len(ids) + 1):
        known, text = decode(ids[begin:read]), decode(ids[begin:end])
        if text.endswith(REPLACEMENT) and end < len(ids):
            pieces.append("")
            continue
        if not text.startswith(known):  # the prompt ended within a character, which is now whole
            known = known.rstrip(REPLACEMENT)
        pieces.append(text[len(known) :])
        begin, read = read, end
    return tuple(pieces)
