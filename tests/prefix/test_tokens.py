"""Chunks, hits, evictions and preemptions in any combination give stage 0's tokens."""

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stepengine import LLM, SamplingParams

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2),  # which beginning
        st.integers(0, 36),  # tokens of it
        st.integers(1, 8),  # tokens of its own
        st.integers(1, 18),
        st.integers(1, 3),
        st.integers(0, 2),
        st.sampled_from([0.0, 0.9]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None, derandomize=True, phases=[Phase.generate, Phase.shrink])
@given(
    asked=REQUESTS,
    stage=st.sampled_from(["4", "4a", "4b"]),
    index=st.sampled_from(["hash", "radix"]),
    size=st.sampled_from([1, 3, 16]),
    spare=st.integers(0, 20),
    how=st.sampled_from(["recompute", "swap"]),
    places=st.integers(1, 6),
    budget=st.sampled_from([6, 7, 17, 48, 200]),
    most=st.sampled_from([None, 1, 5, 16]),
    pipelined=st.booleans(),
    graphs=st.sampled_from([False, "padded"]),
)
def test_tokens_do_not_depend_on_chunks_and_hits(
    asked, stage, index, size, spare, how, places, budget, most, pipelined, graphs
):
    prompts = [
        [10 * start + at % 7 for at in range(common)] + [(100 + 9 * i + at) % 200 for at in range(own)]
        for i, (start, common, own, *_) in enumerate(asked)
    ]
    params = [
        SamplingParams(max_tokens=tokens, n=n, temperature=heat, seed=i, ignore_eos=True)
        for i, (*_, tokens, n, _, heat) in enumerate(asked)
    ]
    priorities = [entry[5] for entry in asked]
    need = max(-(-(len(prompt) + own.max_tokens) // size) for prompt, own in zip(prompts, params, strict=True))
    more = {"block_size": size, "num_blocks": need + spare, "preemption": how, "max_num_seqs": places}
    more |= {"max_num_batched_tokens": budget, "long_prefill_token_threshold": most} if stage != "4b" else {}
    more |= {"pipelined": pipelined, "cuda_graphs": graphs}
    more |= {"prefix_index": index} if stage != "4a" else {}
    right = [
        [sample.token_ids for sample in output.outputs]
        for output in LLM("tiny-random", stage=0, max_model_len=64).generate(prompts, params)
    ]
    llm = LLM("tiny-random", max_model_len=64, stage=stage, **more)
    for _ in range(2):  # the second time much is found again
        outputs = llm.generate(prompts, params, priority=priorities)
        assert [[sample.token_ids for sample in output.outputs] for output in outputs] == right
        assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens
        pool = llm.engine.cache.pool
        assert not any(pool.refs(block) for block in range(1, need + spare + 1))
