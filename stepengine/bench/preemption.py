"""A pool that is too small: preemption by recompute against by swap, and both against a pool that is not."""

from typing import Any

from stepengine.bench import runs, verify, workloads
from stepengine.bench.measure import alternate
from stepengine.bench.options import Options, ratio_text, told_of
from stepengine.bench.usage import usage
from stepengine.bench.workloads import Workload

POLICIES = ("recompute", "swap")
BLOCK_SIZE = 16


def preemption(options: Options) -> dict[str, Any]:
    """Three kinds of requests through three engines in turns: recompute, swap, and a pool that holds all.

    short: little to recompute. long: much to recompute. shared: samples of few long prompts; what is
    swapped comes back without its sharing, what is recomputed takes the prompt's blocks up again.
    Times are of steps (`busy_s`); the weights and the requests are the same.
    """
    small, longest = (12, 96) if options.fast else (56, 448)
    engines = {
        name: runs.build(options.model, "2", 1, longest, places=16, num_blocks=small, preemption=name)
        for name in POLICIES
    }
    engines["ample"] = runs.build(options.model, "2", 16, longest, block_size=BLOCK_SIZE)
    runs.share_weights(engines.values())
    llm = engines["ample"]
    ids = workloads.corpus(llm.tokenizer, llm.config.vocab_size)
    rounds = min(options.rounds, 3)
    result: dict[str, Any] = {
        "what": "preemption",
        "num_blocks": small,
        "ample_blocks": llm.engine.limits.num_blocks,
        "block_size": BLOCK_SIZE,
        "kv_bytes_per_token": runs.trace_of(llm).meta["kv_bytes_per_token"],
        "sets": {},
    }
    for name, work in _sets(ids, options).items():
        done: dict[str, runs.Run] = {}

        def arm(policy: str, work: Workload = work, done: dict[str, runs.Run] = done) -> float:
            done[policy] = runs.run(engines[policy], work)
            return float(done[policy].summary["busy_s"])

        arms = {policy: lambda policy=policy: arm(policy) for policy in engines}  # noqa: B023
        with told_of(options, f"{name}: recompute, swap, ample", 3 * rounds) as told:
            timed = alternate(arms, rounds, warmup=0, told=told)
        tokens = {policy: verify.differences(llm, done["ample"], done[policy]) for policy in POLICIES}
        result["sets"][name] = {
            "workload": work.describe(),
            "used": {policy: vars(usage(run.trace)) for policy, run in done.items()},
            "swapped_bytes": usage(done["swap"].trace).swapped_blocks * engines["swap"].engine.runner.pool.block_bytes,
            "seconds": timed.values,
            "swap_gain": vars(timed.ratio("recompute", "swap")),
            "over_ample": {policy: vars(timed.ratio(policy, "ample")) for policy in POLICIES},
            "same_tokens": all(found.wrong == 0 for found in tokens.values()),
            "near_ties": {policy: found.near for policy, found in tokens.items()},
        }
    return result


def _sets(ids: Any, options: Options) -> dict[str, Workload]:
    if options.fast:
        prompts, outputs = (
            {"short": (4, 8), "long": (40, 48), "shared": (72, 72)},
            {"short": 24, "long": 24, "shared": 20},
        )
        counts, samples = {"short": 8, "long": 4, "shared": 2}, 5
    else:
        prompts = {"short": (8, 16), "long": (192, 256), "shared": (320, 320)}
        outputs = {"short": 64, "long": 96, "shared": 48}
        counts, samples = {"short": 16, "long": 5, "shared": 2}, 8
    drawn = {
        name: workloads.uniform(ids, options.seed, counts[name], prompts[name], (outputs[name],) * 2)
        for name in prompts
    }
    shared = drawn["shared"]
    return drawn | {"shared": Workload(shared.name, shared.prompts, shared.output_lens, shared.seed, samples)}


def text(result: dict[str, Any]) -> str:
    """The result as lines of at most 120 columns."""
    lines = [
        f"preemption in a pool of {result['num_blocks']} blocks of {result['block_size']} tokens, against "
        f"{result['ample_blocks']} blocks"
    ]
    for name, part in result["sets"].items():
        work, used, cost = part["workload"], part["used"], part["over_ample"]
        samples = f" with {work['samples']} samples each" if work["samples"] > 1 else ""
        gain = part["swap_gain"]
        winner = "swap" if gain["low"] > 1 else "recompute" if gain["high"] < 1 else "neither"
        lines += [
            f"  {name}: {work['requests']} prompts of {work['prompt_tokens']['min']} to "
            f"{work['prompt_tokens']['max']} tokens{samples}, outputs of {work['output_tokens']['max']}; "
            + ("same tokens" if part["same_tokens"] else "OTHER TOKENS"),
            f"    recompute: {used['recompute']['preemptions']} preemptions, {used['recompute']['recomputed_tokens']} "
            f"tokens again, {used['recompute']['steps']} steps; {ratio_text(cost['recompute'])} the time of ample",
            f"    swap:      {used['swap']['preemptions']} preemptions, {part['swapped_bytes'] / 1e6:.1f} MB moved, "
            f"{used['swap']['steps']} steps; {ratio_text(cost['swap'])} the time of ample",
            f"    recompute over swap, time: {ratio_text(gain)}: {winner} wins in every round"
            if winner != "neither"
            else f"    recompute over swap, time: {ratio_text(gain)}: the rounds do not agree",
        ]
    return "\n".join(lines)
