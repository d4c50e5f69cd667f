"""Sentences about blocks that several requests hold: starts from another's prompt, copies before a write, growth."""

from collections.abc import Sequence

from stepengine.core.plan import Chunk, Copy
from stepengine.viz.words.scene import NAMES, Scene, agree, count, listed
from stepengine.viz.words.work import Work


def donor(scene: Scene, chunk: Chunk) -> int | None:
    """The sample of the same prompt whose blocks the chunk starts with."""
    hits, info = chunk.blocks[: scene.hits(chunk)], scene.info
    if not hits or scene.before is None:
        return None
    same = (r for r in info if r != chunk.request and info[r].group == info[chunk.request].group)
    return next((r for r in same if scene.before.table[r][: len(hits)] == hits), None)


def samples(scene: Scene, works: Sequence[Work]) -> list[str]:
    """Those that start from the prompt of another sample; the like ones together."""
    alike: dict[tuple[int | None, int, int, int], list[int]] = {}
    for work in works:
        chunk = work.chunk
        key = (donor(scene, chunk), chunk.cached, chunk.start, chunk.length)
        alike.setdefault(key, []).append(chunk.request)
    if len(alike) > 2:
        ids = [work.chunk.request for work in works]
        shared, ran = sum(work.chunk.start for work in works), sum(work.chunk.length for work in works)
        return [f"{scene.who(ids)} start from other samples' prompts: {shared} tokens shared, {ran} to compute."]
    parts = []
    for (giver, cached, start, length), ids in alike.items():
        assert giver is not None
        blocks = -(-cached // scene.size)
        begin = f"{scene.who(ids)} {agree(ids, 'starts', 'start')} from {scene.who([giver], False)}'s prompt: "
        each = " each" if len(ids) > 1 else ""
        if start < cached:  # the prompt fills its last block
            parts.append(
                f"{begin}all {count(cached, 'token')} shared ({count(blocks, 'block')}). Only the last runs again, for "
                "its logits: its block is full, so nothing is written and nothing copied."
            )
        else:
            parts.append(
                f"{begin}{count(cached, 'token')} shared ({count(blocks, 'block')}), {length} to compute{each}."
            )
    return parts


def resumed(scene: Scene, works: Sequence[Work]) -> list[str]:
    """Those that gave everything back and begin anew; the ones that find nothing kept together."""
    anew = [work for work in works if not work.chunk.start]
    parts = []
    if anew:
        ids, ran = [work.chunk.request for work in anew], sum(work.chunk.length for work in anew)
        again = ran - sum(work.new for work in anew)
        run = f"{count(ran, 'token')} run, {again} of them again"
        parts.append(f"{scene.who(ids)} {agree(ids, 'resumes', 'resume')}: nothing was kept, {run}.")
    for work in works:
        chunk, giver = work.chunk, donor(scene, work.chunk)
        hits = scene.hits(chunk)
        if giver is not None:
            held = f"{count(chunk.cached, 'token')} shared ({count(hits, 'block')})"
            whose = f"{scene.who([chunk.request])} resumes from {scene.who([giver], False)}'s prompt"
            parts.append(f"{whose}: {held}, {chunk.length} to compute.")
        elif chunk.start:
            reused = f" ({count(hits, 'block')} reused)" if hits else ""
            held = f"{count(chunk.start, 'token')} still cached{reused}"
            parts.append(f"{scene.who([chunk.request])} resumes: {held}, {chunk.length} to compute.")
    return parts


def copied(scene: Scene) -> list[str]:
    """Copies before a write, by the block that was shared."""
    sources: dict[int, list[Copy]] = {}
    for copy in scene.plan.copies:
        sources.setdefault(copy.source, []).append(copy)
    if len(sources) > 2:
        ids = list(dict.fromkeys(copy.request for copy in scene.plan.copies))
        return [f"{scene.who(ids)} {agree(ids, 'writes', 'write')} into blocks that others share: each gets a copy."]
    parts = []
    for source, copies in sources.items():
        left = [request for request, table in scene.now.table.items() if source in table]
        ids = [copy.request for copy in copies]
        share = f"{scene.who(ids)} {agree(ids, 'writes', 'write')} into block {source}, which {len(left + ids)} share: "
        new = listed([str(copy.destination) for copy in copies]) if len(ids) <= NAMES else str(len(ids))
        got = f"it gets a copy, block {new}" if len(ids) == 1 else f"each gets a copy, blocks {new}"
        got = got if len(ids) <= NAMES else "each gets a copy"
        keeps = f"; {scene.who(left, False)} keeps block {source}" if len(left) == 1 else ""
        parts.append(f"{share}{got}{keeps}.")
    return parts


def grown(scene: Scene) -> list[str]:
    """Blocks that were full, in a step that has nothing else to tell."""
    grown = [work.chunk for work in scene.work if work.chunk.blocks]
    if not grown or scene.layout != "blocks":
        return []
    free = scene.replay.num_blocks - len(scene.now.refs)
    left = f"{free or 'none'} {'stays' if free < 2 else 'stay'} free"
    if len(grown) > (2 if scene.labels[grown[0].request].isdigit() else NAMES):
        return [f"{len(grown)} of them take a new block; {left}."]
    takes = [f"{scene.who([chunk.request], False)} block {listed([str(b) for b in chunk.blocks])}" for chunk in grown]
    takes[0] = takes[0].replace(" block ", " takes block ", 1)
    begin = "Its blocks are full:" if len(scene.work) == 1 else "Where blocks are full,"
    return [f"{begin} {listed(takes)}; {left}."]
