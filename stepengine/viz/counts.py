"""What two runs cost, in counts: a short table and half a sentence."""

from typing import NamedTuple

from stepengine.trace import Trace, kv_use, token_gaps
from stepengine.viz.differences import metrics

BASE = (  # of what `differences` counts: the runs as wholes
    "requests",
    "steps",
    "tokens run",
    "of them run again",
    "preemptions",
    "tokens found (hits)",
    "most K/V blocks held",
    "rows a step, mean",
    "idle rows",
)
FIRST = {"preemptions": "preemptions", "tokens found (hits)": "tokens found"}  # what a sentence tells if it moved
THEN = {  # and what else moved, the more important first
    "tokens run": "tokens run",
    "tokens run between two of one request, most": "tokens run between two of one request at most",
    "empty K/V places, most": "empty K/V places at most",
    "most K/V blocks held": "K/V blocks at most",
}
MOST_TOLD = 2  # counts that a sentence names beside the steps
SMALL = 0.06  # what moved by a smaller share is left to the table


class Row(NamedTuple):
    """One count: `before` is None in a first run, and either where the run has nothing to count."""

    name: str
    before: float | None
    now: float | None

    def texts(self, first: bool) -> tuple[str, str, str, str]:
        """Name, before, now, difference."""
        if first:
            return self.name, "", _number(self.now), ""
        both = self.before is not None and self.now is not None
        change = (self.now or 0) - (self.before or 0) if both else 0
        sign = f"{'+' if change > 0 else '−'}{_number(abs(change))}" if round(change, 2) else "same" if both else ""
        return self.name, _number(self.before), _number(self.now), sign


def rows(before: Trace | None, now: Trace) -> list[Row]:
    """The counts of both runs, without those that neither has."""
    base = [metric for metric in metrics(before or now, now) if metric.name in BASE]
    own, other = _counts(now), _counts(before or now)
    found = [Row(m.name, m.a, m.b) for m in base] + [Row(name, other[name], own[name]) for name in own]
    kept = [row for row in found if row.now or row.before]
    return kept if before else [row._replace(before=None) for row in kept]


def _counts(trace: Trace) -> dict[str, float | None]:
    stores = bool(trace.meta.get("num_blocks"))
    gaps = [gap.tokens for gap in token_gaps(trace)]
    return {
        "empty K/V places, most": max(use.reserved - use.held for use in kv_use(trace)) if stores else None,
        "largest step, tokens": max(record.plan.num_tokens for record in trace.steps),
        "tokens run between two of one request, most": max(gaps, default=None),
    }


def effects(before: Trace | None, now: Trace) -> str:
    """Such as "9 -> 21 steps, 0 -> 3 preemptions": the steps, and the counts that matter most of those that moved."""
    found = {row.name: row for row in rows(before, now)}
    steps = found["steps"]
    if before is None:
        return f"{_number(steps.now)} steps, {_number(found['tokens run'].now)} tokens run"
    told = [f"still {_number(steps.now)} steps" if steps.before == steps.now else f"{_move(steps)} steps"]
    first = [f"{_move(row)} {FIRST[name]}" for name in FIRST if _moved(row := found.get(name))]
    rest = [row for name in THEN if _moved(row := found.get(name)) > SMALL]
    return ", ".join(told + [*first, *(f"{_move(row)} {THEN[row.name]}" for row in rest)][:MOST_TOLD])


def _moved(row: Row | None) -> float:
    """How far it moved, as a share of the larger; 0 where one run has nothing to count."""
    if row is None or row.before is None or row.now is None:
        return 0.0
    return abs(row.now - row.before) / max(row.now, row.before, 1)


def _move(row: Row) -> str:
    return f"{_number(row.before)} -> {_number(row.now)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2):,g}" if value < 1e5 else f"{value:,.0f}"
