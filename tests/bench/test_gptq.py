"""`stepengine bench --what gptq` on tiny models: losses, shares and bytes follow by other means; no times."""

import json
from collections.abc import Iterator
from math import exp, log
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from stepengine.bench import gptq, perplexity, run, runs
from stepengine.errors import InvalidSetting
from stepengine.model import store
from stepengine.model.config import ModelConfig
from stepengine.model.loader import load_decoder
from stepengine.stage5_gptq.checkpoint import QuantizedCheckpoint
from stepengine.stage5_gptq.grid import Grid
from stepengine.stage5_gptq.loader import load_quantized, quantized_folder, recipe_of

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(499, (3, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is quantised here is not kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPENGINE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def transformer(folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


# -- perplexity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [None, 1, 7, 100])
@torch.inference_mode()
def test_the_loss_is_that_of_transformers(family: str, rows: int | None, checkpoint) -> None:
    folder = checkpoint(family)
    expected = [float(transformer(folder)(ids[None], labels=ids[None]).loss) for ids in TOKENS]
    decoder = load_decoder(folder, "cpu", torch.float32, 32)
    assert perplexity.nll_by_piece(decoder, TOKENS, rows).tolist() == pytest.approx(expected, rel=1e-5)
    assert perplexity.nll(decoder, TOKENS, rows) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_an_engine_is_judged_by_its_model(checkpoint, monkeypatch) -> None:
    llm = runs.build(checkpoint(), "4", 1, 32)
    expected = perplexity.nll(load_decoder(checkpoint(), "cpu", torch.float32, 32), TOKENS)
    monkeypatch.setattr(perplexity, "_LOGITS", 5)
    monkeypatch.setattr(perplexity, "_TOKENS", 50)
    assert perplexity.nll(llm, TOKENS) == pytest.approx(expected, rel=1e-6)


@torch.inference_mode()
def test_knowing_nothing_is_the_vocabularys_logarithm(checkpoint) -> None:
    decoder = load_decoder(checkpoint(), "cpu", torch.float32, 32)
    decoder.head.weight.zero_()
    assert perplexity.nll(decoder, TOKENS) == pytest.approx(log(499), rel=1e-6)


@torch.inference_mode()
def test_the_gap_of_logits_is_that_of_transformers(checkpoint) -> None:
    folders = [checkpoint(seed=seed) for seed in (0, 1)]
    a, b = (load_decoder(folder, "cpu", torch.float32, 32) for folder in folders)
    one, other = (transformer(folder)(TOKENS).logits[:, :-1] for folder in folders)
    expected = (one - other).abs()
    for rows in (None, 7):
        gap = perplexity.logit_gap(a, b, TOKENS, rows)
        assert gap.largest == pytest.approx(float(expected.max()), rel=1e-4)
        assert gap.mean == pytest.approx(float(expected.mean()), rel=1e-4)
        assert gap.same == pytest.approx(float((one.argmax(-1) == other.argmax(-1)).float().mean()))
    assert perplexity.logit_gap(a, a, TOKENS) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("tokens", "rows", "complaint"),
    [
        (torch.zeros(3, 1, dtype=torch.int64), None, r"tokens is \[3, 1\]"),
        (torch.zeros(8, dtype=torch.int64), None, r"tokens is \[8\]"),
        (torch.zeros(0, 8, dtype=torch.int64), None, r"tokens is \[0, 8\]"),
        (torch.zeros(1, 33, dtype=torch.int64), None, "pieces have 33 tokens"),
        (torch.zeros(1, 8, dtype=torch.int64), 0, "rows is 0"),
    ],
)
def test_what_cannot_be_predicted_is_refused(tokens, rows, complaint, checkpoint) -> None:
    with pytest.raises(InvalidSetting, match=complaint):
        perplexity.nll(load_decoder(checkpoint(), "cpu", torch.float32, 32), tokens, rows)


# -- shares and bars, by hand ---------------------------------------------------------------------


def rows_of(rtn: float, clipped: float, ours: float, int8: float) -> list[dict[str, Any]]:
    base = torch.tensor([2.0, 3.0], dtype=torch.float64)
    apart = torch.tensor([-0.01, 0.01], dtype=torch.float64)
    rises = {("RTN", 4): rtn, ("RTN clipped", 4): clipped, ("GPTQ", 4): ours, ("RTN", 8): int8}
    return [gptq.row(*name, 64, 4.3125, base + rise + apart, base) for name, rise in rises.items()]


def test_a_row_is_what_its_losses_say() -> None:
    rtn = rows_of(0.3, 0.25, 0.06, 0.001)[0]
    assert (rtn["nll"], rtn["rise"]) == (pytest.approx(2.8), pytest.approx(0.3))
    assert rtn["perplexity"] == pytest.approx(exp(2.8)) and rtn["perplexity_rise"] == pytest.approx(exp(0.3) - 1)
    assert rtn["rise_error"] == pytest.approx(0.01)  # half the distance of two values


def test_bars_by_hand() -> None:
    found = gptq.judge(rows_of(0.3, 0.25, 0.06, 0.001))
    assert found["rows"][2]["removed"] == {"RTN": pytest.approx(0.8), "RTN clipped": pytest.approx(0.76)}
    assert [bar["value"] for bar in found["bars"]] == pytest.approx([0.8, 0.76, exp(0.06) - 1, exp(0.001) - 1])
    assert found["met"] and [bar["met"] for bar in found["bars"]] == [True] * 4
    found = gptq.judge(rows_of(0.3, 0.25, 0.1, 0.004))
    assert [bar["met"] for bar in found["bars"]] == [True, False, False, False] and not found["met"]


def test_nothing_can_be_removed_of_a_rise_that_is_none() -> None:
    found = gptq.judge(rows_of(0.015, 0.025, 0.0, 0.0))  # the standard error is 0.01
    assert found["rows"][2]["removed"] == {"RTN": None, "RTN clipped": pytest.approx(1.0)}
    assert [bar["met"] for bar in found["bars"][:2]] == [False, True]


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "group"), [("llama", 64), ("qwen3", 32), ("qwen2", 128)])
def test_bytes_are_those_of_the_file(family: str, group: int, checkpoint) -> None:
    """Of an exported checkpoint; its tables and norms are fp32 here, and the count is for 16 bits."""
    folder = quantized_folder(checkpoint(family), recipe_of(4, group, "rtn"))
    names = {"codes": (".qweight",), "scales and zeros": (".scales", ".qzeros")}
    found = dict.fromkeys(("codes", "scales and zeros", "tables", "others"), 0)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = next((part for part, ends in names.items() if name.endswith(ends)), "others")
            part = "tables" if name in ("model.embed_tokens.weight", "lm_head.weight") else part
            found[part] += 0 if name.endswith(".g_idx") else file.get_tensor(name).nbytes
    config = ModelConfig.from_folder(checkpoint(family))
    parts = gptq.weight_parts(config, 4, group)
    assert parts["attention"] + parts["mlp"] == found["codes"]
    assert parts["scales and zeros"] == found["scales and zeros"]
    assert 2 * parts["embedding and head"] == found["tables"] and 2 * parts["norms and biases"] == found["others"]
    checkpoint_ = QuantizedCheckpoint(folder)
    bits = [
        (checkpoint_.read(name).bits_per_weight(), checkpoint_.read(name).codes.numel()) for name in checkpoint_.names
    ]
    linear = parts["attention"] + parts["mlp"] + parts["scales and zeros"]
    assert 8 * linear == pytest.approx(sum(each * count for each, count in bits))


