"""What a model costs on a GPU, by arithmetic: bytes of weights and of K/V, sequences that fit, and least times.

Nothing here is measured: a time is the bytes that must be moved over the bandwidth, or the floating-point operations
over the peak rate, whichever is longer (the roofline model: Williams, Waterman, Patterson, 2009). 1 GB is 1e9 bytes.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepengine.errors import InvalidSetting, ModelError

if TYPE_CHECKING:
    from stepengine.model.config import ModelConfig

GB = 1_000_000_000
WEIGHTS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}  # bits of a weight
KV_BITS = (32, 16, 8)
TABLE_BITS = (16, 8)  # embedding and head of a quantised model; 8: with a 16-bit scale a row


@dataclass(frozen=True)
class GPU:
    """One GPU. memory_gb in GB, bandwidth_gb_s in GB/s, tflops of dense 16-bit products in TFLOP/s.

    sources: where memory, bandwidth and peak were read, one each.
    """

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    tflops: float
    sources: tuple[str, str, str]


UNSEEN = "from the vendor's datasheet, not looked up here"
_KLOCKWOOD = "https://glennklockwood.com/garden/processors/"
_A100, _H100 = f"{_KLOCKWOOD}A100", f"{_KLOCKWOOD}h100"
_B200 = "https://docs.vultr.com/inference-cookbook/cuda/getting-started/hardware-overview"
_H200 = "https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html, dense figures"
_T4 = "https://sysrqmts.com/en/gpus/nvidia/tesla/t4"
_L4 = "https://fpsbench.com/compare/gpu/nvidia-l4-vs-nvidia-tesla-m40"
_A10 = "https://www.baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference/"
_RTX3090 = "https://holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-3090-specifications.html"
_RTX4090 = "https://waredb.com/processor/nvidia-geforce-rtx-4090"
_MI300X = "https://www.emergentmind.com/topics/amd-mi300x-gpu"

# Vendors' own pages could not be opened; each number was read on the page named beside it.
_GPUS = (
    GPU("T4", 16, 320, 65, (_T4, _T4, f"{_T4} (65.13, fp16 only: no bf16)")),
    GPU("L4", 24, 300, 121, (_L4, _L4, "half of the 242 with sparsity at https://grokipedia.com/page/NVIDIA_L4_vs_L40S")),
    GPU("A10", 24, 600, 125, (_A10, _A10, UNSEEN)),
    GPU("RTX 3090", 24, 936, 71, (_RTX3090, _RTX3090, f"half of the 142 at {_RTX3090}: sums in fp32, not fp16")),
    GPU("RTX 4090", 24, 1008, 165, (_RTX4090, _RTX4090, f"{_RTX4090} (165.15, sums in fp32)")),
    GPU("A100 40 GB", 40, 1555, 312, (_A100, _A100, _A100)),
    GPU("A100 80 GB", 80, 2039, 312, (_A100, _A100, _A100)),
    GPU("H100 (SXM)", 80, 3350, 989, (_H100, _H100, f"{_H100} (989.4)")),
    GPU("H200", 141, 4800, 989, (_H200, _H200, _H200)),
    GPU(
        "B200", 180, 8000, 2250,
        (
            f"{_B200} (179; the driver's 178.35 GiB: https://github.com/pytorch/ao/pull/4002)",
            f"{_KLOCKWOOD}B200",
            f"{_KLOCKWOOD}B200, HGX at 1000 W",
        ),
    ),
    GPU(
        "MI300X", 192, 5300, 1307,
        (_MI300X, _MI300X, f"{UNSEEN}; https://www.jaredwatkins.com/research/ai-accelerators/amd-instinct/mi300-series/"
         " says about 1300"),
    ),
)  # fmt: skip
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _GPUS}


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that its costs depend on. Made by `shape_of`.

    gated: the MLP has three matrices (gate, up, down), else two. positions: rows of a learned position table, else 0.
    small: parameters of norms and biases. longest: positions it was made for. window: of sliding attention, or None.
    given: the config's field for each number. source: where they come from. notes: what was assumed.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    small: int
    gated: bool = True
    positions: int = 0
    longest: int | None = None
    window: int | None = None
    given: Mapping[str, str] = field(default_factory=dict, hash=False)
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of one layer's matrices, attention's four first."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q))
        up = ((self.intermediate, self.hidden),) * (2 if self.gated else 1)
        return (*attention, *up, (self.hidden, self.intermediate))

    @property
    def attention(self) -> int:
        """Parameters of all layers' q, k, v and output matrices."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices[:4])

    @property
    def mlp(self) -> int:
        """Parameters of all layers' feed-forward matrices."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices[4:])

    @property
    def tables(self) -> int:
        """Parameters of embedding and head (one table where they are tied), and of learned positions."""
        return ((1 if self.tied else 2) * self.vocab + self.positions) * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        return self.attention + self.mlp + self.tables + self.small


def _public(
    name: str, repo: str, family: str, sizes: tuple[int, int, int, int, int, int, int], longest: int, **more: Any
) -> tuple[str, tuple[str, dict[str, Any]]]:
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "vocab_size")  # fmt: skip
    fields = dict(zip(keys, sizes, strict=True))
    return name, (repo, {"model_type": family, **fields, "max_position_embeddings": longest, **more})


# name: (hub id, fields of its config.json). A test holds the counts of parameters to published ones.
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = dict((
    _public("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", (30, 576, 9, 3, 64, 1536, 49152), 8192,
            tie_word_embeddings=True),
    _public("Qwen3-0.6B", "Qwen/Qwen3-0.6B", "qwen3", (28, 1024, 16, 8, 128, 3072, 151936), 40960,
            tie_word_embeddings=True),
    _public("Qwen2.5-7B", "Qwen/Qwen2.5-7B", "qwen2", (28, 3584, 28, 4, 128, 18944, 152064), 131072),
    _public("Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1", "mistral", (32, 4096, 32, 8, 128, 14336, 32000), 32768,
            sliding_window=4096),
    _public("Llama-3-8B", "meta-llama/Meta-Llama-3-8B", "llama", (32, 4096, 32, 8, 128, 14336, 128256), 8192),
    _public("Llama-3-70B", "meta-llama/Meta-Llama-3-70B", "llama", (80, 8192, 64, 8, 128, 28672, 128256), 8192),
    _public("Llama-2-7B", "meta-llama/Llama-2-7b-hf", "llama", (32, 4096, 32, 32, 128, 11008, 32000), 4096),
    _public("Llama-2-13B", "meta-llama/Llama-2-13b-hf", "llama", (40, 5120, 40, 40, 128, 13824, 32000), 4096),
    _public("Llama-2-70B", "meta-llama/Llama-2-70b-hf", "llama", (80, 8192, 64, 8, 128, 28672, 32000), 4096),
))  # fmt: skip
# Brown et al. 2020, arXiv:2005.14165, table 2.1; GPT-2's vocabulary and form. In the field names of GPT-2.
GPT3 = {"model_type": "gpt2", "n_layer": 96, "n_embd": 12288, "n_head": 96, "vocab_size": 50257, "n_positions": 2048}
TINY = "tiny-random"
MODELS: tuple[str, ...] = (*PUBLIC, "GPT-3 175B", TINY)

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
          "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")  # fmt: skip
_UNLIKE = {
    "num_experts": "a mixture of experts reads only some of its weights for a token",
    "num_local_experts": "a mixture of experts reads only some of its weights for a token",
    "n_routed_experts": "a mixture of experts reads only some of its weights for a token",
    "kv_lora_rank": "its attention stores compressed K/V",
    "ssm_state_size": "state-space layers store a state instead of K/V",
    "state_size": "state-space layers store a state instead of K/V",
}
_OTHER_FORMS = ("opt", "gptj", "gpt_neo", "gpt_neox", "falcon", "bloom", "mpt", "phi", "t5", "bert", "mamba", "rwkv")


def shape_of(model: "Shape | ModelConfig | Mapping[str, Any] | str | Path", name: str | None = None) -> Shape:
    """The shape of a model: a `ModelConfig`, a dict with config.json's fields, a name, or a checkpoint's folder.

    Names are those of `MODELS`, of the catalogue (fetched if need be), and hub ids of `MODELS`. Raises `ModelError`
    for a config that cannot be, naming the field, and `InvalidSetting` for a name that nobody knows.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, Mapping):
        return _from_fields(model, name or "your config", "the dict given")
    if isinstance(model, str | Path):
        return _named(model)
    if not hasattr(model, "num_parameters"):
        raise InvalidSetting(
            f"model is a {type(model).__name__}; give a name, a folder, a ModelConfig or a dict with config.json's "
            "fields."
        )
    return _from_config(model, name or "your config", "the ModelConfig given", {}, 0, ())


