"""Pictures of traces. `stepengine.viz.figures` holds the Plotly figures; this package itself loads no Plotly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepengine.viz.calculator import Calculator
    from stepengine.viz.compare import Compare
    from stepengine.viz.controls import Controls
    from stepengine.viz.player import StepPlayer
    from stepengine.viz.predict import Predict

__all__ = ["Calculator", "Compare", "Controls", "Predict", "StepPlayer"]

_HOMES = {"Calculator": "calculator", "Compare": "compare", "Controls": "controls", "Predict": "predict"}


def __getattr__(name: str) -> Any:
    """A widget on first use, so that palettes and figures do not need the widget libraries."""
    if name not in __all__:
        raise AttributeError(f"module 'stepengine.viz' has no attribute {name!r}")
    return getattr(import_module(f"stepengine.viz.{_HOMES.get(name, 'player')}"), name)
