"""Figures of flash attention: what they draw is what was given, and their words are true of it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from stepengine.errors import InvalidSetting
from stepengine.viz.figures import digest, hbm_traffic, kernel_loads, tile_walk
from stepengine.viz.tiles import SETTLED, Seen


def walked(rows: int, columns: int, tile: int, seed: int = 0) -> list[Seen]:
    """A causal walk, each state computed from all scores up to there at once."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    values = torch.randn(columns, 4, generator=generator, dtype=torch.float64)
    ahead = columns - rows
    scores = scores.masked_fill(torch.ones_like(scores).triu(ahead + 1).bool(), -math.inf)
    final = torch.softmax(scores * math.log(2), 1) @ values
    walk = []
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        for begin in range(0, ahead + last, tile):
            end = min(begin + tile, ahead + last)
            part = scores[first:last, :end]
            top = part.amax(1)
            weights = torch.exp2(part - top[:, None])
            out = weights @ values[:end] / weights.sum(1, keepdim=True)
            error = (out - final[first:last]).abs().amax(1)
            walk.append(Seen((first, last), (begin, end), top.tolist(), weights.sum(1).tolist(), error.tolist()))
    return walk


def shown(figure, place: int) -> dict[str, dict]:
    """What each trace shows at a place of the slider."""
    frame = figure.frames[place]
    return {figure.data[at].name: data for at, data in zip(frame.traces, frame.data, strict=True)}


@pytest.mark.parametrize(("rows", "columns", "tile"), [(16, 16, 4), (10, 10, 4), (8, 20, 4), (1, 12, 4), (4, 4, 4)])
def test_at_each_place_every_tile_is_done_now_or_to_come(rows, columns, tile):
    walk = walked(rows, columns, tile)
    figure = tile_walk(walk)
    assert len(figure.frames) == len(walk) == len(figure.layout.sliders[0].steps)
    for place in range(len(walk)):
        data = shown(figure, place)
        assert [len(data[name].x) for name in ("done", "now", "to come")] == [place, 1, len(walk) - place - 1]
        (base,), (wide,), (y,), (high,) = (data["now"][key] for key in ("base", "x", "y", "width"))
        assert (base + 0.5, base + 0.5 + wide) == walk[place].keys
        assert (y - (high - 1) / 2, y + (high + 1) / 2) == walk[place].queries


def test_numbers_of_a_row_are_those_of_its_last_tile():
    walk = walked(10, 14, 4)
    figure = tile_walk(walk)
    for place in range(len(walk)):
        data = shown(figure, place)
        latest: dict[int, tuple[float, float, float]] = {}
        for seen in walk[: place + 1]:
            for at, row in enumerate(range(*seen.queries)):
                latest[row] = seen.top[at], seen.total[at], seen.error[at]
        for name, number in (("maximum", 0), ("sum", 1)):
            assert dict(zip(data[name].y, data[name].x, strict=True)) == pytest.approx(
                {row: found[number] for row, found in latest.items()}, abs=1e-4
            )
        off = {row: found[2] for row, found in latest.items() if found[2] >= SETTLED}
        assert dict(zip(data["error"].y, data["error"].x, strict=True)) == pytest.approx(off, abs=1e-4)
        assert set(data["settled"].y) == set(latest) - set(off)
    assert set(shown(figure, len(walk) - 1)["settled"].y) == set(range(10))


def test_the_words_say_what_rises_and_what_is_final():
    walk = [
        Seen((0, 2), (0, 2), [1.0, 3.0], [1.0, 1.5], [0.5, 0.2]),
        Seen((0, 2), (2, 4), [2.0, 3.0], [1.5, 2.0], [0.0, 0.1]),
        Seen((0, 2), (4, 6), [2.0, 3.0], [1.6, 2.1], [0.0, 0.0]),
    ]
    figure = tile_walk(walk)
    titles = [(frame.layout.title.text, frame.layout.title.subtitle.text) for frame in figure.frames]
    assert titles == [
        (
            "Tile 1 of 3: queries 0 to 1 meet keys 0 to 1",
            "their first tile: nothing to correct yet · 0 of the 2 rows are final",
        ),
        (
            "Tile 2 of 3: queries 0 to 1 meet keys 2 to 3",
            "a larger score in 1 of 2 rows: what they had summed shrinks first · 1 of the 2 rows are final",
        ),
        (
            "Tile 3 of 3: queries 0 to 1 meet keys 4 to 5",
            "no score is larger than before: the weights are just added · 2 of the 2 rows are final",
        ),
    ]
    assert figure.layout.title.text == titles[1][0] and figure.layout.sliders[0].active == 1
    assert tile_walk(walk, 0).layout.title.text == titles[0][0]
    assert "Scores of 2 queries and 6 keys, 3 tiles." in figure.layout.meta["alt"]


def test_a_changed_number_changes_the_digest_and_figures_stay_small():
    walk = walked(16, 16, 4)
    changed = [*walk[:-1], walk[-1]._replace(top=[walk[-1].top[0] * 1.001, *walk[-1].top[1:]])]
    assert digest(tile_walk(walk)) == digest(tile_walk(walk)) != digest(tile_walk(changed))
    assert len(json.dumps(json.loads(tile_walk(walk).to_json()))) < 60_000


