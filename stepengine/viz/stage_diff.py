"""Two stages' parts side by side, changed lines marked. Plain text in, HTML out; `stepengine.diff` finds the files."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

STATIC = Path(__file__).parent / "static"
ALIKE = 0.5  # share of words from which on two lines count as one that was changed
CONTEXT = 3  # unchanged lines that stay visible beside a change
SHORT = 3  # fewer unchanged lines than this are not worth a click
SAME, CHANGED, REMOVED, ADDED = " ", "~", "-", "+"
KINDS = {SAME: "", CHANGED: "c", REMOVED: "r", ADDED: "a"}  # classes in the markup
WORDS = re.compile(r"\w+|[^\w\s]")


class Source(NamedTuple):
    """Lines of a file: all of it, or one function. `first` is the number of the first, counted from 1."""

    name: str  # the part's own name, such as PagedScheduler
    where: str  # the file, from the package on
    lines: tuple[str, ...]
    first: int = 1


class Row(NamedTuple):
    """One line of each side, by its place in `Source.lines`; None where the other side has no such line."""

    sign: str
    old: int | None
    new: int | None


@dataclass(frozen=True)
class PartDiff:
    """One part in two stages. `old` is None where the part is new, `new` where it is gone."""

    field: str  # of `Parts`
    title: str
    duty: str
    old: Source | None
    new: Source | None

    @cached_property
    def rows(self) -> list[Row]:
        """Every line of both sides once, in order."""
        return list(_rows(self.old.lines if self.old else (), self.new.lines if self.new else ()))

    def count(self, sign: str) -> int:
        """Rows with this sign: "~" changed, "-" removed, "+" added, " " the same."""
        return sum(row.sign == sign for row in self.rows)

    @property
    def size(self) -> str:
        """Such as "88 -> 220 lines"."""
        if self.old is None or self.new is None:
            only = self.old or self.new
            return f"{'new' if self.old is None else 'gone'}, {len(only.lines) if only else 0} lines"
        return f"{len(self.old.lines)} -> {len(self.new.lines)} lines"

    @property
    def names(self) -> str:
        return " -> ".join(side.name for side in (self.old, self.new) if side is not None)


@dataclass(frozen=True, repr=False)
class StageDiff:
    """What changed from one stage to another: displays itself as HTML in a notebook, else as one line.

    unchanged: titles of the parts that both have. beside: (file, lines) that changed parts import from their own
    folder, and that are no part themselves.
    """

    before: str
    after: str
    parts: tuple[PartDiff, ...]
    unchanged: tuple[str, ...] = ()
    beside: tuple[tuple[str, int], ...] = ()
    looked_at: str = ""  # "Scheduler", "plan": where only one was asked for

    @property
    def count(self) -> str:
        """Such as "4 parts changed"."""
        return f"{len(self.parts)} part{'' if len(self.parts) == 1 else 's'} changed"

    def __repr__(self) -> str:
        listed = ", ".join(f"{part.title} ({part.size})" for part in self.parts)
        only = f", {self.looked_at} only" if self.looked_at else ""
        rest = f"; unchanged: {', '.join(self.unchanged)}" if self.unchanged else ""
        return f"stage {self.before} -> {self.after}{only}: {self.count}{': ' if listed else ''}{listed}{rest}"

    def unified(self) -> str:
        """The same as text: one unified diff per part."""
        found: list[str] = []
        for part in self.parts:
            old, new = part.old, part.new
            found += difflib.unified_diff(
                old.lines if old else (), new.lines if new else (), old.where if old else "(none)",
                new.where if new else "(none)", lineterm="",
            )  # fmt: skip
        return "\n".join([repr(self), *found])

    def _repr_html_(self) -> str:
        return f"<style>{_css()}</style>{self._body()}"

    def save_html(self, path: str | Path) -> Path:
        """Write the view as one self-contained page."""
        target = Path(path)
        title = escape(f"stage {self.before} to {self.after}")
        target.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_css()}</style></head>\n'
            f'<body class="sd-page">{self._body()}</body></html>\n',
            encoding="utf-8",
        )
        return target

    def _body(self) -> str:
        lines = [
            f'<section class="stagediff" aria-label="stage {escape(self.before)} against {escape(self.after)}">',
            f"<p class='sd-head'><b>Stage {escape(self.before)} → {escape(self.after)}</b> "
            f"<span>{escape(', '.join(filter(None, [self.looked_at, self.count])))}</span></p>",
            "<p class='sd-key'><b>~</b> changed <b>-</b> only on the left <b>+</b> only on the right</p>",
        ]
        lines += [_part(part) for part in self.parts]
        if self.unchanged:
            lines.append(f"<p class='sd-rest'>Unchanged: {escape(', '.join(self.unchanged))}.</p>")
        if self.beside:
            files = ", ".join(f"{escape(where)} ({count} lines)" for where, count in self.beside)
            lines.append(f"<p class='sd-rest'>Beside them, in the same folder: {files}.</p>")
        return "\n".join([*lines, "</section>"])


def _css() -> str:
    return (STATIC / "stage_diff.css").read_text(encoding="utf-8")


# --- rows --------------------------------------------------------------------------------------------------------


def _rows(old: Sequence[str], new: Sequence[str]) -> Iterator[Row]:
    """Lines that both sides have, in order, are the same; between them, lines with most words in common pair up.

    An empty line alone is no reason to hold two places for the same.
    """
    matcher = difflib.SequenceMatcher(lambda line: not line.strip(), old, new, autojunk=False)
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        if kind == "equal":
            yield from (Row(SAME, a + at, b + at) for at in range(a_end - a))
            continue
        i, j = a, b
        for left, right in [*_pairs(old[a:a_end], new[b:b_end]), (a_end - a, b_end - b)]:
            yield from (Row(REMOVED, at, None) for at in range(i, a + left))
            yield from (Row(ADDED, None, at) for at in range(j, b + right))
            if a + left < a_end and b + right < b_end:  # a pair, and not the end
                yield Row(CHANGED, a + left, b + right)
            i, j = a + left + 1, b + right + 1


def _pairs(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """The pairs (line of old, line of new), rising in both, whose likeness sums to the most."""
    ours, theirs = ([frozenset(WORDS.findall(line)) for line in lines] for lines in (old, new))
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]
    like = [[_likeness(one, other) for other in theirs] for one in ours]
    for i in reversed(range(len(old))):
        for j in reversed(range(len(new))):
            paired = best[i + 1][j + 1] + like[i][j] if like[i][j] >= ALIKE else 0.0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], paired)
    i = j = 0
    found: list[tuple[int, int]] = []
    while i < len(old) and j < len(new):
        if like[i][j] >= ALIKE and best[i][j] == best[i + 1][j + 1] + like[i][j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return found


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one and other else 0.0


# --- markup ------------------------------------------------------------------------------------------------------


def _part(part: PartDiff) -> str:
    counts = ", ".join(f"{part.count(sign)} {word}" for sign, word in _TOLD.items() if part.count(sign))
    box = [
        f'<details class="sd-part" open data-part="{part.field}"><summary><b>{escape(part.title)}</b> '
        f"<span>{escape(part.duty)}: {escape(part.names.replace('->', '→'))}, "
        f"{escape(part.size.replace('->', '→'))}; {counts}</span></summary>",
        f'<div class="sd-box" tabindex="0" role="region" aria-label="{escape(part.title)}, side by side">',
        f'<div class="sd-files"><span>{_file(part.old)}</span><span>{_file(part.new)}</span></div>',
    ]
    for hidden, rows in _stretches(part.rows):
        table = _table(part, rows)
        if hidden:
            table = f"<details class='sd-same'><summary>{len(rows)} unchanged lines</summary>{table}</details>"
        box.append(table)
    return "\n".join([*box, "</div></details>"])


_TOLD = {CHANGED: "changed", REMOVED: "removed", ADDED: "added", SAME: "the same"}


def _file(source: Source | None) -> str:
    return escape(source.where) if source is not None else "(no such part)"


def _stretches(rows: Sequence[Row]) -> Iterator[tuple[bool, Sequence[Row]]]:
    """(folded, rows): unchanged rows further than CONTEXT from a change fold, where there are SHORT or more."""
    near = [False] * len(rows)
    for at, row in enumerate(rows):
        if row.sign != SAME:
            for place in range(max(0, at - CONTEXT), min(len(rows), at + CONTEXT + 1)):
                near[place] = True
    stretches: list[tuple[bool, list[Row]]] = []
    for hidden, group in groupby(zip(near, rows, strict=True), key=lambda pair: not pair[0]):
        found = [row for _, row in group]
        hidden = hidden and len(found) >= SHORT
        if stretches and not hidden and not stretches[-1][0]:
            stretches[-1][1].extend(found)
        else:
            stretches.append((hidden, found))
    yield from stretches


def _table(part: PartDiff, rows: Sequence[Row]) -> str:
    return "<table>" + "".join(_line(part, *pair) for pair in _level(rows)) + "</table>"


def _level(rows: Sequence[Row]) -> Iterator[tuple[Row | None, Row | None]]:
    """What stands on the left and on the right of each line: what is gone beside what came in its place."""
    left: list[Row] = []
    right: list[Row] = []
    for row in [*rows, None]:
        if row is not None and row.sign == REMOVED:
            left.append(row)
        elif row is not None and row.sign == ADDED:
            right.append(row)
        else:
            yield from zip_longest(left, right)
            left, right = [], []
            if row is not None:
                yield row, row


def _line(part: PartDiff, left: Row | None, right: Row | None) -> str:
    texts = (_text(part.old, left.old if left else None), _text(part.new, right.new if right else None))
    changed = left is not None and left.sign == CHANGED
    shown = _marked(*texts) if changed else tuple(escape(text) for text in texts)
    sides = ((part.old, left, left.old if left else None), (part.new, right, right.new if right else None))
    cells = (
        f"<th>{_number(side, place)}</th><td class='{KINDS[row.sign] if row else 'n'}'>"
        f"<i>{row.sign if row else ''}</i>{text}</td>"
        for (side, row, place), text in zip(sides, shown, strict=True)
    )
    return f"<tr>{''.join(cells)}</tr>"


def _text(side: Source | None, place: int | None) -> str:
    return side.lines[place] if side is not None and place is not None else ""


def _number(side: Source | None, place: int | None) -> str:
    return str(side.first + place) if side is not None and place is not None else ""


def _marked(old: str, new: str) -> tuple[str, str]:
    """Both lines with the words underlined that the other does not have in that place."""
    ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", line) for line in (old, new))
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, a, a_end, b, b_end in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        for into, piece, tag in ((marked[0], ours[a:a_end], "del"), (marked[1], theirs[b:b_end], "ins")):
            text = escape("".join(piece))
            into.append(text if kind == "equal" or not text.strip() else f"<{tag}>{text}</{tag}>")
    return "".join(marked[0]), "".join(marked[1])
