"""One sentence per step of a trace: what just happened and why, in numbers that the replay holds."""

from collections.abc import Sequence
from typing import NamedTuple

from stepengine.core.plan import Chunk
from stepengine.trace import Replay, Snapshot, idle_rows
from stepengine.trace.metrics import batching
from stepengine.trace.replay import FINISHED, RUNNING, WAITING
from stepengine.viz.template import request_style

NAMES = 4  # requests that a sentence names; the rest are counted


class Narration(NamedTuple):
    """What is said of a step."""

    text: str
    named: tuple[int, ...]  # ids of the requests that the text names
    event: bool  # more than another token for everybody


class Work(NamedTuple):
    """A chunk and what its tokens are."""

    chunk: Chunk
    new: int  # tokens run for the first time; the other ones are run again
    first: bool  # begins its request, or begins it anew after it gave everything back
    resumed: bool  # begins it anew
    prompt: bool  # runs prompt tokens that had not run (or had been given up): prefill


def narrate(replay: Replay, t: int) -> str:
    """The sentence for step t (negative counts from the end). TraceError where t is outside the trace."""
    return Narrator(replay).explain(t).text


class Narrator:
    """Explains the steps of one trace; what depends on the whole history is gathered once."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.trace = replay.trace
        self.labels = {request: request_style(self.trace, request).label for request in self.trace.requests}
        self.idle = idle_rows(self.trace)
        self.work = _work(replay)
        self.slots = 0 < int(self.trace.meta.get("max_model_len") or 0) == replay.block_size and replay.num_blocks > 0
        self.static = batching(self.trace) == "static"

    def explain(self, t: int) -> Narration:
        """The sentence, whom it names, and whether the step is worth a stop."""
        before = self.replay.after(t - 1) if t > 0 else None
        now = self.replay.at(t)
        story = _Story(self, now, before)
        return story.tell()


class _Story:
    """One step being put into words."""

    def __init__(self, narrator: Narrator, now: Snapshot, before: Snapshot | None) -> None:
        self.n, self.now, self.before = narrator, now, before
        self.work = narrator.work[now.index]
        self.plan = now.record.plan
        self.named: list[int] = []
        self.ended = [request for request, _ in now.record.finished]

    def tell(self) -> Narration:
        parts = [*self._interrupted(), *self._started(), *self._decoded(), *self._waiting(), *self._finished()]
        if not self.work:
            parts.insert(0, "Nothing runs in this step.")
        record = self.now.record
        decodes = bool(self.work) and not any(work.first or work.prompt for work in self.work)
        ends = (record.finished, record.aborted, record.forked)
        moves = (self.plan.arrived, self.plan.preempted, self.plan.swapped_out, self.plan.swapped_in)
        event = not decodes or any(ends) or any(moves)
        return Narration(" ".join(parts), tuple(dict.fromkeys(self.named)), event)

    # what happened before anything ran

    def _interrupted(self) -> list[str]:
        record, parts = self.now.record, []
        for parent, child in record.forked:
            parts.append(f"{self._who([parent])} splits: {self._who([child], False)} goes on from its tokens.")
        for request, _ in record.aborted:
            parts.append(f"{self._who([request])} is aborted after {_n(len(self.now.outputs[request]), 'token')}.")
        if self.plan.preempted:
            parts.append(self._preempted())
        for swap in self.plan.swapped_out:
            parts.append(f"{self._who([swap.request])} moves to the host: {_n(len(swap.pairs), 'block')}.")
        for swap in self.plan.swapped_in:
            parts.append(f"{self._who([swap.request])} comes back from the host: {_n(len(swap.pairs), 'block')}.")
        return parts

    def _preempted(self) -> str:
        """Who gave way, to what need: counted before anything was given back."""
        size, victims = self.n.replay.block_size, list(self.plan.preempted)
        if self.before is None:
            return f"{self._who(victims)} {_verb(victims, 'gives', 'give')} way."
        before = self.before
        running = [r for r, state in before.state.items() if state == RUNNING]
        missing = {r: -(-self._total(r) // size) - len(before.table[r]) for r in running} if size else {}
        need, free = sum(max(0, m) for m in missing.values()), self.n.replay.num_blocks - len(before.refs)
        given = sum(len(before.table[r]) for r in victims)
        cause = f"{_n(need, 'block')} {'is' if need == 1 else 'are'} needed, {free} free: " if need > free else ""
        youngest = ", the youngest," if len(victims) == 1 and victims[0] == max(running, default=-1) else ""
        who = self._who(victims, not cause)
        return f"{cause}{who}{youngest} {_verb(victims, 'gives', 'give')} back {_n(given, 'block')}."

    # what ran

    def _started(self) -> list[str]:
        whole, parts = [], []
        for work in self.work:
            chunk, prompt = work.chunk, self._prompt(work.chunk.request)
            if not (work.first or work.prompt):
                continue
            if work.resumed:
                parts.append(self._resumed(work))
            elif work.first and chunk.cached:
                parts.append(
                    f"{self._who([chunk.request])} starts late: {_n(chunk.start, 'token')} of its {prompt} found in "
                    f"the cache ({_n(self._hits(chunk), 'block')} reused), {chunk.length} to compute."
                )
            elif work.first and chunk.end >= prompt:
                whole.append(chunk)
            else:
                verb = "starts" if work.first else "goes on with its prompt"
                parts.append(
                    f"{self._who([chunk.request])} {verb}: tokens {chunk.start} to {chunk.end - 1} of its {prompt} run."
                )
        if whole:
            parts.insert(0, self._whole_prompts(whole))
        rows = {work.chunk.request for work in self.work}
        ready = [r for r, state in self.now.state.items() if state == RUNNING and r not in rows]
        if ready and any(work.first for work in self.work):
            parts.append(f"{self._who(ready)} {_verb(ready, 'sits', 'sit')} this step out.")
        return parts

    def _whole_prompts(self, chunks: Sequence[Chunk]) -> str:
        ids = [chunk.request for chunk in chunks]
        tokens = sum(chunk.length for chunk in chunks)
        if len(ids) == 1:
            run = f"its {_n(tokens, 'prompt token')} {'runs' if tokens == 1 else 'run'} at once and "
            return f"{self._who(ids)} starts: {run}{'gives' if tokens == 1 else 'give'} its first token."
        counts = _list([str(chunk.length) for chunk in chunks]) if len(ids) <= NAMES else str(tokens)
        return f"{self._who(ids)} start: {counts} prompt tokens run in one step, and each gets its first token."

    def _resumed(self, work: Work) -> str:
        chunk = work.chunk
        who = self._who([chunk.request])
        if chunk.start:
            hits = self._hits(chunk)
            reused = f" ({_n(hits, 'block')} reused)" if hits else ""
            return f"{who} resumes: {_n(chunk.start, 'token')} still cached{reused}, {chunk.length} to compute."
        run = f"{_n(chunk.length, 'token')} run, {chunk.length - work.new} of them again"
        return f"{who} resumes: nothing was kept, {run}."

    def _decoded(self) -> list[str]:
        rows = [work for work in self.work if not (work.first or work.prompt)]
        if not rows:
            return []
        ids = [work.chunk.request for work in rows]
        ran = sum(work.chunk.length for work in rows)
        again = ran - sum(work.new for work in rows)
        read = sum(work.chunk.start for work in rows)
        if len(ids) <= NAMES:
            who = self._who(ids)
        else:
            who = f"{len(ids)} requests"
        gets = f"{who} {'gets its next token' if len(ids) == 1 else 'get one token each'}: "
        run = f"{_n(ran, 'token')} {'runs' if ran == 1 else 'run'}"
        if not self.n.replay.num_blocks:
            said = f"{gets}{run}, {again} of them again, because nothing was kept"
        else:
            run += f", {again} of them again" if again else ""
            verb = "is" if read == 1 else "are"
            said = f"{gets}{run}, the K/V of {_n(read, 'earlier one')} {verb} read from the cache"
        idle = self.n.idle[self.now.index]
        return [f"{said}; {_n(idle, 'slot')} {'stands' if idle == 1 else 'stand'} idle." if idle else f"{said}."]

    # what the step left behind

    def _finished(self) -> list[str]:
        parts = []
        for reason in dict.fromkeys(reason for _, reason in self.now.record.finished):
            ids = [r for r, why in self.now.record.finished if why == reason]
            if len(ids) > NAMES:
                parts.append(self._end(f"{self._who(ids)} end", ids, reason))
            else:
                counts = [len(self.now.outputs[r]) for r in ids]
                counts = counts[:1] if len(set(counts)) == 1 else counts
                after = f" after {_list([str(c) for c in counts])} token{'s' if counts != [1] else ''}"
                verb = _verb(ids, "ends", "end")
                parts.append(self._end(f"{self._who(ids)} {verb}{after}", ids, reason))
        running = [r for r, s in self.now.state.items() if s == RUNNING and r not in self.ended]
        if parts and self.n.static and running:
            place = "Its place in the batch stays" if len(self.ended) == 1 else "Their places in the batch stay"
            parts.append(f"{place} idle: {self._who(running, False)} {_verb(running, 'is', 'are')} still running.")
        elif parts and all(s == FINISHED or r in self.ended for r, s in self.now.state.items()):
            parts.append("All requests are done.")
        elif parts and self.n.static:
            parts.append("The batch is over.")
        return parts

    def _end(self, said: str, ids: Sequence[int], reason: str) -> str:
        return f"{said}{self._why(ids, reason)}{self._give_back(ids)}".rstrip(",") + "."

    def _why(self, ids: Sequence[int], reason: str) -> str:
        if reason == "stop":
            return " with a stop token or text"
        asked = [self.n.trace.requests[r].max_tokens for r in ids]
        if all(len(self.now.outputs[r]) == limit for r, limit in zip(ids, asked, strict=True)):
            return ", as many as asked for,"
        return " at a length limit" if reason == "length" else f" ({reason})"

    def _give_back(self, ids: Sequence[int]) -> str:
        blocks = sum(len(self.now.table[r]) for r in ids)
        if not blocks:
            return ""
        noun = "K/V slot" if self.n.slots else "block"
        whose = (
            ("its" if blocks == 1 else f"its {blocks}")
            if len(ids) == 1
            else f"{'their' if blocks > 1 else 'its'} {blocks}"
        )
        return f" and {_verb(ids, 'gives', 'give')} back {whose} {noun}{'s' if blocks > 1 else ''}"

    def _waiting(self) -> list[str]:
        waiting = [r for r, state in self.now.state.items() if state == WAITING]
        arrived = [r for r in self.plan.arrived if r in waiting]
        if not waiting or not (arrived or self.plan.blocked):
            return []
        ids = arrived or waiting
        verb = _verb(ids, "arrives and waits", "arrive and wait") if arrived else _verb(ids, "waits", "wait")
        places = int(self.n.trace.meta.get("max_num_seqs") or 0)
        full = places > 0 and sum(state == RUNNING for state in self.now.state.values()) >= places
        why = self._relabel(self.plan.blocked) or (f"all {places} places are taken" if full else "")
        why = f": {why}" if why else ""
        return [f"{self._who(ids)} {verb}{why}."]

    # words

    def _who(self, ids: Sequence[int], start: bool = True) -> str:
        """The requests by name, at most `NAMES` of them; `start` of a sentence or within one."""
        shown = list(ids) if len(ids) <= NAMES else list(ids)[: NAMES - 1]
        self.named += shown
        labels = [self.n.labels[r] for r in shown]
        if len(shown) < len(ids):
            labels.append(f"{len(ids) - len(shown)} others")
        if not self.n.labels[shown[0]].isdigit():
            return _list(labels)
        return f"{'R' if start else 'r'}equest{'s' if len(ids) > 1 else ''} {_list(labels)}"

    def _relabel(self, words: str) -> str:
        """A scheduler's reason with its request id turned into the label that the pictures use."""
        head, found, rest = words.partition("request ")
        digits = rest.split(" ", 1)[0]
        if not found or head or not digits.isdigit() or int(digits) not in self.n.labels:
            return words
        return self._who([int(digits)], False) + rest[len(digits) :]

    def _prompt(self, request: int) -> int:
        return len(self.n.trace.requests[request].prompt_ids)

    def _total(self, request: int) -> int:
        assert self.before is not None
        return self._prompt(request) + len(self.before.outputs[request])

    def _hits(self, chunk: Chunk) -> int:
        size = self.n.replay.block_size
        return -(-chunk.cached // size) if size else 0


def _work(replay: Replay) -> list[tuple[Work, ...]]:
    """Every step's chunks, each with what its tokens are."""
    trace = replay.trace
    high: dict[int, int] = {}  # tokens of a request that have run at least once
    seen: set[int] = set()
    dropped: set[int] = set()
    steps = []
    for record in trace.steps:
        dropped |= set(record.plan.preempted)
        for parent, child in record.forked:
            high[child] = high.get(parent, 0)
            seen |= {child} if parent in seen else set()
        row = []
        for chunk in record.plan.chunks:
            request = chunk.request
            first = request not in seen or request in dropped
            mark = high.get(request, 0)
            prompt = len(trace.requests[request].prompt_ids)
            # without storage a decode runs the prompt too, again: prefill is what had not run
            prefill = mark < prompt or (request in dropped) or (replay.num_blocks > 0 and chunk.start < prompt)
            row.append(
                Work(chunk, max(0, chunk.end - max(mark, chunk.start)), first, first and request in seen, prefill)
            )
            high[request] = max(mark, chunk.end)
            seen.add(request)
            dropped.discard(request)
        steps.append(tuple(row))
    return steps


def _n(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _verb(ids: Sequence[int], one: str, many: str) -> str:
    return one if len(ids) == 1 else many


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
