"""What the notebooks say and ask: predictions, measured answers, source listings, figures with a digest.

Everything here prints plain, deterministic text, so that a checked notebook notices a changed number. Values from
the clock go through `wall` and come out as `[wall 12.3 ms]`, the only text that the check masks.
"""

import inspect
import re
import string
import textwrap
import unicodedata
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepengine.errors import InvalidSetting
from stepengine.viz.guess import LETTERS, choice_place, order_places

_MISSING: Any = object()  # "no answer yet": None may be an answer
_WALL = re.compile(r"\[wall [^\]]*\]")
_ROOT = Path(__file__).resolve().parent.parent


class _Printed:
    """A result that has printed itself already: as the last expression of a cell it adds nothing."""

    def _ipython_display_(self) -> None:
        return None


# --- values from the clock ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wall:
    """A measured value that differs from run to run; prints inside `[wall ...]`."""

    value: float
    unit: str = ""
    digits: int = 3

    def __str__(self) -> str:
        return self._render(_significant(self.value, self.digits))

    def __repr__(self) -> str:
        return str(self)

    def __float__(self) -> float:
        return float(self.value)

    def __format__(self, spec: str) -> str:
        return self._render(format(self.value, spec)) if spec else str(self)

    def _render(self, number: str) -> str:
        return f"[wall {number} {self.unit}]" if self.unit else f"[wall {number}]"


def wall(value: float, unit: str = "", digits: int = 3) -> Wall:
    """Mark a number that came from the clock: `wall(12.3456, "ms")` prints `[wall 12.3 ms]`."""
    return Wall(float(value), unit, digits)


def _significant(value: float, digits: int) -> str:
    """The value to so many significant digits, without an exponent: 1234.5 -> 1230, 0.01234 -> 0.0123."""
    rounded = float(f"{value:.{digits}g}")
    if rounded != rounded or rounded in (float("inf"), float("-inf")) or rounded == 0:
        return str(rounded)
    exponent = int(f"{rounded:e}".split("e")[1])
    return f"{rounded:.{max(0, digits - 1 - exponent)}f}"


# --- predictions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grade(_Printed):
    """How a guess compares with the answer: `right` is None without a (readable) guess; `text` is what was printed."""

    right: bool | None
    text: str


@dataclass
class _Prediction:
    question: str
    guess: object
    choices: tuple[str, ...] | None
    order: tuple[str, ...] | None = None
    box: Any = None  # the widget, in a notebook
    answer: object = None
    grade: Grade | None = None

    @property
    def made(self) -> object:
        """The guess: the one written in the cell, else the one committed in the box, else None."""
        return self.guess if self.guess is not None or self.box is None else self.box.committed


def predict(
    question: str,
    guess: object = None,
    answer: object = _MISSING,
    tolerance: float = 0.0,
    choices: Sequence[str] | None = None,
    ratio: float = 1.0,
) -> Grade:
    """Ask for a prediction, or, given `answer`, grade it; prints, and runs on without a guess.

    `tolerance` is relative (0.1 accepts 10 % either way); `ratio` accepts a factor (2.0: from half to double).
    With `choices` the guess may be the choice's text or its letter. Raises InvalidSetting for an impossible grading.
    """
    options = _choices(choices)
    grade = _ask(question, guess, options) if answer is _MISSING else _reveal(guess, answer, tolerance, ratio, options)
    head = "Predict" if answer is _MISSING else "Predicted"
    print(f"{head}: {question}\n{textwrap.indent(grade.text, '  ')}")
    return grade


