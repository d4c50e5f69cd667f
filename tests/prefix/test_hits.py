"""What is found again in the engine, what never is, and what a hit costs: faults that other engines had are here."""

import pytest

from stepengine.core.request import State
from stepengine.errors import InvalidSetting
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage4_chunked_prefix.block_pool import PrefixBlockPool, prefix_pool
from stepengine.stage4_chunked_prefix.cache import PrefixCache
from stepengine.stage4_chunked_prefix.prefix_index import HashPrefixIndex

BOTH = pytest.mark.parametrize("index", ["hash", "radix"])
HALVES = pytest.mark.parametrize("stage", ["4b", "4"])


def first_chunks(llm):
    """The first chunk of each request."""
    found = {}
    for step in llm.trace.steps:
        for chunk in step.plan.chunks:
            found.setdefault(chunk.request, chunk)
    return found


def ask(llm, drain, prompt, params, **how):
    """Run one request to its end; its id and tokens."""
    request = llm.engine.add_request(prompt, params, **how)
    return request, drain(llm)[request]


@BOTH
@HALVES
@pytest.mark.parametrize(
    ("prompt", "size", "hit"),
    [(64, 16, 48), (65, 16, 64), (50, 16, 48), (16, 16, 0), (15, 16, 0), (6, 1, 5), (1, 1, 0)],
)
def test_at_least_the_last_token_runs(tiny, greedy, drain, naive, checkpoint, stage, index, prompt, size, hit):
    folder = checkpoint(max_position_embeddings=256)
    llm = tiny(stage=stage, model=folder, max_model_len=96, block_size=size, prefix_index=index)
    ids = [at % 40 for at in range(prompt)]
    right = [out.token_ids for out in tiny(stage=0, model=folder, max_model_len=96).generate(ids, greedy(4))[0].outputs]
    for _ in range(3):
        request, tokens = ask(llm, drain, ids, greedy(4))
        assert tokens == right
        chunk = first_chunks(llm)[request]
        assert (chunk.cached, chunk.start, chunk.length) == (
            (0, 0, prompt) if request == 0 else (hit, hit, prompt - hit)
        )
    assert llm.stats()["prefix_hit_tokens"] == 2 * hit
    assert not any(step.plan.copies for step in llm.trace.steps)  # full blocks are never written


@HALVES
def test_whole_blocks_only_and_only_from_the_start(tiny, greedy, drain, stage):
    llm = tiny(stage=stage)
    base = [at % 40 for at in range(60)]
    ask(llm, drain, base, greedy(1))
    for prompt, hit in (
        ([*base[:40], 99, 98], 32),  # 40 shared tokens: two blocks
        ([*base[:15], 99], 0),
        ([99, *base[:50]], 0),  # shifted by one: every block differs
        (base[16:], 0),  # without its beginning
        ([*([99] * 16), *base[16:48]], 0),  # after another beginning
    ):
        request, _ = ask(llm, drain, prompt, greedy(1))
        assert first_chunks(llm)[request].cached == hit


@HALVES
def test_two_requests_with_the_same_new_prefix_in_one_step(tiny, greedy, drain, naive, stage):
    """Nothing is hit before it is computed; both compute, and both are right, whoever ends first."""
    for outputs in ((3, 9), (9, 3), (5, 5)):
        llm = tiny(stage=stage, max_num_seqs=4)
        prompts = [[*range(40), 90 + i] for i in range(2)]
        for prompt, count in zip(prompts, outputs, strict=True):
            llm.engine.add_request(prompt, greedy(count))
        llm.engine.step()
        first = llm.trace.steps[0].plan.chunks
        assert [(chunk.request, chunk.cached) for chunk in first] == [(0, 0), (1, 0)]
        assert not set(first[0].blocks) & set(first[1].blocks)
        got = drain(llm)
        for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True)):
            assert got[i] == naive(prompt, greedy(count))
        request, tokens = ask(llm, drain, [*range(40), 95], greedy(4))
        assert first_chunks(llm)[request].cached == 32 and tokens == naive([*range(40), 95], greedy(4))
        kept = [block for block in range(1, llm.engine.limits.num_blocks + 1) if llm.engine.cache.pool._entries[block]]
        assert len(kept) == len({llm.engine.cache.pool._entries[block] for block in kept})  # equal contents once


