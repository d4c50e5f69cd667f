"""Two Triton kernels over paged K/V, each with its PyTorch twin: `store_kv` writes, `paged_attention` reads.

Needs Triton: import this module where tensors are on a GPU, and only there. The storage of a layer is
[num_blocks + 1, 2, Hk, block_size, D], contiguous: K, then V, of one head of one block is one tile.

    T  tokens of a step                 Hq, Hk  query heads, K/V heads; a group is the G = Hq / Hk query
    B  sequences, one query token each          heads that read the same K/V head
    M  entries of a block table         D       head_dim
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# K of one tile. K and V of a tile are loaded while the one before is used, so 2 x 16 KiB a program are on their way:
# enough to keep the memory busy, and small enough for four programs at a time on an H100's multiprocessor.
_TILE_BYTES = 16384
_MIN_TILE, _MAX_TILE = 16, 128  # tokens; tl.dot takes no fewer than 16
# Tensor cores multiply 16 rows at a time: a smaller group is padded to that.
_MIN_ROWS = 16


@triton.jit
def _store_kv_kernel(
    k,  # [T, Hk, D], tokens k_stride elements apart
    v,  # [T, Hk, D], tokens v_stride elements apart
    storage,  # [N + 1, 2, Hk, BLOCK_SIZE, D]
    slots,  # [T]
    k_stride,
    v_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # Hk and D, rounded up to powers of two: tl.arange takes no other length
    DIM: tl.constexpr,
):
    # One program stores one token. 64-bit: a token's or a block's offset may exceed 2**31 elements.
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    block = (slot // BLOCK_SIZE).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    dim = tl.arange(0, DIM)[None, :]  # [1, DIM]
    exists = (head < NUM_KV_HEADS) & (dim < HEAD_DIM)  # [HEADS, DIM]

    source = head * HEAD_DIM + dim  # [HEADS, DIM]
    keys = tl.load(k + token * k_stride + source, mask=exists)
    values = tl.load(v + token * v_stride + source, mask=exists)

    # Row of D elements of K of (block, head, offset in the block); V lies Hk x BLOCK_SIZE rows further on.
    key_row = (block * 2 * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE  # [HEADS, 1]
    value_row = key_row + NUM_KV_HEADS * BLOCK_SIZE
    tl.store(storage + key_row * HEAD_DIM + dim, keys, mask=exists)
    tl.store(storage + value_row * HEAD_DIM + dim, values, mask=exists)


def store_kv(k: Tensor, v: Tensor, storage: Tensor, slots: Tensor) -> None:
    """Write K and V of T tokens into a layer's storage, each at its slot (block x block_size + offset).

    k, v [T, Hk, D] of storage's dtype, tokens any distance apart; storage [N + 1, 2, Hk, block_size, D];
    slots int32 [T]. Tokens of slot 0 share one place in block 0, which no sequence reads.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    check_rows(k, v)
    check_storage(storage, k)
    heads, dim = triton.next_power_of_2(num_kv_heads), triton.next_power_of_2(head_dim)
    _store_kv_kernel[(num_tokens,)](
        k,
        v,
        storage,
        slots,
        k.stride(0),
        v.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=storage.shape[3],
        HEADS=heads,
        DIM=dim,
        num_warps=min(8, max(1, heads * dim // 512)),  # a thread moves 16 elements of K and of V, at most 8 warps
    )


def store_kv_reference(k: Tensor, v: Tensor, storage: Tensor, slots: Tensor) -> None:
    """`store_kv` in plain PyTorch, on any device."""
    block, offset = slots.long() // storage.shape[3], slots.long() % storage.shape[3]
    storage[block, 0, :, offset] = k  # the indices come first: [T, Hk, D]
    storage[block, 1, :, offset] = v


@triton.jit
def _paged_attention_kernel(
    q,  # [B, Hq, D], sequences q_stride elements apart
    storage,  # [N + 1, 2, Hk, BLOCK_SIZE, D]
    block_table,  # [B, M], rows table_stride entries apart
    kv_lens,  # [B]
    out,  # [B, Hq, D], sequences out_stride elements apart
    scale_log2,  # softmax scale x log2(e): exp(x) is exp2(x x log2(e)), and the GPU computes powers of two
    q_stride,
    table_stride,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP and HEAD_DIM, rounded up to powers of two
    DIM: tl.constexpr,
    TILE: tl.constexpr,  # tokens looked at together; has nothing to do with BLOCK_SIZE
):
    # One program: all query heads of one KV head of one sequence, so that each key and value is read once.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    kv_len = tl.load(kv_lens + sequence)
    table = block_table + sequence * table_stride

    row = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    dim = tl.arange(0, DIM)[None, :]  # [1, DIM]
    exists = (row < GROUP) & (dim < HEAD_DIM)  # [ROWS, DIM]
    in_sequence = (kv_head * GROUP + row) * HEAD_DIM + dim
    queries = tl.load(q + sequence * q_stride + in_sequence, mask=exists, other=0.0)  # [ROWS, DIM]

    # Online softmax (Milakov & Gimelshein 2018): `top` is the largest score so far, `total` the sum of
    # exp2(score - top), `mixed` the values weighted by the same; all fp32.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)

    for first in range(0, kv_len, TILE):
        position = first + tl.arange(0, TILE)  # [TILE]
        within = position < kv_len
        # Each token looks its own block up, so a tile may begin and end anywhere inside a block.
        block = tl.load(table + position // BLOCK_SIZE, mask=within, other=0).to(tl.int64)
        key_row = (block * 2 * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
        value_row = key_row + NUM_KV_HEADS * BLOCK_SIZE
        # Masked loads: what lies beyond the sequence costs no traffic, and may be NaN, which a weight of 0 keeps.
        readable = within[:, None] & (dim < HEAD_DIM)  # [TILE, DIM]
        keys = tl.load(storage + key_row[:, None] * HEAD_DIM + dim, mask=readable, other=0.0)
        values = tl.load(storage + value_row[:, None] * HEAD_DIM + dim, mask=readable, other=0.0)

        # "ieee": without it a GPU rounds fp32 inputs of tl.dot to TF32's ten bits.
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2  # [ROWS, TILE]
        scores = tl.where(within[None, :], scores, float("-inf"))
        # The loop ends with the sequence: each tile has a token within, so new_top is never -inf.
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - new_top)  # what was summed before was relative to the old top
        weights = tl.exp2(scores - new_top[:, None])  # [ROWS, TILE]
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
        top = new_top

    # A row without K/V (padding) has run no tile: zeros instead of 0 / 0.
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + sequence * out_stride + in_sequence, result.to(out.dtype.element_ty), mask=exists)


def paged_attention(
    q: Tensor, storage: Tensor, block_table: Tensor, kv_lens: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """Attention of one query token per sequence over the K/V that its block table names: [B, Hq, D].

    q [B, Hq, D] of storage's dtype, and `out` where given: sequences any distance apart; storage
    [N + 1, 2, Hk, block_size, D]; block_table int32 [B, M], read up to kv_lens int32 [B] tokens only;
    `scale` multiplies the scores. Zeros where kv_lens is 0. One pass over a sequence (PagedAttention,
    Kwon et al. 2023, with FlashAttention's softmax, Dao et al. 2022).
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = storage.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    check_rows(q, out)
    check_storage(storage, q)
    group, dim = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    rows = max(_MIN_ROWS, triton.next_power_of_2(group))
    _paged_attention_kernel[(num_seqs, num_kv_heads)](
        q,
        storage,
        block_table,
        kv_lens,
        out,
        scale * 1.4426950408889634,
        q.stride(0),
        block_table.stride(0),
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=storage.shape[3],
        ROWS=rows,
        DIM=dim,
        TILE=min(_MAX_TILE, max(_MIN_TILE, _TILE_BYTES // (dim * q.element_size()))),
        num_warps=4,
        num_stages=3,  # block ids are fetched a tile ahead of K and V, these a tile ahead of their use
    )
    return out


def paged_attention_reference(
    q: Tensor, storage: Tensor, block_table: Tensor, kv_lens: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """`paged_attention` in plain PyTorch, on any device: gathers all K/V, writes all scores out, in fp32."""
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = storage.shape[2:4]
    position = torch.arange(block_table.shape[1] * block_size, device=q.device)  # [L], L = M x block_size
    beyond = position >= kv_lens[:, None]  # [B, L]
    block = block_table.long()[:, position // block_size].masked_fill(beyond, 0)  # stale entries are not read
    k, v = storage[block, :, :, position % block_size].float().unbind(2)  # [B, L, Hk, D] each
    v = v.masked_fill(beyond[:, :, None, None], 0.0)  # block 0 may hold anything
    grouped = q.float().view(num_seqs, num_kv_heads, -1, head_dim)  # [B, Hk, G, D]
    scores = torch.einsum("bhgd,blhd->bhgl", grouped, k) * scale
    scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill((kv_lens == 0)[:, None, None, None], 0.0)  # softmax of nothing is NaN
    result = torch.einsum("bhgl,blhd->bhgd", weights, v).reshape(q.shape).to(q.dtype)
    return result if out is None else out.copy_(result)


def check_rows(*tensors: Tensor) -> None:
    """A wrong layout would read the wrong memory silently: only the distance between tokens is free."""
    for tensor in tensors:
        heads, head_dim = tensor.shape[1:]
        assert tensor.stride(2) == 1 and (heads == 1 or tensor.stride(1) == head_dim), tensor.stride()


def check_storage(storage: Tensor, x: Tensor) -> None:
    assert storage.is_contiguous() and storage.dtype == x.dtype and storage.shape[4] == x.shape[2]
