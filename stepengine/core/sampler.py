"""From logits to tokens, every row with its own settings."""

from collections.abc import Sequence

import torch

from stepengine.core.batch import Batch
from stepengine.core.request import Logprob, Request, SamplingParams

_WRAP = 0xFFFFFFFF


def noise_key(seed: int, sample: int) -> int:
    """A signed 32-bit key for sample `sample` of `seed` (host integers of any size)."""
    state = 0x9E3779B9
    for word in (seed & _WRAP, (seed >> 32) & _WRAP, sample):
        state = _mix(((state ^ word) * 0x85EBCA6B + 1) & _WRAP)
    return state - (1 << 32) if state >= 1 << 31 else state


def _mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WRAP
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WRAP
    return x ^ (x >> 16)


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`_mix` on int32 tensors: products wrap, and the mask makes the arithmetic shift a logical one."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise [R, vocab] from a counter-based hash of (key, position, token), never a generator.

    So a token's noise does not depend on the batch, on recomputation or on the order of steps. keys,
    positions: int32 [R]. The hash is Wellons's "lowbias32" (nullprogram.com/blog/2018/07/31).
    """
    row = _mix_tensor(keys ^ (_mix_tensor(positions + 0x3C6EF372)))  # [R]
    token = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) * (0x9E3779B9 - (1 << 32))
    bits = _mix_tensor(_mix_tensor(token[None, :] + row[:, None]) ^ row[:, None])
    uniform = ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)  # in (0, 1): 24 bits + 0.5 could round to 1
    return uniform.log_().neg_().log_().neg_()


def penalise(logits: torch.Tensor, rows: Sequence[Request]) -> torch.Tensor:
    """Apply history to raw logits [R, vocab]: penalties, and no stop token before `min_tokens`.

    Repetition divides positive and multiplies negative logits of every token of prompt and output
    (Keskar et al. 2019); presence and frequency subtract for tokens of the output alone. Rows without
    such settings are untouched; the result is a copy if anything changes.
    """
    changed = False
    for row, request in enumerate(rows):
        params = request.params
        hold = request.stop_ids if request.num_outputs < params.min_tokens else frozenset()
        repeats = params.repetition_penalty != 1.0
        counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        if not (hold or repeats or counts):
            continue
        if not changed:
            logits, changed = logits.clone(), True
        line = logits[row]
        if repeats:
            seen = torch.tensor(sorted(set(request.token_ids)), device=logits.device)
            value = line[seen]
            line[seen] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
        if counts and request.num_outputs:
            used, times = torch.tensor(request.output_ids, device=logits.device).unique(return_counts=True)
            line[used] -= params.presence_penalty + params.frequency_penalty * times
        if hold:
            line[sorted(hold)] = -torch.inf
    return logits


def restrict(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """Set to -inf, in place, what min-p, top-k and top-p exclude; logits [R, vocab] are already tempered.

    In vLLM's order: min-p, top-k, then top-p on what is left (the smallest set of most likely tokens
    that reaches top_p). Only rows whose `params` ask are sorted. min_p, top_k, top_p: [R].
    """
    floored = [row for row, param in enumerate(params) if param.min_p > 0]
    if floored:
        line = logits[floored]
        floor = line.max(-1, keepdim=True).values + min_p[floored].log()[:, None]
        logits[floored] = line.masked_fill(line < floor, -torch.inf)
    cut = [row for row, param in enumerate(params) if param.top_k > 0 or param.top_p < 1]
    if cut:
        line, order = logits[cut].sort(-1, descending=True)
        k, p = top_k[cut][:, None], top_p[cut][:, None]
        rank = torch.arange(line.shape[-1], device=line.device)
        line = line.masked_fill((k > 0) & (rank >= k), -torch.inf)
        share = line.softmax(-1)
        likelier = share.cumsum(-1) - share  # mass of the tokens before this one
        line = line.masked_fill((p < 1) & (likelier >= p), -torch.inf)
        logits[cut] = torch.empty_like(line).scatter_(-1, order, line)
    return logits


def temper(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logits [R, vocab] over temperature [R] > 0, up to a constant per row: at most 0, so that none overflows."""
    line = logits - logits.max(-1, keepdim=True).values
    return line / temperature.clamp_min(1e-30)[:, None]


