"""Runs in a notebook's kernel while the site is built: what a widget leaves on a page without a kernel.

A widget that can save itself (StepPlayer, Compare) becomes that file, in a frame. Any other shows its static text,
and where it lives. The widget classes know nothing of this: IPython is told how to display them.
"""

import html
from pathlib import Path
from typing import Any

FRAME = '<iframe class="se-player" title="{title}" src="{{{{players}}}}/{file}" data-size="{size}"></iframe>'
LIVE = '<p class="se-live">{what} <span>Live in JupyterLab.</span></p>'
WIDGETS = (("ipywidgets.widgets.widget", "Widget"), ("stepengine.viz.controls", "Controls"))


class Saved:
    """Writes each displayed widget that can save itself to `folder`, once when shown and again at the end."""

    def __init__(self, shell: Any, folder: str, name: str) -> None:
        self.folder, self.name = Path(folder), name
        self.shown: list[tuple[Any, Path]] = []
        for module, kind in WIDGETS:
            shell.display_formatter.mimebundle_formatter.for_type_by_name(module, kind, self.bundle)

    def bundle(self, widget: Any, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """The mime bundle of a widget on the site."""
        if hasattr(widget, "save_html"):
            target = self.folder / f"{self.name}-{len(self.shown)}.html"
            self.shown.append((widget, target))
            self.write(widget, target)
            title = html.escape(f"{type(widget).__name__}, to step through: {widget!r}", quote=True)
            frame = FRAME.format(title=title, file=target.name, size=getattr(widget, "size", "page"))
            return {"text/html": frame, "text/plain": repr(widget)}
        own = type(widget)._repr_mimebundle_(widget)
        data = own[0] if isinstance(own, tuple) else own or {}
        static = data.get("text/html") or f"<code>{html.escape(repr(widget))}</code>"
        return {"text/html": LIVE.format(what=static), "text/plain": repr(widget)}

    def finish(self) -> None:
        """A live player has gone on since it was shown: keep what it has recorded by the notebook's end."""
        for widget, target in self.shown:
            self.write(widget, target)

    def write(self, widget: Any, target: Path) -> None:
        try:
            widget.save_html(target)
        except Exception as error:  # a live player before its first step
            target.write_text(f"<!doctype html><title>{type(widget).__name__}</title><p>{html.escape(str(error))}</p>")
