"""The interpreter's cases on a real GPU, in bf16 too: `make gpu-test`."""

import importlib

import pytest
import torch

from tests.kernels import harness, int4

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


@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 200, 600])
@pytest.mark.parametrize("bits", [4, 8])
def test_int4_linear_in_a_graph_gives_the_same_bits_each_time(bits: int, tokens: int) -> None:
    """Also where K is split: sums are added in order, whichever program was ready first."""
    kernels = importlib.import_module(int4.MODULE)
    weight = kernels.pack_for_kernel(int4.random_weight((1024, 3072), 64, bits), "cuda", torch.bfloat16)
    first, second = torch.randn(2, tokens, 3072, device="cuda").bfloat16()
    expected = [kernels.int4_linear(x, weight) for x in (first, second)]
    held = first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.int4_linear(held, weight)
    for _ in range(10):
        for x, right in zip((first, second), expected, strict=True):
            held.copy_(x)
            graph.replay()
            assert torch.equal(out, right)
