"""Flash attention over paged K/V in Triton: `flash_prefill` for chunks, `paged_decode` for one token per sequence.

Both never write a score to memory: they look at K and V tile by tile, and keep of what they have seen the
largest score, the sum of the weights and the weighted sum of the values (FlashAttention, Dao et al. 2022;
online softmax, Milakov & Gimelshein 2018). Each has its PyTorch twin. Needs Triton, like stage 2's kernels,
whose letters for sizes hold here too:

    T  tokens of a step                 Hq, Hk  query heads, K/V heads; a group is the G = Hq / Hk query
    B  sequences                                heads that read the same K/V head
    M  entries of a block table         D       head_dim
    S  splits of a sequence
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepengine.stage2_paged.kernels import check_rows, check_storage, paged_attention_reference

# Decode: K of one tile. K and V of two tiles are on their way while one is used: 64 KiB a program.
_TILE_BYTES = 16384
_MIN_TILE, _MAX_TILE = 16, 128  # tokens; tl.dot takes no fewer than 16
_MIN_ROWS = 16  # tensor cores multiply 16 rows at a time: a smaller group is padded to that
_PROGRAMS_PER_SM = 3  # as many as fit into 228 KiB of shared memory
_MIN_SPLIT = 128  # tokens: below that, a split costs more than it brings
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MAX_SPLITS = _SPLITS[-1]  # what the combination holds in registers at once
_SEARCH = 256  # chunks that prefill looks at together to find its own
_LOG2_E = 1.4426950408889634  # exp(x) is exp2(x x log2(e)), and the GPU computes powers of two


@triton.jit
def _update(queries, keys, values, visible, top, total, mixed, scale_log2, MASKED: tl.constexpr):
    # Online softmax, one tile further. For each row of `queries` [R, D]: `top` [R] is the largest score so far in
    # units of log2, `total` [R] the sum of exp2(score - top), `mixed` [R, D] the values weighted by the same; all
    # fp32. Every row must have seen a key after its first tile, or its top is -inf and -inf - -inf is NaN.
    # "ieee": without it a GPU rounds fp32 inputs of tl.dot to TF32's ten bits.
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # [R, keys]
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    # The scale is applied after the maximum, where it costs one multiplication a row, and together with the
    # subtraction, where a fused multiply-add makes it free.
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    shrink = tl.exp2(top - new_top)  # what was summed before was relative to the old top
    total = total * shrink + tl.sum(weights, axis=1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    return new_top, total, mixed


@triton.jit
def _key_rows(table, position, within, kv_head, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    # Which row of D elements of the storage holds the key at `position` [keys]; its value is NUM_KV_HEADS x
    # BLOCK_SIZE rows further on. Each token looks its own block up, so a tile may begin and end inside a block.
    # 64-bit: a row's offset may exceed 2**31 elements.
    block = tl.load(table + position // BLOCK_SIZE, mask=within, other=0).to(tl.int64)
    return (block * 2 * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def _flash_prefill_kernel(
    q,  # [T, Hq, D], tokens q_stride elements apart
    k,  # [T, Hk, D], tokens k_stride elements apart
    v,  # [T, Hk, D], tokens v_stride elements apart
    storage,  # [N + 1, 2, Hk, BLOCK_SIZE, D]
    block_table,  # [B, M], rows table_stride entries apart
    cu_q,  # [B + 1]
    kv_lens,  # [B]
    out,  # [T, Hq, D], tokens out_stride elements apart
    scale_log2,
    num_seqs,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # queries x heads of one tile
    KEYS: tl.constexpr,  # keys of one tile
    DIM: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    SEARCH: tl.constexpr,
):
    # One program: TOKENS queries of one chunk, times the heads of one group, against all keys they may see.
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)

    # Which chunk? Chunk b begins at tile cu_q[b] // TOKENS + b: that leaves each chunk room for its last, partly
    # filled tile, and needs no list of tiles made on the host. The last tiles of a chunk see the most keys: they
    # start first, and the short ones fill the gaps at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    begun = 0  # chunks that begin at or before this tile
    for at in range(0, num_seqs, SEARCH):
        index = at + tl.arange(0, SEARCH)
        begins = tl.load(cu_q + index, mask=index < num_seqs, other=0) // TOKENS + index
        begun += tl.sum(((index < num_seqs) & (begins <= tile)).to(tl.int32))
    sequence = (begun - 1).to(tl.int64)
    begin = tl.load(cu_q + sequence)
    length = tl.load(cu_q + sequence + 1) - begin
    first = (tile - begin // TOKENS - sequence.to(tl.int32)) * TOKENS  # first query of the tile, counted in the chunk
    if first >= length:
        return
    start = tl.load(kv_lens + sequence) - length  # keys that were there before the chunk

    # Rows of the tile: token by token, the heads of the group of each. Offsets within a tile fit into 32 bits; what
    # lies before it may not, and is one 64-bit number for all.
    row = tl.arange(0, ROWS)
    token = row // GROUP
    in_group = (row % GROUP * HEAD_DIM)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    exists = ((row < TOKENS * GROUP) & (first + token < length))[:, None] & (dim < HEAD_DIM)  # [ROWS, DIM]
    tile_begin = (begin + first).to(tl.int64)
    tile_q = q + tile_begin * q_stride + kv_head * GROUP * HEAD_DIM
    queries = tl.load(tile_q + token[:, None] * q_stride + in_group + dim, mask=exists, other=0.0)  # [ROWS, DIM]

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    key = tl.arange(0, KEYS)

    # 1. Keys from before the chunk, through the block table. Every query sees them all.
    table = block_table + sequence * table_stride
    for at in range(0, start, KEYS):
        within = at + key < start
        key_row = _key_rows(table, at + key, within, kv_head, NUM_KV_HEADS, BLOCK_SIZE)
        readable = within[:, None] & (dim < HEAD_DIM)  # what lies beyond may be NaN, which a weight of 0 keeps
        source = storage + key_row[:, None] * HEAD_DIM + dim
        keys = tl.load(source, mask=readable, other=0.0)
        values = tl.load(source + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=readable, other=0.0)
        top, total, mixed = _update(queries, keys, values, within[None, :], top, total, mixed, scale_log2, True)

    # 2. The chunk's own keys, read from k and v, where they lie in order: no table, and tiles as large as you like.
    # First the tiles that all queries see, then those that the diagonal crosses.
    own_k = k + begin.to(tl.int64) * k_stride + kv_head * HEAD_DIM
    own_v = v + begin.to(tl.int64) * v_stride + kv_head * HEAD_DIM
    k_offset = key[:, None] * k_stride + dim
    v_offset = key[:, None] * v_stride + dim
    diagonal = (first + 1) // KEYS * KEYS
    for _at in range(0, diagonal, KEYS):
        keys = tl.load(own_k + k_offset, mask=dim < HEAD_DIM, other=0.0)
        values = tl.load(own_v + v_offset, mask=dim < HEAD_DIM, other=0.0)
        top, total, mixed = _update(queries, keys, values, None, top, total, mixed, scale_log2, False)
        own_k += KEYS * k_stride
        own_v += KEYS * v_stride
    for at in range(diagonal, tl.minimum(first + TOKENS, length), KEYS):
        readable = (at + key < length)[:, None] & (dim < HEAD_DIM)
        keys = tl.load(own_k + k_offset, mask=readable, other=0.0)
        values = tl.load(own_v + v_offset, mask=readable, other=0.0)
        visible = first + token[:, None] >= at + key[None, :]  # causal
        top, total, mixed = _update(queries, keys, values, visible, top, total, mixed, scale_log2, True)
        own_k += KEYS * k_stride
        own_v += KEYS * v_stride

    result = mixed / total[:, None]
    tile_out = out + tile_begin * out_stride + kv_head * GROUP * HEAD_DIM
    target = tile_out + token[:, None] * out_stride + in_group + dim
    tl.store(target, result.to(out.dtype.element_ty), mask=exists)


class Tiles(NamedTuple):
    """How `flash_prefill` cuts its work: rows (queries x heads of a group) and keys of a tile, warps, stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int  # tiles of keys in flight or in use


