"""The `stepengine bench` command: one question at a time, each with its bar and the numbers behind it."""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from stepengine.bench import runs, workloads
from stepengine.bench.batching import continuous_steps, expected_max_over_mean, static_steps
from stepengine.bench.measure import alternate, machine
from stepengine.core.engine import Step
from stepengine.core.plan import Chunk, StepPlan
from stepengine.errors import InvalidSetting
from stepengine.llm import LLM
from stepengine.stages import find_stage
from stepengine.trace import Trace

BATCHING = ("1a", "1b")  # the same cache and attention: static and continuous batching


@dataclass(frozen=True)
class Options:
    """model: name, folder or hub id. seed: of the requests. rounds: measured ones. fast: smaller sets.

    peer_batch: requests in a batch of the peer.
    """

    model: str = "smollm2-135m"
    stage: str = "1b"
    rounds: int = 5
    seed: int = 0
    fast: bool = False
    progress: bool = True
    peer_batch: int = 16


def peer_hf(options: Options) -> dict[str, Any]:
    """One stage against `transformers.generate`, one request alone and 32 together; above 1 the stage is faster.

    Only tokens that were asked for count on either side. The stage has room for all 32 at once; the
    peer takes batches of `peer_batch`.
    """
    from stepengine.bench.peers import Transformers

    peer = Transformers(options.model, options.peer_batch)
    count, prompt, output = (8, (16, 48), (8, 32)) if options.fast else (32, (32, 256), (32, 128))
    llm = runs.build(options.model, options.stage, count, max(128, prompt[1] + output[1]))
    ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
    sets = {
        "single": (workloads.uniform(ids, options.seed, 1, (64, 64), (16, 16) if options.fast else (64, 64)), 1.0),
        "batch": (workloads.uniform(ids, options.seed, count, prompt, output), 1.6),
    }
    result: dict[str, Any] = {"what": "peer hf", "stage": options.stage, "peer": peer.padding, "max_num_seqs": count}
    for name, (work, bar) in sets.items():
        tokens: dict[str, list[list[int]]] = {}

        def ours(work: workloads.Workload = work, tokens: dict[str, Any] = tokens) -> None:
            tokens["ours"] = runs.run(llm, work).token_ids

        def theirs(work: workloads.Workload = work, tokens: dict[str, Any] = tokens) -> None:
            tokens["peer"] = peer.run(work)

        # One request alone is over in seconds and its ratio close to 1: more rounds, or noise would decide.
        rounds = options.rounds if name == "batch" or options.fast else max(options.rounds, 11)
        with _told(options, f"{name}: stage {options.stage}, transformers", 2 * (rounds + 1)) as told:
            timed = alternate({"ours": ours, "peer": theirs}, rounds, told=told)
        result[name] = {
            "workload": work.describe(),
            "seconds": timed.values,
            "tokens_per_s": {arm: work.num_outputs / timed.median(arm) for arm in timed.values},
            "ratio": vars(timed.ratio("peer", "ours")),
            "bar": bar,
            "met": timed.ratio("peer", "ours").median >= bar,
            "equal_sequences": sum(a == b for a, b in zip(tokens["ours"], tokens["peer"], strict=True)),
        }
    return result


