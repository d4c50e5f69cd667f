"""Where a step's device work runs: here and now, beside the host in a thread, or on a GPU.

A stream runs work in the order in which it was given. `launch` may return before the work has ended;
`Landing.wait` returns once it has.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol, TypeVar

import torch

from stepengine.core.interrupts import interrupts_held

T = TypeVar("T")
Work = Callable[[], torch.Tensor]  # runs a step; the ids it sampled, on the device


class Landed(NamedTuple):
    """Ids on the host, and when the device began and ended (seconds on `time.perf_counter`)."""

    ids: list[int]
    began: float
    ended: float


class Landing(Protocol):
    """Work on its way."""

    def wait(self) -> Landed:
        """Block until the work has ended; raises what it raised."""


class Stream(Protocol):
    """Runs work in order."""

    def launch(self, work: Work) -> Landing: ...

    def call(self, work: Callable[[], object]) -> None:
        """Run `work` after what was launched before."""

    def settle(self) -> None:
        """Block until everything has ended, whatever came of it."""


class Inline:
    """The host does the work itself: when `launch` returns, it has ended."""

    def launch(self, work: Work) -> Landing:
        return _Done(_timed(work))

    def call(self, work: Callable[[], object]) -> None:
        work()

    def settle(self) -> None:
        pass


class Thread:
    """One worker thread: torch's operators leave Python free meanwhile, so that the host can go on beside it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "stepengine-device")
        self._last: Future[Landed] | None = None

    def launch(self, work: Work) -> Landing:
        with interrupts_held():  # Ctrl-C in between would leave work behind that `settle` knows nothing of
            self._last = self._pool.submit(_as_here, torch.get_num_threads(), lambda: _timed(work))
        return _Later(self._last)

    def call(self, work: Callable[[], object]) -> None:
        self._pool.submit(_as_here, torch.get_num_threads(), work).result()

    def settle(self) -> None:
        if self._last is not None:
            wait([self._last])


class Cuda:
    """The GPU's current stream. Ids travel to two pinned buffers in turn; events tell when, and how long it took."""

    def __init__(self, device: torch.device, max_rows: int) -> None:
        self._device = device
        self._buffers = [torch.zeros(max_rows, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._origin = torch.cuda.Event(enable_timing=True)
        self._origin.record()
        self._origin.synchronize()
        self._origin_time = time.perf_counter()

    def launch(self, work: Work) -> Landing:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        ids = work()
        ended.record()
        self._buffers.append(buffer := self._buffers.pop(0))
        here = buffer[: len(ids)]
        here.copy_(ids, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return _Copied(here, copied, lambda: (self._seconds(began), self._seconds(ended)))

    def _seconds(self, event: torch.cuda.Event) -> float:
        return self._origin_time + self._origin.elapsed_time(event) / 1e3

    def call(self, work: Callable[[], object]) -> None:
        work()

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)


def _timed(work: Work) -> Landed:
    began = time.perf_counter()
    ids = work().tolist()
    return Landed(ids, began, time.perf_counter())


def _as_here(threads: int, work: Callable[[], T]) -> T:
    """Run with as many torch threads as the caller has: the number belongs to each thread."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return work()


class _Done(NamedTuple):
    landed: Landed

    def wait(self) -> Landed:
        return self.landed


class _Later(NamedTuple):
    future: "Future[Landed]"

    def wait(self) -> Landed:
        return self.future.result()


class _Copied(NamedTuple):
    ids: torch.Tensor
    copied: torch.cuda.Event
    times: Callable[[], tuple[float, float]]

    def wait(self) -> Landed:
        self.copied.synchronize()
        return Landed(self.ids.tolist(), *self.times())
