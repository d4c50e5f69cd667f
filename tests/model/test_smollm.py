"""The default model: its conversion from GGUF, its tokenizer, its logits."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from stepengine.errors import DownloadError
from stepengine.model.catalog import DEFAULT_MODEL, resolve
from stepengine.model.config import ModelConfig
from stepengine.model.loader import load_decoder
from stepengine.model.smollm import convert_gguf

TEXTS = [
    "Hello world, it's 2024!",
    "你好,世界。今天天气怎么样?",
    "def f(x):\n    return x**2 + 10\n\n\tpass",
    "  a   b \n\n c\t ",
    "naïve café 😀🇫🇷",
    "",
]


def write_gguf(path):
    """A two-layer Llama in Q4_1 and Q8_0 with a byte-level tokenizer of a few merges, written by the gguf library."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "Ġ w", "1 2", "o r"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = control + letters + [merge.replace(" ", "") for merge in merges]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    kinds = gguf.GGMLQuantizationType
    widths = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    widths |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    matrices = {f"blk.{i}.{part}.weight": (shape, kinds.Q4_1) for i in range(2) for part, shape in widths.items()}
    matrices["token_embd.weight"] = ((len(tokens), 64), kinds.Q8_0)
    for name, (shape, kind) in matrices.items():
        values = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in [f"blk.{i}.{part}.weight" for i in range(2) for part in ("attn_norm", "ffn_norm")] + [
        "output_norm.weight"
    ]:
        writer.add_tensor(name, random.standard_normal(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_equals_that_of_transformers(tmp_path):
    source, folder = tmp_path / "model.gguf", tmp_path / "converted"
    folder.mkdir()
    write_gguf(source)
    convert_gguf(source, folder)
    config = ModelConfig.from_folder(folder)
    assert (config.eos_token_ids, config.bos_token_id, config.tie_word_embeddings) == ((2,), 1, True)
    shell = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    reference = load_gguf_checkpoint(source, return_tensors=True, model_to_load=shell)["tensors"]
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(ours[name], torch.as_tensor(tensor).to(torch.bfloat16)), name
    load_decoder(folder, "cpu", torch.float32, 16)

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [*TEXTS, "hello world 1212", "<|im_start|>hello<|im_end|>"]:
        ids = tokenizer.encode(text)
        if not any(letter.isdigit() for letter in text):  # transformers' conversion does not split digits
            assert ids == theirs.encode(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("1212")) == 4  # although "12" is a token: each digit stands by itself


@pytest.fixture(scope="module")
def default_model():
    try:
        return resolve(DEFAULT_MODEL)
    except DownloadError as error:
        pytest.skip(str(error))


def test_the_default_models_tokenizer(default_model):
    tokenizer = AutoTokenizer.from_pretrained(default_model, local_files_only=True)
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("<|im_end|>") == [2] == [tokenizer.eos_token_id]
    assert ModelConfig.from_folder(default_model).eos_token_ids == (2,)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("12345")) == 5  # each digit by itself
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_default_models_logits_equal_transformers(default_model, logits_of):
    tokenizer = AutoTokenizer.from_pretrained(default_model, local_files_only=True)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = tokenizer.encode("The capital of France is Paris.<|im_end|>")
    reference = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + answer])).logits[0]
    del reference
    ours = logits_of(load_decoder(default_model, "cpu", torch.float32, 128), [prompt + answer])
    # Logits reach 40 here: 1e-4 of fp32 arithmetic over 30 layers is a few units in the last place.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    assert ours[len(prompt) - 1 : -1].argmax(-1).tolist() == answer  # greedy decoding gives this answer
