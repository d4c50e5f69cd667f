"""How much K/V storage an engine gets: what was asked for, held against what the machine has."""

from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from stepengine.core.batch import Staging
from stepengine.core.request import Request, SamplingParams
from stepengine.errors import InvalidSetting
from stepengine.stage0_naive.attention import RecomputedAttention

DEFAULT_SEQS = 64
DEFAULT_BYTES = 1 << 30  # of K/V on a CPU, or of swapped K/V, unless free memory is short
UTILIZATION = 0.9  # of a GPU, as in vLLM
MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """The settings that decide about memory, as they were given; None is the default of each."""

    max_num_seqs: int | None = None
    kv_cache_memory: int | None = None  # bytes
    num_blocks: int | None = None
    preemption: str | None = None
    swap_space: int | None = None  # bytes
    gpu_memory_utilization: float | None = None

    def check(self) -> None:
        """Raise `InvalidSetting` for a value that no machine could meet, or two that contradict each other."""
        for name in ("max_num_seqs", "kv_cache_memory", "num_blocks"):
            check_count(name, getattr(self, name))
        check_count("swap_space", self.swap_space, least=0)
        if self.preemption not in (None, "recompute", "swap"):
            raise InvalidSetting(f"preemption is {self.preemption!r}; it must be 'recompute' or 'swap'.")
        if self.swap_space is not None and self.preemption != "swap":
            raise InvalidSetting(
                f"swap_space is {self.swap_space}, but preemption is 'recompute' and swaps nothing; set "
                f"preemption='swap' or leave swap_space out."
            )
        share = self.gpu_memory_utilization
        if share is not None and not (isinstance(share, Real) and not isinstance(share, bool) and 0 < share <= 1):
            raise InvalidSetting(f"gpu_memory_utilization is {share!r}; it must be above 0 and at most 1.")
        given = [
            name
            for name in ("num_blocks", "kv_cache_memory", "gpu_memory_utilization")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise InvalidSetting(f"{' and '.join(given)} both say how large the K/V cache is; give one of them.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise `InvalidSetting` unless `value` is None or a whole number from `least` on."""
    most = 65536 if name == "max_num_seqs" else 1 << 48
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and least <= value <= most):
        raise InvalidSetting(
            f"{name} is {value!r}; it must be a whole number from {least} to {most}, or None for the default."
        )


def fit_slots(sizes: Sizes, block_bytes: int, device: torch.device) -> int:
    """How many requests run at once where each has a slot. Unset, it shrinks to the K/V budget; set, it must fit."""
    asked = sizes.max_num_seqs
    if block_bytes == 0:
        return asked or DEFAULT_SEQS
    budget = _budget(sizes, device)
    room = budget // block_bytes
    if room < (asked or 1):
        raise InvalidSetting(
            f"{asked or 1} K/V slots of {block_bytes / MIB:.0f} MiB need {(asked or 1) * block_bytes / MIB:.0f} MiB, "
            f"and the K/V budget is {budget / MIB:.0f} MiB; lower max_num_seqs or max_model_len, or raise "
            f"kv_cache_memory."
        )
    return asked or min(DEFAULT_SEQS, room)


def fit_blocks(sizes: Sizes, block_bytes: int, most: int, device: torch.device) -> int | None:
    """How many blocks there are; `most` is what all requests together could fill.

    None: a GPU's free memory decides, and is known only once the model has run (`measured_blocks`).
    """
    if sizes.gpu_memory_utilization is not None and device.type == "cpu":
        raise InvalidSetting(
            f"gpu_memory_utilization is {sizes.gpu_memory_utilization}, but the device is a CPU; use kv_cache_memory."
        )
    if sizes.num_blocks is not None:
        free = free_bytes(device)
        if sizes.num_blocks * block_bytes > free:
            raise InvalidSetting(
                f"num_blocks is {sizes.num_blocks}: {sizes.num_blocks * block_bytes / MIB:.0f} MiB of K/V in blocks of "
                f"{block_bytes / MIB:.2f} MiB, and {free / MIB:.0f} MiB are free; lower num_blocks or block_size."
            )
        return sizes.num_blocks
    if device.type == "cuda" and sizes.kv_cache_memory is None:
        return None
    budget = _budget(sizes, device)
    return _whole_blocks(budget, block_bytes, most, "kv_cache_memory")


def fit_host_blocks(sizes: Sizes, block_bytes: int, most: int) -> int:
    """How many swapped blocks host memory holds; 0 without swapping."""
    if sizes.preemption != "swap":
        return 0
    free = free_bytes(torch.device("cpu"))
    asked = sizes.swap_space
    if asked is not None and asked > free:
        raise InvalidSetting(
            f"swap_space is {asked / MIB:.0f} MiB, and {free / MIB:.0f} MiB of host memory are free; lower swap_space."
        )
    room = asked if asked is not None else min(DEFAULT_BYTES, free // 4)
    return min(room // block_bytes, most)


def measured_blocks(
    sizes: Sizes,
    block_bytes: int,
    most: int,
    decoder: Any,
    device: torch.device,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> int:
    """How many blocks fit beside the weights and the largest step, which is run once to see what it takes."""
    torch.cuda.reset_peak_memory_stats(device)
    _largest_step(decoder, device, max_model_len, max_num_batched_tokens, max_num_seqs)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    others = total - free - torch.cuda.memory_reserved(device)  # what is not torch's: the driver, other programs
    torch.cuda.empty_cache()
    share = sizes.gpu_memory_utilization or UTILIZATION
    return _whole_blocks(int(total * share) - peak - max(0, others), block_bytes, most, "gpu_memory_utilization")


@torch.inference_mode()
def _largest_step(decoder: Any, device: torch.device, max_model_len: int, tokens: int, rows: int) -> None:
    """Prompts of full length up to the token budget, and the logits of as many rows as there are places."""
    lens = [max_model_len] * (tokens // max_model_len) or [tokens]
    lens = lens[:rows]
    params = SamplingParams()
    live = {row: Request(row, [0] * length, params, max_len=length) for row, length in enumerate(lens)}
    staging = Staging(device, len(lens), sum(lens), 0, 0)
    hidden = decoder(staging.fill([request.schedule() for request in live.values()], live), RecomputedAttention())
    decoder.logits(hidden[:rows]).float().softmax(-1)


def _budget(sizes: Sizes, device: torch.device) -> int:
    if sizes.kv_cache_memory is not None:
        return sizes.kv_cache_memory
    free = free_bytes(device)
    return min(DEFAULT_BYTES, free // 4) if device.type == "cpu" else free // 2


def _whole_blocks(budget: int, block_bytes: int, most: int, setting: str) -> int:
    if budget < block_bytes:
        raise InvalidSetting(
            f"The K/V budget is {max(0, budget) / MIB:.2f} MiB, less than one block of {block_bytes / MIB:.2f} MiB; "
            f"raise {setting} or lower block_size."
        )
    return min(budget // block_bytes, most)


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return 4 << 30  # no /proc (macOS): assume a small machine
