"""The quantiser against brute force, against the same equations written plainly, and on inputs that go wrong."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.errors import InvalidSetting, ModelError
from stepengine.stage5_gptq.gptq import Hessian, Method, inverse_factor, output_error, quantize
from stepengine.stage5_gptq.grid import Grid, QuantizedWeight, round_to_nearest


def correlated(tokens: int, width: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Inputs [tokens, width] whose columns have much in common, as those of a model have."""
    noise = torch.Generator().manual_seed(seed)
    rank = rank or max(2, width // 4)
    common = torch.randn(tokens, rank, generator=noise) @ torch.randn(rank, width, generator=noise)
    return common + 0.3 * torch.randn(tokens, width, generator=noise)


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian.matrix


def plain(weight: torch.Tensor, hessian: torch.Tensor, given: QuantizedWeight, damping: float) -> torch.Tensor:
    """Codes by the equations of Optimal Brain Quantization in a fixed order, one inverse per column, in fp64."""
    work, width = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(width)
    groups = given.groups.long()
    scale, zero = given.scales.double()[:, groups], given.zeros.double()[:, groups]
    codes = torch.zeros_like(work)
    for j in range(width):
        inverse = torch.linalg.inv(damped[j:, j:])  # of the columns that are still free
        codes[:, j] = (work[:, j] / scale[:, j] + zero[:, j]).round().clamp(0, 2**given.bits - 1)
        error = work[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]
        work[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("width,size", [(40, -1), (150, -1), (256, 64), (300, 128), (136, 32)])
def test_codes_are_those_of_the_equations_written_plainly(width, size):
    """Lazy blocks of 128 columns and the Cholesky factor change nothing."""
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(1)) / 10
    hessian = hessian_of(correlated(2 * width, width, 2))
    found = quantize(weight, hessian, Grid(4, size), Method(act_order=False))
    wanted = plain(weight, hessian, found, Method().damping)
    assert (found.codes.double() != wanted).float().mean() < 0.002  # a tie may fall either way in fp32


def test_activation_order_is_the_same_with_the_columns_sorted():
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(3)) / 10
    inputs = correlated(300, 96, 4) * torch.linspace(0.2, 3, 96)[torch.randperm(96)]
    hessian = hessian_of(inputs)
    found = quantize(weight, hessian, Grid(4, -1), Method())
    order = hessian.diagonal().argsort(descending=True)
    ordered = quantize(weight[:, order], hessian[order][:, order], Grid(4, -1), Method(act_order=False))
    torch.testing.assert_close(found.codes[:, order], ordered.codes)
    assert found.groups.tolist() == [0] * 96


def test_between_rounding_to_nearest_and_the_best_of_all_codes():
    """On layers so small that every combination of codes can be tried, most of what can be removed is removed."""
    width, bits, removed = 5, 2, []
    for seed in range(12):
        weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        hessian = hessian_of(correlated(64, width, seed + 100, rank=2))
        nearest = round_to_nearest(weight, Grid(bits, -1))
        found = quantize(weight, hessian, Grid(bits, -1), Method(damping=1e-4))
        assert torch.equal(found.scales, nearest.scales) and torch.equal(found.zeros, nearest.zeros)
        tried = torch.tensor(list(itertools.product(range(4), repeat=width)), dtype=torch.uint8)
        off = weight - (tried.float() - found.zeros) * found.scales  # [1024, 5]
        best = float(((off @ hessian) * off).sum(1).min())
        errors = [output_error(weight, rounded, hessian) for rounded in (nearest, found)]
        assert best <= errors[1] * 1.0001
        removed.append((errors[0] - errors[1]) / max(errors[0] - best, 1e-9))
    assert sorted(removed)[6] > 0.6


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.sampled_from([32, 64, 160]),
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([16, 32, 64, -1]),
    symmetric=st.booleans(),
    clip=st.booleans(),
)
def test_never_worse_than_rounding_on_correlated_inputs(seed, width, bits, size, symmetric, clip):
    weight = torch.randn(16, width, generator=torch.Generator().manual_seed(seed)) / 10
    hessian = hessian_of(correlated(400, width, seed + 1))
    grid = Grid(bits, size, symmetric, clip)
    found = quantize(weight, hessian, grid)
    assert found.codes.max() <= grid.most and found.scales.shape == (16, -(-width // grid.columns(width)))
    assert output_error(weight, found, hessian) < output_error(weight, round_to_nearest(weight, grid), hessian)


def test_output_error_is_the_squared_difference_of_the_outputs():
    inputs, weight = correlated(50, 24, 5), torch.randn(3, 24, generator=torch.Generator().manual_seed(6))
    found = round_to_nearest(weight, Grid(3, 8))
    outputs = inputs.double() @ (weight - found.dequantized()).double().T  # [50, 3]
    assert output_error(weight, found, hessian_of(inputs)) == pytest.approx(float(outputs.square().mean()), rel=1e-4)


def test_the_factor_is_upper_triangular_and_gives_the_inverse():
    hessian = hessian_of(correlated(100, 20, 7))
    upper = inverse_factor(hessian, 0.01)
    assert torch.equal(upper, upper.triu())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(20), atol=1e-3, rtol=1e-3)


def test_a_singular_hessian_is_damped():
    inputs = torch.ones(10, 32)  # rank 1
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(8))
    grid, hessian = Grid(4, 32), hessian_of(inputs)
    found = quantize(weight, hessian, grid)
    assert output_error(weight, found, hessian) < output_error(weight, round_to_nearest(weight, grid), hessian)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_are_rounded_and_disturb_nothing(act_order):
    inputs = correlated(200, 48, 9)
    inputs[:, [0, 7, 40]] = 0
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(10)) / 10
    found = quantize(weight, hessian_of(inputs), Grid(4, 16), Method(act_order=act_order))
    nearest = (weight[:, 7] / found.scales[:, 0] + found.zeros[:, 0]).round().clamp(0, 15)
    assert torch.equal(found.codes[:, 7].float(), nearest)
    assert found.dequantized().isfinite().all()
    nothing = quantize(weight, torch.zeros(48, 48), Grid(4, 16), Method(act_order=act_order))
    assert torch.equal(nothing.codes, round_to_nearest(weight, Grid(4, 16)).codes)


