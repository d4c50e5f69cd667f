"""What is replayed of hits, kept blocks and evictions is what the live pool says, at every step."""

from collections import Counter

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stepengine import LLM, SamplingParams
from stepengine.core.request import State
from stepengine.trace import Replay

EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(0, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 3),
            st.integers(0, 2),
        ),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("fork"), st.integers(0, 12)),
        st.tuples(st.just("abort"), st.integers(0, 12)),
    ),
    min_size=3,
    max_size=25,
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate, Phase.shrink])
@given(
    events=EVENTS,
    how=st.sampled_from(["recompute", "swap"]),
    size=st.sampled_from([1, 3, 16]),
    spare=st.integers(0, 40),
    tokens=st.sampled_from([None, 5, 17, 40]),
    index=st.sampled_from(["hash", "radix"]),
    pipelined=st.booleans(),
)
def test_the_trace_tells_the_truth(events, how, size, spare, tokens, index, pipelined):
    num_blocks = -(-64 // size) + spare
    llm = LLM(
        "tiny-random", stage="4" if tokens else "4b", max_model_len=64, max_num_seqs=4, block_size=size,
        num_blocks=num_blocks, preemption=how, trace=True, max_num_batched_tokens=tokens, prefix_index=index,
        pipelined=pipelined,
    )  # fmt: skip
    engine, pool = llm.engine, llm.engine.cache.pool
    live = []
    for kind, *rest in [*events, ("step", 1000)]:
        if kind == "add":
            common, prompt, output, n, priority = rest
            params = SamplingParams(max_tokens=output, n=n, temperature=1.0, seed=prompt, ignore_eos=True)
            ids = [(common if at < 24 else 100 + len(engine.requests)) + at % 5 for at in range(prompt)]
            engine.add_request(ids, params, priority=priority)
        elif kind == "fork" and (parents := [r for r in engine.requests.values() if r.state is not State.FINISHED]):
            engine.fork(parents[rest[0] % len(parents)].id)
        elif kind == "abort" and engine.requests:
            engine.abort(list(engine.requests)[rest[0] % len(engine.requests)])
        elif kind == "step":
            for _ in range(rest[0]):
                if not engine.has_unfinished():
                    break
                engine.step()
                if pipelined and engine.has_unfinished():
                    continue  # the trace is a step behind the books; it must be without contradiction all the same
                held = {
                    r.id: (tuple(r.blocks), r.computed, r.state.value, tuple(r.output_ids))
                    for r in engine.requests.values()
                }
                refs = {block: pool.refs(block) for block in range(1, num_blocks + 1) if pool.refs(block)}
                found = {block: spelled(pool, block) for block in range(1, num_blocks + 1) if pool._entries[block]}
                live.append((len(llm.trace.steps) - 1, held, refs, found))
    replay = Replay(llm.trace)
    for at, held, refs, found in live:
        now = replay.after(at)
        assert now.refs == refs == Counter(block for blocks, *_ in held.values() for block in blocks)
        for request, (blocks, computed, state, outputs) in held.items():
            assert (now.state[request], now.outputs[request], now.table[request]) == (state, outputs, blocks)
            if state in ("running", "swapped"):
                assert now.computed[request] == computed
        assert {block: read(replay, beginning) for block, beginning in now.holds.items()} == found
        assert now.kept_blocks == found.keys() - refs.keys()
        assert len(now.kept_blocks) + num_blocks - len(found.keys() | refs.keys()) == num_blocks - len(refs)
    given_up = sum((Counter(now.evicted_blocks) for now in replay), Counter())
    if not pipelined:
        assert given_up == Counter(block for step in llm.trace.steps for block in step.plan.evicted)
    assert engine.cache.free_tokens == engine.cache.capacity_tokens


def spelled(pool, block):
    """All tokens up to the end of a sealed block, as its pool knows them."""
    entry, tokens = pool._entries[block], ()
    while entry is not None:
        entry, tokens = entry.parent, entry.tokens + tokens
    return tokens


def read(replay, beginning):
    """The same from the trace."""
    tokens = ()
    while beginning >= 0:
        beginning, own = replay.beginnings[beginning]
        tokens = own + tokens
    return tokens
