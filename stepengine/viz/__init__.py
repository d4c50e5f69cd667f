"""Pictures of traces. `stepengine.viz.figures` holds the Plotly figures; this package itself loads no Plotly."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepengine.viz.player import StepPlayer

__all__ = ["StepPlayer"]


def __getattr__(name: str) -> Any:
    """`StepPlayer` on first use, so that palettes and figures do not need the widget libraries."""
    if name == "StepPlayer":
        from stepengine.viz.player import StepPlayer

        return StepPlayer
    raise AttributeError(f"module 'stepengine.viz' has no attribute {name!r}")
