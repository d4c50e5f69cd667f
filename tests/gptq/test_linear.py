"""Layers of packed weights against the plain product with what their codes stand for."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from stepengine.stage5_gptq.grid import Grid, QuantizedWeight, round_to_nearest
from stepengine.stage5_gptq.linear import (
    CpuInt4Linear,
    GpuInt8Table,
    GpuLinear,
    Int8Embedding,
    SplitLinear,
    TwinLinear,
    int8_table,
    joined,
    packed_linear,
)

CPU = torch.device("cpu")


def weight_of(rows, columns, bits=4, size=32, symmetric=False, shuffled=False, seed=0) -> QuantizedWeight:
    noise = torch.Generator().manual_seed(seed)
    found = round_to_nearest(torch.randn(rows, columns, generator=noise) / 10, Grid(bits, size, symmetric))
    if not shuffled:
        return found
    order = torch.randperm(columns, generator=noise)
    return QuantizedWeight(found.codes[:, order], found.scales, found.zeros, found.groups[order], bits)


def inputs(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns,size", [(64, 32), (160, 64), (50, -1), (96, 96)])
def test_the_twin_is_the_product_with_the_dequantised_weights_bit_by_bit(bits, columns, size):
    weight, bias = weight_of(24, columns, bits, size, shuffled=True), torch.randn(24)
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(5, columns).to(dtype)
        layer = TwinLinear(weight, bias, CPU, dtype)
        assert torch.equal(layer(x), F.linear(x, weight.dequantized(dtype), bias.to(dtype)))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 127, 128, 300])
@pytest.mark.parametrize(
    "rows,columns,size,symmetric,shuffled",
    [
        (64, 64, 32, False, False),
        (192, 576, 64, False, False),
        (960, 128, 128, True, False),
        (48, 256, 64, False, True),
    ],
)
def test_the_packed_layer_is_within_the_rounding_of_bf16(tokens, rows, columns, size, symmetric, shuffled):
    weight = weight_of(rows, columns, 4, size, symmetric, shuffled)
    layer = packed_linear(weight, torch.ones(rows), CPU, torch.float32)
    assert isinstance(layer, CpuInt4Linear)
    x = inputs(tokens, columns)
    exact = x.double() @ weight.dequantized(torch.float64).T + 1
    off = (layer(x).double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(off.max()) < 0.008  # inputs, zero points and outputs are rounded to 8 bits
    raw = packed_linear(weight, None, CPU, torch.float32, raw=True)(x)
    assert torch.equal(raw.float() + 1, layer(x)) and (tokens >= 128 or raw.dtype is torch.bfloat16)
    halves = packed_linear(weight, None, CPU, torch.bfloat16)(x.bfloat16())
    assert halves.dtype is torch.bfloat16 and float((halves.double() - exact + 1).norm() / exact.norm()) < 0.01


def test_a_wrong_zero_point_is_noticed_by_that_tolerance():
    weight = weight_of(64, 64)
    wrong = QuantizedWeight(weight.codes, weight.scales, weight.zeros + 1, weight.groups, 4)
    x = inputs(16, 64)
    exact = x @ weight.dequantized().T
    assert float((packed_linear(wrong, None, CPU, torch.float32)(x) - exact).norm() / exact.norm()) > 0.05


@pytest.mark.parametrize(
    "rows,columns,bits,size", [(50, 64, 4, 32), (64, 160, 4, 64), (64, 64, 4, 16), (64, 576, 4, -1), (64, 64, 3, 32)]
)
def test_what_the_operator_does_not_take_goes_to_the_twin(rows, columns, bits, size):
    weight = weight_of(rows, columns, bits, size)
    layer = packed_linear(weight, None, CPU, torch.float32)
    assert isinstance(layer, TwinLinear)
    x = inputs(3, columns)
    assert torch.equal(layer(x), F.linear(x, weight.dequantized()))


def test_the_layout_of_many_rows_is_found_or_left_alone(monkeypatch):
    """Where the operator's layout is not the known one, it serves many rows as well."""
    import stepengine.stage5_gptq.linear as module

    weight, x = weight_of(64, 64), inputs(200, 64)
    known = CpuInt4Linear(weight, None, torch.float32)
    monkeypatch.setattr(module, "_rows_of_a_block", lambda rows: 0)
    unknown = CpuInt4Linear(weight, None, torch.float32)
    assert unknown.block == 0
    torch.testing.assert_close(known(x), unknown(x), atol=0.03, rtol=0.02)


def test_matrices_are_joined_where_their_columns_agree():
    parts = [weight_of(rows, 64, seed=rows) for rows in (32, 16, 16)]
    whole = joined(parts)
    assert whole is not None
    assert torch.equal(whole.dequantized(), torch.cat([part.dequantized() for part in parts]))
    other = weight_of(16, 64, shuffled=True, seed=9)
    assert joined([parts[0], other]) is None
    x = inputs(4, 64)
    split = SplitLinear([TwinLinear(part, None, CPU, torch.float32) for part in (parts[0], other)])
    wanted = torch.cat([x @ part.dequantized().T for part in (parts[0], other)], 1)
    torch.testing.assert_close(split(x), wanted)


def test_what_a_layer_weighs_is_in_its_parameters():
    """4.3125 bits a weight at 64 columns a group; the operator's offsets are 16 bits, where a file has 4."""
    weight = weight_of(192, 576, 4, 64)
    stored = sum(part.nbytes for part in CpuInt4Linear(weight, None, torch.float32).parameters())
    assert stored * 8 / (192 * 576) == 4 + 2 * 16 / 64
    twin = sum(part.nbytes for part in TwinLinear(weight, None, CPU, torch.float32).parameters())
    assert twin == 192 * 576 / 2 + 192 * 9 * (2 + 1) + 576 * 4


def test_a_table_of_8_bits_embeds_and_multiplies():
    table = torch.randn(96, 64, generator=torch.Generator().manual_seed(4)) / 20
    small = int8_table(table)
    embed = Int8Embedding(small)
    ids = torch.tensor([0, 95, 7, 7], dtype=torch.int32)
    assert float((embed(ids) - table[ids.long()]).abs().max()) <= float(table.abs().max()) / 127
    x = inputs(3, 64)
    exact = x @ embed(torch.arange(96)).T
    assert float((small(x) - exact).norm() / exact.norm()) < 0.006
    assert sum(part.nbytes for part in embed.parameters()) == 96 * 64 + 96 * 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_gpus_layers_take_rows_and_count_their_bytes():
    """What can be seen of them without a GPU; their kernels have tests of their own."""
    table = torch.randn(96, 100, generator=torch.Generator().manual_seed(4)) / 20
    weight = round_to_nearest(table, Grid(8, -1, symmetric=True))
    small = GpuInt8Table(weight, None, CPU, torch.float32)
    ids = torch.tensor([0, 95, 7, 7], dtype=torch.int32)
    torch.testing.assert_close(small.rows(ids), weight.dequantized()[ids.long()])
    assert sum(part.nbytes for part in small.parameters()) == small.layout.nbytes
    layer = GpuLinear(weight_of(64, 256, 4, 64), torch.ones(64), CPU, torch.bfloat16)
    assert sum(part.nbytes for part in layer.parameters()) == 64 * 256 // 2 + 4 * 64 * 3 + 64 * 2
