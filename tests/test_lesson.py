"""The notebooks' helpers: what they print, and that nothing printed depends on the clock."""

import re

import plotly.graph_objects as go
import pytest
from IPython.core.formatters import DisplayFormatter

from stepengine.core.plan import Chunk, StepPlan
from stepengine.errors import InvalidSetting
from stepengine.lesson import Predictions, predict, say, show, source, wall
from stepengine.viz.predict import Predict

MASK = re.compile(r"\[wall [^\]]*\]")


def test_asking_records_no_verdict_and_runs_on_without_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("How many tokens?").right is None
    out = capsys.readouterr().out
    assert "How many tokens?" in out and "No guess yet" in out


@pytest.mark.parametrize(
    ("guess", "answer", "kwargs", "right", "text"),
    [
        (118, 118, {}, True, "exactly right"),
        (120, 118, {}, False, "2 too high (1.7 %)"),
        (110, 118, {"tolerance": 0.1}, True, "8 too low (6.8 %), close enough"),
        (100, 118, {"tolerance": 0.1}, False, "18 too low (15.3 %)"),
        (10, 1000, {}, False, "990 too low (a factor of 100)"),
        (600, 1000, {"ratio": 2.0}, True, "close enough"),
        (400, 1000, {"ratio": 2.0}, False, "600 too low"),
        ("1,000", 1000, {}, True, "exactly right"),
        (3, 0, {}, False, "3 too high."),
        (0, 0, {}, True, "exactly right"),
        (2.5, 2.25, {}, False, "0.25 too high"),
        (" Decode", "decode", {}, True, "right"),
        ("many", 7, {}, False, "You said many; it is 7."),
        (None, 7, {}, None, "No guess; it is 7."),
        (0, None, {}, False, "You said 0; it is None."),
    ],
)
def test_grading(
    guess: object,
    answer: object,
    kwargs: dict[str, float],
    right: bool | None,
    text: str,
    capsys: pytest.CaptureFixture,
) -> None:
    grade = predict("?", guess, answer=answer, **kwargs)
    assert grade.right is right
    assert text in grade.text and text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("guess", "right"), [("b", True), ("B)", True), (" slower", True), ("a", False), ("z", None), (None, None)]
)
def test_choices_by_letter_or_text(guess: str | None, right: bool | None) -> None:
    assert predict("?", guess, answer="slower", choices=["faster", "slower"]).right is right


def test_choices_are_listed_with_their_letters(capsys: pytest.CaptureFixture[str]) -> None:
    predict("?", choices=["faster", "slower"])
    out = capsys.readouterr().out
    assert "a) faster" in out and "b) slower" in out


def test_the_record_survives_between_cells(capsys: pytest.CaptureFixture[str]) -> None:
    predictions = Predictions()
    predictions.ask("q1", "One?", 10)
    predictions.ask("q2", "Two?", None)
    predictions.ask("q3", "Three?", "a", choices=["yes", "no"])
    predictions.ask("q4", "Four?", 4)
    assert predictions.reveal("q1", 11).right is False
    assert predictions.reveal("q2", 5).right is None
    assert predictions.reveal("q3", "yes").right is True
    capsys.readouterr()
    predictions.summary()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 predictions: 1 right, 1 off, 1 without a guess, 1 not revealed yet."
    assert [line.split() for line in lines[1:]] == [
        ["question", "your", "guess", "answer"],
        ["One?", "10", "11", "off"],
        ["Two?", "none", "5"],
        ["Three?", "yes", "yes", "right"],
        ["Four?", "4", "not", "revealed", "yet"],
    ]
    assert Predictions()._asked == {}


def test_without_a_guess_the_summary_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    predictions = Predictions()
    predictions.ask("q", "One?")
    predictions.reveal("q", 3)
    capsys.readouterr()
    predictions.summary()
    assert capsys.readouterr().out == "1 prediction: 1 without a guess.\n"


def test_the_record_keeps_clock_values_whole_and_long_questions_in_their_column(
    capsys: pytest.CaptureFixture[str],
) -> None:
    predictions = Predictions()
    predictions.ask("q", "word " * 20 + "| how long?", 3)
    predictions.reveal("q", wall(12.345, "ms"), ratio=1.5)
    capsys.readouterr()
    predictions.summary()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sum("[wall 12.3 ms]" in line for line in lines) == 1 and max(map(len, lines)) < 80 and len(lines) > 3


ORDER = ["sample", "plan", "run"]


