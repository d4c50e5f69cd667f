"""Streams of codes in words of 32 bits, and the two versions of the format's zero points."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.errors import InvalidSetting, ModelError
from stepengine.stage5_gptq.grid import QuantizedWeight
from stepengine.stage5_gptq.packing import (
    pack_stream,
    pack_weight,
    packable_step,
    stored_zeros,
    unpack_stream,
    unpack_weight,
)

ALL_BITS = (2, 3, 4, 8)


def words_of(codes, bits):
    """One row's words, signed: the codes are the digits of one long number, lowest first."""
    number = sum(int(code) << bits * i for i, code in enumerate(codes))
    words = [number >> 32 * i & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def random_weight(bits, rows, columns, groups, seed, least_zero=0):
    draw = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        codes=torch.randint(2**bits, (rows, columns), generator=draw, dtype=torch.uint8),
        scales=(torch.rand(rows, groups, generator=draw) + 0.01).half().float(),
        zeros=torch.randint(least_zero, 2**bits, (rows, groups), generator=draw, dtype=torch.uint8),
        groups=torch.randint(groups, (columns,), generator=draw, dtype=torch.int32),
        bits=bits,
    )


shapes = st.tuples(st.sampled_from(ALL_BITS), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
seeds = st.integers(0, 2**31)


@given(st.sampled_from(ALL_BITS), st.integers(1, 5), st.integers(1, 3), seeds)
@settings(deadline=None, max_examples=60)
def test_a_row_is_one_number_cut_into_words(bits, rows, steps, seed):
    width = steps * packable_step(bits)
    codes = torch.randint(2**bits, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_stream(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, width * bits // 32)
    assert words.tolist() == [words_of(row, bits) for row in codes]
    assert torch.equal(unpack_stream(words, bits), codes)


def test_one_word_of_4_bits_by_hand():
    # The first code is the last hexadecimal digit.
    assert pack_stream(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 4).tolist() == [[0x07654321]]
    assert pack_stream(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 8]], dtype=torch.uint8), 4).tolist() == [[-(1 << 31)]]


def test_three_words_of_3_bits_by_hand():
    # Code 10 has two bits in the first word and one in the second; code 21 has one in the second and two in the third.
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b110, 0b011
    assert pack_stream(codes, 3).tolist() == [[-(1 << 31), 1 - (1 << 31), 1]]


def test_columns_that_do_not_fill_a_word_are_refused():
    with pytest.raises(InvalidSetting, match="48 codes of 3 bits do not fill words of 32 bits; .* multiple of 32"):
        pack_stream(torch.zeros(1, 48, dtype=torch.uint8), 3)


@given(shapes, st.sampled_from((1, 2)), seeds)
@settings(deadline=None, max_examples=60)
def test_a_matrix_comes_back_as_it_was(shape, version, seed):
    bits, high, wide, groups = shape
    step = packable_step(bits)
    weight = random_weight(bits, high * step, wide * step, groups, seed, least_zero=2 - version)
    packed = pack_weight(weight, version)
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in packed.items()} == {
        "qweight": (torch.int32, [wide * step * bits // 32, high * step]),
        "qzeros": (torch.int32, [groups, high * step * bits // 32]),
        "scales": (torch.float16, [groups, high * step]),
        "g_idx": (torch.int32, [wide * step]),
    }
    again = unpack_weight(packed, bits, version)
    for name in ("codes", "scales", "zeros", "groups"):
        assert torch.equal(getattr(again, name), getattr(weight, name)), name
        assert getattr(again, name).dtype == getattr(weight, name).dtype, name


@pytest.mark.parametrize("bits", ALL_BITS)
def test_qweight_runs_down_the_inputs_and_qzeros_along_the_outputs(bits):
    weight = random_weight(bits, 64, 96, 3, seed=bits, least_zero=1)
    for version in (1, 2):
        packed = pack_weight(weight, version)
        for output in (0, 5, 63):
            assert packed["qweight"][:, output].tolist() == words_of(weight.codes[output], bits)
        for group in range(3):
            stored = [int(zero) - (version == 1) for zero in weight.zeros[:, group]]
            assert packed["qzeros"][group].tolist() == words_of(stored, bits)


def test_version_1_cannot_hold_a_zero_point_of_0():
    weight = random_weight(4, 32, 32, 1, seed=0, least_zero=1)
    weight.zeros[3, 0] = 0
    with pytest.raises(InvalidSetting, match="zero point is 0.*write 'gptq_v2'"):
        pack_weight(weight, 1)
    assert torch.equal(unpack_weight(pack_weight(weight, 2), 4, 2).zeros, weight.zeros)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_a_zero_point_of_0_that_borrowed_from_its_neighbour_is_read_back(bits):
    # GPTQModel takes 1 from each code of a word at once. With 4 bits, 0x...50 - 0x...11 = 0x...3f.
    zeros = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    zeros[0, :5] = 0
    zeros[1] = 0
    ones = words_of([1] * (32 // bits), bits)[0]
    stored = [[(word - ones) & 0xFFFFFFFF for word in words_of(row, bits)] for row in zeros]
    qzeros = torch.tensor(stored).to(torch.uint32).view(torch.int32)
    assert torch.equal(stored_zeros(qzeros, bits, 1), zeros)


def test_a_3_bit_zero_point_of_0_is_read_on_its_own():
    zeros = torch.arange(32, dtype=torch.uint8).reshape(1, 32) % 8
    qzeros = torch.tensor([words_of([(int(zero) - 1) % 8 for zero in zeros[0]], 3)], dtype=torch.int32)
    assert torch.equal(stored_zeros(qzeros, 3, 1), zeros)


def test_tensors_of_different_matrices_are_refused():
    packed = pack_weight(random_weight(4, 32, 64, 2, seed=1), 2)
    with pytest.raises(ModelError, match=r"qweight \[8, 32\].*not one matrix of 8 bits"):
        unpack_weight(packed, 8, 2)
