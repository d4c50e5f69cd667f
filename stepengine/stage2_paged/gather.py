"""Which blocks a decode step copies side by side on a CPU, and in what groups: decided once a step, for all layers."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from stepengine.core.batch import Batch
from stepengine.core.kv_pool import KVPool

PADDING_BYTES = 1 << 19  # of K/V that a group copies beyond its rows' ends; less would cost more calls than it saves


class Group(NamedTuple):
    """Rows of a decode step whose K/V are gathered together, the same for all layers."""

    count: int
    tiles: Tensor  # [2 x R x Hk x M]: which tile (one head of one block) comes where, keys before values
    mask: Tensor  # [R x Hk, 1, M x block_size], 0 or -inf


class Gather(NamedTuple):
    """The groups of a decode step. Rows are taken in order of length, longest first, so a group pads little."""

    order: Tensor  # [B], the token of each row
    back: Tensor  # [B], its inverse, where the batch is single tokens only
    groups: list[Group]


def plan_gather(batch: Batch, pool: KVPool, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Gather:
    """Groups of rows of about equal length for a batch of single tokens; masks are of `dtype`.

    In a batch with longer chunks too, `rows` are those of a single token.
    """
    if rows is None:
        rows = range(batch.num_rows)
    ordered = sorted(rows, key=lambda row: batch.starts[row], reverse=True)
    first = [0, *accumulate(batch.lengths)]
    order = torch.tensor([first[row] for row in ordered])
    layer_bytes = pool.block_bytes // len(pool.layers)
    groups: list[list[int]] = []
    longest = padding = 0
    for row in ordered:
        blocks = batch.starts[row] // pool.block_size + 1
        padding += (longest - blocks) * layer_bytes
        if not groups or padding > PADDING_BYTES:
            groups.append([])
            longest, padding = blocks, 0
        groups[-1].append(row)
    return Gather(order, order.argsort(), [_group(batch, rows, pool, dtype) for rows in groups])


def _group(batch: Batch, rows: list[int], pool: KVPool, dtype: torch.dtype) -> Group:
    size, heads = pool.block_size, pool.layers[0].shape[2]
    longest = batch.starts[rows[0]] + 1
    table = batch.block_table[rows, : -(-longest // size)].long()
    keys = (table[:, None] * 2 * heads + torch.arange(heads)[:, None]).flatten()  # a block: its keys, its values
    beyond = torch.arange(table.shape[1] * size) >= batch.kv_lens[rows][:, None]
    mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)
    return Group(len(rows), torch.cat((keys, keys + heads)), mask.repeat_interleave(heads, 0)[:, None])


class Copies:
    """Where gathered tiles lie: one buffer that all layers and steps use, so that no call asks for fresh memory."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def of(self, stored: Tensor, tiles: Tensor) -> Tensor:
        """The rows `tiles` of `stored` [rows, N], side by side: [len(tiles), N]. Valid until the next call."""
        need = tiles.numel() * stored.shape[1]
        if self._room.numel() < need or self._room.dtype != stored.dtype:
            with torch.inference_mode(False):  # usable in either mode
                self._room = torch.empty(need, dtype=stored.dtype)
        return torch.index_select(stored, 0, tiles, out=self._room[:need].view(tiles.numel(), -1))
