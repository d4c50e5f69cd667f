"""From a model to its codes: order, inputs, memory, and going on after an interruption."""

import pytest
import torch

from stepengine.errors import InvalidSetting, ModelError
from stepengine.model.config import ModelConfig
from stepengine.model.loader import load_decoder
from stepengine.model.tiny import random_checkpoint, tiny_config
from stepengine.stage0_naive.attention import RecomputedAttention
from stepengine.stage5_gptq.calibrate import Pieces, Recipe, WholePieces, quantized_layers
from stepengine.stage5_gptq.checkpoint import linear_shapes
from stepengine.stage5_gptq.gptq import Hessian, Method, quantize
from stepengine.stage5_gptq.grid import Grid, round_to_nearest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tiny_config("qwen2", intermediate_size=128), tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture
def decoder(folder):
    return load_decoder(folder, "cpu", torch.float32, 64)


TOKENS = torch.randint(499, (6, 24), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(Grid(4, 32), Method(0.01))


def test_every_matrix_once_in_the_models_order(decoder):
    found = dict(quantized_layers(decoder, TOKENS, RECIPE))
    wanted = linear_shapes(decoder.config)
    assert list(found) != [] and set(found) == set(wanted)
    assert {name: weight.shape for name, weight in found.items()} == wanted
    assert [name.split(".")[2] for name in found] == ["0"] * 7 + ["1"] * 7


def test_pieces_run_as_the_engines_own_attention_runs_them(decoder):
    """Whole pieces without an engine give the hidden states of the naive stage."""
    from stepengine.core.batch import Staging
    from stepengine.core.request import Request, SamplingParams

    ours = decoder(Pieces.of(TOKENS, "cpu"), WholePieces()).unflatten(0, TOKENS.shape)
    for row, ids in enumerate(TOKENS.tolist()):
        request = Request(0, ids, SamplingParams(), max_len=len(ids))
        batch = Staging(torch.device("cpu"), 1, len(ids), 0, 0).fill([request.schedule()], {0: request})
        torch.testing.assert_close(ours[row], decoder(batch, RecomputedAttention()), atol=1e-5, rtol=1e-4)


def test_each_matrix_sees_what_the_quantised_ones_before_it_make(folder, decoder):
    """The last matrix of all: its Hessian is that of the quantised model's inputs, not of the original's."""
    found = dict(quantized_layers(decoder, TOKENS, RECIPE))
    name = "model.layers.1.mlp.down_proj"
    codes = {}
    for kind, model in (("quantised", decoder), ("original", load_decoder(folder, "cpu", torch.float32, 64))):
        hessian = Hessian(128)
        hook = model.layers[1].down.register_forward_pre_hook(lambda linear, args, into=hessian: into.add(args[0]))
        with torch.inference_mode():
            model(Pieces.of(TOKENS, "cpu"), WholePieces())
        hook.remove()
        fresh = load_decoder(folder, "cpu", torch.float32, 64).layers[1].down.weight
        codes[kind] = quantize(fresh, hessian.matrix, RECIPE.grid, RECIPE.method).codes
    same = {kind: float((found[name].codes == value).float().mean()) for kind, value in codes.items()}
    assert same["quantised"] > 0.999 and same["original"] < 0.99


def test_joined_matrices_are_split_by_rows(folder, decoder):
    rounded = Recipe(Grid(4, 32), None)
    found = dict(quantized_layers(decoder, TOKENS[:1], rounded))
    layer = load_decoder(folder, "cpu", torch.float32, 64).layers[0]
    for name, rows in (("self_attn.k_proj", layer.qkv.weight[64:96]), ("mlp.up_proj", layer.gate_up.weight[128:])):
        wanted = round_to_nearest(rows, rounded.grid)
        assert torch.equal(found[f"model.layers.0.{name}"].codes, wanted.codes)
        assert torch.equal(found[f"model.layers.0.{name}"].zeros, wanted.zeros)


def test_an_interrupted_run_goes_on_where_it_was(folder, decoder, tmp_path):
    whole = dict(quantized_layers(load_decoder(folder, "cpu", torch.float32, 64), TOKENS, RECIPE))
    work = tmp_path / "work"
    first = quantized_layers(decoder, TOKENS, RECIPE, work)
    for _ in range(3):  # the first layer is done, its last matrices were not asked for
        next(first)
    first.close()
    assert (work / "layer-0.safetensors").is_file()
    again = load_decoder(folder, "cpu", torch.float32, 64)
    ran = []
    again.layers[0].register_forward_hook(lambda *args: ran.append(0))
    again.layers[1].register_forward_hook(lambda *args: ran.append(1))
    told: list[str] = []
    found = dict(quantized_layers(again, TOKENS, RECIPE, work, told.append))
    assert ran == [1] and told == list(whole) and not work.exists()
    for name, weight in whole.items():
        assert torch.equal(found[name].codes, weight.codes) and torch.equal(found[name].scales, weight.scales)


@pytest.mark.parametrize("change", ["recipe", "tokens", "broken state", "lost layer"])
def test_a_run_with_other_arguments_does_not_go_on(folder, decoder, tmp_path, change):
    first = quantized_layers(decoder, TOKENS, RECIPE, tmp_path / "work")
    next(first)
    first.close()
    recipe = Recipe(Grid(3, 32)) if change == "recipe" else RECIPE
    tokens = TOKENS + 1 if change == "tokens" else TOKENS
    if change == "broken state":
        (tmp_path / "work" / "state.safetensors").write_bytes(b"half a file")
    if change == "lost layer":
        (tmp_path / "work" / "layer-0.safetensors").unlink()
    fresh = load_decoder(folder, "cpu", torch.float32, 64)
    found = dict(quantized_layers(fresh, tokens, recipe, tmp_path / "work"))
    wanted = dict(quantized_layers(load_decoder(folder, "cpu", torch.float32, 64), tokens, recipe))
    assert all(torch.equal(found[name].codes, weight.codes) for name, weight in wanted.items())


def test_one_hessian_is_held_at_a_time(decoder, monkeypatch):
    import gc
    import weakref

    from stepengine.stage5_gptq import calibrate

    alive: weakref.WeakSet[Hessian] = weakref.WeakSet()
    most = []

    class Counted(Hessian):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            gc.collect()
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(calibrate, "Hessian", Counted)
    list(quantized_layers(decoder, TOKENS, RECIPE))
    assert len(most) == 8 and max(most) == 1  # 2 layers x 4 inputs: qkv share one, gate and up share one


def test_what_is_not_finite_is_named(decoder):
    decoder.layers[1].o.weight.data[3, 3] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.o: The weights hold NaN"):
        list(quantized_layers(decoder, TOKENS, RECIPE))
    decoder.layers[0].gate_up.weight.data[:] = 1e38
    with pytest.raises(ModelError, match=r"model\.layers\.0\.down hold NaN or infinite"):
        list(quantized_layers(decoder, TOKENS, RECIPE))


def test_a_model_without_a_tokenizer_is_calibrated_on_random_tokens(folder):
    config = ModelConfig.from_folder(folder)
    tokens = Recipe(samples=3, length=100).tokens(None, config)
    assert tokens.shape == (3, 100) and int(tokens.max()) < config.vocab_size
    for name, value in (("samples", 0), ("length", 2.5), ("samples", True)):
        with pytest.raises(InvalidSetting, match=f"{name} is"):
            Recipe(**{name: value})
