"""Stage 5 on a CPU: what quantising costs in perplexity, what it saves in bytes, and where it is faster."""

from collections.abc import Iterable, Iterator, Mapping
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepengine.bench import decoding, perplexity, runs, workloads
from stepengine.bench.measure import alternate
from stepengine.bench.options import Options, ratio_text, told_of
from stepengine.errors import InvalidSetting
from stepengine.model import store
from stepengine.model.catalog import DEFAULT_MODEL, resolve
from stepengine.model.config import ModelConfig
from stepengine.model.decoder import Decoder
from stepengine.model.loader import checkpoint_tensors, load_decoder
from stepengine.stage5_gptq.checkpoint import QuantizedCheckpoint, linear_shapes
from stepengine.stage5_gptq.grid import Grid, QuantizedWeight, round_to_nearest
from stepengine.stage5_gptq.loader import load_quantized, quantized_folder, recipe_of

BITS, GROUP = 4, 64  # what the bars are for
REMOVED_BAR, REMOVED_GOAL = 0.63, 0.75  # of what rounding to nearest adds to the loss
RISE_BAR = 0.09  # of perplexity
INT8_BAR = 0.003  # the same, at 8 bits
SIZE_BARS = {64: 3.6, 128: 3.8}  # linear layers against 16 bits, by group size
SPEED_BARS = {1: 2.0, 32: 1.0}  # a decode step, by rows
FEW = 32  # rows of a batch whose products the packed operator computes
METHODS = ("RTN", "RTN clipped", "GPTQ")  # the second searches each group's range, every column as important
ENGINES = {"4": {}, "5": {}, "5, int8 head": {"int8_head": True}}
CAVEAT = (
    "These weights have been through 4 bits once, in groups of 32 columns, each with a lowest value of its own. They "
    "lie near such a grid still, so what rounding them at group 32 costs is no evidence for other weights."
)


def gptq(options: Options) -> dict[str, Any]:
    """Four parts: perplexity, fp32 against RTN and GPTQ; the packed layers against plain ones; bytes; speed.

    A model is quantised at most once: the results are kept in the model cache. Raises `InvalidSetting` for a model
    that is quantised already.
    """
    folder = resolve(options.model)
    config = ModelConfig.from_folder(folder)
    if config.quantization is not None:
        raise InvalidSetting(f"{options.model} is quantised already; give the unquantised model to compare it with.")
    pieces, length = (4, 512) if options.fast else (24, 512)
    llm = runs.build(options.model, "4", 1, length)
    tokens = perplexity.evaluation_pieces(llm.tokenizer, config.vocab_size, length, pieces)
    return {
        "what": "gptq",
        "accuracy": accuracy(options, folder, llm.engine.runner.model, tokens),
        "packed": packed(options, folder, tokens[: 1 if options.fast else 4]),
        "sizes": sizes(config),
        "speed": speed(options),
    }


# -- accuracy -------------------------------------------------------------------------------------


def accuracy(options: Options, folder: Path, plain: Decoder, tokens: Tensor) -> dict[str, Any]:
    """Loss and perplexity on tokens [pieces, length]: fp32; rounded to nearest, on whole and searched ranges; GPTQ.

    At 4 bits and groups of 64, and at 8 bits; in the long form also other groups and 3 bits, on fewer pieces. Every
    model is run with plain layers that hold the weights as they count; `plain` holds those of the checkpoint.
    """
    (main, length), side = tokens.shape, 8
    judged = load_decoder(folder, "cpu", torch.float32, length)
    others = () if options.fast else ((BITS, 32), (BITS, 128), (3, GROUP))
    arms = [(BITS, GROUP, method, main) for method in METHODS]
    arms += [(bits, group, method, side) for bits, group in others for method in ("RTN", "GPTQ")]
    arms.append((8, GROUP, "RTN", main))
    for bits, group, method, _ in arms:
        if method == "GPTQ":
            quantized_folder(folder, recipe_of(bits, group))  # has a progress bar of its own
    rows: list[dict[str, Any]] = []
    with told_of(options, "perplexity: fp32, RTN, GPTQ", len(arms) + 1) as told:
        base = perplexity.nll_by_piece(plain, tokens)
        told("fp32")
        for bits, group, method, count in arms:
            grid = Grid(bits, group, clip=method == "RTN clipped")
            kept = _kept(folder, bits, group) if method == "GPTQ" else _rounded(plain, grid)
            bits_per_weight = fill(judged, kept)
            loss = perplexity.nll_by_piece(judged, tokens[:count])
            rows.append(row(method, bits, group, bits_per_weight, loss, base[:count]))
            told(method)
    return judge(rows) | {
        "pieces": main,
        "length": length,
        "nll": float(base.mean()),
        "perplexity": exp(base.mean()),
        "caveat": CAVEAT if folder == store.folder_of(DEFAULT_MODEL) else "",
    }


