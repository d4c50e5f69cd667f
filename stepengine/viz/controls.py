"""Turning an engine's settings in a notebook: the run is redone by the real engine and compared with the one before."""

import inspect
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import traitlets

from stepengine.errors import InvalidSetting, StepEngineError
from stepengine.trace import Trace
from stepengine.viz.choices import Setting, changed, read_setting
from stepengine.viz.counts import Row, effects, rows
from stepengine.viz.form import Form, form_files
from stepengine.viz.kernel import main_loop
from stepengine.viz.sources import source_of
from stepengine.viz.template import HUES, LETTERS
from stepengine.viz.words.scene import count, listed

MOST = 3  # controls of a notebook: one idea at a time
MOST_OWN = 8  # requests that a reader can add
Prompt = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class Asked:
    """One request of a run: what, how (SamplingParams), and before which step it arrives."""

    prompt: Prompt
    params: Any
    arrival: int = 0
    own: bool = False  # added by the reader


@dataclass(frozen=True)
class Done:
    """A finished run: the settings and requests that it was made with, and its trace."""

    values: dict[str, Any]
    requests: tuple[Asked, ...]
    trace: Trace

    def tokens(self) -> dict[Asked, tuple[int, ...]]:
        """Output tokens by request; nothing where the trace holds other requests than were asked for."""
        outputs = list(self.trace.output_ids().values())
        order = sorted(self.requests, key=lambda asked: asked.arrival)
        return dict(zip(order, outputs, strict=True)) if len(outputs) == len(order) else {}


class Panel(Form):
    """The page's side of `Controls`: fields, requests, the button, the sentence and the table."""

    _esm, _css = form_files("controls")
    fields = traitlets.List(read_only=True, help="What can be turned, as it stands.").tag(sync=True)
    requests = traitlets.List(read_only=True).tag(sync=True)
    own = traitlets.Dict(read_only=True, help="How requests may be added; {} where they may not.").tag(sync=True)
    busy = traitlets.Bool(False, read_only=True).tag(sync=True)
    pending = traitlets.Unicode(read_only=True, help="What was turned since the run shown.").tag(sync=True)
    sentence = traitlets.Unicode(read_only=True).tag(sync=True)
    note = traitlets.Unicode(read_only=True, help="Why something was refused.").tag(sync=True)
    table = traitlets.List(read_only=True, help="[name, before, now] in texts; before is '' in a first run.").tag(
        sync=True
    )
    runs = traitlets.Int(0, read_only=True).tag(sync=True)

    def __repr__(self) -> str:
        return "Panel()"