def test_a_walk_that_cannot_be_drawn_is_refused():
    with pytest.raises(InvalidSetting, match="holds no tiles"):
        tile_walk([])
    with pytest.raises(InvalidSetting, match="55 tiles and 40 rows; at most 40 and 32"):
        tile_walk(walked(40, 40, 4))
    with pytest.raises(InvalidSetting, match="start is 10; the walk has the places 0 to 9"):
        tile_walk(walked(16, 16, 4), 10)


def test_traffic_draws_what_was_counted_and_names_the_factor():
    moved = {"plain": {64: 1000, 128: 5000}, "tiles": {64: 500, 128: 2000, 256: 9000}}
    figure = hbm_traffic(moved, {"tiles": {64: 500}}, "one head")
    traces = {trace.name: trace for trace in figure.data}
    for name, points in moved.items():
        assert dict(zip(traces[name].x.tolist(), traces[name].y.tolist(), strict=True)) == points
    assert (list(traces["tiles: kernels"].x), list(traces["tiles: kernels"].y)) == ([64], [500])
    assert "plain: kernels" not in traces
    assert figure.layout.title.text == "At 128 tokens, plain moves 2.5 times the bytes of tiles"
    assert "rings" in figure.layout.title.subtitle.text
    assert "rings" not in hbm_traffic(moved).layout.title.subtitle.text
    assert "256 tokens 9,000 bytes" in figure.layout.meta["alt"]


@pytest.mark.parametrize("moved", [{"a": {1: 1}}, {"a": {1: 1}, "b": {}}, {"a": {1: 1}, "b": {2: 2}}, {}])
def test_traffic_without_a_comparison_is_refused(moved):
    with pytest.raises(InvalidSetting):
        hbm_traffic(moved)


def access(program, store, tensor, *runs, launch=0):
    return SimpleNamespace(launch=launch, program=program, store=store, tensor=tensor, runs=runs)


SIZES = {"q": (32, 4), "k": (64, 4), "out": (32, 4), "kv_lens": (1, 4), "scores": (16, 4)}
FLASH = SimpleNamespace(
    launches=[("_flash_kernel", 2)],
    tensors=SIZES,
    accesses=[
        access(0, False, "kv_lens", (0, 1)),
        access(0, False, "q", (0, 16)),
        access(0, False, "k", (0, 16), (32, 48)),
        access(0, True, "out", (0, 16)),
        access(1, False, "k", (0, 64)),
        access(1, True, "out", (16, 32)),
    ],
)


def test_each_load_and_store_is_a_bar_at_its_place():
    figure = kernel_loads(FLASH, row=16)
    traces = {trace.name: trace for trace in figure.data}
    bars = traces["k: loads"]
    assert bars.x.tolist() == [2, 2, 4]
    scale = bars.y[2] / 64  # units an element: the whole of k
    assert bars.y.tolist() == pytest.approx([16 * scale, 16 * scale, 64 * scale])
    assert bars.base.tolist() == pytest.approx([bars.base[2], bars.base[2] + 32 * scale, bars.base[2]])
    assert traces["out: stores"].x.tolist() == traces["out: marks"].x.tolist() == [3, 5]
    assert "q: stores" not in traces and not any("scores" in name for name in traces)
    ends = [float(max(trace.base + trace.y)) for trace in (traces["q: loads"], bars, traces["out: stores"])]
    starts = [float(min(trace.base)) for trace in (traces["q: loads"], bars, traces["out: stores"])]
    assert ends[0] <= starts[1] and ends[1] <= starts[2], "no tensor lies on another"


def test_its_words_count():
    figure = kernel_loads(FLASH, row=16)
    assert figure.layout.title.text == "Keys and values are read at most twice; no score is written"
    assert figure.layout.title.subtitle.text.startswith(f"2 programs · {4 * (16 + 96 + 32)} bytes of data")
    assert "6 loads and stores of 2 programs" in figure.layout.meta["alt"] and "k: 2 loads" in figure.layout.meta["alt"]
    texts = [note.text for note in figure.layout.annotations]
    assert f"{96 * 4} B" in texts and "<b>flash</b>" in texts and "program 1" in texts
    more = SimpleNamespace(
        launches=[("_a_kernel", 1), ("_b_kernel", 1)],
        tensors=SIZES,
        accesses=[access(0, True, "scores", (0, 16)), access(0, False, "scores", (0, 16), launch=1),
                  access(0, True, "out", (0, 32), launch=1)],
    )  # fmt: skip
    figure = kernel_loads(more, row=16)
    assert figure.layout.title.text.endswith("scores and out are written")
    assert figure.layout.title.subtitle.text.startswith("2 kernels, 2 programs")


def test_a_record_of_nothing_is_refused():
    with pytest.raises(InvalidSetting, match="no loads and no stores"):
        kernel_loads(SimpleNamespace(launches=[], tensors={}, accesses=[]), row=16)


def test_a_changed_access_changes_the_digest():
    moved = SimpleNamespace(**{**vars(FLASH), "accesses": [*FLASH.accesses[:-1], access(1, True, "out", (15, 31))]})
    assert digest(kernel_loads(FLASH, 16)) != digest(kernel_loads(moved, 16))