def test_a_chunked_prompt_is_found_as_far_as_it_was_computed(tiny, greedy, drain, naive):
    llm = tiny(stage="4", max_num_batched_tokens=16, block_size=8)
    prompt = [at % 40 for at in range(48)]
    llm.engine.add_request(prompt, greedy(3))
    for _ in range(2):
        llm.engine.step()  # 32 tokens, a boundary of chunk and block
    second = llm.engine.add_request(prompt, greedy(3))
    outputs = drain(llm)
    assert first_chunks(llm)[second].cached == 40  # it started when the first one's prompt was done
    assert outputs[0] == outputs[second] == naive(prompt, greedy(3))


@BOTH
@HALVES
def test_the_next_round_of_a_chat_reuses_what_was_generated(tiny, greedy, drain, naive, stage, index):
    llm = tiny(stage=stage, block_size=4, prefix_index=index)
    talk = [5, 6, 7, 8, 9]
    for _ in range(4):
        known = len(talk) - 3 if talk[5:] else 0  # tokens of the round before, but for its last, which never ran
        request, (answer,) = ask(llm, drain, talk, greedy(7))
        assert [answer] == naive(talk, greedy(7))
        computed = known - 1 if known else 0
        assert first_chunks(llm)[request].cached == computed // 4 * 4
        talk = [*talk, *answer, 30, 31, 32]


@HALVES
def test_a_preempted_request_finds_its_own_blocks_again(tiny, greedy, drain, naive, stage):
    prompts = [[token] * 14 for token in (3, 4, 6)]
    llm = tiny(stage=stage, block_size=4, num_blocks=20)
    for prompt in prompts:
        llm.engine.add_request(prompt, greedy(30))
    assert drain(llm) == {i: naive(prompt, greedy(30)) for i, prompt in enumerate(prompts)}
    gone = [(step.plan.step, request) for step in llm.trace.steps for request in step.plan.preempted]
    assert gone
    hits = []
    for at, request in gone:
        later = [c for s in llm.trace.steps[at + 1 :] for c in s.plan.chunks if c.request == request]
        hits.append(later[0].cached)
        assert later[0].cached % 4 == 0 and later[0].end > later[0].cached  # and its last token runs
    assert max(hits) > 14, "outputs were found again, too"
    without = tiny(stage="3", block_size=4, num_blocks=20)
    for prompt in prompts:
        without.engine.add_request(prompt, greedy(30))
    drain(without)
    assert llm.stats()["tokens_computed"] < without.stats()["tokens_computed"]


@BOTH
@HALVES
def test_a_pool_that_runs_out_while_decoding(tiny, greedy, drain, naive, stage, index):
    """What nobody holds goes first, leaves before their parents; then somebody gives way; nobody reads what is gone."""
    llm = tiny(stage=stage, block_size=4, num_blocks=16, prefix_index=index)
    for token in (3, 4):
        ask(llm, drain, [token] * 24, greedy(4))
    pool = llm.engine.cache.pool
    assert sum(entry is not None for entry in pool._entries) == 12 and pool.num_free == 16  # 27 tokens ran of each
    asked = [([3] * 13, greedy(30)), ([4] * 13, greedy(30))]
    ids = [llm.engine.add_request(*both) for both in asked]
    outputs = drain(llm)
    assert [outputs[i] for i in ids] == [naive(*both) for both in asked]
    evicted = [block for step in llm.trace.steps for block in step.plan.evicted]
    assert evicted and llm.stats()["preemptions"] > 0
    first = next(step for step in llm.trace.steps if step.plan.preempted)
    assert any(step.plan.evicted for step in llm.trace.steps[: first.plan.step])  # before anybody gave way


def test_least_recently_used_goes_first(tiny, greedy, drain):
    llm = tiny(stage="4b", block_size=4, num_blocks=16)
    for token in (3, 4, 5):
        ask(llm, drain, [token] * 17, greedy(1))  # four full blocks each
    ask(llm, drain, [3] * 17, greedy(1))  # used again: 4 is the oldest now
    ask(llm, drain, [9] * 20, greedy(1))  # five blocks: four are empty, one of 4 goes
    for token, hit in ((4, 12), (3, 16), (5, 16)):
        assert llm.engine.cache.match(probe(llm, [token] * 17)) == hit


