"""The stages by name, and which setting arrives with which stage."""

import difflib
import importlib
from dataclasses import dataclass

from stepengine.core.seams import Parts
from stepengine.errors import InvalidSetting


@dataclass(frozen=True)
class Stage:
    """A stage, or half of one: its short name, its folder, its title and its parts."""

    name: str
    folder: str
    title: str
    parts_name: str = "PARTS"

    @property
    def number(self) -> int:
        return int(self.name[0])

    @property
    def parts(self) -> Parts:
        """The stage's composition (imported on first use)."""
        module = importlib.import_module(f"stepengine.{self.folder}.engine")
        parts: Parts = getattr(module, self.parts_name)
        return parts


STAGES = (
    Stage("0", "stage0_naive", "no cache, static batching"),
    Stage("1a", "stage1_kvcache", "a K/V cache of contiguous slots", "PARTS_A"),
    Stage("1b", "stage1_kvcache", "continuous batching", "PARTS_B"),
    Stage("2", "stage2_paged", "paged K/V, sharing, preemption"),
    Stage("3", "stage3_flash", "flash attention"),
    Stage("4a", "stage4_chunked_prefix", "chunked prefill", "PARTS_A"),
    Stage("4b", "stage4_chunked_prefix", "prefix caching", "PARTS_B"),
    Stage("4", "stage4_chunked_prefix", "chunked prefill and prefix caching"),
    Stage("5", "stage5_gptq", "weights of 4 bits"),
)

ARRIVES = {
    "kv_cache_memory": 1,
    "block_size": 2,
    "num_blocks": 2,
    "block_pool": 2,
    "preemption": 2,
    "swap_space": 2,
    "gpu_memory_utilization": 2,
    "cuda_graphs": 3,
    "pipelined": 3,
    "long_prefill_token_threshold": 4,
    "prefix_index": 4,
    "evictor": 4,
    "bits": 5,
    "group_size": 5,
    "quantization": 5,
    "int8_head": 5,
}
"""The first stage that has a setting; settings that are not listed belong to every stage."""


def find_stage(stage: int | str) -> Stage:
    """The stage called 0, 1, "1a", "1b", ... or by its folder; a number alone means the whole stage."""
    wanted = str(stage) if isinstance(stage, (int, str)) and not isinstance(stage, bool) else ""
    named = [entry for entry in STAGES if wanted == entry.name or wanted in (entry.folder, str(entry.number))]
    if not named:
        known = ", ".join(entry.name for entry in STAGES)
        raise InvalidSetting(f"stage is {stage!r}; the stages are {known} (or a folder's name such as stage1_kvcache).")
    return named[-1]


def check_settings(stage: Stage, settings: dict[str, object], known: list[str]) -> None:
    """Refuse settings (those not None) that do not exist or that `stage` does not have yet."""
    for name, value in settings.items():
        if name not in ARRIVES and name not in known:
            close = difflib.get_close_matches(name, [*known, *ARRIVES], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise InvalidSetting(f"There is no setting {name!r}{hint}")
        if value is not None and ARRIVES.get(name, 0) > stage.number:
            remedy = f"leave it out, or use stage {ARRIVES[name]} or later"
            raise InvalidSetting(f"{name} is {value!r}, but stage {stage.name} does not have it: {remedy}.")
        if value is not None and name not in known:
            raise InvalidSetting(f"{name} is {value!r}, which this version does not have yet; leave it out.")
