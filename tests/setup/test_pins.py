"""pyproject.toml, constraints.txt, environment.yml and what is installed say the same."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"pytorch": "torch"}
# "core, model, the stages and bench need nothing but" these: an addition here is a decision, not a detail.
ASKED_FOR = {"site", "browser"}
CORE = {"torch", "numpy", "transformers", "safetensors", "tqdm", "triton"}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _direct(for_readers: bool = False) -> list[Requirement]:
    """What pyproject.toml lists; for readers without the groups that single targets ask for."""
    project = _project()
    groups = project["optional-dependencies"].items()
    listed = [text for name, group in groups for text in group if not (for_readers and name in ASKED_FOR)]
    return [Requirement(text) for text in project["dependencies"] + listed]


def _names(group: str) -> list[str]:
    return [Requirement(text).name for text in _project()["optional-dependencies"][group]]


def _is_installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def _pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line]
    pins = {}
    for requirement in parsed:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is no exact pin"
        assert "+" not in specifier.version, f"{requirement} names one build of the package"
        assert canonicalize_name(requirement.name) not in pins, f"{requirement.name} is pinned twice"
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def _environment() -> tuple[dict[str, str], list[str]]:
    """Conda's part as name -> specifier, and pip's lines."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = dict((line.split(" ", 1) + [""])[:2] for line in listed if isinstance(line, str))
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    return conda, pip


@pytest.mark.parametrize("requirement", _direct(), ids=str)
def test_each_direct_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    pin = _pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt lacks {requirement.name}"
    assert requirement.specifier.contains(pin), f"{requirement} does not allow its pin {pin}"


def test_the_core_needs_six_packages_only() -> None:
    assert {Requirement(text).name for text in _project()["dependencies"]} == CORE


def test_environment_names_every_direct_dependency_with_its_pin() -> None:
    conda, pip = _environment()
    pins = _pins()
    assert "-e ." in pip
    by_pip = [Requirement(line) for line in pip if not line.startswith("-")]
    named = {canonicalize_name(CONDA_NAMES.get(name, name)): text for name, text in conda.items()}
    python, _ = named.pop("python"), named.pop("pip")
    assert SpecifierSet(python).contains("3.11.0") and SpecifierSet(_project()["requires-python"]).contains("3.11.0")
    found = {name: text.removeprefix("=") for name, text in named.items()}
    for requirement in by_pip:
        found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    direct = {canonicalize_name(requirement.name) for requirement in _direct(for_readers=True)}
    assert found == {name: pins[name] for name in direct}
    markers = {canonicalize_name(r.name): str(r.marker).replace("'", '"') for r in _direct() if r.marker}
    assert {canonicalize_name(r.name): str(r.marker).replace("'", '"') for r in by_pip if r.marker} == markers


def test_what_is_installed_meets_the_ranges() -> None:
    asked_for = {name for group in ASKED_FOR for name in _names(group) if not _is_installed(name)}
    for requirement in _direct():
        if requirement.name in asked_for:
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            version = Version(metadata.version(requirement.name)).public
            assert requirement.specifier.contains(version), f"{requirement.name} {version} is outside {requirement}"


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that `make setup` makes")
def test_setup_installs_the_pins_and_nothing_unpinned() -> None:
    pins = _pins() | {"stepengine": metadata.version("stepengine")}
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version).public for d in metadata.distributions()}
    installed.pop("pip", None)
    assert {name: version for name, version in installed.items() if pins.get(name) != version} == {}


def test_setup_knows_the_groups_that_are_asked_for(setup_script: ModuleType) -> None:
    assert set(setup_script.EXTRAS) == ASKED_FOR <= set(_project()["optional-dependencies"])


def test_minimums_hold_the_promised_versions() -> None:
    lowest = {r.name: r.specifier for r in _direct() if r.name in CORE}
    for name, version in {"torch": "2.10.0", "triton": "3.5.0", "transformers": "5.10.0"}.items():
        assert lowest[name].contains(version), f"{name} {version} must be allowed, the range is {lowest[name]}"
    assert _project()["requires-python"] == ">=3.11"
    assert re.search(r"^torch==2\.13\.0$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
