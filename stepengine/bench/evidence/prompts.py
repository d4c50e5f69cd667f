"""Long prompts and prompts that begin alike: claims C5, C6, C13, C14."""

from statistics import median

from stepengine.bench import prefix, runs
from stepengine.bench.evidence.common import TINY, Evidence, Number, Workbench
from stepengine.bench.workloads import Workload
from stepengine.calculator import kv_bytes_per_token, shape_of, weight_parts
from stepengine.trace import Trace, token_gaps


def until_first(trace: Trace, who: int) -> tuple[int, int]:
    """(tokens run, steps) from a request's arrival to its first token; who: its place in the order of arrival."""
    request, tokens, steps, there = list(trace.requests)[who], 0, 0, False
    for record in trace.steps:
        there = there or request in record.plan.arrived
        tokens, steps = tokens + there * record.plan.num_tokens, steps + there
        brought = zip(record.plan.chunks, record.token_ids, strict=True)
        if any(chunk.request == request and token >= 0 for chunk, token in brought):
            return tokens, steps
    raise ValueError(f"request {request} got no token")


def _longest_gap(trace: Trace) -> int:
    """Most tokens that the engine ran between two tokens of A, or of B."""
    order = list(trace.requests)[:2]
    return max(gap.tokens for gap in token_gaps(trace) if gap.request in order)


def whose_first_token(bench: Workbench) -> Evidence:
    """C5: steps to the long prompt's own first token, tokens run before the short one behind it gets its first."""
    own = {name: until_first(trace, 2)[1] for name, trace in bench.scenes.items()}
    behind = {name: until_first(trace, 3)[0] for name, trace in bench.scenes.items()}
    gaps = {name: _longest_gap(trace) for name, trace in bench.scenes.items()}
    numbers = (
        Number("long prompt's first token, whole, iteration", own["whole"]),
        Number("long prompt's first token, chunks of 256, iteration", own["chunks"]),
        Number("short one behind it, tokens run before its first: whole", behind["whole"]),
        Number("in chunks", behind["chunks"]),
        Number("in chunks, the long one at most 128 a step", behind["limited"]),
        Number("longest gap of a running request: whole, tokens", gaps["whole"]),
        Number("longest gap: in chunks, tokens", gaps["chunks"]),
    )
    agrees = own["chunks"] == 4 > own["whole"] == 1 and behind["limited"] < behind["whole"] <= behind["chunks"]
    return Evidence("counted: 1000 tokens arrive beside two decodes", numbers, agrees)


def who_waits(bench: Workbench) -> Evidence:
    """C13: gaps of those that run, and first tokens of those that wait, when a long prompt runs whole."""
    trace = bench.scenes["whole"]
    usual = median(gap.tokens for gap in token_gaps(trace))
    numbers = (
        Number("running request, usual gap, tokens", usual),
        Number("running request, longest gap, tokens", _longest_gap(trace)),
        Number("its own first token, after tokens", until_first(trace, 0)[0]),
        Number("waiting request of 24 tokens, first token after tokens", until_first(trace, 3)[0]),
        Number("the longest gap in chunks of 256, tokens", _longest_gap(bench.scenes["chunks"])),
    )
    values = [number.value for number in numbers]
    return Evidence(
        "counted: 1000 tokens arrive beside two decodes", numbers, values[1] > 100 * usual and values[2] == 40
    )


def again_and_again(bench: Workbench) -> Evidence:
    """C14: steps, weights and K/V read again, and operators launched, for one prompt in chunks of three sizes."""
    shape = shape_of("Llama-3-8B")
    weights, token = sum(weight_parts(shape, "bf16").values()), kv_bytes_per_token(shape)
    numbers, steps, operators = [], {}, {}
    for budget in (1024, 256, 32):
        llm = runs.build(TINY, "4a", 2, 1024, max_num_batched_tokens=budget)
        done = runs.run_counted(llm, Workload("prompt", ((7,) * 1000,), (1,), 0))
        chunks = [chunk for record in done.trace.steps for chunk in record.plan.chunks]
        steps[budget] = len(chunks)
        operators[budget] = sum(step.operators for step in done.counts.steps)
        again = sum(chunk.start for chunk in chunks)
        numbers += [
            Number(f"budget {budget}, weights read", len(chunks) * weights / 1e9, "GB"),
            Number(f"budget {budget}, earlier K/V read again", again * token / 1e9, "GB"),
            Number(f"budget {budget}, operators launched", operators[budget]),
        ]
    agrees = steps == {1024: 1, 256: 4, 32: 32} and operators[32] > operators[256] > operators[1024]
    how = "chunks and operators (of the tiny model) counted for 1000 tokens, bytes those of Llama-3-8B"
    return Evidence(how, tuple(numbers), agrees)


def on_a_hit(bench: Workbench) -> Evidence:
    """C6: prompt tokens found and run on three kinds of requests; times to the first token; what a miss costs."""
    found = prefix.hits(bench.options)["sets"]
    numbers = [
        Number(f"{name}, prompt tokens found", 100 * part["hit_rate"]["hash"], "%") for name, part in found.items()
    ]
    for cell in prefix.ttft(bench.options)["cells"]:
        for share in ("0.5", "1.0"):
            label = f"{cell['prefix']} + {cell['tail']} tokens, {float(share):.0%} seen, first token"
            numbers.append(Number(label.replace("%", " %"), cell["gain"][share]["median"], "times sooner", 2, True))
    miss = prefix.misses(bench.options)
    numbers.append(Number("nothing to find, speed", 1 / miss["ratio"]["median"], "times", 3, True))
    numbers.append(Number("looking itself, of the time", 100 * miss["looking"], "%", 2, True))
    random_set = found["random"]["hit_rate"]["hash"]
    return Evidence(
        "hits counted, times of this CPU", tuple(numbers), random_set == 0 < found["few-shot"]["hit_rate"]["hash"]
    )
