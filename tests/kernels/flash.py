"""Cases of stage 3's kernels; the oracle of prefill attends query by query in float64."""

import math
from contextlib import nullcontext
from types import ModuleType
from unittest import mock

import torch

from tests.kernels import paged
from tests.kernels.harness import TOLERANCE, Kernel
from tests.kernels.paged import GUARD, NAN, fused, on

MODULE = "stepengine.stage3_flash.kernels"
# fp16 and bf16 take the same machine instructions but for a letter, and fp32 is for tests: each once on every GPU.
HEAD_DIMS = {"bf16": (64, 128, 256), "fp16": (128,), "fp32": (128,)}


def check_flash_prefill(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    chunks: list[tuple[int, int]],
    block_size: int,
    head_dim: int,
    group: int,
    kv_heads: int = 1,
    padding: int = 0,
    first_block: int = 1,
    sharpness: float = 1.0,
    tiles_of: tuple[int, int] | None = None,
) -> None:
    """Both equal float64 for chunks (start, length), read nothing that is not theirs, and leave padding alone.

    `padding` tokens belong to no chunk. `sharpness` multiplies the scores. The interpreter takes the tiles of a
    GPU of compute capability `tiles_of`; a GPU takes its own.
    """
    generator = torch.Generator().manual_seed(len(chunks))
    heads, total = group * kv_heads, sum(length for _, length in chunks)
    needed = [math.ceil(start / block_size) for start, _ in chunks]
    ids = (first_block + torch.randperm(sum(needed) + 1, generator=generator)).tolist()
    table = torch.full((len(chunks), max(needed) + 1), 2**31 - 1, dtype=torch.int32)  # rubbish beyond a row's blocks
    storage = torch.empty(first_block + len(ids), 2, kv_heads, block_size, head_dim, dtype=dtype, device=device)
    storage[0], storage[first_block:] = NAN, NAN
    q = fused((total + padding, heads, head_dim), kv_heads, dtype, generator)
    k = fused((total + padding, kv_heads, head_dim), heads, dtype, generator)
    v = fused((total + padding, kv_heads, head_dim), 1, dtype, generator)
    for tensor in (q, k, v):
        tensor[total:] = NAN
    scale = sharpness / math.sqrt(head_dim)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    begins = [0]
    for row, (start, length) in enumerate(chunks):
        begin, end = begins[-1], begins[-1] + length
        begins.append(end)
        before = torch.randn(2, start, kv_heads, head_dim, generator=generator).to(dtype)
        for position in range(start):
            if position % block_size == 0:
                table[row, position // block_size] = ids.pop()
            block = int(table[row, position // block_size])
            storage[block, :, :, position % block_size] = before[:, position].to(device)
        keys, values = torch.cat((before[0], k[begin:end])).double(), torch.cat((before[1], v[begin:end])).double()
        for token in range(length):
            seen = start + token + 1
            queries = q[begin + token].double().view(kv_heads, group, head_dim)
            weights = (torch.einsum("hgd,khd->hgk", queries, keys[:seen]) * scale).softmax(-1)
            expected[begin + token] = torch.einsum("hgk,khd->hgd", weights, values[:seen]).view(heads, head_dim)

    lens = torch.tensor([start + length for start, length in chunks], dtype=torch.int32, device=device)
    cu_q = torch.tensor(begins, dtype=torch.int32, device=device)
    longest = max(length for _, length in chunks)
    around = torch.full((total + padding, heads + 1, head_dim), GUARD, dtype=dtype, device=device)
    args = (on(q, device), on(k, device), on(v, device), storage, on(table, device), cu_q, lens, longest, scale)
    pretend = tiles_of and device == "cpu"
    with mock.patch.object(kernels, "capability", lambda _: tiles_of) if pretend else nullcontext():
        for attend in (kernels.flash_prefill, kernels.flash_prefill_reference):
            around.fill_(GUARD)
            given = around[:, :heads]
            assert attend(*args, out=given) is given
            for found in (given, attend(*args)):
                assert found.shape == q.shape and found.dtype == dtype
                difference = (found[:total].double().cpu() - expected[:total]).abs()
                limit = TOLERANCE[dtype] * (1 + expected[:total].abs())
                assert bool((difference <= limit).all()), f"{attend.__name__} is off by up to {difference.max():.2g}"
            beyond = torch.cat((around[:, heads:].flatten(), around[total:].flatten()))
            assert bool((beyond == GUARD).all()), f"{attend.__name__} wrote what is not its own"


def check_paged_decode(kernels: ModuleType, device: str, dtype: torch.dtype, *, splits: int, **shape: object) -> None:
    """What stage 2's decode must do, whatever the number of splits and with a workspace full of NaN."""

    class Split:
        """`paged_decode` in the place of stage 2's kernel."""

        @staticmethod
        def paged_attention(q, storage, block_table, kv_lens, scale, out=None):  # type: ignore[no-untyped-def]
            size = q.shape[0] * q.shape[1] * splits * (q.shape[2] + 1)
            workspace = None if out is None else torch.full((size,), NAN, device=q.device)
            return kernels.paged_decode(q, storage, block_table, kv_lens, scale, splits, workspace, out)

        @staticmethod
        def paged_attention_reference(q, storage, block_table, kv_lens, scale, out=None):  # type: ignore[no-untyped-def]
            return kernels.paged_decode_reference(q, storage, block_table, kv_lens, scale, splits, None, out)

    paged.check_paged_attention(Split, device, dtype, **shape)  # type: ignore[arg-type]


def launch_flash_prefill(kernels: ModuleType, dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = torch.empty(4096, 32, head_dim, dtype=dtype, device="meta").split((16, 8, 8), 1)
    ints = torch.empty(8, 128, dtype=torch.int32, device="meta")
    kernels.flash_prefill(q, k, v, paged._storage(dtype, head_dim), ints, ints[0, :9], ints[:, 0], 4096, 0.125)


def launch_paged_decode(kernels: ModuleType, dtype: torch.dtype, head_dim: int) -> None:
    q = torch.empty(8, 48, head_dim, dtype=dtype, device="meta")[:, :32]
    ints = torch.empty(8, 128, dtype=torch.int32, device="meta")
    kernels.paged_decode(q, paged._storage(dtype, head_dim), ints, ints[:, 0], 0.125, 64)


KERNELS = {
    "flash_prefill": Kernel(
        MODULE,
        {
            "lengths": dict(
                chunks=[(0, 1), (0, 15), (0, 16), (0, 17), (0, 33), (0, 65)], block_size=16, head_dim=64, group=3
            ),
            "late chunks": dict(
                chunks=[(16, 17), (1, 33), (65, 1), (31, 16), (100, 15)], block_size=16, head_dim=64, group=2
            ),
            # A graph's padding rows have no tokens, and its padding tokens no row.
            "prompts, decodes, padding": dict(
                chunks=[(0, 40), (33, 1), (0, 0), (17, 1), (5, 20), (0, 0)],
                block_size=24,
                head_dim=80,
                group=4,
                padding=9,
            ),
            "decodes only": dict(chunks=[(33, 1), (0, 1), (15, 1)], block_size=16, head_dim=64, group=2, kv_heads=2),
            "group 1, block size 1": dict(chunks=[(7, 34), (0, 16)], block_size=1, head_dim=16, group=1, kv_heads=2),
            "group 5": dict(chunks=[(3, 18), (0, 7)], block_size=3, head_dim=32, group=5, kv_heads=2),
            "group 6": dict(chunks=[(20, 12)], block_size=16, head_dim=16, group=6),
            "group 7": dict(chunks=[(0, 33)], block_size=16, head_dim=96, group=7),
            "group 8": dict(chunks=[(17, 21), (0, 5)], block_size=16, head_dim=128, group=8, kv_heads=2),
            "group 48": dict(chunks=[(9, 3)], block_size=4, head_dim=16, group=48),
            "head_dim 256": dict(chunks=[(18, 19)], block_size=16, head_dim=256, group=2),
            "scores far apart": dict(
                chunks=[(40, 50), (0, 30)], block_size=16, head_dim=64, group=2, sharpness=8.0, dtypes=("fp32",)
            ),
            "large tiles": dict(
                chunks=[(140, 130), (0, 200), (64, 1)],
                block_size=16,
                head_dim=64,
                group=2,
                tiles_of=(9, 0),
                dtypes=("fp16", "bf16"),  # fp32 has none
            ),
            "more rows than are searched at once": dict(
                chunks=[(3, 18)] + [(0, 0)] * 256 + [(2, 1), (0, 40)],
                block_size=2,
                head_dim=16,
                group=1,
                dtypes=("fp32",),
            ),
            "beyond 2**31": dict(
                chunks=[(20, 3)], block_size=16, head_dim=128, group=1, kv_heads=8, first_block=65600, dtypes=("fp16",)
            ),
        },
        check_flash_prefill,
        launch_flash_prefill,
        head_dims=HEAD_DIMS,
        registers=255,
    ),
    "paged_decode": Kernel(
        MODULE,
        {
            # With 16 splits most of the short sequences' are empty, and all of the padding row's.
            "one split": dict(splits=1, kv_lens=[1, 15, 16, 17, 33, 0], block_size=16, head_dim=64, group=3),
            "16 splits": dict(splits=16, kv_lens=[1, 33, 0, 300, 65], block_size=16, head_dim=64, group=3, kv_heads=1),
            "3 splits, block size 1": dict(splits=3, kv_lens=[33, 300, 1], block_size=1, head_dim=16, group=1),
            "2 splits, block size 24": dict(splits=2, kv_lens=[129, 257, 24], block_size=24, head_dim=80, group=5),
            "7 splits, head_dim 128": dict(splits=7, kv_lens=[450, 64, 0], block_size=16, head_dim=128, group=8),
            "64 splits": dict(splits=64, kv_lens=[1100, 70], block_size=16, head_dim=64, group=7, kv_heads=1),
            "head_dim 256": dict(splits=2, kv_lens=[50, 7], block_size=16, head_dim=256, group=2, kv_heads=1),
            "beyond 2**31": dict(
                splits=2,
                kv_lens=[70, 3],
                block_size=16,
                head_dim=128,
                group=1,
                kv_heads=8,
                first_block=65600,
                dtypes=("fp16",),
            ),
        },
        check_paged_decode,
        launch_paged_decode,
        head_dims=HEAD_DIMS,
        registers=65536 // (3 * 128) // 8 * 8,  # three programs of 128 threads on a multiprocessor
    ),
}
