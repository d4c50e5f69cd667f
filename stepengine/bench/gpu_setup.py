"""What the parts of the GPU suite share: the model's shape, engines, and timing by device events."""

import gc
import inspect
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stepengine.bench.runs import own_weights
from stepengine.llm import LLM
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import random_checkpoint, tiny_config
from stepengine.stage5_gptq.calibrate import Recipe
from stepengine.stage5_gptq.grid import Grid
from stepengine.stage5_gptq.loader import quantize_folder
from stepengine.stages import ARRIVES, STAGES, find_stage

SHAPE = "Qwen3-0.6B's shape, random weights"
SWITCHES = ("cuda_graphs", "pipelined")


@dataclass(frozen=True)
class Setup:
    """One part's surroundings. `until`: when it will be ended (time.time()); `known`: results of parts before it."""

    smoke: bool
    out: Path  # the suite's output folder
    work: Path  # a temporary folder, shared by the parts
    until: float
    known: Mapping[str, Any]

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    @property
    def dtype(self) -> str:
        return "float32" if self.smoke else "bfloat16"

    @property
    def model(self) -> str:
        return "toy shape, random weights" if self.smoke else SHAPE

    def of(self, full: Any, toy: Any) -> Any:
        """A size: `toy` in a smoke run."""
        return toy if self.smoke else full

    def config_dict(self) -> dict[str, Any]:
        """The model's `config.json`."""
        if self.smoke:
            return tiny_config("qwen3")
        return tiny_config(
            "qwen3",
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            rope_theta=1e6,
            max_position_embeddings=40960,
            dtype="bfloat16",
        )

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.config_dict())

    def checkpoint(self) -> Path:
        """The random checkpoint's folder, written by the first part that asks."""
        folder = self.work / "model"
        if not folder.exists():
            aside = random_checkpoint(self.config_dict(), self.work / f"model.{os.getpid()}")
            aside.rename(folder)  # a part that is ended while it writes leaves nothing that looks whole
        return folder

    def quantized(self) -> Path:
        """The same in 4 bits, rounded to nearest: for random weights there is no text to calibrate on."""
        folder = self.work / "model-4bit"
        if not folder.exists():
            # On a CPU, groups that only the plain layers take: what they compute is exact.
            recipe = Recipe(Grid(4, self.of(64, 16)), None)
            aside = self.work / f"model-4bit.{os.getpid()}"
            quantize_folder(self.checkpoint(), aside, recipe, device=self.device, progress=False).rename(folder)
        return folder

    def left_s(self) -> float:
        return self.until - time.time()

    def ceiling(self, name: str) -> float | None:
        """ "copy_gbs" or "matmul_tflops" as measured in this run; None where that part did not get there."""
        found = self.known.get("ceilings", {}).get("results", {}).get("best", {}).get(name)
        return None if found is None else float(found)


def engine(setup: Setup, stage: str, seqs: int, max_len: int, dtype: str | None = None, **settings: Any) -> LLM:
    """An engine with K/V memory for `seqs` requests of `max_len` tokens, or for as many as the GPU has room for.

    Stages before 2 then run fewer at once; later ones have fewer blocks.
    """
    config, dtype = setup.config, dtype or setup.dtype
    gc.collect()  # an engine that is done with may still wait for it, with all of its memory
    if not setup.smoke:
        torch.cuda.empty_cache()
    parts = find_stage(stage).parts
    token = config.kv_bytes_per_token(dtype)
    room = math.inf if setup.smoke else 0.75 * torch.cuda.mem_get_info()[0]
    size = parts.block_size(max_len, None)
    if parts.block_pool is not None:
        settings["num_blocks"] = int(min(seqs * -(-max_len // size), room // (size * token)))
    elif size:
        seqs = int(min(seqs, room // (max_len * token)))
        settings["kv_cache_memory"] = seqs * max_len * token
    if setup.smoke and settings.get("cuda_graphs"):
        settings["cuda_graphs"] = "padded"  # as far as a CPU can go
    made = LLM(
        setup.quantized() if own_weights(find_stage(stage)) else setup.checkpoint(),
        stage=stage,
        device=setup.device,
        dtype=dtype,
        max_num_seqs=seqs,
        max_model_len=max_len,
        **settings,
    )
    if made.trace is not None:
        made.trace.meta["model"] = setup.model
    return made


def stage_names(least: int = 0) -> list[str]:
    """The stages that exist, in order, from number `least` on."""
    return [stage.name for stage in STAGES if stage.number >= least]


def switches_of(stage: str) -> dict[str, dict[str, bool] | str]:
    """{name: engine settings, or why there are none}: each of graphs and pipelining alone, both, and neither."""
    known = inspect.signature(LLM).parameters
    there = [name for name in SWITCHES if name in known and ARRIVES[name] <= find_stage(stage).number]
    wanted = {"eager": (), "graphs": SWITCHES[:1], "pipelined": SWITCHES[1:], "both": SWITCHES}
    found: dict[str, dict[str, bool] | str] = {}
    for name, on in wanted.items():
        missing = [switch for switch in on if switch not in there]
        if not missing:
            found[name] = {switch: switch in on for switch in there}
        elif find_stage(stage).number >= 3:  # earlier stages never get them
            found[name] = f"not there yet: LLM has no setting {missing[0]}"
    return found


def best_switches(stage: str) -> dict[str, bool]:
    """All switches that exist for the stage, on."""
    return [settings for settings in switches_of(stage).values() if isinstance(settings, dict)][-1]


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(calls: Sequence[Callable[[], Any]], device: str, budget_s: float = 0.4) -> dict[str, Any]:
    """Milliseconds of one call: {"ms": a sample per repetition, "median_ms", "by"}.

    `calls` do the same work on buffers of their own: one run over all of them is one sample, so that no
    call finds its data in the cache. On a GPU they are captured in one CUDA graph, which leaves no gaps
    for launches between them; where something cannot be captured it is launched as it is. Everything runs
    twice before it is timed.
    """
    if device != "cuda":
        return _result([_host_ms(calls) for _ in range(2)], "host clock, toy size: means nothing")
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        again, by = graph.replay, f"events around a graph of {len(calls)} calls"
    except Exception as error:
        torch.cuda.synchronize()
        again, by = lambda: [call() for call in calls], f"events around {len(calls)} launches ({_short(error)})"
    once = _event_ms(again, 2)[-1]
    count = int(min(50, max(5, 1e3 * budget_s / max(once, 1e-3))))
    return _result([ms / len(calls) for ms in _event_ms(again, count)], by)


def _event_ms(call: Callable[[], Any], count: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _host_ms(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return 1e3 * (time.perf_counter() - start) / len(calls)


def _result(samples: list[float], by: str) -> dict[str, Any]:
    return {"ms": samples, "median_ms": median(samples), "by": by}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` found, or {"error"}: one case that fails does not take the others with it.

    After an error of the GPU itself nothing else in this process would work: that one goes on up.
    """
    try:
        return measure()
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {"error": _short(error)}


def _short(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= 300 else text[:297] + "..."


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected, in float64; NaN stays NaN."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())
