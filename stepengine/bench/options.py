"""What every measure is told, and how its answers are put: progress, ratios, bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """model: name, folder or hub id. seed: of the requests. rounds: measured ones. fast: smaller sets.

    peer_batch: requests in a batch of the peer.
    """

    model: str = "smollm2-135m"
    stage: str = "1b"
    rounds: int = 5
    seed: int = 0
    fast: bool = False
    progress: bool = True
    peer_batch: int = 16


def ratio_text(found: dict[str, Any]) -> str:
    """A `Ratio` as plain data, with its spread."""
    return f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f}, {found['rounds']} rounds)"


def bar_text(part: dict[str, Any], sign: str) -> str:
    """The bar of a part of a result and whether it was met."""
    return f"bar {sign} {part['bar']}x {'met' if part['met'] else 'MISSED'}"


@contextmanager
def told_of(options: Options, what: str, total: int) -> Iterator[Callable[[Any], None]]:
    """A progress bar of `total` runs; what it yields is called after each, with anything."""
    from tqdm import tqdm

    form = "{desc}: {n_fmt} of {total_fmt} |{bar}| {remaining} left"
    hidden = not options.progress
    with tqdm(total=total, desc=what, bar_format=form, leave=False, disable=hidden, ncols=90) as bar:

        def told(_: Any) -> None:
            bar.update()

        yield told