Weights = Iterable[tuple[str, QuantizedWeight]]


def _rounded(plain: Decoder, grid: Grid) -> Weights:
    """To nearest; made anew each time, which takes no longer than reading it would."""
    targets = checkpoint_tensors(plain)
    for name in linear_shapes(plain.config):
        yield name, round_to_nearest(targets[f"{name}.weight"], grid)


def _kept(folder: Path, bits: int, group: int) -> Weights:
    """GPTQ's, from the model cache, where the first run puts it."""
    checkpoint = QuantizedCheckpoint(quantized_folder(folder, recipe_of(bits, group)))
    for name in checkpoint.names:
        yield name, checkpoint.read(name)


@torch.no_grad()
def fill(decoder: Decoder, weights: Weights) -> float:
    """Put what the codes stand for into a plain decoder's layers; bits per weight, scales and zeros included."""
    targets, bits, count = checkpoint_tensors(decoder), 0.0, 0
    for name, weight in weights:
        target = targets[f"{name}.weight"]
        target.copy_(weight.dequantized(target.dtype))
        bits, count = bits + weight.bits_per_weight() * target.numel(), count + target.numel()
    return bits / count


def row(method: str, bits: int, group: int, bits_per_weight: float, loss: Tensor, base: Tensor) -> dict[str, Any]:
    """One model's result from the losses of each piece, its own and those of fp32, [pieces].

    `rise` is of the mean loss, `rise_error` its standard error over the pieces; `perplexity_rise` a fraction.
    """
    rise = loss - base
    return {
        "method": method,
        "bits": bits,
        "group_size": group,
        "bits_per_weight": bits_per_weight,
        "pieces": len(loss),
        "nll": float(loss.mean()),
        "perplexity": exp(loss.mean()),
        "rise": float(rise.mean()),
        "rise_error": float(rise.std() / len(rise) ** 0.5) if len(rise) > 1 else 0.0,
        "perplexity_rise": exp(rise.mean()) - 1,
    }


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, each of GPTQ's with the share of RTN's rise that it removes ("removed", by flavour), and the bars.

    A rise of less than two of its standard errors is none that a share could be taken of: that share is None, and a
    bar on it is missed.
    """
    by_name = {(row["method"], row["bits"], row["group_size"]): row for row in rows}
    for found in rows:
        if found["method"] == "GPTQ":
            beside = {name: by_name.get((name, found["bits"], found["group_size"])) for name in METHODS}
            found["removed"] = {
                name: 1 - found["rise"] / other["rise"] if other["rise"] > 2 * other["rise_error"] else None
                for name, other in beside.items()
                if other is not None and name != "GPTQ"
            }
    ours, int8 = by_name["GPTQ", BITS, GROUP], by_name["RTN", 8, GROUP]
    bars = [
        _bar(f"of the rise of {name}, GPTQ removes", share, ">=", REMOVED_BAR, REMOVED_GOAL)
        for name, share in ours["removed"].items()
    ]
    bars.append(_bar("perplexity of GPTQ rises by", ours["perplexity_rise"], "<=", RISE_BAR))
    bars.append(_bar("perplexity of 8 bits rises by", int8["perplexity_rise"], "<=", INT8_BAR))
    return {"rows": rows, "bars": bars, "met": all(bar["met"] for bar in bars)}


def _bar(name: str, value: float | None, sign: str, bar: float, goal: float | None = None) -> dict[str, Any]:
    met = value is not None and (value >= bar if sign == ">=" else value <= bar)
    return {"name": name, "value": value, "sign": sign, "bar": bar, "goal": goal, "met": met}


# -- the packed layers ----------------------------------------------------------------------------


def packed(options: Options, folder: Path, tokens: Tensor) -> dict[str, Any]:
    """What multiplying with packed weights adds to quantising: loss, and the gap between logits, on the same text.

    Held against plain layers with the same weights multiplied out. "many": whole pieces, "few": 32 tokens at a time,
    as in decoding; a CPU multiplies the two in different ways. "int8 head": whole pieces, tables in 8 bits.
    """
    pieces, length = tokens.shape
    kept = quantized_folder(folder, recipe_of(BITS, GROUP))
    twin = load_decoder(folder, "cpu", torch.float32, length)
    fill(twin, _kept(folder, BITS, GROUP))
    arms: dict[str, tuple[bool, int | None]] = {"many": (False, None), "few": (False, FEW), "int8 head": (True, None)}
    found: dict[str, Any] = {"pieces": pieces, "length": length, "few": FEW, "arms": {}}
    with told_of(options, "packed layers", 2 * len(arms) + 1) as told:
        found["twin_nll"] = perplexity.nll(twin, tokens)
        told("twin")
        for name, (int8_head, rows) in arms.items():
            decoder = load_quantized(kept, "cpu", torch.float32, length, int8_head=int8_head)
            loss = perplexity.nll(decoder, tokens, rows)
            told(name)
            gap = perplexity.logit_gap(decoder, twin, tokens, rows)
            told(name)
            rise = exp(loss - found["twin_nll"]) - 1
            found["arms"][name] = {"nll": loss, "perplexity_rise": rise, **gap._asdict()}
    return found


# -- bytes ----------------------------------------------------------------------------------------


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Bytes of the weights by part, scales and zero points counted as files hold them: fp16, and as wide as a code.

    "rows": 16 bits, then 4 bits by group size, then with the tables in 8 bits (a scale of 2 bytes a row).
    """
    rows = [{"name": "bf16", "parts": weight_parts(config, 16)}]
    rows += [{"name": f"4 bits, groups of {group}", "parts": weight_parts(config, BITS, group)} for group in SIZE_BARS]
    rows.append({"name": "4 bits, int8 head", "parts": weight_parts(config, BITS, GROUP, int8_tables=True)})
    for each in rows:
        each["linear_ratio"] = _linear(rows[0]["parts"]) / _linear(each["parts"])
        each["model_ratio"] = sum(rows[0]["parts"].values()) / sum(each["parts"].values())
    bars = [
        _bar(f"linear layers, groups of {group}, times smaller", each["linear_ratio"], ">=", bar)
        for (group, bar), each in zip(SIZE_BARS.items(), rows[1:], strict=False)
    ]
    return {"rows": rows, "bars": bars, "met": all(bar["met"] for bar in bars)}


