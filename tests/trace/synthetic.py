"""Traces made by a brute-force simulator, so that readers of traces are tested without an engine.

`simulate` follows the plan conventions of the stages: "0" and "1a" batch statically, "1b" continuously in slots,
"2" continuously in small blocks, preempting the youngest request when a block is missing. `simulate_paged` adds what
samples, forks, priorities and swapping bring, and keeps books of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

from stepengine.core.plan import Chunk, Copy, RequestInfo, StepPlan, StepRecord, Swap
from stepengine.trace import Trace

EXAMPLE = ((5, 9), (3, 3), (8, 5), (4, 12), (6, 2), (2, 7))  # (prompt tokens, output tokens) per request


class Live:
    """One request in the simulator."""

    def __init__(self, request: int, prompt: int, output: int, arrival: int) -> None:
        self.id, self.prompt, self.output, self.arrival = request, prompt, output, arrival
        self.done, self.computed, self.blocks = 0, 0, []

    @property
    def length(self) -> int:
        return self.prompt + self.done


def simulate(
    lengths: Sequence[tuple[int, int]] = EXAMPLE,
    stage: str = "1b",
    slots: int = 3,
    arrivals: Sequence[int] | None = None,
    max_model_len: int = 32,
    block_size: int = 4,
    num_blocks: int = 12,
) -> Trace:
    """The trace of requests that arrive before the steps in `arrivals` (default: all before step 0)."""
    static, naive, paged = stage in ("0", "1a"), stage == "0", stage == "2"
    size, total = (block_size, num_blocks) if paged else (0, 0) if naive else (max_model_len, slots)
    trace = Trace(
        {
            "stage": stage, "model": "synthetic", "device": "cpu", "dtype": "float32", "block_size": size,
            "num_blocks": total, "max_num_seqs": slots, "max_model_len": max_model_len, "kv_bytes_per_token": 1024,
        }
    )  # fmt: skip
    arrivals = arrivals or [0] * len(lengths)
    coming = [Live(i, p, n, a) for i, ((p, n), a) in enumerate(zip(lengths, arrivals, strict=True))]
    waiting: list[Live] = []
    running: list[Live] = []
    free, clock, step = list(range(1, total + 1)), 0.0, 0
    while coming or waiting or running:
        arrived = [r for r in coming if r.arrival <= step]
        for r in arrived:
            prompt = tuple((7 * r.id + k) % 50 for k in range(r.prompt))
            trace.add_request(RequestInfo(r.id, prompt, r.output, group=r.id, t_arrived=clock))
        waiting += arrived
        coming = [r for r in coming if r.arrival > step]
        if not waiting and not running:
            step = min(r.arrival for r in coming)
            continue
        new: list[Live] = []
        while waiting and len(running) + len(new) < slots and not (static and running):
            need = -(-(waiting[0].length + 1) // size) if paged else 1
            if size and need > len(free):
                break
            new.append(waiting.pop(0))
            if size:
                new[-1].blocks, free = free[:need], free[need:]
        preempted: list[int] = []
        grown: dict[int, tuple[int, ...]] = {r.id: tuple(r.blocks) for r in new}
        for r in list(running) if paged and not new else ():
            while r in running and r.length > len(r.blocks) * size:
                if not free:  # the youngest, perhaps r itself, gives everything back
                    victim = running.pop()
                    free, victim.blocks, victim.computed = free + victim.blocks, [], 0
                    grown.pop(victim.id, None)
                    waiting.insert(0, victim)
                    preempted.append(victim.id)
                    continue
                grown[r.id] = (free[0],)
                r.blocks.append(free.pop(0))
        rows = new or running
        chunks = tuple(Chunk(r.id, r.computed, r.length - r.computed, grown.get(r.id, ())) for r in rows)
        begin, run = clock, clock + 0.0005
        clock = run + 0.010 + 0.001 * sum(c.length for c in chunks)
        running += new
        for r in rows:
            r.computed, r.done = 0 if naive else r.length, r.done + 1
        ended = [r for r in rows if r.done == r.output]
        running = [r for r in running if r not in ended]
        free += [block for r in ended for block in r.blocks]
        trace.append(
            StepRecord(
                StepPlan(step, chunks, tuple(r.id for r in arrived), tuple(preempted)),
                tuple((11 * r.id + r.done) % 50 for r in rows),
                tuple((r.id, "length") for r in ended),
                t_plan=begin,
                t_run=run,
                t_done=clock,
            )
        )
        step += 1
    return trace


class Job(NamedTuple):
    """What one user asks of `simulate_paged`."""

    prompt: int
    output: int
    n: int = 1
    priority: int = 0
    arrival: int = 0  # step


class Row(Live):
    """One sample in the paged simulator: its tokens, blocks and host copy."""

    def __init__(self, info: RequestInfo, arrival: int) -> None:
        super().__init__(info.id, len(info.prompt_ids), info.max_tokens, arrival)
        self.info, self.tokens, self.host, self.state = info, list(info.prompt_ids), [], "waiting"

    @property
    def order(self) -> tuple[int, int]:
        return self.info.priority, self.id


class Paged:
    """A stage 2 that knows only lists: sharing between samples, copy-on-write, forks, both preemptions.

    `memory[block]` holds the tokens themselves, so that a wrong table shows as a wrong token. `books` has, for every
    step with its work done, (state, table, refs, computed, outputs), kept apart from the plans that `trace` has.
    """

    def __init__(self, jobs, slots, block_size, num_blocks, preemption, host_blocks) -> None:  # type: ignore[no-untyped-def]
        self.jobs, self.slots, self.size, self.swaps = list(jobs), slots, block_size, preemption == "swap"
        self.trace = Trace(
            {
                "stage": "2", "model": "synthetic", "device": "cpu", "dtype": "float32", "block_size": block_size,
                "num_blocks": num_blocks, "max_num_seqs": slots, "max_model_len": block_size * num_blocks,
                "kv_bytes_per_token": 1024, "preemption": preemption, "num_host_blocks": host_blocks,
            }
        )  # fmt: skip
        self.memory: dict[int, list[int]] = {block: [-1] * block_size for block in range(1, num_blocks + 1)}
        self.refs = dict.fromkeys(self.memory, 0)
        self.host: dict[int, list[int]] = {slot: [] for slot in range(1, host_blocks + 1)}
        self.rows: list[Row] = []
        self.books: list[tuple] = []
        self.step = 0

    def among(self, state: str) -> list[Row]:
        return sorted((r for r in self.rows if r.state == state), key=lambda r: r.order)

    def alloc(self, count: int) -> list[int] | None:
        free = [block for block, refs in self.refs.items() if not refs][:count]
        if len(free) < count:
            return None
        self.refs.update(dict.fromkeys(free, 1))
        return free

    def let_go(self, row: Row) -> None:
        for block in row.blocks:
            self.refs[block] -= 1
        row.blocks = []

    def arrive(self) -> list[int]:
        arrived, ids = [], len(self.rows)
        for job in [job for job in self.jobs if job.arrival <= self.step]:
            self.jobs.remove(job)
            prompt = tuple((7 * ids + k) % 50 for k in range(job.prompt))
            group = ids
            for sample in range(job.n):
                info = RequestInfo(ids, prompt, job.output, job.priority, group, sample, 0.01 * self.step)
                self.trace.add_request(info)
                self.rows.append(Row(info, self.step))
                arrived.append(ids)
                ids += 1
        return arrived

    def fork(self, parent: int, arrived: list[int]) -> tuple[int, int]:
        old = self.rows[parent]
        info = old.info._replace(id=len(self.rows), sample=len(self.rows))
        new = Row(info, self.step)
        new.tokens, new.done = list(old.tokens), old.done
        if old.state == "running" and len(self.among("running")) < self.slots:
            new.state, new.computed, new.blocks = "running", old.computed, list(old.blocks)
            for block in new.blocks:
                self.refs[block] += 1
        else:
            arrived.append(info.id)
        self.trace.add_request(info)
        self.rows.append(new)
        return parent, info.id

    def sibling(self, row: Row) -> Row | None:
        """A sample of the same prompt that has it computed."""
        same = (r for r in self.among("running") if r.info.group == row.info.group and r.computed >= r.prompt)
        return next(same, None)

    def start(self, row: Row) -> tuple[Chunk, list[Copy]] | None:
        """Admit a waiting row; from a sibling's prompt blocks where one is alive. None: no room yet."""
        sibling = self.sibling(row)
        shared = sibling.blocks[: -(-row.prompt // self.size)] if sibling else []
        whole = row.prompt % self.size == 0
        cached = (row.prompt if whole or row.length > row.prompt else row.prompt - 1) if shared else 0
        copied = bool(shared) and not whole
        new = self.alloc(-(-row.length // self.size) - len(shared) + copied)
        if new is None:
            return None
        for block in shared:
            self.refs[block] += 1
        copies = []
        if copied:
            copies, new = [Copy(row.id, len(shared) - 1, shared[-1], new[0])], new[1:]
        row.blocks = [*shared, *new]
        begin = min(cached, row.length - 1)
        return Chunk(row.id, begin, row.length - begin, tuple(row.blocks), cached), copies

    def room(self, row: Row) -> tuple[tuple[int, ...], list[Copy]] | None:
        """Blocks to append and copies to make before the row's newest token can be written; None: pool full."""
        entry = (row.length - 1) // self.size
        if entry < len(row.blocks) and self.refs[row.blocks[entry]] == 1:
            return (), []
        new = self.alloc(1)
        if new is None:
            return None
        if entry < len(row.blocks):
            return (), [Copy(row.id, entry, row.blocks[entry], new[0])]
        row.blocks += new
        return tuple(new), []

    def preempt(self, victim: Row) -> Swap | None:
        free = [slot for slot, kept in self.host.items() if not kept]
        pairs = None
        if self.swaps and len(free) >= len(victim.blocks):
            pairs = tuple(zip(victim.blocks, free, strict=False))
            for block, slot in pairs:
                self.host[slot] = list(self.memory[block])
            victim.host, victim.state = [slot for _, slot in pairs], "swapped"
        else:
            victim.computed, victim.state = 0, "waiting"
        self.let_go(victim)
        return Swap(victim.id, pairs) if pairs else None

    def swap_in(self, row: Row) -> Swap | None:
        new = self.alloc(len(row.host))
        if new is None:
            return None
        for block, slot in zip(new, row.host, strict=True):
            self.memory[block], self.host[slot] = self.host[slot], []
        pairs, row.host, row.blocks, row.state = tuple(zip(new, row.host, strict=True)), [], new, "running"
        return Swap(row.id, pairs)

    def run(self, forks: dict[int, int]) -> None:
        """One step: plan it, do it, write both down."""
        arrived = self.arrive()
        parents = [self.rows[forks[self.step]]] if self.step in forks else []
        forked = [self.fork(parent.id, arrived) for parent in parents if parent.state != "finished"]
        chunks, copies, swapped_in, swapped_out, preempted, starting = [], [], [], [], [], []
        for row in sorted(self.among("waiting") + self.among("swapped"), key=lambda r: r.order):
            if len(self.among("running")) + len(starting) >= self.slots:
                break
            if row.state == "swapped":
                swap = self.swap_in(row)
                if swap is None:
                    break
                swapped_in.append(swap)
            elif self.sibling(row) is None and any(r.info.group == row.info.group for r in starting):
                break  # the prompt runs in this step; a later one can share it
            else:
                granted = self.start(row)
                if granted is None:
                    break
                chunks.append(granted[0])
                copies += granted[1]
                starting.append(row)
        for row in [] if starting else self.among("running"):
            while row.state == "running":
                got = self.room(row)
                if got is not None:
                    chunks.append(Chunk(row.id, row.computed, row.length - row.computed, got[0]))
                    self.apply(got[1])  # at once: the next sharer may be the last one
                    copies += got[1]
                    break
                if swapped_in:
                    break  # what has just come back is not sent away in the same step
                victim = self.among("running")[-1]
                swap = self.preempt(victim)
                swapped_out += [swap] if swap else []
                preempted += [] if swap else [victim.id]
        if starting:
            self.apply(copies)
        token_ids, ended = [], []
        for chunk in chunks:
            row = self.rows[chunk.request]
            for k in range(chunk.start, chunk.end):
                self.memory[row.blocks[k // self.size]][k % self.size] = row.tokens[k]
            row.state, row.computed, row.done = "running", chunk.end, row.done + 1
            token_ids.append((11 * row.id + row.done) % 50)
            row.tokens.append(token_ids[-1])
            ended += [(row.id, "length")] if row.done == row.output else []
        for row in self.among("running"):
            stored = [token for block in row.blocks for token in self.memory[block]]
            assert stored[: row.computed] == row.tokens[: row.computed], f"request {row.id} reads others' tokens"
        plan = StepPlan(self.step, tuple(chunks), tuple(arrived), tuple(preempted), tuple(swapped_out),
                        tuple(swapped_in), tuple(copies))  # fmt: skip
        begin = 0.01 * self.step
        self.trace.append(
            StepRecord(plan, tuple(token_ids), tuple(ended), (), tuple(forked), begin, begin, begin + 0.01)
        )
        self.books.append((
            {r.id: r.state for r in self.rows}, {r.id: tuple(r.blocks) for r in self.rows},
            {block: refs for block, refs in self.refs.items() if refs}, {r.id: r.computed for r in self.rows},
            {r.id: tuple(r.tokens[r.prompt :]) for r in self.rows},
        ))  # fmt: skip
        for request, _ in ended:
            self.let_go(self.rows[request])
            self.rows[request].state = "finished"
        self.step += 1

    def apply(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            row = self.rows[copy.request]
            self.memory[copy.destination] = list(self.memory[copy.source])
            row.blocks[copy.entry] = copy.destination
            self.refs[copy.source] -= 1


def simulate_paged(
    jobs: Sequence[Job],
    slots: int = 8,
    block_size: int = 4,
    num_blocks: int = 16,
    preemption: str = "recompute",
    host_blocks: int = 0,
    forks: dict[int, int] | None = None,  # step -> parent
) -> Paged:
    """Run the jobs to their end; `.trace` is what an engine would have recorded, `.books` what is true of it."""
    run = Paged(jobs, slots, block_size, num_blocks, preemption, host_blocks)
    while run.jobs or any(row.state != "finished" for row in run.rows):
        run.run(forks or {})
        assert run.step < 5_000, "the simulator does not end: its pool is too small for one request"
    return run
