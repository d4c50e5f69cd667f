"""Requests: what a user asks for, what the engine keeps while it runs, what comes back."""

import dataclasses
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from stepengine.core.plan import Chunk
from stepengine.errors import InvalidRequest, StepEngineError


class State(Enum):
    """WAITING <-> RUNNING <-> SWAPPED, RUNNING -> FINISHED; an abort ends a request from any state."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


LARGEST = 1e30  # a temperature or penalty beyond it has no float32 effect that is still a number


def _real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    size: Any = abs(value)
    return bool(size <= LARGEST)


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    items = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not all(_whole(item) and item >= 0 for item in items):
        raise InvalidRequest(f"stop_token_ids is {value!r}; it must be a list of token ids, each at least 0.")
    return tuple(int(item) for item in items)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Names and meanings are vLLM's.

    n: samples of the same prompt. temperature: 0 is greedy. top_k: 0 or -1 is off. stop: strings that
    end the text and are cut from it. ignore_eos: go on after EOS. logprobs: also return this many most
    likely tokens' log probabilities (of the raw logits) per token. seed: the same seed gives the same
    tokens in any company; sample i of n draws from (seed, i). Raises `InvalidRequest`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()  # one string, a list or None are taken too
    stop_token_ids: tuple[int, ...] = ()  # a list or None are taken too
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidRequest(f"stop is {self.stop!r}; it must be one string or a list of strings, none empty.")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids))
        seed_ok = self.seed is None or _whole(self.seed)
        logprobs_ok = self.logprobs is None or (_whole(self.logprobs) and 0 <= self.logprobs <= 1000)
        checks: list[tuple[bool, str, str]] = [
            (_whole(self.n) and self.n >= 1, "n", "a whole number, at least 1"),
            (_real(self.temperature) and self.temperature >= 0, "temperature", "a number, at least 0 (0 is greedy)"),
            (_real(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1 is off)"),
            (_whole(self.top_k) and self.top_k >= -1, "top_k", "a whole number, at least 1 (0 or -1 is off)"),
            (_real(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1"),
            (
                _real(self.repetition_penalty) and self.repetition_penalty > 0,
                "repetition_penalty",
                "above 0 (1 is off)",
            ),
            (_real(self.presence_penalty) and abs(self.presence_penalty) <= 2, "presence_penalty", "from -2 to 2"),
            (_real(self.frequency_penalty) and abs(self.frequency_penalty) <= 2, "frequency_penalty", "from -2 to 2"),
            (seed_ok, "seed", "a whole number or None"),
            (isinstance(self.ignore_eos, bool), "ignore_eos", "True or False"),
            (_whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number, at least 1"),
            (_whole(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "a whole number, at least 0"),
            (logprobs_ok, "logprobs", "None or a whole number from 0 to 1000"),
        ]
        for ok, name, allowed in checks:
            if not ok:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it must be {allowed}.")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; lower one or raise the other."
            )

    @cached_property
    def looks_back(self) -> bool:
        """Whether the tokens so far bear on the next one."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or self.min_tokens > 0

    @cached_property
    def steered(self) -> bool:
        """Whether more than the logits and the temperature decide."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.looks_back

    @cached_property
    def needs_logits(self) -> bool:
        """Whether logits are wanted for more than the choice of a token."""
        return self.steered or self.logprobs is not None

    @cached_property
    def needs_host(self) -> bool:
        """Whether a step with this request cannot be launched before the step before it has ended."""
        return self.looks_back or self.logprobs is not None

    def replace(self, **changes: object) -> "SamplingParams":
        """The same settings with some changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


class Logprob(NamedTuple):
    """Log probability of one token under the raw logits, and its rank (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample: its text and tokens so far, and why it ended (None while it runs)."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = None  # the stop token or string; None for EOS


@dataclass
class RequestOutput:
    """What a request has produced: one `CompletionOutput` per sample."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    ttft_ms: float | None = None  # arrival to first token of any sample
    e2e_ms: float | None = None  # arrival to last token of the last sample


class TextStream(Protocol):
    """Turns a request's tokens into text as they come (see `core.text`)."""

    stopped_by: str | None

    @property
    def text(self) -> str:
        """What may be shown so far."""

    def push(self, token: int, may_stop: bool) -> bool:
        """Take one token; True when a stop string has appeared."""

    def close(self) -> None:
        """The request has ended: release text that was held back."""


