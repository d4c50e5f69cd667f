"""The check of notebook 04b's first exercise; its second, an evictor, is checked by `check_evictor`."""

import random
from collections.abc import Callable

from stepengine.contracts.report import Promise, Report, called, expect, run_promises, same_number
from stepengine.core.request import SamplingParams

LONGEST = 200  # tokens of a prompt in the check


def _counted(a: list[int], b: list[int], block_size: int) -> int:
    """The tokens of prompt `b` that stage 4b's engine finds after it has run prompt `a`, from its trace."""
    from stepengine.llm import LLM

    how = {"max_model_len": LONGEST + block_size, "block_size": block_size, "max_num_seqs": 2}
    llm = LLM("tiny-random", stage="4b", trace=True, **how)  # type: ignore[arg-type]
    for prompt in (a, b):
        llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))
    assert llm.trace is not None
    last = list(llm.trace.requests)[-1]
    return sum(chunk.cached for step in llm.trace.steps for chunk in step.plan.chunks if chunk.request == last)


def check_hit_tokens(hit_tokens: Callable[[list[int], list[int], int], int]) -> Report:
    """Notebook 04b: `hit_tokens(a, b, block_size)` against the hits in traces of stage 4b's engine.

    a, b: token ids of two prompts. The engine has run `a`; how many of `b`'s tokens does it find?
    """

    def compare(said: str, a: list[int], b: list[int], block_size: int) -> None:
        given = list(a), list(b)
        case = f"{said}, blocks of {block_size}"
        got = called(case, hit_tokens, *given, block_size)
        expect(given == (a, b), f"{case}: a list was changed")
        wanted = _counted(a, b, block_size)
        same_number(got, wanted, case, f"the engine finds {wanted}")

    def sharing(shared: int, first: int, second: int, block_size: int) -> None:
        """Two prompts with a beginning of `shared` tokens, and so many tokens of their own."""
        head = [1 + at * 7 % 50 for at in range(shared)]
        said = f"a of {shared + first} tokens, b of {shared + second}, the first {shared} the same"
        compare(said, head + [60] * first, head + [61] * second, block_size)

    def whole() -> None:
        sharing(100, 10, 20, 16)
        sharing(96, 30, 1, 16)
        sharing(27, 5, 5, 8)

    def short() -> None:
        sharing(15, 30, 30, 16)
        sharing(0, 20, 20, 16)
        sharing(3, 9, 9, 4)

    def last_token() -> None:
        sharing(64, 0, 0, 16)
        sharing(65, 0, 0, 16)
        sharing(16, 0, 0, 16)
        sharing(1, 0, 0, 1)

    def uneven() -> None:
        sharing(48, 0, 40, 16)
        sharing(48, 40, 0, 16)
        sharing(50, 0, 3, 16)

    def shifted() -> None:
        text = [1 + at * 7 % 50 for at in range(100)]
        compare("b is a with one token put before it", text, [60, *text], 16)
        compare("b is a without its first token", text, text[1:], 16)
        changed = [*text[:20], 60, *text[21:]]
        compare("b is a with token 20 changed", text, changed, 16)

    def every() -> None:
        rng = random.Random(4)
        for block_size in (1, 3, 5, 16):
            for _ in range(4):
                sharing(rng.randint(0, 60), rng.randint(1, 9), rng.randint(1, 9), block_size)

    return run_promises(
        "hit_tokens",
        [
            Promise("of what both begin with, whole blocks are found", whole, "shared // block_size * block_size"),
            Promise("less than one block in common is nothing", short, "only full blocks can be found"),
            Promise("the last token of b always runs", last_token, "count the blocks of its first len(b) - 1 tokens"),
            Promise("one prompt may be the beginning of the other", uneven, "zip stops at the shorter one"),
            Promise(
                "after the first difference nothing is found", shifted, "K/V depend on all tokens before, so stop there"
            ),
            Promise("any lengths, any block size", every, "divide by block_size, not by 16"),
        ],
    )
