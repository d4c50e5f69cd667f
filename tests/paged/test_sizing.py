"""How large the K/V cache becomes, and settings that cannot be."""

from types import SimpleNamespace

import pytest
import torch

from stepengine import sizing
from stepengine.errors import InvalidSetting
from stepengine.sizing import Sizes, fit_blocks, fit_host_blocks, measured_blocks

CPU = torch.device("cpu")


def test_blocks_come_from_what_was_asked(tiny):
    block = tiny(stage=2).engine.runner.pool.block_bytes
    assert tiny(stage=2, num_blocks=7).engine.limits.num_blocks == 7
    assert tiny(stage=2, kv_cache_memory=7 * block + block - 1).engine.limits.num_blocks == 7
    assert tiny(stage=2).engine.limits.num_blocks == 4 * 64 // 16  # no more than 4 places can fill
    assert tiny(stage=2, block_size=5).engine.limits.num_blocks == 4 * 13
    llm = tiny(stage=2, block_size=8, num_blocks=9)
    assert llm.engine.cache.capacity_tokens == 72
    assert llm.engine.runner.pool.storage.shape[1] == 10  # and block 0
    assert llm.engine.runner.pool.host.numel() == 0


def test_host_memory_is_taken_for_swapping_only(tiny):
    block = tiny(stage=2).engine.runner.pool.block_bytes
    llm = tiny(stage=2, preemption="swap", swap_space=3 * block + 1)
    assert llm.engine.limits.num_host_blocks == 3
    assert tiny(stage=2, preemption="swap", swap_space=0).engine.limits.num_host_blocks == 0
    assert tiny(stage=2, preemption="swap").engine.limits.num_host_blocks == 16
    assert tiny(stage=2, preemption="recompute").engine.limits.num_host_blocks == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 0}, "block_size is 0; it must be a whole number from 1"),
        ({"block_size": 16.0}, "block_size is 16.0"),
        ({"block_size": 65}, "block_size is 65, above max_model_len 64"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": True}, "num_blocks is True"),
        ({"num_blocks": 1 << 40}, "MiB are free; lower num_blocks"),
        ({"num_blocks": 4, "kv_cache_memory": 1 << 20}, "num_blocks and kv_cache_memory both say"),
        ({"kv_cache_memory": 10}, "less than one block"),
        ({"preemption": "drop"}, "preemption is 'drop'; it must be 'recompute' or 'swap'"),
        ({"swap_space": 1 << 20}, "swap_space is 1048576, but preemption is 'recompute'"),
        ({"swap_space": -1, "preemption": "swap"}, "swap_space is -1"),
        ({"swap_space": 1 << 47, "preemption": "swap"}, "MiB of host memory are free"),
        ({"gpu_memory_utilization": 0.5}, "the device is a CPU; use kv_cache_memory"),
        ({"block_pool": 3}, "block_pool is 3; it must be a class or a function"),
        ({"gpu_memory_utilization": 1.5}, "above 0 and at most 1"),
    ],
)
def test_impossible_settings_are_refused(tiny, settings, words):
    with pytest.raises(InvalidSetting, match=words):
        tiny(stage=2, **settings)


@pytest.mark.parametrize("name", ["block_size", "num_blocks", "preemption", "swap_space", "block_pool"])
def test_settings_of_stage_2_are_refused_before_it(tiny, name):
    value = {"preemption": "swap", "block_pool": dict}.get(name, 8)
    with pytest.raises(InvalidSetting, match=f"{name} is .* stage 1b does not have it: leave it out, or use stage 2"):
        tiny(stage=1, **{name: value})


def test_a_gpu_gives_what_its_largest_step_leaves(monkeypatch):
    """The arithmetic alone, on made-up readings; a real device is measured in the GPU suite."""
    gib = 1 << 30
    readings = {
        "mem_get_info": lambda device: (70 * gib, 80 * gib),
        "max_memory_allocated": lambda device: 6 * gib,
        "memory_reserved": lambda device: 8 * gib,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }
    monkeypatch.setattr(sizing.torch, "cuda", SimpleNamespace(**readings))
    ran = []
    monkeypatch.setattr(sizing, "_largest_step", lambda *settings: ran.append(settings))
    gpu = torch.device("cuda")
    assert fit_blocks(Sizes(), 1 << 20, 1 << 40, gpu) is None
    for share, left in ((None, 0.9 * 80 - 6 - 2), (0.5, 0.5 * 80 - 6 - 2)):
        found = measured_blocks(Sizes(gpu_memory_utilization=share), 1 << 20, 1 << 40, None, gpu, 2048, 2048, 64)
        assert found == int(left * 1024)
    assert len(ran) == 2
    with pytest.raises(InvalidSetting, match="raise gpu_memory_utilization"):
        measured_blocks(Sizes(gpu_memory_utilization=0.05), 1 << 20, 1 << 40, None, gpu, 2048, 2048, 64)


def test_the_largest_step_runs_on_a_cpu_too(tiny):
    llm = tiny(stage=2)
    seen = []
    decoder = llm.engine.runner.model
    hook = decoder.register_forward_pre_hook(lambda module, args: seen.append((args[0].num_tokens, args[0].max_q)))
    sizing._largest_step(decoder, CPU, 64, 150, 4)
    sizing._largest_step(decoder, CPU, 64, 64, 4)
    hook.remove()
    assert seen == [(128, 64), (64, 64)]


def test_swap_space_never_exceeds_what_all_requests_could_fill():
    assert fit_host_blocks(Sizes(preemption="swap", swap_space=1 << 20), 1 << 10, 100) == 100
