"""Parts of the GPU suite that run the engine: correctness, one request alone, offline throughput, idle time, traces."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from stepengine.bench import gpu_peers, runs, workloads
from stepengine.bench.gpu_setup import (
    Setup,
    attempt,
    best_switches,
    engine,
    relative_error,
    stage_names,
    switches_of,
    sync,
)
from stepengine.bench.workloads import Workload
from stepengine.core.request import SamplingParams
from stepengine.llm import LLM
from stepengine.model.config import ModelConfig
from stepengine.stages import find_stage
from stepengine.trace import Trace, save

Entries = Iterator[tuple[str, Any]]
TRACE_BYTES = 300_000


# -- 1. correctness -------------------------------------------------------------------------------


def correctness(setup: Setup) -> Entries:
    """The GPU tests, and logits of every stage (its own attention and K/V) against `transformers`.

    fp32 must agree to 1e-3 (norm of the difference over the norm). bf16 is compared with `transformers`
    in fp32 and may err 1.5 times as much as `transformers` in bf16 does. For a stage with weights of its own,
    `transformers` gets those.
    """
    tests = _start_tests(setup)
    try:
        peers = {dtype: gpu_peers.load(setup, dtype) for dtype in {"float32", setup.dtype}}
        own = [stage for stage in stage_names() if runs.own_weights(find_stage(stage))]
        for stages in ([stage for stage in stage_names() if stage not in own], own):
            if stages == own:
                gpu_peers.quantize(setup, peers.values())
            for dtype in sorted(peers, reverse=True):
                for stage in stages:
                    found = attempt(lambda s=stage, d=dtype: _logits(setup, s, d, peers))
                    yield f"logits, stage {stage}, {dtype}", found
    finally:  # what went wrong with the logits says nothing about the tests
        yield "tests", _end_tests(setup, tests)


def _start_tests(setup: Setup) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    try:
        import xdist  # noqa: F401 - most of the time goes into compiling, one kernel at a time

        command += ["-n", "8"] if not setup.smoke else []
    except ImportError:
        pass
    command += ["--collect-only"] if setup.smoke else []
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _end_tests(setup: Setup, tests: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        said, _ = tests.communicate(timeout=max(1.0, setup.left_s() - 5))
    except subprocess.TimeoutExpired:
        tests.kill()
        return {"passed": None, "said": ["not at their end when the time was over"], "failed": []}
    lines = [line for line in said.splitlines() if line.strip()] or ["pytest said nothing"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    ran = any(word in lines[-1] for word in ("passed", "failed", "error"))
    return {"passed": tests.returncode == 0 if ran else None, "said": lines[-1:], "failed": failed}


@torch.inference_mode()
def _logits(setup: Setup, stage: str, dtype: str, peers: dict[str, Any]) -> dict[str, Any]:
    outputs = setup.of(12, 3)
    rng = torch.Generator().manual_seed(0)
    lengths = setup.of((5, 100, 300, 731), (1, 9, 20))
    prompts = [torch.randint(setup.config.vocab_size, (n,), generator=rng).tolist() for n in lengths]
    llm = engine(setup, stage, len(prompts), max(lengths) + outputs, dtype, trace=True, **_eager(stage))
    found, tokens = _seen(llm, prompts, outputs)
    exact, own = [], []
    for prompt, chosen in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt + chosen[:-1]], device=setup.device)
        exact.append(peers["float32"](ids).logits[0, len(prompt) - 1 :].float())
        own.append(peers[dtype](ids).logits[0, len(prompt) - 1 :].float())
    result = {"relative_error": relative_error(torch.cat(found), torch.cat(exact)), "logits": sum(map(len, found))}
    if dtype == "float32":
        return {**result, "bar": 1e-3, "met": result["relative_error"] <= 1e-3}
    bar = 1.5 * relative_error(torch.cat(own), torch.cat(exact))
    return {**result, "bar": bar, "met": result["relative_error"] <= bar}


def _eager(stage: str) -> dict[str, bool]:
    settings = switches_of(stage)["eager"]
    assert isinstance(settings, dict)
    return settings


def _seen(llm: LLM, prompts: list[list[int]], outputs: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The logits [outputs, vocab] that each prompt's tokens were chosen from, and the tokens."""
    model, kept = llm.engine.runner.model, []
    compute = model.logits

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        kept.append(logits.float())
        return logits

    with mock.patch.object(model, "logits", noted):
        done = llm.generate(prompts, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=outputs))
    rows: dict[int, list[torch.Tensor]] = {output.request_id: [] for output in done}
    for record, logits in zip(runs.trace_of(llm).steps, kept, strict=True):
        for chunk, token, line in zip(record.plan.chunks, record.token_ids, logits, strict=True):
            if token >= 0:
                rows[chunk.request].append(line)
    return [torch.stack(rows[o.request_id]) for o in done], [o.outputs[0].token_ids for o in done]


