"""The decoder's arithmetic beside its matrix products, as pure functions on tensors.

Statistics and norms are computed in fp32 and rounded to the activations' dtype, as the models were trained.
On a GPU each function is one Triton kernel of `kernels`, which keeps fp32 to the end and rounds once.
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from stepengine.model.config import ModelConfig, RopeConfig


def _kernels() -> ModuleType:
    from stepengine.model import kernels  # needs Triton, which is not everywhere

    return kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of x [..., N] to unit root mean square, then by weight [N] (Zhang & Sennrich 2019)."""
    if x.is_cuda:
        return _kernels().rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to residual [T, N], normalise the sum: (normed, the sum). The sum overwrites `residual`."""
    if x.is_cuda:
        return _kernels().add_rms_norm(x, residual, weight, eps)
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair, fp32 [head_dim / 2] (RoFormer, section 3.4).

    "linear" divides all by `factor`; "llama3" divides slow ones (wavelength over the original context
    / low_freq_factor), keeps fast ones and interpolates between (Llama 3.1's scaling).
    """
    freq = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.type == "linear":
        return freq / rope.factor
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings / (2 * math.pi / freq)  # in the original context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / rope.factor
    return freq


def rope_tables(config: ModelConfig, max_len: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position below `max_len`, fp32 [max_len, head_dim].

    Both halves of a row hold the same angles; the first half of `sin` is negated, so that a rotation is
    x * cos + swap_halves(x) * sin.
    """
    angles = torch.arange(max_len, dtype=torch.float32).outer(inverse_frequencies(config.rope, config.head_dim))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(device), torch.cat((-sin, sin), dim=-1).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by the rows cos, sin [T, D] of `rope_tables`, taken at the tokens' positions."""
    if x.is_cuda:
        return _kernels().rotate(x, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, D]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [T, Hq, D] and k [T, Hk, D] by the rows cos, sin [T, D] of `rope_tables`."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def norm_rotate(
    qk: Tensor, num_queries: int, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """(q, k) of qk [T, Hq + Hk, D]: heads normalised by weights [D] (QK norm, as Qwen3 has it), then rotated."""
    if qk.is_cuda:
        return _kernels().norm_rotate(qk, num_queries, q_weight, k_weight, eps, cos, sin)
    q, k = qk.tensor_split((num_queries,), dim=1)
    return apply_rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T, 2 * N], whose halves they are: [T, N] (SwiGLU, Shazeer 2020)."""
    if gate_up.is_cuda:
        return _kernels().silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
