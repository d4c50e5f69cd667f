"""Linear layers whose weights stay packed, and an embedding of 8 bits: what stage 5 puts into the decoder.

int4 is a way to *store* weights. Whoever multiplies with them turns them back into numbers on the way: fewer bytes
are read, and no operation less is done.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepengine.stage5_gptq.grid import Grid, QuantizedWeight, dequantize, round_to_nearest
from stepengine.stage5_gptq.packing import WORD, pack_stream, packable_step, unpack_stream

_MIDDLE = 128  # the zero point of 8 symmetric bits
_CPU_GROUPS = (32, 64, 128, 256)  # that torch's int4 operator takes
_CPU_ROWS = 16  # it takes outputs in multiples of this
_CPU_MOST = 128  # rows of x from which multiplying the weights out first was faster, in fp32 on two cores


def _kernels() -> ModuleType:
    from stepengine.stage5_gptq import kernels  # needs Triton, which is not everywhere

    return kernels


def packed_linear(
    weight: QuantizedWeight, bias: Tensor | None, device: torch.device, dtype: torch.dtype, raw: bool = False
) -> nn.Module:
    """A layer for `weight` on `device` whose inputs and outputs are of `dtype`: the fastest that takes it.

    `raw` allows outputs in the type that they come in, where the next layer takes any.
    """
    if device.type == "cuda" and _kernels().supported(weight):
        return GpuLinear(weight, bias, device, dtype)
    if device.type == "cpu" and CpuInt4Linear.takes(weight):
        return CpuInt4Linear(weight, bias, dtype, raw)
    return TwinLinear(weight, bias, device, dtype)


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Matrices with the same inputs as one, or None where their columns are grouped differently."""
    first, *others = parts
    if any(not torch.equal(part.groups, first.groups) for part in others):
        return None
    fields = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros"))
    return QuantizedWeight(*fields, first.groups, first.bits)


