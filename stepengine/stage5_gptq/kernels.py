"""Products with weights of 4 or 8 bits in Triton: activations stay as they are, codes become numbers in registers.

    gemv          one program a few rows of the weight and one token: all multiplications are fp32
    gemm          tiles for the tensor cores, few tokens with split-K, many without
    dequantize    writes the weights out, for a product by cuBLAS

`int4_linear` chooses among them. Each has its PyTorch twin. Needs Triton, like the earlier stages' kernels. The codes
are laid out once, by `pack_for_kernel`, so that no thread needs what another has loaded (the idea of Marlin, Frantar et
al. 2024): a thread's 32-bit word gives it, for each of several slices of 32 columns, two that lie side by side.

    T  tokens      N  rows of the weight (outputs)      K  its columns (inputs)      S  splits of K
    B  blocks      a block is WORDS words of a row: 128 columns of 4 bits or 64 of 8, of which every 32 are a slice
    G  groups of columns that share a scale and a zero point; a slice never belongs to two
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepengine.stage3_flash.kernels import capability
from stepengine.stage5_gptq.grid import QuantizedWeight

WORDS = 16  # of a block
SLICE = 32  # columns: two of each word
_WORDS = tl.constexpr(WORDS)
_SLICE = tl.constexpr(SLICE)
_SPLITS = (1, 2, 3, 4, 6, 8)
_SUM_TILE = 256
_ALL = 1 << 26  # slices: more than a row has


class KernelWeight(NamedTuple):
    """A `QuantizedWeight` as the kernels read it; `pack_for_kernel` makes it.

    packed int32 [N, B, WORDS]: with p = 32 / 2 / bits slices in a block, bits [bits * s, bits * (s + 1)) of word w are
    the code of column 32 * s + 2 * w of the block, and the same bits 16 further up that of the column beside it.
    scales [groups of all blocks, N], of the activations' dtype where that holds them exactly, else fp32; zeros uint8
    of the same shape. perm int64 [K], or None: which of x's columns comes where, where groups were not in order.
    group: columns of one, a multiple of 32, or 0 where a row is one group. dtype: the activations'.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor | None
    columns: int
    bits: int
    group: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points: what a product has to read."""
        return self.packed.nbytes + self.scales.nbytes + self.zeros.nbytes


def _group_of(groups: Tensor) -> tuple[Tensor, int] | None:
    """(an order of the columns in which groups lie one after another, columns of each or 0 for one); None if uneven."""
    order = torch.argsort(groups, stable=True)
    ordered = groups[order].long()
    if int(ordered[0]) == int(ordered[-1]) == 0:
        return order, 0
    size = int((ordered == 0).sum())
    if size % SLICE or not torch.equal(ordered, torch.arange(len(ordered), device=groups.device) // size):
        return None
    return order, size


def supported(weight: QuantizedWeight) -> bool:
    """Whether the kernels take it: 4 or 8 bits, an even K, groups of a multiple of 32 columns or one group a row.

    The last group may be a short one; columns may be in any order.
    """
    rows, columns = weight.shape
    return (
        weight.bits in (4, 8) and rows > 0 and columns > 0 and columns % 2 == 0 and _group_of(weight.groups) is not None
    )


def pack_for_kernel(weight: QuantizedWeight, device: torch.device | str, dtype: torch.dtype) -> KernelWeight:
    """Lay a weight that is `supported` out for the kernels, on `device`, for activations of `dtype`; once, at load."""
    found = _group_of(weight.groups)
    assert supported(weight) and found is not None, "the kernels do not take this weight: ask `supported` first"
    order, group = found
    rows, columns = weight.shape
    per_block = WORDS * 32 // weight.bits
    blocks = -(-columns // per_block)
    codes = torch.zeros(rows, blocks * per_block, dtype=torch.int32, device=weight.codes.device)
    codes[:, :columns] = weight.codes.index_select(1, order)
    codes = codes.view(rows, blocks, 16 // weight.bits, WORDS, 2)  # [N, B, slice, word, column of the two]
    packed = torch.zeros(rows, blocks, WORDS, dtype=torch.int32, device=codes.device)
    for part in range(16 // weight.bits):
        for half in range(2):
            packed |= codes[:, :, part, :, half] << (part * weight.bits + half * 16)
    needed = -(-blocks * per_block // group) if group else 1  # groups of the padding have a scale of 0
    scales = torch.zeros(needed, rows, device=codes.device)
    zeros = torch.zeros(needed, rows, dtype=torch.uint8, device=codes.device)
    there = weight.scales.shape[1]
    scales[:there], zeros[:there] = weight.scales.T[:needed], weight.zeros.T[:needed]
    exact = torch.equal(scales.to(dtype).float(), scales)
    in_order = torch.equal(order, torch.arange(columns, device=order.device))
    return KernelWeight(
        packed.to(device),
        scales.to(device, dtype if exact else torch.float32),
        zeros.to(device),
        None if in_order else order.to(device),
        columns,
        weight.bits,
        group,
        dtype,
    )


@triton.jit
def _split_words(words, PART: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    # The two codes of slice PART in each word, as numbers of DTYPE, both greater by 2**BITS than they are. A conversion
    # from integers runs at a fraction of the speed of arithmetic, so there is none: a code's bits become the upper bits
    # of the mantissa of a number in [2**BITS, 2**(BITS + 1)). bf16's mantissa is too short for 8 bits: there both are
    # less by 128.
    if DTYPE == tl.float32 or (BITS == 8 and DTYPE == tl.bfloat16):
        low = _number(words, 0x3F800000 + (BITS << 23), PART * BITS, BITS)
        high = _number(words, 0x3F800000 + (BITS << 23), PART * BITS + 16, BITS)
        if DTYPE != tl.float32:
            low, high = (low - 384).to(DTYPE), (high - 384).to(DTYPE)
    else:
        MANTISSA: tl.constexpr = 10 if DTYPE == tl.float16 else 7
        ONE: tl.constexpr = 0x3C00 if DTYPE == tl.float16 else 0x3F80
        UP: tl.constexpr = MANTISSA - BITS - PART * BITS
        moved = words << UP if UP >= 0 else words >> -UP
        MASK: tl.constexpr = ((1 << BITS) - 1) << (MANTISSA - BITS)
        # Both at once: one in each half of the register.
        pair = (moved & (MASK * 0x10001)) | ((ONE + (BITS << MANTISSA)) * 0x10001)
        low = pair.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def _number(words, exponent, AT: tl.constexpr, BITS: tl.constexpr):
    # 2**BITS plus the code that begins at bit AT, in fp32; `exponent`: the bits of 2**BITS.
    UP: tl.constexpr = 23 - BITS - AT
    moved = words << UP if UP >= 0 else words >> -UP
    return ((moved & (((1 << BITS) - 1) << (23 - BITS))) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def _gemv_kernel(
    x,  # [T, K], tokens x_stride elements apart; PAIRED: as int32 [T, K / 2], two of 16 bits each
    packed,  # [N, num_blocks, WORDS]
    scales,  # [G, N]
    zeros,  # [G, N]
    out,  # [T, N]
    num_rows,
    num_columns,
    num_blocks,
    x_stride,
    exponent,  # the bits of 2**BITS in fp32: in a register, as no instruction holds it and a mask
    BITS: tl.constexpr,
    RUN: tl.constexpr,  # slices, 1 to all of a block's, that are sure to share a group: scaled together
    SLICES: tl.constexpr,  # of a group
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRED: tl.constexpr,
    WHOLE: tl.constexpr,  # blocks have no padding
):
    # One program: ROWS rows, one token. A thread holds four words of a block for several rows, and multiplies them by
    # the same few numbers of x. In _number's terms a weight is (f - 2**BITS - zero) * scale, so over a group the sum of
    # weight x x is (sum of f x - (2**BITS + zero) sum of x) * scale: a weight costs a shift, a mask and a
    # multiply-add, and the zero point costs nothing. The program is one warp: then the threads that load numbers of x
    # are those that multiply by them, and nothing passes through shared memory.
    PARTS: tl.constexpr = 16 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    safe_row = tl.minimum(row, num_rows - 1)  # rows that are not there are computed and not stored
    word = tl.arange(0, _WORDS)
    row_words = packed + (safe_row.to(tl.int64) * num_blocks * _WORDS)[:, None, None] + word[None, None, :]
    source = x + token * x_stride
    total = tl.zeros([ROWS, BLOCKS, _WORDS], tl.float32)
    for at in range(0, num_blocks, BLOCKS):
        block = at + tl.arange(0, BLOCKS)
        safe_block = tl.minimum(block, num_blocks - 1)
        words = tl.load(row_words + (safe_block * _WORDS)[None, :, None])  # [ROWS, BLOCKS, WORDS]
        for part in tl.static_range(PARTS):
            if part % RUN == 0:
                group = ((safe_block * PARTS + part) // SLICES)[None, :] * num_rows + safe_row[:, None]
                scale = tl.load(scales + group).to(tl.float32)[:, :, None]  # [ROWS, BLOCKS, 1]
                offset = (tl.load(zeros + group).to(tl.float32) + 2.0**BITS)[:, :, None]
                found = tl.zeros([ROWS, BLOCKS, _WORDS], tl.float32)
                plain = tl.zeros([1, BLOCKS, _WORDS], tl.float32)
            pair = ((block * PARTS + part) * _WORDS)[:, None] + word[None, :]  # [BLOCKS, WORDS]: pairs of columns
            exists = (block < num_blocks)[:, None] & (word >= 0)[None, :]
            if not WHOLE:
                exists = exists & (2 * pair < num_columns)
            if PAIRED:
                both = tl.load(source + pair, mask=exists, other=0)
                if out.dtype.element_ty == tl.bfloat16:
                    first = (both << 16).to(tl.float32, bitcast=True)
                    second = (both & -65536).to(tl.float32, bitcast=True)
                else:
                    first = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                    second = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            else:
                first = tl.load(source + 2 * pair, mask=exists, other=0.0)
                second = tl.load(source + 2 * pair + 1, mask=exists, other=0.0)
            found += _number(words, exponent, part * BITS, BITS) * first[None, :, :]
            found += _number(words, exponent, part * BITS + 16, BITS) * second[None, :, :]
            plain += (first + second)[None, :, :]
            if (part + 1) % RUN == 0:
                total += (found - offset * plain) * scale
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    tl.store(out + token * num_rows + row, result.to(out.dtype.element_ty), mask=row < num_rows)


def _grouping(weight: KernelWeight) -> dict[str, int]:
    """The kernels' RUN and SLICES."""
    parts = 16 // weight.bits
    slices = weight.group // SLICE or _ALL
    return {"RUN": slices if parts % slices == 0 else parts if slices % parts == 0 else 1, "SLICES": slices}