def test_inputs_and_weights_that_are_not_finite():
    hessian = Hessian(8, name="model.layers.3.o")
    with pytest.raises(ModelError, match=r"model\.layers\.3\.o hold NaN or infinite"):
        hessian.add(torch.full((2, 8), torch.nan))
    weight = torch.zeros(2, 8)
    weight[1, 1] = torch.inf
    with pytest.raises(ModelError, match="weights hold NaN"):
        quantize(weight, torch.eye(8), Grid(4, 8))
    with pytest.raises(ModelError, match="Hessian holds NaN"):
        quantize(torch.zeros(2, 8), torch.full((8, 8), torch.nan), Grid(4, 8))
    with pytest.raises(ModelError, match="no inverse even with damping"):
        inverse_factor(torch.tensor([[1.0, 100.0], [100.0, 1.0]]), 0.01)


def test_bad_settings_are_refused_with_the_value_and_the_limit():
    for bits in (0, 5, 16, "4", True, 4.0 + 0.5):
        with pytest.raises(InvalidSetting, match="bits is"):
            Grid(bits)  # type: ignore[arg-type]
    for size in (0, 7, -2, 2.5, True):
        with pytest.raises(InvalidSetting, match="group_size is"):
            Grid(4, size)  # type: ignore[arg-type]
    for damping in (0, -1, 2, "0.1", True, float("nan")):
        with pytest.raises(InvalidSetting, match="damping is"):
            Method(damping)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match=r"Hessian is \[4, 4\] for 8 columns"):
        quantize(torch.zeros(2, 8), torch.eye(4), Grid(4, 8))
    with pytest.raises(InvalidSetting, match="no calibration tokens"):
        _ = Hessian(8).matrix


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=40),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
)
def test_rounding_is_off_by_half_a_step_at_most_and_zero_stays_zero(values, bits, symmetric):
    weight = torch.tensor([values, [0.0] * len(values), [1.5] * len(values), [-1.5] * len(values)])
    found = round_to_nearest(weight, Grid(bits, -1, symmetric))
    # At the ends of the range the zero point and a scale of 8 bits may cost another half and a little.
    off = (found.dequantized() - weight).abs() / found.scales
    whole = weight.abs().max(1, keepdim=True).values > 1e-5
    assert (off[whole.expand_as(off)] <= 1.01 + 2**bits / 256).all()
    assert torch.equal(found.dequantized()[weight == 0], torch.zeros((weight == 0).sum()))
    assert torch.equal(found.scales, found.scales.half().float())


def test_a_group_by_hand():
    """scale = (max - min) / 15, zero = -min / scale."""
    weight = torch.tensor([[-0.5, 0.0, 0.25, 1.0, 0.9, -0.26, 0.5, 0.1]])
    found = round_to_nearest(weight, Grid(4, 8))
    scale = float(torch.tensor(1.5 / 15).bfloat16())
    assert found.scales.tolist() == [[scale]] and found.zeros.tolist() == [[5]]
    assert found.codes.tolist() == [[0, 5, 7, 15, 14, 2, 10, 6]]
    assert found.bits_per_weight() == 4 + (16 + 4) / 8
    assert round_to_nearest(torch.zeros(2, 64), Grid()).bits_per_weight() == 4.3125


def test_clipping_rounds_with_less_squared_error():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(11))
    weight[:, 0] *= 4
    errors = [
        float((round_to_nearest(weight, Grid(3, 64, clip=clip)).dequantized() - weight).square().sum())
        for clip in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]
