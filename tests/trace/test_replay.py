"""Replay against hand-made plans and a simulator that keeps its own books."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.core.plan import Chunk, Copy, RequestInfo, StepPlan, StepRecord, Swap
from stepengine.errors import TraceError
from stepengine.trace import Replay, Trace
from tests.trace.synthetic import EXAMPLE, Job, simulate, simulate_paged


def handmade(*records: StepRecord, prompts=(5, 3), block_size=4, num_blocks=6) -> Trace:
    trace = Trace({"stage": "2", "block_size": block_size, "num_blocks": num_blocks})
    for request, length in enumerate(prompts):
        trace.add_request(RequestInfo(request, tuple(range(length)), 8, group=request))
    for record in records:
        trace.append(record)
    return trace


def step(number: int, *chunks: Chunk, tokens=None, **fields) -> StepRecord:
    plan = {key: fields.pop(key) for key in list(fields) if key in StepPlan._fields}
    return StepRecord(StepPlan(number, chunks, **plan), tokens or (9,) * len(chunks), **fields)


def test_a_slot_run_step_by_step():
    trace = simulate(((3, 2), (2, 3)), stage="1b", slots=2, max_model_len=8)
    first, second, last = (Replay(trace).at(t) for t in range(3))
    assert first.state == {0: "running", 1: "running"}
    assert first.table == {0: (1,), 1: (2,)} and first.new_blocks == {1, 2}
    assert first.computed == {0: 3, 1: 2} and first.block_tokens == {1: 3, 2: 2}
    assert second.computed == {0: 4, 1: 3} and second.new_blocks == frozenset()
    assert last.state == {0: "finished", 1: "running"} and last.table == {0: (), 1: (2,)} and last.refs == {2: 1}
    assert last.reason == {0: "length"}
    end = Replay(trace).after(-1)
    assert end.refs == {} and set(end.state.values()) == {"finished"}
    assert end.outputs == trace.output_ids()


@pytest.mark.parametrize("stage", ["0", "1a", "1b", "2"])
def test_outputs_and_pool_add_up(stage):
    arrivals = (0, 0, 0, 2, 70, 71)
    trace = simulate(EXAMPLE, stage=stage, arrivals=arrivals, num_blocks=7)
    size, total = trace.meta["block_size"], trace.meta["num_blocks"]
    replay = Replay(trace)
    for t, snapshot in enumerate(replay):
        assert snapshot.index == t
        for request, table in snapshot.table.items():
            assert all(1 <= block <= total for block in table)
            assert snapshot.computed[request] <= len(table) * size
        assert sum(snapshot.block_tokens.values()) == sum(snapshot.computed.values())
        # without sharing, references are the table entries
        assert sum(snapshot.refs.values()) == sum(len(table) for table in snapshot.table.values())
        for request, arrival in enumerate(arrivals):
            assert (snapshot.state[request] == "not arrived") == (snapshot.record.plan.step < arrival)
    final = replay.after(-1)
    assert final.refs == {} and final.block_tokens == {}
    assert {r: len(ids) for r, ids in final.outputs.items()} == {r: n for r, (_, n) in enumerate(EXAMPLE)}


def test_the_paged_example_preempts():
    assert any(record.plan.preempted for record in simulate(stage="2", num_blocks=7).steps)


def test_random_access_equals_stepping():
    trace = simulate(EXAMPLE * 8, stage="2", num_blocks=7)
    assert len(trace.steps) > 130  # beyond two checkpoints
    forward = list(Replay(trace))
    jumping = Replay(trace)
    for t in (len(forward) - 1, 3, 100, 99, 64, 63, 0, 128, 65):
        assert jumping.at(t) == forward[t]
        assert jumping.at(t) == forward[t]
    assert jumping.at(-1) == forward[-1]


def test_preemption_gives_everything_back():
    trace = handmade(
        step(0, Chunk(0, 0, 5, (1, 2)), Chunk(1, 0, 3, (3,)), arrived=(0, 1)),
        step(1, Chunk(0, 5, 1), preempted=(1,)),
        step(2, Chunk(1, 0, 4, (4,))),
    )
    middle, last = Replay(trace).at(1), Replay(trace).at(2)
    assert middle.state[1] == "waiting" and middle.table[1] == () and middle.computed[1] == 0
    assert len(middle.outputs[1]) == 1  # tokens already sampled stay
    assert last.computed[1] == 4 and last.table[1] == (4,) and last.refs == {1: 1, 2: 1, 4: 1}


def test_prefix_hit_fork_and_copy_on_write():
    trace = handmade(
        step(0, Chunk(0, 0, 5, (1, 2)), arrived=(0,)),
        step(1, Chunk(1, 4, 1, (1, 3), cached=4), arrived=(1,)),
        step(2, Chunk(0, 5, 1), Chunk(2, 5, 1), forked=((0, 2),), copies=(Copy(2, 1, 2, 5),)),
        prompts=(5, 5, 5),
    )
    hit, forked = Replay(trace).at(1), Replay(trace).at(2)
    assert hit.refs == {1: 2, 2: 1, 3: 1} and hit.hit_blocks == {1} and hit.new_blocks == {3}
    assert forked.table == {0: (1, 2), 1: (1, 3), 2: (1, 5)} and forked.refs == {1: 3, 2: 1, 3: 1, 5: 1}
    assert forked.outputs[2][:1] == forked.outputs[0][:1] and trace.output_ids()[2] == forked.outputs[2]
    assert forked.block_tokens == {1: 4, 2: 2, 3: 1, 5: 2}


def test_swap_and_abort():
    trace = handmade(
        step(0, Chunk(0, 0, 5, (1, 2)), Chunk(1, 0, 3, (3,)), arrived=(0, 1)),
        step(1, Chunk(1, 3, 1), swapped_out=(Swap(0, ((1, 7), (2, 8))),)),
        step(2, Chunk(0, 5, 1), swapped_in=(Swap(0, ((4, 7), (5, 8))),), aborted=((1, "abort"),)),
    )
    out, back = Replay(trace).at(1), Replay(trace).at(2)
    assert out.state[0] == "swapped" and out.computed[0] == 5 and out.refs == {3: 1}
    assert back.table == {0: (4, 5), 1: ()} and back.computed[0] == 6 and back.new_blocks == {4, 5}
    assert back.state[1] == "finished" and back.reason[1] == "abort"


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([step(3, Chunk(0, 0, 5, (1, 2))), step(4, Chunk(1, 0, 3, (2,)))], "step 4, request 1 is given block 2, which"),
        ([step(3, Chunk(0, 0, 5, (1, 9)))], "step 3, request 0 is given block 9, outside 1 to 6"),
        ([step(3, Chunk(0, 0, 5, (1, 0)))], "block 0, outside"),
        ([step(3, Chunk(0, 0, 5, (1,)))], "step 3, request 0 writes token 4 but its blocks hold 4"),
        ([step(3, Chunk(0, 1, 4, (1, 2)))], "starts at token 1 although only 0 have K/V"),
        ([step(3, Chunk(0, 0, 6, (1, 2)))], "runs tokens [0, 6) of the 5"),
        ([step(3, Chunk(7, 0, 5, (1, 2)))], "request 7 is used but never arrived"),
        ([step(3, Chunk(0, 0, 5, (1, 2)), arrived=(0,), finished=((0, "stop"),)), step(4, Chunk(0, 5, 1))], "finished"),
        ([step(3, preempted=(0,), arrived=(0,))], "step 3, request 0 is preempted although it is waiting"),
        ([step(3, Chunk(0, 0, 5, (1, 2)), arrived=(0,), copies=(Copy(0, 2, 1, 3),))], "not entry 2 of its table"),
        ([step(3, Chunk(0, 0, 5, (1, 2)), arrived=(0,), tokens=(1, 2))], "1 chunks but 2 token ids"),
        ([step(3, Chunk(0, 0, 5, (1, 2))), step(4, forked=((1, 0),))], "request 0 is forked from request 1 although"),
        ([step(3, Chunk(0, 0, 5, (1, 2))), step(4, swapped_out=(Swap(0, ((2, 1), (1, 2))),))], "blocks other than"),
        ([step(3, Chunk(0, 0, 5, (1, 2))), step(4, swapped_out=(Swap(0, ((1, 1), (2, 1))),))], "not all free"),
        (
            [
                step(3, Chunk(0, 0, 5, (1, 2))),
                step(4, swapped_out=(Swap(0, ((1, 1), (2, 2))),)),
                step(5, swapped_in=(Swap(0, ((1, 2), (2, 1))),)),
            ],
            "step 5, request 0 swaps in other host slots",
        ),
    ],
)
def test_inconsistencies_name_step_and_request(records, complaint):
    first = records[0]
    if not first.plan.arrived:
        records = [first._replace(plan=first.plan._replace(arrived=(0, 1))), *records[1:]]
    with pytest.raises(TraceError) as error:
        Replay(handmade(*records)).at(len(records) - 1)
    assert complaint in str(error.value)


def test_a_step_outside_the_trace():
    replay = Replay(simulate())
    with pytest.raises(TraceError, match="Step 17 is not in this trace, which has 17 steps"):
        replay.at(17)
    with pytest.raises(TraceError):
        Replay(Trace({})).at(0)


JOBS = st.lists(
    st.builds(Job, st.integers(1, 13), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1), st.integers(0, 12)),
    min_size=1,
    max_size=5,
)


@given(JOBS, st.sampled_from(["recompute", "swap"]), st.integers(6, 14), st.integers(1, 9), st.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_replay_equals_the_books_of_a_simulator_that_shares_copies_and_swaps(jobs, preemption, blocks, hosts, forked):
    run = simulate_paged(jobs, 5, 4, blocks, preemption, hosts, {forked: 0} if jobs[0].arrival < forked else {})
    replay = Replay(run.trace)
    for snapshot, (state, table, refs, computed, outputs) in zip(replay, run.books, strict=True):
        later = {r: "not arrived" for r in run.trace.requests if r not in state}
        assert snapshot.state == state | later
        assert {r: blocks for r, blocks in snapshot.table.items() if blocks} == {r: b for r, b in table.items() if b}
        assert snapshot.refs == refs
        held = {r for r, s in state.items() if s in ("running", "swapped")}
        assert {r: snapshot.computed[r] for r in held} == {r: computed[r] for r in held}
        assert {r: snapshot.outputs[r] for r in outputs} == outputs
        assert set(snapshot.hosted) == {r for r, s in state.items() if s == "swapped"}
        assert snapshot.block_tokens.keys() == refs.keys()
    assert replay.after(-1).refs == {} and replay.after(-1).hosted == {}


def test_samples_share_the_prompt_and_copy_its_last_block_on_the_first_write():
    trace = simulate_paged([Job(prompt=10, output=3, n=3)]).trace
    prompt, others, decode = (Replay(trace).at(t) for t in range(3))
    assert prompt.table[0] == (1, 2, 3) and prompt.computed[0] == 10 and prompt.state[1] == "waiting"
    assert others.table == {0: (1, 2, 3), 1: (1, 2, 4), 2: (1, 2, 5)} and others.refs == {1: 3, 2: 3, 3: 1, 4: 1, 5: 1}
    assert others.hit_blocks == {1, 2, 3} and others.new_blocks == {4, 5}
    assert others.block_tokens == {1: 4, 2: 4, 3: 2, 4: 2, 5: 2} and others.computed == {0: 10, 1: 10, 2: 10}
    assert decode.computed == {0: 11, 1: 11, 2: 11} and not decode.new_blocks
    assert not any(record.plan.copies for record in simulate_paged([Job(8, 3, n=3)]).trace.steps)  # ends on a boundary


def test_a_fork_that_has_to_wait_takes_over_the_tokens_only():
    first = step(0, Chunk(0, 0, 5, (1, 2)), arrived=(0,))
    now = handmade(first, step(1, Chunk(0, 5, 1), forked=((0, 1),)), prompts=(5, 5))
    later = handmade(first, step(1, Chunk(0, 5, 1), arrived=(1,), forked=((0, 1),)), prompts=(5, 5))
    shared, alone = Replay(now).at(1), Replay(later).at(1)
    assert shared.table[1] == (1, 2) and shared.refs == {1: 2, 2: 2} and shared.state[1] == "running"
    assert alone.table[1] == () and alone.refs == {1: 1, 2: 1} and alone.state[1] == "waiting"
    assert alone.outputs[1] == shared.outputs[1] == (9,) and (alone.computed[1], shared.computed[1]) == (0, 5)
