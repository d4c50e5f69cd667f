"""The calculator's arithmetic, held to loaded models, written checkpoints, the engine's records, published counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from stepengine import LLM, SamplingParams
from stepengine.bench import gptq
from stepengine.bench.gpu_engine import floor_s
from stepengine.calculator import (
    GB,
    GPT3,
    GPU,
    GPUS,
    MODELS,
    PUBLIC,
    Question,
    answer,
    flops,
    gpu_of,
    kv_bytes_by_hidden_size,
    kv_bytes_per_token,
    shape_of,
    weight_parts,
)
from stepengine.errors import InvalidSetting, ModelError
from stepengine.model.catalog import resolve
from stepengine.model.config import ModelConfig
from stepengine.model.loader import load_decoder
from stepengine.model.tiny import FAMILIES, random_checkpoint, tiny_config
from stepengine.stage5_gptq.loader import quantize_folder, recipe_of
from stepengine.viz.calculator import Calculator

BARE = GPU("bare", 1, 1e-9, 1e-12, ("made up",) * 3)  # one byte and one FLOP a second


def ask(model: Any, gpu: str | GPU = "H100", **settings: Any) -> Any:
    return answer(Question(shape_of(model), gpu_of(gpu), **settings))


# -- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2-135m", "tiny-random"])
def test_the_count_is_that_of_the_loaded_model(name: str) -> None:
    folder = resolve(name)
    decoder = load_decoder(folder, "cpu", torch.bfloat16, 8)
    count = sum(weights.numel() for weights in decoder.parameters())
    for model in (name, folder, ModelConfig.from_folder(folder)):
        assert shape_of(model).parameters == count


def test_the_table_s_smollm2_is_the_one_in_the_catalogue() -> None:
    table, real = shape_of("SmolLM2-135M"), shape_of("smollm2-135m")
    assert table.matrices == real.matrices and table.parameters == real.parameters and table.tied and real.tied


@pytest.mark.parametrize(
    ("name", "count"),
    [  # as the models' cards on the hub count them
        ("SmolLM2-135M", 134_515_008),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Mistral-7B-v0.1", 7_241_732_096),
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-2-13B", 13_015_864_320),
        ("Llama-2-70B", 68_976_648_192),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
    ],
)
def test_published_counts(name: str, count: int) -> None:
    assert shape_of(name).parameters == count
    assert shape_of(PUBLIC[name][0]).parameters == count  # by its id on the hub


def test_gpt3_has_the_paper_s_175_billion() -> None:
    assert shape_of("gpt-3 175b").parameters == pytest.approx(175e9, rel=3e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_transformers(family: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = tiny_config(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert shape_of(fields).parameters == sum(p.numel() for p in theirs.parameters())


def test_biases_and_gpt2_are_counted_as_in_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    fields = tiny_config("llama", attention_bias=True, mlp_bias=True)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**fields))
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=101, n_positions=17))
    assert shape_of(fields).parameters == sum(p.numel() for p in llama.parameters())
    small = GPT3 | {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 101, "n_positions": 17}
    assert shape_of(small).parameters == sum(p.numel() for p in gpt2.parameters())


# -- bytes ----------------------------------------------------------------------------------------


def test_kv_bytes_are_what_the_engine_records(checkpoint: Callable[..., Path]) -> None:
    for family in FAMILIES:
        llm = LLM(checkpoint(family), stage="2", max_model_len=32, max_num_seqs=2, trace=True)
        assert llm.trace is not None
        assert kv_bytes_per_token(shape_of(llm.config), 32) == llm.trace.meta["kv_bytes_per_token"]


def test_the_worked_example_of_kv_bytes() -> None:
    """E2, and E13's bytes a token."""
    wanted = {
        "smollm2-135m": 23_040,
        "Qwen3-0.6B": 114_688,
        "Llama-2-7B": 524_288,
        "Llama-2-13B": 819_200,
        "Llama-2-70B": 327_680,
        "Llama-3-8B": 131_072,
        "GPT-3 175B": 4_718_592,
    }
    assert {name: kv_bytes_per_token(shape_of(name)) for name in wanted} == wanted
    llama = shape_of("Llama-3-8B")
    assert [kv_bytes_per_token(llama, bits) for bits in (32, 8)] == [262_144, 65_536]


