"""Logits of random models of all families against `transformers` with eager attention in fp32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from stepengine.model.decoder import Decoder
from stepengine.model.loader import load_decoder
from stepengine.model.tiny import FAMILIES, random_checkpoint, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}

# (heads, K/V heads, head_dim, hidden, intermediate, vocabulary, tied, RoPE)
SHAPES = {
    "one head": (1, 1, 16, 40, 56, 101, False, None),
    "eight queries per K/V head": (8, 1, 24, 64, 90, 211, True, None),
    "odd heads, wider than hidden": (9, 3, 32, 108, 130, 257, False, LLAMA3),
    "narrower than hidden": (2, 2, 48, 130, 70, 499, True, LINEAR),
    "head_dim 80": (6, 2, 80, 96, 200, 307, False, LINEAR),
    "head_dim 128": (4, 1, 128, 96, 110, 503, True, LLAMA3),
}


def prompts(vocab: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_transformers(family, shape, tmp_path, logits_of):
    heads, kv_heads, head_dim, hidden, intermediate, vocab, tied, rope = shape
    config = tiny_config(
        family,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    if rope:
        del config["rope_theta"]
        config["rope_parameters"] = rope
    random_checkpoint(config, tmp_path, seed=heads)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    decoder = load_decoder(tmp_path, "cpu", torch.float32, 200)
    sequences = prompts(vocab, (1, 70, 9, 33))
    with torch.inference_mode():
        expected = torch.cat([reference(torch.tensor([s])).logits[0] for s in sequences])
        one_by_one = torch.cat([logits_of(decoder, [s]) for s in sequences])
    assert expected.std() > 0.1  # a model whose logits are all alike would prove nothing
    torch.testing.assert_close(logits_of(decoder, sequences), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_strays_from_fp32_no_further_than_transformers_does(family, tmp_path, logits_of):
    random_checkpoint(tiny_config(family), tmp_path)
    sequences = prompts(499, (60,))
    ids = torch.tensor(sequences)
    with torch.inference_mode():
        models = {
            dtype: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
            for dtype in (torch.float32, torch.bfloat16)
        }
        exact = models[torch.float32](ids).logits[0]
        theirs = (models[torch.bfloat16](ids).logits[0].float() - exact).std()
    ours = (logits_of(load_decoder(tmp_path, "cpu", torch.bfloat16, 64), sequences).float() - exact).std()
    assert ours < 1.3 * theirs


def test_a_tied_head_is_the_embedding_itself(tmp_path):
    random_checkpoint(tiny_config("llama", tie_word_embeddings=True), tmp_path)
    decoder = load_decoder(tmp_path, "cpu", torch.float32, 8)
    assert decoder.head.weight.data_ptr() == decoder.embed.weight.data_ptr()
    assert sum(p.numel() for p in decoder.parameters()) == decoder.config.num_parameters


def test_every_matrix_product_goes_through_a_linear_module(tmp_path, logits_of):
    # A later stage swaps these modules; a product that bypassed them would keep the old weights.
    random_checkpoint(tiny_config("llama"), tmp_path)
    decoder = load_decoder(tmp_path, "cpu", torch.float32, 8)
    called = []
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    logits_of(decoder, [[1, 2, 3]])
    layers = [f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "o", "gate_up", "down")]
    assert called == [*layers, "head"]


def test_max_len_defaults_to_the_models_own(tmp_path):
    random_checkpoint(tiny_config("llama", max_position_embeddings=77), tmp_path)
    assert load_decoder(tmp_path, "cpu", torch.float32).cos.shape == (77, 16)
    assert Decoder(load_decoder(tmp_path, "cpu", torch.float32).config, "cpu", torch.bfloat16, 5).sin.shape == (5, 16)
