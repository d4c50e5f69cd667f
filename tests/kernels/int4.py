"""Cases of stage 5's kernels; the oracle multiplies by `QuantizedWeight.dequantized` in float64."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stepengine.stage5_gptq.grid import QuantizedWeight
from tests.kernels.fused import SLACK, guarded, meta, on, rows
from tests.kernels.harness import Kernel

MODULE = "stepengine.stage5_gptq.kernels"


def random_weight(
    shape: tuple[int, int],
    group: int,
    bits: int = 4,
    symmetric: bool = False,
    shuffled: bool = False,
    foreign: bool = False,
    seed: int = 0,
) -> QuantizedWeight:
    """Random codes on random grids; group 0: one a row. `foreign` scales are exact in fp16, and not in bf16."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape
    size = group or width
    groups = torch.arange(width, dtype=torch.int32) // size
    count = int(groups[-1]) + 1
    if shuffled:
        groups = groups[torch.randperm(width, generator=generator)]
    scales = torch.rand(height, count, generator=generator) * 0.1 + 0.01
    scales = (scales if foreign else scales.bfloat16()).half().float()
    codes = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 2**bits, (height, count), generator=generator).to(torch.uint8)
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    return QuantizedWeight(codes, scales, zeros, groups, bits)


def case(
    device: str, dtype: torch.dtype, tokens: int, shape: tuple[int, int], grid: dict[str, Any]
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """(x with NaN between its rows, the weight for the kernels, exact results, sums of the terms' absolute values)."""
    weight = random_weight(shape, seed=tokens, **grid)
    generator = torch.Generator().manual_seed(sum(shape))
    gap = 3 if tokens % 4 == 1 else 8  # with 3, rows begin at addresses that the kernels do not take
    x = rows((tokens, shape[1]), dtype, generator, gap)
    packed = importlib.import_module(MODULE).pack_for_kernel(weight, device, dtype)
    right = weight.dequantized(torch.float64)
    return x, packed, x.double() @ right.T, x.double().abs() @ right.abs().T


def compare(name: str, found: Tensor, exact: Tensor, terms: Tensor, rounded: bool) -> None:
    """found is exact but for its own rounding, that of fp32 sums and, if `rounded`, that of the weights."""
    kind = torch.finfo(found.dtype)
    difference = (found.double().cpu() - exact).abs()
    limit = kind.eps / 2 * (exact.abs() + kind.smallest_normal) + (SLACK + kind.eps / 2 * rounded) * terms
    worst = (difference / limit).max()
    assert bool((difference <= limit).all()), f"{name} is off by up to {difference.max():.2g}, {worst:.3g} x the limit"


def check_product(
    call: Callable[..., Tensor],
    twin: Callable[..., Tensor],
    device: str,
    dtype: torch.dtype,
    tokens: int,
    shape: tuple[int, int],
    grid: dict[str, Any],
    rounded: bool,
) -> None:
    """Kernel and twin equal float64, write nothing beside the result, and a row is the same in any company."""
    x, weight, exact, terms = case(device, dtype, tokens, shape, grid)
    there = on(x, device)
    with guarded():
        found = call(there, weight)
    for name, result in ((call.__name__, found), (twin.__name__, twin(there, weight))):
        assert result.shape == exact.shape and result.dtype == dtype
        compare(name, result, exact, terms, rounded)
    out = torch.full_like(found, torch.nan)
    assert call(there, weight, out=out) is out and torch.equal(out, found), "another result in a given `out`"
    assert torch.equal(call(there.flip(0), weight).flip(0), found), "a row depends on the others"


def instead(kernels: ModuleType, device: str, name: str, answer: Any) -> AbstractContextManager[Any]:
    """Where Triton interprets, `kernels.name` answers this, if anything; a GPU takes its own."""
    pretend = answer is not None and device == "cpu"
    return mock.patch.object(kernels, name, lambda *_: answer) if pretend else nullcontext()


def check_int4_gemv(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    tokens: int,
    shape: tuple[int, int],
    tile: tuple[int, int] | None = None,
    **grid: Any,
) -> None:
    """`tile`: (rows, blocks) of a program."""
    with instead(kernels, device, "gemv_tile", tile):
        check_product(kernels.int4_gemv, kernels.int4_gemv_reference, device, dtype, tokens, shape, grid, rounded=False)


def check_int4_gemm(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    tokens: int,
    shape: tuple[int, int],
    splits: tuple[int | None, ...] = (None,),
    tiles_of: tuple[int, int] | None = None,
    **grid: Any,
) -> None:
    """With each number of splits; the tiles are those of a GPU of compute capability `tiles_of`."""
    for number in splits:

        def call(x: Tensor, weight: Any, out: Tensor | None = None, number: int | None = number) -> Tensor:
            return kernels.int4_gemm(x, weight, number, out=out)

        def twin(x: Tensor, weight: Any, number: int | None = number) -> Tensor:
            return kernels.int4_gemm_reference(x, weight, number)

        with instead(kernels, device, "capability", tiles_of):
            check_product(call, twin, device, dtype, tokens, shape, grid, rounded=tokens > 16)


def check_int4_linear(
    kernels: ModuleType, device: str, dtype: torch.dtype, *, tokens: int, shape: tuple[int, int], **grid: Any
) -> None:
    check_product(kernels.int4_linear, kernels.int4_linear_reference, device, dtype, tokens, shape, grid, rounded=True)


def check_dequantize(
    kernels: ModuleType, device: str, dtype: torch.dtype, *, shape: tuple[int, int], **grid: Any
) -> None:
    """To the bit what `QuantizedWeight.dequantized` says."""
    weight = random_weight(shape, **grid)
    packed = importlib.import_module(MODULE).pack_for_kernel(weight, device, dtype)
    expected = weight.dequantized(dtype)
    expected = expected if packed.perm is None else expected[:, packed.perm.cpu()]
    with guarded():
        found = kernels.dequantize(packed)
    assert found.dtype == dtype and torch.equal(found.cpu(), expected)
    assert torch.equal(kernels.dequantize_reference(packed).cpu(), expected)
    out = torch.full_like(found, torch.nan)
    assert kernels.dequantize(packed, out) is out and torch.equal(out.cpu(), expected)


def meta_weight(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int], bits: int) -> Any:
    """Groups of 64."""
    per_block, groups = kernels.WORDS * 32 // bits, shape[1] // 64
    packed = meta(shape[0], shape[1] // per_block, kernels.WORDS, dtype=torch.int32)
    scales, zeros = meta(groups, shape[0], dtype=dtype), meta(groups, shape[0], dtype=torch.uint8)
    return kernels.KernelWeight(packed, scales, zeros, None, shape[1], bits, 64, dtype)


def launch_gemv(bits: int) -> Callable[[ModuleType, torch.dtype, int], None]:
    """What is compiled are the tiles of weights of this many rows."""

    def launch(kernels: ModuleType, dtype: torch.dtype, height: int) -> None:
        kernels.int4_gemv(meta(1, 4096, dtype=dtype), meta_weight(kernels, dtype, (height, 4096), bits))

    return launch


def launch_gemm(bits: int) -> Callable[[ModuleType, torch.dtype, int], None]:
    """What is compiled are the tiles for this many tokens, and the sum of splits."""

    def launch(kernels: ModuleType, dtype: torch.dtype, tokens: int) -> None:
        kernels.int4_gemm(meta(tokens, 4096, dtype=dtype), meta_weight(kernels, dtype, (12288, 4096), bits), 3)

    return launch


def launch_dequantize(kernels: ModuleType, dtype: torch.dtype, bits: int) -> None:
    kernels.dequantize(meta_weight(kernels, dtype, (12288, 4096), bits))


_HEIGHTS: dict[str, tuple[int, ...]] = {"bf16": (1024, 4096), "fp16": (4096,), "fp32": (1024,)}
_TOKENS = {"bf16": (16, 32, 64, 128), "fp16": (128,), "fp32": (16,)}
_SHAPES: dict[str, dict[str, Any]] = {
    # K of less than a block, of whole blocks, and with a short last block and group; N of more and less than a tile.
    "groups of 32": dict(shape=(16, 64), group=32),
    "groups of 64, the last one short": dict(shape=(50, 160), group=64),
    "groups of 128": dict(shape=(50, 576), group=128, symmetric=True),
    "groups of 96": dict(shape=(16, 576), group=96),
    "one group a row": dict(shape=(50, 160), group=0),
    "in the order of activations": dict(shape=(16, 160), group=32, shuffled=True),
    "8 bits, one group a row": dict(shape=(50, 160), group=0, bits=8),
    "8 bits, groups of 32": dict(shape=(16, 576), group=32, bits=8, symmetric=True),
    "8 bits, groups of 128": dict(shape=(16, 576), group=128, bits=8),
    "scales of more bits": dict(shape=(50, 160), group=64, foreign=True),
}


def _with(**more: Any) -> dict[str, dict[str, Any]]:
    return {name: shape | more for name, shape in _SHAPES.items()}


KERNELS = {
    "int4_gemv": Kernel(
        MODULE,
        {name: shape | dict(tokens=1, shape=(5, shape["shape"][1])) for name, shape in _SHAPES.items()}
        | {
            "3 tokens": dict(tokens=3, shape=(10, 160), group=32),
            "several tiles": dict(tokens=1, shape=(5, 2304), group=128),
            "tiles of 4 rows": dict(tokens=2, shape=(18, 1152), group=64, tile=(4, 8)),
            "tiles of 4 rows, 8 bits": dict(tokens=1, shape=(18, 576), group=0, bits=8, tile=(4, 8)),
        },
        check_int4_gemv,
        launch_gemv(4),
        _HEIGHTS,
        registers=184,
    ),
    "int4_gemm": Kernel(
        MODULE,
        _with(tokens=2)
        | {f"{name}, 17 tokens": shape for name, shape in _with(tokens=17).items()}
        | {
            "1 token": dict(tokens=1, shape=(50, 576), group=64),
            "15 tokens, splits": dict(tokens=15, shape=(50, 1024), group=64, splits=(1, 2, 3, 4)),
            "more splits than blocks": dict(tokens=1, shape=(16, 160), group=32, splits=(4,)),
            "16 tokens": dict(tokens=16, shape=(192, 576), group=64, splits=(2,)),
            "33 tokens, splits": dict(tokens=33, shape=(50, 576), group=128, splits=(1, 3)),
            # fp32 has one size of tiles.
            **{
                f"{tokens} tokens, large tiles": dict(
                    tokens=tokens, shape=(192, 576), group=64, splits=(2,), tiles_of=(9, 0), dtypes=("fp16", "bf16")
                )
                for tokens in (3, 31, 60, 150)
            },
            "large tiles, 8 bits": dict(
                tokens=17, shape=(130, 576), group=0, bits=8, tiles_of=(9, 0), dtypes=("fp16", "bf16")
            ),
        },
        check_int4_gemm,
        launch_gemm(4),
        _TOKENS,
        registers=184,
    ),
    "int4_linear": Kernel(
        MODULE,
        {f"{tokens} tokens": dict(tokens=tokens, shape=(50, 160), group=64) for tokens in (2, 16, 33, 65, 600)}
        | {"1 token": dict(tokens=1, shape=(6, 160), group=64)},
        check_int4_linear,
        launch_gemm(8),
        {"bf16": (16, 32, 128), "fp16": (128,), "fp32": ()},
        registers=184,
    ),
    "dequantize": Kernel(
        MODULE,
        _with() | {"several tiles": dict(shape=(130, 576), group=64)},
        check_dequantize,
        launch_dequantize,
        {"bf16": (4, 8), "fp16": (4,), "fp32": (4,)},
    ),
    "int8_gemv": Kernel(MODULE, {}, check_int4_gemv, launch_gemv(8), _HEIGHTS | {"fp32": ()}, registers=184),
}
