"""The figures of prefix caching: their numbers are the engine's, and the tree is the one that prompts make."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from stepengine import LLM, SamplingParams
from stepengine.errors import TraceError
from stepengine.trace import Replay
from stepengine.viz.prefix import (
    COLUMNS,
    LONGEST,
    ROWS,
    Node,
    _columns,
    finds_of,
    prefix_counts,
    prefix_hits,
    prefix_tree,
    tree_of,
    ttft_by_hits,
)
from stepengine.viz.template import contrast

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
HEAD = [5 + at % 7 for at in range(12)]


def engine(**settings):
    sizes = {"block_size": 4, "num_blocks": 40, "max_num_seqs": 4, "max_model_len": 96} | settings
    return LLM("tiny-random", **({"stage": "4b", "trace": True} | sizes))


def figure_of(llm, prompts, params=GREEDY):
    llm.generate(prompts, params)
    return llm.trace


def paths_of(nodes):
    """Beginnings as tuples of beginnings, from the nodes' links alone."""
    parents = {node.beginning: node.parent for node in nodes}
    found = set()
    for beginning in parents:
        path = [beginning]
        while parents.get(path[-1], -1) >= 0:
            path.append(parents[path[-1]])
        found.add(tuple(reversed(path)))
    return found


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


@pytest.mark.parametrize(("stage", "index"), [("4b", "hash"), ("4b", "radix"), (4, "hash")])
def test_the_tree_holds_each_whole_beginning_once(stage, index):
    """Against brute force: all whole-block beginnings of all computed tokens."""
    llm = engine(stage=stage, prefix_index=index)
    prompts = [HEAD + [30 + n] * n for n in range(9)] + [HEAD[1:], HEAD[:7]]
    trace = figure_of(llm, prompts)
    replay = Replay(trace)
    now = replay.at(-1)
    outputs = trace.output_ids()
    wanted = set()
    for request, info in trace.requests.items():
        tokens = (*info.prompt_ids, *outputs[request])[:-1]  # the last one never ran
        wanted |= {tuple(tokens[: end + 4]) for end in range(0, len(tokens) - 3, 4)}
    nodes = tree_of(replay, now)
    got = {
        tuple(token for beginning in path for token in replay.beginnings[beginning][1]) for path in paths_of(nodes)
    }  # fmt: skip
    assert got == wanted
    assert all(node.depth == len(path) - 1 for node, path in _with_paths(nodes))
    assert sum(len(node.blocks) for node in nodes) == len(now.holds)
    rows = sorted({node.row for node in nodes})
    assert rows == list(range(len(rows)))
    assert len({(node.row, node.depth) for node in nodes}) == len(nodes), "no two on one place"


def _with_paths(nodes):
    by_last = {path[-1]: path for path in paths_of(nodes)}
    return [(node, by_last[node.beginning]) for node in nodes]


def test_a_path_is_what_was_found_and_what_is_new():
    llm = engine()
    figure_of(llm, [HEAD + [50] * 6])
    request = llm.engine.add_request(HEAD + [51] * 9, GREEDY)
    llm.engine.step()
    trace, step = llm.trace, len(llm.trace.steps) - 1
    chunk = trace.steps[step].plan.chunks[0]
    replay = Replay(trace)
    nodes = tree_of(replay, replay.at(step), request)
    assert (sum(n.found for n in nodes) * 4, sum(n.new for n in nodes)) == (chunk.cached, 2) == (12, 2)
    figure = prefix_tree(trace, step, request)
    assert figure.layout.title.text == "B finds 12 of its 21 tokens and computes 9"
    assert len(named(figure, "found").x) == 3
    assert len(named(figure, "new in this step").x) == 2
    assert len(named(figure, "kept").x) == 2  # of the first request's own five blocks, two are B's as well
    words = " ".join(note.text for note in figure.layout.annotations)
    assert "+ 1 token, block not full" in words and "kept, nobody holds it" in words
    assert "dotted: kept" in words and "wedge: found" in words


