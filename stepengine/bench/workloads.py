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
    """Requests that all arrive at once. Each sample gets exactly its request's output length: EOS is ignored."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    seed: int
    samples: int = 1  # of each prompt

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.output_lens):
            raise InvalidSetting(
                f"Workload {self.name!r} has {len(self.prompts)} prompts and {len(self.output_lens)} output lengths; "
                f"give one length per prompt, and at least one of each."
            )

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


def _cut(ids: np.ndarray, rng: np.random.Generator, lens: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Pieces of the corpus of these lengths, from anywhere."""
    starts = [int(rng.integers(0, len(ids) - length)) for length in lens]
    return tuple(tuple(ids[start : start + length].tolist()) for start, length in zip(starts, lens, strict=True))
