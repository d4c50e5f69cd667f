"""One run of one workload through one engine, with a trace of its own."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stepengine.bench.traffic import Traffic, counted
from stepengine.bench.workloads import Chats, Workload
from stepengine.core.request import RequestOutput
from stepengine.errors import InvalidSetting
from stepengine.llm import LLM
from stepengine.model.catalog import resolve
from stepengine.model.config import ModelConfig
from stepengine.model.loader import load_decoder
from stepengine.stages import Stage, find_stage
from stepengine.trace import Trace, summarize
from stepengine.trace.metrics import RequestMetrics, percentiles, request_metrics


@dataclass
class Run:
    """The tokens that a workload got, one list per sample in its order, and the trace of how."""

    workload: Workload
    token_ids: list[list[int]]
    trace: Trace
    traffic: Traffic | None = None  # of runs that `run_counted` made

    @cached_property
    def step_ms(self) -> tuple[list[float], list[float]]:
        """Milliseconds of the steps that start requests (again, after a preemption by recompute), and of decodes."""
        seen: set[int] = set()
        times: tuple[list[float], list[float]] = ([], [])
        for record in self.trace.steps:
            rows = {chunk.request for chunk in record.plan.chunks}
            seen -= set(record.plan.preempted)
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

    @cached_property
    def requests(self) -> list[RequestMetrics]:
        """Latencies of each sample, in the workload's order."""
        return request_metrics(self.trace)

    def itl_ms(self, kind: str) -> dict[str, float]:
        """{"p50", "p99"} of the gaps between tokens of one kind of request, which has some."""
        return quantiles(gap for index in self.workload.of(kind) for gap in self.requests[index].itl_ms)

    def ttft_ms(self, kind: str) -> dict[str, float]:
        """{"p50", "p99"} of the times to the first token of one kind of request."""
        return quantiles(self.requests[index].ttft_ms for index in self.workload.of(kind))

    @property
    def counts(self) -> Traffic:
        """What `run_counted` counted."""
        assert self.traffic is not None, "this run was not counted"
        return self.traffic

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of the model that ran, as loaded."""
        return int(self.trace.meta["weight_bytes"])

    @property
    def hit_tokens(self) -> int:
        """Tokens whose K/V were found rather than computed."""
        return sum(chunk.cached for record in self.trace.steps for chunk in record.plan.chunks)


def quantiles(values: Iterable[float | None]) -> dict[str, float]:
    """{"p50", "p99"} of those that are not None."""
    found = percentiles(value for value in values if value is not None)
    assert found is not None, "no such request got that far"
    return found


def build(
    model: str | Path,
    stage: str,
    slots: int,
    max_model_len: int,
    device: str = "cpu",
    places: int | None = None,
    **settings: Any,
) -> LLM:
    """An engine in fp32 with a trace, and K/V memory for exactly `slots` requests of `max_model_len` tokens.

    The bytes are the same in every stage that stores K/V (block 0 aside). From stage 2 on they are
    blocks, and up to `places` requests (by default `slots`) may run in them. `settings` go to `LLM`.
    """
    found = find_stage(stage)
    if found.parts.block_pool is not None:
        size = found.parts.block_size(max_model_len, settings.get("block_size"))
        settings = {"num_blocks": slots * -(-max_model_len // size), **settings}
    elif found.number:  # exactly, or a large one could be over the default budget
        token = ModelConfig.from_folder(resolve(model)).kv_bytes_per_token(torch.float32)
        settings = {"kv_cache_memory": slots * max_model_len * token, **settings}
    return LLM(
        model,
        stage=stage,
        device=device,
        dtype="float32",
        max_num_seqs=places if places and found.parts.block_pool is not None else slots,
        max_model_len=max_model_len,
        trace=True,
        **settings,
    )


def own_weights(stage: Stage) -> bool:
    """Whether a stage runs other weights than the checkpoint's: its tokens are then its own."""
    return stage.parts.prepare_model is not load_decoder


def share_weights(engines: Iterable[LLM]) -> None:
    """Let all engines of one model run the first one's weights: then only what is compared differs.

    At one `max_model_len`. Raises `InvalidSetting` for a stage that makes weights of its own.
    """
    first, *others = engines
    for llm in others:
        if own_weights(llm.stage) or own_weights(first.stage):
            raise InvalidSetting(
                f"Stages {first.stage.name} and {llm.stage.name} cannot share weights: one of them makes its own."
            )
        llm.engine.runner.model = first.engine.runner.model


def trace_of(llm: LLM) -> Trace:
    """The trace of an engine that records one, as those of `build` do."""
    assert llm.trace is not None
    return llm.trace


def run(llm: LLM, workload: Workload, told: Callable[[int], object] | None = None, salt: str | None = None) -> Run:
    """Run the workload to its end, each request added when it is due. `told` gets the tokens of each step.

    K/V of runs before are found again only by a run with the same `salt`; without one a run has its own.
    """
    trace = llm.trace = Trace({**trace_of(llm).meta, "workload": workload.name}, llm.tokenizer)
    llm.engine.recorder = trace
    due = workload.after or (0,) * len(workload.prompts)
    coming = deque(zip(due, workload.prompts, workload.params(), strict=True))
    salt = f"after step {llm.engine.counters['steps']}" if salt is None else salt
    ids: list[int] = []
    outputs: dict[int, RequestOutput] = {}
    given = seen = 0
    while coming or llm.engine.has_unfinished():
        while coming and (coming[0][0] <= given or not llm.engine.has_unfinished()):
            _, prompt, params = coming.popleft()
            ids.append(llm.engine.add_request(list(prompt), params, cache_salt=salt))
        outputs |= {output.request_id: output for output in llm.engine.step()}
        came = sum(token >= 0 for record in trace.steps[seen:] for token in record.token_ids)
        given, seen = given + came, len(trace.steps)  # of a pipelined engine, a step's record comes one step later
        if told is not None:
            told(came)
    samples = [sample for request in ids for sample in outputs[request].outputs]
    return Run(workload, [sample.token_ids for sample in samples], trace)


def run_counted(llm: LLM, workload: Workload) -> Run:
    """Run the workload with every operator counted, which takes longer: its times say nothing."""
    with counted(llm) as traffic:
        done = run(llm, workload)
    return replace(done, traffic=traffic)


def run_chats(llm: LLM, chats: Chats, told: Callable[[int], object] | None = None) -> list[Run]:
    """Run conversations turn by turn, every turn on what the one before it answered; one run per turn.

    The trace of a later turn alone cannot be replayed where it finds blocks of the turns before it.
    """
    salt = f"chats before run {llm.engine.counters['steps']}"
    turns: list[Run] = []
    before: list[list[int]] = []
    for number in range(len(chats.said)):
        work = chats.turn(number, before)
        turns.append(run(llm, work, told, salt))
        before = [[*prompt, *ids] for prompt, ids in zip(work.prompts, turns[-1].token_ids, strict=True)]
    return turns


def warm(llm: LLM, workload: Workload) -> None:
    """Run a little of the workload, so that first-use costs are not measured."""
    prompts = workload.prompts[:2]
    run(llm, Workload("warm-up", prompts, (2,) * len(prompts), workload.seed))
