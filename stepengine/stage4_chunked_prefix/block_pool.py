"""Blocks that can be found again: a block that nobody holds keeps its contents until its room is needed."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from stepengine.core.seams import BlockPool
from stepengine.errors import InvalidSetting, StepEngineError
from stepengine.stage4_chunked_prefix.prefix_index import Entry, HashPrefixIndex, Key, PrefixIndex, RadixPrefixIndex


class PrefixPool(BlockPool, Protocol):
    """From stage 4: a pool whose full blocks are found by what they hold.

    `num_free` counts all that `alloc` can give, found-again blocks that nobody holds included. `share`
    takes such a block back. `free` takes a table in its order: a block after all that it continues.
    """

    def find(self, key: Key) -> int | None:
        """The block that holds these tokens after this beginning, held or not; None where there is none."""

    def seal(self, block: int, key: Key) -> bool:
        """A held block is full, computed, and from now on found by `key`; False where that cannot be (yet)."""


class Evictor(Protocol):
    """Which of the found-again blocks that nobody holds gives up its contents next: never one before its children."""

    def released(self, entry: Entry) -> None:
        """Nobody holds the entry's block any more; from now on it may be picked."""

    def taken(self, entry: Entry) -> None:
        """Somebody holds it again, so it must not be picked."""

    def pick(self) -> Entry:
        """The next to go, which is then forgotten. Asked only while there is one."""


class LeastRecentlyUsed:
    """The one that was let go longest ago, in O(1).

    Leaves come first by themselves: whoever holds a block holds all that it continues, and lets go of
    the last one first, so that an entry is never released before its children.
    """

    def __init__(self) -> None:
        self._released: OrderedDict[Entry, None] = OrderedDict()

    def released(self, entry: Entry) -> None:
        self._released[entry] = None

    def taken(self, entry: Entry) -> None:
        del self._released[entry]

    def pick(self) -> Entry:
        return self._released.popitem(last=False)[0]


class PrefixBlockPool:
    """Blocks 1 .. num_blocks with reference counts, whose sealed ones are found by what they hold.

    A sealed block without references stays where it is until no other is free; then the evictor names
    the one that goes. Blocks with equal contents, computed side by side, are left to those who hold
    them; one of them is kept when all have let go. Block 0 is never handed out.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex | None = None, evictor: Evictor | None = None) -> None:
        self.num_blocks = num_blocks
        self.index = index if index is not None else HashPrefixIndex()
        self.evictor = evictor if evictor is not None else LeastRecentlyUsed()
        self.evicted: list[int] = []  # by the last `alloc`
        self._free = list(range(num_blocks, 0, -1))  # a stack of those that hold nothing
        self._refs = [0] * (num_blocks + 1)
        self._entries: list[Entry | None] = [None] * (num_blocks + 1)  # of the sealed ones
        self._kept = 0  # sealed ones without references

    @property
    def num_free(self) -> int:
        return len(self._free) + self._kept

    def alloc(self, n: int) -> list[int] | None:
        """`n` blocks with one reference each, or None (and nothing changed) when fewer are free."""
        self.evicted = []
        if not 0 <= n <= self.num_free:
            return None
        while len(self._free) < n:
            self._evict()
        ids = [self._free.pop() for _ in range(n)]
        for block in ids:
            self._refs[block] = 1
        return ids

    def share(self, ids: Sequence[int]) -> None:
        """One more reference on each; a sealed block that nobody held is held again."""
        self._check(ids, sealed=True)
        for block in ids:
            if not self._refs[block]:
                self._kept -= 1
                self.evictor.taken(self._entry(block))
            self._refs[block] += 1

    def free(self, ids: Sequence[int]) -> None:
        """One reference less on each, the last first; a block without references is free again, or kept if sealed."""
        self._check(ids)
        if len(set(ids)) < len(ids):
            self._check_repeated(ids)
        for block in reversed(ids):
            self._refs[block] -= 1
            if not self._refs[block]:
                self._let_go(block)

    def refs(self, block: int) -> int:
        """References on a block; 0 when it is free, or kept."""
        return self._refs[block]

    def find(self, key: Key) -> int | None:
        """The block that holds these tokens after this beginning, held or not; None where there is none."""
        entry = self.index.find(key)
        return entry.block if entry is not None else None

    def seal(self, block: int, key: Key) -> bool:
        """A held block is full, computed, and from now on found by `key`; False where the index has no place for it."""
        if not self._refs[block]:
            raise StepEngineError(f"Block {block} has no references; only a block that is held can be sealed.")
        if self._entries[block] is not None:
            return True
        self._entries[block] = entry = self.index.add(key, block)
        if entry is None or entry.block == block:
            return entry is not None
        if self._refs[entry.block]:
            entry.twins = [*(entry.twins or ()), block]
        else:  # kept until now; one that is held takes its place
            self.evictor.taken(entry)
            self._kept -= 1
            self._forget(entry.block)
            entry.block = block
        return True

    def _let_go(self, block: int) -> None:
        entry = self._entries[block]
        if entry is not None and not entry.twins:
            self._kept += 1
            self.evictor.released(entry)
            return
        if entry is not None and entry.twins:
            others = [entry.block, *entry.twins]
            others.remove(block)
            entry.block, *entry.twins = others
        self._forget(block)

    def _forget(self, block: int) -> None:
        self._entries[block] = None
        self._free.append(block)

    def _evict(self) -> None:
        entry = self.evictor.pick()
        block = entry.block
        who = f"The evictor picked block {block}"
        if not block or self._refs[block]:
            raise StepEngineError(f"{who}, which has {self._refs[block]} references; it must pick one with none.")
        if entry.children:
            raise StepEngineError(f"{who}, which {entry.children} cached blocks continue; they must go before it.")
        self.index.remove(entry)
        self._kept -= 1
        self._forget(block)
        self.evicted.append(block)

    def _entry(self, block: int) -> Entry:
        entry = self._entries[block]
        assert entry is not None
        return entry

    def _check(self, ids: Sequence[int], sealed: bool = False) -> None:
        for block in ids:
            if not 1 <= block <= self.num_blocks:
                raise StepEngineError(f"There is no block {block}; the pool has blocks 1 to {self.num_blocks}.")
            if not self._refs[block] and not (sealed and self._entries[block] is not None):
                raise StepEngineError(
                    f"Block {block} is free already; only a block that is held, or kept, can be shared or freed."
                )

    def _check_repeated(self, ids: Sequence[int]) -> None:
        for block, times in Counter(ids).items():
            if times > self._refs[block]:
                raise StepEngineError(
                    f"Block {block} has {self._refs[block]} references and {times} are to go; free each reference once."
                )


def prefix_pool(
    prefix_index: str | Callable[[], PrefixIndex] | None = None, evictor: Callable[[], Evictor] | None = None
) -> Callable[[int], PrefixBlockPool]:
    """What makes a pool with these parts; an index is "hash" (the default), "radix" or a class. `InvalidSetting`."""
    named = {None: HashPrefixIndex, "hash": HashPrefixIndex, "radix": RadixPrefixIndex}
    make = named.get(prefix_index) if prefix_index is None or isinstance(prefix_index, str) else prefix_index
    if not callable(make):
        raise InvalidSetting(
            f"prefix_index is {prefix_index!r}; it must be 'hash', 'radix', or a class or a function that makes one."
        )
    if evictor is not None and not callable(evictor):
        raise InvalidSetting(f"evictor is {evictor!r}; it must be a class or a function that makes the part.")
    return lambda num_blocks: PrefixBlockPool(num_blocks, make(), evictor() if evictor is not None else None)
