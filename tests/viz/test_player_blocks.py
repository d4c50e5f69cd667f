"""The step player over blocks: its data and sentences against the books that the simulator keeps for itself."""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.core.plan import Chunk, RequestInfo, StepPlan, StepRecord
from stepengine.trace import Replay, Trace
from stepengine.viz.narrate import Narrator, narrate
from stepengine.viz.player import StepPlayer, packed, player_data

sys.path.insert(0, str(Path(__file__).parent.parent / "trace"))
from synthetic import Job, Paged, simulate_paged  # noqa: E402

MIXED = [Job(14, 20, n=3), Job(9, 22), Job(16, 16, n=2)]
RUNS: dict[str, dict[str, Any]] = {
    "recompute": {"jobs": [*MIXED[:2], Job(16, 16, n=2, arrival=4)], "num_blocks": 20},
    "swap": {"jobs": MIXED, "num_blocks": 20, "preemption": "swap", "host_blocks": 40},
    "host full": {"jobs": MIXED, "num_blocks": 20, "preemption": "swap", "host_blocks": 9},
    "forks": {"jobs": [Job(10, 14), Job(7, 9)], "num_blocks": 30, "forks": {3: 0, 5: 1}},
    "priorities": {"jobs": [Job(6, 20, priority=1), Job(6, 20), Job(6, 20, priority=1)], "num_blocks": 15},
}


def told(trace: Trace) -> list[str]:
    narrator = Narrator(Replay(trace))
    return [narrator.explain(t).text for t in range(len(trace.steps))]


def rebuilt(data: dict[str, Any]) -> Iterator[tuple[list[list[int]], list[int], list[list[int]]]]:
    """Tables, tokens held and host slots of every step, added up from the changes as the page does it."""
    count = len(data["requests"])
    tables: list[list[int]] = [[] for _ in range(count)]
    held, hosted = [0] * count, [[] for _ in range(count)]  # type: ignore[var-annotated]
    for step in data["steps"]:
        for request, keep, *blocks in step.get("tables", ()):
            tables[request] = tables[request][:keep] + blocks
        for request, start, length, *_ in step["chunks"]:
            held[request] = start + length
        for request, tokens in step.get("held", ()):
            held[request] = tokens
        for request, *slots in step.get("hosted", ()):
            hosted[request] = slots
        yield [list(table) for table in tables], list(held), [list(slots) for slots in hosted]


@pytest.mark.parametrize("name", RUNS)
def test_the_changes_add_up_to_the_books(name: str) -> None:
    run: Paged = simulate_paged(**RUNS[name])
    data = player_data(run.trace)
    assert data["layout"] == "blocks" and "tables" in data["panels"]
    for t, ((tables, held, hosted), (state, table, refs, computed, _)) in enumerate(
        zip(rebuilt(data), run.books, strict=True)
    ):
        for request in state:
            assert tables[request] == list(table[request]), (t, request)
            assert held[request] == computed[request] or not (table[request] or state[request] == "swapped")
            assert bool(hosted[request]) == (state[request] == "swapped")
        assert Counter(block for row in tables for block in row) == refs
        slots = [slot for row in hosted for slot in row]
        assert len(slots) == len(set(slots))


@pytest.mark.parametrize("name", RUNS)
def test_what_the_page_is_sent_says_the_same_in_fewer_words(name: str) -> None:
    data = player_data(simulate_paged(**RUNS[name]).trace)
    small = packed(data)
    ends: dict[int, int] = {}
    for step, short in zip(data["steps"], small["steps"], strict=True):
        chunks = [[c, ends[c], 1, 1, 0, 1, 0] if isinstance(c, int) else c for c in short["chunks"]]
        assert chunks == step["chunks"]
        ends.update({c[0]: c[1] + c[2] for c in chunks})
    for request, short in zip(data["requests"], small["requests"], strict=True):
        assert [t for a, b in short["tokens"] for t in range(a, b + 1)] == request["tokens"]
    assert len(json.dumps(small)) < len(json.dumps(data))


def test_what_is_new_and_what_is_copied_is_marked() -> None:
    run = simulate_paged(**RUNS["swap"])
    before: dict[int, set[int]] = {}  # block -> holders
    for t, (step, record) in enumerate(zip(player_data(run.trace)["steps"], run.trace.steps, strict=True)):
        now: dict[int, set[int]] = {}
        for request, table in run.books[t][1].items():
            for block in table:
                now.setdefault(block, set()).add(request)
        fresh = {block for block, holders in now.items() if not holders & before.get(block, set())}
        assert step.get("fresh", []) == sorted(fresh)
        assert [copy[1:] for copy in step.get("copies", ())] == [list(copy[1:]) for copy in record.plan.copies]
        ended = {request for request, _ in record.finished}
        before = {block: holders - ended for block, holders in now.items()}