def prefill_tiles(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """The tiles of `flash_prefill` on a GPU of this compute capability: as large as registers and shared memory allow.

    The larger a tile, the more often each key fetched is used. A thread's registers (at most 255) hold its part of
    the scores, rows x keys, and of the result, rows x head_dim; shared memory holds the queries and, for each stage,
    keys and values. All choices compile without spilling a register; they are not tuned beyond that.
    """
    small, medium = head_dim <= 64, head_dim <= 128
    if dtype == torch.float32:  # no tensor cores: a thread multiplies, and holds, much more of a tile
        return Tiles(32, 32, 8, 2) if small else Tiles(32, 16, 8, 2) if medium else Tiles(16, 32, 8, 2)
    if capability < (8, 0):  # Triton uses no tensor cores here either
        return Tiles(32, 32, 4, 1) if small else Tiles(16, 32, 8, 1) if medium else Tiles(16, 16, 8, 1)
    if capability[0] == 9:  # 227 KiB; wgmma takes 64 rows and four warps at a time, here twice
        return Tiles(128, 128, 8, 3) if medium else Tiles(64, 32, 8, 3)
    if capability[0] == 10:  # 227 KiB, and products in a memory of their own
        return Tiles(128, 128, 8, 3) if small else Tiles(128, 64, 8, 4) if medium else Tiles(128, 32, 8, 3)
    if capability == (8, 0):  # 163 KiB
        return Tiles(128, 64, 4, 3) if small else Tiles(128, 64, 8, 3) if medium else Tiles(64, 64, 8, 2)
    # 99 KiB: sm_86, sm_89, sm_120, and whatever is not known here
    return Tiles(128, 64, 8, 3) if small else Tiles(128, 32, 8, 3) if medium else Tiles(64, 32, 8, 2)


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU that holds x; (7, 5), with the smallest tiles, where Triton interprets."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (7, 5)


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    storage: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    max_q: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of a ragged batch of chunks over what came before them and over themselves: [T, Hq, D].

    Sequence b's chunk is q[cu_q[b] : cu_q[b + 1]], the last tokens of the kv_lens[b] that it has so far.
    q [T, Hq, D] and k, v [T, Hk, D] of storage's dtype, and `out` where given: tokens any distance apart;
    storage [N + 1, 2, Hk, block_size, D]; block_table int32 [B, M], read for the tokens before a chunk
    only; cu_q int32 [B + 1], kv_lens int32 [B]; max_q: at least the longest chunk; `scale` > 0 multiplies
    the scores. Rows of `out` beyond cu_q[B] are left alone. The launch depends on shapes and max_q only.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_seqs = storage.shape[2], kv_lens.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    check_rows(q, k, v, out)
    check_storage(storage, q)
    assert k.dtype == v.dtype == q.dtype, (q.dtype, k.dtype, v.dtype)
    group = num_heads // num_kv_heads
    tiles = prefill_tiles(head_dim, q.dtype, capability(q))
    # Where no chunk fills more than half a tile, half a tile will do; at least one token's group must fit.
    half = max(_MIN_ROWS, tiles.rows // 2)
    rows = max(half if max_q * group <= half else tiles.rows, triton.next_power_of_2(group))
    tokens = rows // group
    _flash_prefill_kernel[(num_kv_heads, num_tokens // tokens + num_seqs)](
        q,
        k,
        v,
        storage,
        block_table,
        cu_q,
        kv_lens,
        out,
        scale * _LOG2_E,
        num_seqs,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        block_table.stride(0),
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=storage.shape[3],
        ROWS=rows,
        KEYS=tiles.keys,
        DIM=triton.next_power_of_2(head_dim),
        SEARCH=_SEARCH,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def flash_prefill_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    storage: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    max_q: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """`flash_prefill` in plain PyTorch, on any device: chunk by chunk, all scores written out, in fp32."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    block_size, group = storage.shape[3], q.shape[1] // k.shape[1]
    bounds = cu_q.tolist()
    for row, (begin, end, kv_len) in enumerate(zip(bounds, bounds[1:], kv_lens.tolist(), strict=False)):
        start = max(kv_len - (end - begin), 0)
        position = torch.arange(start, device=q.device)
        block = block_table[row].long()[position // block_size]
        before = storage[block, :, :, position % block_size]  # [start, 2, Hk, D]
        keys = torch.cat((before[:, 0], k[begin:end])).float().repeat_interleave(group, 1)  # [L, Hq, D]
        values = torch.cat((before[:, 1], v[begin:end])).float().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(start + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


@triton.jit
def _paged_decode_kernel(
    q,  # [B, Hq, D], sequences q_stride elements apart
    storage,  # [N + 1, 2, Hk, BLOCK_SIZE, D]
    block_table,  # [B, M], rows table_stride entries apart
    kv_lens,  # [B]
    out,  # [B, Hq, D], sequences out_stride elements apart
    parts,  # fp32 [B, Hq, S, D]: what each split found; not touched where S is 1
    levels,  # fp32 [B, Hq, S]: log2 of the sum of exp2(score) over the split
    scale_log2,
    q_stride,
    table_stride,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP and HEAD_DIM, rounded up to powers of two
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # One program: all query heads of one KV head of one sequence, over one split of its keys.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    kv_len = tl.load(kv_lens + sequence)
    share = _share(kv_len, TILE, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, kv_len)
    if SPLITS > 1:
        if begin >= end:
            return  # nothing left for this split: the combination does not look at it

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)[None, :]
    exists = (row < GROUP)[:, None] & (dim < HEAD_DIM)  # [ROWS, DIM]
    head = kv_head * GROUP + row
    in_sequence = (head * HEAD_DIM)[:, None] + dim
    queries = tl.load(q + sequence * q_stride + in_sequence, mask=exists, other=0.0)  # [ROWS, DIM]
    table = block_table + sequence * table_stride

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    for at in range(begin, end, TILE):
        position = at + tl.arange(0, TILE)
        within = position < end
        key_row = _key_rows(table, position, within, kv_head, NUM_KV_HEADS, BLOCK_SIZE)
        readable = within[:, None] & (dim < HEAD_DIM)  # what lies beyond costs no traffic
        source = storage + key_row[:, None] * HEAD_DIM + dim
        keys = tl.load(source, mask=readable, other=0.0)
        values = tl.load(source + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=readable, other=0.0)
        top, total, mixed = _update(queries, keys, values, within[None, :], top, total, mixed, scale_log2, True)

    # A row without K/V (padding) has run no tile: zeros instead of 0 / 0.
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        tl.store(out + sequence * out_stride + in_sequence, result.to(out.dtype.element_ty), mask=exists)
    else:
        part = (sequence * NUM_KV_HEADS * GROUP + head) * SPLITS + split  # [ROWS]
        tl.store(parts + part[:, None] * HEAD_DIM + dim, result, mask=exists)
        tl.store(levels + part, top + tl.log2(total), mask=row < GROUP)


@triton.jit
def _share(kv_len, TILE: tl.constexpr, SPLITS: tl.constexpr):
    # Keys of one split: whole tiles, the same for all splits but the last; later ones may be left with none.
    return tl.cdiv(tl.cdiv(kv_len, TILE), SPLITS) * TILE


@triton.jit
def _combine_kernel(
    parts,  # fp32 [B, Hq, S, D]
    levels,  # fp32 [B, Hq, S]
    kv_lens,  # [B]
    out,  # [B, Hq, D], sequences out_stride elements apart
    out_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # SPLITS, rounded up to a power of two
):
    # One program: one head of one sequence. The splits' results are averaged as values are: weighted by a softmax,
    # of the splits' levels.
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_len = tl.load(kv_lens + sequence)
    split = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    used = split * _share(kv_len, TILE, SPLITS) < kv_len  # [ROWS]; none where kv_len is 0
    used = used & (split < SPLITS)
    part = (sequence * NUM_HEADS + head) * SPLITS + split
    level = tl.load(levels + part, mask=used, other=float("-inf"))
    top = tl.maximum(tl.max(level, axis=0), -1e30)  # without any split: -inf - -inf would be NaN
    weights = tl.exp2(level - top)
    readable = used[:, None] & (dim < HEAD_DIM)[None, :]
    found = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=readable, other=0.0)  # [ROWS, DIM]
    total = tl.sum(weights, axis=0)
    result = tl.sum(weights[:, None] * found, axis=0) / tl.where(total > 0, total, 1.0)
    target = out + sequence * out_stride + head * HEAD_DIM + dim
    tl.store(target, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def decode_splits(batch: int, num_kv_heads: int, max_kv_len: int, num_sms: int) -> int:
    """How many programs share a sequence in `paged_decode` (Flash-Decoding, Dao et al. 2023), from the bucket alone.

    `batch` sequences of at most `max_kv_len` tokens on a GPU of `num_sms` multiprocessors. Programs run in waves of
    three for each multiprocessor, and where the last wave is half empty, half the GPU waits for it: the answer is the
    fewest splits whose waves are nearly as full as they can be, each of at least 128 tokens of the longest sequence.
    Few numbers are ever answered, since a kernel is compiled for each.
    """
    at_once = num_sms * _PROGRAMS_PER_SM
    most = max(1, min(_MAX_SPLITS, max_kv_len // _MIN_SPLIT))
    filled = {}
    for splits in (number for number in _SPLITS if number <= most):
        waves = batch * num_kv_heads * splits / at_once
        filled[splits] = waves / math.ceil(waves)
    return next(splits for splits, share in filled.items() if share >= 0.8 * max(filled.values()))


def decode_workspace(batch: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Numbers of float32 that `paged_decode` needs as its workspace; 0 without splits."""
    return batch * num_heads * num_splits * (head_dim + 1) if num_splits > 1 else 0


def paged_decode(
    q: Tensor,
    storage: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    num_splits: int,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query token per sequence over the K/V that its block table names: [B, Hq, D].

    q [B, Hq, D] of storage's dtype, and `out` where given: sequences any distance apart; storage
    [N + 1, 2, Hk, block_size, D]; block_table int32 [B, M], read up to kv_lens int32 [B] tokens only;
    `scale` > 0 multiplies the scores. Zeros where kv_lens is 0. Each sequence's keys are shared among
    `num_splits` programs per KV head, as `decode_splits` advises; what they find goes to `workspace`, float32,
    contiguous, of at least `decode_workspace(B, Hq, D, num_splits)` numbers, and is combined by a second kernel.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = storage.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    check_rows(q, out)
    check_storage(storage, q)
    needed = decode_workspace(num_seqs, num_heads, head_dim, num_splits)
    workspace = torch.empty(needed, dtype=torch.float32, device=q.device) if workspace is None else workspace
    assert workspace.is_contiguous() and workspace.dtype == torch.float32 and workspace.numel() >= needed
    parts = workspace.view(-1)
    levels = parts[num_seqs * num_heads * num_splits * head_dim :] if needed else parts
    group, dim = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    tile = min(_MAX_TILE, max(_MIN_TILE, _TILE_BYTES // (dim * q.element_size())))
    _paged_decode_kernel[(num_seqs, num_kv_heads, num_splits)](
        q,
        storage,
        block_table,
        kv_lens,
        out,
        parts,
        levels,
        scale * _LOG2_E,
        q.stride(0),
        block_table.stride(0),
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=storage.shape[3],
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        DIM=dim,
        TILE=tile,
        SPLITS=num_splits,
        num_warps=8 if q.dtype == torch.float32 else 4,  # without tensor cores a thread holds more of a tile
        num_stages=5,  # block ids are fetched two tiles ahead of K and V, these two tiles ahead of their use
    )
    if num_splits > 1:
        rows = triton.next_power_of_2(num_splits)
        _combine_kernel[(num_seqs, num_heads)](
            parts,
            levels,
            kv_lens,
            out,
            out.stride(0),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM=dim,
            TILE=tile,
            SPLITS=num_splits,
            ROWS=rows,
            num_warps=min(8, max(1, rows * dim // 1024)),  # a thread holds 32 numbers, or 64 where there are many
        )
    return out


def paged_decode_reference(
    q: Tensor,
    storage: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    num_splits: int,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_decode` in plain PyTorch, on any device: one pass, like stage 2's; splits change no result."""
    return paged_attention_reference(q, storage, block_table, kv_lens, scale, out)
