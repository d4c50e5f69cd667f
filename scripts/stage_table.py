"""Write the table of stages and parts into ARCHITECTURE.md, from the stages' own `PARTS`.

    python scripts/stage_table.py           rewrite the table
    python scripts/stage_table.py --check   exit with 1 if it is not what the stages say

A cell names the part that a stage brings; an empty one means that the part is the stage before's.
"""

import sys
from dataclasses import fields
from pathlib import Path

from stepengine.diff import DUTIES
from stepengine.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- stage x part: made by scripts/stage_table.py -->", "<!-- end of the table -->"


def table() -> str:
    """The table in Markdown, one row per part that some stage changes, one column per stage or half of one."""
    parts = [stage.parts for stage in STAGES]
    names = [field.name for field in fields(parts[0])]
    rows = []
    for name in sorted(names, key=list(DUTIES).index):
        title, duty = DUTIES[name]
        title = f"`{title}`" if title[0].isupper() else title  # a protocol of core/seams.py
        own = [getattr(part, name) for part in parts]
        changed = [part if at == 0 or part is not own[at - 1] else None for at, part in enumerate(own)]
        cells = [f"`{part.__name__}`" if part is not None else "" for part in changed]
        if any(cells[1:]) or name in ("scheduler", "cache", "attention"):
            rows.append([title, duty, *cells])
    header = ["part", "duty", *(f"stage {stage.name}" for stage in STAGES)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str]) -> int:
    page = ROOT / "ARCHITECTURE.md"
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    wanted = f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    if "--check" in arguments:
        return int(wanted != text)
    page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
