"""Rooflines and kernel bars: points against formulas, records told from toy runs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from stepengine.bench.records import idle_lines, newest_record, recorded_traces
from stepengine.core.plan import Chunk, StepPlan, StepRecord
from stepengine.errors import TraceError
from stepengine.trace import Trace, save
from stepengine.viz.figures import kernel_bars, record_roofline, roofline
from stepengine.viz.roofline import Point, record_label, record_points

HEADS, KV_HEADS, DIM, SIZE = 16, 8, 128, 2  # bytes an element


def _prefill(sequences: int, length: int, before: int, tflops: float) -> dict:
    pairs = sequences * sum(before + at + 1 for at in range(length))
    flops = 4 * HEADS * DIM * pairs
    ours = {"median_ms": flops / tflops / 1e9, "tflops": tflops, "of_matmul": tflops / 700}
    peer = {"median_ms": 1.0, "tflops": tflops / 1.5}
    case = {"sequences": sequences, "tokens": sequences * length, "before": before, "flops": flops}
    return {**case, "ours": ours, "flash_attention": peer, "speedup_over_flash_attention": 1.5}


def _decode(batch: int, context: int, gbs: float) -> dict:
    moved = batch * context * 2 * KV_HEADS * DIM * SIZE + 2 * batch * HEADS * DIM * SIZE
    timed = {"median_ms": moved / gbs / 1e6, "gbs": gbs, "of_copy": gbs / 4000}
    return {"batch": batch, "tokens": batch * context, "bytes": moved, "stage3": timed, "stage2": {"error": "no"}}


def made_up(**more) -> dict:
    """A record's form with values that a formula gives; no machine measured them."""
    prefill = {
        "error": {"relative_error": 0.001},
        "512": _prefill(4, 512, 0, 300.0),
        "64 after 256": _prefill(2, 64, 256, 90.0),
    }
    decode = {
        "error": {"relative_error": {}},
        "1 x 1024": _decode(1, 1024, 900.0),
        "32 x 512": _decode(32, 512, 3600.0),
    }
    ceilings = {"best": {"copy_gbs": 4000.0, "matmul_tflops": 700.0}}
    parts = {
        name: {"status": "ok", "results": r}
        for name, r in (("prefill", prefill), ("decode", decode), ("ceilings", ceilings))
    }
    machine = {"gpu": "A made-up GPU", "cpu": "a CPU"}
    record = {
        "what": "gpu suite",
        "smoke": False,
        "time": "2026-01-02T03:04:05+00:00",
        "machine": machine,
        "parts": parts,
    }
    return {**record, **more}


def test_points_of_a_record_have_the_kernels_flops_and_bytes():
    points = {point.name: point for point in record_points(made_up())}
    assert len(points) == 4
    q = HEADS * DIM * SIZE
    token = 2 * KV_HEADS * DIM * SIZE
    prefill = points["prefill 512"]
    assert prefill.bytes == pytest.approx(2048 * (2 * q + token))  # q, the result, each K and V once
    assert prefill.flops_per_s == pytest.approx(300e12)
    assert points["prefill 64 after 256"].bytes == pytest.approx(128 * 2 * q + (128 + 512) * token)
    decode = points["decode, stage 3: 32 × 512"]
    assert decode.flops == pytest.approx(4 * HEADS * DIM * 32 * 512)
    assert decode.bytes_per_s == pytest.approx(3600e9)


def test_the_roof_is_the_smaller_of_both_ceilings():
    points = [Point("a", 1e9, 1e9, 0.1), Point("b", 1e12, 1e9, 1.0)]
    figure = roofline(points, 2e10, 4e12, "here, today")
    roof = figure.data[0]
    for x, y in zip(roof.x, roof.y, strict=True):
        assert y == pytest.approx(min(x * 2e10, 4e12))
    assert roof.x[1] == pytest.approx(200)
    assert figure.layout.title.text == "a: 50 % of the bandwidth, 0.2 % of the FLOP/s"
    assert "here, today" in figure.layout.title.subtitle.text and "b: 1e+03 FLOP/byte" in figure.layout.meta["alt"]
    drawn = figure.data[1]
    assert list(drawn.x) == [1, 1000] and np.allclose(drawn.y, [1e10, 1e12])
    low, high = figure.layout.yaxis.range
    assert low < 10 and high > np.log10(4e12)


