"""Run every check that the project has, all of them even if one fails; exit status 1 if any did.

The tests come last, so that pytest's summary line closes the output.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m"
WORKERS = min(4, os.cpu_count() or 1)
PARALLEL = ["-n", str(WORKERS), "--dist", "loadfile"]
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "nbval_sanitize.cfg", "--nbval-cell-timeout", "180"]


def checks() -> dict[str, list[str]]:
    """Each check's name and the arguments after `python -m`."""
    listed = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy"],
    }
    folders = [name for name in ("notebooks", "notebooks/solutions") if any((ROOT / name).glob("*.ipynb"))]
    if folders:
        # made once and kept: notebooks that need it at the same time would wait for one another
        listed["quantised model"] = ["stepengine", "generate", MODEL, "Hello", "--stage", "5", "--max-tokens", "1"]
        listed["notebooks"] = ["pytest", *NBVAL, *PARALLEL, "-q", *[str(p) for n in folders for p in notebooks(n)]]
    listed["browser"] = ["pytest", "-n", str(WORKERS), "--dist", "loadgroup", "-q", "tests/browser"]
    listed["tests"] = ["pytest", *PARALLEL, "tests", "--ignore", "tests/browser"]
    return listed


def notebooks(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob("*.ipynb"))


def main() -> int:
    # the workers share the cores: one thread each, or they wait for one another
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // WORKERS)), "TOKENIZERS_PARALLELISM": "false"}
    failed = []
    for name, arguments in checks().items():
        print(f"-- {name}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=os.environ | threads, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            failed.append(name)
        if name != "tests":
            print(f"   {'failed' if done.returncode else 'passed'} after {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
