"""From a model to its quantised layers: run text through it once, and quantise each layer as the text gets there."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stepengine.errors import InvalidSetting, ModelError
from stepengine.model.config import ModelConfig
from stepengine.model.decoder import Decoder, Layer
from stepengine.stage5_gptq.gptq import Hessian, Method, quantize
from stepengine.stage5_gptq.grid import Grid, QuantizedWeight, round_to_nearest
from stepengine.stage5_gptq.texts import read_texts, windows

FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""A layer's matrix products in the order in which they run, and the checkpoint's matrices that each one joins."""


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised. method None: round to nearest, which needs no text.

    samples pieces of length tokens are the calibration text; path (file or folder) names it, None is the default.
    """

    grid: Grid = Grid(clip=True)
    method: Method | None = Method()
    samples: int = 32
    length: int = 512
    path: Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
                raise InvalidSetting(f"{name} is {value!r}; it must be a whole number from 1 to {1 << 20}.")

    def tokens(self, tokenizer: Any, config: ModelConfig) -> Tensor:
        """The calibration tokens [samples, length]; random ones for a model without a tokenizer."""
        length = min(self.length, config.max_position_embeddings)
        if tokenizer is None:
            if self.path is not None:
                raise InvalidSetting(
                    f"The calibration text is {self.path}, and the model has no tokenizer to read it with; leave it "
                    f"out."
                )
            noise = torch.Generator().manual_seed(0)
            return torch.randint(config.vocab_size, (self.samples, length), generator=noise)
        return windows(tokenizer, read_texts(self.path).calibration, length, self.samples)


class Pieces(NamedTuple):
    """A batch of pieces of one length, as the decoder reads it: ids and positions [pieces * length]."""

    ids: Tensor
    positions: Tensor
    length: int

    @classmethod
    def of(cls, tokens: Tensor, device: torch.device | str) -> "Pieces":
        """From token ids [pieces, length]."""
        count, length = tokens.shape
        positions = torch.arange(length, dtype=torch.int32).repeat(count)
        return cls(tokens.reshape(-1).to(device, torch.int32), positions.to(device), length)


class WholePieces:
    """Causal attention of each piece to itself; nothing is stored."""

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Pieces) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]."""
        q, k, v = (tensor.unflatten(0, (-1, batch.length)).transpose(1, 2) for tensor in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)


Told = Callable[[str], object]


