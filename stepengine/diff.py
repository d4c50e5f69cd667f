"""`stage_diff`: the parts that changed from one stage to another, from the stages' compositions and the files."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from stepengine.core.seams import Parts
from stepengine.errors import InvalidSetting
from stepengine.stages import STAGES, Stage, find_stage
from stepengine.viz.stage_diff import PartDiff, Source, StageDiff

PACKAGE = Path(__file__).parent
DUTIES = {
    "scheduler": ("Scheduler", "what runs in this step"),
    "cache": ("KVCache", "where K/V live; no tensors"),
    "block_pool": ("BlockPool", "which blocks are free, who shares them"),
    "attention": ("AttentionBackend", "stores k and v, attends"),
    "block_size": ("block size", "tokens per block of K/V storage"),
    "prepare_model": ("model", "what becomes of the linear layers"),
}


def stage_diff(
    a: int | str, b: int | str | None = None, part: str | None = None, method: str | None = None
) -> StageDiff:
    """The parts that differ between stages `a` and `b`, side by side, changed lines marked.

    Stages as `LLM(stage=)` takes them. Without `b`: a half stage against the whole one, a whole one against the
    next. `part` is one of the parts' names ("scheduler", "cache", ...), `method` looks at one method of the classes
    alone; a side that has none stays empty. A class is shown with its whole file, a function by itself. Raises
    InvalidSetting for what does not exist.
    """
    before = find_stage(a)
    after = find_stage(b) if b is not None else _next(before)
    named = {field.name: DUTIES.get(field.name, (field.name, "")) for field in fields(Parts)}
    chosen = [_named(part)] if part is not None else sorted(named, key=[*DUTIES, *named].index)
    sides = {name: (getattr(before.parts, name), getattr(after.parts, name)) for name in chosen}
    changed = {name: pair for name, pair in sides.items() if pair[0] is not pair[1]}
    found = []
    for name, pair in changed.items():
        old, new = (_source(each, method) for each in pair)
        if method is None or old != new:
            found.append(PartDiff(name, *named[name], old, new))
    if method is not None:
        _check_method(method, list(sides.values()))
        found = [each for each in found if each.old is not None or each.new is not None]
    shown = {each.field for each in found}
    both = (name for name, (old, new) in sides.items() if name not in shown and (old is not None or new is not None))
    same = tuple(named[name][0] for name in both) if part is None else ()
    looked_at = ", ".join(filter(None, [named[chosen[0]][0] if part is not None else "", method]))
    beside = () if method is not None else _beside([new for _, new in changed.values() if new is not None])
    return StageDiff(before.name, after.name, tuple(found), same, beside, looked_at)


def _next(stage: Stage) -> Stage:
    """A half stage's whole one, or the whole stage after a whole one."""
    whole = find_stage(stage.number)
    if stage is not whole:
        return whole
    if stage is STAGES[-1]:
        raise InvalidSetting(f"Stage {stage.name} is the last one: name the stage to compare it with as well.")
    return find_stage(stage.number + 1)


def _named(part: str) -> str:
    for name, (title, _) in DUTIES.items():
        if str(part).casefold().replace(" ", "_") in (name, title.casefold().replace(" ", "_")):
            return name
    raise InvalidSetting(f"part is {part!r}; the parts are {', '.join(DUTIES)}.")


def _plain(part: Any) -> Any:
    return part.func if isinstance(part, partial) else part


def _source(part: Any, method: str | None) -> Source | None:
    """A class's file, a function's own lines, or one method's; None where there is nothing."""
    part = _plain(part)
    if part is None:
        return None
    if method is not None:
        owner, part = part, inspect.unwrap(getattr(part, method, None) or (lambda: None))
        if not isinstance(part, FunctionType) or part.__name__ == "<lambda>":
            return None
        return _function(part, f"{owner.__name__}.{method}")
    if isinstance(part, type):
        path = Path(inspect.getsourcefile(part) or "")
        return Source(part.__name__, _where(path), tuple(path.read_text(encoding="utf-8").splitlines()))
    return _function(part, part.__name__)


def _function(function: Callable[..., Any], name: str) -> Source:
    lines, first = inspect.getsourcelines(function)
    where = _where(Path(inspect.getsourcefile(function) or ""))
    return Source(name, where, tuple(line.rstrip("\n") for line in lines), first)


def _where(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


def _check_method(method: str, pairs: list[tuple[Any, Any]]) -> None:
    classes = {each for pair in pairs for each in map(_plain, pair) if isinstance(each, type)}
    if not any(callable(getattr(each, method, None)) for each in classes):
        known = sorted({name for each in classes for name in dir(each) if not name.startswith("_")})
        raise InvalidSetting(f"method is {method!r}, which no part has; they have {', '.join(known) or 'none'}.")


def _beside(parts: list[Any]) -> tuple[tuple[str, int], ...]:
    """Modules of their own folder that changed parts import, and these in turn: (file, lines)."""
    files = {_plain(part): Path(inspect.getsourcefile(_plain(part)) or "") for part in parts}
    found = {path for path in files.values() if path.name != "engine.py"}  # a composition imports every part
    left = sorted(found)
    while left:
        path = left.pop()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and path.parent.name in node.module.split("."):
                for name in (node.module.split(".")[-1], *(alias.name for alias in node.names)):
                    other = path.parent / f"{name}.py"
                    if other.is_file() and other not in found:
                        found.add(other)
                        left.append(other)
    # Of a function the rest of its file is not shown, so the file is listed, too.
    whole = {path for part, path in files.items() if isinstance(part, type)}
    rest = sorted(path for path in found - whole if path.parent.name != "model")
    return tuple((_where(path), len(path.read_text(encoding="utf-8").splitlines())) for path in rest)
