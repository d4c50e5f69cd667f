"""Causal attention over a step's own tokens, scores written out in full."""

import math

import torch
from torch import Tensor

from stepengine.core.batch import Batch
from stepengine.core.kv_pool import KVPool
from stepengine.model.config import ModelConfig


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last Q of L positions: q [Q, Hq, D], k and v [Hk, L, D] -> [Q, Hq, D].

    Query head h reads KV head h // (Hq / Hk) (grouped-query attention, Ainslie et al. 2023). The
    scores [Hk, G x Q, L] are materialised: matmul, mask, softmax, matmul (Vaswani et al. 2017).
    """
    num_q, num_heads, head_dim = q.shape
    num_kv_heads, length, _ = k.shape
    group = num_heads // num_kv_heads
    q = q.view(num_q, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    scores = (q @ k.transpose(1, 2)).mul_(1 / math.sqrt(head_dim))  # [Hk, G * Q, L]
    if num_q > 1:
        hidden = torch.ones(num_q, length, dtype=torch.bool, device=q.device).triu_(length - num_q + 1)
        scores.view(num_kv_heads, group, num_q, length).masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    out = (weights @ v).view(num_kv_heads, group, num_q, head_dim)
    return out.permute(2, 0, 1, 3).reshape(num_q, num_heads, head_dim)


class RecomputedAttention:
    """Stores nothing: every chunk must hold all tokens of its request."""

    capturable = False

    def __init__(self, config: ModelConfig | None = None, pool: KVPool | None = None) -> None:
        """Needs neither: the shapes come with the tensors, and nothing is stored."""

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D], request by request."""
        chunks = zip(q.split(batch.lengths), k.split(batch.lengths), v.split(batch.lengths), strict=True)
        return torch.cat([causal_attention(q, k.transpose(0, 1), v.transpose(0, 1)) for q, k, v in chunks])
