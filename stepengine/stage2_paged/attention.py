"""Attention over block tables: on a CPU one gather for all sequences, on a GPU kernels that walk the table."""

import math

import torch
from torch import Tensor

from stepengine.core.batch import Batch
from stepengine.core.kv_pool import KVPool
from stepengine.model.config import ModelConfig
from stepengine.stage0_naive.attention import causal_attention
from stepengine.stage2_paged.gather import Copies, Gather, plan_gather


class PagedAttention:
    """A request's K/V lie in blocks anywhere in the pool (PagedAttention, Kwon et al. 2023, section 4.1).

    On a CPU a decode step first copies the tiles of its sequences side by side, [R x Hk, L, D], which
    contiguous slots do without. Rows of about equal length are taken together: padding every row to the
    longest, as slots do, would cost more than the copy where lengths differ. Entries beyond a row's end
    name block 0.
    """

    capturable = False

    def __init__(self, config: ModelConfig, pool: KVPool) -> None:
        self.pool = pool
        self.num_kv_heads = config.num_kv_heads
        self.scale = 1 / math.sqrt(config.head_dim)
        self.copies = Copies()

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
        else:
            self.pool.store(layer, k, v, batch)

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
        """One token per row: for each group one gather, then one pair of matrix products for its rows and heads."""
        if "gather" not in batch.memo:
            batch.memo["gather"] = plan_gather(batch, self.pool, q.dtype)
        gather: Gather = batch.memo["gather"]
        num_heads, head_dim = q.shape[1:]
        storage = self.pool.layers[layer]
        stored = storage.view(-1, self.pool.block_size * head_dim)  # [(num_blocks + 1) x 2 x Hk, block_size x D]
        q = q.index_select(0, gather.order)
        out = torch.empty_like(q)
        at = 0
        for count, tiles, mask in gather.groups:
            pairs = count * self.num_kv_heads
            keys, values = self.copies.of(stored, tiles).view(2, pairs, -1, head_dim)  # [R x Hk, L, D]
            queries = q[at : at + count].view(pairs, -1, head_dim)  # [R x Hk, G, D]
            scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=self.scale)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # [R x Hk, G, L]
            out[at : at + count] = (weights @ values).view(count, num_heads, head_dim)
            at += count
        return out.index_select(0, gather.back)
