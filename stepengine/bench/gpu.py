"""The GPU suite: `python -m stepengine.bench.gpu --out DIR`, at most nine minutes on one GPU, one JSON record.

Needs torch, triton, transformers, numpy, safetensors and tqdm; no model is fetched: weights are random, in
Qwen3-0.6B's shape. Ratios are of values measured in the same run.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from stepengine.bench import gpu_engine, gpu_kernels, gpu_peers, gpu_quantized, gpu_serving
from stepengine.bench.gpu_report import bars, table
from stepengine.bench.gpu_setup import SHAPE, Setup, stage_names
from stepengine.bench.gpu_worker import Part, execute, write
from stepengine.bench.measure import machine

BUDGET_S = 540.0
SPARE_S = 3.0  # for the record and the table


def fingerprint(setup: Setup) -> Iterator[tuple[str, Any]]:
    """The machine, its versions and the commit; on a GPU, what `nvidia-smi` reads of it."""
    import torch

    there = torch.cuda.is_available()
    if there and not setup.smoke:
        torch.zeros(1, device="cuda")  # fails here if this process cannot use the GPU
    yield from machine().items()
    if not there:
        return
    properties = torch.cuda.get_device_properties(0)
    yield "gpu_memory_bytes", properties.total_memory
    yield "multiprocessors", properties.multi_processor_count
    yield "compute_capability", list(torch.cuda.get_device_capability(0))
    yield "cuda", torch.version.cuda
    asked = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        yield "nvidia_smi", dict(zip(asked, said.splitlines()[0].split(", "), strict=False))


MAIN = "3"  # the stage whose attention, graphs and pipelining the bars of decode and throughput are for


def parts() -> list[Part]:
    """All parts in the order in which they run: what bars hang on first, the slow early stages last."""
    whole = [name for name in reversed(stage_names()) if name[-1].isdigit() or name < "2"]  # 4, not its halves
    later = [name for name in whole if name > MAIN]
    older = [name for name in whole if "2" <= name < MAIN]
    return [
        Part("ceilings", gpu_kernels.ceilings, 15, 40),
        Part("correctness", gpu_engine.correctness, 30, 120),
        Part("prefill", gpu_kernels.prefill, 15, 45),
        Part("decode", gpu_kernels.decode, 15, 75),
        Part("int4", gpu_kernels.int4, 20, 60),
        *_of("batch1", gpu_engine.alone, [MAIN, *older], 10, 45),
        Part("batch1/transformers", partial(gpu_peers.alone, compiled=False), 15, 45),
        *_of("throughput", gpu_engine.throughput, [MAIN], 40, 110),
        Part("throughput/generate_batch", gpu_peers.generate_batch, 40, 75),
        *_of("idle", gpu_engine.idle, [MAIN], 15, 60),
        Part("chunked", gpu_serving.chunked, 20, 60),
        Part("prefix", gpu_serving.prefix, 10, 40),
        Part("quantized", gpu_quantized.quantized, 25, 100),
        Part("traces", gpu_engine.traces, 15, 45),
        *_of("throughput", gpu_engine.throughput, [*later, *older], 40, 75),
        Part("throughput/generate", gpu_peers.generate_batched, 30, 60),
        *_of("idle", gpu_engine.idle, older, 15, 40),
        Part("batch1/compiled", partial(gpu_peers.alone, compiled=True), 45, 100),
        *_of("throughput", gpu_engine.throughput, [name for name in whole if name < "2"], 20, 45),
        Part("throughput/vllm", gpu_peers.vllm, 3, 120),
    ]


def _of(group: str, run: Any, stages: list[str], least_s: float, most_s: float) -> list[Part]:
    return [Part(f"{group}/stage{name}", partial(run, stage=name), least_s, most_s) for name in stages]


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status: 0, 1 where a part failed, 2 where the suite cannot run."""
    began = time.time()
    args = _parser().parse_args(argv)
    listed = parts()
    wanted = set(args.only.split(",")) if args.only else {part.group for part in listed}
    unknown = wanted - {part.group for part in listed} - {part.name for part in listed}
    if unknown:
        known = ", ".join(dict.fromkeys(part.group for part in listed))
        print(f"--only names {sorted(unknown)[0]!r}, which is no part; the parts are {known}.", file=sys.stderr)
        return 2
    if not args.smoke and args.budget_s < 60:
        print(f"--budget-s is {args.budget_s:g}; nothing could be measured in less than 60.", file=sys.stderr)
        return 2
    # Asks the driver, not the runtime, whether there is a GPU: a process that is forked later may then still use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stepengine-gpu-") as work:
        return _run(args, listed, wanted, began, Path(work))


