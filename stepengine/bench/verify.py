"""Are two runs' tokens the same, and where they are not, was it a near tie?"""

from typing import NamedTuple

import torch

from stepengine.bench.runs import Run
from stepengine.llm import LLM

NEAR = 1e-4  # logits closer than this are rounding: either token is right
OWN = 0.95  # of the tokens of weights that a CPU multiplies in bf16, those that survive computing them again


class Differences(NamedTuple):
    """Requests whose tokens differ: `near` where the reference holds every one of them for as good as its own."""

    near: int
    wrong: int


def differences(reference: LLM, expected: Run, found: Run) -> Differences:
    """Compare greedy tokens request by request.

    After a near tie two sequences are different texts, so a differing one is judged whole: the
    `reference` engine, given its tokens, must find none of them more than 1e-4 below its best logit.
    """
    near = wrong = 0
    each = zip(found.workload.sequences, expected.token_ids, found.token_ids, strict=True)
    for (prompt, _), right, tokens in each:
        if tokens == right:
            continue
        fits = len(tokens) == len(right) and float(shortfall(reference, list(prompt), tokens).max()) <= NEAR
        near, wrong = near + fits, wrong + (not fits)
    return Differences(near, wrong)


def agreement(reference: LLM, found: Run) -> float:
    """Of a run's tokens, the share that the reference's model would have chosen at the same place, 0 to 1.

    It is given the prompt and the tokens before it, one pass per sequence, nothing cached; a token 1e-4 below its
    best logit counts as chosen. For a model with other weights that is how far they are from the reference's; for
    the engine that ran, with rounding to bf16 on the way, at least `OWN`, or it runs its model wrongly.
    """
    each = zip(found.workload.sequences, found.token_ids, strict=True)
    gaps = [shortfall(reference, list(prompt), tokens) for (prompt, _), tokens in each]
    return float((torch.cat(gaps) <= NEAR).double().mean())


def shortfall(llm: LLM, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """How far each of `tokens` [N] lies below the best logit after `prompt` and the tokens before it: [N], >= 0."""
    logits = llm.logits(prompt + tokens[:-1])[len(prompt) - 1 :].float()  # [N, vocab]
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return (logits.max(-1).values - chosen).cpu()