def test_a_path_of_chunks_grows_chunk_by_chunk():
    llm = engine(stage=4, max_num_batched_tokens=8)
    llm.generate([HEAD], GREEDY.replace(max_tokens=1))
    first = len(llm.trace.steps)
    llm.generate([HEAD + [77] * 15], GREEDY.replace(max_tokens=1))
    replay = Replay(llm.trace)
    steps = range(first, len(llm.trace.steps))
    chunks = [llm.trace.steps[t].plan.chunks[0] for t in steps]
    assert [(c.start, c.end, c.cached) for c in chunks] == [(12, 20, 12), (20, 27, 0)]
    counts = [[(n.found, n.new) for n in tree_of(replay, replay.at(t), 1)] for t in steps]
    assert [(sum(f for f, _ in c), sum(n for _, n in c)) for c in counts] == [(3, 2), (0, 1)]
    title = prefix_tree(llm.trace, first, 1).layout.title.text
    assert title == "B finds 12 of its 27 tokens and computes 8 in this step"


def test_references_and_letters_are_the_tables():
    llm = engine()
    for prompt in (HEAD + [60], HEAD + [61], HEAD[:8] + [62]):
        llm.engine.add_request(prompt, GREEDY.replace(max_tokens=9))
        llm.engine.step()
    trace = llm.trace
    now = Replay(trace).at(-1)
    figure = prefix_tree(trace)
    assert sorted(named(figure, "references").text) == sorted(str(n) for n in now.refs.values() if n > 1)
    assert f"{len(now.holds)} blocks can be found, 3 shared" in figure.layout.title.text
    letters = [*named(figure, "letters").text, *named(figure, "letters on dark").text]
    held = [block for table in now.table.values() for block in table if block in now.holds]
    assert len(letters) == len(held)


def test_equal_blocks_side_by_side_are_one_square():
    llm = engine()
    trace = figure_of(llm, [HEAD, HEAD, HEAD])  # all in one step: nothing is found, all compute
    figure = prefix_tree(trace, 0)
    assert "1 +2" in named(figure, "block numbers").text or "+2" in " ".join(named(figure, "block numbers").text)
    assert prefix_counts(trace)[2].found == 0


def test_what_does_not_branch_is_folded_and_what_does_is_seen():
    llm = engine(block_size=2, num_blocks=90)
    trace = figure_of(llm, [[9] * 70])
    llm.generate([[9] * 40 + [8] * 20], GREEDY)
    replay = Replay(trace)
    deepest = max(node.depth for node in tree_of(replay, replay.at(-1)))
    assert deepest > LONGEST
    figure = prefix_tree(trace)
    texts = [note.text for note in figure.layout.annotations]
    assert any("blocks" in text for text in texts) and any("···" in text for text in texts)
    drawn = len(named(figure, "block numbers").x)
    hidden = sum(int(text.split()[0]) for text in texts if text.endswith(" blocks"))
    assert drawn < deepest and drawn + hidden >= deepest + 1
    assert "39–40" in texts and "41–42" in texts, "both sides of the fork"


def test_a_tree_with_too_many_columns_is_folded_further_or_refused():
    llm = engine(block_size=1, num_blocks=95, max_num_seqs=2)
    llm.generate([list(range(5, 5 + 90))], GREEDY.replace(max_tokens=1))
    for ends in range(6, 86, 10):
        llm.generate([[*range(5, 5 + ends), 200]], GREEDY.replace(max_tokens=1))
    replay = Replay(llm.trace)
    nodes = tree_of(replay, replay.at(-1))
    columns, folded = _columns(nodes)
    assert len(columns) <= COLUMNS and sorted(depth for depths in columns for depth in depths) == list(
        range(1 + max(node.depth for node in nodes))
    )
    assert folded
    figure = prefix_tree(llm.trace)
    assert max(max(trace.x) for trace in figure.data if trace.type == "bar" and len(trace.x)) < COLUMNS
    crowded = [
        Node(at, at - 1 if at < 60 else at - 60, at if at < 60 else at - 59, 0 if at < 60 else at - 59, (at,), (), 0,
             True, False, False)
        for at in range(119)
    ]  # fmt: skip
    with pytest.raises(TraceError, match="columns, and 28 fit on a page"):
        _columns(crowded)


def test_many_branches_stay_on_a_page():
    llm = engine(num_blocks=200, max_num_seqs=2)
    trace = figure_of(llm, [[3, 4, 5, 6] + [10 + n] * 5 for n in range(40)])
    figure = prefix_tree(trace)
    assert figure.layout.height < 1300
    assert len(set(named(figure, "block numbers").y)) <= ROWS
    assert any("more, not drawn" in note.text for note in figure.layout.annotations)


