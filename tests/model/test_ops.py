"""Each operation against the line of `transformers` that it stands for."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama as theirs
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

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
def test_norm_rotate(dtype):
    """As Qwen3's attention does it: each head normalised by its own kind's weight, then rotated."""
    torch.manual_seed(0)
    qk = torch.randn(5, 6, 32).mul(3).to(dtype)
    norms = [Qwen3RMSNorm(32, eps=1e-6).to(dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_(1, 0.3)
    angles = torch.arange(5)[:, None] * torch.rand(16).repeat(2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    with torch.inference_mode():
        heads = norms[0](qk[None, :, :4]), norms[1](qk[None, :, 4:])
        expected = theirs.apply_rotary_pos_emb(*heads, cos[None], sin[None], unsqueeze_dim=2)
        negated = torch.cat((-sin[:, :16], sin[:, 16:]), -1)  # as `rope_tables` lays it out
        found = ops.norm_rotate(qk, 4, norms[0].weight, norms[1].weight, 1e-6, cos, negated)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference[0], rtol=TOLERANCE[dtype]["rtol"], atol=TOLERANCE[dtype]["atol"] * 4)


@DTYPES
def test_silu_mul(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
    mlp = theirs.LlamaMLP(config).to(dtype)
    gate, up = torch.randn(5, 40).to(dtype), torch.randn(5, 40).to(dtype)
    expected = mlp.act_fn(gate) * up
    torch.testing.assert_close(ops.silu_mul(torch.cat((gate, up), -1)), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("rms_norm", [(2, 8), (8,), 1e-5]),
        ("add_rms_norm", [(2, 8), (2, 8), (8,), 1e-5]),
        ("rotate", [(2, 3, 8), (2, 8), (2, 8)]),
        ("norm_rotate", [(2, 3, 8), 2, (8,), (8,), 1e-5, (2, 8), (2, 8)]),
        ("silu_mul", [(2, 8)]),
    ],
)
def test_a_gpus_tensors_go_to_the_kernel_of_the_same_name(name, shapes):
    """With tensors that say they are on a GPU and hold nothing; those of a CPU need no Triton."""

    def made(device):
        return [torch.empty(shape, device=device) if isinstance(shape, tuple) else shape for shape in shapes]

    with mock.patch.object(ops, "_kernels", lambda: SimpleNamespace(**{name: lambda *args: args})), FakeTensorMode():
        args = made("cuda")
        assert all(got is given for got, given in zip(getattr(ops, name)(*args), args, strict=True))
    with mock.patch.object(ops, "_kernels", side_effect=AssertionError("asked for a kernel")):
        getattr(ops, name)(*made("cpu"))