def _run(args: argparse.Namespace, listed: list[Part], wanted: set[str], began: float, work: Path) -> int:
    for module in ("transformers.models.qwen3.modeling_qwen3", "transformers.generation.utils"):
        with suppress(ImportError):
            importlib.import_module(module)  # once, before processes are forked
    end = began + args.budget_s - SPARE_S
    known: dict[str, Any] = {}

    def setup(until: float) -> Setup:
        return Setup(args.smoke, args.out.resolve(), work, until, known)

    method, found = _probe(setup(time.time() + 60))
    known["machine"] = found
    box = found["results"]
    if found["status"] != "ok" or not (args.smoke or box.get("gpu")):
        reason = "torch finds no GPU here" if found["status"] == "ok" else f"the GPU does not work ({found['error']})"
        print(f"The GPU suite needs a CUDA GPU, and {reason}; use --smoke to try it on a CPU.", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "what": "gpu suite",
        "smoke": args.smoke,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "budget_s": args.budget_s,
        "model": "toy shape, random weights" if args.smoke else SHAPE,
        "shape": setup(0.0).config_dict(),
        "machine": box,
        "processes": method,
        "parts": {},
        "bars": [],
    }
    path = args.out / f"{_name(record)}.json"
    for part in listed:
        if part.group not in wanted and part.name not in wanted:
            continue
        left = end - time.time()
        if left < (part.least_s if not args.smoke else 1):
            error = f"{left:.0f} s of the budget are left, and it needs about {part.least_s:.0f}"
            known[part.name] = {"status": "skipped", "seconds": 0.0, "error": error, "results": {}}
        else:
            known[part.name] = execute(part, setup(time.time() + min(left, part.most_s)), method)
        told = known[part.name]
        print(f"{part.name}: {told['status']}, {told['seconds']:.0f} s", flush=True)
        record["parts"][part.name] = told
        record["seconds"] = time.time() - began
        record["bars"] = bars(record)
        write(path, record)
    print(f"\n{table(record)}\n\n{time.time() - began:.0f} s. Written: {path}")
    return int(any(part["status"] == "failed" for part in record["parts"].values()))


def _probe(setup: Setup) -> tuple[str, dict[str, Any]]:
    """How processes are started here, and the machine. Forked ones begin at once; not everywhere can they use a GPU."""
    part = Part("machine", fingerprint, 0, 60)
    for method in ("fork", "spawn") if sys.platform == "linux" else ("spawn",):
        found = execute(part, setup, method)
        if found["status"] == "ok":
            break
    return method, found


def _name(record: dict[str, Any]) -> str:
    box = "smoke" if record["smoke"] else re.sub(r"\W+", "-", record["machine"]["gpu"].lower()).strip("-")
    return f"{box}-{record['time'][:16].replace('T', '-').replace(':', '')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stepengine.bench.gpu", description="Measure the engine on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the record and the traces")
    parser.add_argument("--smoke", action="store_true", help="every part at toy size on a CPU; times mean nothing")
    parser.add_argument("--only", default="", help="parts, separated by commas: a group (idle) or one (idle/stage2)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds in all (default 540)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
