"""Pure functions from traces to Plotly figures, and the digest that notebooks print below them.

Each figure carries the project's template, a title that says the finding, units on its axes, hover text in words
and a text alternative in `figure.layout.meta["alt"]`. Show one without a toolbar: `figure.show(config=CONFIG)`.
"""

import plotly.graph_objects as go  # noqa: F401  (a missing Plotly is noticed here, not in the middle of a figure)

from stepengine.viz.blocks import block_arrows, block_map
from stepengine.viz.chunked import budget_and_gaps, budget_sweep, mixed_schedule
from stepengine.viz.computed import recomputation_triangle
from stepengine.viz.digest import digest
from stepengine.viz.fragmentation import fragmentation
from stepengine.viz.ladder import ladder_bars
from stepengine.viz.lanes import host_device_lanes
from stepengine.viz.measures import kv_memory, latency_percentiles, step_time
from stepengine.viz.prefix import prefix_hits, prefix_tree, ttft_by_hits
from stepengine.viz.quantized import error_fill, hessian, on_grid
from stepengine.viz.quantized_costs import int4_speed, perplexity, weight_bytes, weight_memory
from stepengine.viz.roofline import kernel_bars, record_roofline, roofline
from stepengine.viz.sharing import ref_counts
from stepengine.viz.states import request_states
from stepengine.viz.template import CONFIG
from stepengine.viz.tiles import hbm_traffic, kernel_loads, tile_walk
from stepengine.viz.timeline import compare_timelines, scheduler_timeline

__all__ = [
    "CONFIG",
    "block_arrows",
    "block_map",
    "budget_and_gaps",
    "budget_sweep",
    "compare_timelines",
    "digest",
    "error_fill",
    "fragmentation",
    "hbm_traffic",
    "hessian",
    "host_device_lanes",
    "int4_speed",
    "kernel_bars",
    "kernel_loads",
    "kv_memory",
    "ladder_bars",
    "latency_percentiles",
    "mixed_schedule",
    "on_grid",
    "perplexity",
    "recomputation_triangle",
    "prefix_hits",
    "prefix_tree",
    "record_roofline",
    "ref_counts",
    "request_states",
    "roofline",
    "scheduler_timeline",
    "step_time",
    "tile_walk",
    "ttft_by_hits",
    "weight_bytes",
    "weight_memory",
]
