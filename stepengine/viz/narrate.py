"""One sentence per step of a trace: what just happened and why, in numbers that the replay holds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stepengine.core.plan import Chunk
from stepengine.trace import Replay
from stepengine.trace.metrics import batching, idle_stream
from stepengine.trace.replay import FINISHED, RUNNING, WAITING
from stepengine.viz.template import request_style
from stepengine.viz.words import moves, sharing
from stepengine.viz.words.scene import NAMES, Scene, agree, count, listed
from stepengine.viz.words.work import Work, work_stream

KINDS = ("arrival", "hit", "preemption", "swap", "copy", "fork", "finish")


class Narration(NamedTuple):
    """What is said of a step."""

    text: str
    named: tuple[int, ...]  # ids of the requests that the text names
    event: bool  # more than another token for everybody
    kinds: tuple[str, ...]  # of `KINDS`: what happens in it that one may look for


def narrate(replay: Replay, t: int) -> str:
    """The sentence for step t (negative counts from the end). TraceError where t is outside the trace."""
    return Narrator(replay).explain(t).text


class Narrator:
    """Explains the steps of one trace; what depends on the whole history is gathered once, as far as it is recorded.

    `labels` by request id, where they should not follow from this trace alone.
    """

    def __init__(self, replay: Replay, labels: Mapping[int, str] | None = None) -> None:
        self.replay = replay
        self.trace = replay.trace
        self.static = batching(self.trace) == "static"
        self.layout = _layout(replay)
        self.idle: list[int] = []
        self.work: list[tuple[Work, ...]] = []
        self._given = labels
        self._idle_stream, self._work_stream = idle_stream(self.trace), work_stream(replay)
        self.grow()

    def grow(self) -> None:
        """Take in what the trace has recorded since."""
        own = self._given or {}
        self.labels = {r: own.get(r) or request_style(self.trace, r).label for r in self.trace.requests}
        for _ in range(len(self.work), len(self.replay)):
            self.idle.append(next(self._idle_stream))
            self.work.append(next(self._work_stream))

    def explain(self, t: int) -> Narration:
        """The sentence, whom it names, whether the step is worth a stop, and what kinds of events it has."""
        before = self.replay.after(t - 1) if t > 0 else None
        now = self.replay.at(t)
        scene = Scene(self.replay, self.labels, now, before, self.work[now.index], self.layout)
        text = _told(scene, self.static, self.idle[now.index])
        return Narration(text, tuple(dict.fromkeys(scene.named)), _event(scene), _kinds(scene))


def _layout(replay: Replay) -> str:
    """How K/V are kept: "slots" are blocks as long as a request may get, each with one holder."""
    if not replay.num_blocks:
        return "none"
    meta = replay.trace.meta
    early = str(meta.get("stage", "1")).startswith("1")  # later stages may have blocks as long, and share them
    return "slots" if early and int(meta.get("max_model_len") or 0) == replay.block_size else "blocks"


def _told(scene: Scene, static: bool, idle: int) -> str:
    first = [*_interrupted(scene), *_started(scene)]
    decoded = _decoded(scene, idle, brief=bool(first))
    grown = [] if first else sharing.grown(scene)
    parts = [*first, *decoded, *grown, *_waiting(scene), *_finished(scene, static)]
    return " ".join(parts if scene.work else ["Nothing runs in this step.", *parts])


def _event(scene: Scene) -> bool:
    record, plan = scene.now.record, scene.plan
    decodes = bool(scene.work) and not any(work.first or work.prompt for work in scene.work)
    ends = (record.finished, record.aborted, record.forked)
    return not decodes or any(ends) or any((plan.arrived, plan.preempted, plan.swapped_out, plan.swapped_in))


def _kinds(scene: Scene) -> tuple[str, ...]:
    record, plan = scene.now.record, scene.plan
    there = {
        "arrival": plan.arrived,
        "hit": any(chunk.cached for chunk in plan.chunks),
        "preemption": plan.preempted or plan.swapped_out,
        "swap": plan.swapped_out or plan.swapped_in,
        "copy": plan.copies,
        "fork": record.forked,
        "finish": record.finished or record.aborted,
    }
    return tuple(kind for kind in KINDS if there[kind])


def _interrupted(scene: Scene) -> list[str]:
    record, parts = scene.now.record, []
    for parent, child in record.forked:
        parts.append(moves.forked(scene, parent, child))
    if gone := [request for request, _ in record.aborted]:
        lengths = [len(scene.now.outputs[request]) for request in gone]
        after = listed([str(length) for length in lengths]) if len(gone) <= NAMES else str(sum(lengths))
        noun = "token" if lengths == [1] else "tokens"
        parts.append(f"{scene.who(gone)} {agree(gone, 'is', 'are')} aborted after {after} {noun}.")
    if scene.plan.preempted or scene.plan.swapped_out:
        parts.append(moves.preempted(scene))
    if back := [swap.request for swap in scene.plan.swapped_in]:
        blocks = sum(len(swap.pairs) for swap in scene.plan.swapped_in)
        tokens = sum(scene.before.computed[request] for request in back) if scene.before else 0
        whose = f"none of {agree(back, 'its', 'their')} {count(tokens, 'token')} runs again"
        verb = agree(back, "comes", "come")
        parts.append(f"{scene.who(back)} {verb} back from the host: {count(blocks, 'block')}, and {whose}.")
    return parts


def _started(scene: Scene) -> list[str]:
    whole: list[Chunk] = []
    samples: list[Work] = []
    resumed: list[Work] = []
    parts: list[str] = []
    for work in scene.work:
        chunk, prompt = work.chunk, scene.prompt(work.chunk.request)
        if not (work.first or work.prompt):
            continue
        if work.resumed:
            resumed.append(work)
        elif work.first and sharing.donor(scene, chunk) is not None:
            samples.append(work)
        elif work.first and chunk.cached:
            parts.append(
                f"{scene.who([chunk.request])} starts late: {count(chunk.start, 'token')} of its {prompt} found in "
                f"the cache ({count(scene.hits(chunk), 'block')} reused), {chunk.length} to compute."
            )
        elif work.first and chunk.end > prompt:
            run = f"{count(prompt, 'prompt token')} and the {chunk.end - prompt} generated before it was forked"
            parts.append(f"{scene.who([chunk.request])} starts: its {run} run at once.")
        elif work.first and chunk.end == prompt:
            whole.append(chunk)
        else:
            verb = "starts" if work.first else "goes on with its prompt"
            parts.append(
                f"{scene.who([chunk.request])} {verb}: tokens {chunk.start} to {chunk.end - 1} of its {prompt} run."
            )
    parts = [
        *([_whole_prompts(scene, whole)] if whole else []),
        *sharing.resumed(scene, resumed),
        *sharing.samples(scene, samples),
        *parts,
        *sharing.copied(scene),
    ]
    rows = {work.chunk.request for work in scene.work}
    ready = [r for r, state in scene.now.state.items() if state == RUNNING and r not in rows]
    if ready and any(work.first for work in scene.work):
        parts.append(f"{scene.who(ready)} {agree(ready, 'sits', 'sit')} this step out.")
    elif ready and scene.layout == "blocks" and len(scene.now.refs) == scene.replay.num_blocks:
        parts.append(f"{scene.who(ready)} {agree(ready, 'sits', 'sit')} this step out, as no block is free.")
    return parts


def _whole_prompts(scene: Scene, chunks: Sequence[Chunk]) -> str:
    ids = [chunk.request for chunk in chunks]
    tokens = sum(chunk.length for chunk in chunks)
    if len(ids) == 1:
        run = f"its {count(tokens, 'prompt token')} {'runs' if tokens == 1 else 'run'} at once and "
        return f"{scene.who(ids)} starts: {run}{'gives' if tokens == 1 else 'give'} its first token."
    counts = listed([str(chunk.length) for chunk in chunks]) if len(ids) <= NAMES else str(tokens)
    return f"{scene.who(ids)} start: {counts} prompt tokens run in one step, and each gets its first token."


def _decoded(scene: Scene, idle: int, brief: bool) -> list[str]:
    """Another token for the others; `brief` in a step over blocks that has more to tell."""
    rows = [work for work in scene.work if not (work.first or work.prompt)]
    if not rows:
        return []
    ids = [work.chunk.request for work in rows]
    ran = sum(work.chunk.length for work in rows)
    again = ran - sum(work.new for work in rows)
    read = sum(work.chunk.start for work in rows)
    if len(ids) <= NAMES:
        who = scene.who(ids)
    else:
        who = f"{len(ids)} requests"
    gets = f"{who} {'gets its next token' if len(ids) == 1 else 'get one token each'}: "
    if brief and scene.layout == "blocks":
        return [gets.replace(": ", ".")]
    run = f"{count(ran, 'token')} {'runs' if ran == 1 else 'run'}"
    if not scene.replay.num_blocks:
        said = f"{gets}{run}, {again} of them again, because nothing was kept"
    else:
        run += f", {again} of them again" if again else ""
        verb = "is" if read == 1 else "are"
        said = f"{gets}{run}, the K/V of {count(read, 'earlier one')} {verb} read from the cache"
    idle = idle if scene.layout != "blocks" else 0  # there blocks are short, not places
    return [f"{said}; {count(idle, 'slot')} {'stands' if idle == 1 else 'stand'} idle." if idle else f"{said}."]


def _finished(scene: Scene, static: bool) -> list[str]:
    parts = []
    for reason in dict.fromkeys(reason for _, reason in scene.now.record.finished):
        ids = [r for r, why in scene.now.record.finished if why == reason]
        if len(ids) > NAMES:
            parts.append(_end(scene, f"{scene.who(ids)} end", ids, reason))
        else:
            counts = [len(scene.now.outputs[r]) for r in ids]
            counts = counts[:1] if len(set(counts)) == 1 else counts
            after = f" after {listed([str(c) for c in counts])} token{'s' if counts != [1] else ''}"
            verb = agree(ids, "ends", "end")
            parts.append(_end(scene, f"{scene.who(ids)} {verb}{after}", ids, reason))
    running = [r for r, s in scene.now.state.items() if s == RUNNING and r not in scene.ended]
    if parts and static and running:
        place = "Its place in the batch stays" if len(scene.ended) == 1 else "Their places in the batch stay"
        parts.append(f"{place} idle: {scene.who(running, False)} {agree(running, 'is', 'are')} still running.")
    elif parts and all(s == FINISHED or r in scene.ended for r, s in scene.now.state.items()):
        parts.append("All requests are done.")
    elif parts and static:
        parts.append("The batch is over.")
    return parts


def _end(scene: Scene, said: str, ids: Sequence[int], reason: str) -> str:
    return f"{said}{_why(scene, ids, reason)}{_give_back(scene, ids)}".rstrip(",") + "."


def _why(scene: Scene, ids: Sequence[int], reason: str) -> str:
    if reason == "stop":
        return " with a stop token or text"
    asked = [scene.info[r].max_tokens for r in ids]
    if all(len(scene.now.outputs[r]) == limit for r, limit in zip(ids, asked, strict=True)):
        return ", as many as asked for,"
    return " at a length limit" if reason == "length" else f" ({reason})"


def _give_back(scene: Scene, ids: Sequence[int]) -> str:
    own = {block for r in ids for block in scene.now.table[r]}
    blocks = len(own)
    if not blocks:
        return ""
    others = {block for r, table in scene.now.table.items() if r not in scene.ended for block in table}
    noun = "K/V slot" if scene.layout == "slots" else "block"
    whose = (
        ("its" if blocks == 1 else f"its {blocks}") if len(ids) == 1 else f"{'their' if blocks > 1 else 'its'} {blocks}"
    )
    still = moves.still_held(own & others)
    return f" and {agree(ids, 'gives', 'give')} back {whose} {noun}{'s' if blocks > 1 else ''}{still}"


def _waiting(scene: Scene) -> list[str]:
    waiting = [r for r, state in scene.now.state.items() if state == WAITING]
    children = {child for _, child in scene.now.record.forked}  # told with their fork
    arrived = [r for r in scene.plan.arrived if r in waiting and r not in children]
    if scene.layout == "blocks":
        return moves.queue(scene, waiting, arrived)
    if not waiting or not (arrived or scene.plan.blocked):
        return []
    ids = arrived or waiting
    verb = agree(ids, "arrives and waits", "arrive and wait") if arrived else agree(ids, "waits", "wait")
    places = int(scene.meta.get("max_num_seqs") or 0)
    full = places > 0 and sum(state == RUNNING for state in scene.now.state.values()) >= places
    why = scene.relabel(scene.plan.blocked) or (f"all {places} places are taken" if full else "")
    why = f": {why}" if why else ""
    return [f"{scene.who(ids)} {verb}{why}."]
