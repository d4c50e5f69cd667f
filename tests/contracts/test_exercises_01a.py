"""Notebook 01a's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import pytest

from stepengine.contracts import check_kv_cache
from stepengine.contracts.exercises import check_kv_bytes_per_token, check_my_cache
from stepengine.stage0_naive.cache import NoCache
from stepengine.stage1_kvcache.cache import SlotCache


def right(cfg, dtype):
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * dtype.itemsize


def forgets_values(cfg, dtype):
    return right(cfg, dtype) // 2


def hidden_size(cfg, dtype):  # C1: right without GQA only
    return 2 * cfg.num_layers * cfg.hidden_size * dtype.itemsize


def derived_head_dim(cfg, dtype):
    return 2 * cfg.num_layers * cfg.num_kv_heads * (cfg.hidden_size // cfg.num_heads) * dtype.itemsize


def always_two_bytes(cfg, dtype):
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * 2


def test_right_bytes_pass():
    report = check_kv_bytes_per_token(right)
    assert report.ok, report


@pytest.mark.parametrize(
    ("wrong", "promise"),
    [
        (forgets_values, "one layer with one head"),
        (hidden_size, "query heads that share"),
        (derived_head_dim, "head_dim is a number of its own"),
        (always_two_bytes, "bytes follow the dtype"),
        (lambda cfg, dtype: None, "one layer with one head"),
    ],
)
def test_wrong_bytes_fail_where_they_are_wrong(wrong, promise: str):
    report = check_kv_bytes_per_token(wrong)
    assert not report.ok
    assert report.failed[0].promise.startswith(promise)
    assert "stored are" in report.failed[0].example


class Answers(SlotCache):
    extra = 0

    def commit(self, request, upto):
        return upto + self.extra


class ForgetsTheNewest(Answers):
    extra = -1


class ClaimsTheNext(Answers):
    extra = 1


def test_a_cache_that_keeps_all_passes():
    assert check_my_cache(SlotCache).ok
    assert check_my_cache(Answers).ok


def test_a_forgetful_cache_is_wasteful_not_wrong():
    report = check_my_cache(ForgetsTheNewest)
    assert [failure.promise for failure in report.failed] == ["no token runs through the model twice"]
    assert "5 prompt and 2 new tokens took 7 computed tokens where 6 would do" in report.failed[0].example
    assert "[0, 5) [4, 6)" in report.failed[0].example
    assert check_kv_cache(ForgetsTheNewest).ok  # the seam's own contract allows it


def test_a_cache_that_claims_too_much_is_wrong():
    report = check_my_cache(ClaimsTheNext)
    assert report.failed[0].example.startswith("commit(request, 1) answered 2")
    assert "the tokens are stage 0's" in [failure.promise for failure in report.failed]


def test_a_cache_that_keeps_nothing_costs_what_stage_0_costs():
    class Amnesia(SlotCache):
        commit = NoCache.commit

    report = check_my_cache(Amnesia)
    assert "5 prompt and 2 new tokens took 11 computed" in report.failed[0].example
