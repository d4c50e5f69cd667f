"""Timing on a machine that others use too: arms alternate, medians are compared, the machine is written down."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import stepengine


@dataclass(frozen=True)
class Paired:
    """What `alternate` measured: {arm: one value per round}; round i of all arms ran back to back."""

    values: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.values.values())))

    def median(self, arm: str) -> float:
        return median(self.values[arm])

    def ratio(self, over: str, under: str) -> "Ratio":
        """`over` / `under` round by round: drifts that outlast a round cancel."""
        return Ratio.of([a / b for a, b in zip(self.values[over], self.values[under], strict=True)])


@dataclass(frozen=True)
class Ratio:
    """A ratio over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> "Ratio":
        return cls(median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f}, {self.rounds} rounds)"


def alternate(
    arms: Mapping[str, Callable[[], float | None]],
    rounds: int,
    warmup: int = 1,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    told: Callable[[str], None] | None = None,
) -> Paired:
    """Run A B A B ...; what each arm returns is its value, or its seconds where it returns None.

    `warmup` rounds are not counted. No round begins once `budget_s` seconds have passed, but one is
    always measured. `told` is called with the arm's name after each run.
    """
    values: dict[str, list[float]] = {name: [] for name in arms}
    began = clock()
    for turn in range(warmup + max(1, rounds)):
        late = budget_s is not None and clock() - began > budget_s
        if late and turn > warmup:
            break
        for name, arm in arms.items():
            start = clock()
            value = arm()
            seconds = clock() - start
            if turn >= warmup:
                values[name].append(seconds if value is None else value)
            if told is not None:
                told(name)
    return Paired(values)


def machine() -> dict[str, Any]:
    """What a result must say about where it was measured; plain data."""
    import torch

    versions = {"stepengine": stepengine.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "os": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True, timeout=5
        )
        return found.stdout.strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, "+" appended where files differ from it; None outside a checkout."""
    root = Path(stepengine.__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "stepengine")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    return None
