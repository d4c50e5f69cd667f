"""Stage 2 against stage 1b in the same K/V bytes: how many sequences fit, what is wasted, what a step costs."""

from statistics import median
from typing import Any

from stepengine.bench import decoding, runs, verify, workloads
from stepengine.bench.measure import alternate
from stepengine.bench.options import Options, ratio_text, told_of
from stepengine.bench.usage import Usage, block_tokens_per_sequence, usage
from stepengine.bench.workloads import Workload

STAGES = ("1b", "2")  # the same policy over contiguous slots and over blocks
COUNTED_ON = "tiny-random"  # counts do not depend on the weights
BARS = {2048: 1.9, 4096: 3.7}  # sequences at once, stage 2 over stage 1b
UTILIZATION_BAR = 0.96
STEP_BAR = 0.85  # speed of a decode step on a CPU


def paged(options: Options) -> dict[str, Any]:
    """Four parts: sequences that fit (counted), tokens/s (timed), one decode step (timed), and where it does not help.

    Both stages have the same bytes: slots x max_model_len tokens = num_blocks x block_size.
    """
    return {
        "what": "paged",
        "capacity": capacity(options),
        "throughput": throughput(options),
        "step": step(options),
        "ample": ample(options),
    }


def capacity(options: Options) -> dict[str, Any]:
    """Long-tailed requests through both stages, at two values of `max_model_len` in the same pool.

    Counted on tiny random weights, with every step of both traces read. All requests arrive together and
    are short while they are young, so more run at once while others wait than fit on average over the
    run; the bar is held against both. The fast form is the same at an eighth: lengths,
    slots' sizes and blocks.
    """
    scale = 8 if options.fast else 1
    size, count = 16 // scale, 24 if options.fast else 96
    found: dict[str, Any] = {"model": COUNTED_ON, "block_size": size, "scale": scale, "sets": {}}
    for most, bar in BARS.items():
        slots, longest = (2 if options.fast else 4) * 2048 // most, most // scale
        ids = workloads.corpus(None, 499)
        work = workloads.lognormal(ids, options.seed, count, 256 / scale, 384 / scale, longest)
        engines = {
            stage: runs.build(COUNTED_ON, stage, slots, longest, places=count, **_blocks(stage, size))
            for stage in STAGES
        }
        runs_of: dict[str, runs.Run] = {}
        with told_of(options, f"{most} tokens: sequences that fit", 2) as told:
            for stage in STAGES:
                runs_of[stage] = runs.run(engines[stage], work)
                told(stage)
        used = {stage: usage(run.trace) for stage, run in runs_of.items()}
        gain = used["2"].sequences / used["1b"].sequences
        tokens = slots * longest
        fits = used["2"].fits / used["1b"].fits
        differ = verify.differences(engines["1b"], runs_of["1b"], runs_of["2"])
        found["sets"][str(most)] = {
            "workload": work.describe(),
            "mean_tokens": (sum(map(len, work.prompts)) + work.num_outputs) / len(work.prompts),
            "slots": slots,
            "max_model_len": longest,
            "pool_tokens": tokens,
            "used": {stage: vars(of) for stage, of in used.items()},
            "ratio": gain,
            "peak_ratio": used["2"].peak / used["1b"].peak,
            "fits_ratio": fits,
            "lengths_allow": tokens / block_tokens_per_sequence(work, size) / slots,
            "bar": bar,
            "same_tokens": differ.wrong == 0,
            "near_ties": differ.near,
            "met": min(gain, fits) >= bar and _tight(used["2"], size),
        }
    found["utilization_bar"] = UTILIZATION_BAR
    found["met"] = all(part["met"] for part in found["sets"].values())
    return found


def _tight(used: Usage, block_size: int) -> bool:
    return used.utilization >= UTILIZATION_BAR and used.worst_waste <= block_size - 1


def _blocks(stage: str, size: int) -> dict[str, Any]:
    return {"block_size": size} if stage == "2" else {}


def throughput(options: Options) -> dict[str, Any]:
    """Tokens/s of both stages on `options.model`, memory short: the same kind of requests, smaller."""
    slots, longest, count = (2, 64, 8) if options.fast else (4, 256, 20)
    return _pairs(options, "memory short", slots, longest, count, places=count, rounds=min(options.rounds, 3))


def ample(options: Options) -> dict[str, Any]:
    """Where blocks do not help: one request, and four, with a slot for each in stage 1b."""
    longest = 64 if options.fast else 512
    rounds = options.rounds if options.fast else max(options.rounds, 7)
    sets = {str(count): _pairs(options, f"{count} at once", count, longest, count, count, rounds) for count in (1, 4)}
    return {"sets": sets}


