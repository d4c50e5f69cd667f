"""The box for a guess: what it takes, what it refuses, and what its page shows (in a browser where there is one)."""

import sys
from pathlib import Path
from typing import Any

import pytest

from stepengine.errors import InvalidSetting
from stepengine.viz.guess import choice_place, order_places, read_number
from stepengine.viz.predict import Predict

sys.path.insert(0, str(Path(__file__).parent))
from formpage import contrasts, show  # noqa: E402

SIZES = ["1", "8", "16", "32"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("42", 42), (" 1,000 ", 1000), ("0.5", 0.5), ("1/4", 0.25), ("15.6 %", 15.6), ("-3", -3), ("1e3", 1000), (7, 7)],
)
def test_numbers_are_read_as_people_write_them(text: object, number: float) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "  ", None, "abc", "nan", "inf", "1/0", "1e999999999", "9" * 5000, "4 2", "1/2/3"]
)
def test_what_is_no_finite_number_gets_one_sentence(text: object) -> None:
    with pytest.raises(InvalidSetting) as error:
        read_number(text)
    assert 20 < len(str(error.value)) < 200 and "42" in str(error.value)


def test_a_choice_is_meant_by_its_text_before_its_letter() -> None:
    assert [choice_place(guess, SIZES) for guess in ("8", "b", "C)", 16, "e", "", None)] == [
        1,
        1,
        2,
        2,
        None,
        None,
        None,
    ]
    assert choice_place("a", ["b", "a"]) == 1


@pytest.mark.parametrize("guess", ["bca", "b, c, a", "B > C > A", ["run", "sample", "plan"], ("b", "c", "plan")])
def test_an_order_is_read_from_letters_or_texts(guess: object) -> None:
    assert order_places(guess, ["plan", "run", "sample"]) == [1, 2, 0]


@pytest.mark.parametrize("guess", ["", "ab", "abb", "abcd", 3, None, ["plan", "run", "stop"]])
def test_an_order_names_every_item_once(guess: object) -> None:
    with pytest.raises(InvalidSetting, match="each once"):
        order_places(guess, ["plan", "run", "sample"])


def test_a_guess_may_be_changed_until_it_is_graded() -> None:
    box = Predict("How many?", name="many")
    box.commit("12")
    box.change()
    assert box.committed is None and box.state == "open"
    box.commit("1/4")
    assert (box.committed, box.state, box.source, box.said) == (0.25, "committed", "box", "0.25")
    box.reveal("You said 0.25; it is 1.", False)
    assert (box.state, box.verdict, box.grade) == ("revealed", "off", "You said 0.25; it is 1.")
    box.change()
    with pytest.raises(InvalidSetting, match="answer has been shown"):
        box.commit(1)
    assert box.committed == 0.25


def test_a_guess_in_the_cell_wins_over_the_box() -> None:
    box = Predict("Which?", choices=SIZES, guess="c")
    assert (box.committed, box.said, box.source) == ("16", "c) 16", "cell")
    with pytest.raises(InvalidSetting, match="in the cell"):
        box.commit("8")
    box.change()
    assert box.committed == "16"


def test_a_guess_in_the_cell_that_cannot_be_read_is_shown_with_the_reason() -> None:
    box = Predict("Which?", choices=SIZES, guess="z")
    assert box.committed is None and box.said == "z" and "none of the choices" in box.note


def test_a_box_whose_record_is_gone_takes_nothing() -> None:
    alive = [True]
    box = Predict("How many?", recorded=lambda: alive[0])
    alive[0] = False
    with pytest.raises(InvalidSetting, match="begun anew"):
        box.commit(3)
    assert box.committed is None and box.state == "replaced"


@pytest.mark.parametrize("message", [None, {}, {"do": "commit"}, {"do": "commit", "places": ["x", 99]}, {"do": "fly"}])
def test_no_message_of_a_page_raises(message: object) -> None:
    for box in (Predict("?"), Predict("?", choices=SIZES), Predict("?", order=SIZES)):
        box._asked(box, message, [])
        assert box.committed is None and box.state == "open"


