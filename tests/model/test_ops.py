"""Each operation against the line of `transformers` that it stands for."""

import pytest
import torch
from transformers.models.llama import modeling_llama as theirs
from transformers.models.llama.configuration_llama import LlamaConfig

from stepengine.model import ops
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import tiny_config

# One bfloat16 rounding is 2**-8 of the value; a different order of roundings may cost two.
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm(dtype, rows):
    torch.manual_seed(0)
    x, residual = torch.randn(rows, 96).mul(50).to(dtype), torch.randn(rows, 96).to(dtype)
    norm = theirs.LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.normal_(1, 0.3)
    with torch.inference_mode():
        torch.testing.assert_close(ops.rms_norm(x, norm.weight, 1e-5), norm(x), **TOLERANCE[dtype])
        expected = x + residual
        normed, total = ops.add_rms_norm(x, residual.clone(), norm.weight, 1e-5)
        torch.testing.assert_close(total, expected, rtol=0, atol=0)
        torch.testing.assert_close(normed, norm(expected), **TOLERANCE[dtype])


def test_rms_norm_of_a_vanishing_row_is_held_by_eps():
    x, weight = torch.full((1, 32), 1e-6), torch.ones(32)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), x * (1e-12 + 1e-5) ** -0.5)


@DTYPES
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_rope(dtype, rope, head_dim):
    torch.manual_seed(0)
    given = tiny_config("llama", head_dim=head_dim, rope_parameters=rope)
    q, k = torch.randn(6, 4, head_dim).to(dtype), torch.randn(6, 2, head_dim).to(dtype)
    positions = torch.tensor([0, 1, 2, 77, 1023, 500])
    embedding = theirs.LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in given.items() if k != "rope_theta"}))
    cos, sin = embedding(q, positions[None])
    expected = theirs.apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    tables = ops.rope_tables(ModelConfig.from_dict(given), 1024, "cpu")
    rows = [table[positions].to(dtype) for table in tables]
    for ours, reference in zip(ops.apply_rope(q, k, *rows), expected, strict=True):
        torch.testing.assert_close(ours, reference[0], rtol=TOLERANCE[dtype]["rtol"], atol=TOLERANCE[dtype]["atol"] * 4)


@DTYPES
def test_silu_mul(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
    mlp = theirs.LlamaMLP(config).to(dtype)
    gate, up = torch.randn(5, 40).to(dtype), torch.randn(5, 40).to(dtype)
    expected = mlp.act_fn(gate) * up
    torch.testing.assert_close(ops.silu_mul(torch.cat((gate, up), -1)), expected, **TOLERANCE[dtype])
