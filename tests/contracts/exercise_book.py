"""The exercises of the notebooks, read from the notebooks themselves, so that a new one cannot be forgotten."""

import ast
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

BOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHAPTERS = sorted(BOOKS.glob("0[0-5]*.ipynb"))
IN_THE_ENGINE = "in-the-engine"  # the tag of the cell that runs the reader's part beside ours


@dataclass(frozen=True)
class Cell:
    kind: str
    source: str
    tags: tuple[str, ...]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def defines(self) -> set[str]:
        """Functions and classes at the top of a code cell."""
        return {node.name for node in self.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    def checks(self) -> list[tuple[str, str]]:
        """(check, symbol) for each `check_...(symbol, ...)` in a code cell."""
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id.startswith("check_")]
        return [
            (call.func.id, call.args[0].id)  # type: ignore[attr-defined]
            for call in named
            if call.args and isinstance(call.args[0], ast.Name)
        ]


@dataclass(frozen=True)
class Exercise:
    """One symbol that the reader writes: statement, stub, check, and the cell that runs it in the engine."""

    book: str
    number: int
    symbol: str
    check: str
    statement: str
    stub: Cell = field(repr=False)
    check_cell: Cell = field(repr=False)
    engine: Cell = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.book}-{self.symbol}"


@cache
def cells(path: Path) -> tuple[Cell, ...]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return tuple(
        Cell(cell["cell_type"], "".join(cell["source"]), tuple(cell["metadata"].get("tags", [])))
        for cell in notebook["cells"]
    )


def statements(path: Path) -> list[int]:
    """The cells that state an exercise."""
    return [at for at, cell in enumerate(cells(path)) if re.search(r"\*\*Exercise \d", cell.source)]


def exercises_of(path: Path) -> list[Exercise]:
    book, found = cells(path), []
    starts = statements(path)
    for number, (at, end) in enumerate(zip(starts, [*starts[1:], len(book)], strict=True), 1):
        code = [cell for cell in book[at:end] if cell.kind == "code"]
        engine = next((cell for cell in code if IN_THE_ENGINE in cell.tags), None)
        for cell in code:
            for check, symbol in cell.checks():
                stub = next((before for before in code if symbol in before.defines), None)
                if stub is not None and engine is not None:
                    found.append(Exercise(path.stem, number, symbol, check, book[at].source, stub, cell, engine))
    return found


EXERCISES = [exercise for path in CHAPTERS for exercise in exercises_of(path)]


def imports(book: tuple[Cell, ...]) -> dict[str, Any]:
    """What a notebook imports, and nothing that it runs."""
    space: dict[str, Any] = {"__name__": "notebook"}
    for cell in book:
        if cell.kind == "code":
            nodes = [node for node in cell.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(nodes, []), "imports", "exec"), space)
    return space


def stub_of(exercise: Exercise) -> Any:
    """The notebook's own stub."""
    space = imports(cells(BOOKS / f"{exercise.book}.ipynb"))
    exec(compile(exercise.stub.tree, "stub", "exec"), space)
    return space[exercise.symbol]


def solution_of(exercise: Exercise) -> Any:
    """What the solutions notebook defines under this name, first."""
    book = cells(BOOKS / "solutions" / f"{exercise.book}.ipynb")
    space = imports(book)
    for cell in book:
        if cell.kind != "code":
            continue
        kept = [node for node in cell.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        exec(compile(ast.Module(kept, []), "solution", "exec"), space)
        if exercise.symbol in cell.defines:
            return space[exercise.symbol]
    raise AssertionError(f"the solutions of {exercise.book} define no {exercise.symbol}")


def no_kernel(cases: Any) -> list[int]:
    """In place of the interpreter, which takes long: for what fails anyway."""
    from stepengine.errors import StepEngineError

    raise StepEngineError("The kernel was left out.")


def checked(exercise: Exercise, part: Any, llm: Any, quick: bool = True) -> Any:
    """The report on `part`, by the call that stands in the notebook."""
    space = imports(cells(BOOKS / f"{exercise.book}.ipynb"))
    space |= {"llm": llm, exercise.symbol: part}
    if quick and "kernel_bytes" in space:
        space["kernel_bytes"] = no_kernel
    call = next(
        node
        for node in ast.walk(exercise.check_cell.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id, getattr(node.args[0] if node.args else None, "id", "")) == (exercise.check, exercise.symbol)
    )
    with mock.patch("builtins.print"):  # a part that prints without end is not this test's business
        return eval(compile(ast.Expression(call), "check", "eval"), space)
