"""The stage as a whole: its tokens, its settings, and the folders that it loads and keeps."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepengine import LLM, SamplingParams
from stepengine.errors import InvalidSetting, ModelError
from stepengine.model.loader import checkpoint_tensors, load_decoder
from stepengine.model.tiny import random_checkpoint, tiny_config
from stepengine.stage5_gptq import calibrate
from stepengine.stage5_gptq import engine as stage5
from stepengine.stage5_gptq.calibrate import Recipe
from stepengine.stage5_gptq.checkpoint import QuantizedCheckpoint
from stepengine.stage5_gptq.grid import Grid, QuantizedWeight, round_to_nearest
from stepengine.stage5_gptq.linear import CpuInt4Linear, SplitLinear, TwinLinear
from stepengine.stage5_gptq.loader import load_quantized, quantize_folder, quantized_folder
from stepengine.stage5_gptq.packing import pack_weight

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], list(range(40, 77)), [100, 3], list(range(40, 73)) + [9]]
SMALL = {"max_num_seqs": 3, "max_model_len": 96}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPENGINE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def folder(request, tmp_path_factory):
    return random_checkpoint(tiny_config(request.param), tmp_path_factory.mktemp(request.param), seed=5)


def dense_twin(folder, out):
    """An unquantised checkpoint that holds what the codes of `folder` stand for."""
    quantized = QuantizedCheckpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    random_checkpoint(config, out)
    tensors = {f"{name}.weight": quantized.read(name).dequantized() for name in quantized.names}
    tensors |= dict(quantized.rest())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("settings", [{"bits": 4, "group_size": 32}, {"bits": 3, "group_size": -1}, {"bits": 8}])
def test_the_twins_tokens_are_those_of_the_engine_on_the_dequantised_weights(folder, tmp_path, settings):
    """fp32, and every way of running: chunks, prefixes, a tight pool, padded and pipelined steps."""
    grid = Grid(settings["bits"], settings.get("group_size", 64), clip=True)
    made = quantize_folder(
        folder, tmp_path / "q", Recipe(grid, samples=4, length=64), short_groups=True, progress=False
    )
    dense = dense_twin(made, tmp_path / "dense")
    wanted = tokens_of(LLM(dense, stage=0, **SMALL))
    ways = [{}, {"max_num_batched_tokens": 8}, {"num_blocks": 7}, {"cuda_graphs": "padded", "pipelined": True}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage5, "PARTS", replace(stage5.PARTS, prepare_model=partial(load_quantized, twin=True)))
        for way in ways:
            llm = LLM(made, stage=5, **{**SMALL, **way})
            assert isinstance(llm.engine.runner.model.layers[0].qkv, TwinLinear)
            assert tokens_of(llm) == wanted, way


def test_the_packed_layers_logits_are_near(folder, tmp_path):
    grid = Grid(4, 32)
    made = quantize_folder(folder, tmp_path / "q", Recipe(grid, samples=4, length=64), progress=False)
    llm = LLM(made, stage=5, **SMALL)
    assert isinstance(llm.engine.runner.model.layers[0].qkv, CpuInt4Linear)
    exact = LLM(dense_twin(made, tmp_path / "dense"), stage=4, **SMALL)
    ids = list(range(3, 80))
    ours, wanted = llm.logits(ids), exact.logits(ids)
    assert float((ours - wanted).norm() / wanted.norm()) < 0.02


def test_quantised_once_and_kept(folder, capfd):
    first = LLM(folder, stage=5, **SMALL)
    assert "quantising to 4 bits, groups of 64" in capfd.readouterr().err
    again = LLM(folder, stage=5, **SMALL)
    assert capfd.readouterr().err == ""
    assert tokens_of(first) == tokens_of(again)
    LLM(folder, stage=5, bits=8, quantization="rtn", **SMALL)
    assert "quantising to 8 bits, groups of 64 (round to nearest)" in capfd.readouterr().err


def test_what_is_kept_is_written_without_doing_it_again(folder, tmp_path, monkeypatch):
    recipe = Recipe(Grid(4, 32, clip=True), samples=2, length=32)
    kept = quantized_folder(folder, recipe)
    monkeypatch.setattr(calibrate, "quantize", lambda *args: 1 / 0)
    made = quantize_folder(folder, tmp_path / "q", recipe)
    first, second = QuantizedCheckpoint(kept), QuantizedCheckpoint(made)
    assert all(torch.equal(first.read(name).codes, second.read(name).codes) for name in first.names)
    with pytest.raises(ZeroDivisionError):
        quantize_folder(folder, tmp_path / "other", Recipe(Grid(4, 32, clip=True), samples=3, length=32))


def test_a_changed_checkpoint_is_quantised_anew(tmp_path, capfd):
    made = random_checkpoint(tiny_config("llama"), tmp_path / "model", seed=1)
    LLM(made, stage=5, **SMALL)
    random_checkpoint(tiny_config("llama"), tmp_path / "model", seed=2)
    capfd.readouterr()
    llm = LLM(made, stage=5, bits=None, **SMALL)
    assert "quantising" in capfd.readouterr().err
    near = load_decoder(made, "cpu", torch.float32, 8).layers[0].input_norm
    assert torch.equal(llm.engine.runner.model.layers[0].input_norm, near)


def test_int8_head_halves_the_tables(tmp_path, capfd):
    for tied in (True, False):
        config = tiny_config("llama", tie_word_embeddings=tied)
        made = random_checkpoint(config, tmp_path / f"tied-{tied}", seed=1)
        plain, small = (LLM(made, stage=5, int8_head=on, trace=True, **SMALL) for on in (None, True))
        saved = plain.trace.meta["weight_bytes"] - small.trace.meta["weight_bytes"]
        assert saved == (1 if tied else 2) * (499 * 64 * (4 - 1) - 499 * 2)
        ids = list(range(3, 60))
        assert float((plain.logits(ids) - small.logits(ids)).norm() / plain.logits(ids).norm()) < 0.03
        assert len(tokens_of(small)[0]) == 12


def test_a_file_whose_columns_differ_between_q_k_and_v_stays_unjoined(tmp_path):
    """As files are whose activation order was each matrix's own."""
    source = random_checkpoint(tiny_config("llama"), tmp_path / "model", seed=1)
    made = quantize_folder(source, tmp_path / "q", Recipe(Grid(4, 32), None), progress=False)
    weights = checkpoint_tensors(load_decoder(source, "cpu", torch.float32, 8))
    tensors = load_file(made / "model.safetensors")
    for number, name in enumerate(QuantizedCheckpoint(made).names):
        order = torch.randperm(weights[f"{name}.weight"].shape[1], generator=torch.Generator().manual_seed(number))
        found = round_to_nearest(weights[f"{name}.weight"][:, order], Grid(4, 32))
        back = order.argsort()
        shuffled = QuantizedWeight(found.codes[:, back], found.scales, found.zeros, found.groups[back], 4)
        tensors |= {f"{name}.{key}": tensor for key, tensor in pack_weight(shuffled, 2).items()}
    save_file(tensors, made / "model.safetensors")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (made / "config.json").write_text(json.dumps(config))
    llm = LLM(made, stage=5, **SMALL)
    assert isinstance(llm.engine.runner.model.layers[0].qkv, SplitLinear)
    exact = LLM(dense_twin(made, tmp_path / "dense"), stage=4, **SMALL)
    ids = list(range(3, 80))
    assert float((llm.logits(ids) - exact.logits(ids)).norm() / exact.logits(ids).norm()) < 0.02


