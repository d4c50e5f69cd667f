"""Attention over block tables: on a CPU one gather for all sequences, on a GPU kernels that walk the table."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stepengine.core.batch import Batch
from stepengine.core.kv_pool import KVPool
from stepengine.model.config import ModelConfig
from stepengine.stage0_naive.attention import causal_attention


class _Tiles(NamedTuple):
    """What a decode step reads, the same for all layers."""

    keys: Tensor  # [B x Hk x M]: row of each tile of keys; a tile is one head of one block
    values: Tensor  # [B x Hk x M]
    mask: Tensor  # [B x Hk, 1, M x block_size], 0 or -inf


class PagedAttention:
    """A request's K/V lie in blocks anywhere in the pool (PagedAttention, Kwon et al. 2023, section 4.1).

    On a CPU a decode step gathers the tiles of all its sequences into one [B x Hk, L, D] matrix, which
    costs a copy that contiguous slots do without; entries beyond a sequence's end name block 0.
    """

    capturable = False

    def __init__(self, config: ModelConfig, pool: KVPool) -> None:
        self.pool = pool
        self.num_kv_heads = config.num_kv_heads
        self.scale = 1 / math.sqrt(config.head_dim)

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]; k and v are stored on the way."""
        self._store(layer, k, v, batch)
        if batch.max_q > 1:
            return self._chunks(layer, q, k, v, batch)
        if q.is_cuda:
            from stepengine.stage2_paged import kernels

            return kernels.paged_attention(q, self.pool.layers[layer], batch.block_table, batch.kv_lens, self.scale)
        return self._decode(layer, q, batch)

    def _store(self, layer: int, k: Tensor, v: Tensor, batch: Batch) -> None:
        if k.is_cuda:
            from stepengine.stage2_paged import kernels

            kernels.store_kv(k, v, self.pool.layers[layer], batch.slots)
            return
        if "write" not in batch.memo:
            batch.memo["write"] = self.pool.write_index(batch.slots)
        key_rows, value_rows = batch.memo["write"]
        rows = self.pool.rows(layer)
        rows.index_copy_(0, key_rows, k.reshape(-1, k.shape[-1]))
        rows.index_copy_(0, value_rows, v.reshape(-1, v.shape[-1]))

    def _chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Chunks of any length, one after another; only what came before a chunk is read from blocks."""
        storage, size = self.pool.layers[layer], self.pool.block_size
        out = []
        each = zip(q.split(batch.lengths), k.split(batch.lengths), v.split(batch.lengths), strict=True)
        for row, (queries, keys, values) in enumerate(each):
            start, end = batch.starts[row], batch.starts[row] + batch.lengths[row]
            if start:
                table = batch.block_table[row, : -(-end // size)]
                blocks = storage.index_select(0, table).permute(1, 2, 0, 3, 4)  # [2, Hk, M, block_size, D]
                keys, values = blocks.flatten(2, 3)[:, :, :end]  # [Hk, L, D]
            else:
                keys, values = keys.transpose(0, 1), values.transpose(0, 1)
            out.append(causal_attention(queries, keys, values))
        return torch.cat(out)

    def _decode(self, layer: int, q: Tensor, batch: Batch) -> Tensor:
        """One token per row: two gathers, then one pair of matrix products for all rows and heads."""
        if "tiles" not in batch.memo:
            batch.memo["tiles"] = self._tiles(batch, q.dtype)
        tiles: _Tiles = batch.memo["tiles"]
        num_rows, num_heads, head_dim = q.shape
        storage = self.pool.layers[layer]
        pairs = num_rows * self.num_kv_heads
        stored = storage.view(-1, storage.shape[3] * head_dim)  # [(num_blocks + 1) x 2 x Hk, block_size x D]
        keys = stored.index_select(0, tiles.keys).view(pairs, -1, head_dim)  # [B x Hk, L, D]
        values = stored.index_select(0, tiles.values).view(pairs, -1, head_dim)
        queries = q.reshape(pairs, num_heads // self.num_kv_heads, head_dim)  # [B x Hk, G, D]
        scores = torch.baddbmm(tiles.mask, queries, keys.transpose(1, 2), alpha=self.scale)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # [B x Hk, G, L]
        return (weights @ values).view(num_rows, num_heads, head_dim)

    def _tiles(self, batch: Batch, dtype: torch.dtype) -> _Tiles:
        size, heads = self.pool.block_size, self.num_kv_heads
        blocks = -(-(max(batch.starts) + 1) // size)
        table = batch.block_table[:, :blocks].long()
        head = torch.arange(heads, device=table.device)
        keys = (
            table[:, None] * 2 * heads + head[:, None]
        ).flatten()  # a block's keys of all heads come before its values
        beyond = torch.arange(blocks * size, device=table.device)[None, :] >= batch.kv_lens[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=table.device).masked_fill_(beyond, -torch.inf)
        return _Tiles(keys, keys + heads, mask.repeat_interleave(heads, 0)[:, None])
