"""The cache of converted models: built aside under a lock, checked by a manifest, put in place by one rename."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock  # comes with torch, which requires it

from stepengine.errors import ModelError

MANIFEST = "stepengine.json"  # written last: a folder without it was never finished


def home() -> Path:
    """Where models are kept: `$STEPENGINE_HOME`, else `stepengine` in the platform's user cache."""
    if given := os.environ.get("STEPENGINE_HOME"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "stepengine"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "stepengine"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepengine"


def folder_of(name: str) -> Path:
    """The folder of the catalogue model `name`, whether or not it is there yet."""
    return home() / "models" / name


def is_whole(folder: Path, recipe: str) -> bool:
    """True if `folder` was finished by `recipe` and each of its files still has the size written down then."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["recipe"] == recipe and all(
            (folder / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def cached(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """The whole folder of model `name`, made by `build(empty folder)` if it is missing, broken or of another recipe.

    Of several processes one builds and the others wait for it. Raises `ModelError` where the cache cannot be written.
    """
    folder = folder_of(name)
    if is_whole(folder, recipe):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not is_whole(folder, recipe):  # another process may have built it meanwhile
                _build(folder, recipe, build)
    except OSError as error:
        raise ModelError(
            f"The model cache {folder.parent} cannot be written ({error}); "
            "free some space there or point STEPENGINE_HOME at another folder."
        ) from error
    return folder


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, recipe: str, build: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.building-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a process that died; the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        fresh = aside / folder.name
        fresh.mkdir()
        build(fresh)
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(fresh.iterdir())}
        manifest = {"name": folder.name, "recipe": recipe, "files": files}
        written = fresh / MANIFEST
        written.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in files:  # safetensors writes for the owner only; a shared cache needs the usual rights
            (fresh / name).chmod(written.stat().st_mode)
        if folder.exists():
            folder.rename(aside / "old")
        fresh.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