def test_three_samples_of_fifty_tokens_share_four_blocks_and_copy_one_twice() -> None:
    run = simulate_paged([Job(50, 6, n=3)], block_size=16, num_blocks=12)
    texts = told(run.trace)
    assert texts[0].endswith("B and C wait for A's prompt, to share it.")
    assert "B and C start from A's prompt: 49 tokens shared (4 blocks), 1 to compute each." in texts[1]
    (source,) = {copy.source for copy in run.trace.steps[1].plan.copies}
    new = " and ".join(str(copy.destination) for copy in run.trace.steps[1].plan.copies)
    assert (
        f"B and C write into block {source}, which 3 share: each gets a copy, blocks {new}; A keeps block {source}."
        in texts[1]
    )
    assert not any("copy" in text for text in texts[2:])


def test_a_prompt_that_fills_its_blocks_is_shared_without_a_copy() -> None:
    run = simulate_paged([Job(48, 6, n=2)], block_size=16, num_blocks=12)
    assert not any(record.plan.copies for record in run.trace.steps)
    text = told(run.trace)[1]
    assert "B starts from A's prompt: all 48 tokens shared (3 blocks)." in text
    assert "nothing is written and nothing copied" in text and "to compute" not in text


def test_a_fork_shares_blocks_and_the_first_to_write_copies() -> None:
    run = simulate_paged([Job(10, 14)], num_blocks=30, forks={4: 0})
    text, (_, table, _, _, _) = told(run.trace)[4], run.books[3]
    (copy,) = run.trace.steps[4].plan.copies
    assert text.startswith(f"A forks into B: they share {len(table[0])} blocks.")
    assert (
        f"A writes into block {copy.source}, which 2 share: it gets a copy, block {copy.destination}; B keeps" in text
    )


def free_before(run: Paged, t: int) -> int:
    """Free blocks before step t, by the books: what was held at the end of t - 1, less what ended in it."""
    ended = {request for request, _ in run.trace.steps[t - 1].finished}
    held = {block for r, table in run.books[t - 1][1].items() if r not in ended for block in table}
    return len(run.refs) - len(held)


@pytest.mark.parametrize("name", ["recompute", "swap", "host full", "priorities"])
def test_who_gives_way_is_told_with_cause_and_count(name: str) -> None:
    run = simulate_paged(**RUNS[name])
    seen = 0
    for t, (text, record) in enumerate(zip(told(run.trace), run.trace.steps, strict=True)):
        plan = record.plan
        if not (plan.preempted or plan.swapped_out):
            assert "gives back" not in text.split("ends")[0] and "to the host" not in text
            continue
        seen += 1
        need, free = map(int, re.match(r".*? needs? (\d+) blocks?, (\d+) free: ", text).groups())  # type: ignore[union-attr]
        assert free == free_before(run, t) < need
        table = run.books[t - 1][1]
        for words, ids in (
            (r"gives? back (\d+) block", plan.preempted),
            (r"moves? to the host: (\d+) block", [swap.request for swap in plan.swapped_out]),
        ):
            if ids:
                assert int(re.search(words, text).group(1)) == sum(len(table[r]) for r in ids)  # type: ignore[union-attr]
    assert seen


def test_the_youngest_is_called_so_only_where_priorities_do_not_decide() -> None:
    run = simulate_paged(**RUNS["priorities"])
    steps = [(t, record.plan.preempted) for t, record in enumerate(run.trace.steps) if record.plan.preempted]
    texts = told(run.trace)
    assert steps[0][1] == (2,) and ": C, the youngest of the lowest priority, gives back" in texts[steps[0][0]]
    alone = [t for t, victims in steps if victims == (0,)]  # of priority 1, beside B of priority 0
    assert all(": A, of the lowest priority, gives back" in texts[t] for t in alone)
    equal = simulate_paged(**RUNS["recompute"])
    assert any(", the youngest," in text for text in told(equal.trace))
    assert not any("priority" in text for text in told(equal.trace))


