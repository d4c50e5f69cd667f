"""The ledger: every claim is there and has evidence that runs, and its card says what was measured, not more."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepengine.bench import ledger as books
from stepengine.bench.evidence import attention, batching, links, memory, prompts, weights
from stepengine.bench.evidence.common import Evidence, Number, Workbench
from stepengine.bench.ledger import CLAIMS, GROUPS, NO_RECORD, Card, ledger
from stepengine.bench.records import newest_record
from stepengine.contracts.ledger_exercises import check_all_reduce_ms, played_ring
from stepengine.errors import InvalidSetting, TraceError
from stepengine.viz.digest import digest
from stepengine.viz.ledger import Cards, Range, claimed_ranges

ROOT = Path(__file__).resolve().parents[2]
KEYS = [f"C{number}" for number in range(1, 22)]
ON_TIME = {"C17", "C9", "C16"}  # of a tiny random model neither speed nor perplexity need be what a real one's are


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(model="tiny-random", pieces=1, rounds=1, length=64)


@pytest.fixture(scope="module")
def cards(bench: Workbench) -> dict[str, Card]:
    return {card.claim.key: card for card in ledger(bench)}


def test_all_claims_are_there() -> None:
    assert list(CLAIMS) == KEYS
    assert {claim.group for claim in CLAIMS.values()} == set(GROUPS)


@pytest.mark.parametrize("key", KEYS)
def test_every_text_says_something_and_its_notebook_is_there(key: str) -> None:
    claim = CLAIMS[key]
    assert claim.key == key and len(claim.says) > 15 and len(claim.when) > 30
    assert claim.verdict in (books.HOLDS, books.WHEN, books.NOT)
    book = ROOT / "notebooks" / f"{claim.book}.ipynb"
    tags = {tag for cell in json.loads(book.read_text())["cells"] for tag in cell["metadata"].get("tags", [])}
    assert key in tags, f"{claim.book} does not show {key}"


@pytest.mark.parametrize("key", KEYS)
def test_every_claim_has_evidence_that_runs(cards: dict[str, Card], key: str) -> None:
    card = cards[key]
    assert card.evidence.how and card.evidence.numbers
    assert len(set(card.labels)) == len(card.labels), "two numbers of one name"
    assert card.evidence.agrees or key in ON_TIME
    assert all(number.value == number.value for number in card.evidence.numbers)
    lines = card.measured
    assert all(("[wall " in line) == number.clock for line, number in zip(lines, card.evidence.numbers, strict=True))


def test_counts_are_the_same_again(cards: dict[str, Card]) -> None:
    again = Workbench(model="tiny-random", pieces=1, rounds=1, length=64)
    for card in ledger(again, ["C2", "C5", "C13", "C14", "C15", "C18"]):
        assert card.evidence == cards[card.claim.key].evidence


def test_counts_are_those_of_the_worked_examples(cards: dict[str, Card]) -> None:
    """Numbers that can be had with pencil and paper."""
    value = {key: card.evidence.value for key, card in cards.items()}
    assert value["C3"]("50 tokens in blocks of 16, empty") == 100 * 14 / 64
    assert value["C21"]("paging, K/V reserved") == 4096 / 640
    assert value["C1"]("Llama-3-8B, hidden_size over truth") == 4096 / (8 * 128)
    assert value["C5"]("long prompt's first token, chunks of 256, iteration") == len([256, 256, 256, 232])
    assert value["C15"]("copies with n = 3, a prompt of 50") == 2
    assert value["C2"]("with a cache, pairs scored") == (96 * 97) / (48 * 49)


def test_the_bound_is_the_bound(cards: dict[str, Card]) -> None:
    """64 slots of exponential lengths: the harmonic number; uniform ones: (low + range x 64 / 65) / mean."""
    value = cards["C4"].evidence.value
    assert value("exponential, mean 200, bound") == pytest.approx(sum(1 / i for i in range(1, 65)), rel=0.02)
    assert value("uniform 100..1024, bound") == pytest.approx((100 + 924 * 64 / 65) / 562, rel=0.02)


def test_schedulers_alone_take_the_steps_of_the_formula() -> None:
    from stepengine.bench.batching import continuous_steps, static_steps
    from stepengine.stage0_naive.scheduler import StaticScheduler
    from stepengine.stage1_kvcache.scheduler import ContinuousScheduler

    lengths = [3, 12, 5, 8, 4, 10, 2, 6]
    assert batching.decode_steps(StaticScheduler, lengths, 4) == static_steps(lengths, 4) == 20
    assert batching.decode_steps(ContinuousScheduler, lengths, 4) == continuous_steps(lengths, 4) == 13


def test_no_number_is_typed_in() -> None:
    """In the evidence a `Number`'s value is computed: never a literal, nor a sign before one."""
    found = 0
    for module in (attention, batching, links, memory, prompts, weights, books):
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Number":
                found += 1
                names = [part for part in ast.walk(node.args[1]) if isinstance(part, ast.Name | ast.Attribute)]
                assert names, f"{module.__name__}, line {node.lineno}: {ast.unparse(node)}"
    assert found > 50


