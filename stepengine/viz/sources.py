"""What a player can be given: a trace, a saved one, or an engine that records one."""

from pathlib import Path
from typing import Any, NamedTuple

from stepengine.errors import InvalidSetting
from stepengine.trace import Trace, load


class Source(NamedTuple):
    """A trace, and the engine that goes on recording it, where there is one."""

    trace: Trace
    engine: Any = None  # a `stepengine.core.engine.Engine`
    name: str = ""  # how a cell would call the engine


def source_of(given: Any) -> Source:
    """The trace behind a Trace, a path, an LLM or an engine. InvalidSetting for anything else; TraceError of `load`."""
    if isinstance(given, Trace):
        return Source(given)
    if isinstance(given, str | Path):
        return Source(load(given))
    engine, name = (given.engine, "llm.engine") if hasattr(given, "engine") else (given, "engine")
    if not all(hasattr(engine, part) for part in ("advance", "has_unfinished", "recorder")):
        raise InvalidSetting(
            f"What was given is of type {type(given).__name__}, which cannot be played: give a Trace, the path of a "
            f"saved one, an LLM or an engine."
        )
    if not isinstance(engine.recorder, Trace):
        raise InvalidSetting(
            f"This {type(given).__name__} records nothing (trace is off), so there is nothing to show; make it with "
            f"LLM(..., trace=True)."
        )
    return Source(engine.recorder, engine, name)
