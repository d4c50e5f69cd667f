"""What the small forms (Predict, Controls) share: files, and answers to the page that it draws as a whole."""

import threading
from pathlib import Path
from typing import Any

import anywidget
import traitlets

STATIC = Path(__file__).parent / "static"


def form_files(name: str) -> tuple[str, str]:
    """Script and style of a form: what all forms share, and its own."""
    script, style = (
        "\n".join((STATIC / f"{part}.{kind}").read_text(encoding="utf-8") for part in ("form", name))
        for kind in ("js", "css")
    )
    return script, style


class Form(anywidget.AnyWidget):
    """A form whose page only proposes: what counts is what the kernel answers, and each answer has a new `serial`."""

    serial = traitlets.Int(0, read_only=True, help="Counts the answers to the page.").tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self._telling = threading.RLock()  # JupyterLab has a widget's messages handled beside the cells, in a thread

    def _put(self, **traits: Any) -> None:
        for trait, value in traits.items():
            self.set_trait(trait, value)

    def _tell(self, **traits: Any) -> None:
        """Set traits and a new serial in one message: the page draws once, from a whole state."""
        with self._telling, self.hold_sync():
            self._put(**traits, serial=self.serial + 1)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["text/plain"] = repr(self)  # no memory address: a checked notebook compares it
        return bundle