# -- 4. one request alone -------------------------------------------------------------------------


def alone(setup: Setup, stage: str) -> Entries:
    """ms per token of one request around context 512 and 4096, against the bytes that a token must read.

    Roofline: (weights + K/V of the context, each read once) / copy bandwidth. A tied table counts once, as
    the head; looking one row of it up counts for nothing.
    """
    warmup, steps, rounds = setup.of((8, 64, 3), (1, 3, 1))
    longest = setup.of(4096, 32) + warmup + steps
    for name, switches in switches_of(stage).items():
        if isinstance(switches, str):
            yield name, {"note": switches}
            continue
        for context in setup.of((512, 4096), (16,)):
            yield (
                f"{name}, {context}",
                attempt(lambda c=context, s=switches: _alone(setup, stage, c, longest, warmup, steps, rounds, s)),
            )


def _alone(
    setup: Setup,
    stage: str,
    context: int,
    longest: int,
    warmup: int,
    steps: int,
    rounds: int,
    switches: dict[str, bool],
) -> dict[str, Any]:
    llm = engine(setup, stage, 1, longest, **switches)
    length = context - warmup - steps // 2
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=warmup + steps + 8)
    rng = torch.Generator().manual_seed(0)
    samples = []
    for turn in range(1 + rounds):  # the first pays for what is compiled on first use
        prompt = torch.randint(llm.config.vocab_size, (length,), generator=rng).tolist()
        request = llm.engine.add_request(prompt, params)
        before = llm.engine.counters["tokens_generated"]
        while llm.engine.counters["tokens_generated"] < before + warmup:
            llm.engine.advance()
        seconds = steps_s(setup, llm, steps)
        llm.engine.abort(request)
        llm.engine.collect([request])
        samples += [1e3 * seconds / steps] if turn else []
    weights = sum(weight.nbytes for weight in llm.engine.runner.model.parameters())
    moved = weights + context * llm.config.kv_bytes_per_token(llm.dtype)
    copy_gbs = setup.ceiling("copy_gbs")
    floor = 1e-6 * moved / copy_gbs if copy_gbs else None
    ms = median(samples)
    return {"ms": samples, "ms_per_token": ms, "bytes": moved, "floor_ms": floor, "of_roofline": floor and floor / ms}


def steps_s(setup: Setup, llm: LLM, steps: int) -> float:
    """Seconds of some steps."""
    sync(setup.device)
    start = time.perf_counter()
    for _ in range(steps):
        llm.engine.advance()
    sync(setup.device)
    return time.perf_counter() - start


# -- 5. offline throughput ------------------------------------------------------------------------


def throughput(setup: Setup, stage: str) -> Entries:
    """The usual bench, all requests at once; stage 0 gets 16 of them and at most 128 outputs.

    Roofline: the sum over the run's own steps of max(bytes / copy bandwidth, FLOPs / matmul peak), see
    `floor_s`. The fraction is that sum over the time that the run took.
    """
    work = gpu_peers.offline_set(setup, *((16, 128) if stage == "0" else ()))
    choices = [(name, settings) for name, settings in switches_of(stage).items() if isinstance(settings, dict)]
    for name, settings in reversed(choices):  # all that there is, or as much of it as works
        found = attempt(lambda s=settings: _throughput(setup, stage, work, s))
        if "error" not in found:
            yield "best", found
            return
        yield name, found


