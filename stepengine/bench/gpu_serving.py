"""Parts of the GPU suite for stage 4: gaps between tokens while long prompts arrive, first tokens on a prefix hit."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from stepengine.bench import runs, workloads
from stepengine.bench.gpu_setup import Setup, attempt, best_switches, engine
from stepengine.bench.workloads import Workload
from stepengine.llm import LLM

Entries = Iterator[tuple[str, Any]]
TAIL = 64  # tokens behind a prefix, never seen
SALT = "seen"


def chunked(setup: Setup) -> Entries:
    """Milliseconds between tokens of running requests while long prompts come in: prefill first, then by budget.

    "4b" runs whole prompts alone, "4a" pieces beside the decodes; both with all switches on.
    """
    running, outputs, long, count = setup.of((64, 256, 8192, 6), (3, 12, 40, 2))
    ids = workloads.corpus(None, setup.config.vocab_size)
    work = workloads.long_arrivals(ids, 0, running, outputs, long, count, short=setup.of(256, 8))
    for stage, budget in (("4b", None), *(("4a", budget) for budget in setup.of((256, 512, 1024, 2048), (16,)))):
        name = "prefill first" if budget is None else f"budget {budget}"
        yield name, attempt(lambda s=stage, b=budget: _gaps(setup, s, b, work))


def _gaps(setup: Setup, stage: str, budget: int | None, work: Workload) -> dict[str, Any]:
    longest, places = work.longest, len(work.prompts)
    budget = budget or setup.of(max(8192, longest), None)
    llm = engine(setup, stage, places, longest, trace=True, max_num_batched_tokens=budget, **best_switches(stage))
    runs.run(llm, work)  # compiles and captures
    done = [runs.run(llm, work) for _ in range(setup.of(3, 1))]
    gaps = [gap for run in done for index in run.workload.of("running") for gap in run.requests[index].itl_ms]
    firsts = [run.requests[index].ttft_ms for run in done for index in run.workload.of("long")]
    return {
        "itl_ms": runs.quantiles(gaps),
        "ttft_long_ms": runs.quantiles(firsts),
        "tokens_per_s": median(run.tokens_per_s for run in done),
        "budget": llm.engine.limits.max_num_batched_tokens,
    }


def prefix(setup: Setup) -> Entries:
    """Milliseconds to the first token of one request alone, by the share of its prefix that was seen before.

    "without" is stage 3, which looks for nothing: what a miss costs is the share 0 over that.
    """
    generator = torch.Generator().manual_seed(0)
    for length in setup.of((1024, 4096), (32,)):
        shares = attempt(lambda n=length: _first_tokens(setup, n, generator))
        yield str(length), shares


def _first_tokens(setup: Setup, length: int, generator: torch.Generator) -> dict[str, Any]:
    tail, rounds = setup.of((TAIL, 15), (8, 2))
    vocab, longest = setup.config.vocab_size, length + tail + 16

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (count,), generator=generator).tolist())

    def ttft(llm: LLM, tokens: tuple[int, ...]) -> float:
        run = runs.run(llm, Workload("one prompt", (tokens,), (1,), 0), salt=SALT)
        return float(run.requests[0].ttft_ms or 0.0)

    budget = setup.of(8192, None)
    engines = {
        name: engine(setup, stage, 2, longest, trace=True, max_num_batched_tokens=budget, **best_switches(stage))
        for name, stage in (("without", "3"), ("with", "4b"))
    }
    seen = drawn(length)
    for llm in engines.values():
        for _ in range(2):
            ttft(llm, seen + drawn(tail))
    ms: dict[str, list[float]] = {}
    for _ in range(rounds):  # in turns
        ms.setdefault("without", []).append(ttft(engines["without"], drawn(length + tail)))
        for share in (0.0, 0.5, 0.9, 1.0):
            kept = int(share * length)
            ms.setdefault(str(share), []).append(ttft(engines["with"], seen[:kept] + drawn(length - kept + tail)))
    middle = {name: median(values) for name, values in ms.items()}
    return {
        "ms": middle,
        "samples": ms,
        "gain": middle["0.0"] / middle["1.0"],
        "miss": median(a / b for a, b in zip(ms["0.0"], ms["without"], strict=True)),
    }
