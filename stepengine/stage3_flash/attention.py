"""Flash attention: scores are never written out, neither for prompts nor for decodes."""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stepengine.core.batch import Batch
from stepengine.core.kv_pool import KVPool
from stepengine.model.config import ModelConfig
from stepengine.stage2_paged.gather import Copies, Gather, plan_gather


class FlashAttention:
    """Attention by tiles with an online softmax (FlashAttention, Dao et al. 2022; FlashAttention-2, Dao 2023).

    On a GPU two kernels of our own read K/V through the block table: one for chunks of any length, one
    for decodes that splits a long sequence among several programs (Flash-Decoding). On a CPU torch's
    fused attention runs the same algorithm on gathered tiles.
    """

    capturable = True

    def __init__(self, config: ModelConfig, pool: KVPool) -> None:
        self.pool = pool
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.scale = 1 / math.sqrt(config.head_dim)
        self.copies = Copies()
        on_gpu = pool.device.type == "cuda"
        self.num_sms = torch.cuda.get_device_properties(pool.device).multi_processor_count if on_gpu else 0

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]; k and v are stored on the way."""
        if q.is_cuda:
            return self._on_gpu(layer, q, k, v, batch)
        self.pool.store(layer, k, v, batch)
        return self._decode(layer, q, batch) if batch.max_q == 1 else self._mixed(layer, q, k, v, batch)

    def _on_gpu(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        from stepengine.stage2_paged.kernels import store_kv
        from stepengine.stage3_flash import kernels

        storage = self.pool.layers[layer]
        store_kv(k, v, storage, batch.slots)
        table, lens = batch.block_table, batch.kv_lens
        if batch.max_q > 1:
            return kernels.flash_prefill(q, k, v, storage, table, batch.cu_q, lens, batch.max_q, self.scale)
        if "splits" not in batch.memo:
            longest = table.shape[1] * self.pool.block_size
            batch.memo["splits"] = kernels.decode_splits(batch.num_rows, self.num_kv_heads, longest, self.num_sms)
        return kernels.paged_decode(q, storage, table, lens, self.scale, batch.memo["splits"])

    def _mixed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Single tokens all at once, as in a decode step, then longer chunks one after another."""
        if "chunks" not in batch.memo:
            batch.memo["chunks"] = [row for row, length in enumerate(batch.lengths) if length > 1]
            batch.memo["singles"] = singles = [row for row, length in enumerate(batch.lengths) if length == 1]
            batch.memo["gather"] = plan_gather(batch, self.pool, q.dtype, singles)
            batch.memo["masks"] = {row: self._mask(batch, row) for row in batch.memo["chunks"]}
        out = torch.empty_like(q)
        if batch.memo["singles"]:
            gather: Gather = batch.memo["gather"]
            out.index_copy_(0, gather.order, self._gathered(layer, q.index_select(0, gather.order), gather))
        parts = zip(*(tensor.split(batch.lengths) for tensor in (q, k, v, out)), strict=True)
        for row, (queries, keys, values, into) in enumerate(parts):
            if batch.lengths[row] > 1:
                into.copy_(self._chunk(layer, row, queries, keys, values, batch))
        return out

    @staticmethod
    def _mask(batch: Batch, row: int) -> Tensor | None:
        """Which keys the queries of a chunk that starts late may see, [L, end]."""
        start, length = batch.starts[row], batch.lengths[row]
        return torch.ones(length, start + length, dtype=torch.bool).tril_(start) if start else None

    def _chunk(self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """One chunk of any length, [L, Hq, D]; K/V are read from blocks only where some came before it."""
        mask = batch.memo["masks"][row]
        keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [Hk, L, D]
        if mask is not None:
            end = mask.shape[1]
            table = batch.block_table[row, : -(-end // self.pool.block_size)]
            blocks = self.pool.layers[layer].index_select(0, table).permute(1, 2, 0, 3, 4)  # [2, Hk, M, block_size, D]
            keys, values = blocks.flatten(2, 3)[:, :, :end]
        fused = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return fused[0].transpose(0, 1)

    def _decode(self, layer: int, q: Tensor, batch: Batch) -> Tensor:
        """One token per row."""
        if "gather" not in batch.memo:
            batch.memo["gather"] = plan_gather(batch, self.pool, q.dtype)
        gather: Gather = batch.memo["gather"]
        return self._gathered(layer, q.index_select(0, gather.order), gather).index_select(0, gather.back)

    def _gathered(self, layer: int, q: Tensor, gather: Gather) -> Tensor:
        """For each group one gather and one fused attention, a KV head's queries as its rows; q in their order."""
        heads, head_dim = self.num_kv_heads, q.shape[-1]
        stored = self.pool.layers[layer].view(-1, self.pool.block_size * head_dim)  # tile by tile
        out = torch.empty_like(q)
        at = 0
        for count, tiles, mask in gather.groups:
            keys, values = self.copies.of(stored, tiles).view(2, count, heads, -1, head_dim)  # [R, Hk, L, D]
            queries = q[at : at + count].view(count, heads, -1, head_dim)  # [R, Hk, G, D]
            mask = mask.view(count, heads, 1, -1)
            fused = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale)
            out[at : at + count] = fused.reshape(count, -1, head_dim)
            at += count
        return out
