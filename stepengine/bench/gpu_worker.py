"""Each part of the GPU suite in a process of its own: what one breaks, hangs in or leaves in memory ends with it."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepengine.bench.gpu_setup import Setup


@dataclass(frozen=True)
class Part:
    """`run` yields (name, what was found) as it goes on; `least_s` of time left make a start worthwhile,

    and at `most_s` it is ended, with what it has found until then.
    """

    name: str
    run: Callable[[Setup], Iterator[tuple[str, Any]]]
    least_s: float
    most_s: float

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


def execute(part: Part, setup: Setup, method: str) -> dict[str, Any]:
    """Run a part in a process started by `method` ("fork" or "spawn"): {"status", "seconds", "results", ...}.

    Status: "ok"; "failed", with "error" and "where"; "cut" at `setup.until`. Results survive all of them.
    """
    path, log = setup.work / "part.json", setup.work / "part.log"
    path.unlink(missing_ok=True)
    began = time.time()
    process = multiprocessing.get_context(method).Process(target=_work, args=(part, setup, path, log))
    process.start()
    process.join(max(1.0, setup.until - began))
    cut = process.is_alive()
    _end(process)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": {}}
    if found.pop("done", False):
        status = "failed" if "error" in found else "ok"
    elif cut:
        status, found["error"] = "cut", f"not at its end after {time.time() - began:.0f} s; what it had found is kept"
    else:
        status, found["error"] = "failed", f"its process ended with status {process.exitcode}"
    if status != "ok" and log.exists():
        print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr, flush=True)
    return {"status": status, "seconds": time.time() - began, **found}


def _end(process: Any) -> None:
    """End the process and whatever it has started; what began as its group ends as its group."""
    if process.pid is not None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join()


def _work(part: Part, setup: Setup, path: Path, log: Path) -> None:
    """In the process: everything printed goes to `log`, results to `path`, anew after each."""
    if hasattr(os, "setsid"):
        os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    found: dict[str, Any] = {"results": {}}
    try:
        for name, result in part.run(setup):
            found["results"][name] = result
            write(path, found)
    except BaseException as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        found["error"] = f"{type(error).__name__}: {str(error)[:600]}"
        found["where"] = f"{Path(last.filename).name}, line {last.lineno}"
    found["done"] = True
    write(path, found)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and processes that a library has left behind are not waited for


def write(path: Path, value: Any) -> None:
    """Write plain data as JSON, whole or not at all; numbers that JSON does not have become null."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(_plain(value), indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