def _throughput(setup: Setup, stage: str, work: Workload, settings: dict[str, bool]) -> dict[str, Any]:
    budget = setup.of(8192, None)
    llm = engine(setup, stage, len(work.prompts), work.longest, trace=True, max_num_batched_tokens=budget, **settings)
    # From stage 2 on a batch of any size may be compiled or captured on its own.
    few = Workload("warm-up", work.prompts[:2], (2, 2), work.seed)
    _offline(setup, llm, _draining(work) if stage >= "2" else few, 0)
    found, trace = _offline(setup, llm, work, 8)
    copy_gbs, tflops = setup.ceiling("copy_gbs"), setup.ceiling("matmul_tflops")
    if copy_gbs and tflops:
        floor = floor_s(trace, llm.config, 1e9 * copy_gbs, 1e12 * tflops)
        found |= {"floor_s": floor, "of_roofline": floor / found["seconds"]}
    steps = Counter("mixed or prefill" if any(c.length > 1 for c in r.plan.chunks) else "decode" for r in trace.steps)
    return {**found, "settings": settings, "steps": dict(steps), "max_num_seqs": llm.engine.limits.max_num_seqs}


def _draining(work: Workload) -> Workload:
    count = len(work.prompts)
    lens = tuple(3 + index // 4 if index >= 16 else 3 + count // 4 + 16 - index for index in range(count))
    return Workload("warm-up", work.prompts, tuple(min(n, m) for n, m in zip(lens, work.output_lens, strict=True)), 0)


def _offline(setup: Setup, llm: LLM, work: Workload, spare_s: float) -> tuple[dict[str, Any], Trace]:
    """Run the set until it, or the time less `spare_s`, is over."""
    trace = llm.trace = llm.engine.recorder = Trace(runs.trace_of(llm).meta)
    sync(setup.device)
    began = time.perf_counter()
    pairs = zip(work.prompts, work.params(), strict=True)
    ids = [llm.engine.add_request(list(prompt), params) for prompt, params in pairs]
    while llm.engine.has_unfinished() and setup.left_s() > spare_s:
        llm.engine.advance()
    sync(setup.device)
    seconds = time.perf_counter() - began
    complete = not llm.engine.has_unfinished()
    tokens = sum(token >= 0 for record in trace.steps for token in record.token_ids)
    for request in ids:
        llm.engine.abort(request)
    llm.engine.collect(ids)
    return gpu_peers.rate(work, tokens, seconds, complete), trace


def floor_s(trace: Trace, config: ModelConfig, bytes_per_s: float, flops_per_s: float) -> float:
    """The least seconds that a run's steps could have taken: the sum of max(bytes / bandwidth, FLOPs / rate).

    Bytes of a step: all weights once (the table of a tied model as the head), K/V of every token that its
    chunks attend to read once, K/V of its own tokens written once (nothing where the stage stores none).
    FLOPs: 2 x weights of the layers' matrices per token, 2 x hidden x vocabulary per row,
    4 x Hq x D x layers per pair of query and key. Activations, norms and the host count for nothing.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = config.num_layers * config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    head = config.hidden_size * config.vocab_size
    token = trace.meta["kv_bytes_per_token"] if trace.meta["block_size"] else 0
    total = 0.0
    for record in trace.steps:
        chunks = record.plan.chunks
        if not chunks:
            continue
        pairs = sum(c.length * c.start + c.length * (c.length + 1) // 2 for c in chunks)
        moved = trace.meta["weight_bytes"] + token * sum(c.end + c.length for c in chunks)
        flops = 2 * matrices * record.plan.num_tokens + 2 * head * len(chunks) + 4 * q * config.num_layers * pairs
        total += max(moved / bytes_per_s, flops / flops_per_s)
    return total


# -- 6. idle time ---------------------------------------------------------------------------------


def idle(setup: Setup, stage: str) -> Entries:
    """How long the GPU idles and the host works in a decode step, at batch 1 and 256, each switch on and off.

    Wall time per step comes of steps that nothing watches; time on the device, of the same kind of steps
    under torch's profiler (the union of all kernels and copies). Idle is 1 - device / wall. Host time is
    wall time less the time in calls that wait for the device.
    """
    context, steps, watched = setup.of((512, 48, 12), (8, 3, 2))
    for batch in setup.of((1, 256), (1, 3)):
        for name, switches in switches_of(stage).items():
            if isinstance(switches, str):
                yield f"{name}, {batch}", {"note": switches}
            else:
                yield (
                    f"{name}, {batch}",
                    attempt(lambda b=batch, s=switches: _idle(setup, stage, b, context, steps, watched, s)),
                )


def _idle(
    setup: Setup, stage: str, batch: int, context: int, steps: int, watched: int, switches: dict[str, bool]
) -> dict[str, Any]:
    warmup = setup.of(8, 1)
    outputs = warmup + 3 * steps + watched + 8
    llm = engine(setup, stage, batch, context + outputs, max_num_batched_tokens=setup.of(8192, None), **switches)
    ids = workloads.corpus(None, llm.config.vocab_size)
    work = workloads.uniform(ids, 0, batch, (context, context), (outputs, outputs))
    for prompt, params in zip(work.prompts, work.params(), strict=True):
        llm.engine.add_request(list(prompt), params)
    while llm.engine.counters["tokens_generated"] < batch * warmup:
        llm.engine.advance()
    walls, hosts = [], []
    for _ in range(3):
        sync(setup.device)
        with _waiting(setup.device) as waited:
            walls.append(1e6 * steps_s(setup, llm, steps) / steps)
        # On a GPU the first wait, over at once, comes before the steps' time begins.
        hosts.append(walls[-1] - 1e6 * sum(waited[setup.of(1, 0) :]) / steps)
    wall, host = median(walls), median(hosts)
    found = {"wall_us": wall, "wall_us_samples": walls, "host_us": host, "host_us_samples": hosts}
    if setup.smoke:
        return {**found, "device_us": None, "idle": None}
    device, launched = _device_us(setup, llm, watched)
    return {**found, "device_us": device, "device_events": launched, "idle": max(0.0, 1 - device / wall)}


def _device_us(setup: Setup, llm: LLM, steps: int) -> tuple[float, float]:
    """Microseconds a step that something ran on the GPU, and how many kernels and copies that was."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        steps_s(setup, llm, steps)
    spans = [(e.time_range.start, e.time_range.end) for e in watch.events() if e.device_type == DeviceType.CUDA]
    if not spans:
        raise RuntimeError("the profiler saw nothing on the GPU")
    return covered(spans) / steps, len(spans) / steps


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total


@contextmanager
def _waiting(device: str) -> Iterator[list[float]]:
    """Seconds of each call that waits for the device, in order, while the context is open."""
    waited: list[float] = []

    def watch(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                waited.append(time.perf_counter() - start)

        return watched

    calls: list[tuple[Any, str]] = [(torch.Tensor, name) for name in ("tolist", "item")]
    calls += [(torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda, "synchronize")]
    with ExitStack() as stack:
        for owner, name in calls if device == "cuda" else calls[:2]:
            stack.enter_context(mock.patch.object(owner, name, watch(getattr(owner, name))))
        yield waited


# -- traces ---------------------------------------------------------------------------------------


def traces(setup: Setup) -> Entries:
    """Recorded runs small enough for a repository: `traces/stage<name>.jsonl.gz`, with all switches on.

    Stage 3, which brings the switches, has its three other settings too, as `stage3-eager.jsonl.gz` and so on.
    """
    folder = setup.out / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    ids = workloads.corpus(None, setup.config.vocab_size)
    work = workloads.uniform(ids, 0, *setup.of((16, (32, 256), (16, 96)), (4, (3, 20), (2, 8))))
    for stage in stage_names():
        yield stage, attempt(lambda s=stage: _trace(setup, s, s, best_switches(s), work, folder))
    for name, switches in switches_of("3").items():
        if isinstance(switches, dict) and switches != best_switches("3"):
            yield f"3-{name}", attempt(lambda n=name, s=switches: _trace(setup, "3", f"3-{n}", s, work, folder))


def _trace(
    setup: Setup, stage: str, name: str, switches: dict[str, bool], work: Workload, folder: Path
) -> dict[str, Any]:
    llm = engine(setup, stage, setup.of(8, 2), work.longest, trace=True, **switches)
    runs.run(llm, work)  # what is compiled on first use stays out of the picture
    trace = runs.run(llm, work).trace
    trace.meta |= {"machine": setup.known.get("machine", {}).get("results", {}), "date": date.today().isoformat()}
    if setup.smoke:
        trace.meta["note"] = "toy size on a CPU: its times mean nothing"
    path = save(trace, folder / f"stage{name}.jsonl.gz")
    size = path.stat().st_size
    if size > TRACE_BYTES:
        path.unlink()
        raise ValueError(f"the trace takes {size} bytes, more than {TRACE_BYTES}; give it fewer requests")
    return {"file": f"traces/{path.name}", "bytes": size, "steps": len(trace.steps)}
