"""The ledger: what is said about each optimisation, when it holds, and what this machine measured.

Every claim has a function in `bench.evidence` that runs the real thing; no number is written down here. What only a
GPU can tell comes from a record of the GPU suite, where there is one (`bench.records.newest_record`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepengine.bench.evidence import attention, batching, links, memory, prompts, weights
from stepengine.bench.evidence.common import Evidence, Number, Workbench
from stepengine.bench.gpu_report import at
from stepengine.errors import InvalidSetting
from stepengine.lesson import wall
from stepengine.viz.ledger import Range
from stepengine.viz.roofline import record_label

HOLDS, WHEN, NOT = "holds", "holds when", "not as said"
GROUPS = (
    "Cache and batching",
    "Paged memory",
    "Attention",
    "Long and shared prompts",
    "Weights of 4 bits",
    "Many GPUs",
)
NO_RECORD = "not measured here, for it needs a GPU, and bench/records holds no record of one yet"


class Claimed(NamedTuple):
    """The range that is claimed, as a ratio, and the labels of the numbers that are drawn beside it."""

    low: float
    high: float
    what: str
    drawn: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """One claim. says: what is met in the field; when: what holds; book: the notebook that shows it."""

    key: str
    group: str
    says: str
    verdict: str
    when: str
    book: str
    measure: Callable[[Workbench], Evidence]
    claimed: Claimed | None = None
    on_gpu: Callable[[Workbench], tuple[Number, ...]] | None = None  # out of a record; () where it holds nothing


@dataclass(frozen=True)
class Card:
    """A claim with what was measured for it."""

    claim: Claim
    evidence: Evidence
    gpu: tuple[Number, ...] = ()
    record: str = ""  # whose numbers `gpu` are

    @property
    def verdict(self) -> str:
        """The claim's, and a word of warning where this run found something else."""
        return self.claim.verdict if self.evidence.agrees else f"{self.claim.verdict} (this run found otherwise)"

    @property
    def measured(self) -> list[str]:
        """One line per number; values of the clock inside `[wall ...]`."""
        return [shown(number) for number in self.evidence.numbers]

    @property
    def gpu_lines(self) -> list[str]:
        """What a GPU said, or that it is missing; [] for a claim that needs none."""
        if self.claim.on_gpu is None:
            return []
        return [f"{shown(number)} ({self.record})" for number in self.gpu] or [NO_RECORD]

    def as_row(self) -> dict[str, Any]:
        """Plain data for `viz.ledger.Cards`."""
        claim = self.claim
        return {
            "key": claim.key, "says": claim.says, "verdict": self.verdict, "when": claim.when, "book": claim.book,
            "how": self.evidence.how, "measured": self.measured, "gpu": self.gpu_lines,
        }  # fmt: skip

    def range(self) -> Range | None:
        """The claimed range and our numbers beside it, for the figure; None where no ratio is claimed."""
        claimed = self.claim.claimed
        if claimed is None:
            return None
        ours = {label: self.evidence.value(label) for label in claimed.drawn if label in self.labels}
        return Range(f"{self.claim.key} {claimed.what}", claimed.low, claimed.high, ours)

    @property
    def labels(self) -> list[str]:
        return [number.label for number in self.evidence.numbers]


def shown(number: Number) -> str:
    """Such as "label: 3.56 times"."""
    marked = str(wall(number.value, number.unit, number.digits))
    if number.clock:
        return f"{number.label}: {marked}"
    if float(number.value).is_integer():
        return f"{number.label}: {int(number.value):,} {number.unit}".rstrip()
    return f"{number.label}: {marked.removeprefix('[wall ').removesuffix(']')}"


def ledger(
    bench: Workbench | None = None, keys: Sequence[str] | None = None, told: Callable[[str], object] | None = None
) -> list[Card]:
    """Measure claims, all or those named, in the ledger's order. `told` hears each key as its turn comes.

    Raises InvalidSetting for a key that is none.
    """
    bench = Workbench() if bench is None else bench
    unknown = sorted(set(keys or ()) - set(CLAIMS))
    if unknown:
        raise InvalidSetting(f"There is no claim {unknown[0]!r}; they are called {', '.join(CLAIMS)}.")
    cards = []
    for claim in CLAIMS.values():
        if keys is not None and claim.key not in keys:
            continue
        if told is not None:
            told(claim.key)
        gpu = claim.on_gpu(bench) if claim.on_gpu is not None else ()
        cards.append(Card(claim, claim.measure(bench), gpu, record_label(bench.record) if bench.record else ""))
    return cards


# --- what a record of the GPU suite says -------------------------------------------------------------------------


def _number(label: str, value: float | None, unit: str) -> tuple[Number, ...]:
    return () if value is None else (Number(label, value, unit),)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def _best_budget(found: dict[str, Any]) -> Any:
    arms = [entry for name, entry in found.items() if name.startswith("budget") and at(entry, "itl_ms", "p99")]
    return min(arms, key=lambda entry: entry["itl_ms"]["p99"], default=None)


