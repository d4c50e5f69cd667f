"""The engine: plan, run, update, once per step, and nothing that a stage would change."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from stepengine.core.interrupts import interrupts_held
from stepengine.core.plan import RequestInfo, StepPlan, StepRecord
from stepengine.core.request import CompletionOutput, Request, RequestOutput, SamplingParams, State
from stepengine.core.runner import Runner, StepResult
from stepengine.core.sampler import noise_key
from stepengine.core.seams import KVCache, Limits, Scheduler
from stepengine.core.text import Detokenizer, Tokenizer
from stepengine.errors import InvalidRequest, NoProgress


class Recorder(Protocol):
    """Where records go (a `stepengine.trace.Trace`)."""

    def add_request(self, info: RequestInfo) -> None: ...

    def append(self, record: StepRecord) -> None: ...


@dataclass
class Step:
    """A step in the making; times are on the engine's clock."""

    began: float
    running: float
    plan: StepPlan | None = None
    booked: bool = False


class Engine:
    """Holds the requests and runs them, one step at a time.

    `clock` gives seconds. `recorder` gets every step, or is None. Requests whose step fails or is
    interrupted go back to where they were, so that the engine stays usable.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KVCache,
        runner: Runner,
        limits: Limits,
        eos_ids: Iterable[int] = (),
        tokenizer: Tokenizer | None = None,
        recorder: Recorder | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.cache = cache
        self.runner = runner
        self.limits = limits
        self.tokenizer = tokenizer
        self.recorder = recorder
        self.clock = clock
        self.requests: dict[int, Request] = {}  # those that have not ended, or whose group has not
        self.counters = dict.fromkeys(
            (
                "steps",
                "tokens_computed",
                "tokens_generated",
                "preemptions",
                "swapped_bytes",
                "copied_blocks",
                "prefix_hit_tokens",
                "finished",
            ),
            0,
        )
        self.ttft_ms: list[float] = []
        self._kv_tokens = [0, 0]  # held and reserved by the rows of each step, summed over steps
        self._eos = frozenset(eos_ids)
        self._vocab_size = runner.model.config.vocab_size
        self._seed = seed
        self._next_id = 0
        self._groups: dict[int, list[Request]] = {}
        self._outbox: dict[int, RequestOutput] = {}
        self.claimed: set[int] = set()  # ids whose outputs `step` leaves to whoever collects them by id
        self._aborted: list[tuple[int, str]] = []  # since the last record
        self._forked: list[tuple[int, int]] = []  # since the last record

    # -- requests ---------------------------------------------------------------------------------

    def check(self, prompt_ids: Sequence[int], params: SamplingParams, priority: int = 0, cache_salt: str = "") -> None:
        """Raise `InvalidRequest` if this request could never run; changes nothing."""
        limit = self.limits.max_model_len
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is a {type(params).__name__}; it must be SamplingParams.")
        if isinstance(prompt_ids, (str, bytes)) or not isinstance(prompt_ids, Sequence):
            raise InvalidRequest(f"The prompt is a {type(prompt_ids).__name__}; the engine takes a list of token ids.")
        if len(prompt_ids) == 0:
            raise InvalidRequest("The prompt is empty; it must hold at least one token.")
        for at, token in enumerate(prompt_ids):
            if not isinstance(token, int) or isinstance(token, bool):
                raise InvalidRequest(f"Token {at} of the prompt is {token!r}; token ids are whole numbers.")
            if not 0 <= token < self._vocab_size:
                raise InvalidRequest(
                    f"Token {at} of the prompt is {token}; the vocabulary has ids 0 to {self._vocab_size - 1}."
                )
        if len(prompt_ids) >= limit:
            raise InvalidRequest(
                f"The prompt has {len(prompt_ids)} tokens and max_model_len is {limit}, which must leave room for one "
                f"more; shorten the prompt or raise max_model_len."
            )
        longest = min(len(prompt_ids) + params.max_tokens, limit)
        if longest > self.cache.capacity_tokens:
            raise InvalidRequest(
                f"The request may grow to {longest} tokens and the whole K/V cache holds {self.cache.capacity_tokens}; "
                f"lower max_tokens or give the cache more memory."
            )
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                f"stop is {list(params.stop)!r}, but this model folder has no tokenizer; use stop_token_ids."
            )
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InvalidRequest(f"priority is {priority!r}; it must be a whole number (a lower one goes first).")
        if not isinstance(cache_salt, str):
            raise InvalidRequest(f"cache_salt is {cache_salt!r}; it must be a text, and '' for none.")
        bad = [token for token in params.stop_token_ids if token >= self._vocab_size]
        if bad:
            raise InvalidRequest(f"stop_token_ids holds {bad[0]}; the vocabulary has ids 0 to {self._vocab_size - 1}.")

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int:
        """Queue a prompt of token ids; the id of its output. A lower `priority` goes first.

        From stage 4 K/V are found again only by requests with the same `cache_salt`.
        """
        params = SamplingParams() if params is None else params
        self.check(prompt_ids, params, priority, cache_salt)
        group, now = self._next_id, self.clock()
        seed = noise_key(self._seed, group) if params.seed is None else params.seed
        with interrupts_held():
            self._next_id += params.n
            self._groups[group] = []
            for sample in range(params.n):
                key = noise_key(seed, sample)
                name = group + sample
                request = self._admit(name, prompt_ids, params, priority, group, sample, key, now, cache_salt)
                self.scheduler.add(request)
        return group

    def _admit(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        priority: int,
        group: int,
        sample: int,
        key: int,
        now: float,
        cache_salt: str,
    ) -> Request:
        """A request that the engine knows and the trace has noted; the scheduler has not seen it yet."""
        request = Request(
            id=request_id,
            prompt_ids=list(prompt_ids),
            params=params,
            max_len=min(len(prompt_ids) + params.max_tokens, self.limits.max_model_len),
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            priority=priority,
            group=group,
            sample=sample,
            noise_key=key,
            cache_salt=cache_salt,
            t_arrived=now,
        )
        if self.tokenizer is not None:
            request.text = Detokenizer(self.tokenizer, request.prompt_ids, params.stop)
        self.requests[request.id] = request
        self._groups[group].append(request)
        if self.recorder is not None:
            self.recorder.add_request(
                RequestInfo(request.id, tuple(prompt_ids), params.max_tokens, priority, group, sample, now, cache_salt)
            )
        return request

    def fork(self, request_id: int, params: SamplingParams | None = None) -> int:
        """Split a request (or one sample) in two between steps; the id of the new one, which has an output of its own.

        Both have all tokens so far and share their K/V; what either writes from now on is its own.
        `params` (n = 1, by default the parent's) are the child's; its max_tokens counts inherited
        tokens too. Without a seed in `params` the child draws other noise than its parent. Beside a
        full batch the child waits its turn. Raises `InvalidRequest`.
        """
        parent = self.requests.get(request_id)
        if parent is None or parent.state is State.FINISHED:
            raise InvalidRequest(
                f"There is no request {request_id!r} in the engine that has not ended, so none to fork."
            )
        if not hasattr(self.scheduler, "fork"):
            raise InvalidRequest(
                f"Request {request_id} cannot be forked: {type(self.scheduler).__name__} cannot share K/V; use stage 2 "
                f"or later."
            )
        key = noise_key(parent.noise_key, parent.forks + 1)
        if params is None:
            params = parent.params.replace(n=1)
        elif isinstance(params, SamplingParams) and params.seed is not None:
            key = noise_key(params.seed, 0)
        self.check(parent.prompt_ids, params, parent.priority)
        if params.n != 1:
            raise InvalidRequest(f"n is {params.n}; a fork is one request, so n must be 1: fork again for another.")
        if params.max_tokens <= parent.num_outputs:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens}, and request {request_id} has {parent.num_outputs} outputs, which "
                f"the fork inherits; raise max_tokens."
            )
        with interrupts_held():
            child_id, parent.forks = self._next_id, parent.forks + 1
            self._next_id += 1
            self._groups[child_id] = []
            prompt, now = parent.prompt_ids, self.clock()
            salt = parent.cache_salt
            child = self._admit(child_id, prompt, params, parent.priority, child_id, 0, key, now, salt)
            for token in parent.output_ids:
                child.token_ids.append(token)
                if child.text is not None:
                    child.text.push(token, may_stop=False)
            child.logprobs, child.cumulative_logprob = list(parent.logprobs), parent.cumulative_logprob
            self._forked.append((request_id, child_id))
            self.scheduler.fork(parent, child)
        return child_id

    def abort(self, request_id: int) -> None:
        """End a request and all its samples, whatever its state; an unknown id is harmless."""
        with interrupts_held():
            for request in self._groups.get(request_id, []):
                if request.state is not State.FINISHED:
                    self.scheduler.finish(request.id, "abort")
                    self._aborted.append((request.id, "abort"))
                    self._ended(request)
            if self._aborted and self.scheduler.idle():
                now = self.clock()
                self._record(Step(now, now), self.scheduler.plan(), None, [])

    def has_unfinished(self) -> bool:
        """True while a request waits or runs."""
        return not self.scheduler.idle()

    # -- one step ---------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; the outputs that have ended and were not handed out before."""
        self.advance()
        return self.collect()

    def advance(self) -> None:
        """Run one step and keep what ended for `collect`; without a request, do nothing."""
        if self.scheduler.idle():
            self._check_nobody_forgotten()
            return
        with self._all_or_nothing() as step:
            plan = self._plan(step)
            result = self.runner.run(plan, self.requests)
            self._update(step, plan, result)

    def _check_nobody_forgotten(self) -> None:
        lost = [request.id for request in self.requests.values() if request.state is not State.FINISHED]
        if lost:
            raise NoProgress(
                f"The scheduler says that it is idle, but requests {lost} have not ended; it must keep every request "
                f"until it ends."
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Step]:
        """A step that fails or is interrupted leaves its requests as they were; blocks stay with their owners."""
        began = self.clock()
        step = Step(began, began)
        try:
            yield step
        except BaseException:
            with interrupts_held():
                self.runner.stream.settle()
                self._undo(step)
            raise

    def _undo(self, step: Step) -> None:
        if step.plan is None or step.booked:
            return
        for chunk in step.plan.chunks:
            request = self.requests.get(chunk.request)
            if request is not None and request.accepts(chunk):
                request.keep(request.computed)
        self._record(step, step.plan, None, [])

    def _plan(self, step: Step, may_be_empty: bool = False) -> StepPlan:
        with interrupts_held():
            plan = step.plan = self.scheduler.plan()
            self.runner.move(plan)
        if not plan.chunks and not may_be_empty:
            raise NoProgress(
                f"Step {plan.step} could run nothing: {plan.blocked or 'the scheduler planned no tokens'}. Abort a "
                f"request, or give the engine more room."
            )
        step.running = self.clock()
        return plan

    def _update(self, step: Step, plan: StepPlan, result: StepResult) -> None:
        with interrupts_held():
            live = [self.requests.get(chunk.request) for chunk in plan.chunks]
            rows = [
                request if request is not None and request.accepts(chunk) else None
                for request, chunk in zip(live, plan.chunks, strict=True)
            ]
            reserved = self.limits.block_size * sum(len(request.blocks) for request in rows if request is not None)
            finished = self.scheduler.update(plan, result.token_ids)
            step.booked = True  # an interrupt that was held back must not undo it
            self._count(plan, result, rows, reserved)
            came = [-1 if request is None else token for request, token in zip(rows, result.token_ids, strict=True)]
            self._record(step, plan, result._replace(token_ids=came), finished)
            for request in [self.requests[request_id] for request_id, _ in finished]:
                self._ended(request)

    def _count(self, plan: StepPlan, result: StepResult, rows: list[Request | None], reserved: int) -> None:
        """Counters, first-token times and log probabilities; `rows` has None where a result came too late."""
        now, counters = self.clock(), self.counters
        counters["steps"] += 1
        counters["tokens_computed"] += plan.num_tokens
        counters["preemptions"] += len(plan.preempted) + len(plan.swapped_out)
        counters["copied_blocks"] += len(plan.copies)
        if swaps := plan.swapped_out + plan.swapped_in:
            counters["swapped_bytes"] += self.runner.pool.block_bytes * sum(len(swap.pairs) for swap in swaps)
        counters["prefix_hit_tokens"] += sum(chunk.cached for chunk in plan.chunks)
        if reserved:
            self._kv_tokens[0] += sum(chunk.end for chunk in plan.chunks)
            self._kv_tokens[1] += reserved
        for row, (request, token) in enumerate(zip(rows, result.token_ids, strict=True)):
            if request is None or token < 0:
                continue
            counters["tokens_generated"] += 1
            if request.t_first is None:
                request.t_first = now
                self.ttft_ms.append(1e3 * (now - request.t_arrived))
            if row in result.logprobs:
                request.logprobs.append(result.logprobs[row])
                request.cumulative_logprob += result.logprobs[row][token].logprob

    def _record(self, step: Step, plan: StepPlan, result: StepResult | None, finished: list[tuple[int, str]]) -> None:
        aborted, self._aborted = tuple(self._aborted), []
        forked, self._forked = tuple(self._forked), []
        if self.recorder is None:
            return
        ids = tuple(result.token_ids) if result is not None else (-1,) * len(plan.chunks)
        record = StepRecord(
            plan, ids, tuple(finished), aborted, forked, step.began, step.running, self.clock(), *(result or ())[2:]
        )
        self.recorder.append(record)

    # -- outputs ----------------------------------------------------------------------------------

    def _ended(self, request: Request) -> None:
        request.t_finished = self.clock()
        if request.text is not None:
            request.text.close()
        group = self._groups[request.group]
        if all(sample.t_finished is not None for sample in group):
            self._outbox[request.group] = self.output(request.group)
            self.counters["finished"] += 1
            del self._groups[request.group]
            for sample in group:
                del self.requests[sample.id]

    def output(self, request_id: int) -> RequestOutput:
        """What a request that has not been handed out yet has produced so far; `KeyError` if unknown."""
        if request_id in self._outbox:
            return self._outbox[request_id]
        group = self._groups[request_id]
        firsts = [sample.t_first for sample in group if sample.t_first is not None]
        ended = all(sample.t_finished is not None for sample in group)
        arrived = group[0].t_arrived
        last = max((sample.t_finished or arrived for sample in group), default=arrived)
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=list(group[0].prompt_ids),
            outputs=[_completion(sample, self.tokenizer) for sample in group],
            finished=ended,
            ttft_ms=1e3 * (min(firsts) - arrived) if firsts else None,
            e2e_ms=1e3 * (last - arrived) if ended else None,
        )

    def collect(self, request_ids: Iterable[int] | None = None) -> list[RequestOutput]:
        """Hand out ended outputs, each once: all that nobody claimed, or those of `request_ids` that have ended."""
        if request_ids is None:
            request_ids = [request_id for request_id in self._outbox if request_id not in self.claimed]
        ids = [request_id for request_id in request_ids if request_id in self._outbox]
        self.claimed.difference_update(ids)
        return [self._outbox.pop(request_id) for request_id in ids]

    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made, and the K/V blocks as they are now.

        kv_utilization: tokens held / tokens reserved by the rows of a step, over all steps (None where
        nothing is stored). blocks_used, blocks_shared (by two requests or more), waste_tokens (room in
        used blocks that holds nothing): now. ttft_ms: the mean (None before the first token).
        """
        mean = sum(self.ttft_ms) / len(self.ttft_ms) if self.ttft_ms else None
        held, reserved = self._kv_tokens
        utilization = held / reserved if reserved else None
        unfinished = sum(request.state is not State.FINISHED for request in self.requests.values())
        own = {"unfinished": unfinished, "kv_utilization": utilization, "ttft_ms": mean}
        return {**self.counters, **own, **self._blocks()}

    def _blocks(self) -> dict[str, int]:
        """Who holds what of the K/V storage now."""
        size = self.limits.block_size
        tokens: dict[int, int] = {}  # block -> tokens held
        shared: set[int] = set()
        for request in self.requests.values():
            for at, block in enumerate(request.blocks):
                shared |= {block} & tokens.keys()
                tokens[block] = max(tokens.get(block, 0), min(max(request.computed - at * size, 0), size))
        return {
            "num_blocks": self.limits.num_blocks,
            "blocks_used": len(tokens),
            "blocks_shared": len(shared),
            "waste_tokens": len(tokens) * size - sum(tokens.values()),
        }


def _completion(request: Request, tokenizer: Tokenizer | None) -> CompletionOutput:
    wants = request.params.logprobs is not None
    entries = [
        {
            token: value._replace(decoded_token=tokenizer.decode([token]) if tokenizer else None)
            for token, value in e.items()
        }
        for e in request.logprobs
    ]
    return CompletionOutput(
        index=request.sample,
        text=request.text.text if request.text is not None else "",
        token_ids=request.output_ids,
        cumulative_logprob=request.cumulative_logprob if wants else None,
        logprobs=entries if wants else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
