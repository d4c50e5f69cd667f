"""Each kernel compiled for GPUs that are not here, with what it takes read off the machine code."""

import importlib
from pathlib import Path

import pytest
import torch

from tests.kernels import harness
from tests.kernels.harness import Resources, complaints

pytestmark = harness.needs_triton


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resources]:
    found = harness.run("compile", tmp_path_factory.mktemp("triton"))
    return {name: Resources(*used) for name, used in found.items()}


@pytest.mark.parametrize("name", harness.builds())
def test_it_fits_and_does_not_spill(compiled: dict[str, Resources], name: str) -> None:
    kernel, sm, _, _ = name.split("/")
    assert complaints(int(sm), compiled[name], harness.kernels()[kernel].registers) == []


def test_a_kernel_short_of_registers_is_seen_to_spill(compiled: dict[str, Resources]) -> None:
    starved = compiled["starved"]
    assert starved.registers <= 32 and starved.stack > 0
    assert any("spilled" in complaint for complaint in complaints(90, starved))


def test_a_kernel_with_large_tiles_is_seen_not_to_fit(compiled: dict[str, Resources]) -> None:
    assert any("shared memory" in complaint for complaint in complaints(89, compiled["oversized"]))


def test_keys_and_values_are_loaded_through_shared_memory(compiled: dict[str, Resources], tmp_path: Path) -> None:
    """A tile of K and one of V, at least: so a reading of 0 would be a misreading."""
    assert all(used.shared >= 2 * 16384 for name, used in compiled.items() if name.startswith("paged_attention"))


@pytest.mark.parametrize("name", ["fp16/128", "bf16/64", "bf16/128"])
def test_prefill_multiplies_with_wgmma(compiled: dict[str, Resources], name: str) -> None:
    """Three loops with two products each. Where there is none to see, 0 is read: a decode has too few rows for it."""
    assert compiled[f"flash_prefill/90/{name}"].wgmma >= 6
    assert compiled[f"flash_prefill/80/{name}"].wgmma == compiled[f"paged_decode/90/{name}"].wgmma == 0


def test_packed_weights_are_multiplied_by_tensor_cores_and_not_by_an_empty_kernel(
    compiled: dict[str, Resources],
) -> None:
    """Of tiles that are too large Triton makes, for some GPUs, a kernel of a few registers that does nothing."""
    assert all(compiled[f"int4_gemm/90/bf16/{tokens}"].wgmma >= 8 for tokens in (16, 32, 64, 128))
    for name, used in compiled.items():
        if name.startswith(("int4", "int8", "dequantize")):
            assert used.registers >= 20, name


def test_splits_fill_the_gpu_and_leave_none_without_blocks() -> None:
    kernels = importlib.import_module("stepengine.stage5_gptq.kernels")
    int4 = importlib.import_module("tests.kernels.int4")
    for height, width in ((12288, 4096), (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)):
        weight = int4.meta_weight(kernels, torch.bfloat16, (height, width), 4)
        for num_sms in (40, 108, 132):
            found = []
            for tokens in (1, 16, 64, 256, 4096):
                tiles = kernels.gemm_tiles(tokens, torch.bfloat16, (9, 0))
                found.append(kernels.gemm_splits(tokens, weight, tiles, num_sms))
                assert 1 <= found[-1] <= max(1, width // 128 // 4)
                share = -(-(width // 128) // found[-1])
                assert share * (found[-1] - 1) < width // 128, "the last split has something to do"
            assert found[-1] == 1, "4096 tokens need no splits"


def test_prefill_tiles_leave_room_on_every_gpu() -> None:
    """Powers of two, and registers enough for a thread's part of the scores and of the result."""
    kernels = importlib.import_module("stepengine.stage3_flash.kernels")
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for dtype in harness.DTYPES.values():
            for head_dim in (16, 32, 64, 80, 128, 256):
                rows, keys, num_warps, num_stages = kernels.prefill_tiles(head_dim, dtype, capability)
                assert all(number & (number - 1) == 0 for number in (rows, keys, num_warps)) and num_stages >= 1
                assert min(rows, keys) >= 16, "tl.dot takes no fewer"
                assert rows * (keys + head_dim) <= 160 * 32 * num_warps


@pytest.mark.parametrize("num_sms", [40, 108, 132])
@pytest.mark.parametrize("max_kv_len", [1, 512, 4096, 131072])
def test_decode_splits_fill_the_gpu_and_not_more(num_sms: int, max_kv_len: int) -> None:
    kernels = importlib.import_module("stepengine.stage3_flash.kernels")
    found = [kernels.decode_splits(batch, 8, max_kv_len, num_sms) for batch in (1, 2, 8, 64, 1024)]
    assert all(1 <= splits <= max(1, max_kv_len // 128) for splits in found)
    assert found[0] == max(found), "one sequence alone is split the most"
    assert found[-1] == 1, "8192 programs need no splits"
    if max_kv_len >= 4096:
        assert 8 * found[0] >= num_sms, "one long sequence uses every multiprocessor"
