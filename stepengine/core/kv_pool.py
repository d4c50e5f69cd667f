"""K/V storage: one tensor per layer, the same layout from contiguous slots to small pages."""

import torch

from stepengine.model.config import ModelConfig


class KVPool:
    """Keys and values of all layers, `[num_blocks + 1, 2, num_kv_heads, block_size, head_dim]` each.

    One head of one block is one contiguous tile. Block 0 is never handed out: padding rows point at
    it. Zeroed, because an unwritten NaN would survive a masked softmax (0 x NaN is NaN); the pages of
    a large zeroed tensor take no memory on a CPU until they are written.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks + 1, 2, config.num_kv_heads, block_size, config.head_dim)
        layers = config.num_layers if block_size else 0
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]

    def write_index(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of `rows(layer)` for K and for V of tokens at `slots` [T]: each [T x num_kv_heads]."""
        heads = self.layers[0].shape[2]
        block, offset = slots // self.block_size, slots % self.block_size
        head = torch.arange(heads, device=slots.device)
        key = ((block * 2 * heads)[:, None] + head) * self.block_size + offset[:, None]
        key = key.reshape(-1).long()
        return key, key + heads * self.block_size

    def rows(self, layer: int) -> torch.Tensor:
        """A layer's storage as rows of head_dim values: [(num_blocks + 1) x 2 x Hk x block_size, D]."""
        storage = self.layers[layer]
        return storage.view(-1, storage.shape[-1])
