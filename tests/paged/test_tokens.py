"""Any pool that holds one request gives stage 0's tokens."""

from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine import LLM, SamplingParams

REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40), st.integers(1, 22), st.integers(1, 3), st.integers(0, 2), st.sampled_from([0.0, 0.9])
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    asked=REQUESTS,
    size=st.sampled_from([1, 2, 7, 16, 64]),
    spare=st.integers(0, 20),
    how=st.sampled_from(["recompute", "swap"]),
    places=st.integers(1, 6),
)
def test_tokens_do_not_depend_on_the_pool(asked, size, spare, how, places):
    prompts = [[(7 * i + k) % 200 for k in range(prompt)] for i, (prompt, *_) in enumerate(asked)]
    params = [
        SamplingParams(max_tokens=tokens, n=n, temperature=heat, seed=i, ignore_eos=True)
        for i, (_, tokens, n, _, heat) in enumerate(asked)
    ]
    priorities = [priority for *_, priority, _ in asked]
    need = max(-(-(prompt + tokens) // size) for prompt, tokens, *_ in asked)
    pool = {"block_size": size, "num_blocks": need + spare, "preemption": how, "max_num_seqs": places}
    answers = []
    for settings_of in ({"stage": 0}, {"stage": 2, **pool}):
        llm = LLM("tiny-random", max_model_len=64, **settings_of)
        outputs = llm.generate(prompts, params, priority=priorities)
        answers.append([[sample.token_ids for sample in output.outputs] for output in outputs])
        assert llm.engine.cache.free_tokens == llm.engine.cache.capacity_tokens
    assert answers[0] == answers[1]
