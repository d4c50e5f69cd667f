"""What the engine relies on in a cache of small blocks: thrift, sharing, copies on a write, swapping."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from stepengine.contracts.report import Promise, expect
from stepengine.core.plan import Swap
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import KVCache, Limits


class Device:
    """Plays scheduler and storage. A stored token is the tuple of all tokens up to it, as a model's K/V would be."""

    def __init__(self, make: Callable[[Limits], KVCache], limits: Limits) -> None:
        self.size = limits.block_size
        self.limits = limits
        self.cache: Any = make(limits)
        self.live: dict[int, Request] = {}
        self.stored: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset) -> tokens
        self.hosted: dict[int, list[tuple[int, ...] | None]] = {}  # host slot -> contents of a block
        self.slots: dict[int, tuple[int, ...]] = {}  # request -> host slots
        self.ids = itertools.count()
        self.tokens = itertools.count(1)

    def request(self, tokens: Sequence[int], group: int | None = None, salt: str = "") -> Request:
        number = next(self.ids)
        params, group = SamplingParams(), number if group is None else group
        request = Request(number, list(tokens), params, 1 << 30, group=group, sample=number - group, cache_salt=salt)
        request.state = State.RUNNING
        return request

    def prompt(self, length: int) -> list[int]:
        return [next(self.tokens) for _ in range(length)]

    def start(self, request: Request, most: int | None = None) -> bool:
        """Run all tokens that a new request (or one that comes back) has, or the first `most` of those not found."""
        cached = self.cache.match(request)
        known = request.num_tokens
        expect(0 <= cached <= known, f"match said {cached} of a request of {known} tokens")
        request.keep(cached)
        if not self.run(request, cached, most):
            request.keep(0)
            return False
        self.live[request.id] = request
        return True

    def decode(self, request: Request) -> bool:
        """Sample a token and run it, or leave the request as it was where there is no room."""
        if request.scheduled == request.num_tokens:
            request.token_ids.append(next(self.tokens))
        return self.run(request)

    def run(self, request: Request, cached: int = 0, most: int | None = None, commit: bool = True) -> bool:
        """Run what is not yet scheduled, or `most` tokens of it; without `commit` its results are still to come."""
        cache, size = self.cache, self.size
        upto = request.num_tokens if most is None else min(request.num_tokens, request.scheduled + most)
        before, table = cache.free_tokens, list(request.blocks)
        call = f"blocks of {size}: grow(request {request.id}, {upto})"
        grant = cache.grow(request, upto)
        if grant is None:
            same = cache.free_tokens == before and request.blocks == table
            expect(same, f"{call} answered None but changed what is free or held")
            return False
        stored = request.computed
        chunk = request.schedule(grant.blocks, cached, most)
        for copy in grant.copies:
            request.blocks[copy.entry] = copy.destination
            for offset in range(size):
                self.stored[copy.destination, offset] = self.stored.get((copy.source, offset), ())
        wanted = -(-max(upto, stored) // size)
        expect(len(request.blocks) == wanted, f"{call} left {len(request.blocks)} blocks in its table, not {wanted}")
        for position in range(stored, upto):
            block, offset = request.blocks[position // size], position % size
            expect(1 <= block <= self.limits.num_blocks, f"{call} led to block {block}")
            holders = [other.id for other in self.live.values() if other is not request and block in other.blocks]
            said = f"{call}: token {position} goes into block {block}, which request {holders} holds too"
            expect(not holders, f"{said}; it must be copied first")
            self.stored[block, offset] = tuple(request.token_ids[: position + 1])
        for position in range(upto):
            found = self.stored.get((request.blocks[position // size], position % size))
            right = found == tuple(request.token_ids[: position + 1])
            expect(
                right, f"{call}: token {position} is read from block {request.blocks[position // size]}, not its own"
            )
        if commit:
            self.commit(request, chunk.end)
        return True

    def commit(self, request: Request, upto: int) -> None:
        request.computed = self.cache.commit(request, upto)
        request.scheduled = min(request.scheduled, request.computed)

    def preempt(self, request: Request) -> None:
        """It gives up its blocks and will start again with all its tokens."""
        self.end(request)
        request.give_way(State.WAITING)

    def end(self, request: Request) -> None:
        self.cache.release(request)
        expect(not request.blocks, f"release(request {request.id}) left blocks {request.blocks} in its table")
        del self.live[request.id]
        self.slots.pop(request.id, None)

    def fork(self, parent: Request) -> Request:
        child = self.request(parent.prompt_ids)
        child.token_ids, child.scheduled, child.computed = list(parent.token_ids), parent.scheduled, parent.computed
        self.cache.fork(parent, child)
        expect(
            child.blocks == parent.blocks, f"fork gave the child blocks {child.blocks}, its parent has {parent.blocks}"
        )
        self.live[child.id] = child
        return child

    def swap_out(self, request: Request) -> bool:
        table, before = list(request.blocks), self.cache.free_tokens
        said = f"swap_out(request {request.id} with blocks {table})"
        swap: Swap | None = self.cache.swap_out(request)
        if swap is None:
            same = request.blocks == table and self.cache.free_tokens == before
            expect(same, f"{said} answered None but changed what is free or held")
            return False
        expect([block for block, _ in swap.pairs] == table, f"{said} moves {swap.pairs}")
        expect(not request.blocks, f"{said} left {request.blocks} in its table")
        slots = tuple(slot for _, slot in swap.pairs)
        taken = {slot for others in self.slots.values() for slot in others}
        expect(
            len({*slots, *taken}) == len(slots) + len(taken), f"{said} writes to host slots {slots}; {taken} are taken"
        )
        for block, slot in swap.pairs:
            self.hosted[slot] = [self.stored.get((block, offset)) for offset in range(self.size)]
        self.slots[request.id] = slots
        request.give_way(State.SWAPPED, request.computed)
        return True

    def swap_in(self, request: Request) -> bool:
        said, before = f"swap_in(request {request.id})", self.cache.free_tokens
        swap: Swap | None = self.cache.swap_in(request)
        if swap is None:
            same = not request.blocks and self.cache.free_tokens == before
            expect(same, f"{said} answered None but changed what is free or held")
            return False
        came, slots = tuple(slot for _, slot in swap.pairs), self.slots.pop(request.id)
        expect(came == slots, f"{said} brings host slots {came}; it was swapped out to {slots}")
        blocks = [block for block, _ in swap.pairs]
        expect(request.blocks == blocks, f"{said} moves to blocks {blocks}, its table has {request.blocks}")
        for block, slot in swap.pairs:
            holders = [other.id for other in self.live.values() if other is not request and block in other.blocks]
            expect(not holders, f"{said} moves into block {block}, which request {holders} holds")
            self.stored |= {(block, offset): tokens or () for offset, tokens in enumerate(self.hosted[slot])}
        request.state = State.RUNNING
        return True

    def whole(self) -> None:
        for request in list(self.live.values()):
            self.end(request)
        free, capacity = self.cache.free_tokens, self.cache.capacity_tokens
        expect(free == capacity, f"all requests have ended, and {free} of {capacity} tokens are free")


def paged_promises(make: Callable[[Limits], KVCache], limits: Limits, remarks: list[str]) -> list[Promise]:
    """What holds beyond the promises of slots; `fork` and the swaps are checked where the cache has them."""
    size, longest = limits.block_size, min(limits.max_model_len, limits.num_blocks * limits.block_size)
    swapping = Limits(**{**vars(limits), "preemption": "swap", "num_host_blocks": limits.num_blocks})
    methods = make(limits)

    def thrift() -> None:
        device = Device(make, limits)
        request = device.request(device.prompt(1))
        device.start(request)
        while request.num_tokens < longest:
            expect(device.decode(request), f"the only request had no room for {request.num_tokens} tokens")
        device.whole()

    def several() -> None:
        for count in (2, 3, 5):
            device = Device(make, limits)
            requests = [device.request(device.prompt(1 + number)) for number in range(count)]
            for request in requests:
                device.start(request)
            for _ in range(longest):
                for request in list(device.live.values()):
                    if request.num_tokens >= longest or not device.decode(request):
                        device.end(request)
            device.whole()

    def samples() -> None:
        for prompt, n in ((size, 2), (size + 2, 2), (2 * size - 1, 3), (2 * size, 3), (2 * size + 1, 2)):
            device = Device(make, limits)
            tokens = device.prompt(prompt)
            first = device.request(tokens)
            device.start(first)
            used = device.cache.capacity_tokens - device.cache.free_tokens
            for _ in range(n - 1):
                device.start(device.request(tokens, first.id))
            spent = device.cache.capacity_tokens - device.cache.free_tokens
            if spent >= n * used and prompt > size:
                remarks[:] = ["wasteful: samples of one prompt hold its K/V once each instead of sharing them"]
            for _ in range(size + 1):
                for request in list(device.live.values()):
                    device.decode(request)
            device.whole()

    def forks() -> None:
        for tokens in (1, size - 1, size, size + 1):
            device = Device(make, limits)
            parent = device.request(device.prompt(max(1, tokens)))
            device.start(parent)
            child = device.fork(parent)
            free = device.cache.free_tokens
            expect(
                free == device.cache.capacity_tokens - len(parent.blocks) * size,
                f"a fork of {len(parent.blocks)} blocks took room of its own: {free} tokens are free",
            )
            for _ in range(2):
                device.decode(child)
                device.decode(parent)
            device.end(parent)
            device.decode(child)
            device.whole()

    def swaps() -> None:
        for tokens in (1, size, size + 1):
            device = Device(make, swapping)
            request, other = device.request(device.prompt(tokens)), device.request(device.prompt(1))
            device.start(request)
            expect(device.swap_out(request), f"swap_out found no room in {swapping.num_host_blocks} host blocks")
            free, capacity = device.cache.free_tokens, device.cache.capacity_tokens
            expect(free == capacity, f"the only request is on the host, and {free} of {capacity} tokens are free")
            device.start(other)
            expect(device.swap_in(request), f"swap_in found no room for {tokens} tokens beside 1 other")
            device.decode(request)
            device.whole()

    def full_host() -> None:
        device = Device(make, Limits(**{**vars(swapping), "num_host_blocks": 1}))
        short, long = device.request(device.prompt(1)), device.request(device.prompt(size + 1))
        device.start(short)
        device.start(long)
        expect(not device.swap_out(long), "2 blocks were swapped out into 1 host block")
        expect(device.swap_out(short), "1 block was not swapped out into 1 free host block")
        while device.start(device.request(device.prompt(1))):
            pass
        expect(not device.swap_in(short), "a block was swapped into a full pool")
        device.end(short)
        another = next(request for request in device.live.values() if len(request.blocks) == 1)
        expect(device.swap_out(another), "release(a swapped request) kept its host slot")
        device.whole()

    def any_order() -> None:
        for steps in (5, 10, 20, 50, 300):
            rng = random.Random(steps)
            device = Device(make, swapping)
            for _ in range(steps):
                live = list(device.live.values())
                running = [request for request in live if request.state is State.RUNNING]
                away = [request for request in live if request.state is State.SWAPPED]
                move = rng.random()
                if not live or move < 0.2:
                    tokens = device.prompt(rng.randint(1, longest // 2))
                    first = device.request(tokens)
                    if device.start(first) and rng.random() < 0.5:
                        device.start(device.request(tokens, first.id))
                elif running and move < 0.65:
                    request = rng.choice(running)
                    if request.num_tokens >= longest or not device.decode(request):
                        device.end(request)
                elif running and move < 0.75 and hasattr(methods, "fork"):
                    device.fork(rng.choice(running))
                elif running and move < 0.85 and hasattr(methods, "swap_out"):
                    device.swap_out(rng.choice(running))
                elif away and move < 0.95:
                    device.swap_in(rng.choice(away))
                else:
                    device.end(rng.choice(live))
            device.whole()

    promises = [
        Promise("a request holds no more blocks than its tokens fill", thrift, "a new block when the last one is full"),
        Promise(
            "requests that grow side by side read their own tokens", several, "a block has one owner, or is copied"
        ),
        Promise(
            "samples of one prompt part when they write", samples, "copy a block that others hold before the write"
        ),
    ]
    if hasattr(methods, "fork"):
        promises.append(Promise("a fork shares all blocks until either writes", forks, "share(parent.blocks)"))
    if hasattr(methods, "swap_out"):
        text = "what is swapped out comes back as it was, into any blocks"
        promises.append(Promise(text, swaps, "pair each block with a host slot, in the table's order"))
        promises.append(
            Promise("a full host or a full pool answers None", full_host, "check for room before moving any")
        )
    text = "in any order, each reads its own tokens; all blocks are free at the end"
    return [*promises, Promise(text, any_order, "references and tables must tell the same story")]