@dataclass
class Predictions:
    """A notebook's record of guesses: `ask` in one cell, `reveal` in a later one, `summary` at the end."""

    _asked: dict[str, _Prediction] = field(default_factory=dict)

    def ask(
        self,
        key: str,
        question: str,
        guess: object = None,
        choices: Sequence[str] | None = None,
        order: Sequence[str] | None = None,
    ) -> None:
        """Show the question under its key, in a notebook with a box for the guess; asking again begins it anew.

        `guess` written here wins over the box. `choices`: pick one. `order`: put these items in order.
        """
        options, items = _choices(choices), _choices(order, "order")
        if options and items:
            raise InvalidSetting(f"{key!r} has choices and an order: a question has one of them, leave the other out.")
        kernel = _in_kernel()
        grade = _ask(question, guess, options, items, boxed=kernel)
        old = self._asked.get(key)
        asked = self._asked[key] = _Prediction(question, guess, options, items)
        print(f"Predict ({key}): {question}\n{textwrap.indent(grade.text, '  ')}")
        if kernel:
            asked.box = self._box(key, asked, old)

    def _box(self, key: str, asked: _Prediction, old: _Prediction | None) -> Any:
        """The question's box, displayed; a guess committed before and not graded yet is taken over."""
        from IPython.display import display

        from stepengine.viz.predict import Predict

        record = weakref.ref(self)  # a box may outlive its record: it must then take no guess
        box = Predict(
            asked.question, asked.choices, asked.order, asked.guess, key, recorded=lambda: record() is not None
        )
        if old is not None and old.box is not None:
            same = (old.question, old.choices, old.order) == (asked.question, asked.choices, asked.order)
            if same and old.grade is None and old.box.source == "box" and asked.guess is None:
                box.commit(old.box.committed)
            old.box.replace()
        display(box)
        return box

    def reveal(self, key: str, answer: object, tolerance: float = 0.0, ratio: float = 1.0) -> Grade:
        """Grade the recorded guess; `tolerance` and `ratio` as in `predict`. InvalidSetting for an unknown key.

        The answer to an order is the list of its items, first to last.
        """
        if key not in self._asked:
            known = ", ".join(self._asked) or "none"
            raise InvalidSetting(
                f"{key!r} has not been asked (asked so far: {known}): run the cell that asks it first."
            )
        asked = self._asked[key]
        if asked.order is not None:
            grade = _reveal_order(asked.made, answer, asked.order)
        else:
            grade = _reveal(asked.made, answer, tolerance, ratio, asked.choices)
        asked.answer, asked.grade = answer, grade
        if asked.box is not None:
            asked.box.reveal(grade.text, grade.right)
        print(f"Predicted ({key}): {asked.question}\n{textwrap.indent(grade.text, '  ')}")
        return grade

    def summary(self) -> None:
        """Print how many of the predictions were right and, where a guess was made, the record of all."""
        grades = [asked.grade for asked in self._asked.values()]
        counts = {
            "right": sum(g is not None and g.right is True for g in grades),
            "off": sum(g is not None and g.right is False for g in grades),
            "without a guess": sum(g is not None and g.right is None for g in grades),
            "not revealed yet": sum(g is None for g in grades),
        }
        parts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        print(f"{_count(len(grades), 'prediction')}{': ' + parts if parts else ''}.")
        if any(asked.made is not None for asked in self._asked.values()):
            rows = [_record(asked) for asked in self._asked.values()]
            _display(_text_table(RECORD, rows), _markdown_table(RECORD, rows))


RECORD = ("question", "your guess", "answer", "")


def _record(asked: _Prediction) -> tuple[str, ...]:
    """A row of the record: question, guess, answer, verdict."""
    guess = "none" if asked.made is None else _shown(asked.made, asked)
    if asked.grade is None:
        return asked.question, guess, "not revealed yet", ""
    verdict = {True: "right", False: "off", None: ""}[asked.grade.right]
    return asked.question, guess, _shown(asked.answer, asked), verdict


def _shown(value: object, asked: _Prediction) -> str:
    if asked.order is not None:
        return ", ".join(_items(value, asked.order) or [str(value)])
    if asked.choices is not None:
        return str(_pick(value, asked.choices) or value)
    number = None if isinstance(value, str | Wall) else _number(value)
    return str(value) if number is None else _plain(number)