@pytest.mark.parametrize(
    ("guess", "right", "text"),
    [
        ("bca", True, "You said plan, run, sample: right."),
        (["plan", "run", "sample"], True, "right"),
        ("bac", False, "1 of 3 in place; place 2 is run, you said sample. It is plan, run, sample."),
        ("abc", False, "0 of 3 in place; place 1 is plan, you said sample."),
        ("ab", None, "each once. It is plan, run, sample."),
        (None, None, "No guess; it is plan, run, sample."),
    ],
)
def test_an_order_is_graded_by_its_places(
    guess: object, right: bool | None, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = Predictions()
    predictions.ask("q", "What comes first?", guess, order=ORDER)
    asked = capsys.readouterr().out
    assert "a) sample" in asked and "c) run" in asked
    grade = predictions.reveal("q", ["plan", "run", "sample"])
    assert grade.right is right and text in grade.text and text in capsys.readouterr().out


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[Predict]:
    """As in a notebook's kernel: what would be displayed."""
    shown: list[Predict] = []
    monkeypatch.setattr("stepengine.lesson._in_kernel", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    return shown


def test_a_guess_committed_in_the_box_is_graded_and_the_box_shows_it(
    boxes: list[Predict], capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = Predictions()
    predictions.ask("n", "How many?")
    assert "the box" in capsys.readouterr().out
    predictions.ask("c", "Which?", choices=["yes", "no"])
    predictions.ask("o", "What comes first?", order=ORDER)
    predictions.ask("none", "And this?")
    for box, guess in zip(boxes, ("12", "b", "bac"), strict=False):
        box.commit(guess)
    assert predictions.reveal("n", 10, tolerance=0.1).right is False
    assert predictions.reveal("c", "no").right is True
    assert predictions.reveal("o", ["plan", "run", "sample"]).right is False
    assert predictions.reveal("none", 1).right is None
    assert [box.verdict for box in boxes] == ["off", "right", "off", "none"]
    assert all(box.grade in capsys.readouterr().out for box in boxes[:1]) and boxes[0].state == "revealed"
    predictions.summary()
    assert "4 predictions: 1 right, 2 off, 1 without a guess." in capsys.readouterr().out


def test_a_guess_in_the_cell_wins(boxes: list[Predict]) -> None:
    predictions = Predictions()
    predictions.ask("n", "How many?", 10)
    with pytest.raises(InvalidSetting):
        boxes[0].commit(11)
    assert predictions.reveal("n", 10).right is True and boxes[0].verdict == "right"


def test_running_the_question_again_keeps_a_guess_that_is_not_graded_yet(boxes: list[Predict]) -> None:
    predictions = Predictions()
    predictions.ask("n", "How many?")
    boxes[0].commit(11)
    predictions.ask("n", "How many?")
    assert boxes[1].committed == 11 and boxes[0].state == "replaced"
    with pytest.raises(InvalidSetting):
        boxes[0].commit(12)
    assert predictions.reveal("n", 11).right is True
    predictions.ask("n", "How many?")  # after the grade a new try begins
    assert boxes[2].committed is None
    boxes[2].commit(1)
    predictions.ask("n", "How many others?")  # another question under the same key
    assert boxes[3].committed is None


def test_a_box_outlives_its_record_without_taking_guesses(boxes: list[Predict]) -> None:
    predictions = Predictions()
    predictions.ask("n", "How many?")
    del predictions
    with pytest.raises(InvalidSetting, match="begun anew"):
        boxes[0].commit(3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Predictions().reveal("q9", 1),
        lambda: predict("?", 1, answer=1, tolerance=-0.1),
        lambda: predict("?", 1, answer=1, tolerance=float("nan")),
        lambda: predict("?", 1, answer=1, ratio=0.5),
        lambda: predict("?", "a", answer="c", choices=["a", "b"]),
        lambda: predict("?", choices=["one"]),
        lambda: predict("?", choices="ab"),
        lambda: predict("?", choices=["a", "a"]),
        lambda: Predictions().ask("q", "?", order=["one"]),
        lambda: Predictions().ask("q", "?", choices=["a", "b"], order=["a", "b"]),
        lambda: predict("  "),
        lambda: say("{x}", "{x}"),
        lambda: say("{}", "x"),
        lambda: say("a", "b", unused=3),
        lambda: source(len),
        lambda: show([1, 2]),
        lambda: source(Predictions, max_lines=5),
    ],
)
def test_bad_input_gets_one_sentence(call) -> None:  # noqa: ANN001
    with pytest.raises(InvalidSetting) as error:
        call()
    assert 20 < len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.3456, "ms", "[wall 12.3 ms]"),
        (0.012345, "s", "[wall 0.0123 s]"),
        (123456.0, "tokens/s", "[wall 123000 tokens/s]"),
        (9.999, "", "[wall 10.0]"),
        (0.0, "ms", "[wall 0.0 ms]"),
        (float("nan"), "ms", "[wall nan ms]"),
    ],
)
def test_wall_prints_inside_the_mask(value: float, unit: str, text: str) -> None:
    assert str(wall(value, unit)) == repr(wall(value, unit)) == text
    assert MASK.fullmatch(text)