def test_the_text_of_a_stored_output_says_nothing_that_could_change() -> None:
    box = Predict("How many?", name="many")
    before = box._repr_mimebundle_()
    box.commit(3)
    after = box._repr_mimebundle_()
    assert before is not None and after is not None
    assert before[0]["text/plain"] == after[0]["text/plain"] == "Predict('many', number)"


# --- the page ----------------------------------------------------------------------------------------------------


def settled(page: Any, state: str) -> Any:
    return page.wait_for_selector(f'.predict[data-state="{state}"]')


def test_a_number_is_committed_changed_and_graded_by_keyboard(browser: Any, tmp_path: Path) -> None:
    box = Predict("How many?", name="many")
    page = show(browser, box, tmp_path)
    page.keyboard.press("Tab")
    page.keyboard.type("many")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('[data-note]').textContent.includes(\"'many' is no number\")")
    assert box.committed is None
    page.keyboard.press("Control+a")
    page.keyboard.type("12")
    page.keyboard.press("Enter")
    settled(page, "committed")
    assert box.committed == 12 and page.inner_text("[data-said]") == "committed: 12"
    assert page.evaluate("document.activeElement.dataset.do") == "change"
    page.keyboard.press("Enter")
    settled(page, "open")
    assert box.committed is None and page.evaluate("'field' in document.activeElement.dataset")
    page.keyboard.press("Enter")
    settled(page, "committed")
    box.reveal("You said 12; it is 10: 2 too high (20.0 %).", False)
    page.evaluate("model.send({do: 'hello'})")
    settled(page, "revealed")
    assert "✗ off" in page.inner_text("[data-grade]") and "2 too high" in page.inner_text("[data-grade]")
    assert not page.is_visible("[data-do=change]") and not page.is_visible("[data-do=commit]")
    assert page.faults == []


def test_a_choice_and_an_order_by_keyboard(browser: Any, tmp_path: Path) -> None:
    box = Predict("Which?", choices=SIZES, name="size")
    page = show(browser, box, tmp_path)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    settled(page, "committed")
    assert box.committed == "8" and page.is_checked("[data-option=b] input")
    assert page.is_disabled("[data-option=a] input")

    box = Predict("What comes first?", order=["sample", "plan", "run"], name="first")
    page = show(browser, box, tmp_path)
    page.keyboard.press("Tab")  # the first item's "up", which cannot go further
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert [item.inner_text() for item in page.query_selector_all("[data-item]")] == ["b) plan", "c) run", "a) sample"]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Move sample up, now 3 of 3"
    page.click("[data-do=commit]")
    settled(page, "committed")
    assert box.committed == ("plan", "run", "sample")
    assert page.faults == []


def test_a_box_whose_kernel_is_gone_does_not_claim_a_guess(browser: Any, tmp_path: Path) -> None:
    box = Predict("How many?", name="many")
    page = show(browser, box, tmp_path)
    page.fill("[data-field]", "12")
    page.click("[data-do=commit]")
    settled(page, "committed")
    page.evaluate("window.gone = true")
    page.evaluate("model.fire('comm_live_update')")  # what the widget manager tells after a restart
    settled(page, "silent")
    assert page.inner_text("[data-said]") == "" and "run this cell again" in page.inner_text("[data-note]")
    page.evaluate("window.gone = false")
    page.evaluate("model.send({do: 'hello'})")  # it was only busy
    settled(page, "committed")
    assert page.inner_text("[data-said]") == "committed: 12"


@pytest.mark.parametrize("dark", [False, True])
def test_text_keeps_its_contrast(browser: Any, tmp_path: Path, dark: bool) -> None:
    box = Predict("Which?", choices=SIZES, name="size")
    page = show(browser, box, tmp_path, dark=dark)
    page.click("[data-do=commit]")
    page.wait_for_selector("[data-note]:not(:empty)")
    found = contrasts(page, ["[data-note]", "[data-do=commit]", "[data-option=a]"])
    box.commit("8")
    for right in (True, False):
        box.reveal("You said 8.", right)
        page.evaluate("model.send({do: 'hello'})")
        page.wait_for_selector(f'.predict[data-verdict="{box.verdict}"]')
        found |= {
            f"{right} {key}": value
            for key, value in contrasts(page, ["[data-said]", "[data-grade]", "[data-grade] b"]).items()
        }
    assert {key: value for key, value in found.items() if value < 4.5} == {}
