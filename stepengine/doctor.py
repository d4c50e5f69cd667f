"""What this machine has, and what will therefore run how. Nothing here needs more than the standard library."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

MINIMUM_PYTHON = "3.11"
# Read with the package's own requirements, so that pyproject.toml stays the only place that names them.
REQUIRED = ("torch", "numpy", "transformers", "safetensors", "tqdm", "triton")
OPTIONAL = {
    "gguf": "the default model's conversion",
    "jupyterlab": "the notebooks",
    "ipywidgets": "the notebooks' widgets",
    "anywidget": "the notebooks' widgets",
    "plotly": "figures",
    "typer": "the command line",
    "rich": "the command line's tables",
}


@dataclass(frozen=True)
class Package:
    """One package: its version here (None: missing), the least that will do, and whether that is met."""

    name: str
    version: str | None
    minimum: str | None
    needed_for: str
    required: bool

    @property
    def ok(self) -> bool:
        if self.version is None:
            return not self.required
        return self.minimum is None or _numbers(self.version) >= _numbers(self.minimum)


@dataclass(frozen=True)
class Torch:
    """The build of torch that is installed: "cpu", "cuda 13.0", ..., and the GPUs it can use."""

    build: str
    gpus: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """All that was found. Sizes in bytes."""

    system: str
    python: str
    packages: list[Package]
    torch: Torch | None
    driver: str | None
    cores: int
    memory: int | None
    memory_free: int | None
    cache: str | None
    models: list[dict[str, Any]]
    runs: list[str]
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        packages = [vars(package) | {"ok": package.ok} for package in self.packages]
        return vars(self) | {"packages": packages, "torch": vars(self.torch) if self.torch else None}


def examine() -> Report:
    """Look at this machine. Fetches nothing, and finds its way with any package missing."""
    packages = _packages()
    torch, driver = _torch(), _driver()
    cache, models = _models()
    memory, free = _memory()
    return Report(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=packages,
        torch=torch,
        driver=driver,
        cores=_cores(),
        memory=memory,
        memory_free=free,
        cache=cache,
        models=models,
        runs=_runs(torch, packages),
        problems=_problems(packages, torch, driver),
    )


def _packages() -> list[Package]:
    minimums = _minimums()
    found = [
        Package(name, _version(name), minimums.get(name), "the engine", required=True)
        for name in REQUIRED
        if name != "triton" or sys.platform == "linux"
    ]
    return found + [
        Package(name, _version(name), minimums.get(name), use, required=False) for name, use in OPTIONAL.items()
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        module = sys.modules.get(name)
        return getattr(module, "__version__", None)


def _minimums() -> dict[str, str]:
    """Package -> lowest version, from stepengine's own metadata or, in a bare checkout, its pyproject.toml."""
    listed: list[str] = []
    try:
        listed = metadata.requires("stepengine") or []
    except metadata.PackageNotFoundError:
        path = Path(__file__).resolve().parents[1] / "pyproject.toml"
        if path.is_file() and sys.version_info >= (3, 11):
            import tomllib

            project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
            listed = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    found = (re.match(r"([\w.-]+)[^;]*?>=\s*([\d.]+)", requirement) for requirement in listed)
    return {match[1].lower(): match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0); what follows the numbers (rc, dev, local part) does not count."""
    head = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in head[0].split(".")] if head else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _torch() -> Torch | None:
    try:
        import torch
    except ModuleNotFoundError as error:
        return None if error.name == "torch" else Torch("broken", error=_first_line(error))
    except Exception as error:  # a broken installation raises whatever its libraries raise
        return Torch("broken", error=_first_line(error))
    if torch.version.cuda:
        build = f"cuda {torch.version.cuda}"
    else:
        build = f"rocm {torch.version.hip}" if torch.version.hip else "cpu"
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return Torch(build, [_gpu(torch, index) for index in range(count)])
    except Exception as error:
        return Torch(build, error=_first_line(error))


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory": total,
        "memory_free": free,
    }


def _driver() -> str | None:
    """What the NVIDIA driver calls the GPUs, whatever torch says; None without a driver."""
    for command in ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi"):
        try:
            query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
            listed = subprocess.run(query, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if listed.returncode == 0 and listed.stdout.strip():
            return "; ".join(listed.stdout.strip().splitlines())
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[int | None, int | None]:
    """Total and free memory in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (OSError, ValueError, AttributeError):
        return None, None


def _models() -> tuple[str | None, list[dict[str, Any]]]:
    """The cache folder and what of the catalogue is in it; nothing where the model code cannot be imported."""
    try:
        from stepengine.model.catalog import entries
        from stepengine.model.store import home

        listed = [{"name": e.name, "cached": e.cached, "size": e.size, "download": e.download} for e in entries()]
        return str(home()), listed
    except ImportError:
        return None, []


