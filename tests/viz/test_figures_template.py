"""The palette: contrast, one colour per request, and what happens beyond eight."""

import subprocess
import sys

import pytest

from stepengine.viz.template import GREY, HUES, INK, PAPER, QUIET, contrast, readable, request_style, template
from tests.trace.synthetic import simulate

EIGHT = simulate([(2, 2)] * 8)


def test_contrast_of_known_pairs():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)  # the textbook near miss
    assert contrast(INK, INK) == 1


@pytest.mark.parametrize("request_id", range(8))
def test_text_and_marks_can_be_told_from_paper(request_id):
    style = request_style(EIGHT, request_id)
    assert style.label == "ABCDEFGH"[request_id]
    assert contrast(style.ink, style.color) >= 4.5
    assert contrast(style.edge, PAPER) >= 4.5  # the outline that every coloured mark has, and text in its colour


def test_other_inks():
    assert contrast(INK, PAPER) >= 4.5 and contrast(QUIET, PAPER) >= 4.5
    assert contrast(GREY, PAPER) >= 3 and contrast(INK, GREY) >= 4.5
    assert readable("#000000") == "#000000"


def test_beyond_eight_only_the_selected_have_colour():
    nine = simulate([(2, 2)] * 9)
    styles = {r: request_style(nine, r, selected=(4, 7)) for r in nine.requests}
    assert [styles[4].color, styles[7].color] == list(HUES[:2])
    assert {styles[r].color for r in nine.requests if r not in (4, 7)} == {GREY}
    assert [style.label for style in styles.values()] == [str(r) for r in range(9)]


def test_each_template_is_its_own():
    first, second = template(), template()
    first.layout.font.size = 99
    assert second.layout.font.size != 99


def test_plotly_is_loaded_by_figures_only():
    code = "import sys, stepengine.viz, stepengine.viz.template; print('plotly' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
