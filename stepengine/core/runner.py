"""Runs a plan on the device: stage the batch, one forward pass, sample."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from stepengine.core.batch import Staging
from stepengine.core.kv_pool import KVPool
from stepengine.core.plan import StepPlan
from stepengine.core.request import Logprob, Request
from stepengine.core.sampler import sample
from stepengine.core.seams import AttentionBackend
from stepengine.model.decoder import Decoder


class StepResult(NamedTuple):
    """token_ids: one per chunk, -1 where the chunk does not reach the request's last token. logprobs:
    {row: {token id: Logprob}} for rows that asked."""

    token_ids: list[int]
    logprobs: dict[int, dict[int, Logprob]]


class Runner:
    """Owns what the device needs: model, attention backend, staging buffer, K/V storage."""

    def __init__(self, model: Decoder, attention: AttentionBackend, staging: Staging, pool: KVPool) -> None:
        self.model = model
        self.attention = attention
        self.staging = staging
        self.pool = pool

    @torch.inference_mode()
    def move(self, plan: StepPlan) -> None:
        """Carry out the plan's swaps and copies: the bookkeeping counts on them as soon as it has planned them."""
        self.pool.move(plan)

    @torch.inference_mode()
    def run(self, plan: StepPlan, requests: Mapping[int, Request]) -> StepResult:
        """One forward pass over the plan's chunks. Results are on the host when it returns."""
        batch = self.staging.fill(plan.chunks, requests)
        hidden = self.model(batch, self.attention)  # [T, hidden]
        if batch.num_tokens > batch.num_rows:
            hidden = hidden[batch.rows]  # [B, hidden]
        ids, logprobs = sample(self.model.logits(hidden), batch, plan.chunks, requests)
        wanted = [chunk.end == requests[chunk.request].num_tokens for chunk in plan.chunks]
        token_ids = [token if asked else -1 for token, asked in zip(ids.tolist(), wanted, strict=True)]
        return StepResult(token_ids, {row: entry for row, entry in logprobs.items() if wanted[row]})
