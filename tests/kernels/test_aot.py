"""Each kernel compiled for GPUs that are not here, with what it takes read off the machine code."""

from pathlib import Path

import pytest

from tests.kernels import harness
from tests.kernels.harness import Resources, complaints

pytestmark = harness.needs_triton


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resources]:
    found = harness.run("compile", tmp_path_factory.mktemp("triton"))
    return {name: Resources(*used) for name, used in found.items()}


@pytest.mark.parametrize("name", harness.builds())
def test_it_fits_and_does_not_spill(compiled: dict[str, Resources], name: str) -> None:
    assert complaints(int(name.split("/")[1]), compiled[name]) == []


def test_a_kernel_short_of_registers_is_seen_to_spill(compiled: dict[str, Resources]) -> None:
    starved = compiled["starved"]
    assert starved.registers <= 32 and starved.stack > 0
    assert any("spilled" in complaint for complaint in complaints(90, starved))


def test_a_kernel_with_large_tiles_is_seen_not_to_fit(compiled: dict[str, Resources]) -> None:
    assert any("shared memory" in complaint for complaint in complaints(89, compiled["oversized"]))


def test_keys_and_values_are_loaded_through_shared_memory(compiled: dict[str, Resources], tmp_path: Path) -> None:
    """A tile of K and one of V, at least: so a reading of 0 would be a misreading."""
    assert all(used.shared >= 2 * 16384 for name, used in compiled.items() if name.startswith("paged_attention"))