def _named(model: str | Path) -> Shape:
    from stepengine.model.catalog import entries, resolve
    from stepengine.model.config import ModelConfig
    from stepengine.model.tiny import tiny_config

    text = str(model)
    catalogue = [entry.name for entry in entries()]
    known = {known.lower(): known for known in MODELS} | {repo.lower(): known for known, (repo, _) in PUBLIC.items()}
    found = known.get(text.lower())
    if found == TINY:
        return _from_fields(tiny_config("llama"), found, "stepengine.model.tiny")
    if text in catalogue:
        return _from_config(ModelConfig.from_folder(resolve(text)), text, f"config.json of {text}", {}, 0, ())
    if found == "GPT-3 175B":
        return _from_fields(GPT3, found, "table 2.1 of arXiv:2005.14165, in GPT-2's field names")
    if found is not None:
        repo, fields = PUBLIC[found]
        return _from_fields(fields, found, f"config.json of {repo}")
    folder = Path(text).expanduser()
    if folder.is_dir():
        name = folder.resolve().name
        return _from_fields(_config_json(folder), name, f"config.json of the folder {name}")
    close = difflib.get_close_matches(text.lower(), [*known, *catalogue], n=3, cutoff=0.4)
    hint = " or ".join(dict.fromkeys(known.get(name, name) for name in close)) or ", ".join(MODELS)
    raise InvalidSetting(
        f"model is {text!r}, which is neither known here nor a folder; did you mean {hint}? Any other model: give its "
        "config.json as a dict, or a folder that holds it."
    )