class Controls:
    """Settings to turn, a box for requests of one's own, and a button: displays itself in a notebook.

    `run(prompts, params, **values)` makes an engine with these values, serves the prompts and returns it (an LLM with
    `trace=True`, or the Trace). Where it also takes `arrivals`, requests can arrive at a later step: it then gets one
    step number per prompt (see `serve`). `settings`: name -> a list (choose), (low, high[, step]) (a number), or a
    bool (a switch); the first value, or the one in `start`, is where it stands at first. `prompts`: texts or token
    ids; `params`: SamplingParams, one for all or one each; `arrivals`: steps. `own`: the reader may add requests.
    `lacks(values)` names the settings that do nothing at these values, and why; they are not passed on.

    Runs once when made. `set`, `add`, `drop` and `rerun` do from code what the page does; `sentence` says what came of
    it. At most three settings, any number with `sandbox=True`. Raises InvalidSetting, and what `run` raises; on the
    page its sentence is shown and the last good run stays.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        settings: Mapping[str, Any],
        prompts: Sequence[Prompt],
        params: Any,
        arrivals: Sequence[int] | None = None,
        start: Mapping[str, Any] | None = None,
        own: bool = True,
        lacks: Callable[[dict[str, Any]], Mapping[str, str]] | None = None,
        sandbox: bool = False,
    ) -> None:
        if len(settings) > MOST and not sandbox:
            raise InvalidSetting(f"{len(settings)} controls, {MOST} are the limit: keep those that show the idea.")
        self._settings: dict[str, Setting] = {name: read_setting(name, spec) for name, spec in settings.items()}
        self._run, self._lacks = run, lacks or (lambda values: {})
        self._later = "arrivals" in inspect.signature(run).parameters
        if arrivals is not None and not self._later:
            raise InvalidSetting("arrivals are given, and run() does not take them: add the parameter to it.")
        self._requests = _given(prompts, params, arrivals)
        self._values = {name: setting.first for name, setting in self._settings.items()}
        self._before: Done | None = None
        self._now: Done | None = None
        self._player: Any = None
        self._queued = False  # a run that the page asked for and that has not begun
        self.panel = Panel()
        self.box = ipywidgets.VBox([self.panel])
        self.panel._put(own=self._own_fields() if own else {})
        self.set(**start or {})
        self.rerun()
        self.panel.on_msg(self._asked)

    # -- from code ----------------------------------------------------------------------------------------------

    @property
    def values(self) -> dict[str, Any]:
        """The settings as they stand, without those that do nothing here."""
        lacking = self._lacks(dict(self._values))
        return {name: value for name, value in self._values.items() if name not in lacking}

    @property
    def trace(self) -> Trace:
        """The last good run."""
        return self._last.trace

    @property
    def before(self) -> Trace | None:
        """The run that it is compared with."""
        return self._before.trace if self._before else None

    @property
    def player(self) -> Any:
        """What stands below: a StepPlayer of the first run, then a Compare of the last two."""
        return self._player

    @property
    def sentence(self) -> str:
        """What was changed for the last run, and what came of it."""
        return _told(self._before, self._last)

    @property
    def table(self) -> list[Row]:
        """Counts of the run before and of this one."""
        return rows(self._before.trace if self._before else None, self._last.trace)

    def set(self, **values: Any) -> None:
        """Turn settings; `rerun` makes the run. Raises InvalidSetting and changes nothing where one is refused."""
        unknown = [name for name in values if name not in self._settings]
        if unknown:
            known = listed(list(self._settings)) or "none"
            raise InvalidSetting(f"There is no control {unknown[0]!r} here; there are {known}.")
        checked = {name: self._settings[name].check(value) for name, value in values.items()}
        self._values |= checked
        self._draw(note="")

    def add(self, prompt: Prompt, max_tokens: int = 16, arrival: int = 0) -> None:
        """Add a request of one's own. Raises InvalidSetting for an empty one, a wrong number, or one too many."""
        if not len(prompt):
            raise InvalidSetting("The request is empty: write a few words for the model to go on from.")
        if sum(asked.own for asked in self._requests) >= MOST_OWN:
            raise InvalidSetting(f"{MOST_OWN} requests of your own are the limit: remove one first.")
        if arrival and not self._later:
            raise InvalidSetting(f"arrival is {arrival}, and all requests of this run arrive at step 0: leave it out.")
        tokens = _whole("max_tokens", max_tokens, 1)
        params = self._requests[-1].params.replace(max_tokens=tokens)
        self._requests += (Asked(prompt, params, _whole("arrival", arrival, 0), True),)
        self._draw(note="")

    def drop(self, number: int = -1) -> None:
        """Remove one of the reader's own requests, the last one by default. Raises InvalidSetting for another."""
        own = [asked for asked in self._requests if asked.own]
        if not -len(own) <= number < len(own):
            raise InvalidSetting(f"There is no request {number} of your own: {len(own)} have been added.")
        self._requests = tuple(asked for asked in self._requests if asked is not own[number])
        self._draw(note="")

    def rerun(self) -> None:
        """Run again with the settings and requests as they stand, and compare with the last good run.

        Raises what `run` raises, KeyboardInterrupt too, and TraceError for a run without steps; the last good run
        then stays.
        """
        values, requests = self.values, self._requests
        self.panel._tell(busy=True, note="")
        try:
            prompts, params = [asked.prompt for asked in requests], [asked.params for asked in requests]
            given = {"arrivals": [asked.arrival for asked in requests]} if self._later else {}
            made = self._run(prompts, params, **given, **values)
            trace = source_of(made).trace
            if self._now is not None and trace is self._now.trace:
                raise InvalidSetting("run() gave back the run before: make a new LLM in it each time.")
            done = Done(values, requests, trace)
            player = self._play(done)
        finally:
            self.panel._tell(busy=False)
        if self._player is not None:
            self._player.close()
        self._before, self._now, self._player = self._now, done, player
        self.box.children = [self.panel, player]
        texts = [list(row.texts(self._before is None)) for row in self.table]
        self.panel._put(sentence=self.sentence, table=texts, runs=self.panel.runs + 1)
        self._draw(note="")

    # -- from the page ------------------------------------------------------------------------------------------

    def _asked(self, _: Any, content: Any, __: Any) -> None:
        """A message of the page; a run waits for the kernel's own thread, where it can be interrupted."""
        message = content if isinstance(content, dict) else {}
        loop = main_loop() if message.get("do") == "run" else None
        if loop is None:
            self._answer(message)
        elif not self._queued:
            self._queued = True
            loop.add_callback(self._answer_in_turn, message)

    def _answer_in_turn(self, message: dict[str, Any]) -> None:
        """In the kernel's own thread, which ignores Ctrl-C between cells: here it counts."""
        self._queued = False
        saved = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self._answer(message)
        finally:
            signal.signal(signal.SIGINT, saved)

    def _answer(self, message: dict[str, Any]) -> None:
        """Do what the page asks. Nothing may be raised here: whatever goes wrong is told in the panel."""
        try:
            self._do(message)
        except StepEngineError as error:
            self._draw(note=str(error) + (" The last run stays." if message.get("do") == "run" else ""))
        except KeyboardInterrupt:
            self._draw(note="Interrupted: the last run stays.")
        except Exception as error:
            self._draw(note=f"run() failed with {type(error).__name__}: {error}. The last run stays.")

    def _do(self, message: dict[str, Any]) -> None:
        action, new = message.get("do"), message.get("request")
        if action == "set" and message.get("name") in self._settings:
            self.set(**{message["name"]: message.get("value")})
        elif action == "drop":
            self.drop(_whole("request", message.get("number"), 0))
        elif action in ("add", "run") and self.panel.own and isinstance(new, dict) and str(new.get("text", "")).strip():
            self.add(str(new["text"]), new.get("tokens", 16), new.get("arrival") or 0)
            self.panel._put(own={**self.panel.own, "taken": self.panel.own["taken"] + 1})
            self._draw(note="")
        elif action == "add":
            self.add("")
        else:
            self._draw()  # "hello": the page asks whether anybody is here
        if action == "run":
            self.rerun()

    # -- what is shown ------------------------------------------------------------------------------------------

    @property
    def _last(self) -> Done:
        if self._now is None:
            raise InvalidSetting("There is no run yet: call rerun().")
        return self._now

    def _own_fields(self) -> dict[str, Any]:
        return {"later": self._later, "tokens": self._requests[-1].params.max_tokens, "taken": 0}

    def _play(self, done: Done) -> Any:
        """A player of the first run, or the last good run beside this one."""
        if self._now is None:
            from stepengine.viz.player import StepPlayer

            return StepPlayer(done.trace)
        from stepengine.viz.compare import Compare

        return Compare(self._now.trace, done.trace, names=("before", "now"))

    def _draw(self, **traits: Any) -> None:
        """Tell the page how things stand."""
        lacking = self._lacks(dict(self._values))
        fields = [
            {**setting.drawn(self._values[name]), "lacks": lacking.get(name, "")}
            for name, setting in self._settings.items()
        ]
        turned = [] if self._now is None else _changes(self._now, self.values, self._requests)
        pending = f"Not run yet: {listed(turned)}." if turned else ""
        self.panel._tell(fields=fields, requests=self._drawn_requests(), pending=pending, **traits)

    def _drawn_requests(self) -> list[dict[str, Any]]:
        order = sorted(self._requests, key=lambda asked: asked.arrival)
        few = len(order) <= len(HUES)
        return [
            {
                "label": LETTERS[i] if few else str(i),
                "text": _short(asked.prompt),
                "tokens": asked.params.max_tokens,
                "arrival": asked.arrival,
                "own": [other for other in self._requests if other.own].index(asked) if asked.own else -1,
            }
            for i, asked in enumerate(order)
        ]

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._last.values.items())
        sizes = f"{count(len(self.trace.requests), 'request')}, {count(len(self.trace.steps), 'step')}"
        return f"Controls({values}{': ' if values else ''}{sizes})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle: Any = self.box._repr_mimebundle_(**kwargs)
        if bundle is None:
            return {"text/plain": repr(self)}
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = repr(self)
        return bundle


