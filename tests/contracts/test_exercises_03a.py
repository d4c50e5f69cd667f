"""Notebook 03a's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import math

import pytest
import torch

from stepengine.bench.kernel_loads import kernel_bytes
from stepengine.contracts.flash_exercises import check_hbm_bytes, check_online_update
from stepengine.errors import InvalidSetting
from tests.kernels.harness import needs_newer_triton, needs_triton


def right_update(m, l, acc, scores, values):  # noqa: E741
    top = torch.maximum(m, scores.amax(1))
    level = torch.where(top == -math.inf, 0.0, top)
    weights, shrink = torch.exp2(scores - level[:, None]), torch.exp2(m - level)
    return top, l * shrink + weights.sum(1), acc * shrink[:, None] + weights @ values


def test_the_right_update_passes():
    report = check_online_update(right_update)
    assert report.ok, report


def without_guard(m, l, acc, scores, values):  # noqa: E741
    top = torch.maximum(m, scores.amax(1))
    weights, shrink = torch.exp2(scores - top[:, None]), torch.exp2(m - top)
    return top, l * shrink + weights.sum(1), acc * shrink[:, None] + weights @ values


def base_e(m, l, acc, scores, values):  # noqa: E741
    top = torch.maximum(m, scores.amax(1))
    weights, shrink = torch.exp(scores - top[:, None]), torch.exp(m - top)
    return top, l * shrink + weights.sum(1), acc * shrink[:, None] + weights @ values


def no_shrink(m, l, acc, scores, values):  # noqa: E741
    top = torch.maximum(m, scores.amax(1))
    weights = torch.exp2(scores - top[:, None])
    return top, l + weights.sum(1), acc + weights @ values


def no_maximum(m, l, acc, scores, values):  # noqa: E741
    top = torch.maximum(m, scores.amax(1))
    weights, level = torch.exp2(scores), torch.exp2(-top)
    before = torch.where(m == -math.inf, 0.0, torch.exp2(m))
    return top, (l * before + weights.sum(1)) * level, (acc * before[:, None] + weights @ values) * level[:, None]


def in_place(m, l, acc, scores, values):  # noqa: E741
    found = right_update(m, l, acc, scores, values)
    m.copy_(found[0])
    return found


@pytest.mark.parametrize(
    ("wrong", "broken", "example"),
    [
        (
            lambda m, total, acc, scores, values: (m, total, acc),
            0,
            "scores [[1, 3, 2]], tile 1: m[0] is -inf, float64 gives 3",
        ),
        (lambda *args: None, 0, "scores [[1, 3, 2]], tile 1: got None, not the three tensors"),
        (base_e, 0, "scores [[1, 3, 2]], tile 1: l[0] is 1.5"),
        (no_shrink, 1, "scores [[1, 3, 2]], then [[5, 4, 0]], tile 2: l[0] is 3.28125, float64 gives 1.96875"),
        (without_guard, 3, "two rows: the first tile is fully masked, then one that is not, tile 1: l[0] is nan"),
        (no_maximum, 3, "two rows: the first tile is fully masked"),
        (in_place, 0, "scores [[1, 3, 2]], tile 1: an argument was changed in place"),
    ],
)
def test_a_wrong_update_fails_where_it_is_wrong(wrong, broken: int, example: str):
    report = check_online_update(wrong)
    assert report.failed[0].example.startswith(example), report
    assert len(report.passed) >= broken and report.failed[0].hint


def test_an_update_without_a_maximum_overflows_at_1e4():
    def guarded(m, l, acc, scores, values):  # noqa: E741
        found = no_maximum(m, l, acc, scores, values)
        return right_update(m, l, acc, scores, values) if scores.amax() == -math.inf or m.amin() == -math.inf else found

    assert any(
        "1e+04" in failure.example or "10000" in failure.example for failure in check_online_update(guarded).failed
    )


def right_bytes(q_len, kv_len, tile):
    numbers = 2 * q_len
    for begin in range(0, q_len, tile):
        numbers += 2 * (kv_len - q_len + min(begin + tile, q_len))
    return 4 * 16 * numbers


def unavailable(cases):
    raise InvalidSetting("There is no interpreter here.")


@needs_triton
@needs_newer_triton
def test_the_right_count_equals_the_interpreter_s():
    report = check_hbm_bytes(right_bytes, kernel_bytes)
    assert report.ok and len(report.passed) == 6 and not report.remarks, report
    stub = check_hbm_bytes(lambda q_len, kv_len, tile: 0, kernel_bytes)
    assert len(stub.failed) == 6 and stub.failed[5].example == "hbm_bytes(1, 1, 16): got 0, the interpreter counts 256"


def test_without_an_interpreter_that_promise_is_named_and_not_checked():
    report = check_hbm_bytes(right_bytes, unavailable)
    assert report.ok and len(report.passed) == 5
    assert report.remarks == [
        "not checked: 'the loads and stores of the real kernel, byte for byte'. There is no interpreter here."
    ]


@pytest.mark.parametrize(
    ("wrong", "example"),
    [
        (lambda q, kv, tile: 256 * kv, "hbm_bytes(1, 40, 16): got 10240, counting pair by pair gives 5248"),
        (lambda q, kv, tile: 64 * (2 * q + 2 * kv), "hbm_bytes(64, 64, 16): got 16384"),
        (lambda q, kv, tile: right_bytes(q, kv, tile) // 2, "hbm_bytes(16, 16, 16): got 2048"),
        (  # as if every tile read every key
            lambda q, kv, tile: 64 * (2 * q + 2 * kv * -(-q // tile)),
            "hbm_bytes(64, 64, 16): got 40960, counting pair by pair gives 28672",
        ),
        (lambda q, kv, tile: right_bytes(q, q, tile), "hbm_bytes(1, 40, 16): got 256"),
        (lambda q, kv, tile: right_bytes(-(-q // tile) * tile, kv, tile), "hbm_bytes(8, 8, 16): got"),
    ],
)
def test_a_wrong_count_fails_where_it_is_wrong(wrong, example: str):
    report = check_hbm_bytes(wrong, unavailable)
    assert report.failed[0].example.startswith(example), report
    assert report.failed[0].hint
