"""Attention over contiguous slots: decode reads all slots in one call, without a gather."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stepengine.core.batch import Batch
from stepengine.core.kv_pool import KVPool
from stepengine.model.config import ModelConfig
from stepengine.stage0_naive.attention import causal_attention


class _Window(NamedTuple):
    """The slots that a decode step reads, the same for all layers."""

    first: int  # slots first .. first + count - 1; those between that run nothing are computed and dropped
    count: int
    longest: int
    place: Tensor  # [B], where each row's slot lies in the window
    mask: Tensor  # [count, 1, longest], 0 or -inf


class SlotAttention:
    """A request's K/V lie in one block, so a head's keys of all slots are one strided [S, L, D] matrix."""

    capturable = False

    def __init__(self, config: ModelConfig, pool: KVPool) -> None:
        self.pool = pool
        self.num_kv_heads = config.num_kv_heads
        self.scale = 1 / math.sqrt(config.head_dim)

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]; k and v are stored on the way."""
        self.pool.store(layer, k, v, batch)
        # One request alone needs no batch of slots: there its heads are the batch, in fewer calls.
        many = batch.max_q == 1 and batch.num_rows > 1
        return self._decode(layer, q, batch) if many else self._chunks(layer, q, batch)

    def _chunks(self, layer: int, q: Tensor, batch: Batch) -> Tensor:
        """Chunks of any length, one after another, each over its own slot."""
        storage = self.pool.layers[layer]
        out = []
        each = zip(q.split(batch.lengths), batch.tables[:, 0].tolist(), batch.starts, batch.lengths, strict=True)
        for chunk, slot, start, length in each:
            keys, values = storage[slot, :, :, : start + length]  # [Hk, L, D]
            out.append(causal_attention(chunk, keys, values))
        return torch.cat(out)

    def _decode(self, layer: int, q: Tensor, batch: Batch) -> Tensor:
        """One token per row, all slots at once: one pair of matrix products per KV head."""
        if "window" not in batch.memo:
            batch.memo["window"] = self._window(batch, q.dtype)
        window: _Window = batch.memo["window"]
        num_rows, num_heads, head_dim = q.shape
        group = num_heads // self.num_kv_heads
        storage = self.pool.layers[layer][window.first : window.first + window.count]
        spread = q.new_zeros(window.count, num_heads, head_dim).index_copy_(0, window.place, q)
        out = torch.empty_like(spread)
        for head in range(self.num_kv_heads):
            heads = slice(head * group, (head + 1) * group)
            keys = storage[:, 0, head, : window.longest]  # [S, L, D], a view
            values = storage[:, 1, head, : window.longest]
            scores = torch.baddbmm(window.mask, spread[:, heads], keys.transpose(1, 2), alpha=self.scale)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # [S, G, L]
            out[:, heads] = weights @ values
        return out[window.place]

    def _window(self, batch: Batch, dtype: torch.dtype) -> _Window:
        first = int(batch.tables[:, 0].min())
        count = int(batch.tables[:, 0].max()) - first + 1
        longest = max(batch.starts) + 1
        place = batch.block_table[:, 0].long() - first
        lens = batch.kv_lens.new_ones(count).index_copy_(
            0, place, batch.kv_lens
        )  # an empty slot reads one token of zeros
        beyond = torch.arange(longest, device=place.device)[None, :] >= lens[:, None]
        mask = torch.zeros(count, 1, longest, dtype=dtype, device=place.device)
        return _Window(first, count, longest, place, mask.masked_fill_(beyond[:, None], -torch.inf))
