"""What is replayed from the plans alone is what the live pool and the requests hold, at every step."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine import LLM, SamplingParams
from stepengine.core.request import State
from stepengine.trace import Replay

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 20), st.integers(1, 3), st.integers(0, 2)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("fork"), st.integers(0, 12)),
        st.tuples(st.just("abort"), st.integers(0, 12)),
    ),
    min_size=3,
    max_size=25,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    events=EVENTS,
    how=st.sampled_from(["recompute", "swap"]),
    size=st.sampled_from([1, 3, 16]),
    spare=st.integers(0, 40),
)
def test_the_trace_tells_the_truth(events, how, size, spare):
    num_blocks = -(-64 // size) + spare
    llm = LLM(
        "tiny-random", stage=2, max_model_len=64, max_num_seqs=4, block_size=size, num_blocks=num_blocks,
        preemption=how, trace=True,
    )  # fmt: skip
    engine = llm.engine
    live = []
    for kind, *rest in [*events, ("step", 1000)]:
        if kind == "add":
            prompt, output, n, priority = rest
            params = SamplingParams(max_tokens=output, n=n, temperature=1.0, seed=prompt, ignore_eos=True)
            engine.add_request([1 + prompt] * prompt, params, priority=priority)
        elif kind == "fork" and (parents := [r for r in engine.requests.values() if r.state is not State.FINISHED]):
            engine.fork(parents[rest[0] % len(parents)].id)
        elif kind == "abort" and engine.requests:
            engine.abort(list(engine.requests)[rest[0] % len(engine.requests)])
        elif kind == "step":
            for _ in range(rest[0]):
                if not engine.has_unfinished():
                    break
                engine.step()
                held = {
                    r.id: (tuple(r.blocks), r.computed, r.state.value, tuple(r.output_ids))
                    for r in engine.requests.values()
                }
                refs = {block: engine.cache.pool.refs(block) for block in range(1, num_blocks + 1)}
                live.append((len(llm.trace.steps) - 1, held, {block: count for block, count in refs.items() if count}))
    replay = Replay(llm.trace)
    for at, held, refs in live:
        now = replay.after(at)
        assert now.refs == refs == Counter(block for blocks, *_ in held.values() for block in blocks)
        for request, (blocks, computed, state, outputs) in held.items():
            assert now.state[request] == state
            assert now.outputs[request] == outputs
            assert now.table[request] == blocks
            if state in ("running", "swapped"):
                assert now.computed[request] == computed
    assert engine.cache.free_tokens == engine.cache.capacity_tokens


def test_a_block_that_a_copy_let_go_is_given_out_in_the_same_step():
    llm = LLM("tiny-random", stage=2, max_model_len=16, block_size=4, num_blocks=4, trace=True)
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    for prompt in ([5] * 6, [6] * 4):
        llm.engine.add_request(prompt, greedy)
    llm.engine.step()
    child = llm.engine.fork(0)
    llm.engine.step()
    plan = llm.trace.steps[-1].plan
    (copy,) = plan.copies
    assert plan.preempted == (child,)
    assert copy.source in [block for chunk in plan.chunks for block in chunk.blocks]
    assert Replay(llm.trace).after(-1).refs == Counter(b for r in llm.engine.requests.values() for b in r.blocks)
