"""GPTQ checkpoints: written and read back, as others wrote them, and broken."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepengine.errors import InvalidSetting, ModelError
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import FAMILIES, random_checkpoint, tiny_config
from stepengine.stage5_gptq.checkpoint import (
    QuantizationConfig,
    QuantizedCheckpoint,
    check_written_format,
    linear_shapes,
    write_checkpoint,
)
from stepengine.stage5_gptq.grid import Grid, round_to_nearest
from stepengine.stage5_gptq.packing import pack_stream

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
FIELDS = ("codes", "scales", "zeros", "groups")


def quantize(source, grid):
    tensors = load_file(source / "model.safetensors")
    names = linear_shapes(ModelConfig.from_folder(source))
    return {name: round_to_nearest(tensors[f"{name}.weight"], grid) for name in names}


def written(source, out, grid=None, **settings):
    grid = grid or Grid(4, 32)
    return write_checkpoint(out, source, quantize(source, grid), grid, **settings)


@pytest.fixture
def source(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture
def folder(source, tmp_path):
    return written(source, tmp_path / "quantised")


@pytest.fixture
def symmetric(source, tmp_path):
    return written(source, tmp_path / "symmetric", Grid(4, 32, symmetric=True))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def assert_same(weight, other):
    assert weight.bits == other.bits
    for name in FIELDS:
        assert torch.equal(getattr(weight, name), getattr(other, name)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", [Grid(2, 32, True), Grid(3, 32), Grid(4, 16, True), Grid(4, -1), Grid(8, 32)], ids=str)
def test_what_was_written_is_read_back(checkpoint, tmp_path, family, grid):
    source = checkpoint(family)
    weights = quantize(source, grid)
    read = QuantizedCheckpoint(write_checkpoint(tmp_path / "out", source, weights, grid))
    assert read.names == tuple(weights) and len(read.names) == 14
    for name, weight in weights.items():
        assert_same(read.read(name), weight)
    tensors = load_file(source / "model.safetensors")
    rest = dict(read.rest())
    assert tuple(rest) == read.others
    assert rest.keys() == {name for name in tensors if name.removesuffix(".weight") not in weights}
    for name, tensor in rest.items():
        assert torch.equal(tensor, tensors[name]), name
        assert torch.equal(read.tensor(name), tensors[name]), name
    assert replace(read.config, quantization=None) == ModelConfig.from_folder(source)
    assert read.quantization.grid == grid
    biased = family == "qwen2"
    assert (read.bias(QUERY) is not None) == biased and read.bias(DOWN) is None
    if biased:
        assert torch.equal(read.bias(QUERY), tensors[f"{QUERY}.bias"])


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_follows_from_the_file_by_the_formats_formula(source, tmp_path, bits, form):
    grid = Grid(bits, 32, symmetric=form == "gptq")
    folder = written(source, tmp_path / "out", grid, checkpoint_format=form)
    tensors, read = load_file(folder / "model.safetensors"), QuantizedCheckpoint(folder)
    for name in (QUERY, DOWN):
        weights, parts = read.read(name).dequantized(), {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros")}
        for n, k in ((0, 0), (10, 21), (31, 10), (63, 63)):
            group = int(tensors[f"{name}.g_idx"][k])
            code = digit(parts["qweight"][:, n].tolist(), k, bits)
            zero = digit(parts["qzeros"][group].tolist(), n, bits) + (form == "gptq")
            assert weights[n, k] == (code - zero) * tensors[f"{name}.scales"][group, n].float()


def digit(words, place, bits):
    number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return number >> bits * place & 2**bits - 1


def test_a_folder_is_what_other_loaders_expect(tmp_path):
    source = random_checkpoint(tiny_config("qwen3", dtype="bfloat16"), tmp_path / "source")
    change_tensors(source, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "notes.txt"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    out = written(source, tmp_path / "deep" / "out", damp_percent=0.05, act_order=True)
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    made = {"config.json", "quantize_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == copied | made
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    meta = quantization.pop("meta")
    assert meta["quantizer"][0].startswith("stepengine:") and meta["act_order"] is True
    assert quantization == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "true_sequential": True,
        "static_groups": True,
        "damp_percent": 0.05,
        "checkpoint_format": "gptq_v2",
    }
    older = json.loads((out / "quantize_config.json").read_text())
    assert older == quantization | {"meta": meta, "model_file_base_name": "model"}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        kinds = {name.rsplit(".", 1)[1]: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"weight": "BF16", "qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}
    assert QuantizedCheckpoint(out).config.eos_token_ids == (2, 3)


def test_symmetric_weights_are_written_as_version_1_and_others_as_version_2(folder, symmetric):
    assert QuantizedCheckpoint(symmetric).quantization.checkpoint_format == "gptq"
    assert QuantizedCheckpoint(folder).quantization.checkpoint_format == "gptq_v2"
    stored = load_file(symmetric / "model.safetensors")[f"{QUERY}.qzeros"]
    assert (stored == 0x77777777).all()


def test_a_zero_point_of_0_is_refused_where_version_1_is_asked_for(source, tmp_path):
    weights = quantize(source, Grid(4, 32))
    weights[DOWN].zeros[0, 0] = 0
    with pytest.raises(InvalidSetting, match="zero point is 0.*gptq_v2"):
        write_checkpoint(tmp_path / "out", source, weights, Grid(4, 32), checkpoint_format="gptq")
    assert not list(tmp_path.iterdir())
    assert_same(
        QuantizedCheckpoint(write_checkpoint(tmp_path / "out", source, weights, Grid(4, 32))).read(DOWN), weights[DOWN]
    )


def test_weights_are_taken_one_at_a_time_in_any_order(source, tmp_path):
    weights, alive = quantize(source, Grid(4, 32)), []

    def one_by_one():
        import weakref

        for name in reversed(weights):
            assert sum(reference() is not None for reference in alive) <= 1  # the one before may still be held
            codes = weights[name].codes.clone()
            alive.append(weakref.ref(codes))
            yield name, replace(weights[name], codes=codes)
            del codes

    read = QuantizedCheckpoint(write_checkpoint(tmp_path / "out", source, one_by_one(), Grid(4, 32)))
    for name, weight in weights.items():
        assert_same(read.read(name), weight)


def test_shards_are_read_and_rewritten(source, folder, tmp_path):
    for whole in (source, folder):
        shards = tmp_path / f"{whole.name} in shards"
        shards.mkdir()
        (shards / "config.json").write_bytes((whole / "config.json").read_bytes())
        tensors = sorted(load_file(whole / "model.safetensors").items())
        places = {}
        for i in range(3):
            save_file(dict(tensors[i::3]), shards / f"model-{i}.safetensors")
            places |= {name: f"model-{i}.safetensors" for name, _ in tensors[i::3]}
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    read, expected = QuantizedCheckpoint(shards), QuantizedCheckpoint(folder)
    for name in expected.names:
        assert_same(read.read(name), expected.read(name))
    assert read.others == expected.others
    weights = quantize(source, Grid(4, 32))
    again = write_checkpoint(tmp_path / "again", tmp_path / f"{source.name} in shards", weights, Grid(4, 32))
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    (shards / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks 1 of 3 shards"):
        QuantizedCheckpoint(shards)


def test_groups_are_in_order_where_an_export_does_not_say(folder):
    expected = QuantizedCheckpoint(folder).read(DOWN)
    change_tensors(folder, lambda tensors: tensors[f"{DOWN}.g_idx"].zero_())
    assert_same(QuantizedCheckpoint(folder).read(DOWN), expected)
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")])
    assert_same(QuantizedCheckpoint(folder).read(DOWN), expected)
    change_config(folder, desc_act=True)
    with pytest.raises(ModelError, match=r"lacks 14 tensors \(model\.layers\.0\.self_attn\.\w+\.g_idx"):
        QuantizedCheckpoint(folder)


def test_columns_of_a_group_need_not_be_neighbours(folder):
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0)) % 5
    change_config(folder, desc_act=True)
    change_tensors(folder, lambda tensors: tensors.update({f"{DOWN}.g_idx": order}))
    weight = QuantizedCheckpoint(folder).read(DOWN)
    assert weight.groups.dtype == torch.int32 and torch.equal(weight.groups, order.int())


def test_symmetric_zero_points_stored_as_they_are_under_the_older_name(symmetric):
    expected = QuantizedCheckpoint(symmetric).read(DOWN)
    change_tensors(
        symmetric,
        lambda tensors: [tensor.fill_(-0x77777778) for name, tensor in tensors.items() if name.endswith("qzeros")],
    )
    assert load_file(symmetric / "model.safetensors")[f"{DOWN}.qzeros"][0, 0] & 15 == 8
    assert_same(QuantizedCheckpoint(symmetric).read(DOWN), expected)
    change_config(symmetric, sym=False)
    assert (QuantizedCheckpoint(symmetric).read(DOWN).zeros == 9).all()


def test_the_one_file_may_have_its_older_name(folder):
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert QuantizedCheckpoint(folder).read(DOWN).shape == (64, 160)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_count_as_fp16(folder, dtype):
    expected = QuantizedCheckpoint(folder).read(DOWN)
    change_tensors(folder, lambda tensors: tensors.update({f"{DOWN}.scales": tensors[f"{DOWN}.scales"].to(dtype)}))
    assert_same(QuantizedCheckpoint(folder).read(DOWN), expected)


def test_biases_of_zeros_are_passed_over_and_others_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update({f"{DOWN}.bias": torch.zeros(64)}))
    read = QuantizedCheckpoint(folder)
    assert read.bias(DOWN) is None and f"{DOWN}.bias" not in read.others
    change_tensors(folder, lambda tensors: tensors.update({f"{DOWN}.bias": torch.ones(64)}))
    with pytest.raises(ModelError, match=r"down_proj\.bias .* not zero.*qwen2 architecture has no such bias"):
        QuantizedCheckpoint(folder)


def test_an_output_head_is_kept_and_a_copy_of_a_tied_one_passed_over(folder, tmp_path):
    assert "lm_head.weight" in QuantizedCheckpoint(folder).others
    tied = random_checkpoint(tiny_config("llama", tie_word_embeddings=True), tmp_path / "source")
    change_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": torch.ones(499, 64)}))
    assert "lm_head.weight" not in QuantizedCheckpoint(written(tied, tmp_path / "tied")).others


GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_what_a_config_leaves_out_has_the_formats_defaults():
    read = QuantizationConfig.from_dict(GOOD)
    assert (read.desc_act, read.sym, read.checkpoint_format, read.version) == (False, True, "gptq", 1)
    written = QuantizationConfig.from_dict(GOOD | {"checkpoint_format": "gptq_v2", "sym": False, "damp_percent": 0.1})
    assert QuantizationConfig.from_dict(written.as_dict()) == written and written.version == 2
    assert (
        QuantizationConfig.from_dict({"method": "gptq", "bits": 4, "group_size": 8, "format": "gptq_v2"}).version == 2
    )
    assert QuantizationConfig.from_dict(GOOD | {"dynamic": {}, "lm_head": False, "pack_dtype": "int32"}) == read


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"quant_method": "awq"}, "quant_method='awq' is not supported; use a GPTQ checkpoint"),
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported"),
        ({"quant_method": "fp8"}, "quant_method='fp8' is not supported"),
        ({"quant_method": None}, "quant_method=None is not supported"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported; .* 'gptq' or 'gptq_v2'"),
        ({"format": "gptq_p"}, "checkpoint_format='gptq_p' is not supported"),
        ({"is_marlin_format": True}, "checkpoint_format='marlin' is not supported"),
        ({"bits": 5}, "bits=5 is not supported; use a checkpoint of 2, 3, 4, 8 bits"),
        ({"bits": "4"}, "bits='4'; it must be a whole number"),
        ({"group_size": None}, "group_size=None; it must be a whole number"),
        ({"group_size": 4}, "group_size=4 is not supported; it must be -1 or at least 8"),
        ({"desc_act": "yes"}, "desc_act='yes'; it must be true or false"),
        ({"lm_head": True}, "lm_head=true is not supported"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic has 1 rules .* not supported"),
        ({"pack_dtype": "int16"}, "pack_dtype='int16' is not supported"),
    ],
)
def test_a_config_that_is_not_read_exactly_is_refused(change, sentence):
    with pytest.raises(ModelError, match=sentence):
        QuantizationConfig.from_dict(GOOD | change)


def test_an_unquantised_folder_is_refused(source):
    with pytest.raises(ModelError, match="is not quantised: its config.json has no quantization_config"):
        QuantizedCheckpoint(source)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop(f"{DOWN}.qzeros"), r"lacks 1 tensors \(model\.layers\.1\.mlp\.down_proj\.qzeros\)"),
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors \(model\.norm\.weight\)"),
        (lambda t: t.pop(f"{QUERY}.bias"), r"lacks 1 tensors .*q_proj\.bias"),
        (lambda t: t.update(extra=torch.ones(1)), r"holds 1 tensors that its config.json does not account for \(extra"),
        (
            lambda t: t.update({f"{DOWN}.weight": t.pop(f"{DOWN}.qweight").float()}),
            "1 of 14 layers .* are not quantised .*down_proj",
        ),
        (
            lambda t: t.update({f"{DOWN}.qweight": torch.zeros(40, 64, dtype=torch.int32)}),
            r"down_proj\.qweight .* shape \[40, 64\].*bits=4, group_size=32.* asks for \[20, 64\]",
        ),
        (
            lambda t: t.update({f"{DOWN}.scales": torch.ones(2, 64).half()}),
            r"down_proj\.scales .* shape \[2, 64\].* asks for \[5, 64\]",
        ),
        (
            lambda t: t.update({f"{DOWN}.g_idx": torch.zeros(64, dtype=torch.int32)}),
            r"down_proj\.g_idx .* shape \[64\].* asks for \[160\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            r"model\.norm\.weight .* shape \[65\].* asks for \[64\]",
        ),
        (
            lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"].float()}),
            r"down_proj\.qweight .* of type F32, but the format asks for I32",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64).int()}),
            r"model\.norm\.weight .* of type I32",
        ),
    ],
)
def test_a_folder_whose_headers_are_wrong_is_refused(folder, change, sentence):
    change_tensors(folder, change)
    with pytest.raises(ModelError, match=sentence):
        QuantizedCheckpoint(folder)


def test_a_config_of_other_bits_than_the_file_is_refused(folder):
    change_config(folder, bits=8)
    with pytest.raises(ModelError, match=r"qweight .* shape \[8, 64\].*bits=8.* asks for \[16, 64\]"):
        QuantizedCheckpoint(folder)


@pytest.mark.parametrize("keep", [5, 5000])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a whole safetensors file.*fetch the checkpoint again"):
        QuantizedCheckpoint(folder)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_scales_that_cannot_be_are_refused(folder, value):
    change_tensors(folder, lambda tensors: tensors[f"{DOWN}.scales"][3].fill_(float(value)))
    read = QuantizedCheckpoint(folder)
    assert read.read(QUERY).shape == (64, 64)
    with pytest.raises(ModelError, match=f"down_proj.scales holds {value} .*must be finite and above 0"):
        read.read(DOWN)


@pytest.mark.parametrize("value", [-1, 5])
def test_groups_that_do_not_exist_are_refused(folder, value):
    change_tensors(folder, lambda tensors: tensors[f"{DOWN}.g_idx"][7].fill_(value))
    with pytest.raises(ModelError, match=r"down_proj\.g_idx holds groups .*but there are 5 \(0 to 4\)"):
        QuantizedCheckpoint(folder).read(DOWN)


def test_names_that_do_not_exist_are_refused(folder):
    read = QuantizedCheckpoint(folder)
    for ask in (read.read, read.bias):
        with pytest.raises(ModelError, match="'lm_head' is not a quantised layer .*`names` lists them"):
            ask("lm_head")
    with pytest.raises(ModelError, match="is not among the unquantised tensors .*`others` lists them"):
        read.tensor(f"{DOWN}.qweight")


def test_groups_that_do_not_divide_a_layer_are_refused_unless_asked_for(source, tmp_path):
    config, grid = ModelConfig.from_folder(source), Grid(4, 64)
    check_written_format(config, Grid(4, 32))
    sentence = r"down_proj has 160 inputs, which groups of 64 do not divide.*choose a group_size of 32, 16, 8, -1"
    with pytest.raises(InvalidSetting, match=sentence):
        check_written_format(config, grid)
    with pytest.raises(InvalidSetting, match=sentence):
        write_checkpoint(tmp_path / "out", source, iter([]), grid)
    check_written_format(config, grid, short_groups=True)
    read = QuantizedCheckpoint(written(source, tmp_path / "out", grid, short_groups=True))
    assert_same(read.read(DOWN), quantize(source, grid)[DOWN])
    assert read.read(DOWN).scales.shape == (64, 3)


def test_sizes_that_do_not_fill_words_are_refused():
    config = ModelConfig.from_dict(tiny_config("llama", intermediate_size=176))
    check_written_format(config, Grid(4, 16))
    with pytest.raises(InvalidSetting, match="gate_proj has 176 outputs, which 3 bits cannot pack .* multiple of 32"):
        check_written_format(config, Grid(3, 16))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda w: w.pop(DOWN), r"1 of 14 layers have no quantised weight \(model\.layers\.1\.mlp\.down_proj\)"),
        (lambda w: w.update(lm_head=w[DOWN]), "'lm_head' is no layer of this model"),
        (lambda w: w.update({DOWN: w[QUERY]}), r"down_proj is \[64, 64\] of 4 bits, but \[64, 160\] of 4"),
        (lambda w: w.update({DOWN: replace(w[DOWN], bits=8)}), r"\[64, 160\] of 8 bits, but \[64, 160\] of 4"),
        (
            lambda w: w.update({DOWN: replace(w[DOWN], groups=w[DOWN].groups.flip(0))}),
            "groups of model.layers.1.mlp.down_proj are not columns 32 by 32 in order",
        ),
    ],
)
def test_weights_that_are_not_this_models_are_refused_and_nothing_is_left(source, tmp_path, change, sentence):
    weights = quantize(source, Grid(4, 32))
    change(weights)
    with pytest.raises(ModelError, match=sentence):
        write_checkpoint(tmp_path / "out", source, weights, Grid(4, 32))
    assert not list(tmp_path.iterdir())


def test_a_weight_that_comes_twice_is_refused(source, tmp_path):
    weights = list(quantize(source, Grid(4, 32)).items())
    with pytest.raises(ModelError, match="q_proj' comes twice"):
        write_checkpoint(tmp_path / "out", source, [*weights, weights[0]], Grid(4, 32))


def test_a_run_that_breaks_leaves_nothing(source, tmp_path):
    def breaking():
        yield from list(quantize(source, Grid(4, 32)).items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", source, breaking(), Grid(4, 32))
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_an_empty_one_filled(source, folder, tmp_path):
    with pytest.raises(InvalidSetting, match="exists and is not an empty folder; give a new name"):
        written(source, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSetting, match="exists and is not an empty folder"):
        written(source, tmp_path / "file")
    with pytest.raises(ModelError, match="cannot be written"):
        written(source, tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    assert QuantizedCheckpoint(written(source, tmp_path / "empty")).names


def test_a_quantised_source_and_an_unknown_format_are_refused(source, folder, tmp_path):
    with pytest.raises(ModelError, match="is quantised already; give the unquantised checkpoint"):
        write_checkpoint(tmp_path / "out", folder, iter([]), Grid(4, 32))
    with pytest.raises(InvalidSetting, match="checkpoint_format is 'marlin'; it must be 'gptq' or 'gptq_v2'"):
        write_checkpoint(tmp_path / "out", source, iter([]), Grid(4, 32), checkpoint_format="marlin")


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_reads_the_same_weights(source, tmp_path, bits, form):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    sym = form == "gptq"
    folder = written(source, tmp_path / "out", Grid(bits, 32, sym), checkpoint_format=form)
    tensors, read = load_file(folder / "model.safetensors"), QuantizedCheckpoint(folder)
    for name in read.names:
        weight = read.read(name)
        rows, columns = weight.shape
        theirs = TorchLinear(
            bits=bits, group_size=32, sym=sym, desc_act=False, in_features=columns, out_features=rows, bias=False
        )
        theirs.load_state_dict({key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")})
        if form == "gptq":
            convert_gptq_v1_to_v2_format_module(theirs, bits=bits, pack_dtype=torch.int32)
        theirs.post_init()
        assert torch.equal(theirs.dequantize_weight().T, weight.dequantized(torch.float16)), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_zero_points_of_gptqmodel_are_read_even_where_they_are_0(bits):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    from stepengine.stage5_gptq.packing import stored_zeros

    zeros = torch.randint(2**bits, (4, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    zeros[0, :9] = 0
    theirs = TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=False, in_features=128, out_features=64, bias=False
    )
    theirs.qzeros.data.copy_(pack_stream(zeros, bits))
    convert_gptq_v2_to_v1_format_module(theirs, QuantizeConfig(bits=bits, sym=False))
    assert torch.equal(stored_zeros(theirs.qzeros, bits, 1), zeros)