def test_tenants_have_trees_of_their_own():
    llm = engine()
    salts = ["red", "blue"]
    llm.generate([HEAD, HEAD], GREEDY, cache_salt=salts)
    for salt, (request, info) in zip(salts, llm.trace.requests.items(), strict=True):
        llm.trace.requests[request] = SimpleNamespace(**info._asdict() | {"cache_salt": salt})
    replay = Replay(llm.trace)
    nodes = tree_of(replay, replay.at(-1))
    assert len({node.parent for node in nodes if node.depth == 0}) == 2
    assert prefix_tree(llm.trace).data


def traffic(blocks=12):
    rng = random.Random(1)
    llm = engine(num_blocks=blocks, max_num_seqs=2)
    for number in range(12):
        own = [rng.randrange(70, 90) for _ in range(6)]
        llm.generate([(HEAD if number % 3 else own * 2) + own], GREEDY)
    return llm


def test_hits_are_counted_as_the_engine_counts_them():
    llm = traffic()
    stats, trace = llm.stats(), llm.trace
    evicted = sum(len(record.plan.evicted) for record in trace.steps)
    assert evicted > 0
    for by in ("request", "step"):
        counts = prefix_counts(trace, by)
        assert len(counts) == len(trace.requests if by == "request" else trace.steps)
        assert sum(c.found for c in counts) == stats["prefix_hit_tokens"] > 0
        assert sum(c.evicted for c in counts) <= 4 * evicted
        assert sum(c.found + c.computed for c in counts) == sum(len(i.prompt_ids) for i in trace.requests.values())
        figure = prefix_hits(trace, by)
        assert sum(named(figure, "found").y) == stats["prefix_hit_tokens"]
        assert sum(named(figure, "given up").y) == -sum(c.evicted for c in counts)
    assert sum(c.evicted for c in prefix_counts(trace, "step")) == 4 * evicted


def test_a_run_without_evictions_says_so():
    llm = engine()
    figure = prefix_hits(figure_of(llm, [HEAD + [40]]))
    assert figure.layout.title.text == "0 of 13 prompt tokens are found (0 %); nothing is given up"
    assert all(trace.name != "given up" for trace in figure.data)


def test_first_tokens_are_drawn_against_the_share_found():
    llm = engine(num_blocks=200, max_model_len=64)
    llm.generate([HEAD * 4], GREEDY)
    requests = [llm.generate([HEAD * n + [50 + n] * (48 - 12 * n) + [49]], GREEDY)[0].request_id for n in range(5)]
    finds = finds_of(llm.trace, requests)
    assert [(f.prompt, f.found, f.computed) for f in finds] == [(49, 12 * n, 49 - 12 * n) for n in range(5)]
    assert all(f.ttft_ms > 0 for f in finds)
    figure = ttft_by_hits(llm.trace, requests)
    assert np.allclose(figure.data[0].x, [100 * 12 * n / 49 for n in range(5)])
    assert list(figure.data[0].y) == [49 - 12 * n for n in range(5)]
    assert figure.layout.title.text.startswith("Prompt of 49: with 98 % found")


def test_refusals_say_what_to_do():
    paged = LLM("tiny-random", stage=3, block_size=4, num_blocks=20, max_num_seqs=2, max_model_len=32, trace=True)
    with pytest.raises(TraceError, match="record the run at stage '4b' or 4"):
        prefix_tree(figure_of(paged, [HEAD]))
    llm = engine()
    with pytest.raises(TraceError, match="no whole block is cached yet"):
        prefix_tree(figure_of(llm, [[7]], GREEDY.replace(max_tokens=1)))
    with pytest.raises(TraceError, match="has no path there; it starts in step 0"):
        figure_of(llm, [HEAD])
        prefix_tree(llm.trace, -1, 0)
    with pytest.raises(TraceError, match="by='token' is no way to count"):
        prefix_hits(llm.trace, by="token")
    with pytest.raises(TraceError, match="nothing to compare"):
        ttft_by_hits(llm.trace)


@pytest.mark.parametrize("draw", [prefix_tree, prefix_hits])
def test_every_figure_is_dressed_and_says_what_it_shows(draw):
    figure = draw(traffic().trace)
    assert figure.layout.title.text and figure.layout.meta["alt"]
    assert figure.layout.width <= 760
    assert all(contrast(note.font.color, "#FFFFFF") >= 4.5 for note in figure.layout.annotations if note.font.color)
