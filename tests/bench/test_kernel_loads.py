"""The record of loads and stores, against counts by formula and by hand; and what it refuses."""

import importlib.util
from collections import Counter

import pytest

from stepengine.bench import kernel_loads
from stepengine.bench.kernel_loads import Case, Record, kernel_bytes, missing, record
from stepengine.errors import InvalidSetting
from tests.kernels.harness import needs_newer_triton, needs_triton

FLOAT = 4
CASES = {
    "prompt": Case("flash_prefill", 40, 40, 16),
    "behind cached keys": Case("flash_prefill", 20, 57, 16, block_size=8),
    "one query": Case("flash_prefill", 1, 33, 16),
    "group": Case("flash_prefill", 40, 40, 16, head_dim=32, group=2),
    "materialised": Case("materialised", 24, 40, 16),
    "one row": Case("materialised", 1, 40, 16),
    "decode": Case("paged_decode", 1, 100, 16, group=4),
    "split": Case("paged_decode", 1, 100, 16, splits=3),
}
pytestmark = [needs_triton, needs_newer_triton]


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    return dict(zip(CASES, record(list(CASES.values())), strict=True))


def touched(one: Record, tensor: str, store: bool) -> Counter[int]:
    """How often each element of a tensor was loaded, or stored."""
    found: Counter[int] = Counter()
    for access in one.accesses:
        if access.tensor == tensor and access.store is store:
            found.update(at for begin, end in access.runs for at in range(begin, end))
    return found


def test_every_record_computed_attention(records):
    assert {name: one.case for name, one in records.items()} == CASES
    assert all(one.error < 1e-5 for one in records.values())


@pytest.mark.parametrize("name", ["prompt", "behind cached keys", "one query", "group"])
def test_prefill_reads_each_key_once_for_each_tile_of_queries_that_sees_it(records, name):
    one, case = records[name], CASES[name]
    dim, before = case.head_dim, case.kv_len - case.q_len
    queries = case.q_len * case.group * dim
    assert touched(one, "q", False) == dict.fromkeys(range(queries), 1)
    assert touched(one, "out", True) == dict.fromkeys(range(queries), 1)
    tiles = range(0, case.q_len, case.tile)
    for tensor in ("k", "v"):
        counts = touched(one, tensor, False)
        for key in range(case.q_len):
            seeing = sum(min(begin + case.tile, case.q_len) > key for begin in tiles)
            assert {counts[key * dim + at] for at in range(dim)} == {seeing}
    counts = touched(one, "storage", False)
    assert len(counts) == 2 * before * dim and set(counts.values()) <= {len(tiles)}
    assert min(counts, default=2 * case.block_size * dim) >= 2 * case.block_size * dim, "block 0 holds nobody's keys"
    assert not any(touched(one, tensor, True) for tensor in one.tensors if tensor != "out")


@pytest.mark.parametrize("name", ["materialised", "one row"])
def test_materialised_scores_make_four_journeys(records, name):
    one, case = records[name], CASES[name]
    once = dict.fromkeys(range(case.q_len * case.kv_len), 1)
    for tensor in ("scores", "weights"):
        assert touched(one, tensor, True) == touched(one, tensor, False) == once
        assert one.moved(tensor) == 2 * one.moved(tensor, store=True) == 2 * FLOAT * case.q_len * case.kv_len
    tiles = -(-case.q_len // case.tile)
    vectors = 2 * case.q_len + 2 * tiles * case.kv_len
    assert one.moved() == FLOAT * (vectors * case.head_dim + 4 * case.q_len * case.kv_len)
    assert [count for _, count in one.launches] == [tiles, case.q_len, tiles]


def test_decode_reads_each_key_once_for_its_whole_group(records):
    one = records["decode"]
    assert set(touched(one, "storage", False).values()) == {1} and "workspace" not in one.tensors
    assert one.moved("storage") == 2 * 100 * 16 * FLOAT
    assert one.moved("q") == one.moved("out") == 4 * 16 * FLOAT
    assert one.launches == (("_paged_decode_kernel", 1),)


def test_splits_share_the_keys_and_pass_on_their_parts(records):
    one = records["split"]
    assert one.launches == (("_paged_decode_kernel", 3), ("_combine_kernel", 1))
    assert set(touched(one, "storage", False).values()) == {1}
    parts = dict.fromkeys(range(3 * (16 + 1)), 1)  # of each split a vector and its level
    assert touched(one, "workspace", True) == touched(one, "workspace", False) == parts
    assert one.moved("q") == 3 * 16 * FLOAT
    by_program = Counter(dot.program for dot in one.dots)
    assert by_program == {0: 6, 1: 6, 2: 2}  # 7 tiles in shares of 3, two products each


def test_products_are_counted_with_their_padding(records):
    dots = records["prompt"].dots  # 3 tiles of queries: 1, 2 and 3 tiles of keys
    assert [dot.flops for dot in dots] == [2 * 16**3] * 12


def test_accesses_come_in_the_order_in_which_they_happened(records):
    first = [access.tensor for access in records["one query"].accesses]
    assert first[-1] == "out" and first.index("q") < first.index("storage") < first.index("k") < first.index("v")
    programs = [(access.launch, access.program) for access in records["split"].accesses]
    assert programs == sorted(programs)


def test_bytes_of_the_kernel_alone():
    assert kernel_bytes([(1, 1, 16), (32, 32, 16)]) == [4 * 16 * FLOAT, (64 + 2 * (16 + 32)) * 16 * FLOAT]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (Case("flash", 1, 1), "kernel is 'flash'; those recorded are flash_prefill, paged_decode, materialised."),
        (Case("flash_prefill", 9, 8), "q_len 9, kv_len 8: give 1 <= q_len <= kv_len <= 4096 tokens."),
        (Case("flash_prefill", 8, 8, tile=24), "tile is 24; give a power of two of at least 16."),
        (Case("flash_prefill", 8, 8, tile=8), "tile is 8; give a power of two of at least 16."),
        (Case("flash_prefill", 8, 8, head_dim=80), "head_dim is 80; give a power of two of at least 16."),
        (Case("flash_prefill", 8, 8, block_size=0), "block_size 0, splits 1: from 1, and from 1 to 64."),
        (Case("paged_decode", 2, 8), "paged_decode has q_len 2, tile 16; it takes 1, and at most 128."),
        (Case("materialised", 2, 8, group=2), "materialised has group 2; it is recorded for one head."),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(case, sentence, monkeypatch):
    monkeypatch.setattr(kernel_loads.subprocess, "run", lambda *args, **kwargs: pytest.fail("it started"))
    with pytest.raises(InvalidSetting) as refused:
        record([CASES["one query"], case])
    assert str(refused.value) == sentence


def test_without_triton_it_answers_with_a_sentence(monkeypatch):
    assert missing() == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing().startswith("Triton is not installed")
    with pytest.raises(InvalidSetting, match="Triton is not installed"):
        record([CASES["one query"]])
