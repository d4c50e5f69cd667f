"""Steps of a few fixed sizes, each captured once as a CUDA graph and replayed: one launch instead of hundreds.

A step that fits a bucket is padded to it, so that a few graphs serve every batch.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch

MOST_TOKENS = 512  # a larger step keeps the GPU busy for longer than the host needs to launch it
TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MOST_TOKENS)

Replay = Callable[[], None]


class Bucket(NamedTuple):
    """The size of a padded step."""

    tokens: int
    rows: int


def decode_bucket(rows: int, most: int) -> int:
    """Rows that a batch of decodes is padded to: 1, 2, 4, then multiples of 8, but never above `most`.

    Dense, because each row of padding costs what a row costs.
    """
    return min(most, next((size for size in (1, 2, 4) if rows <= size), -(-rows // 8) * 8))


def decode_buckets(most: int) -> list[int]:
    """All of them, the largest first."""
    return sorted({decode_bucket(rows, most) for rows in range(1, most + 1)}, reverse=True)


def bucket_of(tokens: int, rows: int, most_rows: int) -> Bucket | None:
    """What a step is padded to, or None if it is too large. Steps with longer chunks get at least one row of padding,
    which takes the padding tokens: so their rows are a power of two, of at most `most_rows` + 1."""
    if tokens == rows:
        size = decode_bucket(rows, most_rows)
        return Bucket(size, size)
    if tokens > MOST_TOKENS:
        return None
    return Bucket(TOKENS[bisect_left(TOKENS, tokens)], min(most_rows + 1, 1 << rows.bit_length()))


class Graphs:
    """Runs a step by bucket: the first time as it is, afterwards from its capture.

    `capture(work)` records what `work` does, without doing it, and returns what does it again; None
    runs every step as it is, padded all the same: that is what a replay computes. The work must read
    and write tensors at fixed addresses only and ask nothing of the host.
    """

    def __init__(self, capture: Callable[[Replay], Replay] | None) -> None:
        self._capture = capture
        self._replays: dict[Bucket, Replay] = {}

    def run(self, bucket: Bucket, work: Replay) -> int:
        """Do `work`, of the bucket's size; the tokens replayed, 0 if its kernels were launched one by one."""
        if bucket in self._replays:
            self._replays[bucket]()
            return bucket.tokens
        work()  # compiles its kernels, too
        if self._capture is None:
            return bucket.tokens
        self._replays[bucket] = self._capture(work)
        return 0


def cuda_capture() -> Callable[[Replay], Replay]:
    """`capture` for `Graphs` on the current GPU; all graphs share one memory pool, since one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture
