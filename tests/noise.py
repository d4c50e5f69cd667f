"""The sampling noise as documented, in Python's own integers."""

import math


def lowbias32(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def noise(key: int, position: int, token: int) -> float:
    """Gumbel noise of one token."""
    line = lowbias32(key % 2**32 ^ lowbias32((position + 0x3C6EF372) % 2**32))
    bits = lowbias32(lowbias32((token * 0x9E3779B9 + line) % 2**32) ^ line)
    return -math.log(-math.log((bits // 512 + 0.5) / 2**23))
