"""Checks of the exercises of notebook 05: a group of weights on its grid, and one column made up for by the others."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepengine.contracts.report import Promise, Report, Violation, called, expect, run_promises

QuantizeGroup = Callable[[Tensor, int], tuple[Any, Any, Any]]
Compensate = Callable[[Tensor, Tensor, int], Tensor]

_PARTS = ("codes", "scale", "zero")
_CLOSE = 1e-5  # of a scale, or of a least-squares answer: what fp32 may be off


def _numbers(said: str, part: Any) -> Tensor:
    """`part` as a float64 tensor, if it is made of numbers at all."""
    try:
        found = torch.as_tensor(part)
        assert not found.is_complex()
        return found.double()
    except Exception:
        raise Violation(f"{said} is {part!r}, which is no tensor of numbers") from None


def check_quantize_group(quantize_group: QuantizeGroup) -> Report:
    """Notebook 05: `quantize_group(w, bits)` -> (codes, scale, zero), held against every code that there is."""

    def of(weights: Sequence[float], bits: int, name: str = "") -> tuple[Tensor, float, float, str]:
        """Codes [n], scale and zero, in float64, and how to speak of the case; what no grid can be is refused."""
        given = torch.tensor(list(weights), dtype=torch.float32)
        kept = given.clone()
        listed = ", ".join(f"{value:g}" for value in weights)
        case = f"quantize_group({name or f'[{listed}]'}, {bits})"
        got = called(case, quantize_group, given, bits)
        expect(torch.equal(given, kept), f"{case}: w was changed in place")
        whole = isinstance(got, tuple) and len(got) == 3 and all(part is not None for part in got)
        expect(whole, f"{case}: got {got!r}, not (codes, scale, zero)")
        codes, scale, zero = (_numbers(f"{case}: {name}", part) for name, part in zip(_PARTS, got, strict=True))
        expect(codes.shape == given.shape, f"{case}: codes have shape {list(codes.shape)}, w has {list(given.shape)}")
        expect(scale.numel() == 1 and zero.numel() == 1, f"{case}: scale and zero must be one number each")
        expect(bool(scale.isfinite()) and float(scale) > 0, f"{case}: scale is {float(scale):g}, it must be above 0")
        for said, numbers in (("a code", codes), ("zero", zero.reshape(1))):
            there = numbers.isfinite() & (numbers == numbers.round()) & (numbers >= 0) & (numbers < 2**bits)
            if not bool(there.all()):
                wrong = float(numbers[~there][0])
                expect(False, f"{case}: {said} is {wrong:g}, it must be a whole number from 0 to {2**bits - 1}")
        return codes, float(scale), float(zero), case

    def near(weights: Sequence[float], bits: int, name: str = "") -> None:
        """No weight is off by more than half a step, and no other code would be nearer."""
        codes, scale, zero, case = of(weights, bits, name)
        exact = torch.tensor(list(weights), dtype=torch.float32).double()
        off = ((codes - zero) * scale - exact).abs()
        levels = (torch.arange(2**bits, dtype=torch.float64) - zero) * scale
        nearest = (levels[None] - exact[:, None]).abs().amin(1)
        for at in range(len(exact)):
            said = f"{case}: {float(exact[at]):g} has code {codes[at]:g}, which stands for "
            said += f"{float((codes[at] - zero) * scale):g}; off by {float(off[at]):g}"
            expect(float(off[at]) <= (0.5 + _CLOSE) * scale, f"{said}, more than half of scale {scale:g}")
            expect(float(off[at] - nearest[at]) <= _CLOSE * scale, f"{said}, where another code is {nearest[at]:g} off")

    def step(weights: Sequence[float], bits: int, wanted: float) -> None:
        """The scale is what the range asks for."""
        _, scale, _, case = of(weights, bits)
        right = abs(scale - wanted) <= _CLOSE * wanted
        expect(right, f"{case}: scale is {scale:g}, (max - min) / {2**bits - 1} is {wanted:g}, the range including 0")

    def by_hand() -> None:
        step([-1.0, 0.0, 0.5, 2.0], 4, 0.2)
        near([-1.0, 0.0, 0.5, 2.0], 4)
        step([-0.3, 0.1, 0.4, 0.9], 2, 0.4)

    def random_groups() -> None:
        generator = torch.Generator().manual_seed(5)
        for seed in range(8):
            weights = (torch.randn(64, generator=generator) * 0.1).tolist()
            near(weights, 4, f"64 random weights, seed {seed}")

    def ends() -> None:
        step([-7.5, -2.0, 7.5], 4, 1.0)
        near([-7.5, -2.0, 7.5], 4)
        near([-1.5, 0.25, 1.5], 2)

    def positive() -> None:
        step([1.0, 1.5, 3.0], 4, 0.2)
        near([1.0, 1.5, 3.0], 4)
        near([10.0, 10.1, 10.2], 4)

    def negative() -> None:
        step([-3.0, -1.5, -1.0], 4, 0.2)
        near([-3.0, -1.5, -1.0], 4)
        near([-10.2, -10.1, -10.0], 4)

    def constant() -> None:
        for value in (0.7, -0.7, 1e-3, 0.0):
            near([value] * 3, 4)
        near([0.25], 4)

    def zeros() -> None:
        for weights in ([-1.0, 0.0, 2.0], [0.0, 1.0, 3.0], [-0.35, 0.0, 1.0], [0.0, 0.0]):
            codes, scale, zero, case = of(weights, 4)
            at = weights.index(0.0)
            back = float((codes[at] - zero) * scale)
            expect(back == 0.0, f"{case}: 0 comes back as {back:g}")

    def widths() -> None:
        for bits in (2, 3, 4, 8):
            step([-1.0, 0.25, 2.0], bits, 3.0 / (2**bits - 1))
            near([-1.0, -0.4, 0.0, 0.3, 0.8, 1.1, 2.0], bits)

    return run_promises(
        "quantize_group",
        [
            Promise("a group with both signs", by_hand, "codes are w / scale + zero, rounded; zero is -min / scale"),
            Promise("64 random weights: no error above scale / 2", random_groups, "round zero and the codes"),
            Promise("both ends half a step beside a code", ends, "clamp the codes to 0 and 2**bits - 1"),
            Promise("a group that is all positive", positive, "the range includes 0: min is at most 0"),
            Promise("a group that is all negative", negative, "the range includes 0: max is at least 0"),
            Promise("a constant group, of zeros too", constant, "what is the scale where max equals min?"),
            Promise("a weight of 0 stays 0", zeros, "zero must be a whole number: the code that stands for 0"),
            Promise("2, 3, 4 and 8 bits", widths, "the largest code is 2**bits - 1"),
        ],
    )


def check_compensate(compensate: Compensate) -> Report:
    """Notebook 05: `compensate(W, Hinv, j)` against least squares on inputs, solved in float64.

    Column j of W [N, K] is rounded to whole numbers, the columns before it stay, and those behind it move so that
    the outputs X W^T change least; Hinv [K, K] is the inverse of X^T X.
    """

    def case(rows: int, width: int, seed: int = 0, mixed: float = 1.0) -> tuple[Tensor, Tensor]:
        """Weights [N, K] and inputs [T, K] whose columns are related."""
        generator = torch.Generator().manual_seed(seed)
        blend = torch.eye(width) + mixed * torch.randn(width, width, generator=generator) / math.sqrt(width)
        inputs = torch.randn(4 * width + 8, width, generator=generator) @ blend
        return 3 * torch.randn(rows, width, generator=generator), inputs

    def run(weight: Tensor, inputs: Tensor, j: int, said: str) -> tuple[Tensor, str]:
        exact = inputs.double()
        given = weight.double(), torch.linalg.inv(exact.T @ exact)
        kept = [tensor.clone() for tensor in given]
        where = f"{said}, j = {j}"
        got = called(where, compensate, *given, j)
        expect(all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), f"{where}: W or Hinv was changed")
        expect(isinstance(got, Tensor), f"{where}: got {got!r}, not a tensor")
        shape = list(weight.shape)
        expect(list(got.shape) == shape, f"{where}: got shape {list(got.shape)}, W has {shape}")
        return got.double(), where

    def on_grid(weight: Tensor, inputs: Tensor, j: int, said: str) -> None:
        got, where = run(weight, inputs, j, said)
        for row in range(len(weight)):
            old, new = float(weight[row, j]), float(got[row, j])
            said = f"{where}: {old:.4g} in row {row} becomes {new:.4g}, its nearest whole number is {round(old)}"
            expect(abs(new - round(old)) < _CLOSE, said)

    def stays(weight: Tensor, inputs: Tensor, j: int, said: str) -> None:
        got, where = run(weight, inputs, j, said)
        for at in range(j):
            off = float((got[:, at] - weight[:, at].double()).abs().max())
            expect(off < _CLOSE, f"{where}: column {at}, which is done, moved by {off:.3g}")

    def least(weight: Tensor, inputs: Tensor, j: int, said: str) -> None:
        """All of it, column by column, against the solution of the least-squares problem."""
        on_grid(weight, inputs, j, said)
        stays(weight, inputs, j, said)
        got, where = run(weight, inputs, j, said)
        exact, x = weight.double(), inputs.double()
        change = exact[:, j].round() - exact[:, j]  # [N]
        answer = torch.linalg.lstsq(x[:, j + 1 :], -x[:, j, None] * change).solution.T  # [N, K - j - 1]
        wanted = exact[:, j + 1 :] + answer
        for at in range(wanted.shape[1]):
            for row in range(len(weight)):
                mine, right = float(got[row, j + 1 + at]), float(wanted[row, at])
                told = f"{where}: row {row}, column {j + 1 + at} is {mine:.5g}, least squares gives {right:.5g}"
                expect(abs(mine - right) <= _CLOSE * (1 + abs(right)), told)

    two = torch.tensor([[1.25, 2.0]])
    alike = torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, 0.0]])

    def rounded() -> None:
        on_grid(two, alike, 0, "W = [[1.25, 2]]")
        on_grid(*case(4, 6), 0, "4 x 6 random weights")

    def first() -> None:
        least(two, alike, 0, "W = [[1.25, 2]], X = [[1, 1], [2, 2], [1, 0]]")
        least(*case(4, 6), 0, "4 x 6 random weights")

    def nothing_to_do() -> None:
        whole = torch.tensor([[2.0, 0.3, -1.6], [-1.0, 2.2, 0.4]])
        got, where = run(whole, case(1, 3)[1], 0, "column 0 holds whole numbers already")
        off = float((got - whole.double()).abs().max())
        expect(off < _CLOSE, f"{where}: a weight moved by {off:.3g}")

    def unrelated() -> None:
        inputs = torch.eye(3).repeat(4, 1)
        got, where = run(torch.tensor([[0.4, 1.3, 2.2]]), inputs, 0, "inputs that have nothing in common")
        off = float((got[0, 1:] - torch.tensor([1.3, 2.2])).abs().max())
        expect(off < _CLOSE, f"{where}: a column that cannot help moved by {off:.3g}")

    def before() -> None:
        stays(*case(4, 6), 2, "4 x 6 random weights")
        stays(*case(4, 6), 5, "4 x 6 random weights")

    def later() -> None:
        least(*case(1, 3), 1, "1 x 3 random weights")
        for j in range(6):
            least(*case(4, 6, seed=1), j, "4 x 6 random weights")

    def many() -> None:
        for seed, (rows, width) in enumerate(((1, 2), (8, 16), (3, 24))):
            for j in range(0, width, 5):
                least(*case(rows, width, seed, mixed=2.0), j, f"{rows} x {width} random weights")

    return run_promises(
        "compensate",
        [
            Promise("column j becomes whole numbers", rounded, "q = W[:, j].round()"),
            Promise("j = 0: the others take the least-squares answer", first, "W - (w - q) * Hinv[0] / Hinv[0, 0]"),
            Promise("nothing moves where nothing was lost", nothing_to_do, "the error w - q is a factor of all moves"),
            Promise("a column with unrelated inputs does not move", unrelated, "Hinv[j, k] is 0 for it"),
            Promise("columns before j stay as they are", before, "only columns from j on may change"),
            Promise(
                "any j: least squares over the columns behind it",
                later,
                "the earlier columns are fixed: use row j of U = torch.linalg.cholesky(Hinv, upper=True)",
            ),
            Promise("any size, closely related inputs", many, "rows share Hinv and do not interact"),
        ],
    )