def _config_json(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no config.json that can be read ({error}); give a checkpoint's folder."
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"config.json of {folder} holds a {type(config).__name__}, not a JSON object; fetch it again.")
    return config


def _from_fields(config: Mapping[str, Any], name: str, source: str) -> Shape:
    """A shape from config.json's fields: those of our own families and their like, or GPT-2's."""
    from stepengine.model.config import ARCHITECTURES, ModelConfig

    family = str(config.get("model_type") or "")
    names = [str(each) for each in config.get("architectures") or []]
    for key, why in _UNLIKE.items():
        if config.get(key):
            raise ModelError(f"{key}={config[key]} is not computed here: {why}; give the config of a dense decoder.")
    if family in _OTHER_FORMS:
        raise ModelError(
            f"model_type={family!r} is not computed here, its layers have another form; give the config of a decoder "
            f"like Llama, Mistral, Qwen or GPT-2."
        )
    if family == "gpt2" or (not family and "n_embd" in config):
        return _from_gpt2(config, name, source)
    known = next((ARCHITECTURES[each] for each in names if each in ARCHITECTURES), None)
    known = known or (family if family in ARCHITECTURES.values() else None)
    notes = () if known else (f"{family or 'A config without model_type'} is counted as if it were a Llama.",)
    cleaned = {key: config[key] for key in _SIZES if key in config}
    checked = ModelConfig.from_dict({**cleaned, "model_type": known or "llama"})
    kv = checked.num_kv_heads * checked.head_dim
    q = checked.num_heads * checked.head_dim
    biases = (q + 2 * kv + checked.hidden_size) * bool(config.get("attention_bias"))
    biases += (2 * checked.intermediate_size + checked.hidden_size) * bool(config.get("mlp_bias"))
    return _from_config(checked, name, source, config, checked.num_layers * biases, notes)


def _from_config(
    config: "ModelConfig", name: str, source: str, fields: Mapping[str, Any], biases: int, notes: tuple[str, ...]
) -> Shape:
    sizes: dict[str, tuple[str, int]] = {
        "layers": ("num_hidden_layers", config.num_layers),
        "hidden": ("hidden_size", config.hidden_size),
        "heads": ("num_attention_heads", config.num_heads),
        "kv_heads": ("num_key_value_heads", config.num_kv_heads),
        "head_dim": ("head_dim", config.head_dim),
        "intermediate": ("intermediate_size", config.intermediate_size),
        "vocab": ("vocab_size", config.vocab_size),
    }
    given = {}
    for key, (place, value) in sizes.items():
        given[key] = f"{place} {value:,}" if not fields or place in fields else f"{place} {value:,} (by default)"
    bare = Shape(
        name, config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
        config.intermediate_size, config.vocab_size, config.tie_word_embeddings, small=0,
        longest=config.max_position_embeddings, window=config.sliding_window, given=given, source=source, notes=notes,
    )  # fmt: skip
    return replace(bare, small=config.num_parameters - bare.parameters + biases)


