"""Weights of 4 bits: claims C8, C9, C10, C16, C17."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from stepengine.bench import decoding, flash, gptq, runs, workloads
from stepengine.bench.evidence.common import TINY, Evidence, Number, Workbench
from stepengine.calculator import shape_of, weight_parts
from stepengine.model.catalog import resolve
from stepengine.model.config import ModelConfig
from stepengine.model.loader import checkpoint_tensors, load_decoder
from stepengine.stage5_gptq.calibrate import Recipe, quantized_layers
from stepengine.stage5_gptq.checkpoint import linear_shapes
from stepengine.stage5_gptq.gptq import Method, quantize
from stepengine.stage5_gptq.grid import Grid


def of_the_layers(bench: Workbench) -> Evidence:
    """C8: bytes of 16-bit weights over those of stage 5's, layers alone and the whole; and as the engine holds them."""
    numbers = []
    for name in ("SmolLM2-135M", "Qwen3-0.6B", "Llama-3-8B", "Llama-3-70B"):
        full, packed = (weight_parts(shape_of(name), kind, gptq.GROUP) for kind in ("bf16", "int4"))
        numbers.append(Number(f"{name}, whole model", sum(full.values()) / sum(packed.values()), "times"))
    layers = gptq.sizes(bench.config)["rows"][1]["linear_ratio"]
    numbers.insert(0, Number("quantised layers", layers, "times"))
    agrees = layers > 3.5 > max(number.value for number in numbers[1:]) > numbers[1].value
    return Evidence(
        f"by formula, 4 bits in groups of {gptq.GROUP}, scales and zero points counted", tuple(numbers), agrees
    )


def how_much_worse(bench: Workbench) -> Evidence:
    """C9: what 4 bits add to the perplexity of a small model, by GPTQ and by rounding."""
    base = bench.losses["fp32"]
    numbers = (
        Number("perplexity, fp32", base, "", 3, True),
        Number("GPTQ, more", 100 * (bench.losses["GPTQ"] / base - 1), "%", 2, True),
        Number("round to nearest, more", 100 * (bench.losses["RTN"] / base - 1), "%", 2, True),
    )
    agrees = 1 < numbers[1].value < numbers[2].value
    how = f"{bench.model}, {bench.pieces} pieces of {bench.length} tokens (`stepengine bench --what gptq` takes more)"
    return Evidence(how, numbers, agrees)


def after_training(bench: Workbench) -> Evidence:
    """C10: quantising a model: gradients taken, tokens of text read, weights of the checkpoint that change."""
    folder = resolve(TINY)
    config = ModelConfig.from_folder(folder)
    decoder = load_decoder(folder, "cpu", torch.float32, 64)
    before = {
        name: tensor.clone()
        for name, tensor in checkpoint_tensors(load_decoder(folder, "cpu", torch.float32, 64)).items()
    }
    recipe = Recipe(Grid(gptq.BITS, 32), Method(), samples=4, length=32)
    tokens = recipe.tokens(None, config)
    with counted_backward() as gradients:
        codes = dict(quantized_layers(decoder, tokens, recipe))
    fresh = checkpoint_tensors(load_decoder(folder, "cpu", torch.float32, 64))
    changed = sum(not torch.equal(fresh[name], tensor) for name, tensor in before.items())
    numbers = (
        Number("matrices quantised", len(codes)), Number("gradients taken", gradients[0]),
        Number("tokens of text read, without labels", tokens.numel()),
        Number("tensors of the trained checkpoint that changed", changed),
    )  # fmt: skip
    return Evidence(
        f"GPTQ run on {TINY}", numbers, len(codes) == len(linear_shapes(config)) and gradients[0] == changed == 0
    )


@contextmanager
def counted_backward() -> Iterator[list[int]]:
    """Counts calls of autograd in a list of one number."""
    calls = [0]
    backward, grad = torch.autograd.backward, torch.autograd.grad

    def noted(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return own(*args, **kwargs)

        return call

    with (
        mock.patch.object(torch.autograd, "backward", noted(backward)),
        mock.patch.object(torch.autograd, "grad", noted(grad)),
    ):
        yield calls


def columns_not_rows(bench: Workbench) -> Evidence:
    """C16: codes that change when rows are quantised apart, and when columns go in another order."""
    generator = torch.Generator().manual_seed(bench.seed)
    weight = torch.randn(24, 64, generator=generator)
    inputs = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    grid, method = Grid(gptq.BITS, -1), Method(act_order=False)
    together = quantize(weight, hessian, grid, method).codes
    apart = torch.cat([quantize(weight[at : at + 1], hessian, grid, method).codes for at in range(len(weight))])
    turned = torch.arange(63, -1, -1)
    reverse = quantize(weight[:, turned], hessian[turned][:, turned], grid, method).codes[:, turned]
    turned_codes = 100 * float((reverse != together).float().mean())
    rise = 100 * (bench.losses["GPTQ"] / bench.losses["fp32"] - 1)
    numbers = (
        Number("each row quantised alone, codes that change", int((apart != together).sum()), f"of {together.numel()}"),
        Number("columns from the last to the first, codes that change", turned_codes, "%", 2, True),
        Number("perplexity, change", rise, "%", 2, True),
    )  # fmt: skip
    return Evidence(
        "the engine's quantiser on 24 rows of 64 columns", numbers, numbers[0].value == 0 and numbers[1].value > 10
    )


def few_rows(bench: Workbench) -> Evidence:
    """C17: a decode step of stage 5 against stage 4 in fp32, at 1 row and at 32, and the step of a prompt."""
    rows, context, prompt = (1, 32), 24, 256
    longest = prompt + 32
    engines = {
        stage: runs.build(bench.model, stage, max(rows), longest, num_blocks=max(rows) * 6, block_size=16)
        for stage in ("4", "5")
    }
    numbers = []
    for count, _, timed in decoding.decode_times(engines, rows, (context,), bench.rounds, bench.seed):
        fastest = {stage: min(values) for stage, values in timed.values.items()}
        label = f"decode, {count} row{'s' if count > 1 else ''}"
        numbers.append(Number(label, fastest["4"] / fastest["5"], "times as fast", 2, True))
    ids = workloads.corpus(None, bench.config.vocab_size)
    work = workloads.uniform(ids, bench.seed, 1, (prompt, prompt), (1, 1))
    spent = {stage: min(flash.prompt_ms(llm, work)[0] for _ in range(2)) for stage, llm in engines.items()}
    numbers.sort(key=lambda number: len(number.label))
    numbers.append(Number(f"a prompt of {prompt}", spent["4"] / spent["5"], "times as fast", 2, True))
    held = {stage: runs.trace_of(llm).meta["weight_bytes"] for stage, llm in engines.items()}
    numbers.append(Number("bytes of weights that a step reads", held["4"] / held["5"], "times fewer"))
    agrees = numbers[0].value > min(numbers[1].value, numbers[2].value)
    return Evidence("stage 5 against stage 4 in fp32, in turns, on this CPU", tuple(numbers), agrees)
