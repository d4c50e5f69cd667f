"""Checkpoints: whole, in shards, incomplete, wrong; and what loading costs in memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stepengine.errors import ModelError
from stepengine.model.loader import load_decoder
from stepengine.model.tiny import random_checkpoint, tiny_config


@pytest.fixture
def checkpoint(tmp_path):
    return random_checkpoint(tiny_config("qwen2"), tmp_path / "checkpoint")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder):
    return load_decoder(folder, "cpu", torch.float32, 16)


def test_a_sharded_checkpoint_loads_the_same_weights(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = load(checkpoint).state_dict(), load(tmp_path / "shards").state_dict()
    assert whole.keys() == shards.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, shards[name]), name
    (
        tmp_path
        / "shards"
        / "model-00002-of-{:05d}.safetensors".format(len(list((tmp_path / "shards").glob("model-*"))))
    ).unlink()
    with pytest.raises(ModelError, match="lacks 1 of .* shards .*model-00002"):
        load(tmp_path / "shards")


def test_weights_are_converted_to_the_dtype_asked_for(checkpoint):
    exact, rounded = load(checkpoint), load_decoder(checkpoint, "cpu", torch.bfloat16, 16)
    for name, tensor in rounded.named_parameters():
        assert torch.equal(tensor, exact.get_parameter(name).bfloat16()), name


def test_a_missing_tensor_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(ModelError, match=r"lacks 1 of .*model\.layers\.1\.self_attn\.k_proj\.bias"):
        load(checkpoint)


def test_a_surplus_tensor_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}))
    with pytest.raises(ModelError, match=r"holds 1 tensors .*self_attn\.o_proj\.bias"):
        load(checkpoint)


def test_a_tensor_of_the_wrong_shape_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(159, 64)}))
    with pytest.raises(ModelError, match=r"up_proj\.weight .*\[159, 64\].*\[160, 64\]"):
        load(checkpoint)


def test_rotary_buffers_and_a_copy_of_a_tied_head_are_ignored(tmp_path):
    folder = random_checkpoint(tiny_config("llama", tie_word_embeddings=True), tmp_path)
    before = load(folder).state_dict()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.ones(499, 64)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("keep", [5, 3000])
def test_a_truncated_file_is_refused(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(checkpoint)


def test_pickled_weights_are_never_loaded(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model\.bin\).*safetensors"):
        load(checkpoint)


def test_a_quantised_checkpoint_is_refused(tmp_path):
    folder = random_checkpoint(tiny_config("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gptq.*stage 5"):
        load(folder)


MEASURE = r"""
import re, sys, torch
from pathlib import Path
from stepengine.model.loader import load_decoder
from stepengine.model.tiny import random_checkpoint, tiny_config

def peak():  # bytes; ru_maxrss would start at the peak of the parent process
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

small, large = sys.argv[1:]
load_decoder(small, "cpu", torch.float32, 16)  # whatever the first load imports
before = peak()
decoder = load_decoder(large, "cpu", torch.float32, 16)
after = peak()
print((after - before) / (4 * decoder.config.num_parameters))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_of_loading_is_at_most_a_fifth_above_the_weights(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4001, "head_dim": 64}
    small = random_checkpoint(tiny_config("llama"), tmp_path / "small")
    large = random_checkpoint(tiny_config("llama", **shape), tmp_path / "large")
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.8 < peak <= 1.2  # in units of the weights; well below 1 the measurement itself would be broken
