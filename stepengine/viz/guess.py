"""Reading a guess: a number, one of some choices, or items in order. Plain functions, no widget."""

import math
import string
from collections.abc import Sequence
from fractions import Fraction

from stepengine.errors import InvalidSetting

LETTERS = string.ascii_lowercase


def read_number(guess: object) -> float:
    """A finite number from a number or its text: "1,000", "1/4" and "15 %" (15) too. Raises InvalidSetting."""
    if guess is None or not str(guess).strip():
        raise InvalidSetting("The box is empty: type a number, such as 42 or 0.5.")
    text = str(guess).strip().removesuffix("%").strip().replace(",", "").replace("_", "")
    try:
        number = float(Fraction(text) if "/" in text else text)
    except (ValueError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidSetting(f"{_short(guess)} is no number: type one, such as 42, 0.5 or 1/4.")
    return number


def choice_place(guess: object, options: Sequence[str]) -> int | None:
    """The number from 0 of the option meant, by its text or else by its letter; None where it is none of them."""
    text = str(guess).strip().casefold()
    texts = [option.strip().casefold() for option in options]
    if text in texts:
        return texts.index(text)
    letter = text.removesuffix(")")
    return LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS[: len(options)] else None


def order_places(guess: object, options: Sequence[str]) -> list[int]:
    """The options' numbers in the order of the guess: a list of texts or letters, or letters in one text ("bca").

    Raises InvalidSetting where an option is missing or comes twice.
    """
    given = [char for char in guess if char not in " ,;>"] if isinstance(guess, str) else guess
    places = [choice_place(item, options) for item in given] if isinstance(given, Sequence) else []
    known = [place for place in places if place is not None]
    if len(known) != len(places) or sorted(known) != list(range(len(options))):
        backwards = LETTERS[: len(options)][::-1]
        raise InvalidSetting(
            f"{_short(guess)} does not put the {len(options)} items in order: write their letters, such as "
            f"{backwards!r}, each once."
        )
    return known


def _short(guess: object) -> str:
    text = repr(guess)
    return text if len(text) <= 60 else text[:60] + "…"
