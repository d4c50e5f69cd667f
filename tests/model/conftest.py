"""A batch and an attention backend as plain as can be, for running a decoder without an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepengine.model.decoder import Decoder


@dataclass
class RaggedBatch:
    """Whole sequences end to end: what a decoder and `MaterialisedAttention` need of a batch."""

    ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    cu_q: list[int]  # where each sequence starts, and T at the end

    @classmethod
    def of(cls, sequences: list[list[int]]) -> "RaggedBatch":
        bounds = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).tolist()
        ids = torch.tensor([token for s in sequences for token in s], dtype=torch.int32)
        positions = torch.cat([torch.arange(len(s), dtype=torch.int32) for s in sequences])
        return cls(ids, positions, bounds)


class MaterialisedAttention:
    """Causal attention of each sequence to itself: scores, mask, softmax, weighted sum."""

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch) -> Tensor:
        out = torch.empty_like(q)
        for start, end in zip(batch.cu_q, batch.cu_q[1:], strict=False):
            rows = slice(start, end)
            group = q.shape[1] // k.shape[1]
            keys, values = k[rows].repeat_interleave(group, 1), v[rows].repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * q.shape[-1] ** -0.5
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
        return out


@pytest.fixture
def logits_of() -> Callable[[Decoder, list[list[int]]], Tensor]:
    """logits_of(decoder, sequences) -> [T, vocab] of all their tokens."""

    def run(decoder: Decoder, sequences: list[list[int]]) -> Tensor:
        with torch.inference_mode():
            return decoder.logits(decoder(RaggedBatch.of(sequences), MaterialisedAttention()))

    return run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, named by STEPENGINE_HOME."""
    monkeypatch.setenv("STEPENGINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
