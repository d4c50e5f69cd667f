"""What a check says: what passed, and the first thing that failed with its smallest example and a hint.

The part under test may be anything that a reader has typed. So nothing that it does escapes from here: an error of
any kind, an exit, an answer whose text is endless or cannot be made, a loop without an end.
"""

import math
import operator
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

PATIENCE = 20.0  # seconds of this thread's own work that one promise may take, ten times what the slowest needs
SLEEP = 5.0  # times as many seconds may pass on the clock: a busy machine is not an endless loop
LONGEST = 600  # characters of an example


class Violation(Exception):
    """A contract is broken; the message is the example that shows it."""


class TookTooLong(BaseException):
    """A promise ran out of time. Not an `Exception`, so that a part's own `except Exception` does not keep it."""


class Failure(NamedTuple):
    """A broken promise, the smallest example found, and where to look."""

    promise: str
    example: str
    hint: str


class Promise(NamedTuple):
    """One promise: how it reads, how it is checked (raises when broken), what to look at then."""

    text: str
    check: Callable[[], None]
    hint: str


@dataclass
class Report:
    """The outcome of a check. `ok` when every promise held."""

    name: str
    passed: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unchecked: int = 0  # promises that nobody looked at, because one before them took too long

    @property
    def ok(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        total = len(self.passed) + len(self.failed) + self.unchecked
        lines = [f"{self.name}: {len(self.passed)} of {total} promises hold"]
        lines += [f"  ok    {text}" for text in self.passed]
        for failure in self.failed:
            lines.append(f"  FAIL  {failure.promise}")
            lines.append(f"        example: {failure.example}")
            lines.append(f"        hint: {failure.hint}")
        return "\n".join(lines + [f"  note  {text}" for text in self.remarks])

    __repr__ = __str__

    def then(self, more: "Report") -> "Report":
        """This report and, after it, what another check of the same part says."""
        joined = (self.passed + more.passed, self.failed + more.failed, self.remarks + more.remarks)
        return Report(self.name, *joined, self.unchecked + more.unchecked)


def run_promises(name: str, promises: Sequence[Promise]) -> Report:
    """Check all promises in order; later ones are still checked after a failure, but not after an endless one.

    Never raises, with one exception: Ctrl-C is the reader's own hand.
    """
    report = Report(name)
    for number, promise in enumerate(promises):
        try:
            with _limited(PATIENCE):
                promise.check()
        except Violation as broken:
            report.failed.append(Failure(promise.text, _short(str(broken)), promise.hint))
        except TookTooLong:
            example = f"it was still running after {PATIENCE:g} seconds and was stopped"
            report.failed.append(Failure(promise.text, example, "is there a loop that never ends?"))
            report.unchecked = len(promises) - number - 1
            if report.unchecked:
                report.remarks.append(f"{report.unchecked} further promises were not checked")
            break
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the part under test may raise anything, SystemExit too
            report.failed.append(Failure(promise.text, f"it raised {_short(_told(error))}", promise.hint))
        else:
            report.passed.append(promise.text)
    return report


def expect(holds: bool, example: str) -> None:
    """Raise `Violation` with the example unless it holds."""
    if not holds:
        raise Violation(example)


def called(case: str, function: Callable[..., Any], *given: Any) -> Any:
    """What `function` answers; where it raises, the example names the call, `case`."""
    try:
        return function(*given)
    except (KeyboardInterrupt, TookTooLong):
        raise
    except BaseException as error:
        raise Violation(f"{case}: it raised {_told(error)}") from None


def same_number(got: Any, wanted: int, case: str, said: str) -> None:
    """Raise `Violation` unless `got` is the whole number `wanted`; `said` is who says so."""
    number = isinstance(got, Integral) and not isinstance(got, bool)
    note = "" if number or got is None else f"; a {type(got).__name__} is not a whole number (int)"
    note += "; divide with //" if isinstance(got, float) else ""
    expect(number and operator.index(got) == wanted, f"{case}: got {got!r}, {said}{note}")


def whole_number(got: Any, case: str) -> int:
    """`got` as an int; raise `Violation` where it is none, as 2.0 and True are none."""
    if isinstance(got, Integral) and not isinstance(got, bool):
        return operator.index(got)
    kind = "None" if got is None else f"{got!r}, which is a {type(got).__name__}"
    remedy = "; for whole numbers divide with //" if isinstance(got, float) else ""
    raise Violation(f"{case}: got {kind}, not a whole number (int){remedy}")


def name_of(part: Any) -> str:
    """What a part is called in a report, whatever it is."""
    try:
        name = getattr(part, "__name__", None)
        return name if isinstance(name, str) else _short(repr(part), 60)
    except Exception:
        return type(part).__name__


def _told(error: BaseException) -> str:
    """An error's type and text, which may itself fail."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _short(text: str, longest: int = LONGEST) -> str:
    """In one line, the middle left out where it is long."""
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    return f"{line[: longest // 2]} ... ({len(line) - longest} characters left out) ... {line[-(longest // 2) :]}"


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in a block that works for longer than `seconds`, or sleeps for `SLEEP` times as long.

    A timer asks every so often; that takes the main thread, where a notebook's cells run. Elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    worked, passed = time.thread_time() + seconds, time.monotonic() + SLEEP * seconds

    def ask(number: int, frame: object) -> None:
        if time.thread_time() > worked or time.monotonic() > passed:
            raise TookTooLong

    before = signal.signal(signal.SIGALRM, ask)
    pause = min(1.0, seconds / 4)
    running = signal.setitimer(signal.ITIMER_REAL, pause, pause)
    try:
        try:
            yield
        finally:
            worked = passed = math.inf  # from here on the answer is "go on"
    finally:  # in a block of its own, in case the last question came in between
        signal.setitimer(signal.ITIMER_REAL, *running)
        signal.signal(signal.SIGALRM, before)