def test_hidden_size_in_the_formula() -> None:
    """C1: four times too big on Llama-3-8B, right by chance on Qwen3-0.6B, right without grouped heads."""
    ratios = {}
    for name in ("Llama-3-8B", "Qwen3-0.6B", "Llama-2-7B", "smollm2-135m"):
        shape = shape_of(name)
        ratios[name] = kv_bytes_by_hidden_size(shape) / kv_bytes_per_token(shape)
    assert ratios == {"Llama-3-8B": 4, "Qwen3-0.6B": 1, "Llama-2-7B": 1, "smollm2-135m": 3}


@pytest.mark.parametrize(
    ("name", "nominal"), [("Llama-2-7B", 7e9), ("Llama-2-13B", 13e9), ("Llama-2-70B", 70e9), ("GPT-3 175B", 175e9)]
)
def test_weight_bytes_of_the_usual_sizes(name: str, nominal: float) -> None:
    """E13: parameters x bytes; in 8 and 4 bits scales, zeros and the 16-bit tables come on top."""
    shape = shape_of(name)
    assert shape.parameters == pytest.approx(nominal, rel=0.04)
    totals = {kind: sum(weight_parts(shape, kind).values()) for kind in ("fp32", "bf16", "fp16", "int8", "int4")}
    assert totals["fp32"] == 4 * shape.parameters and totals["bf16"] == totals["fp16"] == 2 * shape.parameters
    for kind, each in (("int8", 1), ("int4", 0.5)):
        wide = shape.vocab * shape.hidden * (1 if shape.tied else 2) + shape.positions * shape.hidden + shape.small
        scales = weight_parts(shape, kind)["scales and zeros"]
        assert totals[kind] - each * shape.parameters == scales + (2 - each) * wide
        assert scales == pytest.approx((shape.parameters - wide) / 64 * (2 + each))


def test_four_bits_save_four_times_of_the_quantised_layers_only() -> None:
    """C8: about 3.7 to 3.9 times of the layers, 2.2 times of Qwen3-0.6B as a whole."""
    qwen = shape_of("Qwen3-0.6B")
    wide, narrow = weight_parts(qwen), weight_parts(qwen, "int4", 128)
    layers = sum(narrow[part] for part in ("attention", "mlp", "scales and zeros"))
    assert (wide["attention"] + wide["mlp"]) / layers == pytest.approx(3.85, abs=0.01)
    assert sum(wide.values()) / sum(narrow.values()) == pytest.approx(2.2, abs=0.02)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("model", ["smollm2-135m", "Qwen3-0.6B", "Llama-3-8B", "tiny-random"])
