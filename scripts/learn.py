"""Give the reader own copies of the notebooks in learn/, without outputs, and open JupyterLab on them.

    python scripts/learn.py [--no-lab] [JupyterLab's arguments]

A copy that is still as it was written follows its notebook; one that the reader has changed is left alone, for good.
Which is which is known by the hashes in learn/.manifest.json.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "stepengine", "language": "python", "name": "stepengine"}
MANIFEST = ".manifest.json"
NOT_COMPANIONS = {"solutions", "conftest.py"}


def copy_notebooks(source: Path, target: Path) -> list[str]:
    """Bring the copies in `target` up to date with the notebooks in `source`; the lines to tell the reader."""
    target.mkdir(parents=True, exist_ok=True)
    written, told = _manifest(target), []
    for path in sorted(source.glob("*.ipynb")):
        blank, copy = blank_copy(path), target / path.name
        before = written.get(path.name)
        now = _hash(copy.read_bytes()) if copy.is_file() else None
        if now == _hash(blank):
            written[path.name] = now
        elif now is None or now == before:
            _write(copy, blank)
            written[path.name] = _hash(blank)
            if now is not None:
                told.append(f"{copy.name}: refreshed, the notebook has changed and your copy had not")
        else:
            told.append(f"{copy.name}: left as you changed it (rename it to get a fresh copy beside it)")
    for name in sorted(set(written) - {path.name for path in source.glob("*.ipynb")}):
        copy = target / name
        if copy.is_file() and _hash(copy.read_bytes()) == written[name]:
            copy.unlink()
            told.append(f"{name}: removed, the notebook is gone and your copy was unchanged")
        del written[name]
    _link_companions(source, target)
    _write(target / MANIFEST, json.dumps(written, indent=1, sort_keys=True).encode() + b"\n")
    return told


def blank_copy(path: Path) -> bytes:
    """The notebook at `path` without outputs, execution counts and widget state, on the kernel of the set-up."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    return (nbformat.writes(notebook) + "\n").encode("utf-8")


def _manifest(target: Path) -> dict[str, str]:
    """Hash of each copy as it was written. Unreadable means unknown: then every differing copy counts as changed."""
    try:
        found = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _link_companions(source: Path, target: Path) -> None:
    """What notebooks read beside them (traces, pictures) is reached from the copies under the same name."""
    for path in source.iterdir():
        hidden = path.name.startswith((".", "_"))
        link = target / path.name
        if hidden or path.suffix == ".ipynb" or path.name in NOT_COMPANIONS or os.path.lexists(link):
            continue
        link.symlink_to(os.path.relpath(path, target), target_is_directory=path.is_dir())


def _write(path: Path, content: bytes) -> None:
    """Write aside and rename: an interrupted run leaves the old file or the new one."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(aside, 0o644)
    os.replace(aside, path)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def has_display(environment: dict[str, str], platform: str) -> bool:
    """Whether a browser can be opened from here."""
    if environment.get("SSH_CONNECTION") and not environment.get("DISPLAY"):
        return False
    return platform == "darwin" or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def lab_arguments(target: Path, environment: dict[str, str], platform: str, root: bool) -> list[str]:
    """JupyterLab's arguments: the folder it shows, and no browser where there is no display."""
    arguments = [f"--ServerApp.root_dir={target}"]
    if not has_display(environment, platform):
        arguments.append("--no-browser")
    if root:
        arguments.append("--allow-root")
    return arguments


def main(argv: list[str]) -> int:
    target = ROOT / "learn"
    for line in copy_notebooks(ROOT / "notebooks", target):
        print(f"learn/{line}")
    if "--no-lab" in argv:
        return 0
    count = len(list(target.glob("*.ipynb")))
    print(
        f"learn/: {count} notebooks, yours to change. JupyterLab prints its address below; Ctrl-C ends it.", flush=True
    )
    arguments = lab_arguments(target, dict(os.environ), sys.platform, root=hasattr(os, "geteuid") and os.geteuid() == 0)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *arguments, *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
