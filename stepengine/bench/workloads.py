"""Sets of requests, the same for the same seed: prompts as token ids and how many tokens each shall get."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepengine.core.request import SamplingParams
from stepengine.errors import InvalidSetting

TEXT_CHARS = 200_000  # of the corpus; about 50,000 tokens


@dataclass(frozen=True)
class Workload:
    """Requests, by default all there at once. Each sample gets exactly its request's output length: EOS is ignored.

    `after`: request i is added once all requests together have got after[i] tokens, or when nothing is left
    to run; so a set arrives in the same way however fast an engine is. `kinds` names what a request is for.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    seed: int
    samples: int = 1  # of each prompt
    after: tuple[int, ...] = ()  # output tokens, never falling; () adds all at once
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.output_lens):
            raise InvalidSetting(
                f"Workload {self.name!r} has {len(self.prompts)} prompts and {len(self.output_lens)} output lengths; "
                f"give one length per prompt, and at least one of each."
            )
        if any(each and len(each) != len(self.prompts) for each in (self.after, self.kinds)):
            raise InvalidSetting(
                f"Workload {self.name!r} has {len(self.prompts)} prompts, {len(self.after)} times of arrival and "
                f"{len(self.kinds)} kinds; give one per prompt, or none."
            )
        if any(later < sooner for sooner, later in zip(self.after, self.after[1:], strict=False)):
            raise InvalidSetting(f"Workload {self.name!r} arrives after {self.after} tokens; put it in that order.")

    def params(self) -> list[SamplingParams]:
        """Greedy, to the forced length."""
        greedy = SamplingParams(temperature=0.0, ignore_eos=True, n=self.samples)
        return [greedy.replace(max_tokens=n) for n in self.output_lens]

    @property
    def sequences(self) -> list[tuple[tuple[int, ...], int]]:
        """(prompt, output length) of every sample, in the order of a run's tokens."""
        each = zip(self.prompts, self.output_lens, strict=True)
        return [pair for pair in each for _ in range(self.samples)]

    @property
    def num_outputs(self) -> int:
        return self.samples * sum(self.output_lens)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output: the least `max_model_len` that serves all."""
        return max(len(prompt) + n for prompt, n in zip(self.prompts, self.output_lens, strict=True))

    def of(self, kind: str) -> list[int]:
        """Places of the requests of one kind."""
        return [index for index, name in enumerate(self.kinds) if name == kind]

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that run without a K/V cache: the sum over samples of N P + N (N - 1) / 2."""
        return sum(n * len(prompt) + n * (n - 1) // 2 for prompt, n in self.sequences)

    def describe(self) -> dict[str, Any]:
        """Plain data for a result file."""
        lengths = [len(prompt) for prompt in self.prompts]
        return {
            "name": self.name,
            "seed": self.seed,
            "requests": len(self.prompts),
            "samples": self.samples,
            "prompt_tokens": {"total": sum(lengths), "min": min(lengths), "max": max(lengths)},
            "output_tokens": {"total": self.num_outputs, "min": min(self.output_lens), "max": max(self.output_lens)},
        }


def corpus(tokenizer: Any, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Token ids [many] to cut prompts from: English text, or random ids where there is no tokenizer.

    The text is Python's own language reference, which every interpreter carries; it differs a little
    from one Python version to the next, and so do the prompts.
    """
    if tokenizer is None:
        return np.random.default_rng(seed).integers(0, vocab_size, 20_000)
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))[:TEXT_CHARS]
    return np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def uniform(
    ids: np.ndarray,
    seed: int,
    count: int,
    prompt: tuple[int, int] = (32, 256),
    output: tuple[int, int] = (32, 128),
) -> Workload:
    """Prompt and output lengths drawn uniformly from inclusive ranges."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(output[0], output[1] + 1, count)
    return _workload(f"uniform {output[0]}..{output[1]}", ids, rng, prompt, lens, seed)


def exponential(
    ids: np.ndarray, seed: int, count: int, prompt: tuple[int, int] = (32, 256), mean: float = 64, most: int = 512
) -> Workload:
    """Output lengths drawn from an exponential distribution, rounded up and cut at `most`: few are long."""
    rng = np.random.default_rng(seed)
    lens = np.minimum(np.ceil(rng.exponential(mean, count)), most)
    return _workload(f"exponential, mean {mean:g}", ids, rng, prompt, lens, seed)


def lognormal(
    ids: np.ndarray, seed: int, count: int, prompt_mean: float, output_mean: float, most: int, sigma: float = 1.0
) -> Workload:
    """Prompt and output lengths drawn from log-normal distributions, rounded up: most are short, a few very long.

    The means are those before the cut: a prompt gets at most half of `most` tokens, its output at most
    the rest. `sigma` is the standard deviation of the logarithm.
    """
    rng = np.random.default_rng(seed)

    def draw(mean: float) -> np.ndarray:
        return np.ceil(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)).astype(int)

    prompts = np.minimum(draw(prompt_mean), most // 2)
    outputs = np.minimum(draw(output_mean), most - prompts)
    name = f"log-normal, means {prompt_mean:g} + {output_mean:g}"
    return Workload(name, _cut(ids, rng, prompts), tuple(outputs.tolist()), seed)


def few_long(
    ids: np.ndarray,
    seed: int,
    count: int,
    prompt: tuple[int, int] = (32, 256),
    short: int = 16,
    long: int = 128,
    every: int = 8,
) -> Workload:
    """Each `every`-th request gets `long` tokens, the others `short`: the worst case of static batching."""
    rng = np.random.default_rng(seed)
    lens = [long if index % every == 0 else short for index in range(count)]
    return _workload(f"1 in {every} long", ids, rng, prompt, lens, seed)


def long_arrivals(
    ids: np.ndarray,
    seed: int,
    running: int,
    outputs: int,
    long: int,
    count: int,
    own: int = 4,
    short: int = 16,
    shared: int = 0,
) -> Workload:
    """`running` requests decode; `count` prompts of `long` tokens come in on them, each with a short one behind it.

    Kinds: "running" (prompts of `short` tokens, `outputs` tokens each), "long" and "other" (`own` tokens each).
    Arrivals are spread evenly over the tokens that the running ones get. The first `shared` tokens of all long
    prompts are the same.
    """
    rng = np.random.default_rng(seed)
    kinds = ["running"] * running + ["long", "other"] * count
    lens = {"running": short, "long": long, "other": short}
    prompts = _cut(ids, rng, [lens[kind] for kind in kinds])
    same = prompts[running][:shared] if count else ()
    prompts = tuple(
        same + prompt[shared:] if kind == "long" else prompt for kind, prompt in zip(kinds, prompts, strict=True)
    )
    each = running * outputs // (count + 1)
    after = [0] * running + [each * turn for turn in range(1, count + 1) for _ in range(2)]
    outs = tuple(outputs if kind == "running" else own for kind in kinds)
    name = f"{running} decodes, then {count} prompt{'s' if count > 1 else ''} of {long}"
    name += f", {shared} the same" if shared else ""
    return Workload(name, prompts, outs, seed, after=tuple(after), kinds=tuple(kinds))


def few_shot(ids: np.ndarray, seed: int, count: int, shared: int, own: int, output: int) -> Workload:
    """Prompts of `shared` tokens that are the same (the examples) and `own` that are not (the question).

    The first is there before the others, which come as soon as it has its first token.
    """
    rng = np.random.default_rng(seed)
    (examples,), questions = _cut(ids, rng, [shared]), _cut(ids, rng, [own] * count)
    prompts = tuple(examples + question for question in questions)
    return Workload(f"few-shot, {shared} + {own}", prompts, (output,) * count, seed, after=(0,) + (1,) * (count - 1))


@dataclass(frozen=True)
class Chats:
    """Conversations that go on side by side: a system prompt for all, and what each user says in each turn."""

    system: tuple[int, ...]
    said: tuple[tuple[tuple[int, ...], ...], ...]  # by turn, then by chat
    answer: int  # tokens of each answer
    seed: int

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return len(self.system) + sum(max(map(len, turn)) + self.answer for turn in self.said)

    @property
    def name(self) -> str:
        return f"multi-turn, {len(self.said[0])} chats of {len(self.said)} turns"

    def turn(self, number: int, before: Sequence[Sequence[int]]) -> Workload:
        """The requests of one turn, given all tokens of each chat before it (none in the first turn)."""
        begins = [tuple(tokens) for tokens in before] if number else [self.system] * len(self.said[0])
        prompts = tuple(tokens + said for tokens, said in zip(begins, self.said[number], strict=True))
        return Workload(f"{self.name}, turn {number + 1}", prompts, (self.answer,) * len(prompts), self.seed)


def multi_turn(ids: np.ndarray, seed: int, chats: int, turns: int, system: int, said: int, answer: int) -> Chats:
    """Chats whose every turn brings `said` new tokens and gets `answer`."""
    rng = np.random.default_rng(seed)
    (opening,) = _cut(ids, rng, [system])
    each = tuple(_cut(ids, rng, [said] * chats) for _ in range(turns))
    return Chats(opening, each, answer, seed)


def _workload(
    name: str,
    ids: np.ndarray,
    rng: np.random.Generator,
    prompt: tuple[int, int],
    output_lens: Sequence[int] | np.ndarray,
    seed: int,
) -> Workload:
    if not 1 <= prompt[0] <= prompt[1] < len(ids):
        raise InvalidSetting(
            f"Prompt lengths {prompt[0]}..{prompt[1]} cannot be cut from {len(ids)} tokens of text; choose lengths "
            f"from 1 to {len(ids) - 1}."
        )
    prompts = _cut(ids, rng, rng.integers(prompt[0], prompt[1] + 1, len(output_lens)))
    return Workload(name, prompts, tuple(int(n) for n in output_lens), seed)


def _cut(ids: np.ndarray, rng: np.random.Generator, lens: Sequence[int] | np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Pieces of the corpus of these lengths, from anywhere."""
    starts = [int(rng.integers(0, len(ids) - length)) for length in lens]
    return tuple(tuple(ids[start : start + length].tolist()) for start, length in zip(starts, lens, strict=True))
