"""Two figures in one: nothing is lost, and each keeps to its own axes."""

import pytest

from stepengine.errors import InvalidSetting
from stepengine.viz.beside import side_by_side
from stepengine.viz.template import new_figure


def figure(heights: list[int]):
    made = new_figure("own title", "", f"bars of {heights}", height=300)
    made.add_bar(x=[0, 1], y=heights)
    made.add_shape(type="line", x0=0, x1=1, y0=2, y1=2)
    made.add_annotation(text="in data", x=1, y=2)
    made.add_annotation(text="on paper", xref="paper", yref="paper", x=0, y=1)
    made.update_yaxes(title_text="tokens", range=[0, 9])
    return made


def test_each_figure_keeps_its_data_axes_shapes_and_notes():
    whole = side_by_side("both", [figure([1, 2]), figure([3, 4])], ["left", "right"])
    assert [tuple(trace.y) for trace in whole.data] == [(1, 2), (3, 4)]
    assert [(trace.xaxis, trace.yaxis) for trace in whole.data] == [("x", "y"), ("x2", "y2")]
    assert [(shape.xref, shape.yref) for shape in whole.layout.shapes] == [("x", "y"), ("x2", "y2")]
    notes = {(note.text, note.xref, note.yref) for note in whole.layout.annotations}
    assert notes == {
        ("in data", "x", "y"),
        ("on paper", "x domain", "y domain"),
        ("<b>left</b>", "x domain", "y domain"),
        ("in data", "x2", "y2"),
        ("on paper", "x2 domain", "y2 domain"),
        ("<b>right</b>", "x2 domain", "y2 domain"),
    }
    assert whole.layout.yaxis2.range == (0, 9) and whole.layout.yaxis2.title.text == "tokens"
    assert whole.layout.xaxis.domain[1] < whole.layout.xaxis2.domain[0]
    assert "bars of [1, 2]" in whole.layout.meta["alt"] and "bars of [3, 4]" in whole.layout.meta["alt"]


def test_one_figure_or_a_missing_heading_is_refused():
    with pytest.raises(InvalidSetting, match="1 figures"):
        side_by_side("one", [figure([1, 2])], ["left"])
    with pytest.raises(InvalidSetting, match="1 headings for 2"):
        side_by_side("two", [figure([1, 2]), figure([3, 4])], ["left"])
