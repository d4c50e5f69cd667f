"""A few requests for a small engine, run for a bounded number of steps with a part of the visitor's choice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepengine.core.request import RequestOutput, SamplingParams
from stepengine.errors import StepEngineError, TraceError
from stepengine.llm import LLM
from stepengine.trace import Replay, Trace

MODEL = "smollm2-135m"  # where wrong words are to be read


@dataclass(frozen=True)
class Ask:
    """One request of a workload, of a fixed length.

    prompt: a text or token ids. arrives: the step before which it comes. priority: a lower number goes first.
    forks: the number of the ask that it splits off from, in place of a prompt; `max_tokens` then counts
    what it inherits. seed: with it the tokens are drawn, without it they are the likeliest. n: samples.
    """

    prompt: str | tuple[int, ...] = ""
    max_tokens: int = 16
    arrives: int = 0
    priority: int = 0
    forks: int | None = None
    seed: int | None = None
    n: int = 1

    @property
    def params(self) -> SamplingParams:
        heat = 0.0 if self.seed is None else 1.0
        return SamplingParams(n=self.n, temperature=heat, seed=self.seed, max_tokens=self.max_tokens, ignore_eos=True)


@dataclass(frozen=True)
class Workload:
    """Who asks what, of which engine. steps: after so many it is over, whoever still runs."""

    stage: int | str
    asks: tuple[Ask, ...]
    steps: int
    settings: Mapping[str, Any]
    model: str = "tiny-random"


@dataclass
class Visit:
    """What came of a workload: `outputs[i]` is what ask i got, whether or not it has ended."""

    llm: LLM
    workload: Workload
    ids: list[int] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    free: list[int] = field(default_factory=list)  # blocks that the pool calls free, after each step
    stopped: str = ""  # the engine's sentence, where it could not go on

    @property
    def trace(self) -> Trace:
        assert self.llm.trace is not None
        return self.llm.trace

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids that each ask got, sample by sample."""
        return [sample.token_ids for output in self.outputs for sample in output.outputs]

    @property
    def texts(self) -> list[str]:
        """The words that each ask got, sample by sample."""
        return [sample.text for output in self.outputs for sample in output.outputs]

    def told(self) -> tuple[Trace, str]:
        """The trace as far as it tells one story, and the sentence of the replay that says where it stops doing so.

        The sentence is "" where the whole trace can be replayed.
        """
        replay, whole = Replay(self.trace), self.trace
        for step in range(len(replay)):
            try:
                replay.after(step)
            except TraceError as contradiction:
                part = Trace(whole.meta, whole.tokenizer)
                part.requests, part.steps = whole.requests, whole.steps[:step]
                return part, str(contradiction)
        return whole, ""


def play(workload: Workload, model: str | Path | None = None, **part: Any) -> Visit:
    """Run the workload, with `part` (an argument of `LLM`) in place of the stage's own; `model` in place of its model.

    An error of the engine ends the visit and is kept in it. Raises InvalidSetting as `LLM` does.
    """
    chosen = model if model is not None else workload.model
    llm = LLM(chosen, stage=workload.stage, trace=True, **{**workload.settings, **part})
    visit, left = Visit(llm, workload), list(enumerate(workload.asks))
    ended: dict[int, RequestOutput] = {}
    try:
        for step in range(workload.steps):
            while left and left[0][1].arrives <= step:
                visit.ids.append(_add(llm, left.pop(0)[1], visit.ids))
            if not left and not llm.engine.has_unfinished():
                break
            for output in llm.engine.step():
                ended[output.request_id] = output
            if len(visit.trace.steps) > len(visit.free):  # not where the engine had nothing to do
                visit.free.append(llm.engine.cache.free_tokens // llm.engine.limits.block_size)
    except StepEngineError as error:
        visit.stopped = str(error)
    visit.outputs = [ended[number] if number in ended else llm.engine.output(number) for number in visit.ids]
    return visit


def alone(workload: Workload, llm: LLM) -> list[RequestOutput]:
    """What each ask should get: run one after the other in an engine that has room, a fork like its parent."""
    outputs = []
    for ask in workload.asks:
        prompt = (ask if ask.forks is None else workload.asks[ask.forks]).prompt
        outputs += llm.generate([prompt if isinstance(prompt, str) else list(prompt)], ask.params)
    return outputs


def first_wrong(got: list[int], right: list[int]) -> int | None:
    """The place of the first token that is not the right one; None where all that came are right."""
    return next((at for at, (one, other) in enumerate(zip(got, right, strict=False)) if one != other), None)


def _add(llm: LLM, ask: Ask, ids: list[int]) -> int:
    if ask.forks is not None:
        return llm.engine.fork(ids[ask.forks], ask.params)
    tokens = list(llm.tokenizer.encode(ask.prompt)) if isinstance(ask.prompt, str) else list(ask.prompt)
    return llm.engine.add_request(tokens, ask.params, ask.priority)