def _gpu_first_token(bench: Workbench) -> tuple[Number, ...]:
    found = bench.part("chunked")
    own = _ratio(at(_best_budget(found), "ttft_long_ms", "p50"), at(found, "prefill first", "ttft_long_ms", "p50"))
    return _number("the long prompt's own first token, chunks over whole", own, "times")


def _gpu_gaps(bench: Workbench) -> tuple[Number, ...]:
    found = bench.part("chunked")
    gain = _ratio(at(found, "prefill first", "itl_ms", "p99"), at(_best_budget(found), "itl_ms", "p99"))
    return _number("P99 gap of running requests, whole over chunks", gain, "times")


def _gpu_attention(bench: Workbench) -> tuple[Number, ...]:
    numbers: tuple[Number, ...] = ()
    for length, case in bench.part("prefill").items():
        if length.isdigit():
            for peer, name in (("math", "scores written out"), ("flash_attention", "torch's flash attention")):
                gain = _ratio(at(case, peer, "median_ms"), at(case, "ours", "median_ms"))
                numbers += _number(f"{length} tokens, {name}, time over ours", gain, "times")
    return numbers


def _gpu_hits(bench: Workbench) -> tuple[Number, ...]:
    numbers: tuple[Number, ...] = ()
    for length, case in bench.part("prefix").items():
        numbers += _number(f"{length} tokens, all seen, first token", at(case, "gain"), "times sooner")
        numbers += _number(f"{length} tokens, nothing seen, time over not looking", at(case, "miss"), "times")
    return numbers


def _gpu_int4(bench: Workbench) -> tuple[Number, ...]:
    numbers: tuple[Number, ...] = ()
    for batch, case in bench.part("quantized").items():
        numbers += _number(f"decode, batch {batch}, against 16 bits", at(case, "speed", "5", "median"), "times as fast")
    return numbers


def _gpu_busy(bench: Workbench) -> tuple[Number, ...]:
    numbers: tuple[Number, ...] = ()
    for name, case in bench.part("decode").items():
        share = at(case, "stage3", "of_copy")
        numbers += _number(f"decode attention {name}, of the copy bandwidth", share and 100 * share, "%")
    for name, case in bench.part("idle/stage3").items():
        idle = at(case, "idle")
        numbers += _number(f"{name}: device busy", None if idle is None else 100 * (1 - idle), "%")
    return numbers


# --- the claims --------------------------------------------------------------------------------------------------