def test_a_victim_chosen_otherwise_is_not_called_the_youngest() -> None:
    trace = Trace({"stage": "2", "block_size": 2, "num_blocks": 4, "max_model_len": 8})
    for i in range(2):
        trace.add_request(RequestInfo(i, (1, 2, 3), 6, group=i))
    trace.append(StepRecord(StepPlan(0, (Chunk(0, 0, 3, (1, 2)), Chunk(1, 0, 3, (3, 4))), (0, 1)), (5, 5)))
    trace.append(StepRecord(StepPlan(1, (Chunk(0, 3, 1), Chunk(1, 3, 1))), (5, 5)))
    trace.append(StepRecord(StepPlan(2, (Chunk(1, 4, 1, (1,)),), preempted=(0,)), (5,)))
    assert narrate(Replay(trace), 2) == "A and B need 2 blocks, 0 free: A gives back 2 blocks. B gets its next token."


def test_the_host_is_named_when_it_has_no_room() -> None:
    run = simulate_paged(**RUNS["host full"])
    texts, used, seen = told(run.trace), 0, 0
    for text, record in zip(texts, run.trace.steps, strict=True):
        if record.plan.preempted and not record.plan.swapped_out:
            seen += 1
            assert (", as the host is full" if used == 9 else f", as the host has room for {9 - used}") in text
        used += sum(len(swap.pairs) for swap in record.plan.swapped_out)
        used -= sum(len(swap.pairs) for swap in record.plan.swapped_in)
    assert seen or any("as the host" in text for text in texts)


def test_a_return_from_the_host_says_what_is_not_run_again() -> None:
    run = simulate_paged(**RUNS["swap"])
    seen = 0
    for t, (text, record) in enumerate(zip(told(run.trace), run.trace.steps, strict=True)):
        if record.plan.swapped_in:
            seen += 1
            ids = [swap.request for swap in record.plan.swapped_in]
            tokens = sum(run.books[t - 1][3][r] for r in ids)
            blocks = sum(len(swap.pairs) for swap in record.plan.swapped_in)
            assert re.search(
                rf"comes? back from the host: {blocks} blocks?, and none of (its|their) {tokens} tokens", text
            )
    assert seen


def test_shared_blocks_that_stay_are_not_called_free() -> None:
    run = simulate_paged(**RUNS["recompute"])
    found = 0
    for t, (text, record) in enumerate(zip(told(run.trace), run.trace.steps, strict=True)):
        if len(record.plan.preempted) == 1 and not record.finished:
            (victim,), table = record.plan.preempted, run.books[t - 1][1]
            others = {block for r, blocks in table.items() if r != victim for block in blocks}
            kept = len(set(table[victim]) & others)
            assert (f"({kept} still held by others)" in text) == (kept > 0)
            found += 1
    assert found