@dataclass(eq=False)
class Request:
    """One sequence of tokens on its way through the engine.

    `scheduled` counts tokens handed to the device (`plan` advances it), `computed` those whose K/V
    survive (`update` advances it); both fall back when a cache forgets or a request is preempted.
    `epoch` grows whenever work in flight must be ignored.

    `token_ids` may end in `expected` placeholders: tokens that a step in flight samples, each standing as
    -1 - its row there. They count in `num_tokens`, since planning goes by counts, and in nothing that is shown.
    """

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    max_len: int  # prompt and output together never get longer than this
    stop_ids: frozenset[int] = frozenset()  # EOS (unless ignored) and stop_token_ids
    priority: int = 0  # lower goes first
    group: int = -1  # id of the first sample of the same prompt; unless given, its own
    sample: int = 0
    noise_key: int = 0  # 32-bit key of the sampling noise, from (seed, sample)
    cache_salt: str = ""  # K/V are found again only by requests with the same salt
    text: TextStream | None = None
    t_arrived: float = 0.0
    t_first: float | None = None
    t_finished: float | None = None
    token_ids: list[int] = field(init=False)  # prompt and output
    scheduled: int = 0
    computed: int = 0
    expected: int = 0
    blocks: list[int] = field(default_factory=list)  # block table
    state: State = State.WAITING
    epoch: int = 0
    forks: int = 0  # times it was forked
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.group = self.id if self.group < 0 else self.group

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt and output, expected ones included."""
        return len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) : len(self.token_ids) - self.expected]

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids) - self.expected

    @property
    def due(self) -> int:
        """Tokens to hand to the device; 0 while the last one that the request may have is on its way to the host."""
        return 0 if self.expected and self.num_tokens >= self.max_len else self.num_tokens - self.scheduled

    def accepts(self, chunk: Chunk) -> bool:
        """Whether a result of `chunk` still belongs to this request."""
        return self.state is State.RUNNING and self.epoch == chunk.epoch

    def schedule(self, blocks: tuple[int, ...] = (), cached: int = 0, most: int | None = None) -> Chunk:
        """Hand tokens that are not yet scheduled to the device, as one chunk: all of them, or at most `most`."""
        start = self.scheduled
        self.scheduled = self.num_tokens if most is None else min(self.num_tokens, start + most)
        self.blocks.extend(blocks)
        return Chunk(self.id, start, self.scheduled - start, blocks, cached, self.epoch)

    def expect(self, row: int) -> None:
        """The step that has just been launched samples the next token in this row."""
        self.token_ids.append(-1 - row)
        self.expected += 1

    def learn(self, token: int) -> None:
        """Take the next token: the oldest expected one, or a new one."""
        if self.expected:
            self.token_ids[-self.expected] = token
            self.expected -= 1
        else:
            self.token_ids.append(token)

    def forget_expected(self) -> None:
        """Give up what a step in flight samples; running again would sample the same."""
        del self.token_ids[len(self.token_ids) - self.expected :]
        self.expected = 0

    def keep(self, tokens: int) -> None:
        """K/V of the first `tokens` tokens are there; the newest token runs in any case, for its logits."""
        self.forget_expected()
        self.computed = tokens
        self.scheduled = min(tokens, self.num_tokens - 1)

    def give_way(self, state: State, kept: int = 0) -> None:
        """Stop running with the K/V of `kept` tokens; results in flight are ignored."""
        self.state = state
        self.keep(kept)
        self.epoch += 1


def stop_reason(request: Request, token: int) -> str | None:
    """Take `token` as the request's newest; "stop", "length", or None when it goes on.

    The one place that ends a request by what it produced. Order as in vLLM: stop tokens before
    strings before length; no stop before `min_tokens`.
    """
    request.learn(token)
    may_stop = request.num_outputs > request.params.min_tokens
    if may_stop and token in request.stop_ids:
        request.stop_reason = token if token in request.params.stop_token_ids else None
        return "stop"
    if request.text is not None and request.text.push(token, may_stop):
        request.stop_reason = request.text.stopped_by
        return "stop"
    return "length" if request.num_tokens - request.expected >= request.max_len else None


def settle(request: Request, chunk: Chunk, token: int, survives: int) -> str | None:
    """Book the result of one chunk: `survives` tokens' K/V remain, `token` was sampled (-1: none).

    Returns why the request ends, or None. A cache that claims K/V of tokens that never ran would
    make every later token wrong, so that is refused at once.
    """
    if not 0 <= survives <= chunk.end:
        raise StepEngineError(
            f"The cache says that K/V of {survives} tokens of request {request.id} survive, but {chunk.end} were "
            f"computed; commit(request, upto) must answer at least 0 and at most upto."
        )
    request.computed = survives
    if survives < chunk.end:
        request.scheduled = survives
    return stop_reason(request, token) if token >= 0 else None