def static(options: Options) -> dict[str, Any]:
    """Static against continuous batching: decode steps against their formulas, wall clock against the bound.

    Formulas: the sum of each batch's longest, and list scheduling of the drawn lengths. Bound: E[longest
    of a batch] / E[length]; prompts run alone, and larger batches cost more per step, so less is reached.
    """
    slots = 4 if options.fast else 8
    count = 16 if options.fast else 48
    most = 64 if options.fast else 96
    engines = {name: runs.build(options.model, name, slots, 24 + most) for name in BATCHING}
    llm = engines["1b"]
    ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
    prompt = (8, 24)
    sets = {
        "uniform": workloads.uniform(ids, options.seed, count, prompt, (1, most // 2)),
        "exponential": workloads.exponential(ids, options.seed, count, prompt, most / 4, most),
    }
    result: dict[str, Any] = {"what": "static", "slots": slots}
    for name, work in sets.items():
        steps: dict[str, int] = {}

        def arm(stage: str, work: workloads.Workload = work, steps: dict[str, int] = steps) -> float:
            done = runs.run(engines[stage], work)
            steps[stage] = len(done.step_ms[1])
            return float(done.summary["busy_s"])

        arms: dict[str, Callable[[], float]] = {"1a": lambda: arm("1a"), "1b": lambda: arm("1b")}  # noqa: B023
        with _told(options, f"{name}: static, continuous", 2 * options.rounds) as told:
            timed = alternate(arms, options.rounds, warmup=0, told=told)
        formula = {
            "1a": static_steps(work.output_lens, slots),
            "1b": continuous_steps(work.output_lens, slots),
        }
        result[name] = {
            "workload": work.describe(),
            "decode_steps": steps,
            "formula": formula,
            "met": all(abs(steps[stage] - formula[stage]) <= 0.02 * formula[stage] for stage in BATCHING),
            "steps_ratio": steps["1a"] / steps["1b"],
            "seconds": timed.values,
            "wall_ratio": vars(timed.ratio("1a", "1b")),
            "bound": expected_max_over_mean(work.output_lens, slots),
        }
    return result


def context(options: Options) -> dict[str, Any]:
    """Milliseconds per token of one request at 1024 tokens of context against 128, and of 4 requests together."""
    short, long, tokens = 128, 1024, 8 if options.fast else 24
    result: dict[str, Any] = {"what": "context", "stage": options.stage, "bar": 1.5}
    for rows in (1, 4):
        llm = runs.build(options.model, options.stage, rows, long + tokens)
        ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)

        def arm(length: int, llm: LLM = llm, ids: Any = ids, rows: int = rows) -> float:
            prompt = (length - tokens // 2,) * 2  # so that the decodes lie around `length`
            work = workloads.uniform(ids, options.seed, rows, prompt, (tokens, tokens))
            return median(runs.run(llm, work).step_ms[1])

        with _told(options, f"{rows} at once: context {short}, {long}", 2 * (options.rounds + 1)) as told:
            timed = alternate({str(n): lambda n=n: arm(n) for n in (short, long)}, options.rounds, told=told)  # noqa: B023
        result[f"{rows} at once"] = {
            "ms_per_token": {name: timed.median(name) for name in timed.values},
            "ratio": vars(timed.ratio(str(long), str(short))),
        }
    result["met"] = result["1 at once"]["ratio"]["median"] <= result["bar"]
    return result


def trace(options: Options) -> dict[str, Any]:
    """Microseconds to record a step of 256 rows, and the same call with recording off."""
    rows, steps = 256, 1000
    llm = LLM("tiny-random", stage=options.stage, max_num_seqs=1, max_model_len=16)
    plan = StepPlan(0, tuple(Chunk(row, 100, 1) for row in range(rows)))
    token_ids, step = list(range(rows)), Step(0.0, 0.0)

    def arm(recorder: Trace | None) -> float:
        engine = llm.engine
        engine.recorder = recorder
        began = time.perf_counter()
        for _ in range(steps):
            engine._record(step, plan, token_ids, [])  # the engine's own call, once a step
        return 1e6 * (time.perf_counter() - began) / steps

    timed = alternate({"on": lambda: arm(Trace({})), "off": lambda: arm(None)}, options.rounds)
    on, off = timed.median("on"), timed.median("off")
    return {"what": "trace", "rows": rows, "us": {"on": on, "off": off}, "bar": 10.0, "met": on < 10 and off < on}


MEASURES: dict[str, Callable[[Options], dict[str, Any]]] = {"static": static, "context": context, "trace": trace}
PEERS: dict[str, Callable[[Options], dict[str, Any]]] = {"hf": peer_hf}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 where a bar was asked to be enforced and missed."""
    args = _parser().parse_args(argv)
    if args.peer is None and args.what is None:
        raise InvalidSetting(f"bench needs a question: --peer {'|'.join(PEERS)} or --what {'|'.join(MEASURES)}.")
    for name, value in (("rounds", args.rounds), ("peer-batch", args.peer_batch)):
        if value < 1:
            raise InvalidSetting(f"{name} is {value}; it must be at least 1.")
    options = Options(
        args.model, find_stage(args.stage).name, args.rounds, args.seed, args.fast, not args.json, args.peer_batch
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    asked = [PEERS[args.peer]] if args.peer else []
    asked += [MEASURES[args.what]] if args.what else []
    results = [measure(options) for measure in asked]
    if args.json:
        print(json.dumps({"model": options.model, "machine": machine(), "results": results}, indent=2))
    else:
        for result in results:
            print(text(result))
    return int(args.check and not all(_met(result) for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepengine bench", description="Measure one stage, or compare it.")
    parser.add_argument("--peer", choices=sorted(PEERS), help="run another engine on the same requests, alternating")
    parser.add_argument("--what", choices=sorted(MEASURES), help="static: batching policies against their formulas; "
                        "context: time per token at 1024 tokens against 128; trace: cost of recording")  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m", help="catalogue name, local folder or hub id")
    parser.add_argument("--stage", default="1b", help="the stage that is measured (default 1b)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default 0)")
    parser.add_argument("--peer-batch", type=int, default=16, help="requests in a batch of the peer (default 16)")
    parser.add_argument("--fast", action="store_true", help="smaller sets")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _met(result: dict[str, Any]) -> bool:
    parts = [part for part in result.values() if isinstance(part, dict) and "met" in part]
    return all(part["met"] for part in parts) and result.get("met", True)


def text(result: dict[str, Any]) -> str:
    """A result as a few lines."""
    return _TEXTS[result["what"]](result)


def _text_peer(result: dict[str, Any]) -> str:
    lines = [
        f"stage {result['stage']}, up to {result['max_num_seqs']} requests at once, against transformers.generate, "
        f"{result['peer']}; fp32, greedy"
    ]
    for name in ("single", "batch"):
        part = result[name]
        speed, work = part["tokens_per_s"], part["workload"]
        lines.append(
            f"  {name + ':':8}{speed['ours']:7.1f} against {speed['peer']:7.1f} tokens/s: {_ratio(part['ratio'])}; "
            f"{_bar(part, '>=')}; equal tokens in {part['equal_sequences']} of {work['requests']}"
        )
    return "\n".join(lines)


def _text_static(result: dict[str, Any]) -> str:
    lines = [f"static (1a) against continuous batching (1b), {result['slots']} slots"]
    for name in ("uniform", "exponential"):
        part = result[name]
        steps, formula = part["decode_steps"], part["formula"]
        lines += [
            f"  {name}, {part['workload']['requests']} requests",
            f"    decode steps: static {steps['1a']} (formula {formula['1a']}), continuous {steps['1b']} "
            f"(list scheduling {formula['1b']}): {'within' if part['met'] else 'NOT within'} 2 %",
            f"    steps {part['steps_ratio']:.2f}x, wall clock {_ratio(part['wall_ratio'])}; "
            f"bound E[max]/E[mean] {part['bound']:.2f}x",
        ]
    return "\n".join(lines)


def _text_context(result: dict[str, Any]) -> str:
    lines = [f"time per token at 1024 tokens of context against 128, stage {result['stage']}"]
    for name in ("1 at once", "4 at once"):
        part = result[name]
        times = ", ".join(f"{ms:.1f} ms at {length}" for length, ms in part["ms_per_token"].items())
        lines.append(f"  {name}: {times}: {_ratio(part['ratio'])}")
    return "\n".join([*lines, f"  one at once: {_bar(result, '<=')}"])


def _text_trace(result: dict[str, Any]) -> str:
    us = result["us"]
    return f"recording a step of {result['rows']} rows: {us['on']:.2f} us, off {us['off']:.2f} us; bar < 10 us: " + (
        "met" if result["met"] else "MISSED"
    )


_TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "peer hf": _text_peer,
    "static": _text_static,
    "context": _text_context,
    "trace": _text_trace,
}


def _ratio(found: dict[str, Any]) -> str:
    return f"{found['median']:.2f}x ({found['low']:.2f} to {found['high']:.2f}, {found['rounds']} rounds)"


def _bar(part: dict[str, Any], sign: str) -> str:
    return f"bar {sign} {part['bar']}x {'met' if part['met'] else 'MISSED'}"


@contextmanager
def _told(options: Options, what: str, total: int) -> Any:
    from tqdm import tqdm

    form = "{desc}: {n_fmt} of {total_fmt} |{bar}| {remaining} left"
    hidden = not options.progress
    with tqdm(total=total, desc=what, bar_format=form, leave=False, disable=hidden, ncols=90) as bar:
        yield lambda name: bar.update()
