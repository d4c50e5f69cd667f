"""Notebook 00's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import pytest

from stepengine import LLM
from stepengine.contracts.exercises import check_greedy_generate, check_tokens_computed


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-random", stage=0, trace=True)


def right(model, ids, max_tokens, eos):
    new = []
    for _ in range(max_tokens):
        new.append(int(model(ids + new)[-1].argmax()))
        if new[-1] == eos:
            break
    return new


def drops_eos(model, ids, max_tokens, eos):
    return [token for token in right(model, ids, max_tokens, eos) if token != eos]


def spoils_the_prompt(model, ids, max_tokens, eos):
    new = right(model, ids, max_tokens, eos)
    ids.extend(new)
    return new


def first_row(model, ids, max_tokens, eos):
    return [int(model(ids)[0].argmax())]


def test_right_generation_passes(llm: LLM):
    assert check_greedy_generate(right, llm).ok


@pytest.mark.parametrize(
    ("wrong", "word"), [(drops_eos, "stage 0 gives"), (spoils_the_prompt, "was changed"), (first_row, "stage 0 gives")]
)
def test_wrong_generation_fails(llm: LLM, wrong, word: str):
    report = check_greedy_generate(wrong, llm)
    assert not report.ok
    assert word in report.failed[0].example


def test_right_count_passes(llm: LLM):
    assert check_tokens_computed(lambda P, N: sum(P + step for step in range(N)), llm).ok


@pytest.mark.parametrize(
    "wrong", [lambda P, N: N * P, lambda P, N: N * P + N * (N + 1) // 2, lambda P, N: P + N, lambda P, N: None]
)
def test_wrong_count_fails(llm: LLM, wrong):
    assert not check_tokens_computed(wrong, llm).ok
