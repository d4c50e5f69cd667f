"""Attention with its scores written out, in Triton: what flash attention is compared with. Needs Triton.

Three kernels as a framework without fusion would launch them, each of which reads what the one before has
written: scores, softmax, weighted sum. Like a matrix product that knows nothing of masks, they compute every
score, and the softmax drops those of the future.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scores_kernel(q, k, scores, scale, num_q, num_k, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    # One program: a tile of queries against all keys.
    row, column, dim = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    queries = tl.load(q + row[:, None] * HEAD_DIM + dim, mask=(row < num_q)[:, None], other=0.0)
    for at in range(0, num_k, TILE):
        key = at + column
        keys = tl.load(k + key[:, None] * HEAD_DIM + dim, mask=(key < num_k)[:, None], other=0.0)
        found = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        inside = (row < num_q)[:, None] & (key < num_k)[None, :]
        tl.store(scores + row[:, None] * num_k + key[None, :], found, mask=inside)


@triton.jit
def _softmax_kernel(scores, weights, num_q, num_k, WIDTH: tl.constexpr):
    # One program: one row, whole.
    row, key = tl.program_id(0), tl.arange(0, WIDTH)
    found = tl.load(scores + row * num_k + key, mask=key < num_k, other=float("-inf"))
    found = tl.where(key <= row + num_k - num_q, found, float("-inf"))  # causal
    powers = tl.exp(found - tl.max(found, axis=0))
    tl.store(weights + row * num_k + key, powers / tl.sum(powers, axis=0), mask=key < num_k)


@triton.jit
def _mix_kernel(weights, v, out, num_q, num_k, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    # One program: a tile of queries' weights times all values.
    row, column, dim = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    mixed = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for at in range(0, num_k, TILE):
        key = at + column
        inside = (row < num_q)[:, None] & (key < num_k)[None, :]
        share = tl.load(weights + row[:, None] * num_k + key[None, :], mask=inside, other=0.0)
        values = tl.load(v + key[:, None] * HEAD_DIM + dim, mask=(key < num_k)[:, None], other=0.0)
        mixed = tl.dot(share, values, mixed, input_precision="ieee")
    tl.store(out + row[:, None] * HEAD_DIM + dim, mixed, mask=(row < num_q)[:, None])


def materialised(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int, scores: Tensor, weights: Tensor, out: Tensor
) -> Tensor:
    """Causal attention of the last Q of L positions: q [Q, D], k and v [L, D] -> out [Q, D], all contiguous fp32.

    `scores` and `weights` [Q, L] are where the three kernels leave what the next one reads; D and `tile` are
    powers of two of at least 16.
    """
    (num_q, head_dim), num_k = q.shape, k.shape[0]
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (q, k, v, scores, weights, out))
    tiles = triton.cdiv(num_q, tile)
    _scores_kernel[(tiles,)](q, k, scores, scale, num_q, num_k, HEAD_DIM=head_dim, TILE=tile)
    _softmax_kernel[(num_q,)](scores, weights, num_q, num_k, WIDTH=triton.next_power_of_2(num_k))
    _mix_kernel[(tiles,)](weights, v, out, num_q, num_k, HEAD_DIM=head_dim, TILE=tile)
    return out