def choose(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token per row of logits [R, vocab]: int64 [R], or written to `out`. Needs nothing from the host.

    The argmax where temperature [R] is 0; elsewhere the argmax of tempered logits plus `gumbel` noise of
    keys and positions [R], which draws from the softmax (Maddison, Tarlow, Minka 2014).
    """
    if logits.is_cuda:
        from stepengine.model.kernels import sample_rows  # one pass over the logits; noise is never written

        return sample_rows(logits, temperature, keys, positions, out)
    logits = logits.float()
    ids = logits.max(-1).indices  # on a CPU twice as fast as argmax
    drawn = temperature.nonzero()[:, 0]
    if drawn.numel():
        noise = gumbel(keys[drawn], positions[drawn], logits.shape[-1])
        ids[drawn] = (temper(logits[drawn], temperature[drawn]) + noise).argmax(-1)
    return ids if out is None else out.copy_(ids)


def steer(logits: torch.Tensor, batch: Batch, at: Sequence[int], requests: Sequence[Request]) -> torch.Tensor:
    """Tokens [R] of `requests`, which are rows `at` of the batch, by all their settings; logits [R, vocab]."""
    temperature = batch.temperature[at]
    adjusted = penalise(logits.float(), requests)
    drawn = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if drawn:
        tempered, of = temper(adjusted[drawn], temperature[drawn]), [at[row] for row in drawn]
        params = [requests[row].params for row in drawn]
        restrict(tempered, params, batch.min_p[of], batch.top_k[of], batch.top_p[of])
        adjusted = adjusted.index_copy(0, torch.tensor(drawn, device=logits.device), tempered)
    heat = (temperature > 0).float()  # what is tempered already is drawn at 1
    return choose(adjusted, heat, batch.noise_key[at], batch.kv_lens[at])


def sample(
    logits: torch.Tensor, batch: Batch, requests: Sequence[Request], at: Sequence[int] | None = None
) -> tuple[torch.Tensor, dict[int, dict[int, Logprob]]]:
    """One token for each of `requests`, which are rows `at` of the batch (its first ones unless given).

    logits [R, vocab] -> ids [R] and, for requests that ask, {place among them: log probabilities}.
    """
    rows = list(range(len(requests))) if at is None else list(at)
    steered = [place for place, request in enumerate(requests) if request.params.steered]
    if len(steered) < len(rows):
        of = slice(len(rows)) if at is None else rows
        ids = choose(logits, batch.temperature[of], batch.noise_key[of], batch.kv_lens[of])
    else:
        ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    if steered:
        mine = [requests[place] for place in steered]
        ids[steered] = steer(logits[steered], batch, [rows[place] for place in steered], mine)
    return ids, _logprobs(logits, ids, requests)


def _logprobs(raw: torch.Tensor, ids: torch.Tensor, rows: Sequence[Request]) -> dict[int, dict[int, Logprob]]:
    """Per row that asks: the chosen token and the most likely ones, as {token id: Logprob}."""
    found: dict[int, dict[int, Logprob]] = {}
    for row, request in enumerate(rows):
        wanted = request.params.logprobs
        if wanted is None:
            continue
        line = raw[row].float().log_softmax(-1)
        chosen = int(ids[row])
        values, tokens = line.topk(min(wanted, line.numel()))
        entry = {chosen: Logprob(float(line[chosen]), int((line > line[chosen]).sum()) + 1)}
        for rank, (value, token) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True), start=1):
            entry.setdefault(token, Logprob(value, rank))
        found[row] = entry
    return found
