"""Weights from safetensors straight into the fused matrices, one tensor at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepengine.errors import ModelError
from stepengine.model.config import ModelConfig, require_unquantized
from stepengine.model.decoder import Decoder, Layer

_SHOWN = 4  # names listed in a message


def load_decoder(
    folder: str | Path, device: torch.device | str, dtype: torch.dtype, max_len: int | None = None
) -> Decoder:
    """Read a checkpoint folder (`config.json`, `*.safetensors`) into a `Decoder` on `device` in `dtype`.

    `max_len` (tokens) defaults to the model's max_position_embeddings. Peak memory is the weights plus one tensor.
    Raises `ModelError` naming tensors that are missing, surplus or of the wrong shape.
    """
    config = ModelConfig.from_folder(folder)
    require_unquantized(config)
    files = weight_files(folder)
    shapes = {name: shape for path in files for name, shape in _shapes(path).items()}
    _check_names(Path(folder), checkpoint_tensors(Decoder(config, "meta", dtype, 1)), shapes)
    decoder = Decoder(config, device, dtype, max_len)
    targets = checkpoint_tensors(decoder)
    for path in files:
        for name, tensor in _tensors(path):
            if name in targets:
                targets[name].copy_(tensor)
    return decoder.eval()


def weight_files(folder: str | Path) -> list[Path]:
    """The folder's safetensors files: `model.safetensors`, or the shards that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} has no readable weight_map; fetch the checkpoint again.") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of {len(names)} shards ({_some(missing)}); fetch the checkpoint again."
            )
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only ({_some(pickles)}), which can run code and are never loaded; "
            "use a safetensors checkpoint."
        )
    raise ModelError(f"{folder} has no model.safetensors and no model.safetensors.index.json; give a whole checkpoint.")


def checkpoint_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Where each tensor of a Hugging Face checkpoint goes: its name -> a view of the decoder's weights."""
    targets = tables_and_norms(decoder)
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        for name, target in _matrices(layer, decoder.config).items():
            targets[f"model.layers.{layer.index}.{name}"] = target
    return targets


def tables_and_norms(decoder: Decoder) -> dict[str, Tensor]:
    """Those of `checkpoint_tensors` that belong to no matrix product of a layer: tables and norms."""
    targets = {"model.embed_tokens.weight": decoder.embed.weight.data, "model.norm.weight": decoder.norm.data}
    if not decoder.config.tie_word_embeddings:
        targets["lm_head.weight"] = decoder.head.weight.data
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        norms = {"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm}
        if layer.q_norm is not None and layer.k_norm is not None:
            norms |= {"self_attn.q_norm": layer.q_norm, "self_attn.k_norm": layer.k_norm}
        targets |= {f"model.layers.{layer.index}.{name}.weight": norm.data for name, norm in norms.items()}
    return targets


def _matrices(layer: Layer, config: ModelConfig) -> dict[str, Tensor]:
    """The weights and biases of a layer's matrix products."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    targets = {"self_attn.o_proj.weight": layer.o.weight.data, "mlp.down_proj.weight": layer.down.weight.data}
    gate, up = layer.gate_up.weight.data.chunk(2)
    targets |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    for key in ("weight", "bias") if config.qkv_bias else ("weight",):
        parts = getattr(layer.qkv, key).data.split((q, kv, kv))
        targets |= {f"self_attn.{name}_proj.{key}": part for name, part in zip("qkv", parts, strict=True)}
    return targets


def _ignorable(name: str) -> bool:
    # The head is looked up only if untied; frequencies follow from the config.
    return name == "lm_head.weight" or name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos", "rotary_emb.sin"))


def _check_names(folder: Path, targets: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in targets if name not in shapes]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(targets)} tensors ({_some(missing)}); fetch the checkpoint again, "
            "or correct its config.json."
        )
    surplus = [name for name in shapes if name not in targets and not _ignorable(name)]
    if surplus:
        raise ModelError(
            f"{folder} holds {len(surplus)} tensors that its config.json does not account for ({_some(surplus)}); "
            "the model has parts that are not supported."
        )
    for name, target in targets.items():
        if shapes[name] != tuple(target.shape):
            raise ModelError(
                f"{name} in {folder} has shape {list(shapes[name])}, but its config.json asks for "
                f"{list(target.shape)}; correct one of the two."
            )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); fetch the checkpoint again.") from error


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    # Opened anew for each tensor: pages of the file that were read stay mapped, and count, until it is closed.
    for name in _shapes(path):
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