def test_int4_parts_are_those_of_stage_5_s_bench(model: str, group: int) -> None:
    fields = tiny_config("llama") if model == "tiny-random" else PUBLIC.get(model, PUBLIC["SmolLM2-135M"])[1]
    config = ModelConfig.from_dict(fields)
    assert weight_parts(shape_of(model), "int4", group) == gptq.weight_parts(config, 4, group)
    assert weight_parts(shape_of(model), "int4", group, 8) == gptq.weight_parts(config, 4, group, int8_tables=True)
    assert weight_parts(shape_of(model)) == gptq.weight_parts(config, 16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_quantised_bytes_are_those_of_the_file(family: str, bits: int, tmp_path: Path) -> None:
    """The written checkpoint, tensor by tensor. It also keeps 4 bytes a column that say its group: not counted."""
    source = random_checkpoint(tiny_config(family, dtype="bfloat16"), tmp_path / "source")
    out = tmp_path / "out"
    quantize_folder(source, out, recipe_of(bits, 32, "rtn"), progress=False, short_groups=True)
    held: dict[str, int] = {}
    numbers = 0
    with safe_open(out / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor, kind = file.get_tensor(name), name.rsplit(".", 1)[1]
            held[kind] = held.get(kind, 0) + tensor.nbytes
            numbers += tensor.numel() * (kind == "weight")
    parts = weight_parts(shape_of(source), f"int{bits}", 32)
    assert held["qweight"] == parts["attention"] + parts["mlp"]
    assert held["scales"] + held["qzeros"] == parts["scales and zeros"]
    assert 2 * numbers == parts["embedding and head"] + parts["norms and biases"]


# -- time -----------------------------------------------------------------------------------------


def test_a_run_s_least_time_is_the_sum_of_its_steps(checkpoint: Callable[..., Path]) -> None:
    """Against `floor_s`, which reads a real run's plans; it counts each new token's K/V twice, read and written."""
    llm = LLM(checkpoint("qwen3"), stage="2", max_model_len=64, max_num_seqs=4, trace=True)  # tied: nothing looked up
    llm.generate([[5] * 9], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
    assert llm.trace is not None
    shape, token = shape_of(llm.config), llm.trace.meta["kv_bytes_per_token"]
    prefill = ask(shape, BARE, weights="fp32", kv_bits=32, context=9).prefill
    steps = [ask(shape, BARE, weights="fp32", kv_bits=32, context=n).decode for n in range(10, 15)]
    assert len(llm.trace.steps) == 1 + len(steps)
    works = [prefill, *steps]
    assert floor_s(llm.trace, llm.config, float("inf"), 1.0) == sum(work.flops for work in works)
    assert floor_s(llm.trace, llm.config, 1.0, float("inf")) == sum(work.bytes for work in works) + 14 * token


def test_an_untied_embedding_is_looked_up_not_read() -> None:
    found = ask("Llama-3-8B")
    assert found.weight_bytes - found.decode.weight_bytes == 128_256 * 4096 * 2
    tied = ask("Qwen3-0.6B")
    assert tied.weight_bytes == tied.decode.weight_bytes


def test_the_longer_of_both_bounds_decides() -> None:
    one, many = ask("Llama-3-8B", context=128), ask("Llama-3-8B", context=128, batch=4096)
    gpu = one.question.gpu
    assert one.decode.seconds(gpu) == one.decode.memory_s(gpu) > one.decode.compute_s(gpu)
    assert many.decode.seconds(gpu) == many.decode.compute_s(gpu) > many.decode.memory_s(gpu)
    assert one.decode.memory_s(gpu) == pytest.approx(one.decode.bytes / 3.35e12)
    assert flops(one.question.shape, 1, 1, 0) == pytest.approx(2 * (8.03e9 - 128_256 * 4096), rel=1e-4)


# -- fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_as_many_sequences_fit_as_can_be_added(gpu: str, weights: str) -> None:
    found = ask("Llama-3-8B", gpu, weights=weights, context=2048, utilisation=0.85)
    room, count = 0.85 * GPUS[gpu].memory_gb * GB - found.weight_bytes - 1.0 * GB, 0
    while room >= (count + 1) * found.kv_token * 2048:
        count += 1
    assert found.sequences == count
    if count:
        assert sum(size for _, size in found.bar) == GPUS[gpu].memory_gb * GB
    else:
        assert found.needed > 0.85 * GPUS[gpu].memory_gb * GB and gpu == "T4" and weights == "bf16"


def test_the_gpus_asked_for_are_there_with_a_source_each() -> None:
    names = ("T4", "L4", "A10", "RTX 3090", "RTX 4090", "A100 40 GB", "A100 80 GB", "H100", "H200", "B200", "MI300X")
    for name in names:
        gpu = gpu_of(name)
        assert gpu.memory_gb > 0 and len(gpu.sources) == 3 and all(gpu.sources), gpu
    assert len(GPUS) == len(names)
    with pytest.raises(InvalidSetting, match="'A100', which fits several; it must be one of T4, "):
        gpu_of("A100")
    with pytest.raises(InvalidSetting, match="not in the table"):
        gpu_of("Voodoo")


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, "gives num_hidden_layers=None; it must be a whole number"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not computed here: a mixture of experts"),
        ({"kv_lora_rank": 512}, "compressed K/V"),
        ({"model_type": "mamba", "architectures": []}, "'mamba' is not computed here"),
        ({"model_type": "gpt2"}, "gives n_layer=None"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_by_its_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        shape_of(tiny_config("llama") | change)


def test_other_dense_models_are_counted_like_llama_and_say_so() -> None:
    shape = shape_of(tiny_config("llama") | {"model_type": "olmo9", "architectures": ["Olmo9ForCausalLM"]})
    assert shape.parameters == shape_of("tiny-random").parameters
    assert shape.notes == ("olmo9 is counted as if it were a Llama.",)
    assert shape_of("tiny-random").notes == ()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context": 0}, "context is 0; it must be a whole number from 1 to 100,000,000"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"batch": True}, "batch is True"),
        ({"utilisation": 0}, "utilisation is 0; it must be above 0 and at most 1"),
        ({"utilisation": float("nan")}, "utilisation is nan"),
        ({"reserve_gb": -1}, "reserve_gb is -1"),
        ({"weights": "int3"}, "weights is 'int3'; it must be one of fp32, bf16, fp16, int8, int4"),
        ({"kv_bits": 4}, "kv_bits is 4; it must be one of 32, 16, 8"),
        ({"group_size": 5}, "group_size is 5; it must be a whole number of at least 8"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        ask("tiny-random", **settings)


def test_names_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="did you mean Llama-3-8B"):
        shape_of("llama3-8b")
    with pytest.raises(InvalidSetting, match="model is a int"):
        shape_of(7)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no config.json that can be read"):
        shape_of(tmp_path)
    assert all(shape_of(name).parameters for name in MODELS)


def test_importing_it_loads_no_torch() -> None:
    import subprocess
    import sys

    script = "import stepengine.calculator, sys; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


# -- the widget, without a page -------------------------------------------------------------------


def page(calculator: Calculator) -> Any:
    return json.loads(calculator.data)


def test_the_text_writes_the_formulas_out_with_their_sources() -> None:
    text = Calculator("smollm2-135m", "T4").text
    assert "  2 x 30 layers x 3 K/V heads x 64 x 2 bytes = 23,040 bytes a token\n" in text
    assert "num_hidden_layers 30, num_key_value_heads 3, head_dim 64: config.json of smollm2-135m]" in text
    assert "[320 GB/s: https://" in text and "at least" in text and "none of these GPUs was measured here" in text
    for name, gpu in GPUS.items():
        shown = Calculator("tiny-random", name).text
        assert all(f": {source}]" in shown for source in gpu.sources)


def test_what_is_shown_is_what_was_computed() -> None:
    calculator = Calculator("Llama-2-70B", "H100", weights="int4", batch=3)
    shown, found = page(calculator), calculator.answer
    assert [block["name"] for block in shown["blocks"]] == ["weights", "kv", "fit", "time"]
    assert shown["sequences"] == found.sequences and shown["memory"]["bytes"] == 80 * GB
    assert [(part["name"], part["bytes"]) for part in shown["bar"]] == found.bar
    assert shown["sentence"] == calculator.text.splitlines()[0]
    assert (
        f"a decode step of 3 sequences takes at least {1e3 * found.decode.bytes / 3.35e12:.3g} ms" in shown["sentence"]
    )


def test_it_is_set_from_code() -> None:
    calculator = Calculator()
    assert calculator.set(model="Qwen3-0.6B", gpu="L4", weights="int4", context=512) is calculator
    assert repr(calculator) == "Calculator(Qwen3-0.6B in int4 on L4, 16-bit K/V, context 512, batch 1)"
    before = calculator.data
    for settings, words in (
        ({"gpu": "T4", "context": 0}, "context is 0"),
        ({"colour": 1}, "'colour' is no setting of the calculator; use one of model, gpu, weights"),
        ({"model": "nobody"}, "neither known here nor a folder"),
    ):
        with pytest.raises(InvalidSetting, match=words):
            calculator.set(**settings)
        assert calculator.data == before and calculator.answer.question.gpu.name == "L4"
    with pytest.raises(InvalidSetting, match="'colour' is no setting"):
        Calculator(colour=1)


def test_any_config_and_a_gpu_of_one_s_own() -> None:
    mine = GPU("mine", 12, 500, 50, ("a", "b", "c"))
    for model in (tiny_config("qwen3"), ModelConfig.from_dict(tiny_config("qwen3")), shape_of(tiny_config("qwen3"))):
        calculator = Calculator(model, mine)
        assert calculator.answer.question.shape.parameters == shape_of(tiny_config("qwen3")).parameters
        assert "your config" in page(calculator)["choices"]["model"] and "mine" in page(calculator)["choices"]["gpu"]
        calculator.asked = json.dumps({"gpu": "T4"})
        calculator.asked = json.dumps({"model": "Llama-2-7B"})
        calculator.asked = json.dumps({"model": "your config", "gpu": "mine"})
        assert page(calculator)["problem"] == "" and repr(calculator).startswith(
            "Calculator(your config in bf16 on mine"
        )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ('{"context": "long"}', "context is 'long'; it must be a whole number."),
        ('{"batch": ""}', "batch is ''; it must be a whole number."),
        ('{"utilisation": "1.5"}', "utilisation is 1.5; it must be above 0 and at most 1."),
        ('{"utilisation": "inf"}', "utilisation is inf"),
        ('{"model": "/etc"}', "model is '/etc'; choose one of SmolLM2-135M, "),  # a page opens no folders
        ('{"gpu": ["T4"]}', "gpu is ['T4']; choose one of T4, "),
        ('{"weights": "int3"}', "weights is 'int3'"),
        ('{"weights": ["int4"]}', "weights is ['int4']"),
        ('{"shape": 1}', "'shape' is no setting"),
        ("[1]", "The page must send settings by name."),
        ("{", "The page must send settings by name."),
    ],
)
def test_what_a_page_asks_wrongly_gets_a_sentence_and_changes_nothing(asked: str, words: str) -> None:
    calculator = Calculator()
    before = calculator.answer
    calculator.asked = asked
    assert words in page(calculator)["problem"] and calculator.answer is before
    calculator.asked = '{"context": " 2,048 ", "turn": 7}'
    assert page(calculator)["problem"] == "" and calculator.answer.question.context == 2048


def test_without_a_kernel_the_table_is_shown() -> None:
    calculator = Calculator(tiny_config("llama") | {"model_type": "<b>&", "architectures": []})
    bundle = calculator._repr_mimebundle_()
    assert bundle is not None
    assert bundle[0]["text/plain"] == f"{calculator!r}\n{calculator.text}"
    assert bundle[0] | {} == (Calculator(calculator.answer.question.shape)._repr_mimebundle_() or [{}])[0] | {
        "application/vnd.jupyter.widget-view+json": bundle[0]["application/vnd.jupyter.widget-view+json"]
    }
    shown = bundle[0]["text/html"]
    assert "&lt;b&gt;&amp; is counted as if it were a Llama." in shown and shown.count("<tr>") == 4
    assert len(bundle[0]["text/plain"]) + len(shown) < 12_000
