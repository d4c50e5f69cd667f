"""Paged K/V: block tables that grow one block at a time, and blocks that several requests share."""

from stepengine.core.plan import Copy, Swap
from stepengine.core.request import Request
from stepengine.core.seams import BlockPool as Pool
from stepengine.core.seams import Grant, Limits
from stepengine.stage2_paged.block_pool import BlockPool


class PagedCache:
    """Nothing is reserved: a request holds the blocks of its tokens (PagedAttention, Kwon et al. 2023).

    A block with several references is read by all who hold it; whoever writes into it gets a copy
    first. A request that is swapped out holds host slots instead of blocks.
    """

    def __init__(self, limits: Limits, pool: Pool | None = None) -> None:
        self.block_size = limits.block_size
        self.pool = pool if pool is not None else BlockPool(limits.num_blocks)
        self.capacity_tokens = limits.num_blocks * limits.block_size
        self.free_slots = list(range(limits.num_host_blocks - 1, -1, -1))
        self.hosted: dict[int, list[int]] = {}  # request id -> host slots
        self.samples: dict[int, list[Request]] = {}  # group -> those of its requests that hold blocks

    @property
    def free_tokens(self) -> int:
        return self.pool.num_free * self.block_size

    def match(self, request: Request) -> int:
        """Tokens of a starting sample whose K/V another sample of the same prompt has.

        All of the prompt, but for its last token where that lies in a block which is not full: the
        sample will write there next, so it takes its copy now.
        """
        if self._sharing(request) is None:
            return 0
        prompt = len(request.prompt_ids)
        ends_inside = prompt % self.block_size != 0 and request.num_tokens == prompt
        return prompt - 1 if ends_inside else prompt

    def grow(self, request: Request, upto: int) -> Grant | None:
        size, pool = self.block_size, self.pool
        other = self._sharing(request) if request.computed else None  # matched, and taken up by the scheduler
        hits = other.blocks[: self._count(len(request.prompt_ids))] if other is not None else []
        pool.share(hits)
        table = [*request.blocks, *hits]
        writes = range(max(request.scheduled, request.computed) // size, len(table))
        shared = [entry for entry in writes if pool.refs(table[entry]) > 1]
        granted = pool.alloc(max(0, self._count(upto) - len(table)) + len(shared))
        if granted is None:
            pool.free(hits)
            return None
        fresh = list(granted)
        copies = tuple(Copy(request.id, entry, table[entry], fresh.pop()) for entry in shared)
        pool.free([copy.source for copy in copies])
        holders = self.samples.setdefault(request.group, [])
        if request not in holders:
            holders.append(request)
        return Grant((*hits, *fresh), copies)

    def commit(self, request: Request, upto: int) -> int:
        return upto

    def release(self, request: Request) -> None:
        self.pool.free(request.blocks)
        self._let_go(request)
        self.free_slots.extend(self.hosted.pop(request.id, ()))

    def fork(self, parent: Request, child: Request) -> None:
        """The child's table becomes the parent's, shared."""
        self.pool.share(parent.blocks)
        child.blocks.extend(parent.blocks)
        self.samples.setdefault(child.group, []).append(child)

    def swap_out(self, request: Request) -> Swap | None:
        """Host slots for a request's blocks; a shared block goes too, and the others keep theirs."""
        count = len(request.blocks)
        if count > len(self.free_slots):
            return None
        slots = [self.free_slots.pop() for _ in range(count)]
        swap = Swap(request.id, tuple(zip(request.blocks, slots, strict=True)))
        self.pool.free(request.blocks)
        self._let_go(request)
        self.hosted[request.id] = slots
        return swap

    def swap_in(self, request: Request) -> Swap | None:
        """Blocks of its own for what it has on the host."""
        slots = self.hosted[request.id]
        blocks = self.pool.alloc(len(slots))
        if blocks is None:
            return None
        request.blocks.extend(blocks)
        self.samples.setdefault(request.group, []).append(request)
        self.free_slots.extend(self.hosted.pop(request.id))
        return Swap(request.id, tuple(zip(blocks, slots, strict=True)))

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _sharing(self, request: Request) -> Request | None:
        """Another sample whose prompt is computed, for a request that holds nothing yet."""
        if request.blocks:
            return None
        prompt = len(request.prompt_ids)
        others = self.samples.get(request.group, ())
        return next((other for other in others if other.blocks and other.computed >= prompt), None)

    def _let_go(self, request: Request) -> None:
        request.blocks.clear()
        holders = self.samples.get(request.group, [])
        if request in holders:
            holders.remove(request)
        if not holders:
            self.samples.pop(request.group, None)
