"""Cases of the kernels between the matrix products; the oracles are the formulas in float64, and the sampler itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stepengine.core import sampler
from stepengine.core.request import SamplingParams
from stepengine.model import ops
from tests.kernels.harness import DTYPES, TOLERANCE, Kernel
from tests.kernels.paged import GUARD, NAN

MODULE = "stepengine.model.kernels"
EPS = 1e-5
SLACK = 1e-5  # of fp32's own roundings and the GPU's exp, relative to the terms of a sum
VANISHING = 1e-30  # a GPU's quotient is 0 where the divisor is beyond 2**126
MARGIN = 64  # elements of GUARD on either side of what a kernel writes


def rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, gap: int = 3) -> Tensor:
    """Random [T, ...], a slice of a wider tensor, with NaN between the rows."""
    width = torch.Size(shape[1:]).numel()
    wide = torch.full((shape[0], width + 2 * gap), NAN, dtype=dtype)
    wide[:, gap : gap + width] = torch.randn(shape[0], width, generator=generator).to(dtype)
    strides = torch.empty(shape, device="meta").stride()[1:]
    return wide.as_strided(shape, (width + 2 * gap, *strides), gap)


def on(tensor: Tensor, device: str) -> Tensor:
    """A copy on the device, with the tensor's strides and what lies between its rows."""
    wide = tensor if tensor._base is None else tensor._base
    return wide.clone().to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextmanager
def guarded() -> Iterator[None]:
    """Tensors that are allocated meanwhile have GUARD before and after them, which nothing may touch."""
    made: list[tuple[Tensor, int]] = []
    empty = torch.empty

    def surrounded(*shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        wide = empty(size.numel() + 2 * MARGIN, dtype=dtype, device=device).fill_(GUARD)
        made.append((wide, size.numel()))
        return wide[MARGIN : MARGIN + size.numel()].view(size)

    with mock.patch.object(torch, "empty", surrounded):
        yield
    assert made, "the kernel allocated nothing: the guard saw nothing"
    for wide, size in made:
        beside = torch.cat((wide[:MARGIN], wide[MARGIN + size :]))
        assert bool((beside == GUARD).all()), "a kernel wrote beside its result"


def compare(name: str, found: Tensor, exact: Tensor, terms: Tensor, once: bool) -> None:
    """found equals float64's `exact`: rounded once at the end, or (twins round in between) about as exactly.

    terms: the sum of the absolute values of what was summed.
    """
    dtype = found.dtype
    assert found.shape == exact.shape
    difference = (found.double().cpu() - exact).abs()
    kind = torch.finfo(dtype)
    rounding = kind.eps / 2 * (exact.abs() + kind.smallest_normal)
    limit = rounding + SLACK * terms + VANISHING if once else TOLERANCE[dtype] * (1 + terms)
    worst = (difference / limit).max()
    assert bool((difference <= limit).all()), f"{name} is off by up to {difference.max():.2g}, {worst:.3g} x the limit"


def check_both(
    name: str, kernels: ModuleType, args: tuple[Any, ...], device: str, exact: list[Tensor], terms: list[Tensor]
) -> None:
    """The kernel rounds the exact results once, its twin on the CPU comes near, and on a GPU `ops` calls the kernel."""

    def called(function: Callable[..., Any], device: str) -> list[Tensor]:
        result = function(*[on(arg, device) if isinstance(arg, Tensor) else arg for arg in args])
        return list(result) if isinstance(result, tuple) else [result]

    with guarded():
        found = called(getattr(kernels, name), device)
    twin = called(getattr(ops, name), "cpu") if hasattr(ops, name) else []
    for ours, theirs, value, term in zip(found, twin, exact, terms, strict=True):
        assert ours.dtype == theirs.dtype == args[0].dtype
        compare(name, ours, value, term, once=True)
        compare(f"its twin, {name}", theirs, value, term, once=False)
    if device == "cuda":
        for ours, dispatched in zip(found, called(getattr(ops, name), device), strict=True):
            assert torch.equal(ours, dispatched)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def check_rms_norm(kernels: ModuleType, device: str, dtype: torch.dtype, *, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = rows(shape, dtype, generator)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    exact = normed(x.double(), weight.double())
    check_both("rms_norm", kernels, (x, weight, EPS), device, [exact], [exact.abs()])


def check_add_rms_norm(
    kernels: ModuleType, device: str, dtype: torch.dtype, *, shape: tuple[int, int], size: float = 1.0
) -> None:
    """`size` multiplies the activations. The sum is written over the residual, and nothing between its rows."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual = rows(shape, dtype, generator).mul_(size), rows(shape, dtype, generator, gap=8).mul_(size)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    total = x + residual  # one rounding: exactly what must come back
    exact = normed(total.double(), weight.double())

    args = (x, residual, weight, EPS)
    check_both("add_rms_norm", kernels, args, device, [exact, total.double()], [exact.abs(), torch.zeros_like(exact)])
    wide = residual._base.to(device)
    wide[wide.isnan()] = GUARD
    given = wide.as_strided(shape, residual.stride(), residual.storage_offset())
    given.copy_(rows(shape, dtype, generator))
    before = given.clone()
    _, returned = kernels.add_rms_norm(on(x, device), given, weight.to(device), EPS)
    assert returned is given and torch.equal(given, x.to(device) + before)
    assert bool((wide[:, :8] == GUARD).all() and (wide[:, -8:] == GUARD).all())


def rotation(shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of `dtype`; each half of a row has values of its own, so that mixing them up shows."""
    angles = torch.rand(shape[0], shape[2], generator=generator) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(the rotation of x [T, H, D] pair by pair, the sum of the absolute values of its terms), in float64."""
    first, second = x.double().chunk(2, dim=-1)
    kept, swapped = x.double() * cos.double()[:, None], torch.cat((second, first), -1) * sin.double()[:, None]
    return kept + swapped, kept.abs() + swapped.abs()


def check_rotate(kernels: ModuleType, device: str, dtype: torch.dtype, *, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = rows(shape, dtype, generator)
    cos, sin = rotation(shape, dtype, generator)
    exact, terms = rotated(x, cos, sin)
    check_both("rotate", kernels, (x, cos, sin), device, [exact], [terms])


def check_norm_rotate(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int],
    queries: int,
    size: float = 1.0,
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = rows(shape, dtype, generator).mul_(size)
    cos, sin = rotation(shape, dtype, generator)
    weights = torch.randn(2, shape[2], generator=generator).to(dtype).unbind()
    parts = x.double().tensor_split((queries,), dim=1)
    each = [rotated(normed(part, weight.double()), cos, sin) for part, weight in zip(parts, weights, strict=True)]
    args = (x, queries, *weights, EPS, cos, sin)
    check_both("norm_rotate", kernels, args, device, [exact for exact, _ in each], [terms for _, terms in each])


def check_silu_mul(
    kernels: ModuleType, device: str, dtype: torch.dtype, *, shape: tuple[int, int], size: float = 1.0
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    gate_up = rows((shape[0], 2 * shape[1]), dtype, generator).mul_(size)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate / (1 + (-gate).exp()) * up
    check_both("silu_mul", kernels, (gate_up,), device, [exact], [exact.abs()])


def check_sample_rows(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    vocab: int,
    temperatures: list[float],
    excluded: tuple[int, int] = (0, 0),
    spread: float = 3.0,
    race: float = 0.0,
) -> None:
    """The sampler's own tokens, to the last one; tokens from `excluded` on and before its end are at -inf.

    Rounded to fp16 or bf16, many logits are equal; `spread` is their standard deviation. With a `race`, two
    tokens of a row are that near to each other, noise included, and every second row's other one wins.
    """
    count = len(temperatures)
    generator = torch.Generator().manual_seed(vocab)
    logits = rows((count, vocab), dtype, generator).mul_(spread)
    logits[:, slice(*excluded)] = -torch.inf
    heat = torch.tensor(temperatures)
    keys, positions = torch.randint(-(2**31), 2**31, (2, count), generator=generator).int().unbind()
    positions = positions & 0x7FFFFFFF
    noise = sampler.gumbel(keys, positions, vocab)
    if race:
        first = noise.argmax(-1)  # uniform noise close to 1 there: the half that is added to its bits counts
        other = (first + vocab // 2) % vocab  # in another tile
        row = torch.arange(count)
        lead = noise[row, first] - noise[row, other] + race * (2 * (row % 2) - 1)
        logits.copy_(-50 * heat[:, None].expand_as(logits))
        logits[row, first] = 0
        logits[row, other] = heat * lead

    none = torch.zeros(count)
    batch = SimpleNamespace(
        temperature=heat, noise_key=keys, kv_lens=positions, min_p=none, top_k=none.int(), top_p=none + 1
    )
    requests = [
        SimpleNamespace(params=SamplingParams(temperature=value), stop_ids=frozenset(), num_outputs=0)
        for value in temperatures
    ]
    expected, _ = sampler.sample(logits, batch, requests)  # type: ignore[arg-type]
    distance = logits.double() - logits.double().max(-1, keepdim=True).values
    scores = torch.where(heat[:, None] > 0, distance / heat.double().clamp_min(1e-30)[:, None] + noise, distance)
    assert torch.equal(expected, scores.argmax(-1))
    assert not race or torch.equal(expected, torch.where(row % 2 == 1, other, first))

    args = [on(tensor, device) for tensor in (logits, heat, keys, positions)]
    with guarded():
        found = kernels.sample_rows(*args)
    assert found.dtype == torch.int64 and found.tolist() == expected.tolist()
    around = torch.full((count + 2 * MARGIN,), int(GUARD), dtype=torch.int32, device=device)
    given = around[MARGIN : MARGIN + count]
    assert kernels.sample_rows(*args, out=given) is given and given.tolist() == expected.tolist()
    assert bool((torch.cat((around[:MARGIN], around[MARGIN + count :])) == GUARD).all())


def check_unusable_logits(kernels: ModuleType, device: str, dtype: torch.dtype, *, vocab: int) -> None:
    """NaN and infinity count as the largest logit; where every token is excluded, the first one comes out."""
    logits = torch.zeros(3, vocab, dtype=dtype, device=device)
    logits[0, vocab - 3] = torch.nan
    logits[1, vocab - 2] = torch.inf
    logits[2] = -torch.inf
    ints = torch.zeros(3, dtype=torch.int32, device=device)
    for temperature in (0.0, 1.0):
        found = kernels.sample_rows(logits, torch.full((3,), temperature, device=device), ints, ints)
        assert found.tolist() == [vocab - 3, vocab - 2, 0]


def check_sampling(kernels: ModuleType, device: str, dtype: torch.dtype, **shape: Any) -> None:
    check = check_sample_rows if "temperatures" in shape else check_unusable_logits
    check(kernels, device, dtype, **shape)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_rms_norm(kernels: ModuleType, dtype: torch.dtype, width: int) -> None:
    kernels.rms_norm(meta(8, width, dtype=dtype), meta(width, dtype=dtype), EPS)


def launch_add_rms_norm(kernels: ModuleType, dtype: torch.dtype, width: int) -> None:
    x = meta(8, width, dtype=dtype)
    kernels.add_rms_norm(x, x, meta(width, dtype=dtype), EPS)


def launch_rotate(kernels: ModuleType, dtype: torch.dtype, head_dim: int) -> None:
    cos = meta(8, head_dim, dtype=dtype)
    kernels.rotate(meta(8, 32, head_dim, dtype=dtype)[:, :24], cos, cos)


def launch_norm_rotate(kernels: ModuleType, dtype: torch.dtype, head_dim: int) -> None:
    cos, weight = meta(8, head_dim, dtype=dtype), meta(head_dim, dtype=dtype)
    kernels.norm_rotate(meta(8, 32, head_dim, dtype=dtype)[:, :24], 16, weight, weight, EPS, cos, cos)


def launch_silu_mul(kernels: ModuleType, dtype: torch.dtype, width: int) -> None:
    kernels.silu_mul(meta(8, 2 * width, dtype=dtype))


def launch_sample_rows(kernels: ModuleType, dtype: torch.dtype, vocab: int) -> None:
    ints = meta(8, dtype=torch.int32)
    kernels.sample_rows(meta(8, vocab, dtype=dtype), meta(8, dtype=torch.float32), ints, ints)


def _compiled_for(*widths: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(DTYPES, widths)


def _named(shapes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {", ".join(f"{key} {value}" for key, value in shape.items()): shape for shape in shapes}


KERNELS = {
    "rms_norm": Kernel(
        MODULE,
        _named(
            [dict(shape=shape) for shape in ((1, 1), (2, 63), (33, 64), (5, 576), (1, 1000), (3, 4, 16), (1, 8192))]
        ),
        check_rms_norm,
        launch_rms_norm,
        _compiled_for(576, 8192),  # SmolLM2-135M, Llama 3 70B
    ),
    "add_rms_norm": Kernel(
        MODULE,
        _named([dict(shape=shape) for shape in ((1, 1), (2, 63), (33, 64), (5, 576), (1, 1000))])
        # 300 squared and summed is beyond fp16, 1e-3 squared below it.
        | {"large": dict(shape=(3, 576), size=300.0), "small": dict(shape=(3, 576), size=1e-3)},
        check_add_rms_norm,
        launch_add_rms_norm,
        _compiled_for(576, 8192),
    ),
    "rotate": Kernel(
        MODULE,
        _named(
            [
                dict(shape=shape)
                for shape in ((1, 1, 16), (33, 3, 64), (2, 12, 80), (5, 25, 96), (3, 40, 128), (1, 5, 256))
            ]
        ),
        check_rotate,
        launch_rotate,
    ),
    "norm_rotate": Kernel(
        MODULE,
        _named(
            [
                dict(shape=(1, 2, 16), queries=1),
                dict(shape=(33, 4, 64), queries=3),
                dict(shape=(2, 12, 80), queries=10),
                dict(shape=(5, 25, 96), queries=20),
                dict(shape=(3, 24, 128), queries=16),  # Qwen3-0.6B, whose second program has keys alone
            ]
        )
        | {"small": dict(shape=(3, 12, 64), queries=9, size=1e-3)},
        check_norm_rotate,
        launch_norm_rotate,
    ),
    "silu_mul": Kernel(
        MODULE,
        _named([dict(shape=shape) for shape in ((1, 1), (33, 63), (2, 1024), (5, 1536))])
        | {"far from 0": dict(shape=(3, 100), size=60.0)},  # exp(-gate) reaches infinity in fp32
        check_silu_mul,
        launch_silu_mul,
        _compiled_for(3072),
    ),
    "sample_rows": Kernel(
        MODULE,
        {
            "one token": dict(vocab=1, temperatures=[0.0, 1.0]),
            "one tile": dict(vocab=255, temperatures=[0.0, 0.3, 1.0, 2.0, 1e-35, 1e9]),
            "a tile of one token": dict(vocab=1025, temperatures=[1.0, 0.0, 0.7] * 11),
            "48 tiles": dict(vocab=49152, temperatures=[0.6, 0.0]),
            "149 tiles": dict(vocab=151936, temperatures=[1.0], dtypes=("fp32", "bf16")),
            "excluded tokens": dict(vocab=4000, temperatures=[1.0, 0.0, 1e-35, 1.0], excluded=(1000, 3100)),
            "all logits equal": dict(vocab=3000, temperatures=[0.0, 1.0, 0.5], spread=0.0),
            "nearly equal logits": dict(vocab=5000, temperatures=[0.0, 1.0, 1.0, 1.0], spread=1e-2),
            "close races": dict(
                vocab=2500, temperatures=[1.0, 1.0, 0.5, 0.5, 2.0, 2.0, 0.1, 0.1], race=2e-5, dtypes=("fp32",)
            ),
            "not numbers": dict(vocab=2500),
        },
        check_sampling,
        launch_sample_rows,
        _compiled_for(151936),
    ),
}
