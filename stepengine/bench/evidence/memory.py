"""K/V memory: claims C3, C11, C15, C21."""

import random
from typing import Any

import torch

from stepengine.bench import gptq, runs, workloads
from stepengine.bench.evidence.common import GREEDY, TINY, Evidence, Number, Workbench
from stepengine.bench.usage import usage
from stepengine.calculator import kv_bytes_per_token, shape_of, weight_parts
from stepengine.core.request import Request, SamplingParams
from stepengine.core.seams import Limits
from stepengine.stage1_kvcache.cache import SlotCache
from stepengine.stage2_paged.block_pool import BlockPool
from stepengine.stage2_paged.cache import PagedCache


def last_block(bench: Workbench) -> Evidence:
    """C3: E3's request in the real cache, and the worst and the mean emptiness of a long-tailed run."""
    limits = Limits(4, 10**6, 128, block_size=16, num_blocks=26)
    pool = BlockPool(26)
    cache = PagedCache(limits, pool)
    taken = pool.alloc(26)
    assert taken is not None
    pool.free([block for block in taken if block in (3, 7, 12, 25)])  # scattered: nothing is next to anything
    request = Request(0, [1] * 50, SamplingParams(max_tokens=2), max_len=52)
    grant = cache.grow(request, 50)
    assert grant is not None
    room = 16 * len(grant.blocks)
    llm = runs.build(TINY, "2", 4, 256, places=24)
    work = workloads.lognormal(workloads.corpus(None, llm.config.vocab_size), bench.seed, 24, 32, 48, 256)
    used = usage(runs.run(llm, work).trace)
    numbers = (
        Number("scattered free blocks that could not be used", pool.num_free),
        Number("50 tokens in blocks of 16, empty", 100 * (room - 50) / room, "%"),
        Number("a run of 24 requests, most places empty in any of them", used.worst_waste),
        Number("the same run, reserved places that are empty", 100 * (1 - used.utilization), "%"),
    )
    agrees = pool.num_free == 0 and room - 50 == 14 and 0 < used.worst_waste <= 15
    return Evidence("counted: the real cache, and a run", numbers, agrees)


def utilisation(bench: Workbench) -> Evidence:
    """C11: of what is reserved, the part that holds tokens; requests at once in the same bytes."""
    numbers, agrees = [], True
    for part in bench.capacity["sets"].values():
        slots, blocks = (part["used"][stage]["utilization"] for stage in ("1b", "2"))
        shown = part["max_model_len"]
        numbers += [
            Number(f"slots of {shown}", 100 * slots, "%"), Number(f"blocks, up to {shown}", 100 * blocks, "%"),
            Number(f"requests at once, up to {shown}", part["fits_ratio"], "times"),
        ]  # fmt: skip
        agrees &= slots < 0.5 < 0.9 < blocks < 1
    mean = next(iter(bench.capacity["sets"].values()))["mean_tokens"]
    numbers.append(Number("tokens of a request on average", mean, "", 3))
    how = f"counted in runs of {TINY}: log-normal lengths, slots of 2048 and 4096 at 1/{bench.capacity['scale']}"
    return Evidence(how, tuple(numbers), agrees and numbers[0].value > numbers[3].value)


def of_what(bench: Workbench) -> Evidence:
    """C21: two requests of 512 and 128 tokens in slots of 2048 and in blocks of 16; 4-bit weights. Times less."""
    shape = shape_of("SmolLM2-135M")
    params = SamplingParams(max_tokens=1)
    reserved, kept = {}, {}
    for name, size, count in (("slots", 2048, 2), ("blocks", 16, 256)):
        limits = Limits(2, 10**6, 2048, block_size=size, num_blocks=count)
        cache: Any = SlotCache(limits) if name == "slots" else PagedCache(limits)
        before, kept[name] = cache.free_tokens, 0
        for number, length in enumerate((512, 128)):
            request = Request(number, [1] * length, params, max_len=length + 1, group=number)
            cache.grow(request, length)
            kept[name] += cache.commit(request, length)
        reserved[name] = before - cache.free_tokens
    token, weights = kv_bytes_per_token(shape), sum(weight_parts(shape, "bf16").values())
    packed = sum(weight_parts(shape, "int4", gptq.GROUP).values())
    slots, blocks = (weights + token * reserved[name] for name in ("slots", "blocks"))
    numbers = (
        Number("paging, K/V reserved", reserved["slots"] / reserved["blocks"], "times"),
        Number("paging, K/V that hold tokens", kept["slots"] / kept["blocks"], "times"),
        Number("paging, weights and K/V", slots / blocks, "times"),
        Number("4 bits, weights", weights / packed, "times"),
        Number("4 bits, weights and paged K/V", blocks / (packed + token * reserved["blocks"]), "times"),
    )
    spread = [number.value for number in numbers]
    return Evidence("real caches, bytes of SmolLM2-135M in bf16", numbers, max(spread) > 2 > 1.5 > min(spread))


def full_blocks(bench: Workbench) -> Evidence:
    """C15: full blocks watched byte by byte, and copies: by prefix hits, and by samples of one prompt."""
    llm = runs.build(TINY, "4", 6, 128, places=6)
    rng = random.Random(bench.seed)
    begin = [rng.randrange(3, 499) for _ in range(70)]
    storage, size = llm.engine.runner.pool.storage, llm.engine.limits.block_size
    for tail in ([5], [6, 7], [8, 9, 10]):
        llm.engine.add_request([*begin, *tail], GREEDY.replace(max_tokens=20))
        llm.engine.step()
    looked = written = 0
    while llm.engine.has_unfinished():
        holders = llm.engine.requests.values()
        full = {block: storage[:, block].clone() for r in holders for block in r.blocks[: r.computed // size]}
        llm.engine.step()
        looked += len(full)
        written += sum(not torch.equal(storage[:, block], before) for block, before in full.items())
    hits, by_hits = (llm.stats()[name] for name in ("prefix_hit_tokens", "copied_blocks"))
    copies = []
    for length in (50, 48):
        prompt = [rng.randrange(3, 499) for _ in range(length)]
        before = llm.stats()["copied_blocks"]
        llm.generate([prompt], SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True))
        copies.append(llm.stats()["copied_blocks"] - before)
    numbers = (
        Number("tokens found by prefix", hits), Number("blocks copied for them", by_hits),
        Number("looks at full blocks", looked), Number("of which one had changed", written),
        Number("copies with n = 3, a prompt of 50", copies[0]), Number("a prompt of 48", copies[1]),
    )  # fmt: skip
    return Evidence("counted in runs, blocks of 16", numbers, hits > 0 == by_hits == written == copies[1] < copies[0])
