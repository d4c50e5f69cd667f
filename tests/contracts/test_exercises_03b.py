"""Notebook 03b's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import pytest

from stepengine.contracts.exercises import check_bucket, check_idle_fraction
from stepengine.core.graphs import decode_bucket
from stepengine.trace.metrics import idle_fraction


def right_bucket(batch):
    return batch if batch in (1, 2) else 4 if batch <= 4 else (batch + 7) // 8 * 8


def test_the_right_bucket_passes():
    report = check_bucket(right_bucket)
    assert report.ok, report
    assert [right_bucket(n) for n in range(1, 65)] == [decode_bucket(n, 64) for n in range(1, 65)]


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (lambda batch: 1 << (batch - 1).bit_length(), "no smaller one", "bucket(17): got 32, and 24 would do"),
        (lambda batch: (batch + 7) // 8 * 8, "no smaller one", "bucket(1): got 8, and 1 would do"),
        (lambda batch: 64, "no smaller one", "bucket(1): got 64, and 1 would do"),
        (lambda batch: batch, "it is 1, 2, 4", "bucket(3): got 3, which is neither"),
        (lambda batch: batch // 8 * 8 or 4, "the bucket holds", "bucket(5): got 4, which is too small"),
        (
            lambda batch: float(right_bucket(batch)),
            "the bucket holds",
            "bucket(1): got 1.0, which is a float",
        ),
        (lambda batch: None, "the bucket holds", "bucket(1): got None"),
    ],
)
def test_a_wrong_bucket_fails_where_it_is_wrong(wrong, promise: str, example: str):
    report = check_bucket(wrong)
    first = report.failed[0]
    assert first.promise.startswith(promise) and first.example.startswith(example) and first.hint, report


def test_the_engine_runs_with_the_reader_s_bucket():
    asked: list[int] = []

    def noted(batch):
        asked.append(batch)
        return right_bucket(batch)

    assert check_bucket(noted).ok
    assert set(range(1, 13)) <= set(asked[3 * 64 + 12 :])  # after the checks of numbers: the engine's own calls
    too_small = check_bucket(lambda batch: 4)
    assert any(failure.promise.startswith("in the engine") for failure in too_small.failed), too_small


def right(trace):
    spans = sorted((r.device_began, r.device_ended) for r in trace.steps if r.device_ended > r.device_began)
    if not spans:
        return None
    idle, end = 0.0, spans[0][0]
    for began, ended in spans:
        idle += max(0.0, began - end)
        end = max(end, ended)
    return idle / (end - spans[0][0])


@pytest.mark.parametrize("answer", [right, idle_fraction])
def test_the_right_idle_fraction_passes(answer):
    report = check_idle_fraction(answer)
    assert report.ok, report


def spans_of(trace):
    return [(r.device_began, r.device_ended) for r in trace.steps]


def sum_of_lengths(trace):
    spans = sorted(span for span in spans_of(trace) if span[1] > span[0])
    if not spans:
        return None
    return 1 - sum(end - begin for begin, end in spans) / (max(end for _, end in spans) - spans[0][0])


def last_end_only(trace):
    spans = sorted(span for span in spans_of(trace) if span[1] > span[0])
    if not spans:
        return None
    gaps = sum(max(0.0, b[0] - a[1]) for a, b in zip(spans, spans[1:], strict=False))
    return gaps / (max(end for _, end in spans) - spans[0][0])


def unsorted(trace):
    return _running(span for span in spans_of(trace) if span[1] > span[0])


def _running(spans):
    spans = list(spans)
    if not spans or spans[-1][1] == 0:
        return None
    idle, end = 0.0, spans[0][0]
    for began, ended in spans:
        idle += max(0.0, began - end)
        end = max(end, ended)
    return idle / (end - spans[0][0])


def with_empty_steps(trace):
    return _running(sorted(spans_of(trace)))


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (sum_of_lengths, "time that two steps share", "0 to 6 ms, 4 to 9 ms, 11 to 13 ms: got 0."),
        (last_end_only, "a step inside another", "0 to 20 ms, 3 to 5 ms, 22 to 24 ms: got 0.7"),
        (unsorted, "steps come in any order", "6 to 10 ms, 0 to 4 ms: got"),
        (with_empty_steps, "a step without times", "no times, 0 to 4 ms, 6 to 10 ms: got 0.99"),
        (lambda trace: right(trace) or 0.0, "without any times", "no steps: got 0.0"),
        (lambda trace: None, "a gap between two steps", "0 to 4 ms, 6 to 10 ms: got None, counted 0.2000"),
    ],
)
def test_a_wrong_idle_fraction_fails_where_it_is_wrong(wrong, promise: str, example: str):
    report = check_idle_fraction(wrong)
    first = report.failed[0]
    assert first.promise.startswith(promise) and first.example.startswith(example) and first.hint, report
