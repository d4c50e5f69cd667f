"""What a scheduler decides and what a step leaves behind: ids and numbers only, never a live object.

A plan has no phases. Prefill is a long chunk, decode a chunk of length 1, a prefix hit a chunk that
starts late. Plans are made on the hot path, hence `NamedTuple`.
"""

from typing import NamedTuple


class Chunk(NamedTuple):
    """Run tokens [start, start + length) of one request in this step."""

    request: int  # request id
    start: int  # position of the first token to run
    length: int  # tokens to run, >= 1
    blocks: tuple[int, ...] = ()  # block ids appended to the request's table in this step, hits first
    cached: int = 0  # tokens of `blocks` whose K/V were found rather than computed
    epoch: int = 0  # the request's epoch when planned; a later epoch makes the chunk stale

    @property
    def end(self) -> int:
        """One past the last token that the chunk runs."""
        return self.start + self.length


class Copy(NamedTuple):
    """Copy-on-write: entry `entry` of `request`'s table moves from block `source` to `destination`."""

    request: int
    entry: int  # place in the block table
    source: int
    destination: int


class Swap(NamedTuple):
    """One request moved between the device and the host; `pairs` are (block, host slot)."""

    request: int
    pairs: tuple[tuple[int, int], ...]


class StepPlan(NamedTuple):
    """What one step runs, and what had to happen first. Without its results it is already the trace."""

    step: int
    chunks: tuple[Chunk, ...]
    arrived: tuple[int, ...] = ()  # requests added since the last plan
    preempted: tuple[int, ...] = ()
    swapped_out: tuple[Swap, ...] = ()
    swapped_in: tuple[Swap, ...] = ()
    copies: tuple[Copy, ...] = ()
    evicted: tuple[int, ...] = ()  # blocks whose cached contents were given up
    blocked: str = ""  # why the head of the queue had to wait, in words; "" if it did not

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs through the model."""
        return sum(chunk.length for chunk in self.chunks)


class RequestInfo(NamedTuple):
    """What a trace keeps of a request when it arrives."""

    id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    priority: int = 0
    group: int = 0  # id of the first sample of the same prompt (its own id when n = 1)
    sample: int = 0  # index within the group
    t_arrived: float = 0.0  # seconds on the engine's clock
    cache_salt: str = ""  # K/V are found again only under the same one


class StepRecord(NamedTuple):
    """A step as it happened: the plan and its results. Times are seconds on the engine's clock."""

    plan: StepPlan
    token_ids: tuple[int, ...]  # one per chunk: the sampled token, or -1 where none was wanted
    finished: tuple[tuple[int, str], ...] = ()  # (request, "stop" | "length")
    aborted: tuple[tuple[int, str], ...] = ()  # (request, "abort"), since the last step
    forked: tuple[tuple[int, int], ...] = ()  # (parent, child), since the last step
    t_plan: float = 0.0  # planning began
    t_run: float = 0.0  # the plan was ready, the device was given work
    t_done: float = 0.0  # the request states were updated
    t_launched: float = 0.0  # the device had all its work and the host was free again
    t_landed: float = 0.0  # ids were on the host
    device_began: float = 0.0  # the device began with the step's tokens
    device_ended: float = 0.0
    replayed: int = 0  # tokens, padding included, of the captured step that ran; 0: launched kernel by kernel