def test_unquantised_bytes_are_two_a_weight(checkpoint) -> None:
    for family in ("llama", "qwen3", "qwen2"):
        config = ModelConfig.from_folder(checkpoint(family))
        assert sum(gptq.weight_parts(config, 16).values()) == 2 * config.num_parameters


def test_an_int8_head_is_counted_as_it_is_loaded(checkpoint) -> None:
    config = ModelConfig.from_folder(checkpoint("qwen3"))
    kept = quantized_folder(checkpoint("qwen3"), recipe_of(4, 64, "rtn"))
    decoder = load_quantized(kept, "cpu", torch.float32, 32, int8_head=True)
    held = sum(weight.nbytes for weight in decoder.embed.parameters())
    assert gptq.weight_parts(config, 4, int8_tables=True)["embedding and head"] == held


# -- plain layers with the weights as they count --------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.inference_mode()
def test_a_filled_decoder_is_the_twin(family: str, checkpoint) -> None:
    folder = checkpoint(family)
    kept = quantized_folder(folder, recipe_of(4, 64))
    filled = load_decoder(folder, "cpu", torch.float32, 32)
    bits = gptq.fill(filled, gptq._kept(folder, 4, 64))
    twin = load_quantized(kept, "cpu", torch.float32, 32, twin=True)
    assert perplexity.logit_gap(filled, twin, TOKENS) == (0.0, 0.0, 1.0)
    config = ModelConfig.from_folder(folder)
    parts, plain = gptq.weight_parts(config, 4, 64), gptq.weight_parts(config, 16)
    assert bits == pytest.approx(16 * gptq._linear(parts) / gptq._linear(plain))