def _pairs(
    options: Options, what: str, slots: int, longest: int, count: int, places: int, rounds: int
) -> dict[str, Any]:
    engines = {stage: runs.build(options.model, stage, slots, longest, places=places) for stage in STAGES}
    runs.share_weights(engines.values())
    ids = workloads.corpus(engines["1b"].tokenizer, engines["1b"].config.vocab_size)
    work = _work(ids, options, count, longest)
    done: dict[str, runs.Run] = {}

    def arm(stage: str) -> float:
        done[stage] = runs.run(engines[stage], work)
        return done[stage].tokens_per_s

    with told_of(options, f"{what}: stage 1b, 2", 2 * (rounds + 1)) as told:
        timed = alternate({"1b": lambda: arm("1b"), "2": lambda: arm("2")}, rounds, told=told)
    tokens = verify.differences(engines["1b"], done["1b"], done["2"])
    return {
        "workload": work.describe(),
        "slots": slots,
        "max_model_len": longest,
        "used": {stage: vars(usage(run.trace)) for stage, run in done.items()},
        "tokens_per_s": {stage: timed.median(stage) for stage in STAGES},
        "ratio": vars(timed.ratio("2", "1b")),
        "decode_ms": {stage: median(run.step_ms[1]) for stage, run in done.items()},
        "same_tokens": tokens.wrong == 0,
        "near_ties": tokens.near,
    }


def _work(ids: Any, options: Options, count: int, longest: int) -> Workload:
    if count > 4:
        return workloads.lognormal(ids, options.seed, count, longest // 8, longest // 6, longest)
    output = longest // 4
    return workloads.uniform(ids, options.seed, count, (longest // 4,) * 2, (output, output))


def step(options: Options) -> dict[str, Any]:
    """One decode step of both stages, and copying the blocks alone. `speed` is stage 1b's time over stage 2's."""
    return decoding.compare(options, STAGES, STEP_BAR, copies=True)


def text(result: dict[str, Any]) -> str:
    """The result as lines of at most 120 columns."""
    lines = ["blocks (stage 2) against slots (stage 1b) in the same K/V bytes, block 0 left out"]
    found = result["capacity"]
    lines.append(
        f"  sequences that fit, counted in runs of {found['model']} (weights do not matter), "
        f"blocks of {found['block_size']}" + (f", all at 1/{found['scale']}" if found["scale"] > 1 else "")
    )
    for part in found["sets"].values():
        lines += _capacity_text(part, found["block_size"])
    part = result["throughput"]
    lines.append(f"  memory short, {_speed_text(part)}")
    for count, part in result["ample"]["sets"].items():
        lines.append(f"  memory ample, {'one request' if count == '1' else f'{count} requests'}, {_speed_text(part)}")
    found = result["step"]
    lines.append("  a decode step at the same rows and contexts, and copying its blocks once")
    lines += decoding.compare_text(found)
    return "\n".join(lines)


def _capacity_text(part: dict[str, Any], block_size: int) -> list[str]:
    slots, blocks, work = part["used"]["1b"], part["used"]["2"], part["workload"]
    return [
        f"    max_model_len {part['max_model_len']}: {part['pool_tokens']} tokens = {part['slots']} slots = "
        f"{part['pool_tokens'] // block_size} blocks; {work['requests']} requests, {work['name']}",
        f"      (mean {part['mean_tokens']:.0f} tokens, prompts to {work['prompt_tokens']['max']}, outputs to "
        f"{work['output_tokens']['max']}); {_same(part)}",
        f"      fit on average: {slots['fits']:.1f} -> {blocks['fits']:.1f}, {part['fits_ratio']:.2f}x (by the lengths "
        f"alone {part['lengths_allow']:.2f}x)",
        f"      at once while some wait: {slots['sequences']:.1f} -> {blocks['sequences']:.1f}, {part['ratio']:.2f}x; "
        f"peak {slots['peak']} -> {blocks['peak']}",
        f"      of what is reserved, used: {slots['utilization']:.1%} -> {blocks['utilization']:.1%}; empty per "
        f"sequence: {slots['waste_tokens']:.0f} -> {blocks['waste_tokens']:.1f} tokens, at most "
        f"{blocks['worst_waste']} (bound {block_size - 1})",
        f"      its price: {blocks['preemptions']} preemptions, {blocks['recomputed_tokens']} tokens run again; "
        f"bars {part['bar']}x and {UTILIZATION_BAR:.0%} {'met' if part['met'] else 'MISSED'}",
    ]


def _speed_text(part: dict[str, Any]) -> str:
    speed, fits = part["tokens_per_s"], {stage: used["fits"] for stage, used in part["used"].items()}
    short = part["workload"]["requests"] > part["slots"]
    return (
        f"{part['slots']} slots of {part['max_model_len']}: {speed['1b']:.1f} -> {speed['2']:.1f} tokens/s, "
        f"{ratio_text(part['ratio'])}; " + (f"fit {fits['1b']:.1f} -> {fits['2']:.1f}; " if short else "") + _same(part)
    )


def _same(part: dict[str, Any]) -> str:
    ties = f" but for {part['near_ties']} that part at a near tie" if part["near_ties"] else ""
    return "same tokens" + ties if part["same_tokens"] else "OTHER TOKENS"