def _whole(weight: KernelWeight) -> bool:
    return weight.packed.shape[1] * WORDS * 32 // weight.bits == weight.columns


def gemv_tile(num_rows: int) -> tuple[int, int]:
    """(rows, blocks) that a program of `int4_gemv` reads at once; it is one warp.

    The more rows, the more often each number of x that a thread holds is used; the fewer, the more programs there are
    to wait for memory at the same time. Not tuned on a GPU.
    """
    return (4, 8) if num_rows >= 4096 else (2, 16)


def int4_gemv(x: Tensor, weight: KernelWeight, out: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight: [T, N], for a very small T: each token reads all of the weight.

    x of weight.dtype, tokens any distance apart. Products and sums are fp32; a token's result depends on nothing
    but its own row.
    """
    x, out = _checked(x, weight, out)
    num_rows, num_columns = weight.shape
    paired = x.element_size() == 2
    source = x.view(torch.int32) if paired else x
    rows, blocks = gemv_tile(num_rows)
    _gemv_kernel[(triton.cdiv(num_rows, rows), x.shape[0])](
        source,
        weight.packed,
        weight.scales,
        weight.zeros,
        out,
        num_rows,
        num_columns,
        weight.packed.shape[1],
        source.stride(0),
        0x3F800000 + (weight.bits << 23),
        BITS=weight.bits,
        **_grouping(weight),
        ROWS=rows,
        BLOCKS=blocks,
        PAIRED=paired,
        WHOLE=_whole(weight),
        num_warps=1,
    )
    return out


def int4_gemv_reference(x: Tensor, weight: KernelWeight, out: Tensor | None = None) -> Tensor:
    """`int4_gemv` in plain PyTorch, on any device: exact weights, sums in fp32."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    x = x if weight.perm is None else x.index_select(1, weight.perm)
    return out.copy_(x.float() @ _exact(weight).T)


@triton.jit
def _gemm_kernel(
    x,  # [T, K], tokens x_stride elements apart
    packed,  # [N, num_blocks, WORDS]
    scales,  # [G, N]
    zeros,  # [G, N]
    out,  # [T, N]
    parts,  # fp32 [S, T, N]: what each split found; not touched where S is 1
    num_tokens,
    num_rows,
    num_columns,
    num_blocks,
    x_stride,
    BITS: tl.constexpr,
    RUN: tl.constexpr,  # slices, 1 to all of a block's, that are sure to share a group: scaled together
    SLICES: tl.constexpr,  # of a group
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    LATE: tl.constexpr,  # scale sums, a group at a time, rather than weights
    WHOLE: tl.constexpr,  # blocks have no padding
):
    # One program: ROWS rows x TOKENS tokens over one split of K. The weights are the left factor, because that may come
    # from registers on tensor cores of every generation: what is unpacked never passes through shared memory.
    PARTS: tl.constexpr = 16 // BITS
    DTYPE: tl.constexpr = x.dtype.element_ty
    BIAS: tl.constexpr = -128.0 if (BITS == 8 and DTYPE == tl.bfloat16) else 2.0**BITS  # that of _split_words
    # Programs with the same rows run together: the weights come from memory once, for the others from the cache.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    safe_token = tl.minimum(token, num_tokens - 1).to(tl.int64)  # what is not there is computed and not stored
    safe_row = tl.minimum(row, num_rows - 1)
    share = tl.cdiv(num_blocks, SPLITS)
    first = split * share
    last = tl.minimum(first + share, num_blocks)

    word = tl.arange(0, _WORDS)
    column = tl.arange(0, _SLICE)
    words_at = packed + (safe_row.to(tl.int64) * num_blocks * _WORDS)[:, None] + word[None, :]
    x_at = x + (safe_token * x_stride)[None, :] + column[:, None]  # [SLICE, TOKENS]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for block in range(first, last):
        words = tl.load(words_at + block * _WORDS)  # [ROWS, WORDS]
        for part in tl.static_range(PARTS):
            piece = block * PARTS + part
            begin = piece * _SLICE
            if WHOLE:
                inputs = tl.load(x_at + begin)
            else:
                inputs = tl.load(x_at + begin, mask=(begin + column < num_columns)[:, None], other=0.0)
            if part % RUN == 0:
                group = piece // SLICES * num_rows + safe_row
                scale = tl.load(scales + group)  # [ROWS]
                offset = (tl.load(zeros + group).to(tl.float32) + BIAS).to(DTYPE)
                if LATE:
                    found = tl.zeros([ROWS, TOKENS], tl.float32)
            low, high = _split_words(words, part, BITS, DTYPE)
            weights = tl.join(low, high).reshape(ROWS, _SLICE) - offset[:, None]  # a whole number: exact
            # "ieee": without it a GPU rounds fp32 inputs of tl.dot to TF32's ten bits.
            if LATE:
                found = tl.dot(weights, inputs, found, input_precision="ieee")
                if (part + 1) % RUN == 0:
                    total += found * scale.to(tl.float32)[:, None]
            else:  # to the bit `QuantizedWeight.dequantized(dtype)`: the product is rounded once
                if scales.dtype.element_ty == DTYPE:
                    weights = weights * scale[:, None]
                else:
                    weights = (weights.to(tl.float32) * scale[:, None]).to(DTYPE)
                total = tl.dot(weights, inputs, total, input_precision="ieee")

    exists = (token < num_tokens)[None, :] & (row < num_rows)[:, None]
    place = token.to(tl.int64)[None, :] * num_rows + row[:, None]
    if SPLITS == 1:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)
    else:
        tl.store(parts + split.to(tl.int64) * num_tokens * num_rows + place, total, mask=exists)


