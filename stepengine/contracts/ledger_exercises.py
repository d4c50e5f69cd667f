"""The check of notebook 07's exercise: what an all-reduce over a ring takes, against a ring that is played."""

from collections.abc import Callable
from typing import Any

import numpy as np

from stepengine.contracts.report import Promise, Report, called, expect, run_promises

AllReduceMs = Callable[[int, int, int, int, float], float]


def played_ring(gpus: int, numbers: int) -> int:
    """Numbers that each GPU of a ring sends until all hold the sum of `numbers` numbers each, step by step.

    Each splits its numbers into as many parts as there are GPUs. In gpus - 1 steps every GPU passes one part on, to be
    added to its neighbour's; in gpus - 1 more the finished parts go round (Patarasu and Yuan 2009). `numbers` must be
    divisible by `gpus`.
    """
    rng = np.random.default_rng(gpus)
    held = rng.integers(0, 100, (gpus, gpus, numbers // gpus))  # [GPU, part, numbers]
    wanted = held.sum(0)
    sent = np.zeros(gpus, dtype=int)
    for adding in (True, False):
        for step in range(gpus - 1):
            before = held.copy()
            for gpu in range(gpus):
                part = (gpu - step + (not adding)) % gpus
                neighbour = (gpu + 1) % gpus
                held[neighbour, part] = before[gpu, part] + (before[neighbour, part] if adding else 0)
                sent[gpu] += before[gpu, part].size
    assert (held == wanted).all() and len(set(sent)) == 1, "that was no all-reduce"
    return int(sent[0])


def check_all_reduce_ms(all_reduce_ms: AllReduceMs) -> Report:
    """Notebook 07: `all_reduce_ms(tokens, hidden, layers, gpus, gb_s)` -> milliseconds, against a ring that is played.

    tokens: of the step; hidden: the width of a token's vector, in 16 bits; gb_s: GB/s (1e9 bytes) that a GPU sends.
    """

    def compare(*cases: tuple[int, int, int, int, float]) -> Callable[[], None]:
        def check() -> None:
            for case in cases:
                tokens, hidden, layers, gpus, gb_s = case
                said = f"all_reduce_ms{case}"
                got: Any = called(said, all_reduce_ms, *case)
                number = isinstance(got, int | float | np.floating | np.integer) and not isinstance(got, bool)
                expect(number, f"{said}: got {got!r}; return milliseconds as a number")
                wanted = 1e3 * 2 * layers * played_ring(gpus, tokens * hidden) * 2 / (gb_s * 1e9)
                near = abs(got - wanted) <= 1e-6 * wanted + 1e-15
                expect(near, f"{said}: got {got:.6g}, the ring that is played takes {wanted:.6g} ms")

        return check

    return run_promises(
        "all_reduce_ms",
        (
            Promise("one GPU has nobody to talk to", compare((4, 8, 1, 1, 1.0)), "no bytes are sent, hence 0"),
            Promise(
                "two GPUs, one layer: two all-reduces of 16-bit numbers",
                compare((1, 2, 1, 2, 1.0), (4, 8, 1, 2, 1.0)),
                "each sends tokens x hidden numbers of 2 bytes per all-reduce; ms, not s; GB is 1e9",
            ),
            Promise(
                "every layer has two", compare((4, 8, 3, 2, 1.0), (4, 8, 32, 2, 2.0)), "behind attention, behind MLP"
            ),
            Promise(
                "more GPUs: in a ring each sends 2 (gpus - 1) / gpus of the numbers",
                compare((4, 8, 1, 4, 1.0), (8, 16, 2, 8, 1.0), (6, 8, 1, 3, 1.0)),
                "gpus - 1 steps that add, gpus - 1 that hand out, each with 1 / gpus of the numbers",
            ),
            Promise(
                "twice the bandwidth takes half the time",
                compare((16, 8, 2, 4, 64.0), (16, 8, 2, 4, 128.0), (16, 8, 2, 4, 450.0)),
                "divide by gb_s x 1e9 bytes a second",
            ),
        ),
    )
