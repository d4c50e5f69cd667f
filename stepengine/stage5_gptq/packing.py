"""Codes as the community's GPTQ files hold them: streams of 2, 3, 4 or 8 bits in words of 32."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stepengine.errors import InvalidSetting, ModelError
from stepengine.stage5_gptq.grid import QuantizedWeight

WORD = 32  # bits
VERSIONS = {1: "gptq", 2: "gptq_v2"}  # what `checkpoint_format` calls them

# Bits that fill whole bytes are put together a byte at a time, 3 bits in runs of 8 codes and 3 bytes.
_CODES_A_RUN = {2: 4, 3: 8, 4: 2, 8: 1}


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [R, C] -> int32 [R, C * bits / 32]: each row one stream, low bits first.

    Code c takes bits c * bits and following of its row; with 3 bits some lie across two words.
    Raises `InvalidSetting` where a row does not fill its last word.
    """
    rows, width = codes.shape
    if width * bits % WORD:
        raise InvalidSetting(
            f"{width} codes of {bits} bits do not fill words of {WORD} bits; the width must be a multiple of "
            f"{packable_step(bits)}."
        )
    run = _CODES_A_RUN[bits]
    parts = codes.reshape(rows, width // run, run)
    if bits != 3:
        stream = parts[..., 0].clone()
        for i in range(1, run):
            stream |= parts[..., i] << bits * i
    else:
        whole = parts[..., 0].int()
        for i in range(1, run):
            whole |= parts[..., i].int() << bits * i
        stream = torch.stack([(whole >> 8 * i & 255).to(torch.uint8) for i in range(3)], 2).reshape(rows, -1)
    # Bytes are little-endian, as every machine that runs torch is.
    return _compact(stream).view(torch.int32)


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Words int32 [R, W] -> codes uint8 [R, W * 32 / bits]: `pack_stream` undone."""
    rows, count = words.shape
    stream = _compact(words).view(torch.uint8)
    if bits == 3:
        low, middle, high = stream.reshape(rows, -1, 3).int().unbind(2)
        stream = low | middle << 8 | high << 16
    run = _CODES_A_RUN[bits]
    codes = torch.empty(rows, stream.shape[1], run, dtype=torch.uint8, device=words.device)
    for i in range(run):
        codes[..., i] = stream >> bits * i & 2**bits - 1
    return codes.reshape(rows, count * WORD // bits)


def _compact(tensor: Tensor) -> Tensor:
    # Not contiguous(): that lets the odd strides of a side of length 0 or 1 pass, and view does not.
    return tensor.clone(memory_format=torch.contiguous_format)


def packable_step(bits: int) -> int:
    """The number of codes that the rows and the columns of a packed matrix must be a multiple of."""
    return WORD if bits == 3 else WORD // bits


def pack_weight(weight: QuantizedWeight, version: int) -> dict[str, Tensor]:
    """The four tensors of a matrix [N, K] with G groups, in version 1 ("gptq") or 2 ("gptq_v2") of the format.

    qweight int32 [K * bits / 32, N], a stream down each column; qzeros int32 [G, N * bits / 32], a stream along each
    row; scales fp16 [G, N]; g_idx int32 [K]. Version 1 stores each zero point less one.
    Raises `InvalidSetting` for what the version cannot hold.
    """
    zeros = weight.zeros.T
    if version == 1:
        if not zeros.all():
            raise InvalidSetting(
                "A zero point is 0, and checkpoint_format 'gptq' stores zero points less one; write 'gptq_v2'."
            )
        zeros = zeros - 1
    return {
        "qweight": pack_stream(weight.codes, weight.bits).T.contiguous(),
        "qzeros": pack_stream(zeros.contiguous(), weight.bits),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
        "g_idx": weight.groups.to(torch.int32),
    }


def unpack_weight(tensors: Mapping[str, Tensor], bits: int, version: int) -> QuantizedWeight:
    """`pack_weight` undone: qweight, qzeros, scales (of any float type, rounded to fp16) and g_idx, as given there.

    Raises `ModelError` if their shapes do not belong together.
    """
    qweight, qzeros, scales, groups = (tensors[key] for key in ("qweight", "qzeros", "scales", "g_idx"))
    (words, rows), columns = qweight.shape, len(groups)
    if words * WORD != columns * bits or scales.shape[1] != rows or qzeros.shape[1] * WORD != rows * bits:
        raise ModelError(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)} and g_idx "
            f"{list(groups.shape)} are not one matrix of {bits} bits; fetch the checkpoint again, or correct its bits."
        )
    return QuantizedWeight(
        codes=unpack_stream(qweight.T, bits),
        scales=scales.half().float().T.contiguous(),
        zeros=stored_zeros(qzeros, bits, version).T.contiguous(),
        groups=groups.to(torch.int32),
        bits=bits,
    )


def stored_zeros(qzeros: Tensor, bits: int, version: int) -> Tensor:
    """Zero points uint8 [G, N] from qzeros int32 [G, N * bits / 32] of a version 1 or 2 file.

    In version 1 a stored code of all ones stands for no zero point in particular, and readers differ: some take it
    as 0, some as 2^bits, some let the 1 that they add run over into the next code. Files that have such codes come
    from GPTQModel, which makes version 1 by taking 1 from each code of a whole word, so that a 0 borrows from its
    neighbour; adding whole words gives back what it started from. Its 3-bit codes it treats one by one.
    """
    if version == 2:
        return unpack_stream(qzeros, bits)
    if bits == 3:
        return unpack_stream(qzeros, bits) + 1 & 7
    ones = sum(1 << shift for shift in range(0, WORD, bits))
    words = (qzeros.long() & 0xFFFFFFFF) + ones
    # Only the low half of each 64-bit word is kept.
    return unpack_stream(words.view(torch.int32)[:, ::2], bits)