@pytest.mark.parametrize("draw", [record_roofline, kernel_bars])
def test_a_record_s_figures_name_its_machine_and_a_toy_run_is_none(draw):
    figure = draw(made_up())
    assert "A made-up GPU, 2026-01-02" in figure.layout.title.subtitle.text
    assert "TOY" not in figure.to_json()
    toy = draw(made_up(smoke=True))
    assert toy.layout.title.text.startswith("TOY RUN, not a GPU's result")
    assert "TOY RUN on a CPU (a CPU), 2026-01-02" in toy.layout.title.subtitle.text


def test_bars_hold_the_record_s_rates_and_leave_errors_out():
    figure = kernel_bars(made_up())
    bars = {bar.name: list(bar.y) for bar in figure.data if bar.xaxis != "x2"}
    assert bars == {"stage 3": [300.0, 90.0], "SDPA flash": [200.0, 60.0]}
    assert {bar.name: list(bar.y) for bar in figure.data if bar.xaxis == "x2"} == {"stage 3": [900.0, 3600.0]}
    assert figure.layout.title.text == "Prefill 512: 1.50× SDPA's flash; decode up to 90 % of the copy bandwidth"
    lines = sorted(shape.y0 for shape in figure.layout.shapes)
    assert lines == [700.0, 4000.0]


@pytest.mark.parametrize("missing", ["prefill", "decode"])
@pytest.mark.parametrize("draw", [record_roofline, kernel_bars])
def test_half_a_record_is_refused(draw, missing):
    record = copy.deepcopy(made_up())
    del record["parts"][missing]
    with pytest.raises(TraceError, match="run the whole GPU suite"):
        draw(record)


def test_a_roofline_needs_points_and_ceilings():
    for points, peak in (([], 1.0), ([Point("a", 1, 1, 1)], 0.0)):
        with pytest.raises(TraceError, match="at least one point and two ceilings"):
            roofline(points, 1.0, peak)


def test_the_newest_record_is_found_and_toys_are_passed_over(tmp_path: Path):
    assert newest_record(tmp_path) is None
    for name, record in (
        ("new", made_up(time="2026-03-01T00:00:00+00:00")),
        ("old", made_up(time="2026-02-01T00:00:00+00:00")),
        ("toy", made_up(time="2026-04-01T00:00:00+00:00", smoke=True)),
        ("other", {"what": "something else", "time": "2027"}),
        ("list", [1]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "broken.json").write_text('{"what": "gpu su')
    found, toy = newest_record(tmp_path), newest_record(tmp_path, smoke=True)
    assert found is not None and found["time"].startswith("2026-03")
    assert toy is not None and record_label(toy).startswith("TOY RUN")


def test_traces_of_toy_runs_are_left_out(tmp_path: Path):
    for name, meta in (
        ("stage3", {"machine": {"gpu": "A made-up GPU"}}),
        ("toy", {"machine": {"gpu": None}, "note": "toy size"}),
        ("plain", {}),
    ):
        trace = Trace(meta)
        trace.append(StepRecord(StepPlan(0, (Chunk(0, 0, 1),)), (5,)))
        save(trace, tmp_path / f"{name}.jsonl.gz")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no trace")
    assert list(recorded_traces(tmp_path)) == ["stage3"]


def test_idle_times_are_told_with_their_machine():
    record = made_up()
    assert idle_lines(record) == ["A made-up GPU, 2026-01-02"]
    measured = {"wall_us": 1234.4, "host_us": 567.0, "device_us": 1000.0, "idle": 0.19}
    cases = {"eager, 1": measured, "graphs, 1": {"note": "not there yet"}, "both, 256": {**measured, "idle": None}}
    record["parts"]["idle/stage3"] = {"status": "ok", "results": cases}
    assert idle_lines(record)[1:] == [
        "eager, batch of 1: 1,234 µs a step, the host works 567 µs, the device 1,000 µs: idle 19.0%",
        "both, batch of 256: 1,234 µs a step, the host works 567 µs",
    ]
    assert idle_lines(made_up(smoke=True))[0].startswith("TOY RUN")
