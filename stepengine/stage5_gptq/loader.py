"""A decoder whose matrix products are quantised: from a GPTQ checkpoint, or from any other, quantised first."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from stepengine.errors import InvalidSetting
from stepengine.model import store
from stepengine.model.config import ModelConfig
from stepengine.model.decoder import Decoder, Layer
from stepengine.model.loader import load_decoder, tables_and_norms, weight_files
from stepengine.model.tokenizer import load_tokenizer
from stepengine.stage5_gptq.calibrate import FUSED, Recipe, quantized_layers
from stepengine.stage5_gptq.checkpoint import QuantizedCheckpoint, check_written_format, write_checkpoint
from stepengine.stage5_gptq.gptq import Method
from stepengine.stage5_gptq.grid import Grid, QuantizedWeight
from stepengine.stage5_gptq.linear import Int8Embedding, SplitLinear, TwinLinear, int8_table, joined, packed_linear

METHODS: dict[str, Method | None] = {"gptq": Method(), "rtn": None}
_VERSION = 1  # raise it when the same recipe gives other codes: kept results are then made anew


def load_quantized(
    folder: str | Path,
    device: torch.device | str,
    dtype: torch.dtype,
    max_len: int | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    quantization: str | None = None,
    int8_head: bool | None = None,
    twin: bool = False,
) -> Decoder:
    """A `Decoder` on `device` whose layers hold packed weights; everything else is of `dtype`.

    A folder that is not quantised yet is, with these settings (4 bits, groups of 64, GPTQ), once: the result
    is kept in the model cache. int8_head: embedding and head in 8 bits, rounded on loading. twin: unpack and
    multiply with the plain layers that the fast ones are held to. Raises `ModelError` or `InvalidSetting`, also
    where the settings contradict a checkpoint that is quantised.
    """
    folder, device = Path(folder), torch.device(device)
    if int8_head not in (None, False, True):
        raise InvalidSetting(f"int8_head is {int8_head!r}; it must be True or False.")
    if ModelConfig.from_folder(folder).quantization is None:
        folder = quantized_folder(folder, recipe_of(bits, group_size, quantization))
        checkpoint = QuantizedCheckpoint(folder)
    else:
        checkpoint = QuantizedCheckpoint(folder)
        _check_same(checkpoint, bits, group_size, quantization)
    decoder = Decoder(checkpoint.config, "meta", dtype, max_len)
    for layer in decoder.layers:
        for part in FUSED:
            setattr(layer, part, nn.Identity())  # their matrices are never allocated
    decoder.allocate(device, max_len)
    targets = tables_and_norms(decoder)
    for name in targets:
        targets[name].copy_(checkpoint.tensor(name))
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        for part in FUSED:
            setattr(layer, part, _linear(checkpoint, layer, part, device, dtype, twin))
    if int8_head:
        _store_tables_in_8_bits(decoder)
    return decoder.eval()


def recipe_of(
    bits: int | None = None, group_size: int | None = None, quantization: str | None = None, **more: Any
) -> Recipe:
    """The recipe that these settings name; None is the default of each."""
    if quantization is not None and quantization not in METHODS:
        raise InvalidSetting(f"quantization is {quantization!r}; it must be 'gptq' or 'rtn' (round to nearest).")
    method = METHODS[quantization or "gptq"]
    # A searched range helps GPTQ, which weighs columns and makes up for what is cut off; without that it hurts.
    grid = Grid(4 if bits is None else bits, 64 if group_size is None else group_size, clip=method is not None)
    return Recipe(grid, method, **more)


def quantized_folder(folder: Path, recipe: Recipe) -> Path:
    """The checkpoint `folder` quantised by `recipe`, from the model cache; made now if it is not there yet."""
    grid, (name, version) = recipe.grid, _kept_as(folder, recipe)
    work = store.folder_of(f".{name}.partial")

    def build(fresh: Path) -> None:
        how = "round to nearest" if recipe.method is None else f"GPTQ on {recipe.samples} x {recipe.length} tokens"
        kept = fresh.parent.parent
        grids = "one group a row" if grid.group_size == -1 else f"groups of {grid.group_size}"
        print(f"{folder.name}: quantising to {grid.bits} bits, {grids} ({how}), once; kept in {kept}", file=sys.stderr)
        quantize_folder(folder, fresh, recipe, work, short_groups=True)

    return store.cached(name, version, build)


def _kept_as(folder: Path, recipe: Recipe) -> tuple[str, str]:
    """(name in the model cache, what says that it is of this checkpoint and this recipe)."""
    grid, kind = recipe.grid, "rtn" if recipe.method is None else "gptq"
    files = [folder / "config.json", *weight_files(folder)]
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    size = "row" if grid.group_size == -1 else str(grid.group_size)
    source = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    version = hashlib.sha256(repr((_VERSION, state, recipe)).encode()).hexdigest()
    return f"{folder.name}-{kind}-{grid.bits}bit-{size}-{source}", version


def quantize_folder(
    source: Path,
    out: Path,
    recipe: Recipe,
    work: Path | None = None,
    device: torch.device | str = "cpu",
    short_groups: bool = False,
    progress: bool = True,
) -> Path:
    """Quantise the checkpoint `source` into the folder `out`, in the community's format; returns `out`.

    Runs in fp32 on `device`, with a progress bar; in `work` it leaves what it has when it is stopped, and goes on
    from there. What the model cache holds of this recipe already is written from there. Raises `InvalidSetting` or
    `ModelError` before any work where the result could not be written.
    """
    config = ModelConfig.from_folder(source)
    check_written_format(config, recipe.grid, short_groups)
    method = recipe.method

    def layers() -> Iterator[tuple[str, QuantizedWeight]]:
        name, version = _kept_as(source, recipe)
        if store.is_whole(store.folder_of(name), version):
            kept = QuantizedCheckpoint(store.folder_of(name))
            yield from ((name, kept.read(name)) for name in kept.names)
            return
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        if method is not None:
            tokens = recipe.tokens(load_tokenizer(source), config)
        decoder = load_decoder(source, device, torch.float32, tokens.shape[1])
        total = config.num_layers * sum(map(len, FUSED.values()))
        form = "{desc}: {n_fmt} of {total_fmt} matrices |{bar}| {remaining} left"
        with tqdm(total=total, desc=f"quantise {source.name}", bar_format=form, disable=not progress, ncols=90) as bar:
            yield from quantized_layers(decoder, tokens, recipe, work, lambda name: bar.update())

    return write_checkpoint(
        out,
        source,
        layers(),
        recipe.grid,
        damp_percent=None if method is None else method.damping,
        act_order=method is not None and method.act_order,
        static_groups=method is None or method.act_order,
        true_sequential=method is not None,
        short_groups=short_groups,
    )


def _check_same(
    checkpoint: QuantizedCheckpoint, bits: int | None, group_size: int | None, quantization: str | None
) -> None:
    found = checkpoint.quantization
    for name, asked, has in (("bits", bits, found.bits), ("group_size", group_size, found.group_size)):
        if asked is not None and asked != has:
            raise InvalidSetting(
                f"{name} is {asked}, but {checkpoint.folder} is quantised with {has} already; leave {name} out, or "
                f"give the unquantised checkpoint."
            )
    if quantization not in (None, "gptq"):
        raise InvalidSetting(
            f"quantization is {quantization!r}, but {checkpoint.folder} is a GPTQ checkpoint already; leave it out."
        )


def _linear(
    checkpoint: QuantizedCheckpoint, layer: Layer, part: str, device: torch.device, dtype: torch.dtype, twin: bool
) -> nn.Module:
    """One matrix product of a layer: joined as the decoder has it, where the file's columns allow that."""

    def make(weight: QuantizedWeight, bias: torch.Tensor | None) -> nn.Module:
        if twin:
            return TwinLinear(weight, bias, device, dtype)
        return packed_linear(weight, bias, device, dtype, raw=part == "gate_up")  # `down` takes what comes

    names = [f"model.layers.{layer.index}.{name}" for name in FUSED[part]]
    weights = [checkpoint.read(name) for name in names]
    biases = [checkpoint.bias(name) for name in names]
    whole = joined(weights)
    if whole is None:
        return SplitLinear([make(*pair) for pair in zip(weights, biases, strict=True)])
    given = [bias for bias in biases if bias is not None]
    return make(whole, torch.cat(given) if given else None)


def _store_tables_in_8_bits(decoder: Decoder) -> None:
    """Embedding and head: one table where they are tied, else two."""
    table = int8_table(decoder.embed.weight.data)
    head = table if decoder.config.tie_word_embeddings else int8_table(decoder.head.weight.data)
    decoder.embed, decoder.head = Int8Embedding(table), head  # type: ignore[assignment]