def test_settings_are_refused_before_anything_is_done(folder, tmp_path):
    made = quantize_folder(folder, tmp_path / "q", Recipe(Grid(4, 32), None), progress=False)
    with pytest.raises(InvalidSetting, match="bits is 8, but .* is quantised with 4 already"):
        LLM(made, stage=5, bits=8)
    with pytest.raises(InvalidSetting, match="group_size is 64, but .* is quantised with 32 already"):
        LLM(made, stage=5, group_size=64)
    with pytest.raises(InvalidSetting, match="quantization is 'rtn', but"):
        LLM(made, stage=5, quantization="rtn")
    with pytest.raises(ModelError, match="stage 5 brings quantised weights"):
        LLM(made, stage=4)
    with pytest.raises(InvalidSetting, match="bits is 4, but stage 4 does not have it: .* use stage 5"):
        LLM(folder, stage=4, bits=4)
    for name, value in (("bits", 5), ("group_size", 3), ("quantization", "awq"), ("int8_head", "yes")):
        with pytest.raises(InvalidSetting, match=f"{name} is "):
            LLM(folder, stage=5, **{name: value})
    with pytest.raises(InvalidSetting, match="groups of 64 do not divide"):
        quantize_folder(folder, tmp_path / "other", Recipe(Grid(4, 64)))
    assert not (tmp_path / "other").exists()


def test_an_interrupted_command_goes_on(folder, tmp_path, monkeypatch):
    recipe, work = Recipe(Grid(4, 32), samples=4, length=32), tmp_path / ".q.partial"
    whole = quantize_folder(folder, tmp_path / "whole", recipe, progress=False)
    real, calls = calibrate.quantize, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibrate, "quantize", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "q", recipe, work, progress=False)
    assert not (tmp_path / "q").exists() and (work / "layer-0.safetensors").is_file()
    quantize_folder(folder, tmp_path / "q", recipe, work, progress=False)
    assert len(calls) == 6 + 4 and not work.exists()  # only the second layer again
    first, second = QuantizedCheckpoint(whole), QuantizedCheckpoint(tmp_path / "q")
    assert all(torch.equal(first.read(name).codes, second.read(name).codes) for name in first.names)


def test_the_command_writes_a_folder(folder, tmp_path, capsys):
    from stepengine.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(folder), "--out", str(tmp_path / "q"), "--group-size", "32", "--samples", "2"])
    assert ended.value.code == 0
    assert "4 bits" in capsys.readouterr().out
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert len(tokens_of(LLM(tmp_path / "q", stage=5, **SMALL))[0]) == 12
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(folder), "--out", str(tmp_path / "q"), "--group-size", "32"])
    assert ended.value.code == 2 and "exists and is not an empty folder" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(folder, tmp_path, capsys):
    from stepengine.cli import main

    good = ["quantize", str(folder), "--out", str(tmp_path / "q"), "--group-size", "32"]
    for more, said in (
        (["--text", str(tmp_path)], "has no tokenizer to read it with; leave it out"),
        (["--device", "tpu"], "device is 'tpu'; it must be 'cpu' or 'cuda'"),
        (["--damping", "7"], "damping is 7.0; it must be above 0"),
        (["--samples", "0"], "samples is 0; it must be a whole number from 1"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*good, *more])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_commands_damping_is_the_quantisers():
    from stepengine import cli
    from stepengine.stage5_gptq.gptq import Method

    assert cli.DAMPING == Method().damping
