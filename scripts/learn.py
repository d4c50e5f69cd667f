"""Give the reader own copies of the notebooks in learn/, without outputs, and open JupyterLab on them.

    python scripts/learn.py [--no-lab] [JupyterLab's arguments]

A copy that is still as it was written follows its notebook; one that the reader has changed is left alone, for good.
Which is which is known by the hashes in learn/.manifest.json.
"""

import os
import sys
from pathlib import Path

from stepengine.handouts import blank_copy, companions, refresh

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "stepengine", "language": "python", "name": "stepengine"}


def copy_notebooks(source: Path, target: Path) -> list[str]:
    """Bring the copies in `target` up to date with the notebooks in `source`; the lines to tell the reader."""
    copies = {path.name: blank_copy(path, KERNEL) for path in sorted(source.glob("*.ipynb"))}
    told = refresh(copies, target, remedy="rename it to get a fresh copy beside it")
    for path in companions(source):  # reached from the copies under the same name
        link = target / path.name
        if not os.path.lexists(link):
            link.symlink_to(os.path.relpath(path, target), target_is_directory=path.is_dir())
    return told


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
