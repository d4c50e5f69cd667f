"""Runs a plan on the device: stage the batch, one forward pass, sample."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from stepengine.core.batch import Batch, Staging
from stepengine.core.graphs import Bucket, Graphs, bucket_of, decode_buckets
from stepengine.core.kv_pool import KVPool
from stepengine.core.plan import StepPlan
from stepengine.core.request import Logprob, Request
from stepengine.core.sampler import choose, sample
from stepengine.core.seams import AttentionBackend
from stepengine.core.streams import Inline, Landing, Stream
from stepengine.model.decoder import Decoder


class StepResult(NamedTuple):
    """token_ids: one per chunk, -1 where the chunk does not reach the request's last token. logprobs:
    {row: {token id: Logprob}} for rows that asked. The rest is as in `StepRecord`."""

    token_ids: list[int]
    logprobs: dict[int, dict[int, Logprob]]
    t_launched: float
    t_landed: float
    device_began: float
    device_ended: float
    replayed: int


@dataclass
class Launched:
    """A step on its way. `wanted`: whether each chunk samples a token; the last two are set by the device's work."""

    wanted: list[bool]
    landing: Landing | None = None
    t_launched: float = 0.0
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    replayed: int = 0


class Runner:
    """Owns what the device needs: model, attention backend, staging buffer, K/V storage, captured steps.

    `graphs` is None where every kernel is launched for itself. With a `stream` that runs beside the
    host, and a staging buffer that is laid out ahead, a step can be launched before the one before it
    has landed: its expected ids then come from where that one leaves them on the device.
    """

    def __init__(
        self,
        model: Decoder,
        attention: AttentionBackend,
        staging: Staging,
        pool: KVPool,
        graphs: Graphs | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.model = model
        self.attention = attention
        self.staging = staging
        self.pool = pool
        self.graphs = graphs
        self.stream = stream or Inline()
        rows, norm = staging.max_rows, model.norm
        self._sampled = torch.zeros(rows, dtype=torch.int64, device=norm.device)
        kept = rows if graphs is not None else 0  # rows whose logits may be wanted after a replay
        self._hidden = torch.zeros(kept, len(norm), dtype=norm.dtype, device=norm.device)

    @torch.inference_mode()
    def move(self, plan: StepPlan) -> None:
        """Carry out the plan's swaps and copies: the bookkeeping counts on them as soon as it has planned them."""
        if plan.copies or plan.swapped_out or plan.swapped_in:
            self.stream.call(torch.inference_mode()(lambda: self.pool.move(plan)))

    def warm_up(self) -> None:
        """Capture the decode steps, of padding only, before the first request needs them."""
        if self.graphs is None:
            return
        for rows in decode_buckets(self.staging.max_rows - 1):
            bucket = Bucket(rows, rows)
            batch = self.staging.lay_out((), {}, bucket)
            self.stream.call(partial(self._replay, batch, bucket))

    def run(self, plan: StepPlan, requests: Mapping[int, Request]) -> StepResult:
        """One forward pass over the plan's chunks. Results are on the host when it returns."""
        return self.land(self.launch(plan, requests))

    def launch(self, plan: StepPlan, requests: Mapping[int, Request]) -> Launched:
        """Give the device one forward pass over the plan's chunks."""
        bucket = None
        if self.graphs is not None:
            bucket = bucket_of(plan.num_tokens, len(plan.chunks), self.staging.max_rows - 1)
        batch = self.staging.lay_out(plan.chunks, requests, bucket)
        launched = Launched([chunk.end == requests[chunk.request].num_tokens for chunk in plan.chunks])
        rows = [requests[chunk.request] for chunk in plan.chunks]
        launched.landing = self.stream.launch(lambda: self._work(launched, batch, bucket, rows))
        launched.t_launched = time.perf_counter()
        return launched

    def land(self, launched: Launched) -> StepResult:
        """Wait for a step's results."""
        assert launched.landing is not None
        landed, wanted, now = launched.landing.wait(), launched.wanted, time.perf_counter()
        token_ids = [token if asked else -1 for token, asked in zip(landed.ids, wanted, strict=True)]
        logprobs = {row: entry for row, entry in launched.logprobs.items() if wanted[row]}
        times = (launched.t_launched, now, landed.began, landed.ended)
        return StepResult(token_ids, logprobs, *times, launched.replayed)

    @torch.inference_mode()
    def _work(
        self,
        launched: Launched,
        batch: Batch,
        bucket: Bucket | None,
        rows: list[Request],
    ) -> torch.Tensor:
        """The device's part of a step: ids [chunks], which stay on the device as well."""
        if bucket is None:
            self.staging.send(batch)
            logits = self.model.logits(self._forward(batch))
            ids, launched.logprobs = sample(logits, batch, rows)
            self._sampled[: len(ids)] = ids
            return ids
        launched.replayed = self._replay(batch, bucket)
        ids = self._sampled[: len(rows)]
        special = [row for row, request in enumerate(rows) if request.params.needs_logits]
        if special:
            logits = self.model.logits(self._hidden[special])
            some, logprobs = sample(logits, batch, [rows[row] for row in special], special)
            ids[special] = some
            launched.logprobs = {special[at]: entry for at, entry in logprobs.items()}
        return ids

    @torch.inference_mode()
    def _replay(self, batch: Batch, bucket: Bucket) -> int:
        assert self.graphs is not None
        self.staging.send(batch)
        return self.graphs.run(bucket, lambda: self._step(batch))

    def _step(self, batch: Batch) -> None:
        """What a graph holds: a whole step up to its tokens, from and to tensors that stay where they are."""
        hidden = self._forward(batch)
        self._hidden[: len(hidden)] = hidden
        out = self._sampled[: len(hidden)]
        choose(self.model.logits(hidden), batch.temperature, batch.noise_key, batch.kv_lens, out)

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, hidden] of the rows whose logits are wanted."""
        if self.staging.ahead:
            expected = self._sampled.index_select(0, (-1 - batch.ids).clamp_(min=0))
            batch.ids.copy_(torch.where(batch.ids < 0, expected, batch.ids))
        hidden: torch.Tensor = self.model(batch, self.attention)  # [T, hidden]
        return hidden[batch.rows] if batch.num_tokens > batch.num_rows else hidden
