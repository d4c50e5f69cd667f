"""How promises are run: what goes wrong stays inside, Ctrl-C does not, and no timer is left behind."""

import signal
import threading
import time

import pytest

from stepengine.contracts import report as reports
from stepengine.contracts.report import Promise, Report, Violation, called, run_promises, same_number


def spin() -> None:
    while True:
        pass


def promise(check) -> list[Promise]:
    return [Promise("it holds", check, "look here")]


def raises(error):
    def check() -> None:
        raise error

    return check


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), GeneratorExit(), BaseException("x"), MemoryError()])
def test_whatever_is_raised_becomes_a_failure(error: BaseException):
    report = run_promises("part", promise(raises(error)))
    assert report.failed[0].example.startswith(f"it raised {type(error).__name__}")


def test_ctrl_c_is_the_reader_s_own_hand():
    with pytest.raises(KeyboardInterrupt):
        run_promises("part", promise(raises(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        called("f()", raises(KeyboardInterrupt()))


def test_an_endless_promise_is_stopped_and_those_after_it_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reports, "PATIENCE", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    report = run_promises("part", [*promise(lambda: None), *promise(spin), *promise(lambda: None)])
    assert (len(report.passed), len(report.failed), report.unchecked) == (1, 1, 1) and not report.ok
    assert "1 of 3 promises hold" in str(report) and "1 further promises were not checked" in str(report)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_sleeping_is_not_working_but_it_ends_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reports, "PATIENCE", 0.2)
    assert run_promises("part", promise(lambda: time.sleep(0.4))).ok  # another program may have had the core
    assert not run_promises("part", promise(lambda: time.sleep(60))).ok


def test_a_timer_of_somebody_else_goes_on(monkeypatch: pytest.MonkeyPatch):
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 30.0)
        assert run_promises("part", promise(lambda: None)).ok
        left = signal.getitimer(signal.ITIMER_REAL)[0]
        assert 0 < left <= 30.0 and callable(signal.getsignal(signal.SIGALRM))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not rang


def test_in_a_thread_promises_are_checked_without_a_limit():
    found: list[Report] = []
    thread = threading.Thread(target=lambda: found.append(run_promises("part", promise(raises(ValueError("x"))))))
    thread.start()
    thread.join()
    assert found[0].failed[0].example == "it raised ValueError: x"


def test_a_long_or_broken_text_is_made_short_and_one_line():
    report = run_promises("part", promise(raises(Violation("a\n  b" + "x" * 5000))))
    example = report.failed[0].example
    assert example.startswith("a bxxx") and "characters left out" in example and len(example) < 700


@pytest.mark.parametrize(
    ("got", "note"),
    [
        (2.0, "got 2.0, the trace has 2; a float is not a whole number (int); divide with //"),
        (True, "a bool is not a whole number"),
        (None, "got None, the trace has 2"),
        (3, "got 3, the trace has 2"),
    ],
)
def test_a_number_must_be_whole(got: object, note: str):
    with pytest.raises(Violation) as broken:
        same_number(got, 2, "f(1)", "the trace has 2")
    assert str(broken.value).startswith("f(1): got ") and note in str(broken.value)
    same_number(2, 2, "f(1)", "the trace has 2")


def test_two_reports_are_joined():
    first, second = Report("part", ["a"]), Report("part", ["b"], unchecked=2)
    joined = first.then(second)
    assert joined.passed == ["a", "b"] and joined.ok and "2 of 4 promises hold" in str(joined)
