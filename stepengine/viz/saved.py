"""A widget as one self-contained page, which plays in any browser without a kernel or a network."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepengine.errors import InvalidSetting

STATIC = Path(__file__).parent / "static"
EXPORT = "export default { render };"


def read_static(names: Sequence[str]) -> str:
    """Scripts or style sheets of `static/`, in this order, as one."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)


def write_page(path: str | Path, title: str, script: str, css: str, traits: Mapping[str, Any]) -> Path:
    """Write the page; a file at `path` is replaced. InvalidSetting where the folder is missing or not writable."""
    target = Path(path)
    if EXPORT not in script:
        raise InvalidSetting(f"The player's script lacks {EXPORT!r}: reinstall the package.")
    parts = {
        "{{title}}": title.replace("&", "&amp;").replace("<", "&lt;"),
        "{{css}}": css,
        "{{traits}}": json.dumps(dict(traits), ensure_ascii=False).replace("<", "\\u003c"),
        "{{script}}": script.replace(EXPORT, ""),
    }
    page = (STATIC / "page.html").read_text(encoding="utf-8")
    filled = re.sub(r"\{\{\w+\}\}", lambda mark: parts[mark.group()], page)  # one pass: texts may hold marks too
    if not target.parent.is_dir():
        raise InvalidSetting(f"There is no folder {target.parent} to write {target.name} to: make it, or name another.")
    try:
        target.write_text(filled, encoding="utf-8")
    except OSError as error:
        raise InvalidSetting(f"{target} cannot be written ({error.strerror}): name another file.") from error
    return target
