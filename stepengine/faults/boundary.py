"""Exhibit 3: attention that miscounts its blocks by one, at every block boundary."""

import torch
from torch import Tensor

from stepengine.contracts import check_attention
from stepengine.core.batch import Batch
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.workload import MODEL, Ask, Workload
from stepengine.stage0_naive.attention import causal_attention
from stepengine.stage2_paged.attention import PagedAttention


class WalksTables(PagedAttention):
    """Decodes row after row, as a kernel walks a table: so many full blocks, then what is left in the last one."""

    def _decode(self, layer: int, q: Tensor, batch: Batch) -> Tensor:
        storage, size, out = self.pool.layers[layer], self.pool.block_size, []
        for row, start in enumerate(batch.starts):
            length = start + 1  # tokens with K/V, the newest included
            blocks = -(-length // size)
            in_last = (length - 1) % size + 1
            tiles = storage.index_select(0, batch.block_table[row, :blocks])  # [blocks, 2, Hk, size, D]
            keys, values = tiles.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : (blocks - 1) * size + in_last]
            out.append(causal_attention(q[row : row + 1], keys, values))
        return torch.cat(out)


class CountsTheOldOnes(WalksTables):
    """Counts the blocks of the tokens that were there before the newest one."""

    def _decode(self, layer: int, q: Tensor, batch: Batch) -> Tensor:
        storage, size, out = self.pool.layers[layer], self.pool.block_size, []
        for row, start in enumerate(batch.starts):
            length = start + 1  # tokens with K/V, the newest included
            blocks = -(-start // size)
            in_last = (length - 1) % size + 1
            tiles = storage.index_select(0, batch.block_table[row, :blocks])  # [blocks, 2, Hk, size, D]
            keys, values = tiles.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : (blocks - 1) * size + in_last]
            out.append(causal_attention(q[row : row + 1], keys, values))
        return torch.cat(out)


EXHIBIT = Exhibit(
    name="off by one",
    symptom=(
        "Answers begin well and then leave the rails. Where they do so differs from prompt to prompt, and always is "
        "the same for the same prompt. Very short answers are right."
    ),
    where="the length that each sequence had when its first wrong token was chosen",
    choices=(
        "the model forgets its first tokens",
        "one block is miscounted when a new block begins",
        "two requests share a block",
    ),
    answer="one block is miscounted when a new block begins",
    workload=Workload(
        stage=2,
        asks=(
            Ask("The lighthouse keeper climbed the stairs, lit the lamp and looked out over the", 28),
            Ask("The days of the week are Monday, Tuesday,", 28),
            Ask("Once upon a time there was a little girl who lived in a village near the forest. Every", 28),
        ),
        steps=40,
        settings={"block_size": 16, "num_blocks": 12, "max_num_seqs": 4, "max_model_len": 64},
        model=MODEL,
    ),
    seam="attention",
    healthy=WalksTables,
    broken=CountsTheOldOnes,
    method="_decode",
    check=check_attention,
    promise="a decode step reads what earlier steps stored",
    threads=("pegainfer-project/pegainfer#291",),
)
