"""Copies of the notebooks for readers and for hand-outs: blank, refreshed while untouched, never written over.

What a reader is to find out is not in them: no outputs, no guesses, no worked solutions. `make learn` and
`stepengine strip-solutions` both copy with these functions.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

from stepengine.errors import InvalidSetting

MANIFEST = ".manifest.json"
NOT_COMPANIONS = {"solutions", "conftest.py"}
Kernel = Mapping[str, str]


def strip_solutions(folder: Path, out: Path, answers: bool = True, force: bool = False) -> list[str]:
    """Write blank copies of `folder`'s notebooks, and what they read, to `out`; the lines to tell.

    Without outputs, guesses and solutions; with `answers=False` also without what to say when asked. A copy that was
    changed since it was written stays, unless `force`. Raises InvalidSetting, before anything is written, where there
    are no notebooks, where `out` lies in `folder`, and where an exercise holds its worked solution.
    """
    books = sorted(folder.glob("*.ipynb"))
    if not books:
        raise InvalidSetting(f"{folder} holds no notebooks: name the folder of the series, such as notebooks.")
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise InvalidSetting(f"{out} lies in {folder}, which the copies are made from: name a folder outside of it.")
    if out.exists() and not out.is_dir():
        raise InvalidSetting(f"{out} is a file: name a folder to write the copies to.")
    if solved := [line for book in books for line in solved_exercises(book, folder / "solutions" / book.name)]:
        raise InvalidSetting(f"{'; '.join(solved)}: put the stub back first (from the project's notebooks folder).")
    copies = {book.name: blank_copy(book, answers=answers) for book in books}
    try:
        told = refresh(copies, out, remedy="--force overwrites it", force=force)
        for companion in companions(folder):
            copy = shutil.copytree if companion.is_dir() else shutil.copy2
            if not (out / companion.name).exists():
                copy(companion, out / companion.name)
    except OSError as error:
        raise InvalidSetting(f"{out} cannot be written ({error.strerror}): name another folder.") from error
    return told


# -- one notebook -----------------------------------------------------------------------------------------------------


def blank_copy(path: Path, kernel: Kernel | None = None, answers: bool = True) -> bytes:
    """The notebook at `path` without outputs, counts, widget state and guesses; on `kernel`, where one is given."""
    notebook = _notebook(path)
    if not answers:
        notebook.cells = [cell for cell in notebook.cells if not _says(cell)]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count, cell.source = [], None, unanswered(cell.source)
    notebook.metadata.pop("widgets", None)
    if kernel is not None:
        notebook.metadata["kernelspec"] = dict(kernel)
    return (nbformat.writes(notebook) + "\n").encode("utf-8")


def unanswered(source: str) -> str:
    """The cell with `guess=None` wherever `.ask(key, question, guess)` has a guess."""
    lines = source.encode("utf-8").splitlines(keepends=True)  # Python counts columns in bytes
    for call in reversed(list(_calls(source, "ask"))):
        guess = call.args[2] if len(call.args) > 2 else next((k.value for k in call.keywords if k.arg == "guess"), None)
        if guess is None or isinstance(guess, ast.Constant) and guess.value is None:
            continue
        first, last = guess.lineno - 1, (guess.end_lineno or guess.lineno) - 1
        tail = lines[last][guess.end_col_offset or 0 :]
        lines[first : last + 1] = [lines[first][: guess.col_offset] + b"None" + tail]
    return b"".join(lines).decode("utf-8")


def solved_exercises(book: Path, solutions: Path) -> list[str]:
    """Where a symbol that a check looks at is written as in the worked solutions: notebook, cell and symbol."""
    if not solutions.is_file():
        return []
    worked = {name: text for _, name, text in _definitions(_notebook(solutions))}
    notebook = _notebook(book)
    checked = set(re.findall(r"\bcheck_\w+\(\s*(\w+)", "\n".join(c.source for c in notebook.cells)))
    return [
        f"{book.name}, cell {number}, holds the worked solution of {name}"
        for number, name, text in _definitions(notebook)
        if name in checked and worked.get(name) == text
    ]


def _definitions(notebook: Any) -> Iterator[tuple[int, str, str]]:
    """Functions and classes of the code cells: cell, name, and the code whatever its layout and comments."""
    for number, cell in enumerate(notebook.cells):
        for node in _parsed(cell.source).body if cell.cell_type == "code" else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield number, node.name, ast.dump(node)


def _says(cell: Any) -> bool:
    """Whether the cell is an answer for an interview: a call of `lesson.say`."""
    return cell.cell_type == "code" and any(True for _ in _calls(cell.source, "say"))


def _calls(source: str, name: str) -> Iterator[ast.Call]:
    """Calls of `name(...)` or `something.name(...)`, in the order of the text."""
    found = [node for node in ast.walk(_parsed(source)) if isinstance(node, ast.Call)]
    named = [call for call in found if name in (getattr(call.func, "attr", None), getattr(call.func, "id", None))]
    yield from sorted(named, key=lambda call: (call.lineno, call.col_offset))


def _parsed(source: str) -> ast.Module:
    """The cell's code; empty where it is no plain Python, such as a magic."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def _notebook(path: Path) -> Any:
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises what its JSON and its schema raise
        raise InvalidSetting(f"{path} cannot be read as a notebook ({error}): restore it, or move it away.") from error


# -- a folder of copies -----------------------------------------------------------------------------------------------


def refresh(copies: Mapping[str, bytes], target: Path, remedy: str, force: bool = False) -> list[str]:
    """Bring the files in `target` up to date; the lines to tell. Which ones were changed is known by their hashes.

    A file that is still as it was written follows; one that was changed stays, unless `force`, and `remedy` says how
    to get it anew. A file that is no longer among `copies` goes, if it was not changed.
    """
    target.mkdir(parents=True, exist_ok=True)
    written, told = _manifest(target), []
    for name, content in copies.items():
        copy = target / name
        before, now = written.get(name), _hash(copy.read_bytes()) if copy.is_file() else None
        if now == _hash(content):
            written[name] = now
        elif now is None or now == before or force:
            _write(copy, content)
            written[name] = _hash(content)
            if now is not None:
                changed = (
                    "overwritten" if now != before else "refreshed, the notebook has changed and your copy had not"
                )
                told.append(f"{name}: {changed}")
        else:
            told.append(f"{name}: left as you changed it ({remedy})")
    for name in sorted(set(written) - set(copies)):
        copy = target / name
        if copy.is_file() and _hash(copy.read_bytes()) == written[name]:
            copy.unlink()
            told.append(f"{name}: removed, the notebook is gone and your copy was unchanged")
        del written[name]
    _write(target / MANIFEST, json.dumps(written, indent=1, sort_keys=True).encode() + b"\n")
    return told


def companions(source: Path) -> list[Path]:
    """What notebooks read beside them, such as traces and pictures."""
    beside = [path for path in sorted(source.iterdir()) if not path.name.startswith((".", "_"))]
    return [path for path in beside if path.suffix != ".ipynb" and path.name not in NOT_COMPANIONS]


def _manifest(target: Path) -> dict[str, str]:
    """Hash of each copy as it was written. Unreadable means unknown: then every differing copy counts as changed."""
    try:
        found = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _write(path: Path, content: bytes) -> None:
    """Write aside and rename: an interrupted run leaves the old file or the new one."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(aside, 0o644)
    os.replace(aside, path)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
