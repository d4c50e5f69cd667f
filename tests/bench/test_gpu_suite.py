"""The GPU suite without a GPU: a smoke run with nothing but its own packages, its formulas, its processes."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stepengine.bench import gpu_peers, gpu_report
from stepengine.bench.gpu_engine import _waiting, covered, floor_s
from stepengine.bench.gpu_setup import Setup, attempt, relative_error, stage_names, switches_of, timed
from stepengine.bench.gpu_worker import Part, execute, write
from stepengine.bench.workloads import Workload
from stepengine.core.plan import Chunk, StepPlan, StepRecord
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import tiny_config
from stepengine.stages import STAGES
from stepengine.trace import Trace, load

ROOT = Path(__file__).resolve().parents[2]
MODULE = "stepengine.bench.gpu"
NEEDED = ("torch", "triton", "transformers", "numpy", "safetensors", "tqdm")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (there is none for macOS)"
)
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

# Hides packages from everything but the running interpreter's standard library and what is named.
BLOCKED = """
import importlib.machinery, runpy, sys
hidden = set(sys.argv.pop(1).split(","))
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in hidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
try:
    import plotly
except ModuleNotFoundError:
    runpy.run_module("stepengine.bench.gpu", run_name="__main__", alter_sys=True)
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions that these need, and these."""
    found: set[str] = set()
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        left += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def others() -> list[str]:
    """Top-level modules of all other distributions that are installed here."""
    needed = closure(NEEDED) | {"stepengine"}
    owners = importlib.metadata.packages_distributions()
    return sorted(top for top, dists in owners.items() if not {canonicalize_name(d) for d in dists} & needed)


def suite(*argv: str, hidden: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, hidden, *argv] if hidden else [sys.executable, "-m", MODULE, *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def errors(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("error"), str):
            yield f"{path}: {value['error']}"
        for name, item in value.items():
            yield from errors(item, f"{path}/{name}")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(folder, record, what was printed) of a smoke run that can import nothing but what the suite may need."""
    folder = tmp_path_factory.mktemp("smoke")
    ran = suite("--smoke", "--out", str(folder), hidden=",".join(others()))
    (path,) = folder.glob("smoke-*.json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, json.loads(path.read_text()), ran.stdout


@needs_triton
def test_every_part_runs(smoke: Any) -> None:
    _, record, printed = smoke
    names = {entry.name for entry in STAGES} - {"4a", "4b"}  # measured for what each is for, in parts of their own
    assert {f"throughput/stage{name}" for name in names} <= set(record["parts"])
    groups = {"ceilings", "correctness", "prefill", "decode", "batch1", "throughput", "idle", "traces"}
    groups |= {"chunked", "prefix", "quantized", "int4"}
    assert {name.split("/")[0] for name in record["parts"]} == groups
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(record["parts"], "ok")
    assert list(errors(record["parts"])) == []
    assert record["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert printed.rstrip().splitlines()[-1].endswith(".json")


@needs_triton
def test_a_smoke_run_says_so_and_judges_nothing(smoke: Any) -> None:
    _, record, printed = smoke
    assert record["smoke"] and record["bars"] == []
    assert "SMOKE RUN" in printed and "met" not in printed.lower().replace("means", "")


@needs_triton
def test_logits_of_every_stage_are_transformers(smoke: Any) -> None:
    found = smoke[1]["parts"]["correctness"]["results"]
    for entry in STAGES:
        logits = found[f"logits, stage {entry.name}, float32"]
        assert logits["relative_error"] < 1e-5 and logits["logits"] == 9
    assert "collected" in found["tests"]["said"][0]


@needs_triton
def test_work_is_counted_pair_by_pair(smoke: Any) -> None:
    config = ModelConfig.from_dict(tiny_config("qwen3"))
    results = smoke[1]["parts"]["prefill"]["results"]
    pairs = 4 * sum(1 for chunk in range(8) for key in range(24 + 8) if key <= 24 + chunk)
    assert results["8 after 24"]["flops"] == 2 * 2 * config.num_heads * config.head_dim * pairs
    results = smoke[1]["parts"]["decode"]["results"]
    one = torch.empty(config.head_dim, dtype=torch.float32).nbytes
    assert results["3 x 32"]["bytes"] == 3 * one * (32 * 2 * config.num_kv_heads + 2 * config.num_heads)


@needs_triton
def test_traces_are_whole_and_small(smoke: Any) -> None:
    folder, record, _ = smoke
    names = {entry.name for entry in STAGES} | {"3-eager", "3-graphs", "3-pipelined"}
    assert {path.name for path in (folder / "traces").iterdir()} == {f"stage{name}.jsonl.gz" for name in names}
    for entry in STAGES:
        path = folder / "traces" / f"stage{entry.name}.jsonl.gz"
        trace = load(path)
        assert path.stat().st_size < 300_000
        assert trace.meta["stage"] == entry.name and trace.meta["machine"]["cores"] >= 1 and trace.meta["date"]
        assert "times mean nothing" in trace.meta["note"]
        lengths = {request: info.max_tokens for request, info in trace.requests.items()}
        assert {request: len(ids) for request, ids in trace.output_ids().items()} == lengths
        assert str(folder.parent) not in json.dumps(trace.meta)


@needs_triton
def test_a_record_names_no_folder_of_the_machine(smoke: Any) -> None:
    folder, record, _ = smoke
    assert str(folder) not in json.dumps(record) and str(ROOT) not in json.dumps(record)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    ran = suite("--out", str(tmp_path))
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and "--smoke" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    ran = suite("--smoke", "--only", "decode,speed", "--out", str(tmp_path))
    assert ran.returncode == 2 and "'speed'" in ran.stderr and "throughput" in ran.stderr


def test_a_part_without_time_is_skipped_and_says_so(tmp_path: Path) -> None:
    ran = suite("--smoke", "--budget-s", "0", "--only", "idle", "--out", str(tmp_path))
    (path,) = tmp_path.glob("*.json")
    parts = json.loads(path.read_text())["parts"]
    assert parts and all(part["status"] == "skipped" and "budget" in part["error"] for part in parts.values())
    assert ran.returncode == 0 and "skipped" in ran.stdout


# -- processes ------------------------------------------------------------------------------------


def setup_of(folder: Path, seconds: float = 60) -> Setup:
    return Setup(True, folder, folder, time.time() + seconds, {})


def good(setup: Setup) -> Iterator[tuple[str, Any]]:
    yield "pi", 3.5
    yield "nan", float("nan")


def failing(setup: Setup) -> Iterator[tuple[str, Any]]:
    yield "before", 1
    raise ZeroDivisionError("on purpose")


def dying(setup: Setup) -> Iterator[tuple[str, Any]]:
    yield "before", 1
    os._exit(7)


def endless(setup: Setup) -> Iterator[tuple[str, Any]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield "child", child.pid
    time.sleep(300)


@needs_fork
def test_a_part_brings_its_results(tmp_path: Path) -> None:
    found = execute(Part("good", good, 0, 60), setup_of(tmp_path), "fork")
    assert found["status"] == "ok" and found["results"] == {"pi": 3.5, "nan": None}


@needs_fork
@pytest.mark.parametrize(("run", "words"), [(failing, "ZeroDivisionError: on purpose"), (dying, "status 7")])
def test_a_part_that_breaks_keeps_what_it_had(run: Any, words: str, tmp_path: Path) -> None:
    found = execute(Part("bad", run, 0, 60), setup_of(tmp_path), "fork")
    assert found["status"] == "failed" and found["results"] == {"before": 1} and words in found["error"]


@needs_fork
def test_a_part_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    found = execute(Part("endless", endless, 0, 60), setup_of(tmp_path, 3), "fork")
    assert found["status"] == "cut" and found["seconds"] < 60
    state = Path(f"/proc/{found['results']['child']}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] in "ZX"  # gone, or not yet reaped


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed and would start")
def test_a_part_runs_in_a_spawned_process_too(tmp_path: Path) -> None:
    for part in (Part("vllm", gpu_peers.vllm, 0, 60), Part("x", partial(gpu_peers.alone, compiled=True), 0, 60)):
        found = execute(part, setup_of(tmp_path), "spawn")
        assert found["status"] == "ok" and set(found["results"]) == {"note"}


def test_a_case_that_fails_leaves_the_others_but_a_broken_gpu_does_not() -> None:
    def fail(text: str) -> dict[str, Any]:
        raise RuntimeError(text)

    assert attempt(lambda: {"x": 1}) == {"x": 1}
    assert "no kernel" in attempt(lambda: fail("no kernel"))["error"]
    with pytest.raises(RuntimeError):
        attempt(lambda: fail("CUDA error: an illegal memory access was encountered"))


class FakeGPU:
    """A GPU's clock and queue: events note the time, calls take some, and a graph repeats what it has seen."""

    def __init__(self, captures: bool) -> None:
        self.now, self.captures, self.graphs = 0.0, captures, []
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Graph:
            took = 0.0

            def replay(self) -> None:
                outer.now += self.took

        @contextmanager
        def graph(made: Graph) -> Iterator[None]:
            if not outer.captures:
                raise RuntimeError("this cannot be captured")
            began = outer.now
            yield
            made.took = outer.now - began

        self.cuda = {"Event": Event, "CUDAGraph": Graph, "graph": graph, "synchronize": lambda: None}

    def takes(self, ms: float) -> None:
        self.now += ms


@pytest.mark.parametrize("captures", [True, False])
def test_a_sample_is_the_mean_over_the_rotated_buffers(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(captures)
    for name, value in gpu.cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = timed([partial(gpu.takes, 1.0), partial(gpu.takes, 3.0)], "cuda", budget_s=0.1)
    assert found["median_ms"] == 2.0 and set(found["ms"]) == {2.0} and len(found["ms"]) == 25
    assert ("graph" in found["by"]) == captures and ("cannot be captured" in found["by"]) != captures


# -- formulas -------------------------------------------------------------------------------------


def test_covered_is_the_union() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        spans = [(a, a + n) for a, n in torch.randint(0, 30, (8, 2), generator=generator).tolist()]
        assert covered(spans) == len({at for begin, end in spans for at in range(begin, end)})


def a_trace(config: ModelConfig, *plans: tuple[Chunk, ...]) -> Trace:
    meta = {"kv_bytes_per_token": config.kv_bytes_per_token("bfloat16"), "block_size": 16, "weight_bytes": 10**6}
    trace = Trace(meta)
    for step, chunks in enumerate(plans):
        trace.append(StepRecord(StepPlan(step, chunks), (1,) * len(chunks)))
    return trace


def test_the_roofline_is_what_each_step_must_move_or_compute() -> None:
    config = ModelConfig.from_dict(tiny_config("qwen3"))
    prompt, decode = (Chunk(0, 0, 7), Chunk(1, 4, 3)), (Chunk(0, 7, 1), Chunk(1, 7, 1))
    trace = a_trace(config, prompt, decode, ())
    token = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim  # K and V, two bytes each
    moved = [1e6 + token * (7 + 7 + 7 + 3), 1e6 + token * (8 + 8 + 2)]
    assert floor_s(trace, config, 1e9, 1e30) == pytest.approx(sum(moved) / 1e9)

    norms = config.hidden_size * (2 * config.num_layers + 1) + 2 * config.head_dim * config.num_layers
    matrices = config.num_parameters - config.vocab_size * config.hidden_size - norms
    seen = [sum(range(1, 8)) + 5 + 6 + 7, 8 + 8]  # keys that each query sees
    flops = [
        2 * matrices * tokens
        + 2 * 2 * config.hidden_size * config.vocab_size
        + 4 * config.num_layers * config.num_heads * config.head_dim * pairs
        for tokens, pairs in zip((10, 2), seen, strict=True)
    ]
    assert floor_s(trace, config, 1e30, 1e9) == pytest.approx(sum(flops) / 1e9)
    # Each step is bound by its own worse half: here the first by FLOPs, the second by bytes.
    rate = (flops[0] + flops[1]) / 2 / (moved[1] / 1e9)
    assert flops[0] / rate > moved[0] / 1e9 and flops[1] / rate < moved[1] / 1e9
    assert floor_s(trace, config, 1e9, rate) == pytest.approx(flops[0] / rate + moved[1] / 1e9)
    trace.meta["block_size"] = 0
    assert floor_s(trace, config, 1e9, 1e30) == pytest.approx(2e6 / 1e9)


class Slow:
    """`generate_batch`'s manager, whose requests all get a token at the same time, one each millisecond."""

    def __init__(self) -> None:
        self.now, self.asked = 0, {}

    def add_request(self, input_ids: list[int], max_new_tokens: int) -> str:
        self.asked[f"req_{len(self.asked)}"] = max_new_tokens
        return f"req_{len(self.asked) - 1}"

    def get_result(self, timeout: float) -> Any:
        name, length = min(self.asked.items(), key=lambda item: item[1])
        del self.asked[name]
        self.now = length
        return SimpleNamespace(request_id=name, generated_tokens=[0] * length, error=None, is_finished=lambda: True)


@pytest.mark.parametrize(("stop", "tokens"), [(100, 3 + 8 + 20 + 90), (20, 3 + 8 + 20 + 20), (5, 3 + 8 + 8 + 8)])
def test_a_peer_that_is_cut_short_is_credited_with_all_it_did(stop: int, tokens: int) -> None:
    manager = Slow()
    work = Workload("four", ((1,), (2,), (3,), (4,)), (20, 3, 90, 8), 0)
    assert gpu_peers._serve(manager, work, lambda: stop - manager.now) == tokens


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1


def test_time_in_calls_that_wait_is_counted_and_the_calls_are_given_back() -> None:
    before = torch.Tensor.tolist
    with _waiting("cpu") as waited:
        assert torch.arange(3).tolist() == [0, 1, 2] and torch.ones(1).item() == 1
    assert len(waited) == 2 and min(waited) > 0
    assert torch.Tensor.tolist is before
    torch.ones(1).tolist()
    assert len(waited) == 2


def test_switches_are_measured_or_said_to_be_missing() -> None:
    assert set(switches_of("1b")) == {"eager"}
    if "3" in stage_names():
        found = switches_of("3")
        assert set(found) == {"eager", "graphs", "pipelined", "both"}
        assert isinstance(found["eager"], dict) and not any(found["eager"].values())
        for name, settings in found.items():
            assert isinstance(settings, dict) or "not there yet" in settings, name


# -- bars -----------------------------------------------------------------------------------------


def a_record(**parts: Any) -> dict[str, Any]:
    listed = {name.replace("__", "/"): {"status": "ok", "results": results} for name, results in parts.items()}
    return {"smoke": False, "model": "x", "machine": {"gpu": "a GPU"}, "parts": listed, "bars": []}


def verdicts(record: dict[str, Any]) -> dict[str, Any]:
    return {bar["name"]: (bar["value"], bar["met"]) for bar in gpu_report.bars(record)}


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    record = a_record()
    assert set(verdicts(record).values()) == {(None, None)}
    record["bars"] = gpu_report.bars(record)
    assert gpu_report.table(record).count("not measured") == len(record["bars"]) == 26


def test_stage_4_is_judged_by_the_budget_with_the_shortest_gaps() -> None:
    first = {"itl_ms": {"p50": 5.0, "p99": 90.0}, "tokens_per_s": 100.0}
    tight = {"itl_ms": {"p50": 5.0, "p99": 8.0}, "tokens_per_s": 98.0}
    loose = {"itl_ms": {"p50": 5.0, "p99": 30.0}, "tokens_per_s": 100.0}
    hits = {"1024": {"gain": 4.0, "miss": 1.0}, "4096": {"gain": 13.0, "miss": 1.02}}
    found = verdicts(a_record(chunked={"prefill first": first, "budget 256": tight, "budget 2048": loose}, prefix=hits))
    assert found["P99 gap, prefill first over chunks"] == (90 / 8, True)
    assert found["P99 gap of chunks over their P50"] == (8 / 5, False)
    assert found["tokens/s of those chunks over prefill first"] == (0.98, True)
    assert found["first token on a hit of 4096, times sooner"] == (13.0, True)
    assert found["first token on a hit of 1024, times sooner"] == (4.0, False)
    assert found["time with nothing to find, over not looking"] == (1.02, False)


def test_stage_5_is_judged_by_decode_steps_alone_and_of_a_full_batch() -> None:
    steps = {str(batch): {"speed": {"5": {"median": ratio}}} for batch, ratio in ((1, 1.5), (256, 0.9))}
    found = verdicts(a_record(quantized=steps))
    assert found["decode at batch 1, 4 bits over 16"] == (1.5, True)
    assert found["decode at batch 256, 4 bits over 16"] == (0.9, False)


@needs_triton
def test_stage_5_runs_fewer_bytes_in_turns_with_stage_4(smoke: Any) -> None:
    results = smoke[1]["parts"]["quantized"]["results"]
    assert set(results) == {"1", "3"} and set(results["3"]["ms_per_step"]) == {"4", "5"}
    weights = results["1"]["weight_bytes"]
    assert weights["4"] > weights["5"] > weights["5, int8 head"]
    assert {len(samples) for samples in results["1"]["ms"].values()} == {2}


def test_stage_5_is_judged_at_each_number_of_tokens() -> None:
    ours = {1: 2.6, 16: 2.2, 64: 1.3, 1024: 0.96}
    found = {f"4096x12288, {tokens}": {"tokens": tokens, "ours": {"speedup": s}} for tokens, s in ours.items()}
    told = verdicts(a_record(int4=found | {"layer, 1": {"tokens": 1, "speedup": 1.2}}))
    assert told["int4 4096x12288 over cuBLAS, tokens: 1"] == (2.6, True)
    assert told["int4 4096x12288 over cuBLAS, tokens: 16"] == (2.2, False)
    assert told["int4 4096x12288 over cuBLAS, tokens: 64"] == (1.3, True)
    assert told["the same, least at any number of tokens"] == (0.96, False)
    assert told["int4 layer of the model over cuBLAS, 1 token"] == (1.2, True)
    found["4096x12288, 2"] = {"tokens": 2, "ours": {"error": "out of memory"}}
    assert verdicts(a_record(int4=found))["the same, least at any number of tokens"] == (None, None)


@needs_triton
def test_every_kernel_for_packed_weights_is_measured_and_right(smoke: Any) -> None:
    results = smoke[1]["parts"]["int4"]["results"]
    assert max(results["error"]["relative_error"].values()) < 1e-5
    case = results["64x96, 3"]
    codes, grids = 64 * 96 // 2, 96 * (4 + 1)  # one group of 64 columns; scales of fp32 and zero points of one byte
    assert case["bytes"] == 2 * codes + grids + 3 * (64 + 96) * 4, "half of a block of 128 columns is padding"
    assert all(case[name]["speedup"] > 0 for name in ("gemv", "gemm", "dequantize + matmul", "ours"))
    assert results["layer, 1"]["speedup"] > 0


def test_bars_are_judged_by_the_worst_case_and_the_best_setting() -> None:
    speeds = {"speedup_over_flash_attention": 1.31, "speedup_over_cudnn_attention": 0.7}
    record = a_record(
        prefill={"4096": {"ours": {"of_matmul": 0.6}, **speeds}},
        decode={
            "1 x 1024": {"tokens": 1024, "stage3": {"of_copy": 0.1}},
            "128 x 1024": {"tokens": 131072, "stage3": {"of_copy": 0.95}},
            "256 x 1024": {"tokens": 262144, "stage3": {"of_copy": 0.9}},
        },
        batch1__stage3={"eager, 512": {"ms_per_token": 9.0}, "graphs, 512": {"ms_per_token": 0.5}},
        batch1__transformers={"512": {"ms_per_token": 20.0}},
        throughput__stage3={"best": {"complete": True, "tokens_per_s": 100.0, "of_roofline": 0.5}},
        throughput__generate_batch={"best": {"complete": True, "tokens_per_s": 5.0}},
        idle__stage3={
            "eager, 256": {"idle": 0.5, "host_us": 900.0},
            "both, 256": {"idle": 0.03, "host_us": 250.0},
            "both, 1": {"idle": 0.04, "host_us": 90.0},
        },
    )
    found = verdicts(record)
    assert found["prefill 4k over SDPA flash"] == (1.31, True)
    assert found["prefill 4k over cuDNN"] == (0.7, False)
    assert found["paged decode of copy, least from 100k"] == (0.9, False)
    assert found["batch 1, context 512, ms a token"] == (0.5, True)
    assert found["batch 1, 512, over generate eager"] == (40.0, True)
    assert found["usual bench of its roofline"] == (0.5, False)
    assert found["usual bench over generate_batch"] == (20.0, True)
    assert found["GPU idle at batch 256"] == (0.03, False) and found["GPU idle at batch 1"] == (0.04, True)
    assert found["host us a step at batch 256, if idle counts"] == (250.0, True)
    record["bars"] = gpu_report.bars(record)
    assert gpu_report.table(record).count("NOT MET") == 4
    assert max(map(len, gpu_report.table(record).splitlines())) <= 100


def test_a_run_cut_short_is_not_judged() -> None:
    best = {"complete": False, "tokens_per_s": 100.0, "of_roofline": 0.99}
    found = verdicts(a_record(throughput__stage3={"best": best}))
    assert found["usual bench of its roofline"] == (None, None)


def test_one_stage_with_wrong_logits_is_enough() -> None:
    right, wrong = {"met": True}, {"error": "out of memory"}
    found = verdicts(a_record(correctness={"logits, stage 2, float32": right, "logits, stage 3, float32": wrong}))
    assert found["logits equal transformers'"] == (0.0, False)


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    write(tmp_path / "x.json", {"a": float("inf"), 3: (1, 2)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "3": [1, 2]}
