"""What evidence is made of, and what it is taken with: runs that several claims share."""

import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from stepengine.bench import gptq, kernel_loads, paging, perplexity, runs
from stepengine.bench.options import Options
from stepengine.core.request import SamplingParams
from stepengine.llm import LLM
from stepengine.model.catalog import resolve
from stepengine.model.config import ModelConfig
from stepengine.model.loader import checkpoint_tensors, load_decoder
from stepengine.stage5_gptq.checkpoint import linear_shapes
from stepengine.stage5_gptq.grid import Grid, round_to_nearest
from stepengine.trace import Trace

TINY = "tiny-random"  # counts do not depend on the weights
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class Number(NamedTuple):
    """One finding. `clock`: it came from the clock (or from rounding that differs between machines)."""

    label: str
    value: float
    unit: str = ""
    digits: int = 3  # significant
    clock: bool = False


@dataclass(frozen=True)
class Evidence:
    """What was found for a claim. how: in what way; agrees: whether it is what the ledger says of the claim."""

    how: str
    numbers: tuple[Number, ...]
    agrees: bool

    def value(self, label: str) -> float:
        """The number with this label; KeyError where there is none."""
        return {number.label: number.value for number in self.numbers}[label]


@dataclass
class Workbench:
    """What the evidence is taken with. model: what is timed and quantised; pieces: texts of 512 tokens that are
    predicted (perplexity); rounds: of timed runs; record: of the GPU suite, or None. Runs are shared by claims."""

    model: str = "smollm2-135m"
    pieces: int = 2
    rounds: int = 2
    seed: int = 0
    record: dict[str, Any] | None = None
    length: int = 512  # tokens of a piece, and of the prompt whose attention is timed

    @property
    def options(self) -> Options:
        return Options(model=self.model, rounds=self.rounds, seed=self.seed, fast=True, progress=False)

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_folder(resolve(self.model))

    @cached_property
    def capacity(self) -> dict[str, Any]:
        """Long-tailed requests in slots and in blocks of the same bytes, counted (`bench.paging`)."""
        return paging.capacity(self.options)

    @cached_property
    def scenes(self) -> dict[str, Trace]:
        """A and B decode when C with 1000 tokens and D with 24 arrive: whole prompts first, chunks, chunks with C's
        share limited."""
        ways: dict[str, tuple[str, dict[str, Any]]] = {
            "whole": ("3", {}),
            "chunks": ("4a", {"max_num_batched_tokens": 258}),
            "limited": ("4a", {"max_num_batched_tokens": 258, "long_prefill_token_threshold": 128}),
        }
        rng, found = random.Random(self.seed), {}
        prompts = [[rng.randrange(3, 499) for _ in range(length)] for length in (16, 24, 1000, 24)]
        for name, (stage, settings) in ways.items():
            llm = runs.build(TINY, stage, 4, 1040, **settings)
            outputs = (14, 14, 3, 3)
            for at, (prompt, count) in enumerate(zip(prompts, outputs, strict=True)):
                for _ in range(3 if at == 2 else 0):
                    llm.engine.step()
                llm.engine.add_request(prompt, GREEDY.replace(max_tokens=count))
            while llm.engine.has_unfinished():
                llm.engine.step()
            found[name] = runs.trace_of(llm)
        return found

    @cached_property
    def losses(self) -> dict[str, float]:
        """Perplexity of the text kept apart from calibration: fp32, 4 bits rounded to nearest, and GPTQ's."""
        folder = resolve(self.model)
        plain = load_decoder(folder, "cpu", torch.float32, self.length)
        tokens = perplexity.evaluation_pieces(_tokenizer(self.model), self.config.vocab_size, self.length, self.pieces)
        found = {"fp32": math.exp(perplexity.nll(plain, tokens))}
        targets = checkpoint_tensors(plain)
        grid = Grid(gptq.BITS, gptq.GROUP)
        names = list(linear_shapes(self.config))
        gptq.fill(plain, ((name, round_to_nearest(targets[f"{name}.weight"], grid)) for name in names))
        found["RTN"] = math.exp(perplexity.nll(plain, tokens))
        quick = LLM(self.model, stage=5, max_num_seqs=1, max_model_len=self.length)
        found["GPTQ"] = math.exp(perplexity.nll(quick, tokens))
        return found

    @cached_property
    def kernels(self) -> dict[str, kernel_loads.Record]:
        """What our kernels load and store for one head, by case; {} where Triton is missing."""
        if kernel_loads.missing():
            return {}
        cases = {
            "written out": kernel_loads.Case("materialised", 128, 128, 64, 64),
            "tiled": kernel_loads.Case("flash_prefill", 128, 128, 64, 64),
            "n / 2": kernel_loads.Case("flash_prefill", 128, 128, 16, 16),
            "base": kernel_loads.Case("flash_prefill", 256, 256, 16, 16),
            "2 M": kernel_loads.Case("flash_prefill", 256, 256, 32, 16),
            "2 d": kernel_loads.Case("flash_prefill", 256, 256, 16, 32),
        }
        return dict(zip(cases, kernel_loads.record(list(cases.values())), strict=True))

    def part(self, name: str) -> dict[str, Any]:
        """What a part of the GPU record found; {} without a record."""
        found: dict[str, Any] = ((self.record or {}).get("parts", {}).get(name) or {}).get("results") or {}
        return found


def _tokenizer(model: str) -> Any:
    from stepengine.model.tokenizer import load_tokenizer

    return load_tokenizer(resolve(model))
