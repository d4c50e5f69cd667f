"""Random checkpoints in the Hugging Face format, for tests and for trying things where real text does not matter."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stepengine.errors import ModelError
from stepengine.model.config import ARCHITECTURES, ModelConfig
from stepengine.model.decoder import Decoder
from stepengine.model.loader import checkpoint_tensors

FAMILIES = tuple(ARCHITECTURES.values())


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A `config.json` of a tiny model of one family: 2 layers, hidden 64, 4 heads on 2 K/V heads, vocabulary 499."""
    if family not in FAMILIES:
        raise ModelError(f"Family {family!r} is unknown; use one of {', '.join(FAMILIES)}.")
    architecture = next(name for name, value in ARCHITECTURES.items() if value == family)
    config = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": 499,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": family == "qwen3",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    if family == "mistral":
        config["sliding_window"] = None
    return config | overrides


def random_checkpoint(config: Mapping[str, Any], folder: str | Path, seed: int = 0) -> Path:
    """Write `config.json` and an fp32 `model.safetensors` drawn from `seed` into `folder`; returns the folder.

    Matrices keep the scale of what passes through them. Embeddings are small, so that even with a tied
    head the next token does not simply repeat the last one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = checkpoint_tensors(Decoder(ModelConfig.from_dict(config), "meta", torch.float32, 1))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(shapes):
        noise = torch.randn(shapes[name].shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            tensors[name] = 0.1 * noise
        elif noise.dim() == 2:
            tensors[name] = noise / math.sqrt(noise.shape[1])
        else:
            tensors[name] = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