def _text_table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int = 44) -> str:
    """Columns under their heads; a text longer than `width` goes on in the next line."""
    lines: list[list[str]] = []
    for row in (head, *rows):
        cells = [textwrap.wrap(_WALL.sub(lambda m: m.group().replace(" ", "\0"), text), width) or [""] for text in row]
        for i in range(max(map(len, cells))):
            lines.append([cell[i].replace("\0", " ") if i < len(cell) else "" for cell in cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[re.sub(r"([\\|*_`<$\[])", r"\\\1", text) for text in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _choices(choices: Sequence[str] | None, name: str = "choices") -> tuple[str, ...] | None:
    if choices is None:
        return None
    if isinstance(choices, str) or not 2 <= len(choices) <= 26 or len(set(map(str, choices))) < len(choices):
        raise InvalidSetting(
            f"{name}={choices!r} is no list of 2 to 26 different texts: pass one, such as ['faster', 'slower']."
        )
    return tuple(str(choice) for choice in choices)


def _ask(
    question: str,
    guess: object,
    choices: tuple[str, ...] | None,
    order: tuple[str, ...] | None = None,
    boxed: bool = False,
) -> Grade:
    if not question.strip():
        raise InvalidSetting("The question is empty: write what the reader should predict.")
    lines = [f"{letter}) {text}" for letter, text in zip(LETTERS, choices or order or (), strict=False)]
    if guess is None and boxed:
        act = "Order them in" if order else "Pick one in" if choices else "Type a number into"
        lines.append(f"{act} the box and commit, or write guess=... into the cell and run it again. Then go on.")
    elif guess is None:
        lines.append("No guess yet: write it into the cell as guess=... and run it again, then go on.")
    elif order is not None:
        items = _items(guess, order)
        lines.append(f"Your guess: {', '.join(items)}" if items else _unordered(guess, order))
    else:
        lines.append(_unreadable(guess, choices) or f"Your guess: {_pick(guess, choices)}")
    return Grade(None, "\n".join(lines))


def _items(guess: object, order: tuple[str, ...]) -> list[str]:
    """The items as the guess orders them; none where it is no order of them."""
    try:
        return [order[place] for place in order_places(guess, order)]
    except InvalidSetting:
        return []


def _unordered(guess: object, order: tuple[str, ...]) -> str:
    try:
        order_places(guess, order)
    except InvalidSetting as error:
        return str(error)
    return ""


def _reveal_order(guess: object, answer: object, order: tuple[str, ...]) -> Grade:
    """Right if every item is in its place; else how many are, and the first place that is not."""
    if not isinstance(answer, list | tuple) or sorted(answer) != sorted(order):
        raise InvalidSetting(f"The answer {answer!r} is no order of {list(order)}: correct the cell.")
    shown = ", ".join(answer)
    if guess is None:
        return Grade(None, f"No guess; it is {shown}.")
    if unread := _unordered(guess, order):
        return Grade(None, f"{unread} It is {shown}.")
    said = _items(guess, order)
    if said == list(answer):
        return Grade(True, f"You said {shown}: right.")
    wrong = [place for place, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b]
    kept, first = len(answer) - len(wrong), wrong[0]
    text = f"{kept} of {len(answer)} in place; place {first + 1} is {answer[first]}, you said {said[first]}."
    return Grade(False, f"{text} It is {shown}.")


def _reveal(guess: object, answer: object, tolerance: float, ratio: float, choices: tuple[str, ...] | None) -> Grade:
    if not tolerance >= 0 or not ratio >= 1:
        raise InvalidSetting(f"tolerance={tolerance}, ratio={ratio}: tolerance starts at 0 (exact) and ratio at 1.")
    if choices is not None:
        if answer not in choices:
            raise InvalidSetting(f"The answer {answer!r} is not one of the choices {list(choices)}: correct the cell.")
        right = _pick(guess, choices)
        return _compare(guess, right == answer, right, answer, _unreadable(guess, choices))
    number, exact = _number(guess), _number(answer)
    if exact is None or (guess is not None and number is None):
        same = str(guess).strip().casefold() == str(answer).strip().casefold()
        return _compare(guess, same, guess, answer, "")
    if number is None:
        return Grade(None, f"No guess; it is {answer}.")
    return _grade_number(number, exact, answer, tolerance, ratio)


def _compare(guess: object, same: bool, shown: object, answer: object, unreadable: str) -> Grade:
    if guess is None:
        return Grade(None, f"No guess; it is {answer}.")
    if unreadable:
        return Grade(None, f"{unreadable} It is {answer}.")
    return Grade(same, f"You said {shown}: right." if same else f"You said {shown}; it is {answer}.")


def _grade_number(guess: float, exact: float, answer: object, tolerance: float, ratio: float) -> Grade:
    """The sentence for two numbers, and by how much the guess is off; clock values stay inside `[wall ...]`."""
    if guess == exact:
        return Grade(True, f"You said {_plain(guess)}: exactly right.")
    near = abs(guess - exact) <= tolerance * abs(exact)
    if ratio > 1 and guess > 0 and exact > 0:
        near = near or 1 / ratio <= guess / exact <= ratio
    by = _plain(abs(guess - exact))
    share = f"{abs(guess - exact) / abs(exact):.1%}".replace("%", " %") if exact else ""
    if guess > 0 and exact > 0 and not 0.5 <= guess / exact <= 2:
        share = f"a factor of {_significant(max(guess / exact, exact / guess), 2)}"
    off = f"{by} too {'high' if guess > exact else 'low'}" + (f" ({share})" if share else "")
    if isinstance(answer, Wall):
        off = f"[wall {off}]"
    verdict = ", close enough" if near else ""
    shown = answer if isinstance(answer, Wall) else _plain(exact)
    return Grade(near, f"You said {_plain(guess)}; it is {shown}: {off}{verdict}.")


def _pick(guess: object, choices: tuple[str, ...] | None) -> object:
    """The choice that the guess names by its text or its letter; the guess itself where there are no choices."""
    if choices is None or guess is None:
        return guess
    place = choice_place(guess, choices)
    return None if place is None else choices[place]


def _unreadable(guess: object, choices: tuple[str, ...] | None) -> str:
    if choices is None or guess is None or _pick(guess, choices) is not None:
        return ""
    return f"{guess!r} is none of the choices a to {LETTERS[len(choices) - 1]}: write a letter."


def _number(value: object) -> float | None:
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value.replace(",", "").replace("_", "") if isinstance(value, str) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _plain(number: float) -> str:
    if number == number // 1:
        return str(int(number))
    text = _significant(number, 4)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- what to answer when asked -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer(_Printed):
    """An answer in both languages with this run's numbers filled in."""

    en: str
    zh: str
    follow_ups: tuple[tuple[str, str], ...]

    @property
    def words_en(self) -> int:
        """Words of the English answer; a `[wall ...]` counts as one."""
        return len(_WALL.sub("x", self.en).split())

    @property
    def chars_zh(self) -> int:
        """Chinese characters of the Chinese answer, punctuation not counted."""
        return sum("CJK UNIFIED" in unicodedata.name(char, "") for char in self.zh)


def say(en: str, zh: str, follow_ups: Sequence[tuple[str, str]] = (), **numbers: object) -> Answer:
    """Print what to answer when asked, in English and Chinese, `{name}` replaced by this run's numbers.

    Numbers take format specs (`{ratio:.1f}`); clock values come wrapped in `wall`. Raises InvalidSetting where a
    name in a text has no number, or a number no place.
    """
    used: set[str] = set()
    pairs = tuple((_fill(a, numbers, used), _fill(b, numbers, used)) for a, b in follow_ups)
    answer = Answer(_fill(en, numbers, used), _fill(zh, numbers, used), pairs)
    if unused := sorted(set(numbers) - used):
        raise InvalidSetting(f"The number {unused[0]!r} appears in neither text: write {{{unused[0]}}} or drop it.")
    lines = ["When asked", *_wrap(answer.en), "", "被问到时", *_wrap(answer.zh)]
    if pairs:
        lines += ["", "Then expect / 接着会问"]
        for asked_en, asked_zh in pairs:
            lines += ["- " + line if i == 0 else "  " + line for i, line in enumerate(_wrap(asked_en, 98))]
            lines += ["  " + line for line in _wrap(asked_zh, 98)]
    print("\n".join(lines))
    return answer


def _fill(text: str, numbers: dict[str, object], used: set[str]) -> str:
    names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    for name in sorted(names):
        if re.split(r"[.\[]", name)[0] not in numbers:
            given = ", ".join(sorted(numbers)) or "none"
            raise InvalidSetting(f"The text asks for {{{name}}}, given are {given}: pass {name or 'a name'}=...")
    used |= {re.split(r"[.\[]", name)[0] for name in names}
    return " ".join(text.format(**numbers).split())


def _wrap(text: str, width: int = 100) -> list[str]:
    """Lines of at most `width` columns, Chinese counted double; a `[wall ...]` always counts 14 columns, so that
    the line breaks do not depend on the clock."""
    lines, line, columns = [], "", 0
    for piece in _pieces(text):
        size = 14 if _WALL.match(piece) else sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in piece)
        if columns + size > width and line.strip() and piece[0] not in "，。；：、）！？”.,;:)!?":
            lines.append(line.rstrip())
            line, columns = "", 0
        if piece == " " and not line:
            continue
        line, columns = line + piece, columns + size
    return [*lines, line.rstrip()] if line.strip() else lines


def _pieces(text: str) -> Iterator[str]:
    """What a line may not break: a `[wall ...]`, a run of Latin characters, a single other character."""
    for match in re.finditer(r"\[wall [^\]]*\]|(?:(?!\[wall )[!-~])+|.", text):
        yield match.group()


# --- sources and figures -----------------------------------------------------------------------------------------


def source(obj: Callable[..., object] | type, max_lines: int = 40) -> None:
    """Show the source of a part of the engine, with its file and line; InvalidSetting above `max_lines` lines."""
    name = getattr(obj, "__qualname__", type(obj).__name__)
    target: Any = getattr(obj, "fget", None) or inspect.unwrap(obj)
    try:
        lines, first = inspect.getsourcelines(target)
        path = Path(inspect.getsourcefile(target) or "").resolve()
    except (TypeError, OSError) as error:
        raise InvalidSetting(f"{name} has no Python source: pass a function, a method or a class.") from error
    code = textwrap.dedent("".join(lines)).rstrip()
    if len(lines) > max_lines:
        raise InvalidSetting(
            f"{name} has {len(lines)} lines, the limit of a listing is {max_lines}: show one of its methods instead."
        )
    where = path.relative_to(_ROOT).as_posix() if path.is_relative_to(_ROOT) else "defined here"
    head = f"{where} [line {first}]" if path.is_relative_to(_ROOT) else where
    _display(f"# {head}\n{code}", f"`{head}`\n\n```python\n{code}\n```")


def show(figure: Any, values: bool = True) -> None:
    """Display a Plotly figure in the project's template and print its digest; `values=False` for clock values."""
    import plotly.graph_objects as go

    from stepengine.viz.digest import digest
    from stepengine.viz.template import CONFIG, template

    if not isinstance(figure, go.Figure):
        raise InvalidSetting(f"show() draws Plotly figures, not {type(figure).__name__}: display it as it is.")
    if _in_notebook():
        go.Figure(figure).update_layout(template=template()).show(config=CONFIG)
    print(digest(figure, values=values))


def _display(plain: str, markdown: str) -> None:
    if not _in_notebook():
        print(plain)
        return
    from IPython.display import display

    display({"text/plain": plain, "text/markdown": markdown}, raw=True)


def _in_kernel() -> bool:
    """True where widgets can be shown: in a notebook's kernel, not in a terminal's IPython."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return get_ipython() is not None