def serve(llm: Any, prompts: Sequence[Prompt], params: Sequence[Any], arrivals: Sequence[int]) -> Any:
    """Serve prompts on an LLM, each arriving before the given step, to the end of all; the LLM.

    All are checked first. Raises InvalidRequest as `LLM.generate` does, naming the prompt's index.
    """
    engine, left = llm.engine, []
    for index in sorted(range(len(prompts)), key=lambda i: arrivals[i]):
        prompt = prompts[index]
        ids = list(llm.tokenizer.encode(prompt)) if isinstance(prompt, str) else list(prompt)
        try:
            engine.check(ids, params[index])
        except StepEngineError as error:
            raise type(error)(f"Prompt {index}: {error}") from None
        left.append((arrivals[index], ids, params[index]))
    step = 0
    while left or engine.has_unfinished():
        if not engine.has_unfinished():
            step = max(step, left[0][0])  # nothing to do until the next one arrives
        while left and left[0][0] <= step:
            _, ids, own = left.pop(0)
            engine.add_request(ids, own)
        engine.step()
        step += 1
    return llm


def _given(prompts: Sequence[Prompt], params: Any, arrivals: Sequence[int] | None) -> tuple[Asked, ...]:
    if isinstance(prompts, str) or not len(prompts):
        raise InvalidSetting("prompts must be a list of at least one text or list of token ids.")
    each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
    steps = list(arrivals) if arrivals is not None else [0] * len(prompts)
    for name, values in (("params", each), ("arrivals", steps)):
        if len(values) != len(prompts):
            raise InvalidSetting(f"{name} has {len(values)} entries for {len(prompts)} prompts: give one each.")
    return tuple(Asked(*one) for one in zip(prompts, each, steps, strict=True))


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = int(value) if not isinstance(value, bool | float) else None
    except (TypeError, ValueError):
        number = None
    if number is None or number < least:
        raise InvalidSetting(f"{name} is {value!r}: it must be a whole number, at least {least}.")
    return number