def _from_gpt2(config: Mapping[str, Any], name: str, source: str) -> Shape:
    layers, hidden, heads, vocab = (_whole(config, key) for key in ("n_layer", "n_embd", "n_head", "vocab_size"))
    positions = _whole(config, "n_positions", 1024)
    if hidden % heads:
        raise ModelError(f"n_embd={hidden} is not a multiple of n_head={heads}; a head's width must be whole.")
    inner = _whole(config, "n_inner", 4 * hidden)
    # a layer: two norms of weight and bias; biases of q, k, v, output and both matrices of the MLP
    small = layers * (4 * hidden + 4 * hidden + inner + hidden) + 2 * hidden
    given = {
        "layers": f"n_layer {layers:,}", "hidden": f"n_embd {hidden:,}", "heads": f"n_head {heads:,}",
        "kv_heads": f"n_head {heads:,} (each has its own K/V)", "head_dim": f"n_embd / n_head {hidden // heads:,}",
        "intermediate": f"4 x n_embd {inner:,}", "vocab": f"vocab_size {vocab:,}",
    }  # fmt: skip
    return Shape(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads,
        intermediate=inner, vocab=vocab, tied=True, small=small, gated=False, positions=positions, longest=positions,
        given=given, source=source,
    )  # fmt: skip


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json gives {key}={value!r}; it must be a whole number of at least 1.")
    return value


# -- bytes ----------------------------------------------------------------------------------------


def kv_bytes_per_token(shape: Shape, bits: int = 16) -> int:
    """Bytes that one token's keys and values take: 2 x layers x K/V heads x head_dim x bytes of a number."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bits // 8


def kv_bytes_by_hidden_size(shape: Shape, bits: int = 16) -> int:
    """The formula that is often quoted, 2 x layers x hidden_size x bytes: right only without grouped K/V heads."""
    return 2 * shape.layers * shape.hidden * bits // 8


def groups(shape: Shape, group_size: int = 64) -> int:
    """Scales of a quantised model: for each output of each matrix one for every `group_size` inputs; -1: one."""
    return shape.layers * sum(
        rows * (1 if group_size == -1 else -(-columns // group_size)) for rows, columns in shape.matrices
    )


def weight_parts(shape: Shape, weights: str = "bf16", group_size: int = 64, table_bits: int = 16) -> dict[str, int]:
    """{part: bytes}. int8 and int4 are stage 5's: the layers' matrices alone, everything else in 16 bits.

    A group of `group_size` inputs shares a scale of 16 bits and a zero point as wide as a code. table_bits=8: embedding
    and head in 8 bits too, with a 16-bit scale a row.
    """
    bits = WEIGHTS[weights]
    quantized = bits < 16
    parts = {"attention": shape.attention * bits // 8, "mlp": shape.mlp * bits // 8}
    parts["scales and zeros"] = groups(shape, group_size) * (16 + bits) // 8 if quantized else 0
    parts["embedding and head"] = sum(_table_bytes(shape, weights, table_bits))
    parts["norms and biases"] = shape.small * max(bits, 16) // 8
    return parts


def _table_bytes(shape: Shape, weights: str, table_bits: int) -> tuple[int, int]:
    """(bytes that only lookups read, bytes of the head, which every step reads)."""
    rows_bits = max(WEIGHTS[weights], 16)
    each = shape.hidden + 2 if WEIGHTS[weights] < 16 and table_bits == 8 else shape.hidden * rows_bits // 8
    looked_up = (0 if shape.tied else shape.vocab * each) + shape.positions * shape.hidden * rows_bits // 8
    return looked_up, shape.vocab * each


# -- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a step must at least do: bytes to and from memory, and floating-point operations."""

    weight_bytes: int
    kv_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def memory_s(self, gpu: GPU) -> float:
        """Seconds at the full bandwidth."""
        return self.bytes / (gpu.bandwidth_gb_s * 1e9)

    def compute_s(self, gpu: GPU) -> float:
        """Seconds at the peak rate of 16-bit products."""
        return self.flops / (gpu.tflops * 1e12)

    def seconds(self, gpu: GPU) -> float:
        """The longer of the two: no step can be faster."""
        return max(self.memory_s(gpu), self.compute_s(gpu))


def flops(shape: Shape, tokens: int, rows: int, pairs: int) -> int:
    """FLOP of a step: 2 a weight and token (the head for `rows` of them), 4 x heads x head_dim x layers a pair of
    query and key."""
    head = shape.hidden * shape.vocab
    attends = 4 * shape.heads * shape.head_dim * shape.layers * pairs
    return 2 * (shape.attention + shape.mlp) * tokens + 2 * head * rows + attends


