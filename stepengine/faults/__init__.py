"""The fault museum: broken parts, each a fault that a real engine once had, and what catches it."""

from stepengine.errors import InvalidSetting
from stepengine.faults import boundary, early, freed, leaked, orphan, rows, stale, starved, writers
from stepengine.faults.exhibit import Exhibit
from stepengine.faults.workload import Ask, Visit, Workload, alone, first_wrong, play

MUSEUM: tuple[Exhibit, ...] = tuple(
    room.EXHIBIT for room in (leaked, early, boundary, freed, orphan, rows, stale, starved)
)
NINTH = writers.EXHIBIT  # for the visitor to mend


def exhibit(name: str) -> Exhibit:
    """The exhibit of that name; `InvalidSetting` where there is none."""
    found = {each.name: each for each in (*MUSEUM, NINTH)}
    if name not in found:
        raise InvalidSetting(f"There is no exhibit {name!r}; there are {', '.join(map(repr, found))}.")
    return found[name]


__all__ = ["MUSEUM", "NINTH", "Ask", "Exhibit", "Visit", "Workload", "alone", "exhibit", "first_wrong", "play"]
