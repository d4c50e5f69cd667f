"""scripts/setup.py: what it decides, with pip and the driver replaced by recorders at the process boundary."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def _answers(monkeypatch: pytest.MonkeyPatch, script: ModuleType, offered: dict[str, str]) -> list[list[str]]:
    """`pip index versions` answers by index url ("" is pip's own sources); the commands asked are recorded."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        url = command[command.index("--index-url") + 1] if "--index-url" in command else ""
        known = offered.get(url)
        text = f"torch ({known})\nAvailable versions: {known}\n" if known else ""
        return SimpleNamespace(returncode=0 if known else 1, stdout=text, stderr="")

    monkeypatch.setattr(script.subprocess, "run", run)
    return asked


def test_pip_s_own_sources_are_asked_first(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answers(monkeypatch, setup_script, {"": "2.15.0, 2.13.0+cpu, 2.13.0"})
    assert setup_script.cpu_torch_source({}) == []
    assert len(asked) == 1


def test_then_the_index_of_cpu_builds(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answers(monkeypatch, setup_script, {"": "2.13.0", "https://mirror/cpu": "2.13.0+cpu"})
    assert setup_script.cpu_torch_source({"TORCH_INDEX": "https://mirror/cpu"}) == ["--index-url", "https://mirror/cpu"]
    assert "--retries" in asked[1] and "--timeout" in asked[1], "an unreachable index must fail over quickly"


@pytest.mark.parametrize("offered", ["2.13.0", "2.13.0+cu130", "12.13.0+cpu", None])
def test_else_the_plain_pin(
    setup_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offered: str | None,
) -> None:
    _answers(monkeypatch, setup_script, {"": "2.13.0", "https://mirror/cpu": offered} if offered else {})
    assert setup_script.cpu_torch_source({"TORCH_INDEX": "https://mirror/cpu"}) is None
    assert "TORCH_INDEX" in capsys.readouterr().out


@pytest.mark.parametrize("environment", [{"PIP_NO_INDEX": "1"}, {"TORCH_INDEX": ""}])
def test_no_index_is_asked_offline_or_when_it_is_empty(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    asked = _answers(monkeypatch, setup_script, {})
    assert setup_script.cpu_torch_source(environment) is None
    assert len(asked) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CUDA builds to avoid")
@pytest.mark.parametrize(
    ("choice", "gpu", "expected"), [("", True, False), ("", False, True), ("cpu", True, True), ("cuda", False, False)]
)
def test_the_cpu_build_is_wanted_without_a_gpu(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str, gpu: bool, expected: bool
) -> None:
    monkeypatch.setenv("STEPENGINE_TORCH", choice)
    monkeypatch.setattr(setup_script, "has_nvidia_gpu", lambda: gpu)
    assert setup_script.wants_cpu_torch() is expected


@pytest.mark.parametrize(("listed", "expected"), [("GPU 0: NVIDIA A100 (UUID: x)\n", True), ("", False)])
def test_the_driver_is_asked_for_gpus(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str, expected: bool
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(setup_script.glob, "glob", lambda pattern: [])
    assert setup_script.has_nvidia_gpu() is expected


def test_an_offline_folder_becomes_pip_s_only_source(setup_script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "wheels of the class"
    folder.mkdir()
    with pytest.raises(setup_script.SetupError, match="holds no wheels; fill the folder with `make wheels DIR="):
        setup_script.pip_environment(str(folder))
    (folder / "a-1-py3-none-any.whl").touch()
    environment = setup_script.pip_environment(str(folder))
    assert environment["PIP_NO_INDEX"] == "1" and environment["PIP_FIND_LINKS"] == folder.as_uri()


def test_another_pin_or_python_or_torch_means_another_set_up(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(setup_script, "ROOT", tmp_path)
    monkeypatch.delenv("STEPENGINE_TORCH", raising=False)
    seen = {setup_script.fingerprint()}
    assert setup_script.fingerprint() in seen
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("b")
        seen.add(setup_script.fingerprint())
    monkeypatch.setattr(setup_script.sys, "version_info", (3, 99, 0))
    seen.add(setup_script.fingerprint())
    monkeypatch.setenv("STEPENGINE_TORCH", "cuda")
    seen.add(setup_script.fingerprint())
    assert len(seen) == 5


def test_a_failing_command_ends_in_a_sentence_after_its_own_words(
    setup_script: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "print('no such wheel'); raise SystemExit(3)"]
    with pytest.raises(setup_script.SetupError, match="goes on from here"):
        setup_script.run(command, {})
    assert "no such wheel" in capfd.readouterr().err


def test_the_sizes_printed_beforehand_add_up(setup_script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    without, with_torch = setup_script.sizes(False), setup_script.sizes(True)
    assert sum(without.values()) > sum(with_torch.values()) > 0
    setup_script.announce({"a": 1, "b": 2})
    assert "about 3 MB" in capsys.readouterr().out


def _venv(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[str]]:
    """A set-up in `folder` whose pip calls are only recorded, with an interpreter that is there."""
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    commands: list[list[str]] = []
    monkeypatch.setattr(script, "VENV", venv)
    monkeypatch.setattr(script, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(script, "make_venv", lambda: None)
    monkeypatch.setattr(script, "wants_cpu_torch", lambda: False)
    monkeypatch.setattr(script, "run", lambda command, environment: commands.append(command))
    return commands


def _installed(commands: list[list[str]]) -> str:
    return " ".join(word for command in commands if "install" in command for word in command)


def test_a_plain_set_up_leaves_the_extras_out_and_a_later_one_only_adds(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = _venv(setup_script, monkeypatch, tmp_path)
    setup_script.prepare({}, set())
    said = _installed(commands)
    assert "notebooks" in said and "sphinx" not in said and "playwright" not in said
    assert "[" in said and "site" not in said.partition("[")[2].partition("]")[0].split(",")
    plain = capsys.readouterr().out

    commands.clear()
    setup_script.prepare({}, {"site"})
    (command,) = commands
    assert any(word.startswith("sphinx") for word in command)
    assert "--editable" not in command and not any("playwright" in word for word in command)
    assert f"about {setup_script.EXTRAS['site']} MB" in capsys.readouterr().out
    assert "the extra" not in plain

    commands.clear()
    for extras in (set(), {"site"}):  # `make learn`, and `make site` again
        setup_script.prepare({}, extras)
    assert commands == []


def test_new_pins_keep_the_extras_that_are_there(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = _venv(setup_script, monkeypatch, tmp_path)
    setup_script.prepare({}, {"site"})
    monkeypatch.setattr(setup_script, "fingerprint", lambda: "other pins\n")
    commands.clear()
    setup_script.prepare({}, set())
    groups = _installed(commands).partition("[")[2].partition("]")[0].split(",")
    assert "site" in groups and "browser" not in groups
    commands.clear()
    setup_script.prepare({}, {"site"})
    assert commands == []


def test_an_interrupted_addition_is_done_again(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = _venv(setup_script, monkeypatch, tmp_path)
    setup_script.prepare({}, set())

    def fails(command: list[str], environment: dict[str, str]) -> None:
        raise setup_script.SetupError("the network went away")

    monkeypatch.setattr(setup_script, "run", fails)
    with pytest.raises(setup_script.SetupError):
        setup_script.prepare({}, {"browser"})
    monkeypatch.setattr(setup_script, "run", lambda command, environment: commands.append(command))
    commands.clear()
    setup_script.prepare({}, {"browser"})
    assert "playwright" in _installed(commands)


def _ci(tmp_path: Path, *tools: str) -> tuple[list[str], int]:
    """.ci/run with a PATH of recorders: the commands that it called, and its exit status."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "tools").mkdir()
    said = tmp_path / "said"
    said.touch()
    for name in tools:
        tool = tmp_path / "tools" / name
        status = 100 if name == "apt-get" else 0
        tool.write_text(f'#!/bin/bash\necho "{name} $*" >> "{said}"\n{CI_TOOLS.get(name, "")}\nexit {status}\n')
        tool.chmod(0o755)
    for name in ("bash", "dirname", "env"):
        (tmp_path / "tools" / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [str(root / ".ci/run")], env={"PATH": str(tmp_path / "tools")}, capture_output=True, stdin=subprocess.DEVNULL
    )
    return said.read_text().splitlines(), done.returncode


CI_TOOLS = {"id": "echo 0", "timeout": 'shift; exec "$@"'}


def test_ci_runs_make_test(tmp_path: Path) -> None:
    assert _ci(tmp_path, "make", "chromium") == (["make test"], 0)


def test_ci_may_fail_to_get_a_browser(tmp_path: Path) -> None:
    said, status = _ci(tmp_path, "make", "id", "timeout", "apt-get")
    assert "apt-get -qq update" in said and said[-1] == "make test" and status == 0


def test_ci_asks_for_no_browser_without_apt(tmp_path: Path) -> None:
    said, status = _ci(tmp_path, "make", "id")
    assert said[-1] == "make test" and status == 0
