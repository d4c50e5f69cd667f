"""The ragged batch of one step, in one staging buffer that goes to the device in one copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stepengine.core.plan import Chunk
from stepengine.core.request import Request, SamplingParams
from stepengine.errors import StepEngineError


@dataclass
class Batch:
    """B chunks of T tokens in all, one after another without padding. Tensors are int32 on the device.

    ids, positions, slots [T]: a token's slot is block x block_size + offset, or 0 (in block 0) where its
    K/V are stored already. cu_q [B + 1]: where each chunk's tokens begin. kv_lens [B]: tokens of K/V once
    the chunk is stored. block_table [B, M], 0 beyond a row's blocks. rows [B]: the last token of each
    chunk, whose logits are wanted. temperature, top_p, min_p [B] are float32; top_k, noise_key [B] int32.
    An id below 0 is one that the step before samples: -1 - its row there.
    """

    num_tokens: int
    max_q: int  # tokens of the longest chunk, or more
    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    cu_q: torch.Tensor
    kv_lens: torch.Tensor
    block_table: torch.Tensor
    rows: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    noise_key: torch.Tensor
    starts: list[int]  # on the host: position of each chunk's first token
    lengths: list[int]  # on the host: tokens of each chunk
    tables: np.ndarray  # on the host: block_table [B, M]
    source: torch.Tensor  # the host's buffer
    memo: dict[str, Any] = field(default_factory=dict)  # what a backend derives once per step

    @property
    def num_rows(self) -> int:
        return len(self.lengths)


class Staging:
    """A pinned host buffer with a twin on the device, both at fixed addresses, viewed field by field.

    `ahead`: a step is laid out while the one before it still runs, so there are two host buffers, used
    in turn, and a twin on a CPU too.

    Rows come first and tokens last, so that a step with more tokens than ever before only lengthens
    the buffer (a cache that forgets runs every token again; others never exceed the token budget).
    """

    ROW_FIELDS = ("kv_lens", "rows", "temperature", "top_p", "min_p", "top_k", "noise_key")
    FLOAT_FIELDS = frozenset({"temperature", "top_p", "min_p"})
    TOKEN_FIELDS = ("ids", "positions", "slots")

    def __init__(
        self,
        device: torch.device,
        max_rows: int,
        max_tokens: int,
        max_blocks: int,
        block_size: int,
        ahead: bool = False,
    ) -> None:
        self.device = device
        self.max_rows = max_rows
        self.max_blocks = max_blocks  # entries of one block table
        self.block_size = block_size
        self.ahead = ahead
        self._allocate(max_tokens)

    def _allocate(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        sizes = {"cu_q": self.max_rows + 1, **dict.fromkeys(self.ROW_FIELDS, self.max_rows)}
        sizes["block_table"] = self.max_rows * self.max_blocks
        sizes |= dict.fromkeys(self.TOKEN_FIELDS, max_tokens)
        on_gpu, total = self.device.type == "cuda", sum(sizes.values())
        self._sides = [
            _Side(torch.zeros(total, dtype=torch.int32, pin_memory=on_gpu), sizes, self.FLOAT_FIELDS)
            for _ in range(1 + self.ahead)
        ]
        twin = on_gpu or self.ahead
        self._device = torch.zeros(total, dtype=torch.int32, device=self.device) if twin else self._sides[0].buffer
        self._views = _views(self._device, sizes, self.FLOAT_FIELDS)

    def fill(self, chunks: Sequence[Chunk], requests: Mapping[int, Request]) -> Batch:
        """Lay out the chunks and send them to the device."""
        batch = self.lay_out(chunks, requests)
        self.send(batch)
        return batch

    def send(self, batch: Batch) -> None:
        """Copy what `lay_out` wrote to the device. Belongs to the device's work: it comes after the step before."""
        if self._device is not batch.source:
            self._device.copy_(batch.source, non_blocking=True)

    def lay_out(
        self, chunks: Sequence[Chunk], requests: Mapping[int, Request], padded: tuple[int, int] | None = None
    ) -> Batch:
        """Write the chunks into a buffer on the host.

        `padded` (tokens, rows): the batch gets this size. What is missing is filled by sequences of their own
        that lie in block 0: one token each in a batch of decodes, else one row that takes all tokens.
        """
        count, total = len(chunks), sum(chunk.length for chunk in chunks)
        num_tokens, num_rows = padded or (total, count)
        if num_tokens > self.max_tokens:
            self._allocate(max(num_tokens, 2 * self.max_tokens))
        self._sides.append(side := self._sides.pop(0))  # the other one may still be on its way to the device
        host = side.host
        table = host["block_table"][: num_rows * self.max_blocks].reshape(num_rows, self.max_blocks)
        ids: list[int] = []
        positions: list[int] = []
        ends: list[int] = [0]
        for row, chunk in enumerate(chunks):
            request = requests[chunk.request]
            room = len(request.blocks) * self.block_size
            if self.block_size and room < chunk.end:
                raise StepEngineError(
                    f"Request {request.id} is to store K/V of {chunk.end} tokens and holds room for {room}; "
                    f"KVCache.grow must grant blocks before the tokens run."
                )
            ids += request.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            ends.append(len(ids))
            self._write_row(side, row, request, table)
        lengths, starts = [chunk.length for chunk in chunks], [chunk.start for chunk in chunks]
        host["kv_lens"][:count] = [chunk.end for chunk in chunks]
        host["slots"][:num_tokens] = 0
        if self.block_size and count:
            position = np.array(positions)
            row_of = np.repeat(np.arange(count), lengths)
            stored = np.repeat([requests[chunk.request].computed for chunk in chunks], lengths)
            block = table[row_of, position // self.block_size]
            slots = np.where(position < stored, 0, block * self.block_size + position % self.block_size)
            host["slots"][:total] = slots
        for row in range(count, num_rows):
            missing = num_tokens - len(ids)
            length = min(missing, 1 if num_tokens == num_rows else missing)
            ids += [0] * length
            positions += range(length)
            ends.append(len(ids))
            lengths.append(length)
            starts.append(0)
            host["kv_lens"][row] = max(length, 1)
            self._write_row(side, row, None, table)
        host["ids"][:num_tokens] = ids
        host["positions"][:num_tokens] = positions
        host["cu_q"][: num_rows + 1] = ends
        host["rows"][:num_rows] = np.maximum(host["cu_q"][1 : num_rows + 1] - 1, 0)
        decodes = max(lengths) == 1
        max_q = num_tokens if padded and not decodes else max(lengths)  # a captured step serves chunks of any length
        return self._batch(num_tokens, max_q, starts, lengths, table, side.buffer)

    def _write_row(self, side: "_Side", row: int, request: Request | None, table: np.ndarray) -> None:
        """What changes rarely: a row that belongs to the request of last time keeps its settings and its table."""
        host, blocks = side.host, request.blocks if request is not None else []
        if row not in side.written or side.written[row][0] is not request:
            params = request.params if request is not None else _GREEDY
            host["temperature"][row] = params.temperature
            host["top_p"][row] = params.top_p
            host["min_p"][row] = params.min_p
            host["top_k"][row] = min(max(params.top_k, 0), 2**31 - 1)
            host["noise_key"][row] = request.noise_key if request is not None else 0
        elif side.written[row][1] == blocks:
            return
        table[row, : len(blocks)] = blocks
        table[row, len(blocks) :] = 0
        side.written[row] = (request, list(blocks))

    def _batch(
        self,
        num_tokens: int,
        max_q: int,
        starts: list[int],
        lengths: list[int],
        table: np.ndarray,
        source: torch.Tensor,
    ) -> Batch:
        view, num_rows = self._views, len(lengths)
        per_token: dict[str, Any] = {name: view[name][:num_tokens] for name in self.TOKEN_FIELDS}
        per_row: dict[str, Any] = {name: view[name][:num_rows] for name in self.ROW_FIELDS}
        return Batch(
            num_tokens=num_tokens,
            max_q=max_q,
            cu_q=view["cu_q"][: num_rows + 1],
            block_table=view["block_table"][: num_rows * self.max_blocks].view(num_rows, self.max_blocks),
            starts=starts,
            lengths=lengths,
            tables=table,
            source=source,
            **per_token,
            **per_row,
        )


_GREEDY = SamplingParams(temperature=0.0)  # of a padding row


class _Side:
    """A buffer on the host, and what its rows were last written for."""

    def __init__(self, buffer: torch.Tensor, sizes: Mapping[str, int], floats: frozenset[str]) -> None:
        self.buffer = buffer
        self.host = {name: view.numpy() for name, view in _views(buffer, sizes, floats).items()}
        self.written: dict[int, tuple[Request | None, list[int]]] = {}  # row -> whose, and its blocks


def _views(buffer: torch.Tensor, sizes: Mapping[str, int], floats: frozenset[str]) -> dict[str, torch.Tensor]:
    parts = dict(zip(sizes, buffer.split(list(sizes.values())), strict=True))
    return {name: part.view(torch.float32) if name in floats else part for name, part in parts.items()}
