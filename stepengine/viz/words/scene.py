"""One step of a trace, with the names by which a sentence calls what is in it."""

from collections.abc import Sequence

from stepengine.core.plan import Chunk
from stepengine.trace import Replay, Snapshot
from stepengine.viz.words.work import Work

NAMES = 4  # requests that a sentence names; the rest are counted


class Scene:
    """A step, what was before it, and who has been named so far."""

    def __init__(
        self,
        replay: Replay,
        labels: dict[int, str],
        now: Snapshot,
        before: Snapshot | None,  # None: the first step
        work: Sequence[Work],
        layout: str,  # of K/V: "none" | "slots" | "blocks"
    ) -> None:
        self.replay, self.labels, self.now, self.before, self.work = replay, labels, now, before, work
        self.layout, self.plan = layout, now.record.plan
        self.info, self.meta = replay.trace.requests, replay.trace.meta
        self.size = replay.block_size
        self.ended = [request for request, _ in now.record.finished]
        self.named: list[int] = []

    def who(self, ids: Sequence[int], start: bool = True) -> str:
        """The requests by name, at most `NAMES` of them; `start` of a sentence or within one."""
        shown = list(ids) if len(ids) <= NAMES else list(ids)[: NAMES - 1]
        self.named += shown
        labels = [self.labels[r] for r in shown]
        if len(shown) < len(ids):
            labels.append(f"{len(ids) - len(shown)} others")
        if not self.labels[shown[0]].isdigit():
            return listed(labels)
        return f"{'R' if start else 'r'}equest{'s' if len(ids) > 1 else ''} {listed(labels)}"

    def relabel(self, words: str) -> str:
        """A scheduler's reason with its request id turned into the label that the pictures use."""
        head, found, rest = words.partition("request ")
        digits = rest.split(" ", 1)[0]
        if not found or head or not digits.isdigit() or int(digits) not in self.labels:
            return words
        return self.who([int(digits)], False) + rest[len(digits) :]

    def prompt(self, request: int) -> int:
        """Its prompt's tokens."""
        return len(self.info[request].prompt_ids)

    def hits(self, chunk: Chunk) -> int:
        """Blocks that the chunk starts with as they are."""
        size = self.replay.block_size
        return -(-chunk.cached // size) if size else 0


def count(number: int, noun: str) -> str:
    """1 block, 2 blocks."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def agree(ids: Sequence[int], one: str, many: str) -> str:
    """The form of a verb (or pronoun) that goes with so many."""
    return one if len(ids) == 1 else many


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
