"""Pure functions from traces to Plotly figures, and the digest that notebooks print below them.

Each figure carries the project's template, a title that says the finding, units on its axes, hover text in words
and a text alternative in `figure.layout.meta["alt"]`. Show one without a toolbar: `figure.show(config=CONFIG)`.
"""

import plotly.graph_objects as go  # noqa: F401  (a missing Plotly is noticed here, not in the middle of a figure)

from stepengine.viz.computed import recomputation_triangle
from stepengine.viz.digest import digest
from stepengine.viz.ladder import ladder_bars
from stepengine.viz.measures import kv_memory, latency_percentiles, step_time
from stepengine.viz.template import CONFIG
from stepengine.viz.timeline import compare_timelines, scheduler_timeline

__all__ = [
    "CONFIG",
    "compare_timelines",
    "digest",
    "kv_memory",
    "ladder_bars",
    "latency_percentiles",
    "recomputation_triangle",
    "scheduler_timeline",
    "step_time",
]
