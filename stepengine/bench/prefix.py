"""Prefix caching (stage 4b): first tokens on a hit, hit rates, what a miss costs, and what the host pays per block."""

import gc
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any
from unittest import mock

import numpy as np

from stepengine.bench import runs, verify, workloads
from stepengine.bench.measure import Paired, alternate
from stepengine.bench.options import Options, bar_text, ratio_text, told_of
from stepengine.bench.workloads import Chats, Workload
from stepengine.core.request import Request, SamplingParams
from stepengine.llm import LLM

WITHOUT, WITH = "3", "4b"  # the same scheduler and attention; only the cache differs
INDEXES = ("hash", "radix")
SHARES = (0.0, 0.5, 0.9, 1.0)  # of a prefix that has been seen
TAIL = 64  # tokens behind the prefix, never seen
TTFT_BARS = {1024: 8.0, 4096: 15.0}  # times lower with the whole prefix seen
MISS_BAR = 1.01  # time with nothing to find, over the time without looking
SALT = "seen"  # of the runs that shall find what others before them computed
HOST_BAR = 2.0  # us a block for match and commit
COUNTED_ON = "tiny-random"  # counts do not depend on the weights


def prefix(options: Options) -> dict[str, Any]:
    """Four parts: time to the first token by share seen; hits counted; the cost of misses; the host's work alone."""
    return {
        "what": "prefix",
        "ttft": ttft(options),
        "hits": hits(options),
        "misses": misses(options),
        "host": host(options),
    }


def ttft(options: Options) -> dict[str, Any]:
    """Milliseconds to the first token of one request alone, in turns over the shares of its prefix seen before.

    All prompts of one length have the same number of tokens: the prefix and `TAIL` more. What has not been
    seen is drawn anew for each run.
    """
    prefixes, tail = ((64, 128), 8) if options.fast else ((256, 1024, 4096), TAIL)
    longest = max(prefixes) + tail + 16
    llm = runs.build(options.model, WITH, 3, longest, places=1)  # what is seen once stays, while it is used
    rng, vocab = np.random.default_rng(options.seed), llm.config.vocab_size
    runs.warm(llm, _prompt(_draw(rng, vocab, min(prefixes)), options.seed))
    cells: list[dict[str, Any]] = []
    total = len(prefixes) * len(SHARES) * options.rounds
    with told_of(options, "first tokens, by share seen", total) as told:
        for length in prefixes:
            seen = _draw(rng, vocab, length)
            runs.run(llm, _prompt(seen + _draw(rng, vocab, tail), options.seed), salt=SALT)
            found: dict[str, set[int]] = {}

            def arm(
                share: float, length: int = length, seen: list[int] = seen, found: dict[str, set[int]] = found
            ) -> float:
                kept = int(share * length)
                new = _draw(rng, vocab, length - kept + tail)
                done = runs.run(llm, _prompt(seen[:kept] + new, options.seed), salt=SALT)
                found.setdefault(str(share), set()).add(done.hit_tokens)
                return done.requests[0].ttft_ms or 0.0

            arms = {str(share): lambda share=share: arm(share) for share in SHARES}  # noqa: B023
            timed = alternate(arms, options.rounds, warmup=0, told=told)
            gain = timed.ratio("0.0", "1.0")
            cell: dict[str, Any] = {
                "prefix": length,
                "tail": tail,
                "ms": {share: timed.median(share) for share in timed.values},
                "found": {share: sorted(tokens) for share, tokens in found.items()},
                "gain": {share: vars(timed.ratio("0.0", share)) for share in list(timed.values)[1:]},
            }
            if length in TTFT_BARS:
                cell |= {"bar": TTFT_BARS[length], "met": gain.median >= TTFT_BARS[length]}
            cells.append(cell)
    return {"cells": cells, "met": all(cell.get("met", True) for cell in cells)}


def _draw(rng: np.random.Generator, vocab: int, count: int) -> list[int]:
    return [int(token) for token in rng.integers(0, vocab, count)]


def _prompt(tokens: Sequence[int], seed: int) -> Workload:
    return Workload("one prompt", (tuple(tokens),), (1,), seed)


def sets(ids: Any, options: Options) -> dict[str, Workload | Chats]:
    """Requests with much, some and nothing in common."""
    if options.fast:
        return {
            "few-shot": workloads.few_shot(ids, options.seed, 6, 64, 12, 4),
            "multi-turn": workloads.multi_turn(ids, options.seed, 3, 3, 32, 12, 8),
            "random": workloads.uniform(ids, options.seed, 6, (40, 80), (4, 8)),
        }
    return {
        "few-shot": workloads.few_shot(ids, options.seed, 32, 512, 48, 16),
        "multi-turn": workloads.multi_turn(ids, options.seed, 8, 4, 128, 64, 48),
        "random": workloads.uniform(ids, options.seed, 32, (128, 512), (16, 32)),
    }


