"""JupyterLab over copies of the notebooks, and pages that are watched for errors."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.browser.lab import Lab
from tests.browser.notebook import Notebook
from tests.browser.watch import Watch

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: a file stays together, with its server; the notebooks are shared out."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    for number, item in enumerate(ours):
        share = f" {number % 2}" if item.path.stem == "test_notebooks" else ""
        item.add_marker(pytest.mark.xdist_group(item.path.stem + share))


@pytest.fixture(scope="session")
def copies() -> Callable[[Path], list[Path]]:
    """copies(folder) -> the reader's blank copies of all notebooks, made there as `make learn` makes them."""
    learn = script("learn")

    def make(folder: Path) -> list[Path]:
        learn.copy_notebooks(ROOT / "notebooks", folder)
        return sorted(folder.glob("*.ipynb"))

    return make


def script(name: str) -> ModuleType:
    """One of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lab(chromium: Any, copies: Callable[[Path], list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One server for a module, over fresh copies of the notebooks; ended whatever happens."""
    scratch = tmp_path_factory.mktemp("lab")
    (scratch / "learn").mkdir()
    copies(scratch / "learn")
    server = Lab(scratch / "learn", scratch)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def pages(chromium: Any) -> Iterator[Callable[..., tuple[Any, Watch]]]:
    """pages(width=1280, height=900, dark=False) -> a fresh page and its watch; any problem on it fails the test."""
    opened = []

    def make(width: int = 1280, height: int = 900, dark: bool = False) -> tuple[Any, Watch]:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        watch = Watch(context)
        opened.append((context, watch))
        return context.new_page(), watch

    yield make
    problems = []
    for context, watch in opened:
        context.close()
        problems += watch.problems()
    assert problems == []


@pytest.fixture
def notebook(lab: Lab, pages: Callable[..., tuple[Any, Watch]]) -> Iterator[Callable[..., Notebook]]:
    """notebook("00_naive.ipynb") -> it, open in JupyterLab; its kernel ends with the test, so only one runs."""

    def make(name: str, **view: Any) -> Notebook:
        page, watch = pages(**view)
        return Notebook(page, lab, name, watch)

    yield make
    lab.end_kernels()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go: the folder that STEPENGINE_SHOTS names, else a temporary one."""
    named = os.environ.get("STEPENGINE_SHOTS")
    folder = Path(named).resolve() if named else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
