"""Attention and what limits a step: claims C7, C12, C19."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from stepengine.bench import flash, kernel_loads, runs, workloads
from stepengine.bench.evidence.common import Evidence, Number, Workbench
from stepengine.stage0_naive.attention import causal_attention


def against_which(bench: Workbench) -> Evidence:
    """C7: attention of one prompt: stage 2 writes its scores, stage 3 does not, torch's fused one neither."""
    length = bench.length
    engines = {stage: runs.build(bench.model, stage, 1, length + 16) for stage in ("2", "3")}
    runs.share_weights(engines.values())
    ids = workloads.corpus(None, bench.config.vocab_size)
    work = workloads.uniform(ids, bench.seed, 1, (length, length), (1, 1))
    config, inside = bench.config, {"2": [], "3": [], "fused": [], "plain": []}  # type: ignore[var-annotated]
    q = torch.randn(length, config.num_heads, config.head_dim, generator=torch.Generator().manual_seed(0))
    k = v = torch.randn(config.num_kv_heads, length, config.head_dim, generator=torch.Generator().manual_seed(1))
    for _ in range(bench.rounds):
        for stage, llm in engines.items():
            inside[stage].append(flash.prompt_ms(llm, work)[1])
        with torch.inference_mode():
            inside["plain"].append(_ms(lambda: causal_attention(q, k, v)))
            inside["fused"].append(
                _ms(lambda: scaled_dot_product_attention(
                    q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
                ))
            )  # fmt: skip
    best = {name: min(values) for name, values in inside.items()}
    moved = {stage: flash.moved(llm, work) for stage, llm in engines.items()}
    numbers = [
        Number("bytes of scores in memory, stage 2", moved["2"]["score_bytes"] / 1e6, "MB"),
        Number("bytes of scores in memory, stage 3", moved["3"]["score_bytes"] / 1e6, "MB"),
        Number("scores written out, time over stage 3", best["2"] / best["3"], "times", 2, True),
        Number("torch's fused, time over stage 3", best["fused"] * config.num_layers / best["3"], "times", 2, True),
        Number("one layer written out, time over fused", best["plain"] / best["fused"], "times", 2, True),
    ]
    if bench.kernels:
        plain, tiled = bench.kernels["written out"], bench.kernels["tiled"]
        numbers.append(Number("bytes of our kernels, 128 tokens", plain.moved() / tiled.moved(), "times"))
        held = {n: (4 * n * 64 + 2 * n * n) * 4 for n in (128, 2048)}  # q, k, v and the result; scores and weights
        assert held[128] == _held(plain), "the formula is not what the kernel holds"
        numbers.append(
            Number(
                "memory with scores over without, 2048 tokens, by formula", held[2048] / (4 * 2048 * 64 * 4), "times"
            )
        )
    agrees = moved["3"]["score_bytes"] == 0 < moved["2"]["score_bytes"]
    return Evidence(f"a prompt of {length} tokens on this CPU; kernels in the interpreter", tuple(numbers), agrees)


def _held(record: kernel_loads.Record) -> int:
    """Bytes of the tensors that a kernel's caller must hold."""
    return sum(elements * size for name, (elements, size) in record.tensors.items() if name not in kernel_loads.INDEXES)


def _ms(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def traffic_by_tiles(bench: Workbench) -> Evidence:
    """C12: bytes that the real kernel loads and stores when n, M or d doubles, and how often it visits a tile."""
    if not bench.kernels:
        return Evidence(kernel_loads.missing(), (), True)
    read = {name: record.moved("k", "v", store=False) for name, record in bench.kernels.items()}
    base, tiles = bench.kernels["base"], 256 // 16
    visible = tiles * (tiles + 1) // 2
    numbers = (
        Number("twice the tokens n, bytes of K and V", read["base"] / read["n / 2"], "times"),
        Number("twice the on-chip memory M (tiles of 32), bytes", read["2 M"] / read["base"], "times"),
        Number("twice the head_dim d at the same M, bytes", read["2 d"] / read["2 M"], "times"),
        Number("products per pair of tiles", len(base.dots) / visible),
    )
    values = [number.value for number in numbers]
    near = [abs(value / wanted - 1) < 0.15 for value, wanted in zip(values, (4, 0.5, 4, 2), strict=True)]
    return Evidence("counted in our kernel, run by Triton's interpreter", numbers, all(near))


def busy(bench: Workbench) -> Evidence:
    """C19: how long the device has work in a step, and what share of its bandwidth and FLOP/s that is."""
    llm = runs.build(bench.model, "3", 2, 280)
    ids = workloads.corpus(None, bench.config.vocab_size)
    shares = {}
    copy_s, multiply_s, moved, flop = _limits()
    for name, (prompt, outputs) in {"decode": (16, 12), "prompt": (256, 1)}.items():
        work = workloads.uniform(ids, bench.seed, 1, (prompt, prompt), (outputs, outputs))
        runs.run(llm, work)
        done = runs.run(llm, work)
        wanted = 1 if name == "decode" else prompt
        steps = [record for record in done.trace.steps if record.plan.num_tokens == wanted]
        record = min(steps, key=lambda record: record.t_done - record.t_plan)
        seconds = record.t_done - record.t_plan
        busy_for = (record.device_ended - record.device_began) / seconds  # as a utilisation meter counts
        meta, chunk = runs.trace_of(llm).meta, record.plan.chunks[0]
        bytes_ = meta["weight_bytes"] + meta["kv_bytes_per_token"] * (chunk.end + chunk.length)
        work_flop = 2 * meta["weight_bytes"] / 4 * chunk.length
        shares[name] = busy_for, bytes_ / seconds / (moved / copy_s), work_flop / seconds / (flop / multiply_s)
    numbers = [
        Number(f"{name}, {what}", 100 * share, "%", 2, True)
        for name, found in shares.items()
        for what, share in zip(("device busy", "of its bandwidth", "of its FLOP/s"), found, strict=True)
    ]
    return Evidence(
        "timed on one thread of this CPU",
        tuple(numbers),
        shares["decode"][0] > 0.5 > shares["decode"][2] and shares["decode"][2] < shares["prompt"][2],
    )


def _limits() -> tuple[float, float, float, float]:
    """Seconds of a copy and of a matrix product at their fastest, and their bytes and FLOP."""
    a, b, square = torch.rand(1 << 24), torch.rand(1 << 24), torch.rand(768, 768)
    copying = min(_ms(lambda: b.copy_(a)) for _ in range(6)) / 1e3
    multiplying = min(_ms(lambda: square @ square) for _ in range(6)) / 1e3
    return copying, multiplying, 2 * a.nbytes, 2 * 768**3
