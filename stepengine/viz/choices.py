"""A setting as the reader may turn it: one of some values, a number in a range, or a switch. No widget."""

from dataclasses import dataclass
from typing import Any

from stepengine.errors import InvalidSetting


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    name: str
    options: tuple[Any, ...]

    @property
    def first(self) -> Any:
        return self.options[0]

    def check(self, value: Any) -> Any:
        """The option that equals the value, also one given as its text. Raises InvalidSetting."""
        for option in self.options:
            if option == value and type(option) is type(value):
                return option
        for option in self.options:
            if isinstance(value, str) and shown(option) == value:
                return option
        listed = ", ".join(shown(option) for option in self.options)
        raise InvalidSetting(f"{self.name} is {value!r}, which this control does not offer: choose one of {listed}.")

    def drawn(self, value: Any) -> dict[str, Any]:
        """For the page."""
        texts = [shown(option) for option in self.options]
        return {"name": self.name, "kind": "choice", "options": texts, "value": shown(value)}


@dataclass(frozen=True)
class Range:
    """A number from low to high, low plus a multiple of step; a whole one where all three are."""

    name: str
    low: float
    high: float
    step: float

    @property
    def first(self) -> float:
        return self.low

    def check(self, value: Any) -> float:
        """The number, also from its text. Raises InvalidSetting."""
        whole = all(isinstance(end, int) for end in (self.low, self.high, self.step))
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        places = None if number is None or not self.low <= number <= self.high else (number - self.low) / self.step
        if number is None or places is None or abs(places - round(places)) > 1e-6:
            steps = "" if self.step == 1 else f" in steps of {self.step:g}"
            raise InvalidSetting(
                f"{self.name} is {value!r}: choose a number from {self.low:g} to {self.high:g}{steps}."
            )
        return int(number) if whole else number

    def drawn(self, value: Any) -> dict[str, Any]:
        """For the page."""
        ends = {"low": self.low, "high": self.high, "step": self.step}
        return {"name": self.name, "kind": "range", **ends, "value": f"{value:g}"}


@dataclass(frozen=True)
class Switch:
    """On or off; off at first."""

    name: str
    first: bool

    def check(self, value: Any) -> bool:
        """The value, which must be True or False. Raises InvalidSetting."""
        if not isinstance(value, bool):
            raise InvalidSetting(f"{self.name} is {value!r}: it is a switch, True or False.")
        return value

    def drawn(self, value: Any) -> dict[str, Any]:
        """For the page."""
        return {"name": self.name, "kind": "switch", "value": bool(value)}


Setting = Choice | Range | Switch


def read_setting(name: str, spec: Any) -> Setting:
    """A list is a choice, (low, high[, step]) a range, a bool a switch. Raises InvalidSetting for anything else."""
    if isinstance(spec, bool):
        return Switch(name, spec)
    if isinstance(spec, list) and len(spec) > 1 and len({shown(option) for option in spec}) == len(spec):
        return Choice(name, tuple(spec))
    if isinstance(spec, tuple) and len(spec) in (2, 3) and all(_is_number(end) for end in spec):
        low, high, step = (*spec, 1)[:3]
        if low < high and step > 0:
            return Range(name, low, high, step)
    raise InvalidSetting(
        f"The control {name} is {spec!r}: give a list of at least two different values, (low, high) or "
        f"(low, high, step), or True or False."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as the page shows it; None is what the engine does when left alone."""
    return "default" if value is None else str(value)


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Such as ["block_size 16 -> 4"]: every setting that differs; one that only one side has is told if it was set."""
    words = []
    for name in {**before, **now}:
        if name in before and name in now:
            if before[name] != now[name]:
                words.append(f"{name} {shown(before[name])} -> {shown(now[name])}")
        elif (before | now)[name] not in (None, False):
            words.append(f"{name} {shown(now[name])}" if name in now else f"no {name}")
    return words
