"""What the READMEs tell people to type works: targets exist, commands parse, the quick ones and the Python run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
SLOW = {"ladder", "bench"}  # only --help of these: they measure for minutes


def _readme(name: str) -> str:
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _shell_lines(text: str) -> list[str]:
    lines = [line.strip() for block in _blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _make_commands() -> list[str]:
    found = set()
    for name in READMES:
        text = _readme(name)
        found |= {line for line in _shell_lines(text) if line.startswith("make ")}
        found |= set(re.findall(r"`(make [^`]+)`", text))
    return sorted(found)


def _engine_blocks() -> list[list[str]]:
    """Arguments of the `stepengine ...` lines, block by block; the folder that a command was typed in is taken off."""
    blocks = {block for name in READMES for block in _blocks(_readme(name), "sh")}
    found = [re.findall(r"^(?:\S*/)?stepengine\s+(.*)", block, re.MULTILINE) for block in sorted(blocks)]
    return [arguments for arguments in found if arguments]


def _python_blocks() -> list[str]:
    return [block for name in READMES for block in _blocks(_readme(name), "python")]


def _run(command: list[str], folder: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


@pytest.mark.parametrize("name", READMES)
def test_the_readme_names_the_two_commands(name: str) -> None:
    assert (ROOT / name).is_file(), f"{name} is missing: it must give `make learn` and `make test` in ```sh blocks"
    assert {"make learn", "make test"} <= set(_shell_lines(_readme(name)))


def test_the_readme_shows_python() -> None:
    assert _python_blocks(), "README.md must hold a ```python block that runs as it stands"


@pytest.mark.parametrize("command", _make_commands())
def test_each_make_command_has_its_target(command: str, tmp_path: Path) -> None:
    target, *variables = shlex.split(command)[1:]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command_line = ["make", "--dry-run", "--directory", str(ROOT), target, *variables]
    done = subprocess.run(command_line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("block", _engine_blocks(), ids=lambda block: block[0].split()[0])
def test_the_engine_commands_of_a_block_work_one_after_the_other(block: list[str], tmp_path: Path) -> None:
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    for arguments in block:
        words = shlex.split(arguments)
        is_quick = words[0] not in SLOW or "--help" in words
        done = _run([sys.executable, "-m", "stepengine", *(words if is_quick else [words[0], "--help"])], tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), arguments


@pytest.mark.parametrize("block", _python_blocks(), ids=lambda block: block.split("\n")[0][:40])
def test_each_python_block_runs(block: str, tmp_path: Path) -> None:
    done = _run([sys.executable, "-c", block], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "a snippet in a README should print something"


@pytest.mark.parametrize("name", READMES)
def test_each_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", _readme(name))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    done = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True)
    listed = set(re.findall(r"^  make ([\w-]+)", done.stdout, re.MULTILINE))
    assert listed == set(phony.split()) - {"python"}
