"""Chunked prefill: what long prompts do to requests that decode, prefill first (stage 3) against chunks (4a)."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from stepengine.bench import runs, verify, workloads
from stepengine.bench.measure import Paired, Ratio, alternate
from stepengine.bench.options import Options, ratio_text, told_of
from stepengine.bench.workloads import Workload
from stepengine.llm import LLM

FIRST, CHUNKS = "3", "4a"  # the same cache and attention; only the scheduler differs
ITL_BAR = 8.0  # times lower: P99 of the gaps between tokens of running requests
SPEED_BAR = 0.95  # of the tokens/s
BUDGET = 128  # tokens a step, where the bars are held
KNEE = 0.95  # of the best tokens/s of the sweep


def chunked(options: Options) -> dict[str, Any]:
    """One workload through stage 3 and stage 4a in turns, then through 4a at other budgets.

    Gaps and times to the first token are pooled over all rounds, tokens/s compared round by round.
    """
    long, count, running, outputs = (96, 2, 3, 24) if options.fast else (2048, 4, 4, 96)
    budgets = (32, 64, 96) if options.fast else (64, 128, 256, 512, 1024, 2048)
    budget = budgets[1] if options.fast else BUDGET
    longest = long + 64
    first = _engine(options, FIRST, longest, running + 4)
    ids = workloads.corpus(first.tokenizer, first.config.vocab_size)
    work = workloads.long_arrivals(ids, options.seed, running, outputs, long, count)
    chunks = _engine(options, CHUNKS, longest, running + 4, budget, first)
    rounds = min(options.rounds, 3)
    done = _rounds(options, f"stage {FIRST}, {CHUNKS}", {FIRST: first, CHUNKS: chunks}, work, rounds)
    same = verify.differences(first, done[FIRST][-1], done[CHUNKS][-1])
    waits = {stage: _waits(found) for stage, found in done.items()}
    gain = waits[FIRST]["running"]["p99"] / waits[CHUNKS]["running"]["p99"]
    speeds = Paired({stage: [run.tokens_per_s for run in found] for stage, found in done.items()})
    speed = speeds.ratio(CHUNKS, FIRST)
    sweep: list[dict[str, Any]] = []
    for size in budgets:
        arm = chunks if size == budget else _engine(options, CHUNKS, longest, running + 4, size, first)
        found = _rounds(options, f"budget {size}", {CHUNKS: arm}, work, 1)[CHUNKS]
        sweep.append({"budget": size, "tokens_per_s": median(run.tokens_per_s for run in found), **_waits(found)})
    shy = _engine(options, CHUNKS, longest, running + 4, budget, first, budget // 2)
    (polite,) = _rounds(options, "threshold", {CHUNKS: shy}, work, 1)[CHUNKS]
    best = max(float(point["tokens_per_s"]) for point in sweep)
    knee = min(int(point["budget"]) for point in sweep if point["tokens_per_s"] >= KNEE * best)
    return {
        "what": "chunked",
        "workload": work.describe(),
        "budget": budget,
        "waits": waits,
        "itl": {"ratio": gain, "bar": ITL_BAR, "met": gain >= ITL_BAR},
        "speed": {
            "tokens_per_s": {stage: speeds.median(stage) for stage in done},
            "ratio": vars(speed),
            "bar": SPEED_BAR,
            "met": speed.median >= SPEED_BAR,
        },
        "itl_by_round": vars(_by_round(done)),
        "sweep": sweep,
        "knee": knee,
        "threshold": {"tokens": budget // 2, "tokens_per_s": polite.tokens_per_s, **_waits([polite])},
        "same_tokens": same.wrong == 0,
        "met": same.wrong == 0,
        "near_ties": same.near,
    }


def _engine(
    options: Options,
    stage: str,
    longest: int,
    places: int,
    budget: int | None = None,
    weights: LLM | None = None,
    threshold: int | None = None,
) -> LLM:
    settings: dict[str, Any] = {"max_num_batched_tokens": budget, "long_prefill_token_threshold": threshold}
    llm = runs.build(options.model, stage, places, longest, **settings)
    if weights is not None:
        runs.share_weights((weights, llm))
    return llm


def _rounds(
    options: Options, what: str, engines: Mapping[str, LLM], work: Workload, rounds: int
) -> dict[str, list[runs.Run]]:
    """The runs of each engine, in turns, after a warm-up."""
    done: dict[str, list[runs.Run]] = {name: [] for name in engines}
    for llm in engines.values():
        runs.warm(llm, work)

    def arm(name: str) -> float:
        done[name].append(runs.run(engines[name], work))
        return done[name][-1].tokens_per_s

    with told_of(options, what, len(engines) * rounds) as told:
        alternate({name: lambda name=name: arm(name) for name in engines}, rounds, warmup=0, told=told)
    return done


def _waits(found: list[runs.Run]) -> dict[str, dict[str, float]]:
    """Milliseconds, of all rounds together: gaps of the running requests, first tokens of the others."""
    gaps = [gap for run in found for index in run.workload.of("running") for gap in run.requests[index].itl_ms]
    firsts = {
        kind: [run.requests[index].ttft_ms or 0.0 for run in found for index in run.workload.of(kind)]
        for kind in ("long", "other")
    }
    return {"running": runs.quantiles(gaps)} | {kind: runs.quantiles(times) for kind, times in firsts.items()}


def _by_round(done: Mapping[str, list[runs.Run]]) -> Ratio:
    pairs = zip(done[FIRST], done[CHUNKS], strict=True)
    return Ratio.of([one.itl_ms("running")["p99"] / other.itl_ms("running")["p99"] for one, other in pairs])


def text(result: dict[str, Any]) -> str:
    """The result as lines of at most 120 columns."""
    work, speed, itl = result["workload"], result["speed"], result["itl"]
    lines = [
        f"prefill first (stage {FIRST}) against chunks (stage {CHUNKS}, {result['budget']} tokens a step)",
        f"  {work['name']}, each with a short request behind it; "
        + ("same tokens" if result["same_tokens"] else "OTHER TOKENS"),
        f"  gaps between tokens of the running requests: P99 {itl['ratio']:.1f}x lower; bar >= {itl['bar']:g}x "
        f"{_met(itl)}",
        f"    by round {ratio_text(result['itl_by_round'])}",
        f"  tokens/s {speed['tokens_per_s'][FIRST]:.1f} -> {speed['tokens_per_s'][CHUNKS]:.1f}, "
        f"{ratio_text(speed['ratio'])}; bar >= {speed['bar']:g}x {_met(speed)}",
    ]
    for stage, waits in result["waits"].items():
        lines.append(f"    stage {stage + ':':4} {_waits_text(waits)}")
    one, other = (result["waits"][stage]["long"]["p50"] for stage in (FIRST, CHUNKS))
    later = f"later, {other / one:.2f}x" if other > one else f"no later, {other / one:.2f}x"
    lines += [
        f"  the long prompts' own first token comes {later}",
        f"  budgets of stage {CHUNKS}; the knee, where tokens/s reach {KNEE:.0%} of the best: {result['knee']}",
    ]
    for point in result["sweep"]:
        lines.append(f"    {point['budget']:5}: {point['tokens_per_s']:6.1f} tokens/s; {_waits_text(point)}")
    shy = result["threshold"]
    lines.append(f"  no chunk longer than {shy['tokens']}, so that others get in (long_prefill_token_threshold)")
    lines.append(f"    {result['budget']:5}: {shy['tokens_per_s']:6.1f} tokens/s; {_waits_text(shy)}")
    return "\n".join(lines)


def _waits_text(waits: Mapping[str, Mapping[str, float]]) -> str:
    running, long, other = waits["running"], waits["long"], waits["other"]
    return (
        f"gap P50 {running['p50']:.0f}, P99 {running['p99']:.0f} ms; first token P50: long {long['p50']:.0f}, "
        f"others {other['p50']:.0f} ms"
    )


def _met(part: Mapping[str, Any]) -> str:
    return "met" if part["met"] else "MISSED"
