"""What the engine relies on in a K/V cache."""

import random
from collections.abc import Callable

from stepengine.contracts.paged_cache import paged_promises
from stepengine.contracts.report import Promise, Report, expect, name_of, run_promises
from stepengine.core.request import Request, SamplingParams, State
from stepengine.core.seams import KVCache, Limits


def _request(number: int, tokens: int) -> Request:
    request = Request(number, [1] * tokens, SamplingParams(), max_len=1 << 30, group=number)
    request.state = State.RUNNING
    return request


class _Driver:
    """Uses a cache as an engine would, and keeps its own account of who holds which block."""

    def __init__(self, make: Callable[[Limits], KVCache], limits: Limits) -> None:
        self.limits = limits
        self.cache = make(limits)
        self.holders: dict[int, Request] = {}

    def start(self, number: int, tokens: int) -> bool:
        request = _request(number, tokens)
        if not self.grow(request, tokens):
            return False
        self.holders[number] = request
        return True

    def grow(self, request: Request, upto: int) -> bool:
        before, blocks = self.cache.free_tokens, list(request.blocks)
        grant = self.cache.grow(request, upto)
        if grant is None:
            unchanged = self.cache.free_tokens == before and request.blocks == blocks
            expect(unchanged, f"grow(request {request.id}, {upto}) answered None but changed what is free or held")
            return False
        request.blocks.extend(grant.blocks)
        self.check_tables(request, upto)
        return True

    def check_tables(self, request: Request, upto: int) -> None:
        size, last = self.limits.block_size, self.limits.num_blocks
        for block in request.blocks:
            expect(1 <= block <= last, f"request {request.id} was granted block {block}; blocks are 1 to {last}")
            for other in self.holders.values():
                clash = other is not request and block in other.blocks
                expect(
                    not clash, f"block {block} was granted to request {request.id} while request {other.id} holds it"
                )
        room = len(request.blocks) * size
        expect(not size or room >= upto, f"grow(request {request.id}, {upto}) left room for {room} tokens")

    def end(self, number: int) -> None:
        request = self.holders.pop(number)
        self.cache.release(request)
        expect(not request.blocks, f"release(request {number}) left blocks {request.blocks} in its table")


def check_kv_cache(
    make: Callable[[Limits], KVCache], block_size: int = 64, num_blocks: int = 4, max_model_len: int | None = None
) -> Report:
    """Check a cache, made by `make(limits)`, with `num_blocks` blocks of `block_size` tokens.

    Unless `max_model_len` is above `block_size`, a block is a slot; with `block_size` 0 nothing is stored.
    Above it, blocks are pages, and thrift, copies on a write, forks and swaps are checked too (the last two
    where the cache has them). A cache that keeps less than was computed passes: it is wasteful, not wrong.
    Never raises; see the report.
    """
    longest = max_model_len or block_size or 64
    limits = Limits(num_blocks, 2 * longest, longest, block_size, num_blocks if block_size else 0)
    paged = 0 < block_size < longest
    longest = min(longest, num_blocks * block_size) if paged else longest
    remarks: list[str] = []
    slack: list[int] = []

    def fresh() -> None:
        cache = make(limits)
        free, capacity = cache.free_tokens, cache.capacity_tokens
        expect(capacity > 0 and free == capacity, f"a new cache has {free} of {capacity} tokens free")
        found = cache.match(_request(0, 5))
        expect(found == 0, f"a new cache found {found} tokens of a request that it has never seen")

    def room() -> None:
        for tokens in (1, 2, longest - 1, longest):
            driver = _Driver(make, limits)
            expect(driver.start(0, tokens), f"an empty cache had no room for {tokens} tokens")

    def grows() -> None:
        driver = _Driver(make, limits)
        expect(driver.start(0, 1), "an empty cache had no room for 1 token")
        for upto in range(2, longest + 1):
            request = driver.holders[0]
            expect(driver.grow(request, upto), f"the only request could not grow from {upto - 1} to {upto} tokens")

    def survives() -> None:
        for upto in (1, 2, 7, longest):
            driver = _Driver(make, limits)
            driver.start(0, upto)
            kept = driver.cache.commit(driver.holders[0], upto)
            expect(0 <= kept <= upto, f"commit(request 0, {upto}) answered {kept}; only {upto} tokens were computed")
            slack.append(upto - kept)

    def full() -> None:
        driver = _Driver(make, limits)
        while len(driver.holders) < 4 * num_blocks and driver.start(len(driver.holders), longest):
            pass
        held = sum(len(request.blocks) for request in driver.holders.values())
        expect(held <= limits.num_blocks, f"{held} blocks were granted, there are {limits.num_blocks}")

    def whole() -> None:
        for count in range(1, num_blocks + 1):
            driver = _Driver(make, limits)
            started = [number for number in range(count) if driver.start(number, 1 + number)]
            for number in started:
                driver.end(number)
            free, capacity = driver.cache.free_tokens, driver.cache.capacity_tokens
            expect(free == capacity, f"after {count} requests came and went, {free} of {capacity} tokens are free")

    def any_order() -> None:
        for size in (2, 3, 5, 8, 20, 200):
            rng, driver, started = random.Random(size), _Driver(make, limits), 0
            for _ in range(size):
                if driver.holders and rng.random() < 0.45:
                    driver.end(rng.choice(sorted(driver.holders)))
                elif driver.holders and rng.random() < 0.4:
                    request = driver.holders[rng.choice(sorted(driver.holders))]
                    driver.grow(request, rng.randint(1, longest))
                else:
                    driver.start(started, rng.randint(1, longest))
                    started += 1
            for number in list(driver.holders):
                driver.end(number)
            free, capacity = driver.cache.free_tokens, driver.cache.capacity_tokens
            expect(free == capacity, f"after {size} random operations {free} of {capacity} tokens are free")

    def paged_rest() -> list[Promise]:
        try:
            return paged_promises(make, limits, remarks)
        except Exception:  # it cannot even be made, as the first promise has told
            return []

    report = run_promises(
        f"KV cache {name_of(make)}",
        [
            Promise("a new cache is empty and finds nothing", fresh, "look at __init__, free_tokens and match"),
            Promise("grow makes room for every token it is asked for", room, "blocks x block_size must reach upto"),
            Promise("a request can grow token by token", grows, "grow must look at what the request already holds"),
            Promise("commit never claims more than was computed", survives, "commit(request, upto) is 0..upto"),
            Promise("a full cache answers None and changes nothing", full, "check for room before taking any"),
            Promise("release gives everything back", whole, "every block in request.blocks is free again"),
            Promise("no block is ever in two tables, in any order", any_order, "take a block off the free list once"),
            *(paged_rest() if paged else ()),
        ],
    )
    if report.ok and any(slack):
        report.remarks.append(f"wasteful: up to {max(slack)} computed tokens are forgotten and computed again")
    report.remarks += remarks if report.ok else []
    return report
