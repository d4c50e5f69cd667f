"""The engine, one step ahead: step n + 1 is planned and launched while step n runs."""

from typing import NamedTuple

from stepengine.core.engine import Engine, Step
from stepengine.core.interrupts import interrupts_held
from stepengine.core.plan import StepPlan
from stepengine.core.request import SamplingParams, State
from stepengine.core.runner import Launched


class Flight(NamedTuple):
    """A step that has been launched and not booked."""

    step: Step
    plan: StepPlan
    launched: Launched
    expects: bool  # whether its tokens stand in the requests, so that the next step can be planned


class PipelinedEngine(Engine):
    """An `Engine` whose `advance` launches a step and then books the one before it.

    Planning needs counts only, so an expected token stands in the request until its step lands. A
    request that turns out to have ended has run one token too many, which is dropped. What needs tokens
    on the host (penalties, min_tokens, log probabilities, a fork, an abort) waits for the step in flight.
    """

    _flight: Flight | None = None
    _next: Step | None = None  # in the making

    def advance(self) -> None:
        """Launch a step, then book the one before it; without a request, do nothing."""
        try:
            if not self._may_overlap():
                self._land()
            if self.scheduler.idle():
                self._check_nobody_forgotten()
                return
            before, flight = self._flight, self._launch()
            if before is not None:
                self._land()
            self._flight = flight
            if self.scheduler.idle() or not self._may_overlap():
                self._land()
        except BaseException:
            with interrupts_held():
                self._abandon()
            raise

    def _may_overlap(self) -> bool:
        """Whether the next step can be planned now: it has something to run, and nobody needs what is on its way."""
        if self._flight is not None and not self._flight.expects:
            return False
        live = [request for request in self.requests.values() if request.state is not State.FINISHED]
        return any(request.due for request in live) and not any(request.params.needs_host for request in live)

    def _launch(self) -> Flight | None:
        began = self.clock()
        step = self._next = Step(began, began)
        plan = self._plan(step, may_be_empty=self._flight is not None)
        if not plan.chunks:  # all places belong to requests whose last token is on its way
            self._land()
            with interrupts_held():
                step.booked = True
                self._record(step, plan, None, [])
            return None
        launched = self.runner.launch(plan, self.requests)
        rows = [self.requests[chunk.request] for chunk in plan.chunks]
        expects = not any(request.params.needs_host for request in rows)  # the device reads their tokens now
        if expects:
            for row, request in enumerate(rows):
                if launched.wanted[row]:
                    request.expect(row)
        return Flight(step, plan, launched, expects)

    def _land(self) -> None:
        """Wait for the step in flight and book it."""
        if self._flight is not None:
            result = self.runner.land(self._flight.launched)
            self._update(self._flight.step, self._flight.plan, result)
            self._flight = None

    def _abandon(self) -> None:
        """Take back what is not booked; the requests run the same tokens again."""
        self.runner.stream.settle()
        flight, step, self._flight, self._next = self._flight, self._next, None, None
        if flight is not None:
            self._undo(flight.step)
        if step is not None and (flight is None or step is not flight.step):
            self._undo(step)

    def land(self) -> None:
        """Book the step in flight, if there is one; afterwards every token that was sampled is known."""
        try:
            self._land()
        except BaseException:
            with interrupts_held():
                self._abandon()
            raise

    def abort(self, request_id: int) -> None:
        try:
            self.land()
        finally:
            super().abort(request_id)

    def fork(self, request_id: int, params: SamplingParams | None = None) -> int:
        self.land()
        return super().fork(request_id, params)
