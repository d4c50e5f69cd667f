"""What nbval does not compare: markup, warnings, figures. Each figure prints a digest of its data instead."""

from typing import Any


def pytest_collectstart(collector: Any) -> None:
    if hasattr(collector, "skip_compare") and collector.path.suffix == ".ipynb":
        collector.skip_compare += (
            "text/html",
            "application/javascript",
            "stderr",
            "image/png",
            "image/svg+xml",
            "application/vnd.plotly.v1+json",
        )
