"""Several GPUs, by arithmetic: claim C20."""

from stepengine.bench.evidence.common import Evidence, Number, Workbench
from stepengine.calculator import GPUS, shape_of, weight_parts
from stepengine.stage5_gptq.checkpoint import linear_shapes

LINKS = {  # GB/s in one direction for one GPU: half of the both-ways figures that vendors print
    "NVLink 4": (450.0, "900 GB/s both ways: https://hawkvelt.id.au/post/2024-08-04-nvidia-h100"),
    "PCIe 5 x16": (64.0, "128 GB/s both ways, the same page"),
}


def all_reduce_ms(tokens: int, hidden: int, layers: int, gpus: int, gb_s: float) -> float:
    """Least milliseconds that the all-reduces of a step take: two a layer, each of [tokens, hidden] in 16 bits.

    A ring moves 2 (gpus - 1) / gpus of the bytes over each link (Patarasu and Yuan 2009); two a layer, behind the
    attention's output matrix and behind the MLP's (Shoeybi et al. 2019, section 3). Latency comes on top.
    """
    moved = 2 * (gpus - 1) / gpus * tokens * hidden * 2
    return 1e3 * 2 * layers * moved / (gb_s * 1e9)


def two_a_layer(bench: Workbench) -> Evidence:
    """C20: all-reduces of Llama-3-70B on 8 H100 by formula, beside the least time of the step itself."""
    shape, gpus, gpu = shape_of("Llama-3-70B"), 8, GPUS["H100 (SXM)"]
    weights = sum(weight_parts(shape, "bf16").values())
    sums = sum(name.endswith(("o_proj", "down_proj")) for name in linear_shapes(bench.config)) / bench.config.num_layers
    numbers = [Number("matrices of ours whose inputs are split, a layer", sums)]
    for name, tokens in (("a decode of 32 rows", 32), ("a prompt of 2048", 2048)):
        step = 1e3 * max(
            weights / gpus / (gpu.bandwidth_gb_s * 1e9), 2 * shape.parameters * tokens / gpus / (gpu.tflops * 1e12)
        )  # fmt: skip
        numbers.append(Number(f"{name}, the step without them", step, "ms"))
        for link, (gb_s, _) in LINKS.items():
            spent = all_reduce_ms(tokens, shape.hidden, shape.layers, gpus, gb_s)
            numbers.append(Number(f"{name}, all-reduces over {link}", spent, "ms"))
    spent_on = {number.label: number.value for number in numbers}
    step, near, far = (spent_on[f"a prompt of 2048, {what}"] for what in _PROMPT)
    how = "by formula, not measured: Llama-3-70B in bf16 on 8 H100, bandwidth alone"
    return Evidence(how, tuple(numbers), near < step < far and sums == 2)


_PROMPT = ("the step without them", *(f"all-reduces over {link}" for link in LINKS))
