"""Checkpoints, engines and the browser that more than one folder of tests asks for."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.chromium import FLAGS, find
from stepengine import LLM
from stepengine.model.tiny import random_checkpoint, tiny_config


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices this small are computed faster by one thread than handed out to several on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(family, seed=0, **config) -> folder of a random model, written once a session."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", seed: int = 0, **config: Any) -> Path:
        key = f"{family} {seed} {sorted(config.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = random_checkpoint(tiny_config(family, **config), folder, seed)
        return made[key]

    return make


@pytest.fixture
def tiny(checkpoint: Callable[..., Path]) -> Callable[..., LLM]:
    """tiny(**settings) -> a fresh LLM on one tiny random model: 64 positions, 4 places, unless told otherwise."""

    def make(**settings: Any) -> LLM:
        return LLM(**{"model": checkpoint(), "max_model_len": 64, "max_num_seqs": 4, "trace": True, **settings})

    return make


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The default model's tokenizer, read from the cache that the set-up fills."""
    from transformers import AutoTokenizer

    from stepengine.model.catalog import resolve

    return AutoTokenizer.from_pretrained(resolve("smollm2-135m"), local_files_only=True)


@pytest.fixture
def texts(checkpoint: Callable[..., Path], smollm2_tokenizer: Any) -> Callable[..., LLM]:
    """texts(**settings) -> a fresh LLM with the default model's tokenizer and tiny random weights."""
    folder = checkpoint(vocab_size=len(smollm2_tokenizer), hidden_size=32)
    smollm2_tokenizer.save_pretrained(folder)

    def make(**settings: Any) -> LLM:
        return LLM(**{"model": folder, "max_model_len": 96, "max_num_seqs": 4, "trace": True, **settings})

    return make


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium: the system's, else playwright's own. Without one the test is skipped, with the reason;
    where `make test-browser` asks for it, it fails."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        miss("needs the Python package playwright")
    found = find()
    if found is None:
        miss("needs a Chromium on the PATH, or playwright's own")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


def miss(reason: str) -> None:
    """Skip with the reason; fail where `make test-browser` asked for a browser."""
    remedy = f"{reason}; `make test-browser` says how to install it"
    if os.environ.get("STEPENGINE_BROWSER") == "required":
        pytest.fail(remedy, pytrace=False)
    pytest.skip(remedy)
