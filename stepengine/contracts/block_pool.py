"""What a paged cache relies on in a block pool: ids, reference counts, and nothing half done."""

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from stepengine.contracts.report import Promise, Report, Violation, expect, name_of, run_promises
from stepengine.core.seams import BlockPool

METHODS = {"alloc": "alloc(n)", "share": "share(ids)", "free": "free(ids)", "refs": "refs(block)"}


class _Driver:
    """Calls a pool and a count of references kept beside it, and compares the two after every call."""

    def __init__(self, make: Callable[[int], BlockPool], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pool = make(num_blocks)
        self.refs: dict[int, int] = {}  # of the held blocks
        self.calls: list[str] = []
        self.check_state()

    @property
    def case(self) -> str:
        return f"{self.num_blocks} blocks: {'; '.join(self.calls) or 'a new pool'}"

    @property
    def left(self) -> int:
        return self.num_blocks - len(self.refs)

    def check_state(self) -> None:
        free = self.pool.num_free
        expect(free == self.left and free is not False, f"{self.case}; num_free is {free!r}, not {self.left}")
        for block in range(1, self.num_blocks + 1):
            got, wanted = self.pool.refs(block), self.refs.get(block, 0)
            expect(got == wanted, f"{self.case}; refs({block}) is {got!r}, not {wanted}")

    def alloc(self, n: int) -> list[int] | None:
        got = self.pool.alloc(n)
        self.calls.append(f"alloc({n}) gave {got!r}")
        if n > self.left:
            expect(got is None, f"{self.case}; only {self.left} are free, so it must give None")
            self.check_state()
            return None
        expect(got is not None and len(got) == n, f"{self.case}; {self.left} are free, so it must give {n} ids")
        ids = list(got or ())
        for block in ids:
            inside = isinstance(block, int) and 1 <= block <= self.num_blocks
            expect(inside, f"{self.case}; {block!r} is no block to hand out: ids are 1 to {self.num_blocks}")
            expect(block not in self.refs, f"{self.case}; block {block} is held already")
        expect(len(set(ids)) == n, f"{self.case}; the same block is in it twice")
        self.refs |= dict.fromkeys(ids, 1)
        self.check_state()
        return ids

    def share(self, ids: list[int]) -> None:
        self.calls.append(f"share({ids})")
        self.pool.share(list(ids))
        for block in ids:
            self.refs[block] += 1
        self.check_state()

    def free(self, ids: list[int]) -> None:
        self.calls.append(f"free({ids})")
        self.pool.free(list(ids))
        for block in ids:
            self.refs[block] -= 1
            if not self.refs[block]:
                del self.refs[block]
        self.check_state()

    def refused(self, method: str, ids: list[int]) -> None:
        """A call that must raise and change nothing."""
        self.calls.append(f"{method}({ids})")
        try:
            getattr(self.pool, method)(list(ids))
        except Exception:
            self.calls[-1] += " raised"
            self.check_state()
            return
        wrong = next((block for block in ids if not 1 <= block <= self.num_blocks), None)
        few = next((block for block in ids if self.refs.get(block, 0) < max(1, ids.count(block))), 0)
        why = f"block {few} has {self.refs.get(few, 0)} references" if wrong is None else f"there is no block {wrong}"
        raise Violation(f"{self.case} was accepted, but {why}")

    def end(self) -> None:
        """Give back everything; the pool must be whole and able to hand out all of it."""
        for block, count in sorted(self.refs.items()):
            for _ in range(count):
                self.free([block])
        ids = self.alloc(self.num_blocks)
        self.free(ids or [])


class _Call(NamedTuple):
    """One call of a random order; picks choose among the blocks that are held then."""

    method: str
    picks: tuple[int, ...]


def _play(make: Callable[[int], BlockPool], num_blocks: int, calls: list[_Call]) -> None:
    driver = _Driver(make, num_blocks)
    for method, picks in calls:
        held = sorted(driver.refs)
        if method == "alloc":
            driver.alloc(picks[0])
        elif method == "refused":
            nobody = next((b for b in range(1, num_blocks + 1) if b not in driver.refs), num_blocks + 1)
            driver.refused("free", [*held[: picks[0]], nobody])
        elif held:
            ids = list(dict.fromkeys(held[pick % len(held)] for pick in picks))
            driver.share(ids) if method == "share" else driver.free(ids)
    driver.end()


def _broken(make: Callable[[int], BlockPool], num_blocks: int, calls: list[_Call]) -> Exception | None:
    try:
        _play(make, num_blocks, calls)
    except Exception as error:
        return error
    return None


def _random_order(make: Callable[[int], BlockPool]) -> None:
    for size in (3, 5, 8, 20, 60, 200):
        rng, num_blocks = random.Random(size), 2 + size // 10
        calls = []
        for _ in range(size):
            method = rng.choices(("alloc", "share", "free", "refused"), (3, 2, 4, 1))[0]
            picks = rng.choices(range(num_blocks), k=rng.randint(1, 3))
            calls.append(_Call(method, (rng.randint(0, num_blocks),) if method == "alloc" else tuple(picks)))
        found = _broken(make, num_blocks, calls)
        at = 0
        while found is not None and at < len(calls):  # leave out whatever the failure does not need
            shorter = calls[:at] + calls[at + 1 :]
            smaller = _broken(make, num_blocks, shorter)
            if smaller is None:
                at += 1
            else:
                found, calls = smaller, shorter
        if found is not None:
            raise found


def _surface(make: Callable[[int], BlockPool]) -> None:
    pool: Any = make(3)
    missing = [text for name, text in METHODS.items() if not callable(getattr(pool, name, None))]
    missing += [] if hasattr(pool, "num_free") else ["num_free"]
    name, needed = type(pool).__name__, ", ".join(METHODS.values())
    told = f"it needs {needed} and the number num_free"
    expect(not missing, f"a {name} has no {', '.join(missing)}; {told}")
    expect(not callable(pool.num_free), "num_free is a method; write @property above it, so that it reads as a number")


def _cost(make: Callable[[int], BlockPool], num_blocks: int) -> float:
    """Seconds of the fastest alloc and free of one block, in a pool that is half used."""
    pool = make(num_blocks)
    pool.alloc(num_blocks // 2)
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        pool.free(pool.alloc(1) or [])
        best = min(best, time.perf_counter() - began)
    return best


def check_block_pool(make: Callable[[int], BlockPool]) -> Report:
    """Check a pool of reference-counted blocks, made by `make(num_blocks)`: alloc, share, free, refs, num_free.

    A pool whose cost grows with its size passes with a remark. Never raises; see the report.
    """

    def surface() -> None:
        _surface(make)

    def all_of_it() -> None:
        for num_blocks in (1, 2, 5):
            driver = _Driver(make, num_blocks)
            for _ in range(num_blocks):
                driver.alloc(1)
            driver = _Driver(make, num_blocks)
            driver.alloc(num_blocks)

    def nothing() -> None:
        driver = _Driver(make, 2)
        driver.alloc(0)
        driver.alloc(2)
        driver.alloc(0)

    def full() -> None:
        driver = _Driver(make, 3)
        driver.alloc(4)
        driver.alloc(2)
        driver.alloc(2)
        driver.alloc(1)
        driver.alloc(1)

    def shared() -> None:
        driver = _Driver(make, 3)
        ids = driver.alloc(2) or []
        driver.share(ids[:1])
        driver.share(ids)
        driver.free(ids)
        driver.free(ids)
        driver.free(ids[:1])
        driver.alloc(3)

    def reused() -> None:
        driver = _Driver(make, 2)
        for _ in range(3):
            ids = driver.alloc(2) or []
            driver.free(ids[:1])
            driver.free(ids[1:])

    def refused() -> None:
        for method in ("free", "share"):
            driver = _Driver(make, 3)
            driver.refused(method, [1])
            ids = driver.alloc(1) or []
            other = next(block for block in (1, 2, 3) if block not in ids)
            for wrong in (0, 4, -1):
                driver.refused(method, [wrong])
            driver.refused(method, [*ids, other])
            driver.refused(method, [*ids, 4])
        driver = _Driver(make, 3)
        ids = driver.alloc(1) or []
        driver.refused("free", ids * 2)
        driver.free(ids)
        driver.refused("free", ids)

    def any_order() -> None:
        _random_order(make)

    name = f"Block pool {name_of(make)}"
    report = run_promises(name, [Promise("it has what the engine calls", surface, "see stepengine.core.seams")])
    if not report.ok:
        return report  # every further failure would say the same
    rest = run_promises(
        name,
        [
            Promise("all blocks can be had, each id in 1..num_blocks and once", all_of_it, "block 0 is for padding"),
            Promise("alloc(0) gives an empty list and takes nothing", nothing, "[] is not None"),
            Promise("too few free: alloc gives None and takes nothing", full, "count before taking any"),
            Promise("a shared block is free when its last holder lets go", shared, "count a block's holders"),
            Promise("a block that was freed can be had again", reused, "put it back among the free ones"),
            Promise(
                "a block that nobody holds can be neither freed nor shared; nothing is changed then",
                refused,
                "look at all ids before changing any; an id may stand in the list twice",
            ),
            Promise("counts stay right in any order, and the pool is whole at the end", any_order, "replay the calls"),
        ],
    )
    report = report.then(rest)
    if not report.ok:
        return report
    remarks: list[str] = []

    def cost() -> None:
        if _cost(make, 1 << 13) > 8 * _cost(make, 1 << 6):
            remarks.append("slow: alloc and free cost more in a larger pool; with a stack of free ids they need not")

    large = run_promises(name, [Promise("a pool of 8192 blocks works like a small one", cost, "is a size built in?")])
    return report.then(Report(name, [], large.failed, large.remarks + remarks))