@torch.inference_mode()
def quantized_layers(
    decoder: Decoder, tokens: Tensor, recipe: Recipe, work: Path | None = None, told: Told = lambda name: None
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantise a decoder's layers, first to last: (the checkpoint's name of a matrix, its codes), on the CPU.

    All `tokens` [pieces, length] go through the model together, and each matrix is quantised when they have
    reached it, from the inputs that it will really see: those that the quantised matrices before it make. The
    decoder's own weights are replaced by what their codes stand for. Matrices that are joined share their
    inputs, hence one Hessian; only one is held at a time. In `work` the state after each layer is kept, and a
    second call with the same arguments goes on from there. `told` hears each name that is done.
    """
    device = decoder.norm.device
    batch, attention = Pieces.of(tokens, device), WholePieces()
    saved = _Saved(work, decoder, tokens, recipe)
    cos = decoder.cos.index_select(0, batch.positions).to(decoder.norm.dtype)
    sin = decoder.sin.index_select(0, batch.positions).to(decoder.norm.dtype)
    state = saved.state(device) if recipe.method else None
    x, residual = state or (decoder.embed(batch.ids), None)
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        done = saved.layer(layer.index)
        if done is None:
            done = {}
            if recipe.method is None:
                for part in FUSED:
                    done |= _split(layer, part, round_to_nearest(getattr(layer, part).weight, recipe.grid))
            else:
                x, residual = _through(layer, recipe, done, (x, residual, cos, sin, batch, attention))
                saved.keep(layer.index, done, (x, residual))
        for name, weight in done.items():
            told(name)
            yield name, weight
    saved.clear()


def _through(
    layer: Layer, recipe: Recipe, done: dict[str, QuantizedWeight], inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Run a layer; each of its matrix products is quantised, into `done`, the moment its inputs are there."""

    def before(part: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def quantise(linear: Any, args: tuple[Tensor]) -> None:
            name = f"model.layers.{layer.index}.{part}"
            hessian = Hessian(linear.in_features, args[0].device, name)
            hessian.add(args[0])
            try:
                found = quantize(linear.weight, hessian.matrix, recipe.grid, recipe.method)
            except ModelError as error:
                raise ModelError(f"{name}: {error}") from None
            linear.weight.copy_(found.dequantized(linear.weight.dtype))
            done.update(_split(layer, part, found))

        return quantise

    hooks = [getattr(layer, part).register_forward_pre_hook(before(part)) for part in FUSED]
    try:
        x, residual = layer(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return x, residual


def _split(layer: Layer, part: str, weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """A joined matrix as the checkpoint's own ones, by name."""
    q, kv, (rows, _) = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim, weight.shape
    sizes = {"qkv": (q, kv, kv), "gate_up": (rows // 2, rows // 2)}.get(part, (rows,))
    found, start = {}, 0
    for name, size in zip(FUSED[part], sizes, strict=True):
        found[f"model.layers.{layer.index}.{name}"] = weight.rows(start, start + size).cpu()
        start += size
    return found


class _Saved:
    """What a run leaves in its folder, so that the next one with the same arguments can go on."""

    def __init__(self, folder: Path | None, decoder: Decoder, tokens: Tensor, recipe: Recipe) -> None:
        self.folder = folder if recipe.method is not None else None
        self.done = 0  # layers whose results are there, with the state behind the last of them
        if self.folder is None:
            return
        first = decoder.layers[0].gate_up.weight  # type: ignore[union-attr]
        sample = b"".join(part.detach().float().cpu().numpy().tobytes() for part in (first, decoder.norm))
        parts = (repr(recipe).encode(), repr(decoder.config).encode(), tokens.cpu().numpy().tobytes(), sample)
        self.key = hashlib.sha256(b"|".join(parts)).hexdigest()
        try:
            known = json.loads((self.folder / "key.json").read_text())
        except (OSError, ValueError):
            known = None
        if known != self.key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self.folder / "key.json").write_text(json.dumps(self.key))
        with suppress(OSError, SafetensorError, ValueError, TypeError, KeyError):
            with safe_open(self.folder / "state.safetensors", framework="pt") as file:
                done = int(file.metadata()["layers"])
            if all((self.folder / f"layer-{index}.safetensors").is_file() for index in range(done)):
                self.done = done

    def state(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if not self.done:
            return None
        with safe_open(self.folder / "state.safetensors", framework="pt", device=str(device)) as file:
            return file.get_tensor("x"), file.get_tensor("residual")

    def layer(self, index: int) -> dict[str, QuantizedWeight] | None:
        if index >= self.done:
            return None
        found: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.folder / f"layer-{index}.safetensors", framework="pt") as file:
            bits = int(file.metadata()["bits"])
            for key in sorted(file.keys(), key=lambda key: int(key.split("|")[0])):
                _, name, field = key.split("|")
                found.setdefault(name, {})[field] = file.get_tensor(key)
        return {name: QuantizedWeight(**fields, bits=bits) for name, fields in found.items()}

    def keep(self, index: int, done: dict[str, QuantizedWeight], state: tuple[Tensor, Tensor]) -> None:
        if self.folder is None:
            return
        tensors = {
            f"{at}|{name}|{field}": getattr(weight, field).contiguous()
            for at, (name, weight) in enumerate(done.items())
            for field in ("codes", "scales", "zeros", "groups")
        }
        bits = next(iter(done.values())).bits
        self._write(f"layer-{index}.safetensors", tensors, {"bits": str(bits)})
        both = {"x": state[0].cpu().contiguous(), "residual": state[1].cpu().contiguous()}
        self._write("state.safetensors", both, {"layers": str(index + 1)})  # last: it says that the layer is there

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        aside = self.folder / f"{name}.writing"
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, aside, metadata)
        os.replace(aside, self.folder / name)

    def clear(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
