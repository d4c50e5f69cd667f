"""Request sets: the same for the same seed, within their ranges, and their sums right."""

from pydoc_data.topics import topics

import numpy as np
import pytest

from stepengine.bench import workloads
from stepengine.bench.workloads import Workload
from stepengine.errors import InvalidSetting

IDS = np.arange(5000)


def lognormal(ids: np.ndarray, seed: int, count: int) -> Workload:
    return workloads.lognormal(ids, seed, count, 40, 60, 512)


@pytest.mark.parametrize("make", [workloads.uniform, workloads.exponential, workloads.few_long, lognormal])
def test_the_seed_decides(make) -> None:
    assert make(IDS, 7, 12) == make(IDS, 7, 12)
    assert make(IDS, 7, 12).prompts != make(IDS, 8, 12).prompts


def test_lengths_stay_in_their_ranges() -> None:
    work = workloads.uniform(IDS, 0, 400, prompt=(5, 9), output=(2, 6))
    assert {len(prompt) for prompt in work.prompts} == set(range(5, 10))
    assert set(work.output_lens) == set(range(2, 7))
    assert all(b == a + 1 for prompt in work.prompts for a, b in zip(prompt, prompt[1:], strict=False)), "not a cut"


def test_exponential_lengths_have_their_mean_and_are_cut() -> None:
    work = workloads.exponential(IDS, 0, 4000, mean=30, most=10_000)
    # rounding up an exponential gives a geometric distribution, whose mean is 1 / (1 - exp(-1 / mean))
    assert np.mean(work.output_lens) == pytest.approx(1 / (1 - np.exp(-1 / 30)), rel=0.05)
    assert max(workloads.exponential(IDS, 0, 400, mean=30, most=40).output_lens) == 40
    assert min(work.output_lens) >= 1


def test_lognormal_lengths_have_their_means_and_are_cut() -> None:
    work = workloads.lognormal(np.arange(70_000), 0, 4000, 40, 60, 60_000)
    assert np.mean([len(prompt) for prompt in work.prompts]) == pytest.approx(40.5, rel=0.1)  # rounding up adds a half
    assert np.mean(work.output_lens) == pytest.approx(60.5, rel=0.1)
    assert np.std(np.log(work.output_lens)) == pytest.approx(1, rel=0.05)
    short = workloads.lognormal(IDS, 0, 400, 40, 60, 128)
    assert max(len(prompt) for prompt in short.prompts) == 64 and short.longest == 128
    assert min(short.output_lens) >= 1


def test_samples_multiply_what_is_asked_for() -> None:
    one = workloads.uniform(IDS, 3, 5, prompt=(1, 20), output=(1, 15))
    three = Workload(one.name, one.prompts, one.output_lens, one.seed, 3)
    assert three.num_outputs == 3 * one.num_outputs and three.recomputed_tokens == 3 * one.recomputed_tokens
    assert [pair for pair in one.sequences for _ in range(3)] == three.sequences
    assert [params.n for params in three.params()] == [3] * 5


def test_recomputed_tokens_is_the_sum_over_steps() -> None:
    work = workloads.uniform(IDS, 3, 9, prompt=(1, 20), output=(1, 15))
    by_steps = sum(
        len(prompt) + done for prompt, n in zip(work.prompts, work.output_lens, strict=True) for done in range(n)
    )
    assert work.recomputed_tokens == by_steps


def test_text_is_the_interpreters_own(smollm2_tokenizer) -> None:
    ids = workloads.corpus(smollm2_tokenizer, len(smollm2_tokenizer))
    assert len(ids) > 20_000
    text = smollm2_tokenizer.decode(ids[:200].tolist())
    assert len(text) > 400 and topics[min(topics)].startswith(text)


def test_random_ids_without_a_tokenizer() -> None:
    ids = workloads.corpus(None, 499)
    assert ids.min() >= 0 and ids.max() < 499
    assert (ids == workloads.corpus(None, 499)).all()


def test_bad_sets_are_refused_with_numbers() -> None:
    with pytest.raises(InvalidSetting, match="2 prompts and 1 output"):
        Workload("x", ((1,), (2,)), (3,), 0)
    with pytest.raises(InvalidSetting, match="6000..6000"):
        workloads.uniform(IDS, 0, 2, prompt=(6000, 6000))


def test_long_prompts_arrive_one_after_another_on_those_that_run() -> None:
    work = workloads.long_arrivals(IDS, 0, running=3, outputs=20, long=100, count=2, shared=64)
    assert work.kinds == ("running",) * 3 + ("long", "other") * 2
    assert work.after == (0, 0, 0, 20, 20, 40, 40)  # of 60 tokens
    first, second = (work.prompts[index] for index in work.of("long"))
    assert len(first) == len(second) == 100 and first[:64] == second[:64] and first[64:] != second[64:]
    assert {work.output_lens[index] for index in work.of("running")} == {20}


def test_few_shot_prompts_begin_alike_and_end_apart() -> None:
    work = workloads.few_shot(IDS, 0, count=5, shared=48, own=10, output=3)
    assert len({prompt[:48] for prompt in work.prompts}) == 1
    assert len({prompt[48:] for prompt in work.prompts}) == 5 and {len(prompt) for prompt in work.prompts} == {58}
    assert work.after == (0, 1, 1, 1, 1)


def test_a_turn_continues_what_was_said_before() -> None:
    chats = workloads.multi_turn(IDS, 0, chats=2, turns=3, system=8, said=5, answer=4)
    first = chats.turn(0, [])
    assert all(prompt[:8] == chats.system and prompt[8:] == said for prompt, said in zip(first.prompts, chats.said[0]))  # noqa: B905
    before = [[*prompt, 1, 2, 3, 4] for prompt in first.prompts]
    second = chats.turn(1, before)
    assert [list(prompt[: 8 + 5 + 4]) for prompt in second.prompts] == before
    assert chats.longest == 8 + 3 * (5 + 4) == len(second.prompts[0]) + 4 + 9


@pytest.mark.parametrize("wrong", [{"after": (0,)}, {"kinds": ("a",)}, {"after": (3, 0)}])
def test_arrivals_and_kinds_must_fit_the_prompts(wrong: dict) -> None:
    with pytest.raises(InvalidSetting, match="one per prompt|in that order"):
        Workload("two", ((1,), (2,)), (1, 1), 0, **wrong)
