"""Sentences about blocks that change hands before anything runs, and about those that wait for some."""

from collections.abc import Sequence

from stepengine.trace.replay import SWAPPED, WAITING
from stepengine.viz.words.need import Need, need
from stepengine.viz.words.scene import Scene, agree, count


def forked(scene: Scene, parent: int, child: int) -> str:
    """A request that split in two."""
    who, other = scene.who([parent]), scene.who([child], False)
    tokens, blocks = len(scene.now.outputs[child]), scene.before.table[parent] if scene.before else ()
    if child in scene.plan.arrived:
        inherits = f", with {count(tokens, 'token')} generated so far and no block yet" if tokens else ""
        return f"{who} forks into {other}, which waits{inherits}."
    shared = f"they share {count(len(blocks), 'block')}" if blocks else f"it goes on from {count(tokens, 'token')}"
    return f"{who} forks into {other}: {shared}."


def preempted(scene: Scene) -> str:
    """Who gave way, to what need: counted before anybody gave way."""
    dropped, moved = sorted(scene.plan.preempted), sorted(swap.request for swap in scene.plan.swapped_out)
    gone = [*moved, *dropped]
    if scene.before is None or not scene.size:
        return f"{scene.who(gone)} {agree(gone, 'gives', 'give')} way."
    need_ = need(scene.replay, scene.before, scene.now.record)
    cause = ""
    if need_.blocks > need_.free:
        verb = agree(need_.who, "needs", "need")
        cause = f"{scene.who(need_.who)} {verb} {count(need_.blocks, 'block')}, {need_.free} free: "
    said = []
    rank = "" if moved and dropped else _rank(scene, gone, need_)
    if moved:
        who = f"{scene.who(moved, not cause)}{rank} {agree(moved, 'moves', 'move')} to the host: "
        said.append(f"{who}{_blocks_of(scene, moved, gone, need_)}")
    if dropped:
        who = scene.who(dropped, not (cause or moved))
        full = _host_full(scene, dropped, need_)
        said.append(
            f"{who}{rank} {agree(dropped, 'gives', 'give')} back {_blocks_of(scene, dropped, gone, need_)}{full}"
        )
    return f"{cause}{'; '.join(said)}."


def _rank(scene: Scene, gone: Sequence[int], need_: Need) -> str:
    """What singles out those who gave way, where it is true: nobody after them in line stayed."""
    line, info = need_.line, scene.info
    if len(gone) >= len(line) or set(line[len(line) - len(gone) :]) != set(gone):
        return ""
    last = max(info[request].priority for request in line)
    low = {request for request in line if info[request].priority == last}
    if len(low) == len(line):
        away = [r for r, state in scene.now.state.items() if state in (WAITING, SWAPPED) and r not in gone]
        return ", the youngest running," if any(r > max(gone) for r in away) else ", the youngest,"
    if not set(gone) <= low:
        return ""
    return ", of the lowest priority," if set(gone) == low else ", the youngest of the lowest priority,"


def _blocks_of(scene: Scene, ids: Sequence[int], gone: Sequence[int], need_: Need) -> str:
    """Their blocks, and how many of them stay in use because somebody who stays holds them too."""
    own = {block for request in ids for block in need_.table.get(request, ())}
    others = {b for request, table in need_.table.items() if request not in gone for b in table}
    held = sum(len(need_.table.get(request, ())) for request in ids)
    return f"{count(held, 'block')}{still_held(own & others)}"


def still_held(shared: set[int]) -> str:
    """Of blocks that somebody gives back."""
    return f" ({len(shared)} still held by others)" if shared else ""


def _host_full(scene: Scene, dropped: Sequence[int], need_: Need) -> str:
    """Why they were not swapped out, where the trace would have had them swapped."""
    meta = scene.meta
    assert scene.before is not None
    room = int(meta.get("num_host_blocks") or 0) - sum(len(slots) for slots in scene.before.hosted.values())
    moved = {swap.request: len(swap.pairs) for swap in scene.plan.swapped_out}
    for request in reversed(need_.line):  # the last in line went first
        if request in dropped:
            break
        room -= moved.get(request, 0)
    if meta.get("preemption") != "swap" or room >= min(len(need_.table.get(request, ())) for request in dropped):
        return ""
    return f", as the host has room for {room}" if room else ", as the host is full"


def queue(scene: Scene, waiting: Sequence[int], arrived: Sequence[int]) -> list[str]:
    """Who stays behind, and why: one queue, whose head holds up those behind it."""
    info, parts = scene.info, []
    gone = {*scene.plan.preempted, *(swap.request for swap in scene.plan.swapped_out)}
    hosted = [r for r, state in scene.now.state.items() if state == SWAPPED]
    starting = [work.chunk.request for work in scene.work if work.first and not work.chunk.cached]
    prompts = {info[r].group for r in starting}
    samples = [r for r in waiting if info[r].sample and info[r].group in prompts and r not in gone]
    if samples:
        groups = {info[r].group for r in samples}
        heads = [r for r in starting if info[r].group in groups]
        prompt = (
            f"{scene.who(heads, False)}'s prompt, to share it" if len(groups) == 1 else "the prompts that they share"
        )
        parts.append(f"{scene.who(samples)} {agree(samples, 'waits', 'wait')} for {prompt}.")
    line = sorted({*waiting, *hosted} - gone - set(samples), key=lambda r: (info[r].priority, r))
    if not line:
        return parts
    if scene.plan.blocked:
        head, rest = line[0], [r for r in arrived if r in line[1:]]
        verb = "waits on the host" if head in hosted else "arrives and waits" if head in arrived else "waits"
        behind = f"; {scene.who(rest, False)} {agree(rest, 'arrives', 'arrive')} behind it" if rest else ""
        parts.append(f"{scene.who([head])} {verb}: {scene.relabel(scene.plan.blocked)}{behind}.")
    elif new := [r for r in arrived if r in line]:
        parts.append(f"{scene.who(new)} {agree(new, 'arrives and waits', 'arrive and wait')}.")
    return parts
