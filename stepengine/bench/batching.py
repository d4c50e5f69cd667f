"""What batching policies must give, by formula: decode steps of static and of continuous batching, and their bound."""

import heapq
from collections.abc import Sequence

import numpy as np


def static_steps(output_lens: Sequence[int], slots: int) -> int:
    """Decode steps when each batch of `slots`, in order, runs until its longest ends.

    The step that runs the prompts gives each request its first token and is not counted.
    """
    return sum(max(output_lens[at : at + slots]) - 1 for at in range(0, len(output_lens), slots))


def continuous_steps(output_lens: Sequence[int], slots: int) -> int:
    """Decode steps when a free slot is taken by the next request at once: the makespan of list scheduling.

    (Graham 1966.) As above, a request of N tokens takes N - 1 decode steps.
    """
    ends = [0] * slots
    for length in output_lens:
        heapq.heappush(ends, heapq.heappop(ends) + length - 1)
    return max(ends)


def expected_max_over_mean(output_lens: Sequence[int], slots: int) -> float:
    """E[longest of `slots` draws] / E[draw], draws from these lengths: what continuous batching can save at most.

    E[max] is the sum over k >= 0 of P(max > k) = 1 - F(k) ** slots.
    """
    lengths = np.sort(np.asarray(output_lens))
    share = np.searchsorted(lengths, np.arange(lengths[-1]), side="right") / len(lengths)  # F(k)
    return float((1 - share**slots).sum() / lengths.mean())
