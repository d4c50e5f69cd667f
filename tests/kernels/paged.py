"""Cases of stage 2's kernels, and an oracle in float64 that walks the block table token by token."""

import math
from types import ModuleType

import torch
from torch import Tensor

from tests.kernels.harness import TOLERANCE, Kernel

NAN = float("nan")
GUARD = 7.0  # what lies around the tensors that a kernel may write
MODULE = "stepengine.stage2_paged.kernels"


def fused(shape: tuple[int, int, int], extra: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random [T, H, D], a slice of a wider tensor as q, k and v are of the fused product; NaN around it."""
    tokens, heads, head_dim = shape
    wide = torch.full((tokens, heads + 2 * extra, head_dim), NAN, dtype=dtype)
    wide[:, extra : extra + heads] = torch.randn(shape, generator=generator).to(dtype)
    return wide[:, extra : extra + heads]


def on(tensor: Tensor, device: str) -> Tensor:
    """The tensor on the device, with its strides and what lies between its rows."""
    wide = tensor if tensor._base is None else tensor._base
    return wide.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check_store_kv(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    slots: list[int],
    block_size: int,
    head_dim: int,
    kv_heads: int,
    num_blocks: int = 0,
) -> None:
    """Both write exactly the given rows at the given slots, and nothing else but slot 0."""
    generator = torch.Generator().manual_seed(len(slots))
    num_blocks = num_blocks or max(slots) // block_size + 2
    k = fused((len(slots), kv_heads, head_dim), 3, dtype, generator)
    v = fused((len(slots), kv_heads, head_dim), 1, dtype, generator)
    touched = sorted({slot // block_size for slot in slots} | {0, 1, num_blocks})
    for store in (kernels.store_kv, kernels.store_kv_reference):
        # Uninitialised but for the blocks looked at: a storage of more than 2**31 elements takes no memory here.
        storage = torch.empty(num_blocks + 1, 2, kv_heads, block_size, head_dim, dtype=dtype, device=device)
        storage[touched] = GUARD
        expected = torch.full((len(touched), *storage.shape[1:]), GUARD, dtype=dtype)
        for token, slot in enumerate(slots):
            block, offset = touched.index(slot // block_size), slot % block_size
            expected[block, 0, :, offset] = k[token]
            expected[block, 1, :, offset] = v[token]
        store(on(k, device), on(v, device), storage, torch.tensor(slots, dtype=torch.int32, device=device))
        found = storage[touched].cpu()
        found[0, :, :, 0] = expected[0, :, :, 0]  # slot 0: which token came last is open
        assert torch.equal(found, expected), f"{store.__name__} wrote other values or to other places"


def check_paged_attention(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    kv_lens: list[int],
    block_size: int,
    head_dim: int,
    group: int,
    kv_heads: int = 2,
    first_block: int = 1,
) -> None:
    """Both equal float64, read nothing beyond a sequence's length, and write nothing around `out`."""
    generator = torch.Generator().manual_seed(sum(kv_lens))
    heads, longest = group * kv_heads, max(kv_lens)
    needed = [math.ceil(length / block_size) for length in kv_lens]
    # Blocks in random order and, between them, some of no sequence here; beyond a row's last entry: rubbish.
    spare = 2
    ids = (first_block + torch.randperm(sum(needed) + spare, generator=generator)).tolist()
    table = torch.full((len(kv_lens), math.ceil(longest / block_size) + 1), 2**31 - 1, dtype=torch.int32)
    for row, count in enumerate(needed):
        for entry in range(count):
            table[row, entry] = ids.pop()
    num_blocks = first_block + sum(needed) + spare
    storage = torch.empty(num_blocks + 1, 2, kv_heads, block_size, head_dim, dtype=dtype, device=device)
    storage[0], storage[first_block:] = NAN, NAN
    q = fused((len(kv_lens), heads, head_dim), kv_heads, dtype, generator)
    scale = 1 / math.sqrt(head_dim)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for row, length in enumerate(kv_lens):
        k = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
        v = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
        for position in range(length):
            block, offset = int(table[row, position // block_size]), position % block_size
            storage[block, 0, :, offset], storage[block, 1, :, offset] = k[position].to(device), v[position].to(device)
        for head in range(heads if length else 0):
            scores = k[:, head // group].double() @ q[row, head].double() * scale
            expected[row, head] = scores.softmax(0) @ v[:, head // group].double()

    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    around = torch.full((len(kv_lens), heads + 1, head_dim), GUARD, dtype=dtype, device=device)
    tolerance = TOLERANCE[dtype]
    for attend in (kernels.paged_attention, kernels.paged_attention_reference):
        around.fill_(GUARD)
        given = around[:, :heads]
        args = (on(q, device), storage, on(table, device), lens, scale)
        assert attend(*args, out=given) is given
        for found in (given, attend(*args)):
            assert found.shape == q.shape and found.dtype == dtype
            difference = (found.double().cpu() - expected).abs()
            limit = tolerance * (1 + expected.abs())
            assert bool((difference <= limit).all()), f"{attend.__name__} is off by up to {difference.max():.2g}"
        assert bool((around[:, heads:] == GUARD).all()), f"{attend.__name__} wrote beyond its heads"


def launch_store_kv(kernels: ModuleType, dtype: torch.dtype, head_dim: int) -> None:
    k, v = torch.empty(2, 8, 24, head_dim, dtype=dtype, device="meta")[:, :, 8:16]
    kernels.store_kv(k, v, _storage(dtype, head_dim), torch.empty(8, dtype=torch.int32, device="meta"))


def launch_paged_attention(kernels: ModuleType, dtype: torch.dtype, head_dim: int) -> None:
    q = torch.empty(8, 48, head_dim, dtype=dtype, device="meta")[:, :32]
    ints = torch.empty(8, 128, dtype=torch.int32, device="meta")
    kernels.paged_attention(q, _storage(dtype, head_dim), ints, ints[:, 0], 0.125)


def _storage(dtype: torch.dtype, head_dim: int) -> Tensor:
    return torch.empty(4097, 2, 8, 16, head_dim, dtype=dtype, device="meta")


KERNELS = {
    "store_kv": Kernel(
        MODULE,
        {
            "one token": dict(slots=[16], block_size=16, head_dim=64, kv_heads=3),
            "padding": dict(slots=[0, 17, 0, 33, 0], block_size=16, head_dim=64, kv_heads=2),
            "block size 1": dict(slots=[3, 1, 7], block_size=1, head_dim=16, kv_heads=1),
            "block size 3": dict(slots=list(range(3, 20)), block_size=3, head_dim=80, kv_heads=5),
            "block size 128": dict(slots=[255, 128, 300], block_size=128, head_dim=128, kv_heads=8),
            "head_dim 256": dict(slots=[4, 11], block_size=4, head_dim=256, kv_heads=32),
            "beyond 2**31": dict(
                slots=[65600 * 16 + 5, 16], block_size=16, head_dim=128, kv_heads=8, num_blocks=65600, dtypes=("fp16",)
            ),
        },
        check_store_kv,
        launch_store_kv,
    ),
    "paged_attention": Kernel(
        MODULE,
        {
            # Lengths around block and tile edges; 0 is a padding row.
            "lengths": dict(kv_lens=[1, 15, 16, 17, 33, 0, 64, 65], block_size=16, head_dim=64, group=3),
            "three tiles": dict(kv_lens=[300, 129, 1], block_size=16, head_dim=64, group=3, kv_heads=1),
            "group 1": dict(kv_lens=[17, 32], block_size=16, head_dim=128, group=1, kv_heads=3),
            "group 2": dict(kv_lens=[35], block_size=8, head_dim=16, group=2),
            "group 4, block size 1": dict(kv_lens=[33, 1, 0], block_size=1, head_dim=64, group=4),
            "group 5, block size 3": dict(kv_lens=[33, 16, 130], block_size=3, head_dim=80, group=5),
            "group 6, block size 32": dict(kv_lens=[33, 64, 15], block_size=32, head_dim=96, group=6, kv_heads=1),
            "group 7, block size 128": dict(kv_lens=[127, 128, 129], block_size=128, head_dim=64, group=7, kv_heads=1),
            "group 8, block size 20": dict(kv_lens=[41, 19], block_size=20, head_dim=128, group=8, kv_heads=1),
            "group 24": dict(kv_lens=[40], block_size=16, head_dim=32, group=24, kv_heads=1),
            "head_dim 256": dict(kv_lens=[17, 70], block_size=16, head_dim=256, group=2, kv_heads=1),
            "beyond 2**31": dict(
                kv_lens=[20, 3], block_size=16, head_dim=128, group=1, kv_heads=8, first_block=65600, dtypes=("fp16",)
            ),
        },
        check_paged_attention,
        launch_paged_attention,
    ),
}
