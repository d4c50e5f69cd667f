"""One question's box in a notebook: the reader commits to a guess, and sees there how it was graded."""

from collections.abc import Callable, Sequence
from typing import Any

import traitlets

from stepengine.errors import InvalidSetting
from stepengine.viz.form import Form, form_files
from stepengine.viz.guess import LETTERS, choice_place, order_places, read_number

Guess = float | str | tuple[str, ...]
VERDICTS = {True: "right", False: "off", None: "none"}


class Predict(Form):
    """A box for one guess: a number, one of `choices`, or the items of `order` put in order.

    `committed` is the guess (float, the choice's text, or the items in the reader's order), None before. A guess
    may be changed until `reveal` shows its grade. `guess` is one that was written into the cell; the box then only
    shows it. `recorded` tells whether anybody will still read the guess; where it says no, nothing is taken.
    Raises InvalidSetting for a guess that cannot be read; on the page that sentence is shown instead.
    """

    _esm, _css = form_files("predict")
    question = traitlets.Unicode(read_only=True).tag(sync=True)
    name = traitlets.Unicode(read_only=True, help="The question's key.").tag(sync=True)
    kind = traitlets.Enum(("number", "choice", "order"), "number", read_only=True).tag(sync=True)
    options = traitlets.List(traitlets.Unicode(), read_only=True).tag(sync=True)
    state = traitlets.Enum(("open", "committed", "revealed", "replaced"), "open", read_only=True).tag(sync=True)
    source = traitlets.Enum(("", "box", "cell"), "", read_only=True, help="Where it was committed.").tag(sync=True)
    placed = traitlets.List(traitlets.Int(), read_only=True, help="Options committed, by number.").tag(sync=True)
    said = traitlets.Unicode(read_only=True, help="The committed guess in words.").tag(sync=True)
    verdict = traitlets.Enum(("", "right", "off", "none"), "", read_only=True).tag(sync=True)
    grade = traitlets.Unicode(read_only=True, help="The grade in words.").tag(sync=True)
    note = traitlets.Unicode(read_only=True, help="Why something was refused.").tag(sync=True)

    def __init__(
        self,
        question: str,
        choices: Sequence[str] | None = None,
        order: Sequence[str] | None = None,
        guess: object = None,
        name: str = "",
        recorded: Callable[[], bool] = lambda: True,
    ) -> None:
        if choices is not None and order is not None:
            raise InvalidSetting("A question has choices or an order, not both: leave one of them out.")
        kind = "number" if choices is None and order is None else "order" if choices is None else "choice"
        super().__init__()
        self._recorded = recorded
        self.committed: Guess | None = None
        options = [str(option) for option in choices or order or ()]
        self._put(question=question, name=name, kind=kind, options=options)
        if guess is not None:
            self._take(guess, "cell")
        self.on_msg(self._asked)

    def commit(self, guess: object) -> None:
        """Take the guess: a number, a choice's text or letter, or the items (or their letters) in order."""
        if self.source == "cell":
            raise InvalidSetting("The guess is written in the cell: change it there, and run the cell again.")
        if self.state == "revealed":
            raise InvalidSetting("The answer has been shown: run this cell and what follows again to guess anew.")
        if self.state == "replaced" or not self._recorded():
            self._put(state="replaced")
            raise InvalidSetting("The record of guesses was begun anew since: run this cell again, then commit.")
        self._take(guess, "box")

    def change(self) -> None:
        """Take the committed guess back; refused once it is graded, or where it is written in the cell."""
        if self.state == "committed" and self.source == "box":
            self.committed = None
            self._tell(state="open", source="", said="", placed=[], note="")

    def reveal(self, grade: str, right: bool | None) -> None:
        """Show the grade (`right` is None without a guess) and take no further guess."""
        self._tell(state="revealed", verdict=VERDICTS[right], grade=grade, note="")

    def replace(self) -> None:
        """Close the box: its question was asked again elsewhere."""
        if self.state != "revealed":
            self._tell(state="replaced", note="This question was asked again: that box counts, not this one.")

    def _take(self, guess: object, source: str) -> None:
        """Commit a guess; one written into the cell that cannot be read is shown with the reason."""
        try:
            self.committed, placed, said = self._read(guess)
        except InvalidSetting as error:
            if source == "box":
                raise
            self._tell(state="committed", source=source, said=str(guess), note=str(error))
            return
        self._tell(state="committed", source=source, said=said, placed=placed, note="")

    def _read(self, guess: object) -> tuple[Guess, list[int], str]:
        """The guess, the numbers of the options in it, and its words."""
        if self.kind == "number":
            number = read_number(guess)
            return number, [], f"{number:.10g}"
        if self.kind == "choice":
            place = choice_place(guess, self.options)
            if place is None:
                said = "Nothing is chosen" if guess is None else f"{guess!r} is none of the choices"
                raise InvalidSetting(f"{said}: choose one of a to {LETTERS[len(self.options) - 1]}.")
            return self.options[place], [place], f"{LETTERS[place]}) {self.options[place]}"
        places = order_places(guess, self.options)
        items = tuple(self.options[place] for place in places)
        return items, places, ", ".join(f"{i + 1} {item}" for i, item in enumerate(items))

    def _asked(self, _: Any, content: Any, __: Any) -> None:
        """A message of the page: the answer is always a new `serial`, with the reason where it was refused."""
        message = content if isinstance(content, dict) else {}
        try:
            if message.get("do") == "commit":
                self.commit(self._meant(message))
            elif message.get("do") == "change":
                self.change()
                self._tell()
            elif message.get("do") == "hello":
                self._tell()
        except InvalidSetting as error:
            self._tell(note=str(error))

    def _meant(self, message: dict[str, Any]) -> object:
        """The guess in a message: a text, or the numbers of options."""
        if self.kind == "number":
            return message.get("guess")
        places = [p for p in message.get("places") or () if isinstance(p, int) and 0 <= p < len(self.options)]
        items = [self.options[place] for place in places]
        return items if self.kind == "order" else items[0] if items else None

    def __repr__(self) -> str:
        """The question only: a stored output would outlive what was committed."""
        return f"Predict({self.name or self.question!r}, {self.kind})"
