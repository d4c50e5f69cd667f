"""K/V storage: one layout from contiguous slots to small pages, and the moves of whole blocks."""

from collections.abc import Sequence

import torch

from stepengine.core.batch import Batch
from stepengine.core.plan import StepPlan, Swap
from stepengine.model.config import ModelConfig


class KVPool:
    """Keys and values of all layers, `[num_blocks + 1, 2, num_kv_heads, block_size, head_dim]` each.

    One head of one block is one contiguous tile. Block 0 is never handed out: padding rows point at
    it. Zeroed, because an unwritten NaN would survive a masked softmax (0 x NaN is NaN); the pages of
    a large zeroed tensor take no memory on a CPU until they are written. `num_host_blocks` more lie in
    host memory (pinned beside a GPU), for requests that are swapped out.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        layers = config.num_layers if block_size else 0
        tile = (2, config.num_kv_heads, block_size, config.head_dim)
        self.storage = torch.zeros((layers, num_blocks + 1, *tile), device=device, dtype=dtype)
        self.layers = list(self.storage)
        self.host = torch.empty((num_host_blocks, layers, *tile), dtype=dtype, pin_memory=device.type == "cuda")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's K/V in all layers."""
        return self.storage[:, 0].numel() * self.storage.element_size()

    def move(self, plan: StepPlan) -> None:
        """Carry out a plan's swaps and copies, in that order, before its tokens run."""
        for swap in plan.swapped_out:
            self._to_host(swap)
        for swap in plan.swapped_in:
            self._from_host(swap)
        if plan.copies:  # all copies of the step at once, in all layers
            sources = self._ids([copy.source for copy in plan.copies])
            destinations = self._ids([copy.destination for copy in plan.copies])
            self.storage.index_copy_(1, destinations, self.storage.index_select(1, sources))

    def _to_host(self, swap: Swap) -> None:
        blocks, slots = zip(*swap.pairs, strict=True)
        moved = self.storage.index_select(1, self._ids(blocks)).transpose(0, 1).contiguous()  # [n, layers, ...]
        for block, slot in zip(moved, slots, strict=True):
            self.host[slot].copy_(block, non_blocking=True)

    def _from_host(self, swap: Swap) -> None:
        blocks, slots = zip(*swap.pairs, strict=True)
        moved = torch.empty((len(slots), *self.host.shape[1:]), dtype=self.host.dtype, device=self.device)
        for block, slot in zip(moved, slots, strict=True):
            block.copy_(self.host[slot], non_blocking=True)
        self.storage.index_copy_(1, self._ids(blocks), moved.transpose(0, 1))

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, device=self.device)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Write a step's keys and values, each [T, Hk, D], to its tokens' slots in one layer."""
        if "write" not in batch.memo:
            batch.memo["write"] = self._write_index(batch.slots)
        key_rows, value_rows = batch.memo["write"]
        storage = self.layers[layer]
        rows = storage.view(-1, storage.shape[-1])  # [(num_blocks + 1) x 2 x Hk x block_size, D]
        rows.index_copy_(0, key_rows, k.reshape(-1, k.shape[-1]))
        rows.index_copy_(0, value_rows, v.reshape(-1, v.shape[-1]))

    def _write_index(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of D values in a layer's storage for K and for V of tokens at `slots` [T]: each [T x Hk]."""
        heads = self.layers[0].shape[2]
        block, offset = slots // self.block_size, slots % self.block_size
        head = torch.arange(heads, device=slots.device)
        key = ((block * 2 * heads)[:, None] + head) * self.block_size + offset[:, None]
        key = key.reshape(-1).long()
        return key, key + heads * self.block_size
