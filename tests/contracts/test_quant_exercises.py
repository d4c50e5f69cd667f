"""Notebook 05's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import pytest
import torch

from stepengine.contracts.exercises import check_compensate, check_quantize_group
from stepengine.stage5_gptq.grid import Grid


def right_group(w, bits):
    most = 2**bits - 1
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    scale = (high - low) / most or 1.0
    zero = round(-low / scale)
    return (w / scale + zero).round().clamp(0, most), scale, zero


def engine_group(w, bits):
    """The engine's own, whose scales are rounded to 16 bits: not what is asked for."""
    grid = Grid(bits, -1)
    scale, zero = grid.fit(w[None])
    return grid.round(w[None], scale, zero)[0].to(torch.uint8), scale, zero


def test_the_right_group_passes():
    report = check_quantize_group(right_group)
    assert report.ok and len(report.passed) == 8, report


def test_codes_may_be_of_any_type():
    def whole(w, bits):
        codes, scale, zero = right_group(w, bits)
        return codes.to(torch.uint8), torch.tensor(scale), torch.tensor([zero])

    assert check_quantize_group(whole).ok


def without_zero_in_range(w, bits):
    most = 2**bits - 1
    scale = (w.max() - w.min()) / most
    zero = (-w.min() / scale).round()
    return (w / scale + zero).round().clamp(0, most), scale, zero


def symmetric(w, bits):
    scale = 2 * w.abs().max() / (2**bits - 1)
    zero = 2 ** (bits - 1)
    return (w / scale + zero).round().clamp(0, 2**bits - 1), scale, zero


def unrounded_zero(w, bits):
    most = 2**bits - 1
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    scale = (high - low) / most or 1.0
    return (w / scale - low / scale).round().clamp(0, most), scale, -low / scale


def unclamped(w, bits):
    _, scale, zero = right_group(w, bits)
    return (w / scale + zero).round(), scale, zero


def truncating(w, bits):
    codes, scale, zero = right_group(w, bits)
    return (w / scale + zero).floor().clamp(0, 2**bits - 1), scale, zero


def one_level_too_many(w, bits):
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    scale = (high - low) / 2**bits or 1.0
    zero = round(-low / scale)
    return (w / scale + zero).round().clamp(0, 2**bits - 1), scale, zero


def no_guard(w, bits):
    most = 2**bits - 1
    low, high = w.min().clamp(max=0), w.max().clamp(min=0)
    scale = (high - low) / most
    zero = (-low / scale).round()
    return (w / scale + zero).round().clamp(0, most), scale, zero


def always_four(w, bits):
    return right_group(w, 4)


def in_place(w, bits):
    found = right_group(w.clone(), bits)
    w.zero_()
    return found


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (lambda w, bits: (w, 1, 0), "a group with both signs", "a code is -1, it must be a whole number from 0 to 15"),
        (lambda w, bits: None, "a group with both signs", "got None, not (codes, scale, zero)"),
        (lambda w, bits: (None, None, None), "a group with both signs", "not (codes, scale, zero)"),
        (without_zero_in_range, "a group that is all positive", "([1, 1.5, 3], 4)"),
        (symmetric, "a group with both signs", "([-1, 0, 0.5, 2], 4): scale is 0.266667"),
        (unrounded_zero, "64 random weights", "zero is"),
        (truncating, "64 random weights", "off by"),
        (one_level_too_many, "a group with both signs", "scale is 0.1875, (max - min) / 15 is 0.2"),
        (no_guard, "a constant group", "quantize_group([0, 0, 0], 4): scale is 0, it must be above 0"),
        (always_four, "a group with both signs", "0.9], 2): a code is 5, it must be a whole number from 0 to 3"),
        (in_place, "a group with both signs", "w was changed in place"),
        (engine_group, "a group with both signs", "scale is 0.2"),
    ],
)
def test_a_wrong_group_fails_where_it_is_wrong(wrong, promise: str, example: str):
    report = check_quantize_group(wrong)
    assert any(f.promise.startswith(promise) and example in f.example for f in report.failed), report
    assert all(failure.hint for failure in report.failed)


def test_codes_that_are_not_clamped_are_found():
    report = check_quantize_group(unclamped)
    assert [failure.promise for failure in report.failed] == ["both ends half a step beside a code"], report
    assert "([-7.5, -2, 7.5], 4): a code is 16, it must be a whole number from 0 to 15" in report.failed[0].example


def right_move(W, Hinv, j):
    U = torch.linalg.cholesky(Hinv, upper=True)
    error = (W[:, j] - W[:, j].round()) / U[j, j]
    out = W.clone()
    out[:, j:] -= error[:, None] * U[j, j:]
    return out


def by_elimination(W, Hinv, j):
    """The same by another way: strike out the finished columns of Hinv one by one (OBQ's own)."""
    Hinv = Hinv.clone()
    for k in range(j):
        Hinv = Hinv - torch.outer(Hinv[:, k], Hinv[k]) / Hinv[k, k]
    out = W.clone()
    out[:, j:] -= torch.outer((W[:, j] - W[:, j].round()) / Hinv[j, j], Hinv[j, j:])
    return out


@pytest.mark.parametrize("answer", [right_move, by_elimination])
def test_the_least_squares_answer_passes(answer):
    report = check_compensate(answer)
    assert report.ok and len(report.passed) == 7, report


def only_rounds(W, Hinv, j):
    out = W.clone()
    out[:, j] = out[:, j].round()
    return out


def moves_all(W, Hinv, j):
    """The answer if no column were done yet."""
    return W - torch.outer((W[:, j] - W[:, j].round()) / Hinv[j, j], Hinv[j])


def forgets_what_is_done(W, Hinv, j):
    """Moves the right columns, by the amounts that are right while all columns are free."""
    out = W.clone()
    out[:, j:] -= torch.outer((W[:, j] - W[:, j].round()) / Hinv[j, j], Hinv[j, j:])
    return out


def wrong_sign(W, Hinv, j):
    out = 2 * W - right_move(W, Hinv, j)
    out[:, j] = W[:, j].round()
    return out


def in_place_move(W, Hinv, j):
    found = right_move(W, Hinv, j)
    W.copy_(found)
    return W


@pytest.mark.parametrize(
    ("wrong", "held", "example"),
    [
        (lambda W, Hinv, j: W, 0, "W = [[1.25, 2]], j = 0: 1.25 in row 0 becomes 1.25, its nearest whole number is 1"),
        (lambda W, Hinv, j: None, 0, "got None, not a tensor"),
        (lambda W, Hinv, j: W[0], 0, "got shape [2], W has [1, 2]"),
        (only_rounds, 1, "j = 0: row 0, column 1 is 2, least squares gives 2.25"),
        (wrong_sign, 1, "j = 0: row 0, column 1 is 1.75, least squares gives 2.25"),
        (moves_all, 4, "4 x 6 random weights, j = 2: column 0, which is done, moved by"),
        (forgets_what_is_done, 5, "1 x 3 random weights, j = 1: row 0, column 2 is"),
        (in_place_move, 0, "j = 0: W or Hinv was changed"),
    ],
)
def test_a_wrong_move_fails_where_it_is_wrong(wrong, held: int, example: str):
    report = check_compensate(wrong)
    assert example in report.failed[0].example, report
    assert len(report.passed) >= held and all(failure.hint for failure in report.failed)


def test_a_function_that_raises_is_reported():
    for check in (check_quantize_group, check_compensate):
        report = check(lambda *args: 1 / 0)
        assert not report.passed and "ZeroDivisionError" in report.failed[0].example
