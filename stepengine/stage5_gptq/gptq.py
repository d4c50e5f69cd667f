"""GPTQ: round a layer's columns one after another, and let the columns still to come make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". A layer
with weights W [N, K] and inputs X [T, K] should still give X W'^T close to X W^T. Rows of W do not interact, and all
share the Hessian H = X^T X of that squared error; so columns are rounded in one order for all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stepengine.errors import InvalidSetting, ModelError
from stepengine.stage5_gptq.grid import Grid, QuantizedWeight, dequantize

_BLOCK = 128  # columns that are updated at once; the rest of the matrix follows when they are done
_MOST_DAMPING = 1.0  # of the mean diagonal; a Hessian that needs more is no Hessian
_CHUNK = 8192  # tokens of a product in the sum


@dataclass(frozen=True)
class Method:
    """How GPTQ goes about it.

    damping: part of the Hessian's mean diagonal that is added to its diagonal. act_order: round the columns
    with the largest inputs first, while there are many others to make up for them. Groups are then laid out and
    their grids fixed beforehand, so that a file's columns stay in their order.
    """

    damping: float = 0.03
    act_order: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.damping, (int, float)) and not isinstance(self.damping, bool)
        if not number or not 0 < self.damping <= _MOST_DAMPING:
            raise InvalidSetting(
                f"damping is {self.damping!r}; it must be above 0 and at most {_MOST_DAMPING:g}, usually 0.01 to 0.1."
            )


class Hessian:
    """H = X^T X / T of the inputs that a layer sees, summed up as they come; `name` is for messages."""

    def __init__(self, width: int, device: torch.device | str = "cpu", name: str = "layer") -> None:
        self.name = name
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Inputs [T, K] of T more tokens. Raises `ModelError` where one is not finite."""
        for part in inputs.split(_CHUNK):
            part = part.float()
            self._sum.addmm_(part.T, part)
        self.tokens += len(inputs)
        if not self._sum.diagonal().isfinite().all():
            raise ModelError(
                f"The calibration inputs of {self.name} hold NaN or infinite values; check the checkpoint's weights, "
                f"or calibrate in float32."
            )

    @property
    def matrix(self) -> Tensor:
        """fp32 [K, K]."""
        if not self.tokens:
            raise InvalidSetting(f"{self.name} has seen no calibration tokens; give some text.")
        return self._sum / self.tokens


def quantize(weight: Tensor, hessian: Tensor, grid: Grid, method: Method = Method()) -> QuantizedWeight:
    """GPTQ on one matrix: weight [N, K], hessian [K, K] -> codes on `grid`.

    For column j: q_j is w_j rounded, e_j = (w_j - q_j) / U_jj, and every column k still to come becomes
    w_k - e_j U_jk, with U^T U = H^-1 and U upper triangular (section 3.3 and algorithm 1 of the paper).
    """
    rows, width = weight.shape
    if hessian.shape != (width, width):
        raise InvalidSetting(f"The Hessian is {list(hessian.shape)} for {width} columns; it must be square, one each.")
    if not weight.isfinite().all():
        raise ModelError("The weights hold NaN or infinite values; fetch the checkpoint again.")
    work = weight.float().clone()
    groups, size = grid.groups(width).to(work.device), grid.columns(width)
    importance, owner = hessian.diagonal(), groups.tolist()
    scales = torch.empty(rows, owner[-1] + 1, device=work.device)
    zeros = torch.empty_like(scales)
    order = torch.argsort(importance, descending=True, stable=True) if method.act_order else None
    if order is not None:
        for group, part in enumerate(work.split(size, dim=1)):
            scales[:, group], zeros[:, group] = grid.fit(part, importance[group * size :][: part.shape[1]])
        work, hessian, owner = work[:, order], hessian[order][:, order], groups[order].tolist()
    upper = inverse_factor(hessian, method.damping)
    codes = torch.empty(rows, width, dtype=torch.uint8, device=work.device)

    def grid_at(start: int, errors: Tensor, at: int) -> tuple[Tensor, Tensor]:
        column, stop = start + at, start + errors.shape[1]
        group = owner[column]
        if order is None and column % size == 0:  # its grid fits the columns as they are by now
            later = work[:, stop:] - errors[:, :at] @ upper[start:column, stop:]
            ahead = torch.cat((work[:, column:stop], later), 1)[:, :size]
            scales[:, group], zeros[:, group] = grid.fit(ahead, importance[column:][: ahead.shape[1]])
        return scales[:, group], zeros[:, group]

    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block, errors = work[:, start:stop], torch.empty(rows, stop - start, device=work.device)
        factor = upper[start:stop, start:stop]
        codes[:, start:stop] = round_block(block, errors, factor, grid, partial(grid_at, start, errors))
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    return QuantizedWeight(codes, scales, zeros.to(torch.uint8), groups, grid.bits)


def round_block(
    block: Tensor, errors: Tensor, factor: Tensor, grid: Grid, grid_at: Callable[[int], tuple[Tensor, Tensor]]
) -> Tensor:
    """Round the columns of block [N, B] one after another: their codes, uint8 [N, B].

    factor [B, B]: U of these columns. grid_at: column -> its scale and zero point, each [N]. Columns of the block move
    while they wait; `errors` [N, B] is filled in, for the columns behind the block.
    """
    codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
    for at in range(block.shape[1]):
        scale, zero = grid_at(at)
        code = grid.round(block[:, at], scale, zero)
        codes[:, at] = code.to(torch.uint8)
        errors[:, at] = (block[:, at] - dequantize(code, scale, zero)) / factor[at, at]
        block[:, at + 1 :].addr_(errors[:, at], factor[at, at + 1 :], alpha=-1)
    return codes


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U [K, K], upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1; fp32, computed in fp64.

    Inputs that were never seen get a Hessian of their own, so that their columns are rounded and move no other.
    Where the sum is not positive definite, damping grows tenfold. Raises `ModelError` where that does not help.
    """
    exact = hessian.double()
    diagonal = exact.diagonal()
    mean = float(diagonal.mean())
    if not exact.isfinite().all() or mean < 0:
        raise ModelError("The Hessian holds NaN, infinite or negative values; check the inputs it was summed from.")
    mean = mean or 1.0
    dead = torch.where(diagonal == 0, mean, 0.0)
    while damping <= _MOST_DAMPING:
        damped = exact + torch.diag(dead + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 10
    raise ModelError(
        f"The Hessian of {hessian.shape[0]} inputs has no inverse even with damping {damping / 10:g} of its mean; "
        f"calibrate on more text."
    )


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """Mean squared error of a layer's outputs: tr(D H D^T) / N, with D the difference of the weights [N, K]."""
    difference = (weight.float() - quantized.dequantized()).double()
    return float(((difference @ hessian.double()) * difference).sum() / len(weight))