class _Packed(nn.Module):
    """What the layers share. Everything is a parameter, so that what a model weighs can be added up."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits = weight.bits
        self.bias = None if bias is None else self._own(bias.to(device, dtype))

    @staticmethod
    def _own(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.contiguous(), requires_grad=False)


class TwinLinear(_Packed):
    """The plain one: unpack, multiply out, multiply. Any bits, groups and device, and what the others are held to.

    Its results are those of a linear layer with `weight.dequantized(dtype)`, bit by bit.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, device, dtype)
        self.dtype = dtype
        spare = -self.in_features % packable_step(weight.bits)
        self.codes = self._own(pack_stream(F.pad(weight.codes, (0, spare)), weight.bits).to(device))
        self.scales = self._own(weight.scales.half().to(device))
        self.zeros = self._own(weight.zeros.to(device))
        self.groups = self._own(weight.groups.to(device))

    def weight(self) -> Tensor:
        """[N, K], multiplied out."""
        codes = unpack_stream(self.codes, self.bits)[:, : self.in_features]
        scales, zeros = self.scales.float(), self.zeros.float()
        return dequantize(codes.float(), scales[:, self.groups], zeros[:, self.groups]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return F.linear(x.to(self.dtype), self.weight(), self.bias)


class CpuInt4Linear(_Packed):
    """4 bits on a CPU, with torch's packed operator. It computes in bf16, whatever comes in and goes out.

    With many rows its weights are multiplied out first: then the products weigh more than the bytes.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, raw: bool = False) -> None:
        super().__init__(weight, bias, torch.device("cpu"), dtype)
        self.dtype, self.out_dtype = dtype, torch.bfloat16 if raw else dtype
        columns = torch.argsort(weight.groups, stable=True)
        in_order = bool((columns[1:] > columns[:-1]).all())
        self.columns = None if in_order else self._own(columns)  # the operator knows no order but its own
        codes = weight.codes if in_order else weight.codes[:, columns]
        self.group_size = self.in_features // weight.scales.shape[1]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 2)
        self.codes = self._own(packed)
        scales, zeros = weight.scales, weight.zeros.float()
        # (code - zero) * scale as the operator wants it: (code - 8) * scale + offset
        self.scales = self._own(torch.stack((scales.T, ((8 - zeros) * scales).T), 2).bfloat16())  # [G, N, 2]
        self.block = _rows_of_a_block(self.out_features)

    @staticmethod
    def takes(weight: QuantizedWeight) -> bool:
        """Whether torch's operator can hold these: 4 bits, whole groups of a size that it knows."""
        (rows, columns), count = weight.shape, weight.scales.shape[1]
        size = columns // count
        whole = bool((torch.bincount(weight.groups, minlength=count) == size).all())
        return weight.bits == 4 and rows % _CPU_ROWS == 0 and size in _CPU_GROUPS and whole

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        if self.columns is not None:
            x = x.index_select(1, self.columns)
        if len(x) >= _CPU_MOST and self.block:
            out = x.to(self.dtype) @ self._transposed(self.dtype)
        else:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            out = multiply(x.bfloat16(), self.codes, self.group_size, self.scales).to(self.out_dtype)
        return out if self.bias is None else out + self.bias

    def _transposed(self, dtype: torch.dtype) -> Tensor:
        """The weights as the operator counts them, [K, N]."""
        half, count = self.block // 2, self.out_features // self.block
        bytes_ = self.codes.view(count, len(self.scales), self.group_size, half)
        scale, offset = self.scales.to(dtype).view(-1, count, 1, 2, half, 2).unbind(-1)  # [G, blocks, 1, 2, rows]
        weight = torch.empty(self.in_features, self.out_features, dtype=dtype)
        blocks = weight.view(-1, self.group_size, count, 2, half).transpose(1, 2)  # [G, blocks, columns, 2, rows]
        for side, nibbles in enumerate((bytes_ & 15, bytes_ >> 4)):
            part = nibbles.transpose(0, 1).to(dtype).sub_(8)
            torch.addcmul(offset[:, :, :, side], part, scale[:, :, :, side], out=blocks[:, :, :, side])
        return weight


def _rows_of_a_block(rows: int) -> int:
    """How many outputs share a block of the operator's packed codes, or 0 where this machine lays them out otherwise.

    In a block of b outputs each column has b / 2 bytes, byte i with the codes of outputs i (low) and i + b / 2.
    """
    for block in (64, 32):
        if rows % block == 0:
            codes = torch.randint(16, (2 * block, WORD), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
            found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2).view(2, WORD, block // 2)
            low, high = codes.view(2, 2, block // 2, WORD).transpose(2, 3).unbind(1)
            if torch.equal(found.int(), low | high << 4):
                return block
    return 0


class GpuLinear(_Packed):
    """4 or 8 bits on a GPU, with the kernels of this stage."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, device, dtype)
        self.layout = _kernels().pack_for_kernel(weight, device, dtype)
        for name, value in self.layout._asdict().items():
            if isinstance(value, Tensor):
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        out: Tensor = _kernels().int4_linear(x, self.layout)
        return out if self.bias is None else out + self.bias


class SplitLinear(nn.Module):
    """Several layers with the same inputs that could not be joined, their outputs side by side."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, sum of N]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class CpuInt8Table(_Packed):
    """A table [V, K] of 8 bits with one scale a row, on a CPU, multiplied by torch's packed operator in bf16."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, None, torch.device("cpu"), dtype)
        self.dtype = dtype
        self.codes = self._own((weight.codes.int() - _MIDDLE).to(torch.int8))  # [V, K]
        self.scales = self._own(weight.scales[:, 0].bfloat16())  # [V], exact

    def rows(self, ids: Tensor) -> Tensor:
        """Some of its rows: ids [T] -> [T, K]."""
        return (self.codes[ids].float() * self.scales[ids].float().unsqueeze(1)).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [R, K] -> [R, V]."""
        return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.codes, self.scales).to(x.dtype)


class GpuInt8Table(GpuLinear):
    """The same on a GPU: a layer of 8 bits from which rows can be taken, too."""

    def rows(self, ids: Tensor) -> Tensor:
        """Some of its rows: ids [T] -> [T, K]."""
        words = self.layout.packed[ids]  # [T, B, WORDS]; see `KernelWeight` for what is where
        slices = [torch.stack(((words >> at) & 255, (words >> at + 16) & 255), dim=-1) for at in (0, 8)]
        codes = torch.stack(slices, dim=2).flatten(1)[:, : self.in_features]
        scales = self.layout.scales[0, ids].float().unsqueeze(1)
        return ((codes - _MIDDLE).float() * scales).to(self.layout.dtype)


Int8Table = CpuInt8Table | GpuInt8Table


def int8_table(table: Tensor) -> Int8Table:
    """A table [V, K] rounded to 8 bits, one scale a row, where it is and for its dtype; rounding to nearest does."""
    weight = round_to_nearest(table, Grid(bits=8, group_size=-1, symmetric=True))
    if table.is_cuda:
        return GpuInt8Table(weight, None, table.device, table.dtype)
    return CpuInt8Table(weight, table.dtype)


class Int8Embedding(nn.Module):
    """The rows of a table, by token."""

    def __init__(self, table: Int8Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, K]."""
        return self.table.rows(ids)