def test_another_measurement_makes_another_card(cards: dict[str, Card]) -> None:
    card = cards["C8"]
    first = card.evidence.numbers[0]
    changed = replace(card.evidence, numbers=(first._replace(value=first.value * 1.01), *card.evidence.numbers[1:]))
    other = replace(card, evidence=changed)
    assert repr(Cards("x", [card.as_row()])) != repr(Cards("x", [other.as_row()]))
    assert Cards("x", [card.as_row()])._repr_html_() != Cards("x", [other.as_row()])._repr_html_()
    figures = [digest(claimed_ranges([each.range()])) for each in (card, other)]  # type: ignore[list-item]
    assert figures[0] != figures[1]


def test_a_run_that_finds_otherwise_says_so(cards: dict[str, Card]) -> None:
    card = cards["C14"]
    assert card.verdict == "holds"
    doubted = replace(card, evidence=replace(card.evidence, agrees=False))
    assert "found otherwise" in doubted.verdict and "found otherwise" in repr(Cards("x", [doubted.as_row()]))


def test_a_leak_of_copies_is_noticed(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """C15's evidence comes from the engine: a pool that shares wrongly changes its verdict."""
    from stepengine.stage4_chunked_prefix.cache import PrefixCache

    monkeypatch.setattr(PrefixCache, "match", lambda self, request: 0)
    assert not memory.full_blocks(bench).agrees


def test_a_quantiser_whose_rows_mix_is_noticed(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    own = weights.quantize

    def mixing(weight: Any, *rest: Any) -> Any:
        return own(weight + weight.mean(0), *rest)

    monkeypatch.setattr(weights, "quantize", mixing)
    assert not weights.columns_not_rows(bench).agrees


# --- a GPU's record ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A smoke run's, of the parts that the ledger reads."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "stepengine.bench.gpu", "--smoke", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    parts = "ceilings,chunked,prefix,quantized,prefill,decode,idle/stage3"
    ran = subprocess.run([*command, "--only", parts], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = newest_record(folder, smoke=True)
    assert found is not None
    return found


NEED_A_GPU = [key for key, claim in CLAIMS.items() if claim.on_gpu is not None]


def test_without_a_record_the_gpu_is_called_missing(cards: dict[str, Card]) -> None:
    assert set(NEED_A_GPU) == {"C5", "C6", "C7", "C13", "C17", "C19"}
    for key, card in cards.items():
        assert card.gpu_lines == ([NO_RECORD] if key in NEED_A_GPU else [])


@pytest.mark.skipif(sys.platform != "linux", reason="the suite's processes are forked on Linux only")
def test_a_record_fills_the_claims_that_need_a_gpu(record: dict[str, Any], cards: dict[str, Card]) -> None:
    pytest.importorskip("triton")
    bench = Workbench(model="tiny-random", record=record)
    for key in NEED_A_GPU:
        claim = CLAIMS[key]
        numbers = claim.on_gpu(bench)  # type: ignore[misc]
        assert numbers, f"{key} finds nothing in a record"
        card = replace(cards[key], gpu=numbers, record=books.record_label(record))
        assert all("TOY RUN" in line for line in card.gpu_lines) and NO_RECORD not in card.gpu_lines
    gaps = record["parts"]["chunked"]["results"]
    ours = min(entry["itl_ms"]["p99"] for name, entry in gaps.items() if name.startswith("budget"))
    (number,) = CLAIMS["C13"].on_gpu(bench)  # type: ignore[misc]
    assert number.value == pytest.approx(gaps["prefill first"]["itl_ms"]["p99"] / ours)
    speed = record["parts"]["quantized"]["results"]["1"]["speed"]["5"]["median"]
    assert speed in [number.value for number in CLAIMS["C17"].on_gpu(bench)]  # type: ignore[misc]


def test_a_record_with_nothing_in_it_fills_nothing() -> None:
    for holed in ({}, {"parts": {}}, {"parts": {"chunked": {"status": "failed"}, "prefill": {"results": {"16": {}}}}}):
        for key in NEED_A_GPU:
            assert CLAIMS[key].on_gpu(Workbench(record=holed)) == ()  # type: ignore[misc]


# --- what is asked for, what is drawn ----------------------------------------------------------------------------


def test_some_claims_alone(bench: Workbench) -> None:
    heard: list[str] = []
    assert [card.claim.key for card in ledger(bench, ["C20", "C1"], heard.append)] == ["C1", "C20"] == heard
    with pytest.raises(InvalidSetting, match="no claim 'C22'; they are called C1, C2"):
        ledger(bench, ["C22"])


def _card(*numbers: Number) -> Card:
    return Card(CLAIMS["C1"], Evidence("by hand", numbers, True))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number("a", 3.0, "times"), "a: 3 times"),
        (Number("a", 1024, "tokens"), "a: 1,024 tokens"),
        (Number("a", 3.456, "times"), "a: 3.46 times"),
        (Number("a", 0), "a: 0"),
        (Number("a", 12.3456, "ms", 2, True), "a: [wall 12 ms]"),
    ],
)
def test_numbers_read_well(number: Number, text: str) -> None:
    assert _card(number).measured == [text]


