"""Names of models -> folders on this machine: the catalogue, local folders, and ids of the Hugging Face hub."""

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepengine.errors import DownloadError, ModelError
from stepengine.model import smollm, store
from stepengine.model.tiny import FAMILIES, random_checkpoint, tiny_config

DEFAULT_MODEL = "smollm2-135m"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_SKIPPED = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue. `size` is what it takes on disk, `download` what is fetched, in bytes."""

    name: str
    description: str
    size: int
    download: int
    cached: bool
    folder: Path


@dataclass(frozen=True)
class _Model:
    description: str
    size: int
    download: int
    recipe: str
    build: Callable[[Path], None]


def _tiny(family: str) -> _Model:
    def build(folder: Path) -> None:
        random_checkpoint(tiny_config(family), folder, seed=0)

    text = f"random weights of the {family} family, made on the spot; no tokenizer, token-id prompts only"
    return _Model(text, 560_000, 0, f"tiny-random-{family}/1", build)


def _models() -> dict[str, _Model]:
    default = _Model(
        "SmolLM2-135M-Instruct (Apache-2.0), weights that have been through 4 bits once: "
        "fine for learning, not the original's quality",
        smollm.CONVERTED_BYTES,
        smollm.WHEEL_BYTES,
        smollm.RECIPE,
        smollm.build,
    )
    tiny = {"tiny-random" if family == "llama" else f"tiny-random-{family}": _tiny(family) for family in FAMILIES}
    return {DEFAULT_MODEL: default, **tiny}


def entries() -> list[Entry]:
    """The catalogue, and what of it is on this machine already. Fetches nothing."""
    return [
        Entry(
            name=name,
            description=model.description,
            size=model.size,
            download=model.download,
            cached=store.is_whole(store.folder_of(name), model.recipe),
            folder=store.folder_of(name),
        )
        for name, model in _models().items()
    ]


def resolve(name: str | Path) -> Path:
    """The folder of a model: a catalogue name, a local folder, or a hub id ("org/name"), fetched if need be.

    A local folder called like a catalogue name is reached as "./name". Raises `DownloadError` for what cannot be
    fetched, `ModelError` for a name that is nothing of the three.
    """
    text, models = str(name), _models()
    if text in models:
        return store.cached(text, models[text].recipe, models[text].build)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{path} is a file; give the folder that holds config.json and the weights.")
    if _HUB_ID.fullmatch(text) and not text.startswith("."):
        return _from_hub(text)
    if os.sep in text or "/" in text or isinstance(name, Path):
        raise ModelError(f"Model folder {path} does not exist; give an existing folder, or a name of the catalogue.")
    close = difflib.get_close_matches(text, models, n=3, cutoff=0.4) or list(models)
    raise ModelError(
        f"Model {text!r} is unknown; did you mean {' or '.join(close)}? "
        "A local folder or a hub id (org/name) works, too."
    )


def _from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED))
    except Exception as error:  # the hub's client, its HTTP library and the disk each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DownloadError(
            f"{repo} could not be fetched from the model hub ({reason}); check the id and the network "
            "(HF_ENDPOINT names a mirror, HF_TOKEN opens gated models), or give a local folder."
        ) from error
