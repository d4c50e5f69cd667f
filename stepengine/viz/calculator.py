"""The calculator as a widget: the page sends what was chosen, Python answers, and nothing is computed twice."""

import html
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from stepengine.calculator import (
    GPU,
    GPUS,
    KV_BITS,
    MODELS,
    TABLE_BITS,
    WEIGHTS,
    Answer,
    Question,
    Shape,
    answer,
    gpu_of,
    shape_of,
)
from stepengine.errors import InvalidSetting, StepEngineError
from stepengine.viz.calculator_text import NOT_MEASURED, as_text, bar_text, blocks, sentence, size

STATIC = Path(__file__).parent / "static"
WHOLE = {"kv_bits": "K/V bits", "context": "context", "batch": "batch", "group_size": "group size",
         "table_bits": "embedding and head"}  # fmt: skip
REAL = {"utilisation": "memory used", "reserve_gb": "reserve"}


class Calculator(anywidget.AnyWidget):
    """Bytes of weights and K/V, sequences that fit, and least times, for a model on a GPU. Nothing is measured.

    model: a name (`stepengine.calculator.MODELS`, the catalogue), a checkpoint's folder, a `ModelConfig`, or a dict
    with config.json's fields. settings: those of `stepengine.calculator.Question`: gpu, weights, kv_bits, context,
    batch, utilisation, group_size, table_bits, reserve_gb. `answer` holds the numbers, `text` the formulas.
    Raises `InvalidSetting` or `ModelError`; what the reader types on the page gets a sentence there instead.
    """

    _esm = STATIC / "calculator.js"
    _css = STATIC / "calculator.css"
    asked = traitlets.Unicode("{}", help="What the page asks: the changed settings, as JSON.").tag(sync=True)
    data = traitlets.Unicode("{}", read_only=True, help="What the page shows, as JSON.").tag(sync=True)

    def __init__(self, model: Any = "Llama-3-8B", gpu: GPU | str = "H100 (SXM)", **settings: Any) -> None:
        shape, device = shape_of(model), gpu_of(gpu)
        self._models: dict[str, Any] = {name: name for name in MODELS}
        self._gpus = dict(GPUS)
        self.answer = _answered(shape, device, settings)
        self._models[shape.name] = shape
        self._gpus[device.name] = device
        super().__init__()
        self._show()

    @property
    def text(self) -> str:
        """The whole answer: each formula with its numbers, each number with its source."""
        return as_text(self.answer)

    def set(self, **settings: Any) -> "Calculator":
        """Change settings (model, gpu, weights, context, ...); returns the calculator. Raises as `Calculator` does."""
        self.answer = self._changed(settings)
        self._show()
        return self

    def _changed(self, settings: Mapping[str, Any]) -> Answer:
        """The answer with other settings; what is new is kept only if all of it can be answered."""
        given, question = dict(settings), self.answer.question
        model, device = given.pop("model", question.shape), given.pop("gpu", question.gpu)
        shape = shape_of(self._models.get(model, model) if isinstance(model, str) else model)
        gpu = gpu_of(self._gpus.get(device, device) if isinstance(device, str) else device)
        unknown = [name for name in given if name not in _SETTINGS]
        if unknown:
            raise InvalidSetting(_unknown(unknown[0]))
        found = answer(replace(question, shape=shape, gpu=gpu, **given))
        self._models[shape.name] = shape
        self._gpus[gpu.name] = gpu
        return found

    @traitlets.observe("asked")
    def _on_asked(self, change: Any) -> None:
        try:
            asked = _settings_of(change["new"])
            asked.pop("turn", None)
            for name, known in (("model", self._models), ("gpu", self._gpus)):  # a page names none of its own
                if name in asked and (not isinstance(asked[name], str) or asked[name] not in known):
                    raise InvalidSetting(f"{name} is {asked[name]!r}; choose one of {', '.join(known)}.")
            self.answer = self._changed({name: _read(name, value) for name, value in asked.items()})
        except StepEngineError as error:
            self._show(str(error))
        else:
            self._show()

    def _show(self, problem: str = "") -> None:
        found, q = self.answer, self.answer.question
        page = {
            "problem": problem,
            "sentence": sentence(found),
            "note": NOT_MEASURED,
            "fits": found.sequences > 0,
            "sequences": found.sequences,
            "settings": {"model": q.shape.name, "gpu": q.gpu.name, **{name: getattr(q, name) for name in _SETTINGS}},
            "choices": {
                "model": list(self._models),
                "gpu": list(self._gpus),
                "weights": list(WEIGHTS),
                "kv_bits": list(KV_BITS),
                "table_bits": list(TABLE_BITS),
            },
            "blocks": [
                {"name": b.name, "title": b.title, "value": b.value, "lines": b.lines, "sources": b.sources}
                for b in blocks(found)
            ],
            "bar": [{"name": name, "bytes": count, "size": size(count)} for name, count in found.bar],
            "memory": {"bytes": found.memory, "size": size(found.memory), "usable": found.usable},
            "bar_text": bar_text(found),
        }
        self.set_trait("data", json.dumps(page, ensure_ascii=False, separators=(",", ":")))

    def __repr__(self) -> str:
        q = self.answer.question
        return (
            f"Calculator({q.shape.name} in {q.weights} on {q.gpu.name}, {q.kv_bits}-bit K/V, context {q.context}, "
            f"batch {q.batch})"
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:  # what a page without a kernel shows
            bundle[0]["text/plain"] = f"{self!r}\n{self.text}"
            bundle[0]["text/html"] = as_html(self.answer)
        return bundle


_SETTINGS = ("weights", "kv_bits", "context", "batch", "utilisation", "group_size", "table_bits", "reserve_gb")


def _answered(shape: Shape, gpu: GPU, settings: Mapping[str, Any]) -> Answer:
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise InvalidSetting(_unknown(unknown[0]))
    return answer(Question(shape, gpu, **settings))


def _unknown(name: str) -> str:
    return f"{name!r} is no setting of the calculator; use one of model, gpu, {', '.join(_SETTINGS)}."


def _settings_of(sent: str) -> dict[str, Any]:
    try:
        asked = json.loads(sent)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise InvalidSetting("The page must send settings by name.")
    return asked


def _read(name: str, value: Any) -> Any:
    """What the reader typed or chose, as a setting. Raises `InvalidSetting` for what is no number."""
    text = str(value).strip().replace(",", "").replace(" ", "")
    if name in WHOLE:
        try:
            return int(text)
        except ValueError:
            raise InvalidSetting(f"{WHOLE[name]} is {value!r}; it must be a whole number.") from None
    if name in REAL:
        try:
            return float(text)
        except ValueError:
            raise InvalidSetting(f"{REAL[name]} is {value!r}; it must be a number, such as 0.9.") from None
    return value


def as_html(found: Answer) -> str:
    """The answer as a table, for pages that run no kernel."""
    rows = []
    for block in blocks(found):
        lines = "".join(f"<div><code>{html.escape(line)}</code></div>" for line in block.lines)
        sources = "".join(f"<div><small>{html.escape(source)}</small></div>" for source in block.sources)
        rows.append(
            f'<tr><th scope="row" style="text-align:left;vertical-align:top">{html.escape(block.title)}</th>'
            f'<td style="text-align:left"><b>{html.escape(block.value)}</b>{lines}{sources}</td></tr>'
        )
    caption = f"<caption style='text-align:left'>{html.escape(sentence(found))}</caption>"
    return f"<table>{caption}<tbody>{''.join(rows)}</tbody></table><p><small>{html.escape(NOT_MEASURED)}</small></p>"