def probe(llm, prompt):
    from stepengine import SamplingParams
    from stepengine.core.request import Request

    return Request(10_000, list(prompt), SamplingParams(), 64)


def test_a_cache_salt_isolates_tenants(tiny, greedy, drain, naive):
    llm = tiny(stage="4")
    prompt = [at % 40 for at in range(40)]
    hits = []
    for salt in ("red", "blue", "red", "", "blue", ""):
        request, tokens = ask(llm, drain, prompt, greedy(3), cache_salt=salt)
        assert tokens == naive(prompt, greedy(3))
        hits.append(first_chunks(llm)[request].cached)
    assert hits == [0, 0, 32, 0, 32, 32]


@pytest.mark.parametrize("digest", [lambda _: 7, lambda pair: hash(pair) % 3, lambda pair: hash(pair[1])])
@HALVES
def test_forced_collisions_never_return_anothers_kv(tiny, greedy, drain, naive, stage, digest):
    """All blocks have one hash, or one of three, or the hash of their own tokens without their parent's."""
    llm = tiny(
        stage=stage, block_size=4, num_blocks=40, block_pool=lambda n: PrefixBlockPool(n, HashPrefixIndex(digest))
    )
    tail = [at % 9 for at in range(20)]
    for head in ([3] * 4, [4] * 4, [5] * 8, [3] * 4):
        _, tokens = ask(llm, drain, [*head, *tail], greedy(5))
        assert tokens == naive([*head, *tail], greedy(5))


@HALVES
def test_samples_share_their_prompt_and_only_they_copy(tiny, greedy, drain, naive, stage):
    params = greedy(9, n=3, temperature=0.9, seed=3)
    llm = tiny(stage=stage, max_num_seqs=4)
    for times in range(3):
        request, tokens = ask(llm, drain, [5] * 40, params)
        assert tokens == naive([5] * 40, params)
        found = first_chunks(llm)
        assert found[request].cached == (32 if times else 0)
        assert [found[request + sample].length for sample in (1, 2)] == [1, 1]
    assert sum(len(step.plan.copies) for step in llm.trace.steps) == 3 * 2


@HALVES
def test_a_hit_is_not_granted_twice_and_an_abort_gives_it_back(tiny, greedy, drain, naive, stage):
    llm = tiny(stage=stage, num_blocks=8)
    prompt = [at % 40 for at in range(40)]
    ask(llm, drain, prompt, greedy(2))
    ids = [llm.engine.add_request([*prompt[:32], 70 + i], greedy(20)) for i in range(3)]
    llm.engine.step()
    shared = llm.engine.requests[ids[0]].blocks[:2]
    assert all(r.blocks[:2] == shared for r in llm.engine.requests.values() if r.state is State.RUNNING)
    assert llm.engine.cache.pool.refs(shared[0]) == 3
    llm.engine.abort(ids[1])
    assert llm.engine.cache.pool.refs(shared[0]) == 2
    outputs = drain(llm)
    for at in (0, 2):
        assert outputs[ids[at]] == naive([*prompt[:32], 70 + at], greedy(20))


def test_a_pool_that_finds_nothing_is_refused(tiny):
    with pytest.raises(InvalidSetting, match=r"a BlockPool without find\(key\) and seal\(block, key\)"):
        tiny(stage="4b", block_pool=BlockPool)
    with pytest.raises(InvalidSetting, match="a BlockPool without"):
        tiny(stage="3", cache=PrefixCache)

    class Half(BlockPool):
        def find(self, key):
            return None

    with pytest.raises(InvalidSetting, match=r"a Half without seal\(block, key\), by which .* add it"):
        tiny(stage="4", block_pool=Half)


def test_bad_parts_are_refused():
    with pytest.raises(InvalidSetting, match="prefix_index is 'tree'; it must be 'hash', 'radix'"):
        prefix_pool("tree")
    with pytest.raises(InvalidSetting, match="prefix_index is 3"):
        prefix_pool(3)
    with pytest.raises(InvalidSetting, match="evictor is 'lru'"):
        prefix_pool("hash", "lru")