# -- a question and its answer --------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What is asked. context: tokens of a sequence, its newest included. reserve_gb: kept for activations.

    Raises `InvalidSetting` for a value that cannot be.
    """

    shape: Shape
    gpu: GPU
    weights: str = "bf16"
    kv_bits: int = 16
    context: int = 4096
    batch: int = 1
    utilisation: float = 0.9
    group_size: int = 64
    table_bits: int = 16
    reserve_gb: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("weights", WEIGHTS), ("kv_bits", KV_BITS), ("table_bits", TABLE_BITS)):
            value = getattr(self, name)
            if not isinstance(value, str | int) or isinstance(value, bool) or value not in allowed:
                raise InvalidSetting(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}.")
        for name, most in (("context", 100_000_000), ("batch", 1_000_000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InvalidSetting(f"{name} is {value!r}; it must be a whole number from 1 to {most:,}.")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and not 8 <= size <= 1 << 20):
            raise InvalidSetting(
                f"group_size is {size!r}; it must be a whole number of at least 8, such as 32, 64 or 128, or -1 for "
                "one group a row."
            )
        if not _number(self.utilisation) or not 0 < self.utilisation <= 1:
            raise InvalidSetting(f"utilisation is {self.utilisation!r}; it must be above 0 and at most 1.")
        if not _number(self.reserve_gb) or not 0 <= self.reserve_gb <= 1e6:
            raise InvalidSetting(f"reserve_gb is {self.reserve_gb!r}; it must be a number of GB from 0 to 1,000,000.")


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Answer:
    """All numbers of one question. Bytes, and work of a decode step and of a prompt's prefill."""

    question: Question
    parts: dict[str, int]
    kv_token: int
    sequences: int  # of `context` tokens that fit; 0 where not even one does
    decode: Work
    prefill: Work

    @property
    def weight_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def kv_sequence(self) -> int:
        """Bytes of K/V of one sequence."""
        return self.kv_token * self.question.context

    @property
    def reserve(self) -> int:
        return round(self.question.reserve_gb * GB)

    @property
    def memory(self) -> int:
        return round(self.question.gpu.memory_gb * GB)

    @property
    def usable(self) -> int:
        """Bytes of the GPU that may be used."""
        return math.floor(self.memory * self.question.utilisation)

    @property
    def room(self) -> int:
        """Bytes that weights and reserve leave for K/V; below 0 where they do not fit."""
        return self.usable - self.weight_bytes - self.reserve

    @property
    def needed(self) -> int:
        """Bytes of weights, reserve and one sequence."""
        return self.weight_bytes + self.reserve + self.kv_sequence

    @property
    def bar(self) -> list[tuple[str, int]]:
        """(part, bytes) of the GPU's memory; of what is needed where it does not fit."""
        if not self.sequences:
            return [("weights", self.weight_bytes), ("reserve", self.reserve), ("K/V", self.kv_sequence)]
        kv = self.sequences * self.kv_sequence
        return [
            ("weights", self.weight_bytes),
            ("reserve", self.reserve),
            ("K/V", kv),
            ("left", self.memory - self.weight_bytes - self.reserve - kv),
        ]


def answer(question: Question) -> Answer:
    """Compute everything. A step moves each weight once and the K/V of every token once (read, or newly written)."""
    q, shape = question, question.shape
    parts = weight_parts(shape, q.weights, q.group_size, q.table_bits)
    token = kv_bytes_per_token(shape, q.kv_bits)
    moved = sum(parts.values()) - _table_bytes(shape, q.weights, q.table_bits)[0]  # looked up, a row a token
    n = q.context
    decode = Work(moved, q.batch * n * token, flops(shape, q.batch, q.batch, q.batch * n))
    prefill = Work(moved, n * token, flops(shape, n, 1, n * (n + 1) // 2))
    bare = Answer(q, parts, token, 0, decode, prefill)
    return Answer(q, parts, token, max(0, bare.room // bare.kv_sequence), decode, prefill)


def gpu_of(gpu: GPU | str) -> GPU:
    """The GPU of that name ("H100" finds "H100 (SXM)"), or the one given. Raises `InvalidSetting`."""
    if isinstance(gpu, GPU):
        return gpu
    text = str(gpu).strip().lower()
    exact = [each for name, each in GPUS.items() if name.lower() == text]
    begins = exact or [each for name, each in GPUS.items() if text and name.lower().startswith(text)]
    if len(begins) != 1:
        which = "fits several" if begins else "is not in the table"
        raise InvalidSetting(
            f"gpu is {gpu!r}, which {which}; it must be one of {', '.join(GPUS)}, or a GPU of your own."
        )
    return begins[0]