@torch.inference_mode()
def test_rounding_looks_at_one_group_at_a_time(checkpoint) -> None:
    """RTN on whole ranges, by the textbook: scale = (max - min) / 15, and no weight further off than half of it."""
    plain = load_decoder(checkpoint(), "cpu", torch.float32, 32)
    name, weight = next(iter(gptq._rounded(plain, Grid(4, 64))))
    before = plain.layers[0].qkv.weight[: weight.shape[0]]
    assert name == "model.layers.0.self_attn.q_proj"
    scale = (before.amax(1).clamp(min=0) - before.amin(1).clamp(max=0)) / 15
    assert torch.allclose(weight.scales[:, 0], scale, rtol=1 / 256)  # bf16 holds it
    assert ((weight.dequantized() - before).abs() <= 0.52 * scale[:, None]).all()


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(checkpoint, model_cache) -> dict[str, Any]:
    return gptq.gptq(gptq.Options(str(checkpoint()), rounds=1, fast=True, progress=False))


def test_the_result_is_plain_data_and_readable(result) -> None:
    assert json.loads(json.dumps(result)) == result
    text = run.text(result)
    assert max(map(len, text.splitlines())) <= 120
    for words in ("GPTQ removes", "int8 head", "whole model", "1 rows at", "a prompt of", "same best token"):
        assert words in text
    assert gptq.CAVEAT[:20] not in text  # it is of the default model's weights


def test_what_the_result_says_of_accuracy(result, checkpoint) -> None:
    found = result["accuracy"]
    tokens = perplexity.evaluation_pieces(None, 499, found["length"], found["pieces"])
    assert found["nll"] == pytest.approx(
        perplexity.nll(load_decoder(checkpoint(), "cpu", torch.float32, found["length"]), tokens)
    )
    assert [(row["method"], row["bits"]) for row in found["rows"]] == [
        *((method, 4) for method in gptq.METHODS),
        ("RTN", 8),
    ]
    for row in found["rows"]:
        assert row["rise"] == pytest.approx(row["nll"] - found["nll"])
    assert found["met"] == all(bar["met"] for bar in found["bars"])


def test_packed_layers_are_close_to_plain_ones(result) -> None:
    found = result["packed"]
    assert set(found["arms"]) == {"many", "few", "int8 head"}
    for gap in found["arms"].values():
        assert gap["nll"] == pytest.approx(found["twin_nll"], abs=0.01) and gap["same"] > 0.9
    assert found["arms"]["many"]["mean"] < found["arms"]["int8 head"]["mean"]


def test_speed_is_a_ratio_of_stage_4s_time(result) -> None:
    found = result["speed"]
    assert [cell["rows"] for cell in found["cells"]] == [1, 4]
    for cell in (*found["cells"], found["prompt"]):
        assert set(cell["ms"]) == set(gptq.ENGINES) and min(cell["ms"].values()) > 0
        assert cell["speed"]["5"]["median"] == pytest.approx(cell["ms"]["4"] / cell["ms"]["5"])
        assert cell["met"] == (cell["bar"] is None or cell["speed"]["5"]["median"] >= cell["bar"])
    assert found["cells"][0]["bar"] == gptq.SPEED_BARS[1]
    sizes = found["weight_bytes"]
    assert sizes["4"] > sizes["5"] > sizes["5, int8 head"]


def test_a_model_is_quantised_once(result, checkpoint) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.home().rglob(store.MANIFEST)}
    assert before
    gptq.accuracy(
        gptq.Options(fast=True, progress=False),
        checkpoint(),
        load_decoder(checkpoint(), "cpu", torch.float32, 24),
        TOKENS,
    )
    assert {path: path.stat().st_mtime_ns for path in store.home().rglob(store.MANIFEST)} == before


def test_a_quantised_model_is_refused(checkpoint) -> None:
    kept = quantized_folder(checkpoint(), recipe_of(4, 64, "rtn"))
    with pytest.raises(InvalidSetting, match="quantised already"):
        run.main(["--what", "gptq", "--model", str(kept), "--fast"])


def test_losses_are_of_every_token_but_the_first(checkpoint) -> None:
    """By hand, from the engine's own plain function."""
    llm = runs.build(checkpoint(), "0", 1, 32)
    logits = llm.logits(TOKENS[0].tolist())
    expected = float(F.cross_entropy(logits[:-1], TOKENS[0, 1:]))
    assert perplexity.nll(llm, TOKENS[:1]) == pytest.approx(expected, rel=1e-5)
