"""The ragged batch of one step, in one staging buffer that goes to the device in one copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stepengine.core.plan import Chunk
from stepengine.core.request import Request
from stepengine.errors import StepEngineError


@dataclass
class Batch:
    """B chunks of T tokens in all, one after another without padding. Tensors are int32 on the device.

    ids, positions, slots [T]: a token's slot is block x block_size + offset, or 0 (in block 0) where its
    K/V are stored already. cu_q [B + 1]: where each chunk's tokens begin. kv_lens [B]: tokens of K/V once
    the chunk is stored. block_table [B, M], 0 beyond a row's blocks. rows [B]: the last token of each
    chunk, whose logits are wanted. temperature, top_p, min_p [B] are float32; top_k, noise_key [B] int32.
    """

    num_tokens: int
    max_q: int  # tokens of the longest chunk
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
    memo: dict[str, Any] = field(default_factory=dict)  # what a backend derives once per step

    @property
    def num_rows(self) -> int:
        return len(self.lengths)


class Staging:
    """A pinned host buffer with a twin on the device, both at fixed addresses, viewed field by field.

    Rows come first and tokens last, so that a step with more tokens than ever before only lengthens
    the buffer (a cache that forgets runs every token again; others never exceed the token budget).
    """

    ROW_FIELDS = ("kv_lens", "rows", "temperature", "top_p", "min_p", "top_k", "noise_key")
    FLOAT_FIELDS = frozenset({"temperature", "top_p", "min_p"})
    TOKEN_FIELDS = ("ids", "positions", "slots")

    def __init__(self, device: torch.device, max_rows: int, max_tokens: int, max_blocks: int, block_size: int) -> None:
        self.device = device
        self.max_rows = max_rows
        self.max_blocks = max_blocks  # entries of one block table
        self.block_size = block_size
        self._allocate(max_tokens)

    def _allocate(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        sizes = {"cu_q": self.max_rows + 1, **dict.fromkeys(self.ROW_FIELDS, self.max_rows)}
        sizes["block_table"] = self.max_rows * self.max_blocks
        sizes |= dict.fromkeys(self.TOKEN_FIELDS, max_tokens)
        on_gpu = self.device.type == "cuda"
        self._host = torch.zeros(sum(sizes.values()), dtype=torch.int32, pin_memory=on_gpu)
        self._device = torch.zeros_like(self._host, device=self.device) if on_gpu else self._host
        self._views: dict[str, torch.Tensor] = {}
        self.host: dict[str, np.ndarray] = {}
        at = 0
        for name, size in sizes.items():
            window = slice(at, at + size)
            at += size
            host, device = self._host[window], self._device[window]
            if name in self.FLOAT_FIELDS:
                host, device = host.view(torch.float32), device.view(torch.float32)
            self._views[name], self.host[name] = device, host.numpy()

    def fill(self, chunks: Sequence[Chunk], requests: Mapping[int, Request]) -> Batch:
        """Lay out the chunks and send them to the device."""
        total = sum(chunk.length for chunk in chunks)
        if total > self.max_tokens:
            self._allocate(max(total, 2 * self.max_tokens))
        count, host = len(chunks), self.host
        table = host["block_table"][: count * self.max_blocks].reshape(count, self.max_blocks)
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
            ids.extend(request.token_ids[chunk.start : chunk.end])
            positions.extend(range(chunk.start, chunk.end))
            ends.append(len(ids))
            table[row, : len(request.blocks)] = request.blocks
            table[row, len(request.blocks) :] = 0
        live = [requests[chunk.request] for chunk in chunks]
        host["ids"][:total] = ids
        host["positions"][:total] = positions
        host["cu_q"][: count + 1] = ends
        host["kv_lens"][:count] = [chunk.end for chunk in chunks]
        host["rows"][:count] = host["cu_q"][1 : count + 1] - 1
        host["temperature"][:count] = [request.params.temperature for request in live]
        host["top_p"][:count] = [request.params.top_p for request in live]
        host["min_p"][:count] = [request.params.min_p for request in live]
        host["top_k"][:count] = [min(max(request.params.top_k, 0), 2**31 - 1) for request in live]
        host["noise_key"][:count] = [request.noise_key for request in live]
        lengths = [chunk.length for chunk in chunks]
        if self.block_size:
            position = host["positions"][:total]
            row_of = np.repeat(np.arange(count), lengths)
            block = table[row_of, position // self.block_size]
            stored = np.repeat([request.computed for request in live], lengths)
            host["slots"][:total] = np.where(position < stored, 0, block * self.block_size + position % self.block_size)
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        view = self._views
        per_token: dict[str, Any] = {name: view[name][:total] for name in self.TOKEN_FIELDS}
        per_row: dict[str, Any] = {name: view[name][:count] for name in self.ROW_FIELDS}
        return Batch(
            num_tokens=total,
            max_q=max(lengths),
            cu_q=view["cu_q"][: count + 1],
            block_table=view["block_table"][: count * self.max_blocks].view(count, self.max_blocks),
            starts=[chunk.start for chunk in chunks],
            lengths=lengths,
            tables=table,
            **per_token,
            **per_row,
        )