def weight_parts(config: ModelConfig, bits: int, group: int = GROUP, int8_tables: bool = False) -> dict[str, int]:
    """{part: bytes} of a model whose linear layers have `bits` a weight (16: unquantised); all else has 16."""
    shapes, grid = linear_shapes(config), Grid(BITS, group)
    parts = {"attention": 0, "mlp": 0, "scales and zeros": 0}
    for name, (rows, columns) in shapes.items():
        parts["attention" if "self_attn" in name else "mlp"] += rows * columns * bits // 8
        if bits < 16:
            parts["scales and zeros"] += rows * -(-columns // grid.columns(columns)) * (16 + bits) // 8
    tables = 1 if config.tie_word_embeddings else 2
    each = config.hidden_size + 2 if int8_tables else 2 * config.hidden_size
    parts["embedding and head"] = tables * config.vocab_size * each
    linear = sum(rows * columns for rows, columns in shapes.values())
    parts["norms and biases"] = 2 * (config.num_parameters - linear - tables * config.vocab_size * config.hidden_size)
    return parts


def _linear(parts: Mapping[str, int]) -> int:
    return sum(parts[name] for name in ("attention", "mlp", "scales and zeros"))


# -- speed ----------------------------------------------------------------------------------------


def speed(options: Options) -> dict[str, Any]:
    """Stage 5 against stage 4 in fp32, in turns: a decode step by rows, and the step of one long prompt."""
    rows, context, prompt = ((1, 4), 24, 40) if options.fast else ((1, 4, 8, 16, 32), 128, 512)
    rounds = options.rounds if options.fast else max(options.rounds, 7)
    grows = context + decoding.drift(rounds, rows) + 16
    longest = -(-max(grows, prompt + 16) // 16) * 16
    blocks = max(max(rows) * -(-grows // 16), longest // 16)
    engines = {
        name: runs.build(options.model, name[0], max(rows), longest, block_size=16, num_blocks=blocks, **settings)
        for name, settings in ENGINES.items()
    }
    cells: list[dict[str, Any]] = []
    total = (len(rows) + 1) * len(engines) * (rounds + 1)
    with told_of(options, "decode steps and a prompt: stage 4, 5", total) as told:
        for count, _, timed in decoding.decode_times(engines, rows, (context,), rounds, options.seed, told):
            cells.append(_cell({"rows": count, "context": context}, timed, SPEED_BARS.get(count)))
        ids = workloads.corpus(engines["4"].tokenizer, engines["4"].config.vocab_size)
        work = workloads.uniform(ids, options.seed, 1, (prompt, prompt), (1, 1))
        arms = {name: lambda llm=llm: _one_step_ms(llm, work) for name, llm in engines.items()}
        long = _cell({"tokens": prompt}, alternate(arms, rounds, told=told), None)
    cells.sort(key=lambda cell: cell["rows"])
    return {
        "cells": cells,
        "prompt": long,
        "weight_bytes": {name: runs.trace_of(llm).meta["weight_bytes"] for name, llm in engines.items()},
        "met": all(cell["met"] for cell in cells),
    }


def _cell(what: dict[str, Any], timed: Any, bar: float | None) -> dict[str, Any]:
    """Milliseconds by engine, and how many times as fast as stage 4 those of stage 5 are."""
    ratios = {name: vars(timed.ratio("4", name)) for name in ENGINES if name != "4"}
    met = bar is None or ratios["5"]["median"] >= bar
    return {**what, "ms": {name: timed.median(name) for name in ENGINES}, "speed": ratios, "bar": bar, "met": met}


def _one_step_ms(llm: Any, work: workloads.Workload) -> float:
    (record,) = runs.run(llm, work).trace.steps
    return 1e3 * (record.t_done - record.t_plan)


# -- in words -------------------------------------------------------------------------------------


def text(result: dict[str, Any]) -> str:
    """The result as lines of at most 120 columns."""
    lines = ["weights of 4 bits (stage 5) against fp32 (stage 4)"]
    lines += _accuracy_text(result["accuracy"])
    lines += _packed_text(result["packed"])
    lines += _sizes_text(result["sizes"])
    lines += _speed_text(result["speed"])
    return "\n".join(lines)


def _accuracy_text(found: dict[str, Any]) -> Iterator[str]:
    import textwrap

    yield (
        f"  perplexity on {found['pieces']} pieces of {found['length']} tokens that were not calibrated on: fp32 "
        f"{found['perplexity']:.3f} (loss {found['nll']:.4f} nats)"
    )
    for each in found["rows"]:
        on = f" ({each['pieces']} pieces)" if each["pieces"] != found["pieces"] else ""
        shares = {name: share for name, share in each.get("removed", {}).items() if share is not None}
        removed = [f"{share:.0%} of {name}'s" for name, share in shares.items()]
        yield (
            f"    {each['bits']} bits, groups of {each['group_size']:3}, {each['method'] + ':':13} "
            f"{each['perplexity_rise']:+8.2%}, loss {each['rise']:+.4f} +- {each['rise_error']:.4f}{on}"
            + (f"; removes {', '.join(removed)}" if removed else "")
        )
    yield from (f"    {_bar_text(bar, '.1%')}" for bar in found["bars"])
    if found["caveat"] and any(each["group_size"] == 32 for each in found["rows"]):
        yield from textwrap.wrap(found["caveat"], 116, initial_indent="    ", subsequent_indent="    ")


def _packed_text(found: dict[str, Any]) -> Iterator[str]:
    names = {
        "many": f"packed, pieces of {found['length']} tokens whole",
        "few": f"packed, {found['few']} tokens at a time",
        "int8 head": "packed, tables in 8 bits, pieces whole",
    }
    count = "one piece" if found["pieces"] == 1 else f"{found['pieces']} pieces"
    yield (
        f"  packed layers against plain ones with the same weights, {count}: perplexity {exp(found['twin_nll']):.3f}"
    )
    for name, each in found["arms"].items():
        yield (
            f"    {names[name]}: {each['perplexity_rise']:+.3%}; logits apart by {each['mean']:.3f} on average, "
            f"{each['largest']:.2f} at most"
        )
        yield f"      the same best token at {each['same']:.2%} of the places"


def _sizes_text(found: dict[str, Any]) -> Iterator[str]:
    yield "  bytes of the weights, scales and zero points counted"
    for each in found["rows"]:
        total = sum(each["parts"].values())
        yield (
            f"    {each['name']:24}linear layers {_linear(each['parts']) / 1e6:8.1f} MB, {each['linear_ratio']:.2f}x "
            f"smaller; whole model {total / 1e6:8.1f} MB, {each['model_ratio']:.2f}x"
        )
    yield from (f"    {_bar_text(bar, '.2f')}" for bar in found["bars"])


def _speed_text(found: dict[str, Any]) -> Iterator[str]:
    loaded = ", ".join(f"stage {name}: {size / 1e6:.0f} MB" for name, size in found["weight_bytes"].items())
    yield f"  speed in fp32 on this CPU; weights as loaded, {loaded}"
    for each in found["cells"]:
        per_s = {name: 1e3 * each["rows"] / ms for name, ms in each["ms"].items()}
        bar = f"; bar >= {each['bar']}x {'met' if each['met'] else 'MISSED'}" if each["bar"] is not None else ""
        yield (
            f"    {each['rows']:3} rows at {each['context']}: {per_s['4']:.1f} -> {per_s['5']:.1f} tokens/s, "
            f"{ratio_text(each['speed']['5'])}{bar}"
        )
        name = "5, int8 head"
        yield f"      with an int8 head {per_s[name]:.1f} tokens/s, {ratio_text(each['speed'][name])}"
    long = found["prompt"]
    yield (
        f"    a prompt of {long['tokens']} tokens: {long['ms']['4']:.0f} -> {long['ms']['5']:.0f} ms, "
        f"{ratio_text(long['speed']['5'])}"
    )


def _bar_text(bar: dict[str, Any], form: str) -> str:
    goal = f", goal {bar['goal']:{form}}" if bar["goal"] is not None else ""
    verdict = "met" if bar["met"] else "MISSED"
    value = "nothing that can be told" if bar["value"] is None else f"{bar['value']:{form}}"
    return f"{bar['name']} {value}; bar {bar['sign']} {bar['bar']:{form}} {verdict}{goal}"
