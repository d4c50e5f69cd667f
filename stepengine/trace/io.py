"""Traces as JSON lines: a header, the requests, the steps. A path that ends in .gz is compressed.

The header names the format, its version and how many lines follow, so a cut file is noticed. Records are
written without the fields that have their default; floats are written in full, so a round trip is exact.
"""

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from stepengine.core.plan import Chunk, Copy, RequestInfo, StepPlan, StepRecord, Swap
from stepengine.errors import TraceError
from stepengine.trace.record import Trace

FORMAT, VERSION = "stepengine-trace", 1


def save(trace: Trace, path: str | os.PathLike[str]) -> Path:
    """Write the trace with its requests' texts; a file at `path` is replaced only once the new one is whole."""
    path = Path(path)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "requests": len(trace.requests),
        "steps": len(trace.steps),
        "meta": trace.meta,
    }
    try:
        lines = [_dumps(header)]
        for request, info in trace.requests.items():
            line: dict[str, Any] = {"request": _slim(info)}
            prompt, pieces = trace.text(request)
            if prompt or pieces:
                line["text"] = [prompt, *pieces]
            lines.append(_dumps(line))
        lines += [_dumps({"step": _slim(record)}) for record in trace.steps]
    except (TypeError, ValueError) as error:
        raise TraceError(f"The trace cannot be written as JSON: {error}.") from error
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as raw, _writer(raw, path) as out:
            for text in lines:
                out.write(text.encode() + b"\n")
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
    return path


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a trace. A file of another format or version, cut or damaged, raises `TraceError` naming the line."""
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"There is no trace file {path}; save one with stepengine.trace.save(trace, path).")
    lines = _lines(path)
    _, header = next(lines, (0, None))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f"{path}, line 1: not a trace: the header does not name the format {FORMAT!r}.")
    if header.get("version") != VERSION:
        raise TraceError(
            f"{path}, line 1: trace format {header.get('version')!r}, but this version of stepengine reads "
            f"format {VERSION}; record the run again or install the matching version."
        )
    requests, steps, meta = header.get("requests"), header.get("steps"), header.get("meta")
    if not (isinstance(requests, int) and isinstance(steps, int) and isinstance(meta, dict)):
        raise TraceError(f"{path}, line 1: the header lacks its counts of requests and steps or its meta data.")
    trace = Trace(meta)
    number = 1
    for number, line in lines:
        try:
            if number <= 1 + requests:
                info = _request(line["request"])
                if info.id in trace.requests:
                    raise TraceError(f"request {info.id} arrives twice")
                trace.add_request(info)
                if "text" in line:
                    prompt, *pieces = (_typed(piece, str) for piece in _typed(line["text"], list))
                    trace.texts[info.id] = (prompt, tuple(pieces))
            elif number <= 1 + requests + steps:
                trace.append(_step(line["step"]))
            else:
                raise TraceError(f"the header announces {requests + steps} lines after it, here is one more")
        except (TraceError, KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {number}: not a line of a trace ({error}).") from error
    if number != 1 + requests + steps:
        raise TraceError(
            f"{path}, line {number}: the file is cut here; its header announces {requests} requests and {steps} steps, "
            f"{1 + requests + steps} lines in all."
        )
    return trace


def _writer(raw: IO[bytes], path: Path) -> IO[bytes]:
    # no name and no time in the gzip header: the same trace gives the same bytes
    return gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    raise TraceError(f"{path}, line {number}: the file is cut within this line.")
                yield number, json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}, line {number}: not JSON ({error}).") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path}, line {number + 1}: the compressed data are cut or damaged ({error}).") from error


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _slim(record: NamedTuple) -> dict[str, Any]:
    """Fields without those at their default; chunks as lists, which are most of a file."""
    defaults = record._field_defaults
    result: dict[str, Any] = {}
    for name, value in record._asdict().items():
        if name in defaults and value == defaults[name]:
            continue
        if isinstance(value, StepPlan):
            value = _slim(value)
        elif name == "chunks":
            value = [_trimmed(chunk) for chunk in value]
        result[name] = value
    return result


def _trimmed(chunk: Chunk) -> list[Any]:
    values = list(chunk)
    names = Chunk._fields
    while names[len(values) - 1] in Chunk._field_defaults and (
        values[-1] == Chunk._field_defaults[names[len(values) - 1]]
    ):
        values.pop()
    return values


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r:.40}")
    return value


def _ints(value: Any) -> tuple[int, ...]:
    return tuple(_typed(item, int) for item in _typed(value, list))


def _time(value: Any) -> float:
    return float(_typed(value, int)) if type(value) is int else _typed(value, float)


def _pairs(value: Any, second: type) -> tuple[tuple[int, Any], ...]:
    return tuple((_typed(a, int), _typed(b, second)) for a, b in _typed(value, list))


def _chunk(value: Any) -> Chunk:
    request, start, length, *rest = _typed(value, list)
    if len(rest) > 3:
        raise ValueError(f"a chunk has at most 6 fields, found {3 + len(rest)}")
    if rest:
        rest[0] = _ints(rest[0])
    return Chunk(*(_typed(n, int) for n in (request, start, length)), *rest[:1], *(_typed(n, int) for n in rest[1:]))


def _swaps(value: Any) -> tuple[Swap, ...]:
    return tuple(Swap(_typed(request, int), _pairs(pairs, int)) for request, pairs in _typed(value, list))


READ_PLAN = {
    "step": lambda v: _typed(v, int),
    "chunks": lambda v: tuple(_chunk(c) for c in _typed(v, list)),
    "arrived": _ints,
    "preempted": _ints,
    "swapped_out": _swaps,
    "swapped_in": _swaps,
    "copies": lambda v: tuple(Copy(*_ints(c)) for c in _typed(v, list)),
    "evicted": _ints,
    "blocked": lambda v: _typed(v, str),
}
READ_STEP = {
    "plan": lambda v: StepPlan(**_read(v, READ_PLAN)),
    "token_ids": _ints,
    "finished": lambda v: _pairs(v, str),
    "aborted": lambda v: _pairs(v, str),
    "forked": lambda v: _pairs(v, int),
    "t_plan": _time,
    "t_run": _time,
    "t_done": _time,
    "t_launched": _time,
    "t_landed": _time,
    "device_began": _time,
    "device_ended": _time,
    "replayed": lambda v: _typed(v, int),
}
READ_REQUEST = {
    "id": lambda v: _typed(v, int),
    "prompt_ids": _ints,
    "max_tokens": lambda v: _typed(v, int),
    "priority": lambda v: _typed(v, int),
    "group": lambda v: _typed(v, int),
    "sample": lambda v: _typed(v, int),
    "t_arrived": _time,
    "cache_salt": lambda v: _typed(v, str),
}


def _read(value: Any, readers: dict[str, Any]) -> dict[str, Any]:
    fields = _typed(value, dict)
    unknown = fields.keys() - readers.keys()
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    return {name: readers[name](item) for name, item in fields.items()}


def _request(value: Any) -> RequestInfo:
    return RequestInfo(**_read(value, READ_REQUEST))


def _step(value: Any) -> StepRecord:
    record = StepRecord(**_read(value, READ_STEP))
    if len(record.token_ids) != len(record.plan.chunks):
        raise ValueError(f"{len(record.plan.chunks)} chunks but {len(record.token_ids)} token ids")
    return record
