"""How well a model predicts a text, and how far two models' predictions are apart; no engine, no stored K/V.

Texts are cut into pieces of one length, token ids [pieces, length]; each is predicted from its own beginning.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stepengine.errors import InvalidSetting
from stepengine.llm import LLM
from stepengine.model.decoder import Decoder
from stepengine.stage5_gptq.calibrate import Pieces, WholePieces
from stepengine.stage5_gptq.texts import read_texts, windows

_TOKENS = 2048  # that go through the layers at once
_LOGITS = 256  # rows whose logits are there at once: each is a vocabulary long


def evaluation_pieces(tokenizer: Any, vocab_size: int, length: int, count: int) -> Tensor:
    """Token ids [count, length] of the text that is kept apart from calibration; random ids without a tokenizer."""
    if tokenizer is None:
        return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(1))
    return windows(tokenizer, read_texts().evaluation, length, count)


def nll(model: Decoder | LLM, tokens: Tensor, rows: int | None = None) -> float:
    """Mean negative log-likelihood of a token in nats, over every token but the first of each piece.

    tokens [pieces, length]; exp of the result is the perplexity. `rows` lets at most so many tokens through the
    layers at once, as decoding would: where a layer multiplies few rows in another way than many, that way is
    judged. Raises `InvalidSetting` for pieces that cannot be predicted.
    """
    return float(nll_by_piece(model, tokens, rows).mean())


@torch.inference_mode()
def nll_by_piece(model: Decoder | LLM, tokens: Tensor, rows: int | None = None) -> Tensor:
    """`nll` of each piece, fp64 [pieces]: what a difference of two models' means is worth can be read off it."""
    decoder, means = _decoder(model), []
    for hidden, ids in _each_piece(decoder, tokens, rows):
        parts = zip(hidden.split(_LOGITS), ids.split(_LOGITS), strict=True)
        losses = [F.cross_entropy(decoder.logits(part).float(), goal, reduction="none") for part, goal in parts]
        means.append(torch.cat(losses).double().mean().cpu())
    return torch.stack(means)


class LogitGap(NamedTuple):
    """How far two models' logits are apart. `same`: share of places where both hold the same token for the best."""

    largest: float
    mean: float
    same: float


@torch.inference_mode()
def logit_gap(a: Decoder | LLM, b: Decoder | LLM, tokens: Tensor, rows: int | None = None) -> LogitGap:
    """Compare the logits of two models at every token of tokens [pieces, length] but the last of each piece.

    `rows` is meant as in `nll`, and for `a` alone: `b` is what it is held to.
    """
    first, second = _decoder(a), _decoder(b)
    largest = total = same = 0.0
    pairs = zip(_each_piece(first, tokens, rows), _each_piece(second, tokens, None), strict=True)
    for (found, _), (expected, _) in pairs:
        for ours, theirs in zip(found.split(_LOGITS), expected.split(_LOGITS), strict=True):
            one, other = first.logits(ours).float(), second.logits(theirs).float()
            gap = (one - other).abs()
            largest = max(largest, float(gap.max()))
            total += float(gap.mean(1).double().sum())
            same += float((one.argmax(1) == other.argmax(1)).sum())
    count = tokens[:, 1:].numel()
    return LogitGap(largest, total / count, same / count)


def _decoder(model: Decoder | LLM) -> Decoder:
    return model.engine.runner.model if isinstance(model, LLM) else model


def _each_piece(decoder: Decoder, tokens: Tensor, rows: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden states [length - 1, hidden], the tokens [length - 1] that follow them) of each piece."""
    if tokens.dim() != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise InvalidSetting(
            f"tokens is {list(tokens.shape)}; give [pieces, length], a piece or more of 2 or more tokens."
        )
    count, length = tokens.shape
    if length > len(decoder.cos):
        raise InvalidSetting(
            f"The pieces have {length} tokens, and this model was loaded for {len(decoder.cos)}; load it with a larger "
            f"max_len, or cut shorter pieces."
        )
    if rows is not None and rows < 1:
        raise InvalidSetting(f"rows is {rows}; it must be at least 1.")
    for pieces in tokens.split(max(1, _TOKENS // length) if rows is None else 1):
        hidden = _hidden(decoder, pieces, rows).unflatten(0, pieces.shape)[:, :-1]
        yield from zip(hidden, pieces[:, 1:].to(hidden.device), strict=True)


def _hidden(decoder: Decoder, pieces: Tensor, rows: int | None) -> Tensor:
    """Hidden states [pieces * length, hidden] of a few pieces, or of one piece `rows` tokens at a time."""
    batch = Pieces.of(pieces, decoder.norm.device)
    if rows is None:
        return decoder(batch, WholePieces())
    attention = _InParts()
    parts = zip(batch.ids.split(rows), batch.positions.split(rows), strict=True)
    return torch.cat([decoder(Pieces(ids, positions, len(ids)), attention) for ids, positions in parts])


class _InParts:
    """Causal attention of one piece that comes part by part."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Pieces) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]."""
        if layer in self.kept:
            k, v = (torch.cat(pair) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = k, v
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)[0].transpose(0, 1)