def test_why_the_head_of_the_queue_waits_is_the_schedulers_word() -> None:
    trace = Trace({"stage": "2", "block_size": 2, "num_blocks": 4, "max_model_len": 8})
    for i in range(3):
        trace.add_request(RequestInfo(i, (1, 2, 3, 4), 3, group=i))
    blocked = "it needs 2 blocks, 1 is free"
    trace.append(StepRecord(StepPlan(0, (Chunk(0, 0, 4, (1, 2)),), (0, 1, 2), blocked=blocked), (5,)))
    trace.append(StepRecord(StepPlan(1, (Chunk(0, 4, 1, (3,)),), blocked=blocked), (5,)))
    assert narrate(Replay(trace), 0).endswith(f"B arrives and waits: {blocked}; C arrives behind it.")
    assert narrate(Replay(trace), 1).endswith(
        f"Its blocks are full: A takes block 3; 1 stays free. B waits: {blocked}."
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_sentence_contradicts_its_step(seed: int) -> None:
    """Any run can be told, every number of free blocks in it is right, and nobody is named who is not concerned."""
    dice = random.Random(seed)
    jobs = [
        Job(
            dice.randint(1, 13), dice.randint(1, 12), dice.choice((1, 1, 3)), dice.choice((0, 0, 1)), dice.randint(0, 9)
        )
        for _ in range(5)
    ]
    swap, host = dice.choice((("recompute", 0), ("swap", 4), ("swap", 40)))
    run = simulate_paged(jobs, 6, 4, dice.randint(7, 14), swap, host, {dice.randint(1, 6): 0} if seed % 2 else {})
    told_ = [Narrator(Replay(run.trace)).explain(t) for t in range(len(run.trace.steps))]
    for t, said in enumerate(told_):
        if found := re.search(r"(\d+) free: ", said.text):
            assert int(found.group(1)) <= free_before(run, t)
        if found := re.search(r"; (\d+|none) stays? free", said.text):
            assert int(found.group(1).replace("none", "0")) == len(run.refs) - len(run.books[t][2])
        state = run.books[t][0]
        assert all(request in state for request in said.named)
    player_data(run.trace)


def test_a_fork_that_had_to_wait_runs_what_it_inherits() -> None:
    run = simulate_paged([Job(5, 3)], slots=1, num_blocks=9, forks={1: 0})
    texts = told(run.trace)
    assert "A forks into B, which waits, with 1 token generated so far and no block yet." in texts[1]
    (start,) = [t for t, record in enumerate(run.trace.steps) if record.plan.chunks[0][:2] == (1, 0)]
    assert run.trace.steps[start].plan.chunks[0].length == 6
    assert "B starts: its 5 prompt tokens and the 1 generated before it was forked run at once." in texts[start]


def test_those_that_are_aborted_together_are_told_together() -> None:
    trace = Trace({"stage": "2", "block_size": 4, "num_blocks": 4, "max_model_len": 8})
    for i in range(3):
        trace.add_request(RequestInfo(i, (1, 2), 5, group=i))
    trace.append(StepRecord(StepPlan(0, (Chunk(0, 0, 2, (1,)), Chunk(1, 0, 2, (2,))), (0, 1, 2)), (5, 5)))
    trace.append(StepRecord(StepPlan(1, (Chunk(0, 2, 1),)), (5,), aborted=((1, "abort"), (2, "abort"))))
    assert narrate(Replay(trace), 1).startswith("B and C are aborted after 1 and 0 tokens.")


def test_the_engines_own_steps_are_told_with_their_cause() -> None:
    llm = LLM("tiny-random", stage=2, trace=True, num_blocks=13, block_size=16, max_model_len=128, max_num_seqs=6,
              preemption="swap", swap_space=2**16)  # fmt: skip
    prompts = [[3 + k for k in range(length)] for length in (50, 48, 9)]
    params = [SamplingParams(n=n, max_tokens=m, temperature=0, ignore_eos=True) for n, m in ((3, 30), (2, 34), (1, 40))]
    llm.generate(prompts, params)
    moved = 0
    for text, record in zip(told(llm.trace), llm.trace.steps, strict=True):
        if record.plan.swapped_out or record.plan.preempted:
            moved += 1
            need, free = map(int, re.match(r".*? needs? (\d+) blocks?, (\d+) free: ", text).groups())  # type: ignore[union-attr]
            assert need > free and ", the youngest" in text
        for request, _ in record.finished:
            assert re.search(rf"\b{'ABCDEF'[request]}\b.* ends? after", text)
    assert moved
    assert "B and C start from A's prompt: 49 tokens shared (4 blocks), 1 to compute each." in told(llm.trace)[1]
    assert "E starts from D's prompt: all 48 tokens shared (3 blocks)." in told(llm.trace)[1]


def test_a_block_as_long_as_the_model_is_still_a_block() -> None:
    run = simulate_paged([Job(5, 4), Job(3, 6)], block_size=16, num_blocks=4)
    run.trace.meta["max_model_len"] = 16
    assert player_data(run.trace)["layout"] == "blocks"


def test_room_shows_the_schedule_and_the_map() -> None:
    trace = simulate_paged(**RUNS["swap"]).trace
    assert json.loads(StepPlayer(trace, size="room").data)["panels"] == ["schedule", "kv"]
    assert json.loads(StepPlayer(trace, panels=["tables", "kv"]).data)["panels"] == ["tables", "kv"]


def crowd(requests: int = 64, steps: int = 500) -> Trace:
    """Everybody runs in every step, each in blocks of its own: the most that there is to draw."""
    size = 16
    per = -(-(steps + 10) // size)
    trace = Trace({"stage": "2", "block_size": size, "num_blocks": requests * per, "max_model_len": 1024})
    for i in range(requests):
        trace.add_request(RequestInfo(i, tuple(range(10)), steps, group=i))
    free = iter(range(1, requests * per + 1))
    for t in range(steps):
        start, end = (0, 10) if t == 0 else (9 + t, 10 + t)
        grown = -(-end // size) - -(-start // size) if t else 1
        chunks = [Chunk(i, start, end - start, tuple(next(free) for _ in range(grown))) for i in range(requests)]
        trace.append(StepRecord(StepPlan(t, tuple(chunks), tuple(range(requests)) if t == 0 else ()), (7,) * requests))
    trace.texts = {i: ("a prompt", tuple(f" tok{k % 10}" for k in range(steps))) for i in range(requests)}
    return trace


def test_sixty_four_requests_over_five_hundred_steps_stay_under_a_megabyte(tmp_path: Path) -> None:
    page = StepPlayer(crowd()).save_html(tmp_path / "player.html")
    assert page.stat().st_size < 1_000_000