@triton.jit
def _sum_splits_kernel(
    parts,  # fp32 [S, size]
    out,  # [size]
    size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    # In the order of the splits, whichever was ready first: the same bits each time.
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for _split in tl.static_range(SPLITS):
        total += tl.load(parts + place, mask=place < size, other=0.0)
        parts += size
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)


class GemmTiles(NamedTuple):
    """How `int4_gemm` cuts its work: rows and tokens of a tile, warps, stages, and whether it scales late."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int  # blocks in flight or in use
    late: bool


def gemm_tiles(num_tokens: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmTiles:
    """The tiles of `int4_gemm` on a GPU of this compute capability.

    With few tokens there are fewer sums than weights, and scaling the sums (late) costs less, and rounds less; with
    many, the weights are scaled. All choices compile without spilling a register for 4 bits and 8; none has been
    tuned on a GPU.
    """
    if dtype == torch.float32:  # for tests: no tensor cores
        return GemmTiles(32, 16, 4, 2, num_tokens <= 16)
    if capability < (8, 0):  # Triton uses no tensor cores here
        return GemmTiles(32, 16, 4, 1, num_tokens <= 16)
    large = capability in ((8, 0), (9, 0), (10, 0))  # 163 KiB of shared memory or more; elsewhere 99
    if num_tokens <= 16:
        return GemmTiles(128, 16, 4, 4, True)
    if num_tokens <= 32:
        return GemmTiles(128, 32, 4, 4, True)
    if num_tokens <= 64:
        return GemmTiles(64, 64, 4, 4 if large else 3, False)
    if capability[0] == 10:  # Triton 3.7 makes a kernel that does nothing of 128 x 128: a test looks for that
        return GemmTiles(128, 64, 8, 3, False)
    return GemmTiles(128, 128, 8, 3 if large else 2, False)


def gemm_splits(num_tokens: int, weight: KernelWeight, tiles: GemmTiles, num_sms: int) -> int:
    """How many programs share the columns of a tile in `int4_gemm`, from shapes alone.

    As few as give every multiprocessor of the GPU a program, or two of few tokens, each with at least four blocks.
    """
    num_rows, num_blocks = weight.packed.shape[:2]
    programs = triton.cdiv(num_rows, tiles.rows) * triton.cdiv(num_tokens, tiles.tokens)
    most = max(1, num_blocks // 4)
    allowed = [splits for splits in _SPLITS if splits <= most]
    wanted = 2 * num_sms if tiles.late else num_sms
    return next((splits for splits in allowed if programs * splits >= wanted), allowed[-1])


def int4_gemm(x: Tensor, weight: KernelWeight, num_splits: int | None = None, out: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight on the tensor cores: [T, N].

    x of weight.dtype, tokens any distance apart. K is shared among `num_splits` programs (default: `gemm_splits`),
    whose fp32 results a second kernel adds in order: the same inputs give the same bits. A row's result does not
    depend on other rows, but on how many there are, since that chooses tiles and splits.
    """
    x, out = _checked(x, weight, out)
    num_tokens = x.shape[0]
    num_rows, num_columns = weight.shape
    tiles = gemm_tiles(num_tokens, x.dtype, capability(x))
    splits = gemm_splits(num_tokens, weight, tiles, _num_sms(x)) if num_splits is None else num_splits
    num_blocks = weight.packed.shape[1]
    parts = torch.empty(splits, num_tokens, num_rows, dtype=torch.float32, device=x.device) if splits > 1 else out
    _gemm_kernel[(triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(num_rows, tiles.rows), splits)](
        x,
        weight.packed,
        weight.scales,
        weight.zeros,
        out,
        parts,
        num_tokens,
        num_rows,
        num_columns,
        num_blocks,
        x.stride(0),
        BITS=weight.bits,
        **_grouping(weight),
        ROWS=tiles.rows,
        TOKENS=tiles.tokens,
        SPLITS=splits,
        LATE=tiles.late,
        WHOLE=_whole(weight),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        size = num_tokens * num_rows
        _sum_splits_kernel[(triton.cdiv(size, _SUM_TILE),)](
            parts, out, size, SPLITS=splits, TILE=_SUM_TILE, num_warps=2
        )
    return out


def int4_gemm_reference(
    x: Tensor, weight: KernelWeight, num_splits: int | None = None, out: Tensor | None = None
) -> Tensor:
    """`int4_gemm` in plain PyTorch, on any device: exact weights, sums in fp32; splits change no result."""
    return int4_gemv_reference(x, weight, out)


@triton.jit
def _dequantize_kernel(
    packed,  # [N, num_blocks, WORDS]
    scales,  # [G, N]
    zeros,  # [G, N]
    out,  # [N, K]
    num_rows,
    num_columns,
    num_blocks,
    exponent,  # the bits of 2**BITS in fp32
    BITS: tl.constexpr,
    RUN: tl.constexpr,  # slices, 1 to all of a block's, that are sure to share a group: scaled together
    SLICES: tl.constexpr,  # of a group
    ROWS: tl.constexpr,
):
    # One program: one block of ROWS rows.
    PARTS: tl.constexpr = 16 // BITS
    block = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    safe_row = tl.minimum(row, num_rows - 1)
    words = tl.load(
        packed + ((safe_row.to(tl.int64) * num_blocks + block) * _WORDS)[:, None] + tl.arange(0, _WORDS)[None, :]
    )
    column = tl.arange(0, _SLICE)
    for part in tl.static_range(PARTS):
        piece = block * PARTS + part
        if part % RUN == 0:
            group = piece // SLICES * num_rows + safe_row
            scale = tl.load(scales + group).to(tl.float32)
            offset = tl.load(zeros + group).to(tl.float32) + 2.0**BITS
        numbers = tl.join(_number(words, exponent, part * BITS, BITS), _number(words, exponent, part * BITS + 16, BITS))
        weights = (numbers.reshape(ROWS, _SLICE) - offset[:, None]) * scale[:, None]
        place = row.to(tl.int64)[:, None] * num_columns + (piece * _SLICE + column)[None, :]
        readable = exists[:, None] & (piece * _SLICE + column < num_columns)[None, :]
        tl.store(out + place, weights.to(out.dtype.element_ty), mask=readable)


def dequantize(weight: KernelWeight, out: Tensor | None = None) -> Tensor:
    """The weights as they count, [N, K] of weight.dtype: computed in fp32, rounded once.

    Columns come in the kernels' order: x's columns must be taken in that of weight.perm.
    """
    num_rows, num_columns = weight.shape
    device = weight.packed.device
    out = torch.empty(num_rows, num_columns, dtype=weight.dtype, device=device) if out is None else out
    assert out.is_contiguous() and out.shape == weight.shape and out.dtype == weight.dtype
    num_blocks, rows = weight.packed.shape[1], 64
    _dequantize_kernel[(num_blocks, triton.cdiv(num_rows, rows))](
        weight.packed,
        weight.scales,
        weight.zeros,
        out,
        num_rows,
        num_columns,
        num_blocks,
        0x3F800000 + (weight.bits << 23),
        BITS=weight.bits,
        **_grouping(weight),
        ROWS=rows,
        num_warps=4,
    )
    return out


def dequantize_reference(weight: KernelWeight, out: Tensor | None = None) -> Tensor:
    """`dequantize` in plain PyTorch, on any device."""
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.packed.device)
    return out.copy_(_exact(weight))


