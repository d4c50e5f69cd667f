"""Triton kernels for what lies between the matrix products; their twins in plain PyTorch are in `ops`.

Needs Triton: import this module where tensors are on a GPU, and only there. All of them are bound by memory:
each reads its inputs once, computes in fp32 and rounds once, to the activations' dtype.

    T  tokens of a step       H  heads, queries' before keys'       V  tokens of the vocabulary
    R  rows of logits         D  head_dim                           N  width of a row
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements of each operand that a program of 4 warps handles: 8 a thread, 16 bytes of them in bf16
_MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _rms_norm_kernel(
    x,  # [T, N], rows x_stride elements apart
    residual,  # [T, N], rows residual_stride elements apart; read and written if ADD
    weight,  # [N]
    out,  # [T, N]
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,
    WIDTH: tl.constexpr,  # N, rounded up to a power of two
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    exists = column < N
    value = tl.load(x + row * x_stride + column, mask=exists, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)  # on its way while x is summed
    if ADD:
        place = residual + row * residual_stride + column
        total = (value + tl.load(place, mask=exists, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=exists)
        value = total.to(tl.float32)  # what later layers will read, rounding included
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / N + eps)
    tl.store(out + row * N + column, (value * scale * weights).to(out.dtype.element_ty), mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of x [..., N] to unit root mean square, then by weight [N]: contiguous, of x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return _rms_norm(rows, rows, weight, eps, add=False).view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to residual [T, N], in place, and normalise the sum: (normed, residual)."""
    return _rms_norm(x, residual, weight, eps, add=True), residual