def test_wall_takes_a_format_and_stays_masked() -> None:
    assert f"{wall(12.3456, 'ms'):.1f}" == "[wall 12.3 ms]"
    assert float(wall(12.3456)) == 12.3456


@pytest.mark.parametrize("guess", [None, 3, 300])
def test_nothing_outside_the_mask_depends_on_a_measured_answer(guess: float | None) -> None:
    texts = [predict("?", guess, answer=wall(value, "ms")).text for value in (12.3, 9.87654)]
    assert MASK.sub("", texts[0]) == MASK.sub("", texts[1])


def test_say_fills_numbers_in_and_counts_words(capsys: pytest.CaptureFixture[str]) -> None:
    answer = say(
        en="Without a cache {steps} steps run {tokens:,} tokens in {time}.",
        zh="没有缓存，{steps} 步要算 {tokens} 个 token。",
        follow_ups=[("And with one? {with_cache} tokens.", "有缓存呢？{with_cache} 个。")],
        steps=20,
        tokens=1430,
        with_cache=76,
        time=wall(1.5, "s"),
    )
    out = capsys.readouterr().out
    assert "20 steps run 1,430 tokens in [wall 1.50 s]." in out and "20 步要算 1430 个" in out and "76 tokens" in out
    assert answer.words_en == 10  # Without a cache 20 steps run 1,430 tokens in [wall]
    assert answer.chars_zh == len("没有缓存步要算个")


def test_line_breaks_do_not_depend_on_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for value in (1.0, 123456.789):
        say(en="word " * 17 + "takes {t}. " + "word " * 30, zh="词" * 46 + "用了{t}，" + "词" * 60, t=wall(value, "ms"))
        printed.append(MASK.sub("[wall]", capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_no_line_is_wider_than_100_columns_and_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    zh = "预填充一次处理所有提示 token，解码每步一个；" * 12
    en = "Prefill runs all prompt tokens at once, decode one per step. " * 8
    say(en=en, zh=zh)
    lines = capsys.readouterr().out.splitlines()
    width = [sum(2 if ord(c) > 0x2E80 else 1 for c in line) for line in lines]
    assert max(width) <= 102  # closing punctuation may hang
    joined = "".join(lines).replace(" ", "")
    assert zh.replace(" ", "") in joined and en.replace(" ", "") in joined


def test_source_names_file_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    source(Chunk)
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    match = re.fullmatch(r"# stepengine/core/plan\.py \[line (\d+)\]", first)
    assert match and "class Chunk(NamedTuple):" in out
    from stepengine.core import plan

    text = open(plan.__file__, encoding="utf-8").read().splitlines()
    assert text[int(match.group(1)) - 1] == "class Chunk(NamedTuple):"


def test_source_dedents_methods_and_properties(capsys: pytest.CaptureFixture[str]) -> None:
    source(StepPlan.num_tokens)
    assert "\n@property\ndef num_tokens(self) -> int:" in capsys.readouterr().out


def test_show_prints_a_digest_that_follows_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for y, values in (([1, 2, 3], True), ([1, 2, 3.001], True), ([1, 2, 3], False), ([4, 5, 6], False)):
        show(go.Figure(go.Bar(y=y)), values=values)
        printed.append(capsys.readouterr().out)
    assert all(text.startswith("digest 1 bar") for text in printed)
    assert printed[0] != printed[1] and printed[2] == printed[3]


def test_results_add_nothing_when_they_end_a_cell() -> None:
    """In a kernel the helpers print; their return value must not be shown a second time."""
    formatter = DisplayFormatter()
    assert formatter.format(predict("?", 1, answer=2)) == ({}, {})
    assert formatter.format(say(en="E.", zh="Z.")) == ({}, {})
