"""Hash and radix index, against a set of beginnings: the same hits on the same traffic, nothing hashed twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import Limits
from stepengine.stage4_chunked_prefix.block_pool import PrefixBlockPool
from stepengine.stage4_chunked_prefix.cache import PrefixCache
from stepengine.stage4_chunked_prefix.prefix_index import HashPrefixIndex, Key, RadixPrefixIndex

BLOCK = st.integers(0, 2).map(lambda token: (token, token + 1))
PATH = st.lists(BLOCK, min_size=1, max_size=5).map(tuple)
CALLS = st.lists(st.tuples(st.sampled_from(["add", "add", "find", "remove"]), PATH, st.sampled_from(["", "red"])))


def keys_of(path, salt=""):
    keys = []
    for tokens in path:
        keys.append(Key(keys[-1] if keys else None, tokens, salt))
    return keys


@settings(max_examples=300, deadline=None, derandomize=True)
@given(calls=CALLS)
def test_both_are_maps_from_beginnings_to_blocks(calls):
    truth, made = {}, 0
    indexes = [HashPrefixIndex(), RadixPrefixIndex()]
    old = {}  # keys that were made earlier, and remember what they led to
    for what, path, salt in calls:
        here = (salt, path)
        keys = [old.setdefault((at, here), keys_of(path, salt)[-1]) for at in range(2)]
        if what == "add":
            made += 1
            fits = here in truth or len(path) == 1 or (salt, path[:-1]) in truth
            if fits:
                truth.setdefault(here, made)
            for index, key in zip(indexes, keys, strict=True):
                entry = index.add(key, made)
                assert (entry is not None) == fits and (not fits or entry.block == truth[here])
        elif what == "remove" and here in truth:
            if any(salt == other[0] and other[1][: len(path)] == path and other[1] != path for other in truth):
                continue  # something continues it
            del truth[here]
            for index, key in zip(indexes, keys, strict=True):
                entry = index.find(key)
                assert entry.children == 0
                index.remove(entry)
        for (at, (salt, path)), key in [*old.items(), *(((at, here), keys_of(path, salt)[-1]) for at in range(2))]:
            entry = indexes[at].find(key)
            assert (entry.block if entry is not None else None) == truth.get((salt, path))
            if entry is not None:
                assert entry.children == sum(
                    salt == other[0] and other[1][:-1] == path and len(other[1]) == len(path) + 1 for other in truth
                )


def test_an_empty_index_holds_nothing():
    """Namespaces come and go; none leaves anything behind."""
    for index in (HashPrefixIndex(), RadixPrefixIndex()):
        for salt in ("", "red", "blue"):
            keys = keys_of([(1, 2), (3, 4), (5, 6)], salt)
            entries = [index.add(key, block + 1) for block, key in enumerate(keys)]
            for entry in reversed(entries):
                index.remove(entry)
        assert not any(vars(index)[name] for name in ("_table", "_first") if name in vars(index))


@pytest.mark.parametrize("make", [HashPrefixIndex, RadixPrefixIndex])
def test_a_long_beginning_needs_no_recursion(make):
    index, keys = make(), keys_of([(at,) for at in range(5000)])
    for block, key in enumerate(keys):
        index.add(key, block + 1)
    assert index.find(keys_of([(at,) for at in range(5000)])[-1]).block == 5000
    assert index.find(keys_of([(at,) for at in range(4999)] + [(7,)])[-1]) is None


def test_the_hash_is_chained_over_all_that_came_before():
    seen = []

    def digest(pair):
        seen.append(pair)
        return hash(pair)

    index, keys = HashPrefixIndex(digest), keys_of([(1, 2), (1, 2), (3, 4)])
    for block, key in enumerate(keys):
        index.add(key, block + 1)
    first = hash((0, (1, 2)))  # without a salt: crc32 of nothing is 0
    second = hash((first, (1, 2)))
    assert seen == [(0, (1, 2)), (first, (1, 2)), (second, (3, 4))]
    assert [key.digest for key in keys] == [first, second, hash((second, (3, 4)))]


def test_nothing_is_hashed_twice():
    """match in every step while it waits, grow, chunk after chunk, preemption, match again: one hash for each block."""
    count = [0]

    def digest(pair):
        count[0] += 1
        return hash(pair)

    limits = Limits(4, 64, 64, 4, 40)
    cache = PrefixCache(limits, PrefixBlockPool(40, HashPrefixIndex(digest)))
    request = Request(0, list(range(32)), SamplingParams(), 64)
    for _ in range(3):
        for _ in range(5):
            cached = cache.match(request)
        request.state = State.RUNNING
        request.keep(cached)
        while request.due:
            grant = cache.grow(request, request.scheduled + min(7, request.due))
            chunk = request.schedule(grant.blocks, cached, 7)
            request.computed = cache.commit(request, chunk.end)
        cache.release(request)
        request.give_way(State.WAITING)
    assert count[0] == 8


def test_keys_of_ended_requests_are_forgotten():
    limits = Limits(4, 64, 64, 4, 40)
    cache = PrefixCache(limits)
    for number in range(20):
        request = Request(number, [number] * 9, SamplingParams(), 64, state=State.RUNNING)
        cache.match(request)
        request.schedule(cache.grow(request, 9).blocks)
        cache.commit(request, 9)
        cache.release(request)
    del request
    assert len(cache.keys) == 0 and not cache.sealed and not cache.samples