def _short(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        return count(len(prompt), "token")
    text = " ".join(prompt.split())
    return text if len(text) <= 28 else text[:27].rstrip() + "…"


def _changes(before: Done, values: dict[str, Any], requests: Sequence[Asked]) -> list[str]:
    """What is different from that run: settings, and requests more or fewer."""
    more = sum(asked not in before.requests for asked in requests)
    fewer = sum(asked not in requests for asked in before.requests)
    words = [f"{count(number, 'request')} {what}" for number, what in ((more, "more"), (fewer, "fewer")) if number]
    return [*changed(before.values, values), *words]


def _told(before: Done | None, now: Done) -> str:
    """What was changed, and what came of it."""
    if before is None:
        return f"First run: {effects(None, now.trace)}."
    changes = _changes(before, now.values, now.requests)
    return f"{listed(changes) or 'Nothing changed'}: {effects(before.trace, now.trace)}; {_tokens(before, now)}."


def _tokens(before: Done, now: Done) -> str:
    """Whether the requests that both runs had got the same tokens."""
    one, other = before.tokens(), now.tokens()
    both = [asked for asked in other if asked in one]
    if not both:
        return "no request in common"
    places = {asked: place for place, asked in enumerate(other)}
    few = len(places) <= len(HUES)
    names = [LETTERS[places[a]] if few else str(places[a]) for a in both if one[a] != other[a]]
    if not names:
        return "the same tokens"
    named = listed(names[:4] + ([f"{len(names) - 4} others"] if names[4:] else []))
    return f"other tokens for {named}"