def hits(options: Options) -> dict[str, Any]:
    """Tokens found and tokens saved on three kinds of requests, by both indexes, counted on tiny random weights."""
    longest, places = (160, 8) if options.fast else (1024, 16)
    engines = {WITHOUT: runs.build(COUNTED_ON, WITHOUT, places, longest)}
    engines |= {index: runs.build(COUNTED_ON, WITH, places, longest, prefix_index=index) for index in INDEXES}
    result: dict[str, Any] = {"model": COUNTED_ON, "pool_tokens": places * longest, "sets": {}}
    asked = sets(workloads.corpus(None, 499), options)
    with told_of(options, "hits", len(asked) * len(engines)) as told:
        for name, work in asked.items():
            done = {}
            for arm, llm in engines.items():
                done[arm] = _turns(llm, work)
                told(arm)
            same = [
                verify.differences(engines[WITHOUT], right, found)
                for index in INDEXES
                for right, found in zip(done[WITHOUT], done[index], strict=True)
            ]
            prompts = sum(len(prompt) for turn in done[WITHOUT] for prompt in turn.workload.prompts)
            computed = {arm: sum(map(_computed, found)) for arm, found in done.items()}
            result["sets"][name] = {
                "name": work.name,
                "requests": sum(len(turn.workload.prompts) for turn in done[WITHOUT]),
                "prompt_tokens": prompts,
                "hit_tokens": {index: sum(turn.hit_tokens for turn in done[index]) for index in INDEXES},
                "hit_rate": {index: sum(turn.hit_tokens for turn in done[index]) / prompts for index in INDEXES},
                "by_turn": [turn.hit_tokens / _prompt_tokens(turn.workload) for turn in done[INDEXES[0]]],
                "computed": computed,
                "saved": {index: computed[WITHOUT] - computed[index] for index in INDEXES},
                "same_tokens": all(found.wrong == 0 for found in same),
                "near_ties": sum(found.near for found in same),
            }
    result["same_hits"] = all(len(set(part["hit_tokens"].values())) == 1 for part in result["sets"].values())
    result["met"] = result["same_hits"] and all(part["same_tokens"] for part in result["sets"].values())
    return result


def _prompt_tokens(work: Workload) -> int:
    return sum(map(len, work.prompts))


def _computed(run: runs.Run) -> int:
    return sum(record.plan.num_tokens for record in run.trace.steps)


def _turns(llm: LLM, work: Workload | Chats) -> list[runs.Run]:
    return runs.run_chats(llm, work) if isinstance(work, Chats) else [runs.run(llm, work)]


def misses(options: Options) -> dict[str, Any]:
    """Seconds of steps in which nothing can be found: with the cache over without, on the same new texts.

    One step in a hundred decides here. So the engines go in lockstep: what disturbs the machine for longer than a
    step disturbs both. `looking`: the part of a run's time that match and commit take, timed by themselves.
    """
    count, prompt, outputs = (3, 48, 4) if options.fast else (4, 64, 8)
    rounds = options.rounds if options.fast else max(options.rounds, 31)
    engines = {name: runs.build(options.model, name, count, prompt + outputs + 16) for name in (WITHOUT, WITH)}
    runs.share_weights(engines.values())
    rng, vocab = np.random.default_rng(options.seed), engines[WITH].config.vocab_size

    def work() -> Workload:
        return Workload("new", tuple(tuple(_draw(rng, vocab, prompt)) for _ in range(count)), (outputs,) * count, 0)

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with told_of(options, "nothing to find: stage 3, 4b", rounds + 1) as told:
        for turn in range(rounds + 1):
            spent = _in_lockstep(engines, work())
            for name, value in spent.items():
                if turn:  # the first round warms up
                    seconds[name].append(value)
            told("")
    ratio = Paired(seconds).ratio(WITH, WITHOUT)
    return {
        "requests": count,
        "prompt": prompt,
        "outputs": outputs,
        "hit_tokens": engines[WITH].stats()["prefix_hit_tokens"],
        "seconds": seconds,
        "looking": _looking(engines[WITH], work()),
        "ratio": vars(ratio),
        "bar": MISS_BAR,
        "met": ratio.median <= MISS_BAR,
    }


def _in_lockstep(engines: dict[str, LLM], work: Workload) -> dict[str, float]:
    """Seconds that each engine's steps take, one of each in turn; who begins changes from step to step."""
    for llm in engines.values():
        for prompt, params in zip(work.prompts, work.params(), strict=True):
            llm.engine.add_request(list(prompt), params)
    spent, order = dict.fromkeys(engines, 0.0), list(engines)
    while any(llm.engine.has_unfinished() for llm in engines.values()):
        for name in order:
            began = time.perf_counter()
            engines[name].engine.step()
            spent[name] += time.perf_counter() - began
        order.reverse()
    return spent


def _looking(llm: LLM, work: Workload) -> float:
    """The part of a run's time that `match` and `commit` of its cache take."""
    cache, spent = llm.engine.cache, [0.0]

    def timed(call: Callable[..., int]) -> Callable[..., int]:
        def run(*args: Any) -> int:
            began = time.perf_counter()
            answer = call(*args)
            spent[0] += time.perf_counter() - began
            return answer

        return run

    with (
        mock.patch.object(cache, "match", timed(cache.match)),
        mock.patch.object(cache, "commit", timed(cache.commit)),
    ):
        done = runs.run(llm, work)
    return spent[0] / float(done.summary["busy_s"])


