"""One run of one workload through one engine, with a trace of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stepengine.bench.workloads import Workload
from stepengine.llm import LLM
from stepengine.trace import Trace, summarize


@dataclass
class Run:
    """The tokens that a workload got, in its order, and the trace of how."""

    workload: Workload
    token_ids: list[list[int]]
    trace: Trace

    @cached_property
    def step_ms(self) -> tuple[list[float], list[float]]:
        """Milliseconds of the steps that run a request's first chunk (its prompt), and of the others (decodes)."""
        seen: set[int] = set()
        times: tuple[list[float], list[float]] = ([], [])
        for record in self.trace.steps:
            rows = {chunk.request for chunk in record.plan.chunks}
            times[rows <= seen].append(1e3 * (record.t_done - record.t_plan))
            seen |= rows
        return times

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`trace.summarize` of the run."""
        return summarize(self.trace)

    @property
    def tokens_per_s(self) -> float:
        return float(self.summary["tokens_per_s"])


def build(model: str, stage: str, max_num_seqs: int, max_model_len: int, device: str = "cpu") -> LLM:
    """An engine in fp32 with a trace, and room for exactly `max_num_seqs` requests of `max_model_len` tokens."""
    return LLM(
        model,
        stage=stage,
        device=device,
        dtype="float32",
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        trace=True,
    )


def run(llm: LLM, workload: Workload, told: Callable[[int], None] | None = None) -> Run:
    """Run the workload to its end. `told` is called after each step with the tokens it gave."""
    trace = llm.trace = Trace({**llm.trace.meta, "workload": workload.name}, llm.tokenizer)
    llm.engine.recorder = trace
    pairs = zip(workload.prompts, workload.params(), strict=True)
    ids = [llm.engine.add_request(list(prompt), params) for prompt, params in pairs]
    outputs = {}
    while llm.engine.has_unfinished():
        outputs |= {output.request_id: output for output in llm.engine.step()}
        if told is not None:
            told(sum(token >= 0 for token in trace.steps[-1].token_ids))
    return Run(workload, [outputs[request].outputs[0].token_ids for request in ids], trace)


def warm(llm: LLM, workload: Workload) -> None:
    """Run a little of the workload, so that first-use costs are not measured."""
    prompts = workload.prompts[:2]
    run(llm, Workload("warm-up", prompts, (2,) * len(prompts), workload.seed))
