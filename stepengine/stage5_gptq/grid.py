"""The grid that weights are rounded to: per row and group of columns a scale and a zero point."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepengine.errors import InvalidSetting

BITS = (2, 3, 4, 8)
_SHRINKS = 32  # clipped ranges that are tried, down to ...
_LEAST = 0.7  # ... this part of the whole range


@dataclass(frozen=True)
class Grid:
    """How weights are rounded.

    bits: 2, 3, 4 or 8. group_size: columns that share a scale, or -1 for whole rows. symmetric: the zero
    point is the middle code, rather than where the group's range puts it. clip: search for the narrower
    range that rounds with the least squared error, instead of taking the whole one.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise InvalidSetting(f"bits is {self.bits!r}; it must be one of {', '.join(map(str, BITS))}.")
        size = self.group_size
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not whole or (size != -1 and not 8 <= size <= 1 << 20):
            raise InvalidSetting(
                f"group_size is {size!r}; it must be a whole number of at least 8, such as 32, 64 or 128, or -1 for "
                f"one group a row."
            )

    @property
    def most(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def columns(self, width: int) -> int:
        """Columns of a group in a matrix of `width` columns."""
        return width if self.group_size == -1 else min(self.group_size, width)

    def groups(self, width: int) -> Tensor:
        """The group of each column, int32 [width]; the last group may be a short one."""
        return torch.arange(width, dtype=torch.int32) // self.columns(width)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scales, zeros), each fp32 [N], of one group of columns, weight [N, n].

        scale = (max - min) / most, zero = -min / scale, rounded; the range includes 0, so that 0 is on the
        grid. `importance` [n] weighs the columns' errors where a clipped range is searched for.
        """
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        if not self.clip:
            return self._of_range(low, high)
        best = torch.full_like(low, torch.inf)
        scales, zeros = self._of_range(low, high)
        for step in range(_SHRINKS):
            part = 1 - (1 - _LEAST) * step / _SHRINKS
            scale, zero = self._of_range(low * part, high * part)
            error = (dequantize(self.round(weight, scale, zero), scale[:, None], zero[:, None]) - weight).square()
            error = (error if importance is None else error * importance).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        return scales, zeros

    def _of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = _storable((high - low) / self.most)
        if self.symmetric:
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        return scale, (-low / scale).round().clamp(0, self.most)

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, of weight's shape [N] or [N, n]; scale and zero [N]. Codes are whole, as floats."""
        if weight.dim() == 2:
            scale, zero = scale[:, None], zero[:, None]
        return (weight / scale + zero).round_().clamp_(0, self.most)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(codes - zero) * scale, broadcast."""
    return (codes - zero) * scale


def _storable(scale: Tensor) -> Tensor:
    """Scales that fp16 files and bf16 kernels hold exactly; a group of zeros gets 1."""
    scale = torch.where(scale > 0, scale, 1.0)
    return scale.bfloat16().half().clamp(min=2.0**-24).float()


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [N, K] on a grid: weight[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] with g = groups[k].

    codes uint8 [N, K]; scales fp32 [N, G], exact in fp16; zeros uint8 [N, G]; groups int32 [K].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as they count, [N, K]: computed in fp32, then rounded to `dtype`."""
        groups = self.groups.long()
        scales, zeros = self.scales.index_select(1, groups), self.zeros.index_select(1, groups)
        return dequantize(self.codes.float(), scales, zeros.float()).to(dtype)

    def bits_per_weight(self) -> float:
        """Bits of codes, fp16 scales and packed zero points, per weight."""
        rows, columns = self.shape
        return self.bits + self.scales.shape[1] * (16 + self.bits) / columns

    def cpu(self) -> "QuantizedWeight":
        """The same on the CPU, in memory of its own."""
        parts = (tensor.cpu().clone() for tensor in (self.codes, self.scales, self.zeros, self.groups))
        return QuantizedWeight(*parts, self.bits)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Some rows of it."""
        return QuantizedWeight(
            self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop], self.groups, self.bits
        )


def round_to_nearest(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """RTN: each weight of [N, K] to its nearest code, looking at nothing else."""
    weight = weight.float()
    groups = grid.groups(weight.shape[1])
    codes, scales, zeros = [], [], []
    for part in weight.split(grid.columns(weight.shape[1]), dim=1):
        scale, zero = grid.fit(part)
        codes.append(grid.round(part, scale, zero).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero.to(torch.uint8))
    return QuantizedWeight(
        torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1), groups.to(weight.device), grid.bits
    )
