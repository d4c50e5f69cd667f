"""What a check says: what passed, and the first thing that failed with its smallest example and a hint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Violation(Exception):
    """A contract is broken; the message is the example that shows it."""


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

    @property
    def ok(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        total = len(self.passed) + len(self.failed)
        lines = [f"{self.name}: {len(self.passed)} of {total} promises hold"]
        lines += [f"  ok    {text}" for text in self.passed]
        for failure in self.failed:
            lines.append(f"  FAIL  {failure.promise}")
            lines.append(f"        example: {failure.example}")
            lines.append(f"        hint: {failure.hint}")
        return "\n".join(lines + [f"  note  {text}" for text in self.remarks])

    __repr__ = __str__


def run_promises(name: str, promises: Sequence[Promise]) -> Report:
    """Check all promises in order; later ones are still checked after a failure."""
    report = Report(name)
    for promise in promises:
        try:
            promise.check()
        except Violation as broken:
            report.failed.append(Failure(promise.text, str(broken), promise.hint))
        except Exception as error:  # the part under test may raise anything
            example = f"it raised {type(error).__name__}: {error}"
            report.failed.append(Failure(promise.text, example, promise.hint))
        else:
            report.passed.append(promise.text)
    return report


def expect(holds: bool, example: str) -> None:
    """Raise `Violation` with the example unless it holds."""
    if not holds:
        raise Violation(example)
