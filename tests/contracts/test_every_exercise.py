"""Every exercise of notebooks 00 to 05, one way for all: statement, stub, check, solution, and the run in the engine.

The checks get what a reader may write on a bad day. They must never raise, never let it pass, and say why.
"""

import ast
import builtins
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stepengine import LLM
from stepengine.contracts import report as reports
from stepengine.contracts.report import Report
from tests.contracts.exercise_book import (
    BOOKS,
    CHAPTERS,
    EXERCISES,
    IN_THE_ENGINE,
    Exercise,
    cells,
    checked,
    exercises_of,
    imports,
    solution_of,
    statements,
    stub_of,
)

every_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=[exercise.name for exercise in EXERCISES])
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
ENGINE_CELLS = {(exercise.book, exercise.number): exercise for exercise in EXERCISES}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-random", stage=0, trace=True)


# --- the notebooks ---------------------------------------------------------------------------------------------


@every_chapter
def test_each_statement_has_a_stub_a_check_and_a_run_in_the_engine(path: Path) -> None:
    found = exercises_of(path)
    assert len(statements(path)) == 2
    assert {exercise.number for exercise in found} == {1, 2}, [exercise.name for exercise in found]


@every_exercise
def test_the_first_sentence_names_symbol_arguments_answer_and_check(exercise: Exercise) -> None:
    said = exercise.statement.split(f"**Exercise {exercise.number}.**")[1]
    first = re.split(r"\.\s", " ".join(said.split()))[0]
    assert exercise.symbol in first and f"{exercise.check}({exercise.symbol}" in first, first
    assert "answer" in first, first
    stub = next(node for node in exercise.stub.tree.body if getattr(node, "name", "") == exercise.symbol)
    if isinstance(stub, ast.FunctionDef):
        arguments = [argument.arg for argument in stub.args.args]
        assert f"{exercise.symbol}({', '.join(arguments)})" in first
        assert all(f"`{name}" in first or "all three are" in first for name in arguments), first


@every_exercise
def test_the_solutions_run_the_same_cell_in_the_engine(exercise: Exercise) -> None:
    solutions = cells(BOOKS / "solutions" / f"{exercise.book}.ipynb")
    assert exercise.engine.source in [cell.source for cell in solutions if IN_THE_ENGINE in cell.tags]
    at = [cell.source for cell in solutions].index(exercise.engine.source)
    assert "assert" in solutions[at + 1].source, "the solutions must prove what the comparison shows"


