"""What a checkpoint's `config.json` says, checked: whatever this decoder cannot run exactly is refused by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stepengine.errors import ModelError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What the families' own configuration classes assume where a config.json is silent.
_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_MISTRAL_WINDOW = 4096


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, type, and the parameters of that type (1.0 and 0 where it has none)."""

    theta: float = 10000.0
    type: str = "default"  # "default" | "linear" | "llama3"
    factor: float = 1.0  # linear, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 0  # llama3


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of one decoder-only model. Made by `from_folder` or `from_dict`, which check them."""

    architecture: str  # "llama" | "mistral" | "qwen2" | "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None  # tokens; None where no layer of the model uses a window
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str  # the checkpoint's own: "float32" | "bfloat16" | "float16"
    quantization: dict[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def from_folder(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` and, where there is one, `generation_config.json`. Raises `ModelError`."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint.")
        generation = folder / "generation_config.json"
        return cls.from_dict(
            _read_json(folder / "config.json"), _read_json(generation) if generation.is_file() else None
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Check a `config.json` in the old form (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`).

        `generation` is `generation_config.json`, whose EOS ids join those of `config`.
        Raises `ModelError`, naming the key, for anything that the decoder would not run exactly.
        """
        architecture = _architecture(config)
        _refuse_unsupported(config, architecture)
        hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
        kv_heads = _positive(config, "num_key_value_heads", _KV_HEADS.get(architecture, heads))
        if heads % kv_heads:
            raise ModelError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; "
                "each K/V head must serve the same number of query heads."
            )
        head_dim = _positive(config, "head_dim", 128 if architecture == "qwen3" else hidden // heads)
        if head_dim % 2:
            raise ModelError(f"head_dim={head_dim} is odd; rotary embedding turns pairs, so it must be even.")
        positions = _positive(config, "max_position_embeddings", _MAX_POSITIONS[architecture])
        eos = [*_token_ids(config.get("eos_token_id")), *_token_ids((generation or {}).get("eos_token_id"))]
        bos = _token_ids(config.get("bos_token_id"))
        layers = _positive(config, "num_hidden_layers")
        return cls(
            architecture=architecture,
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config, positions),
            max_position_embeddings=positions,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            sliding_window=_sliding_window(config, architecture, layers),
            eos_token_ids=tuple(dict.fromkeys(eos)),
            bos_token_id=bos[0] if bos else None,
            dtype=_dtype_name(config),
            quantization=config.get("quantization_config"),
        )

    @property
    def num_parameters(self) -> int:
        """Weights of the model; a tied head counts once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size + 2)
        layer += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + tables + self.hidden_size

    def kv_bytes_per_token(self, dtype: torch.dtype | str) -> int:
        """Bytes that one token's keys and values take: 2 x layers x K/V heads x head_dim x bytes of `dtype`."""
        if isinstance(dtype, str):
            dtype = torch_dtype(dtype)
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name` ("float32", "bfloat16" or "float16"). Raises `ModelError` for another name."""
    try:
        return DTYPES[name.removeprefix("torch.")]
    except KeyError:
        raise ModelError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}.") from None


def require_unquantized(config: ModelConfig) -> None:
    """Raise `ModelError` if the checkpoint's weights are quantised, which stages 0 to 4 do not read."""
    if config.quantization is not None:
        method = config.quantization.get("quant_method", "unnamed")
        raise ModelError(
            f"The checkpoint is quantised (quantization_config with quant_method={method!r}); "
            "stage 5 brings quantised weights, earlier stages need an unquantised checkpoint."
        )


def check_run_length(config: ModelConfig, max_model_len: int) -> None:
    """Raise `ModelError` if a run of `max_model_len` tokens is longer than the model's sliding window.

    Up to the window's length, attention with a window and full attention are the same; beyond it they are not.
    """
    if config.sliding_window is not None and max_model_len > config.sliding_window:
        raise ModelError(
            f"max_model_len={max_model_len} exceeds the model's sliding window of {config.sliding_window} tokens, "
            f"which is not supported; set max_model_len to at most {config.sliding_window}."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch the checkpoint again.")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    model_type = config.get("model_type")
    if not names and model_type in ARCHITECTURES.values():
        return str(model_type)
    shown = ", ".join(map(str, names)) or f"model_type={model_type!r}"
    raise ModelError(f"Architecture {shown} is not supported; use a checkpoint of {', '.join(ARCHITECTURES)}.")


def _refuse_unsupported(config: Mapping[str, Any], architecture: str) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise ModelError(f"{key}={config[key]} is not supported; use a dense checkpoint, without experts.")
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ModelError(f"hidden_act={act!r} is not supported; the feed-forward layers must use 'silu'.")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ModelError(
                f"{key}=true is not supported for {architecture}: only Qwen2's bias of q, k and v is; "
                "use a checkpoint without it."
            )


def _rope(config: Mapping[str, Any], positions: int) -> RopeConfig:
    given = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ModelError("rope_parameters differ by layer type, which is not supported; all layers must share one set.")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ModelError(f"RoPE type {kind!r} is not supported; use a checkpoint with {', '.join(ROPE_TYPES)}.")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"partial_rotary_factor={partial} is not supported; all of head_dim must be rotated (1.0).")
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    keys = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    missing = [key for key in keys if not isinstance(given.get(key), int | float)]
    if missing:
        raise ModelError(f"RoPE type {kind!r} needs {', '.join(missing)}; config.json does not give it as a number.")
    if kind == "linear":
        return RopeConfig(theta=theta, type=kind, factor=float(given["factor"]))
    original = given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return RopeConfig(
        theta=theta,
        type=kind,
        factor=float(given["factor"]),
        low_freq_factor=float(given["low_freq_factor"]),
        high_freq_factor=float(given["high_freq_factor"]),
        original_max_position_embeddings=int(original or positions),
    )


def _sliding_window(config: Mapping[str, Any], architecture: str, layers: int) -> int | None:
    if architecture == "llama":
        return None
    if architecture == "mistral":
        window = config.get("sliding_window", _MISTRAL_WINDOW)
    else:
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        kinds = config.get("layer_types")
        # Qwen's first `max_window_layers` layers attend to everything; only later ones have the window.
        slides = "sliding_attention" in kinds if kinds else int(config.get("max_window_layers", 28)) < layers
        window = window if slides else None
    return None if window is None else int(window)


def _dtype_name(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    torch_dtype(name)
    return name


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json gives {key}={value!r}; it must be a whole number of at least 1.")
    return value


def _token_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list | tuple) else [int(value)]
