"""How large should a block be? Waste of the last blocks against speed of a decode step."""

from typing import Any

from stepengine.bench import decoding, runs, workloads
from stepengine.bench.options import Options, ratio_text, told_of
from stepengine.bench.usage import block_tokens_per_sequence, usage

SIZES = (1, 8, 16, 32, 128)
USUAL = "16"
COUNTED_ON = "tiny-random"  # waste does not depend on the weights


def blocksize(options: Options) -> dict[str, Any]:
    """Blocks of 1 to 128 tokens in the same bytes: waste and sequences counted, a decode step timed in turns."""
    slots, longest, count = (2, 256, 16) if options.fast else (8, 1024, 64)
    pool_tokens = slots * longest
    work = workloads.lognormal(workloads.corpus(None, 499), options.seed, count, longest // 8, longest // 6, longest)
    used = {}
    with told_of(options, "waste by block size", len(SIZES)) as told:
        for size in SIZES:
            llm = runs.build(COUNTED_ON, "2", slots, longest, places=count, block_size=size)
            used[str(size)] = {
                "num_blocks": llm.engine.limits.num_blocks,
                "lengths_allow": pool_tokens / block_tokens_per_sequence(work, size),
                **vars(usage(runs.run(llm, work).trace)),
            }
            told(size)

    rows, context = (2, 24) if options.fast else (16, 256)
    rounds = options.rounds if options.fast else max(options.rounds, 7)
    longest = -(-(context + decoding.drift(rounds, (rows,)) + 16) // 128) * 128
    engines = {str(size): runs.build(options.model, "2", rows, longest, block_size=size) for size in SIZES}
    runs.share_weights(engines.values())
    with told_of(options, "speed by block size", len(SIZES) * (rounds + 1)) as told:
        cells = decoding.decode_times(engines, (rows,), (context,), rounds, options.seed, told)
        ((_, _, timed),) = cells
    return {
        "what": "blocksize",
        "model": COUNTED_ON,
        "workload": work.describe(),
        "pool_tokens": pool_tokens,
        "used": used,
        "rows": rows,
        "context": context,
        "ms": {name: timed.median(name) for name in timed.values},
        "speed": {name: vars(timed.ratio(USUAL, name)) for name in timed.values},
    }


def text(result: dict[str, Any]) -> str:
    """The result as lines of at most 120 columns."""
    work = result["workload"]
    lines = [
        f"block sizes: waste (tokens) counted on {result['model']}, {work['requests']} requests, {work['name']},",
        f"  in a pool of {result['pool_tokens']} tokens; a decode step of {result['rows']} rows at "
        f"{result['context']} tokens, and its speed against blocks of {USUAL}",
    ]
    for size, used in result["used"].items():
        lines.append(
            f"  {size:>4} tokens: {used['num_blocks']:5} blocks; empty {used['waste_tokens']:4.1f} a sequence, "
            f"{1 - used['utilization']:5.1%}; room for {used['lengths_allow']:4.1f}; "
            f"{result['ms'][size]:6.1f} ms, {ratio_text(result['speed'][size])}"
        )
    return "\n".join(lines)