@pytest.mark.parametrize("exercise", ENGINE_CELLS.values(), ids=[f"{book}-{n}" for book, n in ENGINE_CELLS])
def test_that_cell_needs_nothing_that_only_one_of_the_two_notebooks_has(exercise: Exercise) -> None:
    """Then what CI runs among the solutions runs in the reader's notebook too."""
    tree = exercise.engine.tree
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | exercise.engine.defines
    bound |= {argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args}
    bound |= {node.kwarg.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) and node.kwarg}
    own = {other.symbol for other in EXERCISES if (other.book, other.number) == (exercise.book, exercise.number)}
    taken = {node.id for node in names} - bound - own - {"report", "second", "display"} - set(dir(builtins))
    if exercise.book == "00_naive":
        taken.discard("llm")  # both begin with it
    chapter, solutions = (cells(BOOKS / part / f"{exercise.book}.ipynb") for part in ("", "solutions"))
    for book in (chapter, solutions):
        assert taken <= set(imports(book)), f"{exercise.name}: {sorted(taken - set(imports(book)))} are no imports"
        rebound = {
            node.id
            for cell in book
            if cell.kind == "code"
            for node in ast.walk(cell.tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        assert not taken & rebound, f"{exercise.name}: {sorted(taken & rebound)} may be something else by then"


@every_exercise
def test_the_stub_of_the_notebook_fails_with_an_example_and_a_hint(exercise: Exercise, llm: LLM) -> None:
    _fails(checked(exercise, stub_of(exercise), llm))


@every_exercise
def test_the_worked_solution_passes(exercise: Exercise, llm: LLM) -> None:
    report = checked(exercise, solution_of(exercise), llm)
    assert report.ok, report


# --- what a reader may write on a bad day ----------------------------------------------------------------------


class BadRepr:
    """Nothing can be said of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __str__ = __repr__


class AgreesWithAll:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class BadError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


def recursion(*given: Any) -> Any:
    return recursion(*given)


def raising(error: Any) -> Any:
    def raises(*given: Any) -> Any:
        raise error

    return raises


def spoils(*given: Any) -> None:
    """Changes all that it is given."""
    for thing in given:
        for change in ("clear", "zero_"):
            if hasattr(thing, change):
                getattr(thing, change)()
        for name in list(getattr(thing, "__dict__", {})):
            try:
                setattr(thing, name, None)
            except Exception:
                pass


def prints(*given: Any) -> None:
    for _ in range(1000):
        print("here", given)


ANSWERS: dict[str, Any] = {
    "None": None,
    "a text": "five",
    "a long text": "x" * 10**6,
    "NaN": float("nan"),
    "a negative number": -1,
    "a huge number": 10**30,
    "True": True,
    "an empty list": [],
    "an empty tuple": (),
    "three Nones": (None, None, None),
    "three texts": ("a", "b", "c"),
    "a dict": {},
    "a tensor of a wrong shape": torch.zeros(2, 3, 4),
    "three of them": (torch.zeros(2, 3), torch.zeros(1), torch.zeros(5)),
    "NaN tensors": (torch.full((3,), torch.nan),) * 3,
    "a complex tensor": torch.zeros(1, dtype=torch.complex64),
    "a module": torch,
    "a function": recursion,
    "what agrees with all": AgreesWithAll(),
    "a list of what agrees with all": [AgreesWithAll()] * 6,
    "what cannot be printed": BadRepr(),
}
PARTS: dict[str, Any] = {
    "nothing": None,
    "a number": 3,
    "a text": "def",
    "what cannot be printed": BadRepr(),
    "a class": dict,
    "an instance": object(),
    "no arguments": lambda: 0,
    "one argument": lambda a: 0,
    "nine arguments": lambda a, b, c, d, e, f, g, h, i: 0,
    "recursion": recursion,
    "SystemExit": raising(SystemExit(3)),
    "GeneratorExit": raising(GeneratorExit()),
    "a BaseException": raising(BaseException("base")),
    "AssertionError": raising(AssertionError()),
    "StopIteration": raising(StopIteration()),
    "MemoryError": raising(MemoryError()),
    "an error without a text": raising(BadError()),
    "no error at all": raising("a text"),
    "spoils its arguments": spoils,
    "prints a lot": prints,
    "a generator": lambda *given: (number for number in given),
    "a class without methods": type("Empty", (), {"__init__": lambda self, *given: None}),
}


def _answering(answer: Any) -> Any:
    return lambda *given, **named: answer


def _with_methods(exercise: Exercise, method: Any) -> type:
    """The worked solution, with `method` in the place of every method that the reader's class has."""
    own = [name for name, value in vars(stub_of(exercise)).items() if callable(value) and not name.startswith("__")]
    return type("Hostile", (solution_of(exercise),), dict.fromkeys(own, method))


def _fails(report: Report) -> None:
    assert isinstance(report, Report) and not report.ok, report
    for failure in report.failed:
        assert failure.promise and failure.example.strip() and failure.hint, report
        assert "\n" not in failure.example and len(failure.example) < 900
    shown = str(report)
    assert "example: " in shown and "hint: " in shown and repr(report) == shown


def _is_class(exercise: Exercise) -> bool:
    return isinstance(stub_of(exercise), type)


@every_exercise
@pytest.mark.parametrize("kind", PARTS)
def test_what_is_no_answer_at_all_fails_and_never_raises(exercise: Exercise, kind: str, llm: LLM) -> None:
    _fails(checked(exercise, PARTS[kind], llm))


@every_exercise
def test_answers_of_any_kind_fail_and_never_raise(exercise: Exercise, llm: LLM) -> None:
    for said, answer in ANSWERS.items():
        report = checked(exercise, _answering(answer), llm)
        assert not report.ok, said
        _fails(report)


classes = pytest.mark.parametrize(
    "exercise", [e for e in EXERCISES if _is_class(e)], ids=[e.name for e in EXERCISES if _is_class(e)]
)


@classes
def test_methods_of_any_kind_fail_and_never_raise(exercise: Exercise, llm: LLM) -> None:
    broken = [_answering(answer) for answer in ANSWERS.values()]
    broken += [part for part in PARTS.values() if not isinstance(part, type)]
    for method in broken:
        _fails(checked(exercise, _with_methods(exercise, method), llm))


# --- loops without an end --------------------------------------------------------------------------------------


def endless(*given: Any, **named: Any) -> None:
    while True:
        pass


def endless_and_deaf(*given: Any, **named: Any) -> None:
    while True:
        try:
            for _ in range(1000):
                pass
        except Exception:
            pass


@every_exercise
@pytest.mark.parametrize("loop", [endless, endless_and_deaf])
def test_a_loop_without_an_end_is_stopped(
    exercise: Exercise, loop: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "PATIENCE", 0.3)
    part = _with_methods(exercise, loop) if _is_class(exercise) else loop
    report = checked(exercise, part, llm)
    _fails(report)
    stopped = [failure for failure in report.failed if "still running after 0.3 seconds" in failure.example]
    assert len(stopped) == 1 and report.failed[-1] == stopped[0], report  # what comes after it is not tried
