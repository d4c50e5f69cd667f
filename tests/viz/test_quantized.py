"""Figures of quantisation: drawn data against brute force and a toy GPTQ, titles against numbers counted by hand."""

import json

import numpy as np
import pytest

from stepengine.errors import InvalidSetting
from stepengine.viz.figures import (
    digest,
    error_fill,
    hessian,
    int4_speed,
    on_grid,
    perplexity,
    weight_bytes,
    weight_memory,
)
from stepengine.viz.template import contrast


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def toy(rows=6, width=16, every=4, group=8, most=15, seed=3):
    """RTN and GPTQ of a small layer with correlated inputs: the keywords of `error_fill`."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(200, 5)) @ random.normal(size=(5, width)) + 0.3 * random.normal(size=(200, width))
    weight = random.normal(size=(rows, width))
    parts = [weight[:, at : at + group] for at in range(0, width, group)]
    low, high = (np.repeat(np.stack([pick(p, 1) for p in parts], 1), group, 1) for pick in (np.min, np.max))
    scale = (high - low) / most
    gram = inputs.T @ inputs
    factor = np.linalg.cholesky(np.linalg.inv(gram + 0.01 * np.mean(np.diag(gram)) * np.eye(width))).T
    rtn, gptq = weight.copy(), weight.copy()
    seen = {"rtn": [], "gptq": [], "rtn_output": [], "gptq_output": [], "columns": list(range(0, width + 1, every))}
    for k in range(width + 1):
        if k in seen["columns"]:
            for name, now in (("rtn", rtn), ("gptq", gptq)):
                seen[name].append((now - weight) / scale)
                seen[f"{name}_output"].append(float((((now - weight) @ inputs.T) ** 2).sum()))
        if k < width:
            for now in (rtn, gptq):
                code = np.clip(np.round((now[:, k] - low[:, k]) / scale[:, k]), 0, most)
                error = now[:, k] - (low[:, k] + code * scale[:, k])
                now[:, k] -= error
                if now is gptq:
                    now[:, k + 1 :] -= np.outer(error / factor[k, k], factor[k, k + 1 :])
    return seen


def measured(method, bits, group_size, bits_per_weight, value):
    return {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "bits_per_weight": bits_per_weight,
        "perplexity": value,
    }


POINTS = [
    measured("RTN", 4, 64, 4.3, 11.0),
    measured("GPTQ", 4, 64, 4.3, 10.25),
    measured("RTN", 4, -1, 4.0, 11.5),
    measured("GPTQ", 4, 32, 4.6, 10.2),
]
MODEL = [
    {"name": "bf16", "parts": {"embedding and head": 400e6, "attention": 200e6, "mlp": 1000e6, "norms": 1e6}},
    {
        "name": "int4",
        "parts": {
            "embedding and head": 400e6,
            "attention": 50e6,
            "mlp": 250e6,
            "norms": 1e6,
            "scales and zeros": 20e6,
        },
    },
]
MEMORY = [
    {"model": f"{n}B", "bytes": {name: n * 1e9 * bits / 8 for name, bits in (("FP16", 16), ("INT8", 8), ("INT4", 4))}}
    for n in (7, 175)
]


def speeds(*ratios, spread=0.05, path="int4"):
    return [
        {"batch": 2**i, "ratio": r, "low": r - spread, "high": r + 2 * spread, "path": path}
        for i, r in enumerate(ratios)
    ]


# --- one group -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "zero"), [(4, 8), (4, 3), (3, 4), (2, 1), (8, 128)])
def test_every_weight_goes_to_the_nearest_level(bits, zero):
    scale = 0.01
    levels = [(code - zero) * scale for code in range(2**bits)]
    weights = np.random.default_rng(bits).uniform(levels[0] - 0.02, levels[-1] + 0.02, 64)
    weights[7], weights[50] = levels[0] - 0.02, levels[-1] + 0.013
    figure = on_grid(weights, scale, zero, bits)
    nearest = [min(levels, key=lambda level, w=w: abs(level - w)) for w in weights]
    assert np.allclose(named(figure, "after").y, nearest, atol=1e-7)
    assert np.allclose(named(figure, "before").y, weights, atol=1e-7)
    far = [abs(w - level) > scale / 2 + 1e-9 for w, level in zip(weights, nearest, strict=True)]
    assert 0 < sum(far) < 64
    for name, these in (("error", [not f for f in far]), ("error, beyond", far)):
        segments = np.asarray(named(figure, name).y).reshape(-1, 3)
        assert np.allclose(segments[:, 0], weights[these], atol=1e-7)
        assert np.allclose(segments[:, 1], np.array(nearest)[these], atol=1e-7)
    assert figure.layout.title.text.startswith(f"64 weights on {2**bits} levels: {sum(far)} beyond the ends, ")
    drawn = np.asarray(figure.layout.yaxis.tickvals)
    assert len(drawn) == min(16, 2**bits) and np.allclose(np.diff(drawn), scale * max(1, 2**bits // 16))


def test_the_title_of_a_group_states_the_bound():
    weights = np.linspace(-0.03, 0.03, 7) + 0.001
    figure = on_grid(weights, 0.0082, 8, 4)
    assert figure.layout.title.text == "7 weights on 16 levels: no error above 0.0041, half a step"
    assert all(trace.name != "error, beyond" for trace in figure.data)
    figure = on_grid([0.0, 0.01, 0.1], 0.01, 0, 2)
    assert figure.layout.title.text == "3 weights on 4 levels: 1 beyond the ends, off by 0.07, 7 steps"
    assert named(figure, "before").text[2] == "weight 2: 0.1 becomes 0.03, code 3"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": np.zeros((2, 4))}, r"got the shape \(2, 4\)"),
        ({"weights": np.zeros(97)}, "1 to 96 finite weights"),
        ({"weights": [float("nan")]}, "finite weights"),
        ({"scale": 0.0}, "got scale 0 and 4 bits"),
        ({"bits": 9}, "1 to 8 bits; it got scale 1 and 9 bits"),
    ],
)
def test_a_group_that_is_none_is_refused(change, said):
    with pytest.raises(InvalidSetting, match=said):
        on_grid(**{"weights": [0.5], "scale": 1.0, "zero": 0, "bits": 4} | change)


# --- a layer, column by column ---------------------------------------------------------------------------------------


def test_at_each_place_the_picture_is_the_snapshot():
    """Composed as a reader sees it: rounded columns, over them what is to come, over that the cover."""
    layer = toy()
    figure = error_fill(**layer)
    assert [frame.name for frame in figure.frames] == [str(column) for column in layer["columns"]]
    assert [step.label for step in figure.layout.sliders[0].steps] == [frame.name for frame in figure.frames]
    width = layer["columns"][-1]
    for s, (frame, column) in enumerate(zip(figure.frames, layer["columns"], strict=True)):
        data = {figure.data[at].name: trace for at, trace in zip(frame.traces, frame.data, strict=True)}
        seen = np.array(named(figure, "GPTQ").z)
        if column < width:
            ahead = np.asarray(data["GPTQ, to come"].z)
            assert (data["GPTQ, to come"].x0, ahead.shape[1]) == (column, width - column)
            seen[:, column:] = ahead
        assert np.allclose(seen, layer["gptq"][s], atol=6e-4)
        seen = np.array(named(figure, "RTN").z)
        cover = data["RTN, to come: hatching"]
        assert (cover.base[0] + 0.5, cover.x[0]) == (column, width - column)
        seen[:, column:] = 0
        assert np.allclose(seen, layer["rtn"][s], atol=6e-4)
        assert set(data["GPTQ, frontier"].x) == set(data["RTN, frontier"].x) == {column - 0.5}
        for name in ("RTN", "GPTQ"):
            outputs = layer[f"{name.lower()}_output"]
            assert np.allclose(data[f"{name}, output"].y, outputs[: s + 1])
            assert list(data[f"{name}, output"].x) == layer["columns"][: s + 1]
        assert np.allclose(data["now"].y, [layer["rtn_output"][s], layer["gptq_output"][s]])


def test_it_opens_at_the_end_with_the_finding():
    layer = toy()
    rtn, gptq = layer["rtn"][-1], layer["gptq"][-1]
    times = layer["rtn_output"][-1] / layer["gptq_output"][-1]
    assert times > 1.5 and np.square(gptq).mean() > np.square(rtn).mean(), "the toy shows what the figure is for"
    figure = error_fill(**layer)
    assert (
        figure.layout.title.text == f"GPTQ's weights end further off, yet its output error is {times:.1f} times smaller"
    )
    assert figure.layout.title.subtitle.text == (
        f"from the original at most {abs(rtn).max():.2f} steps with RTN, {abs(gptq).max():.2f} with GPTQ · "
        f"root mean square {np.sqrt(np.square(rtn).mean()):.2f} and {np.sqrt(np.square(gptq).mean()):.2f}"
    )
    assert abs(rtn).max() <= 0.5 + 1e-9 and np.abs(named(figure, "RTN").z).max() <= 0.5
    assert figure.layout.sliders[0].active == len(layer["columns"]) - 1
    scale = figure.layout.coloraxis
    assert scale.cmin == -scale.cmax and scale.colorbar.title.text == "steps of the grid"
    middle = error_fill(**layer, shown=2)
    assert middle.layout.title.text.startswith("8 of 16 columns rounded: output error ")
    assert f"by up to {abs(layer['gptq'][2][:, 8:]).max():.2f} steps" in middle.layout.title.subtitle.text
    assert middle.layout.title.text == middle.frames[2].layout.title.text
    assert list(named(middle, "now").x) == [8, 8]


def test_a_method_that_gains_nothing_is_not_praised():
    layer = toy()
    swapped = {**layer, "rtn_output": layer["gptq_output"], "gptq_output": layer["rtn_output"]}
    assert error_fill(**swapped).layout.title.text.startswith("GPTQ gains nothing here")
    same = {**layer, "gptq": layer["rtn"]}
    assert error_fill(**same).layout.title.text.startswith("GPTQ's weights end nearer, and its output error is")


def test_a_changed_snapshot_changes_the_digest_and_a_page_s_worth_stays_small():
    layer = toy()
    changed = {**layer, "gptq": [array.copy() for array in layer["gptq"]]}
    changed["gptq"][1][2, 9] += 0.01
    assert digest(error_fill(**layer)) == digest(error_fill(**toy())) != digest(error_fill(**changed))
    large = error_fill(**toy(rows=24, width=64))
    assert len(large.frames) == 17 and len(json.dumps(json.loads(large.to_json()))) < 160_000


def test_snapshots_that_are_no_copies_are_refused():
    layer = toy()
    for name in ("rtn", "gptq"):
        with pytest.raises(InvalidSetting, match="each snapshot as a copy"):
            error_fill(**{**layer, name: [layer[name][0]] * (len(layer["columns"]) - 1) + [layer[name][-1]]})
    with pytest.raises(InvalidSetting, match="RTN: after 0 columns one to come has moved"):
        error_fill(**{**layer, "rtn": [layer["rtn"][-1]] * len(layer["columns"])})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": [0, 4, 8, 12]}, "S outputs and columns; it got"),
        ({"columns": [0, 4, 8, 12, 15]}, "columns must rise from 0 or more to all 16; they are 0, 4, 8, 12 and 15"),
        ({"columns": [0, 8, 4, 12, 16]}, "columns must rise"),
        ({"rtn_output": [1.0]}, "S outputs and columns"),
        ({"gptq_output": [0, 1, 2, 3, float("inf")]}, "GPTQ holds a value that is not finite"),
        ({"shown": 5}, "shown is 5; there are snapshots 0 to 4"),
    ],
)
def test_a_layer_that_cannot_be_drawn_is_refused(change, said):
    with pytest.raises(InvalidSetting, match=said):
        error_fill(**{**toy(), **change})


def test_too_many_weights_are_refused():
    with pytest.raises(InvalidSetting, match="2 snapshots of 80 x 64 weights; 1 to 33 of at most 4096"):
        error_fill(np.zeros((2, 80, 64)), np.zeros((2, 80, 64)), [0, 0], [0, 0], [0, 64])


# --- inputs of a layer -----------------------------------------------------------------------------------------------


def test_the_hessian_is_sorted_normalised_and_counted_whole():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(300, 250)) * np.exp(random.normal(size=250))
    gram = inputs.T @ inputs
    figure = hessian(gram, keep=20)
    norms = np.sqrt((inputs**2).sum(0))
    order = sorted(range(250), key=lambda i: -norms[i])
    share = sum(norms[i] ** 2 for i in order[:2]) / sum(norms**2)  # 1 % of 250 columns
    assert figure.layout.title.text == f"The 2 largest of 250 columns hold {100 * share:.0f} % of the trace"
    cosines = np.array(
        [[abs(inputs[:, i] @ inputs[:, j]) / norms[i] / norms[j] for j in order[:20]] for i in order[:20]]
    )
    assert np.allclose(named(figure, "correlation").z, cosines, atol=6e-4)
    bars = named(figure, "diagonal")
    assert list(bars.customdata) == order[:20]
    assert np.allclose(bars.y, [100 * norms[i] ** 2 / sum(norms**2) for i in order[:20]], rtol=1e-5)
    apart = cosines[~np.eye(20, dtype=bool)].mean()
    assert figure.layout.title.subtitle.text.startswith(f"two of the columns drawn correlate by {apart:.2f} on average")


def test_columns_without_input_are_told():
    figure = hessian(np.diag([4.0, 0.0, 12.0]), keep=3)
    assert figure.layout.title.text == "The largest of 3 columns holds 75 % of the trace"
    assert figure.layout.title.subtitle.text.endswith(" · 1 never sees an input")
    assert list(named(figure, "diagonal").customdata) == [2, 0]
    assert np.isfinite(np.asarray(named(figure, "correlation").z)).all()


@pytest.mark.parametrize(
    ("matrix", "keep", "said"),
    [
        (np.ones((2, 3)), 64, r"this one is \(2, 3\)"),
        ([[1.0, 2.0], [0.0, 1.0]], 64, "symmetric with a diagonal of 0 or more"),
        (-np.eye(3), 64, "symmetric with a diagonal"),
        (np.zeros((3, 3)), 64, "give X"),
        (np.eye(3), 500, "keep is 500; 2 to 128"),
    ],
)
def test_what_is_no_hessian_is_refused(matrix, keep, said):
    with pytest.raises(InvalidSetting, match=said):
        hessian(matrix, keep)


# --- what it costs and brings ----------------------------------------------------------------------------------------


def test_perplexity_is_drawn_as_a_rise_by_bits():
    figure = perplexity(POINTS, baseline=10.0)
    assert figure.layout.title.text == "4 bits in groups of 64: perplexity +2.5 % with GPTQ, +10 % with RTN"
    rtn, gptq = named(figure, "RTN"), named(figure, "GPTQ")
    assert np.allclose(rtn.x, [4.0, 4.3]) and np.allclose(rtn.y, [15, 10])
    assert np.allclose(gptq.x, [4.3, 4.6]) and np.allclose(gptq.y, [2.5, 2.0])
    assert list(rtn.text) == ["4/row", "4/64"]
    assert figure.layout.yaxis.type != "log"
    assert gptq.customdata[0] == "4 bits in groups of 64: perplexity 10.25, +2.50 %"


def test_an_explosion_is_drawn_in_powers_and_a_fall_is_marked():
    more = [measured("RTN", 2, 64, 2.3, 9000.0), measured("GPTQ", 8, 64, 8.3, 9.99)]
    figure = perplexity([*POINTS, *more], baseline=10.0)
    assert figure.layout.yaxis.type == "log"
    rtn, gptq = named(figure, "RTN"), named(figure, "GPTQ")
    assert rtn.y[0] == pytest.approx(89_900)
    assert list(gptq.marker.symbol) == ["circle", "circle", "triangle-down-open"]
    assert 0 < gptq.y[-1] < 2.0 and gptq.customdata[-1].endswith("-0.10 %")
    assert "▽ does not rise" in figure.layout.title.subtitle.text


@pytest.mark.parametrize(
    ("rows", "baseline", "said"),
    [
        ([], 10.0, "perplexity got no rows; give at least one with method, bits, group_size"),
        ([{"method": "RTN", "bits": 4}], 10.0, "row 0 lacks group_size, bits_per_weight and perplexity"),
        ([measured("RTN", 4, 64, 4.3, float("inf"))], 10.0, "perplexity of row 0 is inf"),
        (POINTS, 0.0, "must be above 0; it is 0"),
    ],
)
def test_perplexities_that_are_none_are_refused(rows, baseline, said):
    with pytest.raises(InvalidSetting, match=said):
        perplexity(rows, baseline)


def test_bytes_are_stacked_and_compared():
    figure = weight_bytes(MODEL)
    assert figure.layout.title.text == "Linear layers 3.8× smaller, the whole model 2.2×"  # 1200/320, 1601/721
    bars = {bar.name: np.asarray(bar.x) for bar in figure.data}
    assert np.allclose(sum(bars.values()), [1601, 721]) and np.allclose(bars["mlp"], [1000, 250])  # MB
    assert np.allclose(bars["scales and zeros"], [0, 20])
    texts = [note.text for note in figure.layout.annotations]
    assert texts == ["<b>1.6 GB</b>", "<b>721 MB</b><br>2.2× smaller"]
    assert "embedding and head: 55 % of what is left" in figure.layout.title.subtitle.text
    assert "scales and zeros 0 B → 20 MB" in figure.layout.title.subtitle.text
    assert "larger" in weight_bytes(MODEL[::-1]).layout.annotations[1].text


def test_bytes_without_linear_layers_are_refused():
    with pytest.raises(InvalidSetting, match="name yours in `linear`"):
        weight_bytes([{"name": "a", "parts": {"all": 3}}])
    assert weight_bytes([{"name": "a", "parts": {"all": 3}}], linear=("all",)).data
    with pytest.raises(InvalidSetting, match="row 0 lacks parts"):
        weight_bytes([{"name": "a"}])
    with pytest.raises(InvalidSetting, match="parts of 0 bytes or more"):
        weight_bytes([{"name": "a", "parts": {"mlp": -1, "norms": 4}}])


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        (speeds(2.4, 1.5, 1.04, 0.5), "int4 is 2.4 times as fast at batch 1, and no faster from batch 4 on"),
        (speeds(2.4, 1.5, 1.06), "int4 is 2.4 times as fast at batch 1, 1.1 times at 4"),
        (speeds(0.4, 0.8), "int4 is at no batch faster than bf16: at best 0.8×, at batch 2"),
        (speeds(0.4, 1.8, 0.9, 1.3), "int4 is faster than bf16 at batches 2 and 8 only: at best 1.8×"),
        (speeds(0.4, 1.8)[::-1], "int4 is faster than bf16 at batch 2 only: at best 1.8×"),
    ],
)
def test_speed_counts_as_faster_with_its_whole_spread(rows, title):
    figure = int4_speed(rows)
    assert figure.layout.title.text == title
    line = figure.data[0]
    assert list(line.x) == sorted(row["batch"] for row in rows)
    filled = [color != "#FFFFFF" for color in line.marker.color]
    assert filled == [row["ratio"] > 1.05 for row in sorted(rows, key=lambda row: row["batch"])]
    assert np.allclose(line.error_y.array, 0.1) and np.allclose(line.error_y.arrayminus, 0.05)
    assert figure.layout.shapes[0].y0 == figure.layout.shapes[0].y1 == 1


def test_other_paths_are_other_lines():
    figure = int4_speed([*speeds(2.0, 1.5), *speeds(0.5, 0.7, path="unpacked")], where="a made-up GPU")
    assert [trace.name for trace in figure.data] == ["int4", "unpacked"]
    assert figure.layout.title.text.startswith("int4 is 2 times as fast")
    assert "a made-up GPU" in figure.layout.title.subtitle.text
    plain = int4_speed([{"batch": 1, "ratio": 1.2}, {"batch": 8, "ratio": 0.9}])
    assert plain.layout.title.text == "int4 is 1.2 times as fast at batch 1, and no faster from batch 8 on"


def test_ratios_that_are_none_are_refused():
    with pytest.raises(InvalidSetting, match="Batch 1: 3 to 4 around 2 is no spread"):
        int4_speed([{"batch": 1, "ratio": 2, "low": 3, "high": 4}])
    with pytest.raises(InvalidSetting, match="row 0 lacks ratio"):
        int4_speed([{"batch": 1}])


def test_memory_says_what_fits():
    figure = weight_memory(MEMORY)
    assert figure.layout.title.text == "175B fits into one H200 in INT4 only: 87.5 GB, where INT8 takes 175 GB"
    assert np.allclose(named(figure, "INT4").x, [3.5, 87.5]) and list(named(figure, "INT4").y) == [0, 1]
    assert [color == "#FFFFFF" for color in named(figure, "INT8").marker.color] == [False, True]
    assert sorted(shape.x0 for shape in figure.layout.shapes) == [24, 80, 141]
    places = {note.text: note.x for note in figure.layout.annotations}
    assert 10 ** places["<b>141</b><br>H200"] == pytest.approx(141) and 10 ** places["87.5"] == pytest.approx(87.5)
    assert weight_memory(MEMORY, {"H100": 80}).layout.title.text == (
        "175B fits into no single H100: 87.5 GB even in INT4"
    )
    assert weight_memory(MEMORY[:1]).layout.title.text == "7B fits into one H200 in every format: 14 GB at most"
    with pytest.raises(InvalidSetting, match="gpus must name memories above 0 GB"):
        weight_memory(MEMORY, {})
    with pytest.raises(InvalidSetting, match="bytes above 0 in every format"):
        weight_memory([{"model": "a", "bytes": {"FP16": 0}}])


FIGURES = {
    "on_grid": lambda: on_grid(np.linspace(-0.07, 0.09, 64), 0.01, 8, 4),
    "error_fill": lambda: error_fill(**toy()),
    "hessian": lambda: hessian(np.eye(30) + 0.1),
    "perplexity": lambda: perplexity(POINTS, 10.0),
    "weight_bytes": lambda: weight_bytes(MODEL),
    "int4_speed": lambda: int4_speed(speeds(2.0, 0.9)),
    "weight_memory": lambda: weight_memory(MEMORY),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_dressed_and_says_what_it_shows(name):
    figure = FIGURES[name]()
    assert figure.layout.title.text and len(figure.layout.title.text) <= 88, "one line at 760 px"
    assert len(figure.layout.meta["alt"]) > len(figure.layout.title.text)
    assert figure.layout.width <= 760 and figure.layout.template.layout.paper_bgcolor == "#FFFFFF"
    assert all(contrast(note.font.color, "#FFFFFF") >= 4.5 for note in figure.layout.annotations if note.font.color)
    titles = [axis.title.text for axis in (figure.layout.xaxis, figure.layout.yaxis)]
    assert titles[0] and (titles[1] or name in ("weight_bytes", "weight_memory"))