_LISTED = (
    Claim(
        "C1", GROUPS[0], "K/V memory is 2 × layers × hidden_size × bytes per token.", NOT,
        "It is 2 × layers × K/V heads × head_dim × bytes. The two agree without grouped K/V heads, and on Qwen3-0.6B "
        "by chance.", "01a_kv_cache", batching.hidden_size,
        Claimed(1, 1, "bytes by hidden_size", (
            "SmolLM2-135M, hidden_size over truth", "Qwen3-0.6B, hidden_size over truth",
            "Llama-3-8B, hidden_size over truth",
        )),
    ),
    Claim(
        "C2", GROUPS[0], "A K/V cache turns O(n²) into O(n).", WHEN,
        "one step is meant. Over a whole generation the tokens run become linear; the attention stays quadratic.",
        "01a_kv_cache", batching.per_step,
    ),
    Claim(
        "C4", GROUPS[0], "Continuous batching gives 3 to 5 times the throughput.", WHEN,
        "lengths differ that much. The gain in decode steps is bounded by E[longest of a batch] / E[length].",
        "01b_continuous_batching", batching.bounded_gain,
        Claimed(3, 5, "decode steps saved", (
            "uniform 100..1024, gain", "uniform 100..1024, bound", "exponential, mean 200, gain",
            "exponential, mean 200, bound",
        )),
    ),
    Claim(
        "C18", GROUPS[0], "Padding is a hard part of continuous batching.", NOT,
        "A ragged batch lays tokens end to end and has no padding; attention knows the lengths.",
        "01b_continuous_batching", batching.no_padding,
    ),
    Claim(
        "C3", GROUPS[1], "Paging wastes 0 %.", WHEN,
        "external fragmentation is meant. Inside the last block up to block_size - 1 places stay empty.",
        "02a_paged", memory.last_block,
    ),
    Claim(
        "C11", GROUPS[1], "Contiguous K/V reaches about 20 % utilisation, paged about 100 %.", WHEN,
        "requests are that much shorter than max_model_len: the first number is mostly their ratio.",
        "02a_paged", memory.utilisation,
    ),
    Claim(
        "C21", GROUPS[1], "It needs 50 % less memory.", WHEN,
        "one says of what: K/V reserved, K/V used, weights, or all of it.", "02a_paged", memory.of_what,
        Claimed(2, 2, "memory", (
            "paging, K/V reserved", "paging, K/V that hold tokens", "paging, weights and K/V", "4 bits, weights",
        )),
    ),
    Claim(
        "C7", GROUPS[2], "Flash attention is 2 to 4 times faster and takes 10 to 20 times less memory.", WHEN,
        "the scores were written out before, and the prompt is long. Against torch's fused attention it is not.",
        "03a_flash", attention.against_which,
        Claimed(2, 4, "time of attention", (
            "scores written out, time over stage 3", "torch's fused, time over stage 3",
        )), _gpu_attention,
    ),
    Claim(
        "C12", GROUPS[2], "Flash attention recomputes, fuses dropout and moves O(n² / M) bytes.", NOT,
        "Recomputation and dropout belong to training. The bytes are O(n² d² / M).", "03a_flash",
        attention.traffic_by_tiles,
    ),
    Claim(
        "C19", GROUPS[2], "High GPU utilisation means that attention's arithmetic is the bottleneck.", NOT,
        "It means that some kernel was running. What limits it shows in achieved bandwidth and FLOP/s.", "03b_graphs",
        attention.busy, None, _gpu_busy,
    ),
    Claim(
        "C5", GROUPS[3], "Chunked prefill lowers the time to the first token.", WHEN,
        "somebody else's is meant, and the long prompt's share of a step is limited. Its own comes later; what always "
        "falls is the gap between tokens.", "04a_chunked_prefill", prompts.whose_first_token, None, _gpu_first_token,
    ),
    Claim(
        "C13", GROUPS[3], "A long prefill blocks all decodes, so the time to the first token rises.", NOT,
        "Running requests have their first token: they lose inter-token latency. Waiting ones lose their first token.",
        "04a_chunked_prefill", prompts.who_waits, None, _gpu_gaps,
    ),
    Claim(
        "C14", GROUPS[3], "Small chunks cost kernel launches.", HOLDS,
        "And each chunk reads all weights and all earlier K/V again.",
        "04a_chunked_prefill", prompts.again_and_again,
    ),
    Claim(
        "C6", GROUPS[3], "Prefix caching lowers the time to the first token 3 to 10 times.", WHEN,
        "there is a hit, and the more the longer it is. With nothing to find it must cost next to nothing.",
        "04b_prefix_caching", prompts.on_a_hit,
        Claimed(3, 10, "time to first token", (
            "64 + 8 tokens, 50 % seen, first token", "64 + 8 tokens, 100 % seen, first token",
            "128 + 8 tokens, 100 % seen, first token", "nothing to find, speed",
        )), _gpu_hits,
    ),
    Claim(
        "C15", GROUPS[3], "Prefix caching uses copy-on-write.", NOT,
        "It shares full blocks, which nobody writes again. Copy-on-write serves n > 1 and forks.",
        "02b_sharing_preemption", memory.full_blocks,
    ),
    Claim(
        "C8", GROUPS[4], "GPTQ saves 4 times the memory.", WHEN,
        "the quantised layers are meant, nearly. Embedding and head stay at 16 bits, and small models feel it.",
        "05_gptq", weights.of_the_layers,
        Claimed(4, 4, "bytes of weights", (
            "quantised layers", "SmolLM2-135M, whole model", "Qwen3-0.6B, whole model", "Llama-3-70B, whole model",
        )),
    ),
    Claim(
        "C9", GROUPS[4], "GPTQ changes perplexity by less than 1 %.", WHEN,
        "the model is large, 7B and up as the papers report it. A small one loses several per cent.", "05_gptq",
        weights.how_much_worse,
    ),
    Claim(
        "C10", GROUPS[4], "Choose between GPTQ and PTQ.", NOT,
        "GPTQ is a post-training method: it reads a trained model and a little text, and trains nothing.", "05_gptq",
        weights.after_training,
    ),
    Claim(
        "C16", GROUPS[4], "GPTQ updates the weights row by row, and perplexity falls.", NOT,
        "Column after column, for all rows at once: rows know nothing of each other. Perplexity rises.", "05_gptq",
        weights.columns_not_rows,
    ),
    Claim(
        "C17", GROUPS[4], "GPTQ makes inference 20 to 50 % faster.", WHEN,
        "few rows decode, so that weights are most of what is read. Not in large batches, not in prefill.", "05_gptq",
        weights.few_rows,
        Claimed(1.2, 1.5, "speed of a step", ("decode, 1 row", "decode, 32 rows", "a prompt of 256")), _gpu_int4,
    ),
    Claim(
        "C20", GROUPS[5], "Tensor parallelism's all-reduce is cheap.", WHEN,
        "the link is fast: there are two a layer. Over NVLink they are the smaller part of a step; over PCIe, of a "
        "prompt's, by far the larger.", "07_ledger", links.two_a_layer,
    ),
)  # fmt: skip
CLAIMS = {claim.key: claim for claim in sorted(_LISTED, key=lambda claim: int(claim.key[1:]))}