def test_cards_as_text_and_as_markup() -> None:
    row = _card(Number("x < y", 2.5, "times", 2, True)).as_row() | {"gpu": ["y: 3 times (somewhere)"]}
    text, markup = repr(Cards("A & B", [row])), Cards("A & B", [row])._repr_html_()
    assert "      x < y: [wall 2.5 times]" in text and "      GPU: y: 3 times" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "x &lt; y: <b><u>2.5 times</u></b>" in markup and "<caption>A &amp; B</caption>" in markup
    assert "href='01a_kv_cache.ipynb'" in markup and "[wall" not in markup
    assert not re.search(r"<script|https?://|src=", markup)


def test_the_figure_counts_what_lies_within() -> None:
    ranges = [Range("a", 2, 4, {"in": 3.0, "out": 1.0}), Range("b", 5, 5, {"near": 5.2})]
    figure = claimed_ranges(ranges)
    assert figure.layout.title.text.startswith("2 of our 3 ratios")
    assert [trace.x[0] for trace in figure.data] == [3.0, 1.0, 5.2]
    assert [trace.marker.color != "#FFFFFF" for trace in figure.data] == [True, False, True]
    assert "a: claimed 2× to 4×, ours in 3×, out 1×" in figure.layout.meta["alt"]
    bars = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
    assert bars[0] == (2, 4) and bars[1][0] < 5 < bars[1][1]
    for bad in ([], [Range("a", 2, 4, {"x": 0.0})]):
        with pytest.raises(TraceError, match="above 0"):
            claimed_ranges(bad)


# --- the exercise ------------------------------------------------------------------------------------------------


def test_the_ring_that_is_played_sends_what_the_paper_says() -> None:
    for gpus in (1, 2, 3, 4, 8):
        assert played_ring(gpus, 24) == 2 * (gpus - 1) * 24 // gpus


def test_the_exercise_accepts_our_own_and_a_reader_s() -> None:
    assert check_all_reduce_ms(links.all_reduce_ms).ok
    assert check_all_reduce_ms(lambda t, h, n, p, b: 8 * n * t * h * (p - 1) / p / (b * 1e6)).ok


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *_: None,
        lambda *_: "fast",
        lambda t, h, n, p, b: links.all_reduce_ms(t, h, n, p, b) / 2,  # one a layer
        lambda t, h, n, p, b: links.all_reduce_ms(t, h, n, p, b) / 1e3,  # seconds
        lambda t, h, n, p, b: 8 * n * t * h * (p - 1) / (b * 1e6),  # everybody to everybody
        lambda t, h, n, p, b: 8 * n * t * h / 2 / (b * 1e6),  # right for two only
        lambda t, h, n, p, b: 1 / 0,
        lambda t: t,
    ],
)
def test_the_exercise_refuses_what_is_wrong(wrong: Any) -> None:
    report = check_all_reduce_ms(wrong)
    assert not report.ok and report.failed[0].hint and "all_reduce_ms(" in report.failed[0].example