def _exact(weight: KernelWeight) -> Tensor:
    """fp32 [N, K], columns in the kernels' order."""
    columns, bits = weight.columns, weight.bits
    shifts = torch.arange(0, 16, bits, device=weight.packed.device)[:, None, None] + torch.tensor(
        [0, 16], device=weight.packed.device
    )
    codes = (weight.packed.long()[:, :, None, :, None] >> shifts) & (2**bits - 1)  # [N, B, slice, word, 2]
    codes = codes.flatten(1)[:, :columns]
    group = torch.arange(columns, device=codes.device) // (weight.group or columns)
    scales, zeros = weight.scales.float()[group].T, weight.zeros.float()[group].T
    return (codes.float() - zeros) * scales


def path(num_tokens: int) -> str:
    """Which of "gemv", "gemm" and "dequantize" multiplies this many tokens.

    To be set by measurement (`stepengine.bench.gpu --only int4`): no GPU has judged these numbers yet. They are
    guesses from counting: one token leaves the tensor cores nothing to do; beyond some hundreds, writing the weights
    out once costs less than a kernel that multiplies more slowly than cuBLAS.
    """
    if num_tokens <= 1:
        return "gemv"
    return "gemm" if num_tokens <= 512 else "dequantize"


def int4_linear(x: Tensor, weight: KernelWeight, out: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight, [T, N] of x's dtype, by the kernel that `path` names for T.

    Nothing waits for the GPU and all shapes follow from T, so a CUDA graph can hold it.
    """
    chosen = path(x.shape[0])
    if chosen == "gemv":
        return int4_gemv(x, weight, out)
    if chosen == "gemm":
        return int4_gemm(x, weight, None, out)
    return int4_matmul(x, weight, out)


def int4_matmul(x: Tensor, weight: KernelWeight, out: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight, [T, N]: written out by `dequantize`, then multiplied by torch."""
    x, out = _checked(x, weight, out)
    return torch.mm(x, dequantize(weight).T, out=out)


def int4_linear_reference(x: Tensor, weight: KernelWeight, out: Tensor | None = None) -> Tensor:
    """`int4_linear` in plain PyTorch, on any device."""
    return int4_gemv_reference(x, weight, out)


def _num_sms(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def _checked(x: Tensor, weight: KernelWeight, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in the order and alignment that the kernels read, and where the result goes."""
    num_rows, num_columns = weight.shape
    assert x.dtype == weight.dtype and x.dim() == 2 and x.shape[1] == num_columns, (x.dtype, x.shape, weight.shape)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.storage_offset() % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    out = torch.empty(x.shape[0], num_rows, dtype=x.dtype, device=x.device) if out is None else out
    assert out.is_contiguous() and out.shape == (x.shape[0], num_rows) and out.dtype == x.dtype
    return x, out
