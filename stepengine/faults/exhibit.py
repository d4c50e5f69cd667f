"""One exhibit: a broken part beside the healthy one, the requests that show it, and the contract that catches it."""

import difflib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepengine.contracts import Report
from stepengine.faults.workload import Visit, Workload, play


@dataclass(frozen=True)
class Exhibit:
    """A fault that a real engine once had.

    symptom: what an operator sees. where: what to look at in the trace. choices, answer: the visitor's guess.
    seam: the argument of `LLM` that takes the part. healthy, broken: the two parts; they differ in `method` alone.
    check(part): the contract; promise: the one of its promises that the broken part does not keep.
    threads: public threads about faults of this class, as "owner/repository#number".
    """

    name: str
    symptom: str
    where: str
    choices: tuple[str, ...]
    answer: str
    workload: Workload
    seam: str
    healthy: type
    broken: type
    method: str
    check: Callable[[Any], Report]
    promise: str
    threads: tuple[str, ...] = ()

    def run(self, part: Any = None, model: str | Path | None = None) -> Visit:
        """Run the workload with the broken part, or with `part` in its place."""
        return play(self.workload, model, **{self.seam: self.broken if part is None else part})

    def report(self, part: Any = None) -> Report:
        """What the contract says of the broken part, or of `part`."""
        return self.check(self.broken if part is None else part)

    def catch(self) -> str:
        """The promise that the broken part does not keep, with the smallest example that was found."""
        broken = {failure.promise: failure for failure in self.report().failed}
        return f"{self.promise}\n  {broken[self.promise].example}"

    def diff(self, context: int = 3) -> str:
        """The changed lines of the one method: "-" healthy, "+" broken, with so many lines around them."""
        lines = [_source(part, self.method) for part in (self.healthy, self.broken)]
        return "\n".join(list(difflib.unified_diff(*lines, lineterm="", n=context))[2:])


def _source(part: type, method: str) -> list[str]:
    """The code of a method without its docstring."""
    lines = textwrap.dedent(inspect.getsource(getattr(part, method))).rstrip().splitlines()
    doc = getattr(part, method).__doc__
    if doc is None:
        return lines
    first = next(at for at, line in enumerate(lines) if '"""' in line)
    return lines[:first] + lines[first + doc.count("\n") + 1 :]
