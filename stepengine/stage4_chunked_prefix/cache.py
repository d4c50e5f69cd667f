"""Prefix caching: a request that begins like another one takes over its blocks instead of computing them again."""

from weakref import WeakKeyDictionary

from stepengine.core.plan import Copy, Swap
from stepengine.core.request import Request
from stepengine.core.seams import BlockPool, Grant, Limits
from stepengine.errors import InvalidSetting, StepEngineError
from stepengine.stage4_chunked_prefix.block_pool import PrefixBlockPool
from stepengine.stage4_chunked_prefix.prefix_index import Key


class PrefixCache:
    """Paged K/V whose full blocks are found again by any request that begins with the same tokens.

    A block is sealed once all its tokens were computed, and never before: two requests with the same
    new prefix in one step both compute it. It is found by its tokens and all that came before them,
    within the requests of one `cache_salt`; it stays after its request has ended, until its room is
    needed. Only whole blocks are found, and at most those of all tokens but the last, which must run
    for its logits: so a found block is never written.

    As in stage 2, samples and forks share blocks that are not full too, and whoever writes into one
    of those gets a copy first; a request that is swapped out holds host slots instead of blocks.
    """

    def __init__(self, limits: Limits, pool: BlockPool | None = None) -> None:
        made = pool if pool is not None else PrefixBlockPool(limits.num_blocks)
        missing = [call for call in ("find(key)", "seal(block, key)") if not hasattr(made, call.split("(")[0])]
        if missing:
            raise InvalidSetting(
                f"block_pool makes a {type(made).__name__} without {' and '.join(missing)}, by which a prefix cache "
                f"finds blocks again; add {'them' if len(missing) > 1 else 'it'}, or use PrefixBlockPool."
            )
        self.block_size = limits.block_size
        self.pool: PrefixBlockPool = made  # type: ignore[assignment]
        self.capacity_tokens = limits.num_blocks * limits.block_size
        self.free_slots = list(range(limits.num_host_blocks - 1, -1, -1))
        self.hosted: dict[int, list[int]] = {}  # request id -> host slots
        self.samples: dict[int, list[Request]] = {}  # group -> those of its requests that hold blocks
        self.keys: WeakKeyDictionary[Request, list[Key]] = WeakKeyDictionary()  # of its full blocks, made once
        self.sealed: dict[int, int] = {}  # request id -> how many of its blocks are sealed
        self.evicted: list[int] = []  # not yet told of in a grant

    @property
    def free_tokens(self) -> int:
        return self.pool.num_free * self.block_size

    def match(self, request: Request) -> int:
        """How many leading tokens of a request that is about to start have their K/V here already.

        Whole blocks found by their tokens, or, where it is more, what another sample of the same prompt
        has: all of the prompt, but for its last token where that lies in a block which is not full
        (the sample will write there next, so it takes its copy now).
        """
        if request.blocks:
            return 0
        return max(self._shared_tokens(request), len(self._found(request)) * self.block_size)

    def grow(self, request: Request, upto: int) -> Grant | None:
        size, pool = self.block_size, self.pool
        hits = self._hits(request) if request.computed and not request.blocks else []
        pool.share(hits)  # before anything is evicted
        table = [*request.blocks, *hits]
        writes = range(max(request.scheduled, request.computed) // size, len(table))
        shared = [entry for entry in writes if pool.refs(table[entry]) > 1]
        granted = self._alloc(max(0, self._count(upto) - len(table)) + len(shared))
        if granted is None:
            pool.free(hits)
            return None
        copies = tuple(Copy(request.id, entry, table[entry], granted.pop()) for entry in shared)
        pool.free([copy.source for copy in copies])
        holders = self.samples.setdefault(request.group, [])
        if request not in holders:
            holders.append(request)
        evicted, self.evicted = tuple(self.evicted), []
        return Grant((*hits, *granted), copies, evicted)

    def commit(self, request: Request, upto: int) -> int:
        """All survive; blocks that are full now can be found from the next step on."""
        first, full = self.sealed.get(request.id, 0), upto // self.block_size
        if full > first:
            keys, seal = self._keys(request, full), self.pool.seal
            for at in range(first, full):
                if not seal(request.blocks[at], keys[at]):
                    break  # nor may any that continue it
                first = at + 1
            self.sealed[request.id] = first
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
        self.keys[child] = list(self._keys(parent, 0))
        self.sealed[child.id] = self.sealed.get(parent.id, 0)

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
        """Blocks of its own for what it has on the host; they can be found once it has run again."""
        slots = self.hosted[request.id]
        blocks = self._alloc(len(slots))
        if blocks is None:
            return None
        request.blocks.extend(blocks)
        self.samples.setdefault(request.group, []).append(request)
        self.free_slots.extend(self.hosted.pop(request.id))
        return Swap(request.id, tuple(zip(blocks, slots, strict=True)))

    def _alloc(self, count: int) -> list[int] | None:
        granted = self.pool.alloc(count)
        if granted is None:
            return None
        self.evicted += getattr(self.pool, "evicted", ())
        return list(granted)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    # -- what is found by its tokens ------------------------------------------------------------------

    def _keys(self, request: Request, count: int) -> list[Key]:
        """The keys of a request's full blocks, at least of its first `count` ones."""
        keys = self.keys.get(request)
        if keys is None:
            keys = self.keys[request] = []
        size, ids, salt = self.block_size, request.token_ids, request.cache_salt
        key = keys[-1] if keys else None
        for start in range(len(keys) * size, count * size, size):
            key = Key(key, tuple(ids[start : start + size]), salt)
            keys.append(key)
        return keys

    def _found(self, request: Request) -> list[int]:
        """Blocks that hold the beginning of a request, its last token left out."""
        count, blocks = (request.num_tokens - 1) // self.block_size, []
        for key in self._keys(request, count)[:count]:
            block = self.pool.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _hits(self, request: Request) -> list[int]:
        """The blocks of what `match` told, which the scheduler took up as `request.computed`."""
        blocks, tokens = self._found(request), request.computed
        if tokens == len(blocks) * self.block_size:
            return blocks
        other = self._sharing(request)
        if other is None or tokens != self._shared_tokens(request):
            raise StepEngineError(
                f"Request {request.id} is to start with {tokens} tokens found, and {self.match(request)} are; a "
                f"scheduler must keep what match tells, and call grow before anything else is granted."
            )
        return other.blocks[: self._count(len(request.prompt_ids))]

    # -- what samples share ---------------------------------------------------------------------------

    def _sharing(self, request: Request) -> Request | None:
        """Another sample whose prompt is computed, for a request that holds nothing yet."""
        prompt = len(request.prompt_ids)
        others = self.samples.get(request.group, ())
        return next((other for other in others if other.blocks and other.computed >= prompt), None)

    def _shared_tokens(self, request: Request) -> int:
        if self._sharing(request) is None:
            return 0
        prompt = len(request.prompt_ids)
        ends_inside = prompt % self.block_size != 0 and request.num_tokens == prompt
        return prompt - 1 if ends_inside else prompt

    def _let_go(self, request: Request) -> None:
        request.blocks.clear()
        self.sealed.pop(request.id, None)
        holders = self.samples.get(request.group, [])
        if request in holders:
            holders.remove(request)
        if not holders:
            self.samples.pop(request.group, None)