def _rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, add: bool) -> Tensor:
    num_rows, width = x.shape
    _check_rows(x, weight, residual)
    assert weight.shape == (width,) and residual.shape == x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        residual.stride(0),
        eps,
        N=width,
        WIDTH=padded,
        ADD=add,
        num_warps=min(16, max(1, padded // 256)),
    )
    return out


@triton.jit
def _weight_of(is_query, q_weight, k_weight, column, END: tl.constexpr):
    of_query = tl.load(q_weight + column, mask=column < END, other=0.0).to(tl.float32)  # [1, WIDTH]
    of_key = tl.load(k_weight + column, mask=column < END, other=0.0).to(tl.float32)
    return tl.where(is_query, of_query, of_key)  # [HEADS, WIDTH]


@triton.jit
def _rotate_kernel(
    x,  # [T, H, D], tokens x_stride elements apart
    cos,  # [T, D]
    sin,  # [T, D]
    q_weight,  # [D], of the first NUM_QUERIES heads; read if NORM
    k_weight,  # [D], of the others; read if NORM
    out,  # [T, H, D]
    x_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    WIDTH: tl.constexpr,  # HALF, rounded up to a power of two
    HEADS: tl.constexpr,  # heads of a program
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    column = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH], in either half
    exists = (head < NUM_HEADS) & (column < HALF)  # [HEADS, WIDTH]
    place = head * 2 * HALF + column
    first = tl.load(x + token * x_stride + place, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(x + token * x_stride + place + HALF, mask=exists, other=0.0).to(tl.float32)
    angle = token * 2 * HALF + column  # each half has its own cos and sin: `rope_tables` says how a row is laid out
    within = column < HALF
    cos_first = tl.load(cos + angle, mask=within, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + HALF, mask=within, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=within, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + HALF, mask=within, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + eps)[:, None]
        first *= scale * _weight_of(head < NUM_QUERIES, q_weight, k_weight, column, HALF)
        second *= scale * _weight_of(head < NUM_QUERIES, q_weight, k_weight, column + HALF, 2 * HALF)

    target = out + token * NUM_HEADS * 2 * HALF + place
    tl.store(target, (first * cos_first + second * sin_first).to(out.dtype.element_ty), mask=exists)
    tl.store(target + HALF, (second * cos_second + first * sin_second).to(out.dtype.element_ty), mask=exists)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D], tokens any distance apart, by cos, sin [T, D] of its dtype: contiguous [T, H, D]."""
    return _rotate(x, x.shape[1], cos, cos, 0.0, cos, sin, norm=False)


def norm_rotate(
    qk: Tensor, num_queries: int, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalise each head of qk [T, Hq + Hk, D], queries and keys by weights [D] of their own, then rotate.

    Tokens of qk are any distance apart; cos, sin [T, D] are of its dtype. (q, k): views of one new tensor.
    """
    assert q_weight.shape == k_weight.shape == qk.shape[2:]
    q, k = _rotate(qk, num_queries, q_weight, k_weight, eps, cos, sin, norm=True).tensor_split((num_queries,), dim=1)
    return q, k


def _rotate(
    x: Tensor, num_queries: int, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, norm: bool
) -> Tensor:
    num_tokens, num_heads, head_dim = x.shape
    _check_rows(x[:, 0], cos, sin, q_weight, k_weight)
    assert num_heads == 1 or x.stride(1) == head_dim, x.stride()  # only the distance between tokens is free
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (num_tokens, head_dim)
    assert head_dim % 2 == 0, head_dim
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(head_dim // 2)
    heads = min(triton.next_power_of_2(num_heads), max(1, _TILE // width))
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x,
        cos,
        sin,
        q_weight,
        k_weight,
        out,
        x.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_QUERIES=num_queries,
        HALF=head_dim // 2,
        WIDTH=width,
        HEADS=heads,
        NORM=norm,
        num_warps=max(1, heads * width // 256),
    )
    return out


@triton.jit
def _silu_mul_kernel(
    gate_up,  # [T, 2 x width], rows row_stride elements apart
    out,  # [T, width]
    width,
    row_stride,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = column < width
    gate = tl.load(gate_up + row * row_stride + column, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=exists)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T, 2 * N], rows any distance apart, whose halves they are: [T, N]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    _check_rows(gate_up)
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_rows, triton.cdiv(width, _TILE))](gate_up, out, width, gate_up.stride(0), TILE=_TILE)
    return out


@triton.jit
def _mix(x):
    # Wellons's "lowbias32", as in core.sampler; x is uint32, whose products wrap and whose shifts are logical.
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(key, position, token):
    # core.sampler.gumbel of one row, to the bit of the hash.
    row = _mix(key.to(tl.uint32, bitcast=True) ^ _mix(position.to(tl.uint32, bitcast=True) + 0x3C6EF372))
    bits = _mix(_mix(token.to(tl.uint32, bitcast=True) * 0x9E3779B9 + row) ^ row)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)  # in (0, 1), exact: 23 bits and a half
    return -tl.log(-tl.log(uniform))


@triton.jit
def _tempered(distance, temperature):
    # A greedy row's temperature is 0: its distances from the largest logit are compared as they are.
    return tl.div_rn(distance, tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _sample_tile_kernel(
    logits,  # [R, vocab_size], rows row_stride elements apart
    temperature,  # [R]
    keys,  # [R]
    positions,  # [R]
    tops,  # [R, tiles]: the largest logit of each tile,
    scores,  # [R, tiles]: the best score relative to it,
    tokens,  # [R, tiles]: and whose that is
    vocab_size,
    row_stride,
    TILE: tl.constexpr,
):
    # Gumbel-max: one program looks at one tile of one row's vocabulary. Scores are relative to the tile's own
    # largest logit, so that no pass for the row's comes before; the next kernel makes them comparable.
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logit = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    # Infinity and NaN count as the largest number: the difference of two infinities would be NaN, which nothing beats.
    logit = tl.where(logit < _MAX_FLOAT, logit, _MAX_FLOAT)
    top = tl.max(logit, axis=0)
    heat = tl.load(temperature + row)
    score = _tempered(logit - tl.where(top > float("-inf"), top, 0.0), heat)  # all of a tile may be excluded
    if heat > 0:
        score += _gumbel(tl.load(keys + row), tl.load(positions + row), token)
    best, index = tl.max(score, axis=0, return_indices=True)  # of equal scores the first, as torch does
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + place, top)
    tl.store(scores + place, best)
    tl.store(tokens + place, tl.program_id(1) * TILE + index)


@triton.jit
def _sample_row_kernel(
    temperature,  # [R]
    tops,  # [R, num_tiles]
    scores,  # [R, num_tiles]
    tokens,  # [R, num_tiles]
    out,  # [R]
    num_tiles,
    TILES: tl.constexpr,  # num_tiles, rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    place = row * num_tiles + tile
    top = tl.load(tops + place, mask=tile < num_tiles, other=float("-inf"))
    score = tl.load(scores + place, mask=tile < num_tiles, other=float("-inf"))
    highest = tl.max(top, axis=0)
    distance = top - tl.where(highest > float("-inf"), highest, 0.0)
    _, index = tl.max(score + _tempered(distance, tl.load(temperature + row)), axis=0, return_indices=True)
    tl.store(out + row, tl.load(tokens + row * num_tiles + index).to(out.dtype.element_ty))


def sample_rows(
    logits: Tensor, temperature: Tensor, keys: Tensor, positions: Tensor, out: Tensor | None = None
) -> Tensor:
    """One token per row of logits [R, V], rows any distance apart: int64 [R], or written to `out` (int32 or int64).

    The argmax where temperature (fp32 [R]) is 0; elsewhere the argmax of tempered logits plus the noise
    `core.sampler.gumbel` of keys and positions (int32 [R]), which draws from the softmax. Logits are read
    once, and neither probabilities nor noise are written.
    """
    num_rows, vocab_size = logits.shape
    _check_rows(logits)
    per_row = [temperature, keys, positions] + ([] if out is None else [out])
    assert all(tensor.is_contiguous() and tensor.shape == (num_rows,) for tensor in per_row)
    assert temperature.dtype == torch.float32 and keys.dtype == positions.dtype == torch.int32
    device, num_tiles = logits.device, triton.cdiv(vocab_size, _TILE)
    out = torch.empty(num_rows, dtype=torch.int64, device=device) if out is None else out
    tops = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=device)
    scores = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=device)
    tokens = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=device)
    _sample_tile_kernel[(num_rows, num_tiles)](
        logits, temperature, keys, positions, tops, scores, tokens, vocab_size, logits.stride(0), TILE=_TILE
    )
    tiles = triton.next_power_of_2(num_tiles)
    _sample_row_kernel[(num_rows,)](
        temperature, tops, scores, tokens, out, num_tiles, TILES=tiles, num_warps=min(4, max(1, tiles // 64))
    )
    return out


def _check_rows(x: Tensor, *others: Tensor) -> None:
    """A wrong layout or dtype would be read wrongly and silently: only the distance between rows is free."""
    for tensor in (x, *others):
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1, tensor.stride()
        assert tensor.dtype == x.dtype, (tensor.dtype, x.dtype)
