"""The interpreter's cases on a real GPU, in bf16 too: `make gpu-test`."""

import pytest
import torch

from tests.kernels import harness

pytestmark = [
    pytest.mark.gpu,
    harness.needs_triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda is not available"),
]


@pytest.mark.parametrize("name", harness.cases("cuda"))
def test_kernel_and_twin_equal_the_oracle(name: str) -> None:
    try:
        harness.check(name, "cuda")
    except torch.OutOfMemoryError:
        if "beyond 2**31" not in name:
            raise
        pytest.skip("a storage of more than 2**31 elements does not fit into this GPU's memory")
