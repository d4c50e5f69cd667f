"""`config.json` in its old and new forms, and what is refused by name."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stepengine.errors import ModelError
from stepengine.model.config import ModelConfig, RopeConfig, check_run_length, require_unquantized
from stepengine.model.tiny import FAMILIES, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("old", "new", "rope"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}, RopeConfig(5e5)),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            RopeConfig(1e4, "linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_theta": 5e5, **LLAMA3},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_old_and_new_forms_of_rope_read_the_same(old, new, rope):
    base = tiny_config("llama")
    del base["rope_theta"]
    assert ModelConfig.from_dict(base | old).rope == rope
    assert ModelConfig.from_dict(base | {"rope_parameters": new}).rope == rope


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": [], "model_type": "gemma"}, "gemma"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"num_local_experts": 4}, "num_local_experts=4"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_would_run_wrongly_is_refused_by_name(change, words):
    with pytest.raises(ModelError) as refusal:
        ModelConfig.from_dict(tiny_config("llama") | change)
    assert words in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_eos_ids_of_both_files_are_merged():
    config = tiny_config("llama", eos_token_id=2)
    assert ModelConfig.from_dict(config).eos_token_ids == (2,)
    assert ModelConfig.from_dict(config, {"eos_token_id": [7, 2, 9]}).eos_token_ids == (2, 7, 9)
    assert ModelConfig.from_dict(config | {"eos_token_id": [4, 5]}, {"eos_token_id": 5}).eos_token_ids == (4, 5)
    assert ModelConfig.from_dict(config | {"eos_token_id": None}, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # (layers, heads, K/V heads, head_dim) of published models
        ((30, 9, 3, 64), 23_040),  # SmolLM2-135M
        ((28, 16, 8, 128), 114_688),  # Qwen3-0.6B
        ((32, 32, 8, 128), 131_072),  # Llama-3-8B
    ],
)
def test_kv_bytes_per_token(shape, expected):
    layers, heads, kv_heads, head_dim = shape
    config = ModelConfig.from_dict(
        tiny_config(
            "llama",
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
        )
    )
    assert config.kv_bytes_per_token(torch.bfloat16) == expected
    assert config.kv_bytes_per_token("float32") == 2 * expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters_and_defaults_are_those_of_transformers(family, tied, tmp_path):
    config = tiny_config(family, tie_word_embeddings=tied)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = ModelConfig.from_folder(tmp_path)
    assert ours.num_parameters == sum(p.numel() for p in theirs.parameters())
    for key in ("head_dim", "max_position_embeddings", "rms_norm_eps", "num_key_value_heads"):
        bare = {k: v for k, v in config.items() if k != key} | {"num_attention_heads": 32, "hidden_size": 512}
        (tmp_path / "config.json").write_text(json.dumps(bare))
        reference = AutoConfig.from_pretrained(tmp_path)
        expected = getattr(reference, key, None) or reference.hidden_size // reference.num_attention_heads
        ours = ModelConfig.from_dict(bare)
        assert getattr(ours, {"num_key_value_heads": "num_kv_heads"}.get(key, key)) == expected


@pytest.mark.parametrize(
    ("family", "change", "window"),
    [
        ("llama", {"sliding_window": 64}, None),
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 64),
        ("qwen3", {"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]}, None),
    ],
)
def test_a_sliding_window_counts_only_where_it_is_in_use(family, change, window):
    config = ModelConfig.from_dict(tiny_config(family, **change))
    assert config.sliding_window == window
    check_run_length(config, 64)
    if window is None:
        check_run_length(config, 4096)
    else:
        with pytest.raises(ModelError, match="max_model_len=65 .* 64 tokens"):
            check_run_length(config, 65)


def test_a_quantised_checkpoint_is_read_but_not_run():
    config = ModelConfig.from_dict(tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4}))
    assert config.quantization == {"quant_method": "gptq", "bits": 4}
    assert hash(config) == hash(ModelConfig.from_dict(tiny_config("llama")))
    with pytest.raises(ModelError, match="gptq.*stage 5"):
        require_unquantized(config)
    require_unquantized(ModelConfig.from_dict(tiny_config("llama")))


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        ModelConfig.from_folder(tmp_path)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ModelError, match="float64"):
        ModelConfig.from_dict(tiny_config("llama")).kv_bytes_per_token("float64")
