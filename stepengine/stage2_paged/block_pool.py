"""Which physical blocks are free, and how many tables name each of the others."""

from collections import Counter
from collections.abc import Sequence

from stepengine.errors import StepEngineError


class BlockPool:
    """Blocks 1 .. num_blocks with reference counts; every operation costs O(1) a block.

    Block 0 is never handed out: it is the one that padding may write to. The block that was freed last
    is handed out first, while its memory is still in a processor's cache.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, 0, -1))  # a stack; the lowest comes first
        self._refs = [0] * (num_blocks + 1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, n: int) -> list[int] | None:
        """`n` blocks with one reference each, or None (and nothing changed) when fewer are free."""
        if not 0 <= n <= len(self._free):
            return None
        ids = [self._free.pop() for _ in range(n)]
        for block in ids:
            self._refs[block] = 1
        return ids

    def share(self, ids: Sequence[int]) -> None:
        """One more reference on each."""
        self._check(ids)
        for block in ids:
            self._refs[block] += 1

    def free(self, ids: Sequence[int]) -> None:
        """One reference less on each; a block without references is free again."""
        self._check(ids)
        if len(set(ids)) < len(ids):
            self._check_repeated(ids)
        for block in ids:
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free.append(block)

    def refs(self, block: int) -> int:
        """References on a block; 0 when it is free."""
        return self._refs[block]

    def _check(self, ids: Sequence[int]) -> None:
        for block in ids:
            if not 1 <= block <= self.num_blocks:
                raise StepEngineError(f"There is no block {block}; the pool has blocks 1 to {self.num_blocks}.")
            if not self._refs[block]:
                raise StepEngineError(
                    f"Block {block} is free already; only a block that is held can be shared or freed."
                )

    def _check_repeated(self, ids: Sequence[int]) -> None:
        for block, times in Counter(ids).items():
            if times > self._refs[block]:
                raise StepEngineError(
                    f"Block {block} has {self._refs[block]} references and {times} are to go; free each reference once."
                )