def host(options: Options) -> dict[str, Any]:
    """Microseconds a block that `match` and `commit` take on the host, no model run, by index.

    new: nothing is found, every block is sealed. again: every block is found. A prompt of this length
    costs the engine these calls, and `grow` and `release`, which stage 3 has too.
    """
    tokens, repeats = (256, 3) if options.fast else (4096, 48)
    result: dict[str, Any] = {"tokens": tokens, "bar": HOST_BAR, "us": {}, "fastest_us": {}}
    for index in INDEXES:
        llm = runs.build(COUNTED_ON, WITH, repeats + 1, 4096, places=2, prefix_index=index)
        rng = np.random.default_rng(options.seed)
        size = llm.engine.limits.block_size
        blocks = (tokens - 1) // size
        rounds: dict[str, list[float]] = {"new": [], "again": []}
        collecting = gc.isenabled()
        gc.disable()
        try:
            for number in range(repeats):
                ids = _draw(rng, llm.config.vocab_size, tokens)
                for turn, name in enumerate(rounds):
                    seconds, found = _match_and_commit(
                        llm, Request(2 * number + turn, ids, SamplingParams(), tokens + 1)
                    )
                    assert found == turn * blocks * size, "not the hits that this measures"
                    rounds[name].append(1e6 * seconds / blocks)
        finally:
            if collecting:
                gc.enable()
        result["us"][index] = {name: median(values) for name, values in rounds.items()}
        result["fastest_us"][index] = {name: min(values) for name, values in rounds.items()}
    slowest = max(mean(times.values()) for times in result["us"].values())
    return result | {"slowest": slowest, "met": slowest <= HOST_BAR}


def _match_and_commit(llm: LLM, request: Request) -> tuple[float, int]:
    """Seconds of both calls for a prompt's whole way through the cache, and the tokens found."""
    cache, upto = llm.engine.cache, request.num_tokens
    began = time.perf_counter()
    found = cache.match(request)
    matched = time.perf_counter() - began
    request.keep(found)
    grant = cache.grow(request, upto)
    assert grant is not None
    request.schedule(grant.blocks, found)
    began = time.perf_counter()
    cache.commit(request, upto)
    seconds = matched + time.perf_counter() - began
    cache.release(request)
    return seconds, found


def text(result: dict[str, Any]) -> str:
    """The result as lines of at most 120 columns."""
    lines = ["prefix caching (stage 4b)", "  time to the first token of one request, by the share of its prefix seen"]
    for cell in result["ttft"]["cells"]:
        ms = ", ".join(f"{float(share):.0%} {value:.0f}" for share, value in cell["ms"].items())
        bar = f"; {bar_text(cell, '>=')}" if "bar" in cell else ""
        lines += [
            f"    {cell['prefix']:5} + {cell['tail']} tokens: {ms} ms",
            f"      all of it seen: {ratio_text(cell['gain']['1.0'])} sooner{bar}",
        ]
    found = result["hits"]
    lines.append(
        f"  hits, counted in runs of {found['model']} (weights do not matter), pool {found['pool_tokens']} tokens"
    )
    for kind, part in found["sets"].items():
        turns = ", ".join(f"{rate:.0%}" for rate in part["by_turn"])
        label = part["name"] if part["name"].startswith(kind) else f"{kind}, outputs {part['name']}"
        lines += [
            f"    {label}: {part['requests']} requests, {part['hit_rate']['hash']:.1%} of "
            f"{part['prompt_tokens']} prompt tokens found" + (f" (by turn {turns});" if "," in turns else ";"),
            f"      computed {part['computed'][WITHOUT]} -> {part['computed']['hash']} tokens; "
            + ("same tokens" if part["same_tokens"] else "OTHER TOKENS"),
        ]
    lines.append(f"    hash and radix: {'the same hits' if found['same_hits'] else 'OTHER HITS'}")
    part = result["misses"]
    lines += [
        f"  nothing to find ({part['requests']} prompts of {part['prompt']} tokens, outputs of {part['outputs']}): "
        f"time over stage {WITHOUT} {part['ratio']['median']:.3f}x",
        f"    ({part['ratio']['low']:.3f} to {part['ratio']['high']:.3f}, {part['ratio']['rounds']} rounds); "
        f"{bar_text(part, '<=')}; match and commit themselves: {part['looking']:.3%}",
    ]
    part = result["host"]
    lines.append(
        f"  match + commit on the host, {part['tokens']} tokens, us a block; bar <= {part['bar']:g} us "
        f"{'met' if part['met'] else 'MISSED'}"
    )
    for index, us in part["us"].items():
        least = part["fastest_us"][index]
        lines.append(
            f"    {index + ':':6} {us['new']:.2f} new, {us['again']:.2f} found again (at best {least['new']:.2f}, "
            f"{least['again']:.2f})"
        )
    return "\n".join(lines)
