"""Notebook 04a's exercise checks: right answers pass, wrong ones fail with an example that shows it."""

import pytest

from stepengine import LLM, SamplingParams
from stepengine.contracts.chunk_exercises import sharing
from stepengine.contracts.exercises import check_decode_last, check_mix


def right_mix(budget, decodes, left):
    return decodes, min(left, budget - decodes)


def in_rounds(decodes_first):
    def share_out(due, budget):
        shares = [0] * len(due)
        for decodes in (decodes_first, not decodes_first):
            for place, tokens in enumerate(due):
                if (tokens == 1) == decodes:
                    shares[place] = min(tokens, budget)
                    budget -= shares[place]
        return shares

    return share_out


def one_by_one(due, budget):
    """Deals single tokens, to prompts in order first: the definition, without arithmetic."""
    shares = [0] * len(due)
    for _ in range(budget):
        hungry = [place for place, tokens in enumerate(due) if tokens > 1 and shares[place] < tokens]
        hungry += [place for place, tokens in enumerate(due) if tokens == 1 and not shares[place]]
        if hungry:
            shares[hungry[0]] += 1
    return shares


def test_the_right_mix_passes():
    report = check_mix(right_mix)
    assert report.ok, report
    assert check_mix(lambda *given: list(right_mix(*given))).ok  # a list is a pair, too


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (
            lambda b, d, left: (d, min(left, b)),
            "1000 tokens beside two decodes",
            "mix(258, 2, 1000): got (2, 258)",
        ),
        (lambda b, d, left: (d, min(left, 256, b)), "a budget of 256", "mix(256, 2, 1000): got (2, 256), the"),
        (
            lambda b, d, left: (d, b - d),
            "1000 tokens beside two decodes",
            "mix(258, 2, 232): got (2, 256), the scheduler plans (2",
        ),
        (
            lambda b, d, left: (d, max(1, min(left, b - d))),
            "nothing left: decodes only",
            "mix(258, 2, 0): got (2, 1), the scheduler plans (2, 0)",
        ),
        (lambda b, d, left: (d if left else 0, min(left, b - d)), "nothing left", "mix(258, 2, 0): got (0, 0)"),
        (
            lambda b, d, left: (d, min(left, b - d) or min(left, 1)),
            "a budget that the decodes use up",
            "mix(2, 2, 30): got (2, 1), the scheduler plans (2, 0)",
        ),
        (
            lambda b, d, left: min(left, b - d),
            "1000 tokens beside two decodes",
            "mix(258, 2, 1000): got 256; return",
        ),
        (lambda b, d, left: None, "1000 tokens beside two decodes", "mix(258, 2, 1000): got None; return two numbers"),
    ],
)
def test_a_wrong_mix_fails_where_it_is_wrong(wrong, promise: str, example: str):
    report = check_mix(wrong)
    first = report.failed[0]
    assert first.promise.startswith(promise) and first.example.startswith(example) and first.hint, report


@pytest.mark.parametrize("right", [in_rounds(False), one_by_one])
def test_decodes_last_passes(right):
    report = check_decode_last(right)
    assert report.ok, report


def without_leftovers(due, budget):
    shares = []
    for tokens in due:
        shares.append(min(tokens, budget) if tokens > 1 else 0)
        budget -= shares[-1]
    return shares


def last_prompt_first(due, budget):
    return in_rounds(False)(due[::-1], budget)[::-1]


def clears(due, budget):
    shares = in_rounds(False)(due, budget)
    due.clear()
    return shares


@pytest.mark.parametrize(
    ("wrong", "promise", "example"),
    [
        (in_rounds(True), "a decode waits", "decode_last([1, 1, 1000], 258): got [1, 1, 256]; request 0 decodes"),
        (lambda due, budget: due, "nobody runs more", "decode_last([1, 1, 1000], 258): got [1, 1, 1000]; that is"),
        (without_leftovers, "no token of the budget", "decode_last([1, 1, 226], 258): got [0, 0, 226]; 226 tokens run"),
        (
            last_prompt_first,
            "prompts are served in order",
            "decode_last([40, 1, 30], 50): got [20, 0, 30]; prompt 2",
        ),
        (clears, "nobody runs more", "decode_last([1, 1, 1000], 258) changed the list"),
        (
            lambda due, budget: [0],
            "nobody runs more",
            "decode_last([1, 1, 1000], 258): got [0]; return a list",
        ),
        (lambda due, budget: None, "nobody runs more", "decode_last([1, 1, 1000], 258): got None; return a list with"),
    ],
)
def test_another_policy_fails_where_it_is_wrong(wrong, promise: str, example: str):
    report = check_decode_last(wrong)
    first = report.failed[0]
    assert first.promise.startswith(promise) and first.example.startswith(example) and first.hint, report


def test_decodes_first_has_the_tokens_but_not_the_gaps_of_decodes_last():
    report = check_decode_last(in_rounds(True))
    assert "in the engine: stage 0's tokens" in report.passed
    said = "two decodes beside a prompt of 60, budget 18: 99 of 100 gaps have at most 18 tokens, with decodes first 18"
    assert report.failed[-1].example == said


def test_who_runs_nothing_is_noticed():
    report = check_decode_last(lambda due, budget: [0] * len(due))
    assert any("in the engine" in failure.promise for failure in report.failed), report


@pytest.mark.parametrize("budget", [6, 17, 64])
def test_the_scheduler_of_the_exercise_plans_like_stage_4_when_decodes_go_first(budget: int):
    prompts = [[5, 9, 2, 7, 3], [8, 1, 4], [1 + at % 50 for at in range(40)], [4, 4, 2]]
    params = [SamplingParams(temperature=0.0, max_tokens=6 + number, ignore_eos=True) for number in range(4)]
    plans, texts = [], []
    for part in (None, sharing(in_rounds(True))):
        llm = LLM(
            "tiny-random",
            stage="4a",
            max_num_seqs=4,
            max_model_len=64,
            max_num_batched_tokens=budget,
            scheduler=part,
            trace=True,
        )
        texts.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
        plans.append([sorted((c.request, c.start, c.length) for c in step.plan.chunks) for step in llm.trace.steps])
    assert texts[0] == texts[1] and plans[0] == plans[1]
