"""stepengine: an LLM inference engine that grows by one optimisation per stage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepengine.core.request import RequestOutput, SamplingParams
    from stepengine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]

_HOME = {
    "LLM": "stepengine.llm",
    "RequestOutput": "stepengine.core.request",
    "SamplingParams": "stepengine.core.request",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use (PEP 562): `import stepengine` alone must not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'stepengine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
