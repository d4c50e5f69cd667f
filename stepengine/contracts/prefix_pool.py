"""What a prefix cache relies on in a pool of blocks that can be found again, and in what chooses who is given up."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stepengine.contracts.block_pool import check_block_pool
from stepengine.contracts.report import Promise, Report, expect, name_of, run_promises

Path = tuple[tuple[int, ...], ...]  # the tokens of a block and of all blocks before it


class BlockKey:
    """A key as a cache makes it: `tokens` of one block, and the `parent` that they continue; `salt` of the first one.

    `digest` and `entry` are the pool's own: what it wants to remember of a key.
    """

    def __init__(self, parent: "BlockKey | None", tokens: tuple[int, ...], salt: str = "") -> None:
        self.parent = parent
        self.tokens = tokens
        self.salt: str = salt if parent is None else parent.salt
        self.digest: int | None = None
        self.entry: Any = None


def keys_of(path: Path, salt: str = "") -> list[BlockKey]:
    """One new key for each block of a path."""
    keys: list[BlockKey] = []
    for tokens in path:
        keys.append(BlockKey(keys[-1] if keys else None, tokens, salt))
    return keys


class Sequences:
    """Runs sequences of whole blocks in a pool as an engine would, and knows what each block really holds."""

    def __init__(self, make: Callable[[int], Any], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pool = make(num_blocks)
        self.truth: dict[int, Path] = {}  # block -> what was last computed into it
        self.tables: list[tuple[list[int], Path]] = []
        self.calls: list[str] = []

    @property
    def case(self) -> str:
        return f"{self.num_blocks} blocks: {'; '.join(self.calls) or 'a new pool'}"

    @property
    def held(self) -> set[int]:
        return {block for table, _ in self.tables for block in table}

    def find(self, path: Path) -> list[int]:
        """The blocks that are found for the beginning of a path; each must hold just that."""
        blocks: list[int] = []
        for at, key in enumerate(keys_of(path)):
            block = self.pool.find(key)
            if block is None:
                break
            right = self.truth.get(block)
            expect(right == path[: at + 1], f"{self.case}; find({path[: at + 1]}) gave block {block}: it holds {right}")
            blocks.append(block)
        return blocks

    def start(self, path: Path, takes_hits: bool = True) -> bool:
        """Take what is found, compute the rest; without `takes_hits` all of it, as one does who starts side by side."""
        hits = self.find(path) if takes_hits else []
        self.pool.share(hits)
        blocks = self.pool.alloc(len(path) - len(hits))
        self.calls.append(f"{path} found {hits}, got {blocks}")
        free = self.num_blocks - len(self.held | set(hits))
        if blocks is None:
            short = len(path) - len(hits) > free
            expect(short, f"{self.case}; {free} blocks have no references, so it must give {len(path) - len(hits)}")
            self.pool.free(hits)
            self.check_counts()
            return False
        again = set(blocks) & (self.held | set(hits))
        expect(not again, f"{self.case}; blocks {sorted(again)} are held")
        table = [*hits, *blocks]
        for at, (block, key) in enumerate(zip(table, keys_of(path), strict=True)):
            if at >= len(hits):
                self.truth[block] = path[: at + 1]
            sealed = self.pool.seal(block, key)
            expect(bool(sealed), f"{self.case}; seal(block {block}, {path[: at + 1]}) answered {sealed!r}")
        self.tables.append((table, path))
        self.check_counts()
        return True

    def end(self, number: int) -> None:
        table, path = self.tables.pop(number)
        self.calls.append(f"{path} let go of {table}")
        self.pool.free(table)
        self.check_counts()

    def check_counts(self) -> None:
        for block in range(1, self.num_blocks + 1):
            wanted, got = sum(block in table for table, _ in self.tables), self.pool.refs(block)
            expect(got == wanted, f"{self.case}; refs({block}) is {got}, not {wanted}")
        free, got = self.num_blocks - len(self.held), self.pool.num_free
        expect(got == free, f"{self.case}; num_free is {got}; {free} blocks have no references, kept ones included")
        for _, path in self.tables:
            found = len(self.find(path))
            expect(found == len(path), f"{self.case}; {path} is held, and {found} of its blocks are found")

    def whole(self) -> None:
        while self.tables:
            self.end(0)
        blocks = self.pool.alloc(self.num_blocks)
        expect(blocks is not None, f"{self.case}; nothing is held, and {self.num_blocks} blocks cannot be had")


def path(*names: int) -> Path:
    """Blocks of two tokens, named by numbers."""
    return tuple((name, name) for name in names)


def random_paths(rng: random.Random, count: int, most: int) -> Iterable[Path]:
    """Paths that often begin alike."""
    for _ in range(count):
        yield path(*(rng.randint(1, 2) for _ in range(rng.randint(1, most))))


def play(make: Callable[[int], Any], steps: int) -> Sequences:
    """Sequences come and go in a pool that is too small to keep them all."""
    rng = random.Random(steps)
    run = Sequences(make, rng.randint(4, 10))
    for beginning in random_paths(rng, steps, 4):
        if run.tables and rng.random() < 0.5:
            run.end(rng.randrange(len(run.tables)))
        run.start(beginning, takes_hits=rng.random() < 0.8)
    run.whole()
    return run


def check_prefix_pool(make: Callable[[int], Any]) -> Report:
    """Check a pool of blocks that can be found again, made by `make(num_blocks)`.

    It is a block pool (`check_block_pool`) with `find(key)` and `seal(block, key)`. A key has `tokens` (of one block),
    `parent` (the key before it, or None) and `salt`. Never raises; see the report.
    """
    name = f"Prefix pool {name_of(make)}"

    def surface() -> None:
        pool = make(3)
        missing = [call for call in ("find(key)", "seal(block, key)") if not hasattr(pool, call.split("(")[0])]
        expect(not missing, f"a {type(pool).__name__} has no {' and '.join(missing)}")

    def finds() -> None:
        run = Sequences(make, 4)
        expect(run.find(path(1)) == [], "a new pool found a block")
        run.start(path(1, 2))
        run.find(path(1, 2, 3))

    def keeps() -> None:
        run = Sequences(make, 6)
        run.start(path(1, 2, 3))
        run.end(0)
        found = run.find(path(1, 2, 3))
        expect(len(found) == 3, f"{run.case}; found {found}: blocks without references stay until room is needed")
        run.start(path(1, 2, 4))
        run.whole()

    def exactly() -> None:
        run = Sequences(make, 8)
        run.start(path(1, 2, 3))
        for other in (path(2), path(2, 3), path(1, 3), path(3, 2, 1)):
            got = len(run.find(other))
            wanted = 1 if other[0] == path(1)[0] else 0
            expect(got == wanted, f"{run.case}; {got} blocks of {other} were found, not {wanted}")
        salted = run.pool.find(keys_of(path(1), "red")[0])
        expect(salted is None, f"{run.case}; block {salted} was found under another salt")

    def room() -> None:
        for count in (1, 2, 4):
            run = Sequences(make, 4)
            run.start(path(1, 2, 3))
            run.end(0)
            run.start(path(*range(10, 10 + count)))
            left = len(run.find(path(1, 2, 3)))
            wanted = min(3, 4 - count)
            expect(left == wanted, f"{run.case}; {left} of the first 3 are still found, {wanted} could be")
            run.whole()

    def equal() -> None:
        for first in (0, 1):
            run = Sequences(make, 6)
            run.start(path(1, 2))
            run.start((*path(1, 2), *path(3)), takes_hits=False)
            run.end(first)
            run.start(path(1, 2, 3))
            run.whole()
        run = Sequences(make, 4)
        run.start(path(1, 2))
        run.start(path(1, 2), takes_hits=False)
        run.end(1)
        run.end(0)
        run.start(path(5, 6))
        found = len(run.find(path(1, 2)))
        expect(found == 2, f"{run.case}; {found} of 2 blocks are found, though equal contents need no room twice")

    def any_order() -> None:
        for steps in (3, 5, 10, 20, 50, 200):
            play(make, steps)

    ours = [
        Promise("it has what a prefix cache calls", surface, "see stepengine.stage4_chunked_prefix.block_pool"),
        Promise("what was sealed is found, by an equal key", finds, "compare what keys say, not which object they are"),
        Promise("it stays when nobody holds it, and can be shared again", keeps, "keep it apart from the free ones"),
        Promise("it is found only after its own beginning and salt", exactly, "compare tokens and the parent's entry"),
        Promise(
            "kept blocks give way only when no other is free, leaves first", room, "alloc takes the free ones first"
        ),
        Promise("equal contents side by side are right, and kept once", equal, "who holds them may end in any order"),
        Promise("in any order, what is found holds what was asked for", any_order, "replay the calls"),
    ]
    first = run_promises(name, ours[:1])
    if not first.ok:
        return first
    plain, rest = check_block_pool(make), run_promises(name, ours[1:])
    plain.name = name
    return plain.then(first).then(rest)


class _Name:
    """An entry as an evictor sees it."""

    def __init__(self, block: int, parent: "_Name | None") -> None:
        self.block = block
        self.parent = parent
        self.children = 0

    @property
    def path(self) -> str:
        return (self.parent.path + " > " if self.parent is not None else "") + str(self.block)


class _Tree:
    """Drives an evictor by hand, in the order in which a pool does."""

    def __init__(self, make: Callable[[], Any], parents: Sequence[int]) -> None:
        """`parents[i]` is the parent of entry i, -1 for a beginning; entries are numbered after their parents."""
        self.evictor = make()
        self.entries: list[_Name] = []
        for block, parent in enumerate(parents):
            self.entries.append(_Name(block + 1, self.entries[parent] if parent >= 0 else None))
            if parent >= 0:
                self.entries[parent].children += 1
        self.free: list[_Name] = []
        self.calls: list[str] = []

    def release(self, *blocks: int) -> None:
        """Let go of blocks; the caller names children before parents."""
        for block in blocks:
            entry = self.entries[block - 1]
            self.calls.append(f"released({entry.path})")
            self.free.append(entry)
            self.evictor.released(entry)

    def take(self, *blocks: int) -> None:
        for block in blocks:
            entry = self.entries[block - 1]
            self.calls.append(f"taken({entry.path})")
            self.free.remove(entry)
            self.evictor.taken(entry)

    def pick(self) -> _Name:
        entry: _Name = self.evictor.pick()
        case = "; ".join(self.calls)
        said = f"{case}; pick() gave {entry.path if isinstance(entry, _Name) else repr(entry)}"
        expect(
            any(entry is free for free in self.free),
            f"{said}, which was not released, or is held again, or was picked before",
        )
        below = [other.path for other in self.free if other.parent is entry]
        expect(not below, f"{said} before {' and '.join(below)}")
        self.free.remove(entry)
        self.calls.append(f"pick() gave {entry.path}")
        return entry


class _Watched:
    """An evictor whose picks are looked at before a pool uses them."""

    def __init__(self, evictor: Any) -> None:
        self.evictor = evictor
        self.free: list[Any] = []

    def released(self, entry: Any) -> None:
        self.free.append(entry)
        self.evictor.released(entry)

    def taken(self, entry: Any) -> None:
        self.free = [other for other in self.free if other is not entry]
        self.evictor.taken(entry)

    def pick(self) -> Any:
        entry = self.evictor.pick()
        right = any(entry is free for free in self.free)
        kind = "None" if entry is None else f"a {type(entry).__name__}"
        expect(right, f"{len(self.free)} entries may be picked; pick() gave {kind}, which is none of them")
        self.free = [other for other in self.free if other is not entry]
        return entry


def check_evictor(make: Callable[[], Any]) -> Report:
    """Check what chooses the next block to give up, made by `make()`: `released(entry)`, `taken(entry)`, `pick()`.

    An entry has `block`, `parent` (the entry that it continues, or None) and `children` (how many continue it). It is
    released after its children, and taken back before them. The last promises run it in stage 4's pool and engine,
    in pools too small, and beside stage 0. Never raises; see the report.
    """
    chain, fork = (-1, 0, 1), (-1, 0, 0, 1)

    def surface() -> None:
        evictor = make()
        missing = [name for name in ("released", "taken", "pick") if not callable(getattr(evictor, name, None))]
        expect(not missing, f"a {type(evictor).__name__} has no {', '.join(missing)}")

    def each_once() -> None:
        for count in (1, 2, 5):
            tree = _Tree(make, [-1] * count)
            tree.release(*range(count, 0, -1))
            for _ in range(count):
                tree.pick()
            tree.release(count)
            tree.pick()

    def held() -> None:
        tree = _Tree(make, [-1, -1, -1])
        tree.release(3, 2, 1)
        tree.take(3)
        tree.pick()
        tree.release(3)
        tree.take(*[entry.block for entry in tree.free[:1]])
        while tree.free:
            tree.pick()

    def leaves() -> None:
        for parents in (chain, fork):
            tree = _Tree(make, parents)
            tree.release(*range(len(parents), 0, -1))
            while tree.free:
                tree.pick()
        tree = _Tree(make, fork)  # 4 continues 2, which continues 1, and so does 3
        tree.release(4)
        tree.release(3)
        tree.release(2, 1)
        tree.take(1, 2)
        tree.pick()
        tree.release(2, 1)
        while tree.free:
            tree.pick()

    def any_tree() -> None:
        for size in (3, 5, 8, 20, 60):
            rng = random.Random(size)
            tree = _Tree(make, [rng.randint(-1, at - 1) for at in range(size)])
            gone: set[int] = set()
            lines: list[list[int]] = []  # who holds what, the last block first
            for _ in range(4 * size):
                free, move = {entry.block for entry in tree.free}, rng.random()
                if lines and move < 0.45:
                    line = lines.pop(rng.randrange(len(lines)))
                    held = {block for other in lines for block in other}
                    tree.release(*(block for block in line if block not in held))
                elif free and move < 0.6:
                    gone.add(tree.pick().block)
                else:
                    line = [rng.randint(1, size)]
                    while (above := tree.entries[line[-1] - 1].parent) is not None:
                        line.append(above.block)
                    if not gone & set(line):
                        tree.take(*(block for block in reversed(line) if block in free))
                        lines.append(line)
            while tree.free:
                tree.pick()

    def in_the_pool() -> None:
        from stepengine.llm import LLM

        pool: Any = LLM("tiny-random", stage="4b", max_model_len=16).stage.parts.block_pool
        for steps in (5, 10, 20, 50, 200):
            play(lambda num_blocks: pool(num_blocks, evictor=_Watched(make())), steps)

    def tokens() -> None:
        from stepengine.llm import LLM, SamplingParams

        prompts = [[5, 9, 2, 7, 3, 1, 8, 4][: 3 + number % 4] + [20 + number % 3] * 5 for number in range(6)] * 2
        params = [SamplingParams(temperature=0.0, max_tokens=4 + number % 5, ignore_eos=True) for number in range(12)]
        wanted = [out.outputs[0].token_ids for out in LLM("tiny-random", stage=0).generate(prompts, params)]
        llm = LLM("tiny-random", stage="4b", max_model_len=32)
        pool: Any = llm.stage.parts.block_pool
        small: dict[str, Any] = {"block_size": 2, "num_blocks": 17, "max_num_seqs": 3, "max_model_len": 32}
        made = LLM("tiny-random", stage="4b", block_pool=lambda blocks: pool(blocks, evictor=_Watched(make())), **small)
        outs = made.generate(prompts, params)
        for number, (out, right) in enumerate(zip(outs, wanted, strict=True)):
            got = out.outputs[0].token_ids
            expect(got == right, f"request {number}: got {got}, stage 0 gives {right}")

    name = f"Evictor {name_of(make)}"
    first = run_promises(name, [Promise("it has what a pool calls", surface, "released(entry), taken(entry), pick()")])
    if not first.ok:
        return first
    rest = run_promises(
        name,
        [
            Promise("each released entry is picked once", each_once, "forget an entry when it is picked"),
            Promise("an entry that is held again is not picked", held, "forget it in taken(entry)"),
            Promise("no entry is picked before those that continue it", leaves, "entry.parent waits for entry"),
            Promise("so it is in any tree, in any order", any_tree, "count the released children of each entry"),
            Promise("stage 4's pool runs with it, however small", in_the_pool, "try the promises above first"),
            Promise("the tokens are stage 0's", tokens, "giving up a block costs time, not tokens"),
        ],
    )
    return first.then(rest)
