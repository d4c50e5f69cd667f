"""What the engine relies on in a cache that finds prefixes again: what is found, and what must never be."""

import random
from collections.abc import Callable

from stepengine.contracts.kv_cache import check_kv_cache
from stepengine.contracts.paged_cache import Device
from stepengine.contracts.report import Promise, Report, expect, name_of, run_promises
from stepengine.core.request import Request, State
from stepengine.core.seams import KVCache, Limits


def check_prefix_cache(make: Callable[[Limits], KVCache], block_size: int = 4) -> Report:
    """Check a cache, made by `make(limits)`, that finds full blocks again by their tokens and all before them.

    It must also keep the promises of a paged cache (`check_kv_cache`), which are checked first. A stored
    token stands for itself and everything before it, so that a wrong hit is seen wherever it is read.
    Never raises; see the report.
    """
    size, longest = block_size, 8 * block_size
    limits = Limits(4, 2 * longest, longest, size, 12, "swap", 12)

    def whole(tokens: int) -> int:
        """Tokens of the whole blocks before a request's last token."""
        return (tokens - 1) // size * size

    def found(device: Device, request: Request, wanted: int, why: str) -> None:
        got = device.cache.match(request)
        expect(got == wanted, f"blocks of {size}: {why}; match said {got}, not {wanted}")

    def ended() -> None:
        for tokens in (1, size - 1, size, size + 1, 2 * size, 4 * size, 4 * size + 1):
            if tokens < 1:
                continue
            device = Device(make, limits)
            prompt = device.prompt(tokens)
            first, again = device.request(prompt), device.request(prompt)
            device.start(first)
            device.end(first)
            found(device, again, whole(tokens), f"a prompt of {tokens} tokens was computed, and comes again")
            device.start(again)
            device.whole()

    def beside() -> None:
        device = Device(make, limits)
        prompt = device.prompt(3 * size)
        device.start(device.request(prompt))
        longer = device.request([*prompt, *device.prompt(size)])
        found(
            device, longer, 3 * size, f"a request with a prompt of {3 * size} tokens runs, another goes on from there"
        )
        device.start(longer)
        other = device.request([*prompt[: 2 * size], *device.prompt(size)])
        found(device, other, 2 * size, f"it shares {2 * size} tokens and then goes its own way")
        device.start(other)
        for _ in range(size + 1):
            for request in list(device.live.values()):
                device.decode(request)
        device.whole()

    def computed_only() -> None:
        device = Device(make, limits)
        prompt = device.prompt(4 * size)
        first, second = device.request(prompt), device.request(prompt)
        for request in (first, second):  # both in one step
            found(device, request, 0, "a prompt is new, or is just being computed")
            device.run(request, commit=False)
            device.live[request.id] = request
        device.commit(first, 4 * size)
        device.commit(second, 4 * size)
        for request in (first, second):
            device.decode(request)
        device.end(first)
        found(device, device.request(prompt), whole(4 * size), "one of two requests that computed a prompt has ended")
        device.decode(second)
        device.end(second)
        found(device, device.request(prompt), whole(4 * size), "both requests that computed a prompt have ended")
        device.whole()

    def chunks() -> None:
        for cut in (1, size - 1, size, size + 1, 2 * size):
            if cut < 1:
                continue
            device = Device(make, limits)
            prompt = device.prompt(4 * size)
            first = device.request(prompt)
            device.start(first, most=cut)
            said = f"{cut} of {4 * size} tokens of a prompt were computed"
            second = device.request(prompt)
            found(device, second, min(cut // size * size, whole(4 * size)), said)
            device.start(second, most=cut)
            for request in (first, second):
                while request.scheduled < request.num_tokens:
                    device.run(request, most=cut)
                device.decode(request)
            device.whole()

    def beginnings() -> None:
        device = Device(make, limits)
        head, tail, other = device.prompt(size), device.prompt(2 * size), device.prompt(size)
        first = device.request([*head, *tail])
        device.start(first)
        cases = (
            ([*other, *tail], 0, "the same blocks come after another beginning"),
            ([*tail, *head], 0, "the same blocks come without their beginning"),
            ([*head[1:], *tail, *other], 0, "the same tokens come shifted by one"),
            ([*head, *other, *tail], size, "only the first block is the same"),
        )
        for prompt, wanted, why in cases if size > 1 else cases[:2]:
            request = device.request(prompt)
            found(device, request, wanted, why)
            device.start(request)
            device.end(request)
        device.whole()

    def salts() -> None:
        device = Device(make, limits)
        prompt = device.prompt(3 * size)
        device.start(device.request(prompt, salt="red"))
        found(device, device.request(prompt, salt="blue"), 0, "the same prompt has another cache_salt")
        found(device, device.request(prompt), 0, "the same prompt has no cache_salt")
        found(device, device.request(prompt, salt="red"), whole(3 * size), "the prompt and its cache_salt are the same")
        device.whole()

    def outputs() -> None:
        device = Device(make, limits)
        first = device.request(device.prompt(size + 1))
        device.start(first)
        while first.num_tokens < 3 * size + 1:
            device.decode(first)
        tokens = list(first.token_ids)
        device.end(first)
        following = device.request([*tokens, *device.prompt(2)])
        wanted = len(tokens) // size * size
        found(device, following, wanted, f"{len(tokens)} tokens, most of them generated, begin the next round")
        device.start(following)
        device.whole()

    def comes_back() -> None:
        device = Device(make, limits)
        request = device.request(device.prompt(2 * size))
        device.start(request)
        for _ in range(size + 1):
            device.decode(request)
        device.preempt(request)
        found(device, request, whole(request.num_tokens), "a request gave way and comes back")
        request.state = State.RUNNING
        device.start(request)
        device.decode(request)
        device.whole()

    def tight() -> None:
        device = Device(make, limits)
        prompt = device.prompt(4 * size)
        first = device.request(prompt)
        device.start(first)
        device.end(first)
        others = [device.request(device.prompt(2 * size)) for _ in range(4)]
        for request in others:  # all blocks hold something now, and nobody the first four
            device.start(request)
        again = device.request([*prompt, *device.prompt(2)])
        found(device, again, 4 * size, "4 blocks are kept, the others held")
        expect(not device.start(again), f"a fifth block was granted, and all {limits.num_blocks} are in use")
        found(device, again, 4 * size, "grow answered None")
        device.end(others.pop())
        expect(device.start(again), "two blocks fell free, and there was no room for one beside the 4 that are kept")
        for _ in range(size):
            device.decode(again)
        device.whole()

    def any_order() -> None:
        for steps in (5, 10, 20, 50, 400):
            rng = random.Random(steps)
            device = Device(make, limits)
            roots = [device.prompt(3 * size) for _ in range(3)]
            waiting: list[Request] = []
            for _ in range(steps):
                live = list(device.live.values())
                running = [request for request in live if request.state is State.RUNNING]
                away = [request for request in live if request.state is State.SWAPPED]
                behind = [request for request in running if request.num_tokens - request.scheduled > 1]
                move = rng.random()
                if not live or move < 0.25:
                    root = rng.choice(roots)[: rng.randint(0, 3 * size)]
                    tokens = [*root, *device.prompt(rng.randint(1, size))]
                    first = device.request(tokens, salt=rng.choice(("", "", "red")))
                    device.start(first, most=rng.choice((None, rng.randint(1, 2 * size))))
                elif behind and move < 0.4:
                    device.run(rng.choice(behind), most=rng.randint(1, 2 * size))
                elif running and move < 0.65:
                    request = rng.choice(running)
                    if request in behind:
                        device.run(request)
                    elif request.num_tokens >= longest or not device.decode(request):
                        device.end(request)
                elif running and move < 0.7:
                    device.fork(rng.choice(running))
                elif running and move < 0.76:
                    device.swap_out(rng.choice(running))
                elif away and move < 0.82:
                    device.swap_in(rng.choice(away))
                elif running and move < 0.88:
                    request = rng.choice(running)
                    device.preempt(request)
                    waiting.append(request)
                elif waiting and move < 0.94:
                    request = waiting.pop()
                    request.state = State.RUNNING
                    if not device.start(request, most=rng.choice((None, size))):
                        waiting.append(request)
                else:
                    device.end(rng.choice(live))
            device.whole()

    name = f"Prefix cache {name_of(make)}"
    paged = check_kv_cache(make, block_size=block_size, num_blocks=12, max_model_len=longest)
    report = run_promises(
        name,
        [
            Promise(
                "a prompt that comes again is found, all whole blocks but its last token's",
                ended,
                "at most (num_tokens - 1) // block_size blocks: the last token must run for its logits",
            ),
            Promise("prompts that begin alike share blocks while both run", beside, "share what is found, in grow"),
            Promise("nothing is found before it is computed", computed_only, "seal blocks in commit, not in grow"),
            Promise("a chunk's full blocks are found, also when it ends on a block", chunks, "upto // block_size"),
            Promise("a block is found only after its own beginning", beginnings, "chain a key over its parent's"),
            Promise("a cache_salt keeps requests apart", salts, "it belongs to the key of the first block"),
            Promise("generated tokens are found in the next round", outputs, "seal full blocks of outputs too"),
            Promise("who gave way finds its own blocks again", comes_back, "look for all its tokens, outputs too"),
            Promise("what is found cannot be evicted by who found it", tight, "share the hits before you alloc"),
            Promise("in any order, each reads its own tokens", any_order, "try the promises above first"),
        ],
    )
    return Report(name, paged.passed + report.passed, paged.failed + report.failed, paged.remarks)