def _runs(torch: Torch | None, packages: list[Package]) -> list[str]:
    """What runs how on this machine, a sentence each."""
    if torch is None or torch.build == "broken":
        return ["nothing yet: torch does not import"]
    try:
        from stepengine.stages import STAGES

        stages = "stages " + ", ".join(stage.name for stage in STAGES)
    except ImportError:
        stages = "every stage"
    lines = [f"{stages}: on the CPU, in fp32 (device='cpu', the default)"]
    if torch.gpus:
        major = int(torch.gpus[0]["compute_capability"].split(".")[0])
        dtypes = "bf16, fp16 or fp32" if major >= 8 else "fp16 or fp32 (this GPU has no bf16 units)"
        lines.append(f"{stages}: on the GPU, in {dtypes} (device='cuda')")
    if any(package.name == "triton" and package.version for package in packages):
        where = "compiled for the GPU" if torch.gpus else "in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)"
        lines.append(f"Triton kernels: {where}")
    else:
        lines.append("Triton kernels: not at all, there is no Triton here")
    return lines


def _problems(packages: list[Package], torch: Torch | None, driver: str | None) -> list[str]:
    """What is wrong, and what to do about it, a sentence each."""
    found = []
    if _numbers(platform.python_version()) < _numbers(MINIMUM_PYTHON):
        found.append(f"Python {platform.python_version()} is older than {MINIMUM_PYTHON}; install a newer one.")
    for package in packages:
        if package.version is None and package.required:
            found.append(f"{package.name} is missing; install it with `make setup` or `pip install {package.name}`.")
        elif not package.ok:
            found.append(
                f"{package.name} {package.version} is older than {package.minimum}; "
                f"update it with `pip install '{package.name}>={package.minimum}'`."
            )
    if torch is None and any(package.name == "torch" and package.version for package in packages):
        found.append("torch is installed but cannot be imported; install it again with `make clean setup`.")
    elif torch is not None and torch.error:
        found.append(f"torch: {torch.error}.")
    if driver and torch is not None and torch.build == "cpu":
        found.append(
            f"The driver sees {driver}, but this torch is a CPU build; `make setup STEPENGINE_TORCH=cuda` exchanges it."
        )
    elif driver and torch is not None and not torch.gpus:
        found.append(
            f"The driver sees {driver}, but torch ({torch.build}) does not; the driver may be older than that CUDA, "
            "or CUDA_VISIBLE_DEVICES hides the GPU."
        )
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def as_text(report: Report) -> str:
    """The report as aligned plain text."""
    lines = [_row("system", report.system), _row("Python", f"{report.python} (at least {MINIMUM_PYTHON})")]
    for package in report.packages:
        lines.append(_row(package.name, _package_text(package, report.torch)))
    lines += [
        _row("GPU", _gpu_text(report)),
        _row("CPU", f"{report.cores} cores for this process"),
        _row("memory", _memory_text(report)),
        _row("models", report.cache or "the model code cannot be imported"),
    ]
    for model in report.models:
        if model["cached"]:
            lines.append(_row("", f"{model['name']}: here, {_bytes(model['size'])}"))
        elif model["download"]:
            lines.append(_row("", f"{model['name']}: not here yet, {_bytes(model['download'])} to download"))
    lines += ["", "What runs how", *(f"  {line}" for line in report.runs)]
    lines += ["", "To repair", *(f"  {line}" for line in report.problems or ["nothing"])]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"{name:<14}{value}"


def _package_text(package: Package, torch: Torch | None) -> str:
    least = f" (at least {package.minimum})" if package.minimum else ""
    if package.version is None:
        return f"missing; needed for {package.needed_for}"
    build = f", {torch.build} build" if package.name == "torch" and torch else ""
    return f"{package.version}{build}{least}" + ("" if package.ok else ": too old")


def _gpu_text(report: Report) -> str:
    gpus = report.torch.gpus if report.torch else []
    if not gpus:
        return f"none that torch can use (the driver sees {report.driver})" if report.driver else "none"
    return "; ".join(
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} SMs, "
        f"{_bytes(gpu['memory_free'])} of {_bytes(gpu['memory'])} free"
        for gpu in gpus
    )


def _memory_text(report: Report) -> str:
    if report.memory is None:
        return "unknown"
    free = f"{_bytes(report.memory_free)} free of " if report.memory_free is not None else ""
    return f"{free}{_bytes(report.memory)}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
