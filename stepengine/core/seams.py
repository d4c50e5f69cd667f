"""The roles that stages fill, as protocols: a class fits by having the methods, none is inherited.

A stage is a `Parts`: one of each role. What a role must guarantee beyond its signature is checked by
`stepengine.contracts`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stepengine.core.plan import Copy, StepPlan, Swap
from stepengine.core.request import Request
from stepengine.model.loader import load_decoder

if TYPE_CHECKING:
    from torch import Tensor

    from stepengine.core.batch import Batch
    from stepengine.core.kv_pool import KVPool
    from stepengine.model.config import ModelConfig
    from stepengine.model.decoder import Decoder


@dataclass(frozen=True)
class Limits:
    """What an engine may use. `num_blocks` counts blocks that requests can hold, without block 0."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = 0  # tokens per block of K/V storage; 0: nothing is stored
    num_blocks: int = 0
    preemption: str = "recompute"  # what becomes of a preempted request's K/V: "recompute" or "swap"
    num_host_blocks: int = 0  # room for swapped blocks in host memory
    long_prefill_token_threshold: int = 0  # no chunk of a prompt is longer; 0: the budget alone decides


class Grant(NamedTuple):
    """Room for a request's tokens: blocks to append to its table (hits first), copies to make first.

    `evicted`: blocks whose contents could be found again and were given up for it.
    """

    blocks: tuple[int, ...] = ()
    copies: tuple[Copy, ...] = ()
    evicted: tuple[int, ...] = ()


class Scheduler(Protocol):
    """Decides what runs in each step, and keeps the states of the requests."""

    def add(self, request: Request) -> None:
        """Queue a new request."""

    def plan(self) -> StepPlan:
        """The next step. Looks at counts (`scheduled`, `num_tokens`), never at a token's value."""

    def update(self, plan: StepPlan, token_ids: list[int]) -> list[tuple[int, str]]:
        """Book a step's results, `token_ids` one per chunk (-1: none); the (id, reason) that ended.

        Chunks whose request no longer accepts them are ignored.
        """

    def finish(self, request_id: int, reason: str) -> None:
        """End a request from any state and give back what it holds; an unknown id is harmless."""

    def idle(self) -> bool:
        """True when no request waits or runs."""


class ForkingScheduler(Scheduler, Protocol):
    """From stage 2: a scheduler whose cache can share blocks."""

    def fork(self, parent: Request, child: Request) -> None:
        """Take in a request with the tokens of `parent`, beside it if there is a place, else at the queue's end."""


class BlockPool(Protocol):
    """From stage 2: which of the blocks 1 .. num_blocks are free, and how many hold each of the others."""

    @property
    def num_free(self) -> int: ...

    def alloc(self, n: int) -> list[int] | None:
        """`n` blocks with one reference each, or None (and nothing changed) when fewer are free."""

    def share(self, ids: Sequence[int]) -> None:
        """One more reference on each."""

    def free(self, ids: Sequence[int]) -> None:
        """One reference less on each; a block without references is free again."""

    def refs(self, block: int) -> int:
        """References on a block; 0 when it is free."""


class KVCache(Protocol):
    """Host bookkeeping of where K/V live; holds no tensors."""

    @property
    def free_tokens(self) -> int: ...

    @property
    def capacity_tokens(self) -> int: ...

    def match(self, request: Request) -> int:
        """How many leading tokens of a request that is about to start have their K/V here already.

        A scheduler that takes them up calls `request.keep(found)` before `grow`, whose grant then begins
        with their blocks; one that does not computes them again.
        """

    def grow(self, request: Request, upto: int) -> Grant | None:
        """Room for the K/V of the first `upto` tokens, or None (and nothing changed) when full."""

    def commit(self, request: Request, upto: int) -> int:
        """K/V of the first `upto` tokens have been computed; how many of them survive this step."""

    def release(self, request: Request) -> None:
        """Take back everything the request holds."""


class PagingCache(KVCache, Protocol):
    """From stage 2: a cache of shared blocks that can move to the host and back."""

    def fork(self, parent: Request, child: Request) -> None:
        """The child's table becomes the parent's, shared."""

    def swap_out(self, request: Request) -> Swap | None:
        """Give up the request's blocks for host slots, or None (and nothing changed) when the host is full."""

    def swap_in(self, request: Request) -> Swap | None:
        """Give up its host slots for new blocks, or None (and nothing changed) when the pool is full."""


class AttentionBackend(Protocol):
    """Stores a step's keys and values and attends to them."""

    capturable: bool  # whether a decode step can be captured in a CUDA graph

    def forward(self, layer: int, q: "Tensor", k: "Tensor", v: "Tensor", batch: "Batch") -> "Tensor":
        """q [T, Hq, D], k and v [T, Hk, D], after RoPE -> [T, Hq, D]."""


@dataclass(frozen=True)
class Parts:
    """One of each role: a stage of the engine."""

    scheduler: Callable[..., Scheduler]  # (limits, cache)
    cache: Callable[..., KVCache]  # (limits), from stage 2 (limits, block pool)
    attention: Callable[["ModelConfig", "KVPool"], AttentionBackend]
    block_size: Callable[[int, int | None], int]  # (max_model_len, block_size asked for) -> tokens a block
    prepare_model: Callable[..., "Decoder"] = load_decoder  # (folder, device, dtype, max_model_len)
    block_pool: Callable[[int], BlockPool] | None = None  # (num_blocks); None before stage 2
