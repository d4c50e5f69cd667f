"""Every exhibit shows its symptom and breaks its contract; the healthy part beside it does neither."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM
from stepengine.errors import InvalidSetting
from stepengine.faults import MUSEUM, NINTH, Exhibit, Visit, alone, exhibit, first_wrong
from stepengine.faults.figures import lost_blocks, where_blocks_are
from stepengine.trace import Replay

ALL = (*MUSEUM, NINTH)
WORDS = [each for each in ALL if each.name not in ("leaked block", "starved request")]
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
each_exhibit = pytest.mark.parametrize("each", ALL, ids=[each.name for each in ALL])
each_wrong_text = pytest.mark.parametrize("each", WORDS, ids=[each.name for each in WORDS])


@pytest.fixture
def weights(checkpoint: Callable[..., Path], smollm2_tokenizer: Any) -> Path:
    """The default model's tokenizer, so that blocks hold the same words, and tiny weights that differ by position."""
    folder = checkpoint(vocab_size=len(smollm2_tokenizer), hidden_size=32)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def visit(weights: Path) -> Callable[..., Visit]:
    """visit(exhibit, part=None): its workload on tiny weights, with the broken part unless another is given."""

    def run(each: Exhibit, part: Any = None) -> Visit:
        return each.run(part, None if each.workload.model == "tiny-random" else weights)

    return run


@each_exhibit
def test_its_contract_fails_on_it_for_the_stated_promise(each: Exhibit):
    report = each.report()
    assert each.promise in [failure.promise for failure in report.failed], report
    assert each.catch().startswith(each.promise) and "\n" in each.catch()


@each_exhibit
def test_its_contract_passes_on_the_healthy_part(each: Exhibit):
    report = each.report(each.healthy)
    assert report.ok, report


@each_exhibit
def test_only_a_few_lines_of_one_method_differ(each: Exhibit):
    changed = [line for line in each.diff(0).splitlines() if line[:1] in "+-"]
    assert 1 <= len(changed) <= 5, each.diff()
    own = [name for name, value in vars(each.broken).items() if callable(value)]
    assert own == [each.method]


@each_exhibit
def test_a_guess_can_be_right(each: Exhibit):
    assert each.answer in each.choices and len(set(each.choices)) == len(each.choices) >= 2


@each_exhibit
def test_the_healthy_part_runs_the_workload_to_its_end(each: Exhibit, visit: Callable[..., Visit]):
    run = visit(each, each.healthy)
    ended = [output.finished for output in run.outputs]
    assert not run.stopped and len(ended) == len(each.workload.asks)
    assert all(ended) or len(run.trace.steps) == each.workload.steps, "it is neither over nor out of steps"
    assert not run.told()[1]


@each_exhibit
def test_the_broken_part_stays_within_its_steps(each: Exhibit, visit: Callable[..., Visit]):
    run = visit(each)
    assert 0 < len(run.trace.steps) <= each.workload.steps + 1
    assert len(run.outputs) == len(run.ids) and len(run.free) <= len(run.trace.steps)


@each_wrong_text
def test_tokens_are_wrong_and_healthy_ones_are_what_each_gets_alone(
    each: Exhibit, visit: Callable[..., Visit], weights: Path
):
    broken, healthy = visit(each), visit(each, each.healthy)
    quiet = LLM(weights, stage=0, max_num_seqs=2, max_model_len=128)
    right = [sample.token_ids for output in alone(each.workload, quiet) for sample in output.outputs]
    assert all(first_wrong(got, want) is None for got, want in zip(healthy.tokens, right, strict=True))
    assert any(first_wrong(got, want) is not None for got, want in zip(broken.tokens, right, strict=False))


def test_the_leak_is_counted_and_ends_in_nothing_free(visit: Callable[..., Visit]):
    each = exhibit("leaked block")
    broken, healthy = visit(each), visit(each, each.healthy)
    assert not any(lost_blocks(healthy)) and healthy.free[-1] == 32
    lost = lost_blocks(broken)
    assert lost == sorted(lost) and lost[-1] > 25 and "0 are free" in broken.stopped
    ended = [first_wrong(a, b) is None for a, b in zip(broken.tokens, healthy.tokens, strict=True)]
    assert all(ended), "what it says is right"
    assert broken.trace.steps and sum(output.finished for output in broken.outputs) < len(broken.outputs)
    assert where_blocks_are(broken).layout.title.text.endswith("neither held nor free")


def test_the_early_hit_takes_a_block_that_is_not_full(visit: Callable[..., Visit]):
    run = visit(exhibit("early hit"))
    now = Replay(run.trace).at(1)
    hit = next(chunk for chunk in now.chunks if chunk.cached)
    assert hit.cached == 32 and now.block_tokens[hit.blocks[0]] == 32  # B's tokens count as computed ...
    assert now.computed[0] == 8 and now.table[0][0] == hit.blocks[0]  # ... in a block of which A has run 8


def test_the_freed_block_contradicts_the_trace(visit: Callable[..., Visit]):
    told, contradiction = visit(exhibit("freed block")).told()
    assert "which is not free" in contradiction and len(told.steps) == 3
    Replay(told).after(-1)


def test_mixed_rows_are_right_until_somebody_has_a_priority(visit: Callable[..., Visit]):
    run = visit(exhibit("mixed rows"))
    sampled = run.trace.output_ids()
    assert all(tuple(got) != sampled[number] for number, got in zip(run.ids, run.tokens, strict=True))
    assert all(got[:6] == list(sampled[number][:6]) for number, got in zip(run.ids[:2], run.tokens, strict=False))


def test_the_stale_blocks_stand_in_two_tables(visit: Callable[..., Visit]):
    run = visit(exhibit("stale K/V"))
    assert any(step.plan.preempted for step in run.trace.steps)
    back = next(at for at, step in enumerate(run.trace.steps) if any(c.cached for c in step.plan.chunks))
    table = Replay(run.trace).at(back).table
    assert set(table[2]) & set(table[3]) and run.trace.requests[2].prompt_ids != run.trace.requests[3].prompt_ids


def test_the_large_request_is_overtaken(visit: Callable[..., Visit]):
    each = exhibit("starved request")

    def begins(run: Visit) -> dict[int, int]:
        starts: dict[int, int] = {}
        for step in run.trace.steps:
            for chunk in step.plan.chunks:
                starts.setdefault(chunk.request, step.plan.step)
        return starts

    broken, healthy = visit(each), visit(each, each.healthy)
    large = max(broken.ids, key=lambda number: len(broken.trace.requests[number].prompt_ids))
    passed = {
        name: [n for n, at in begins(run).items() if n > large and at < begins(run)[large]]
        for name, run in (("broken", broken), ("healthy", healthy))
    }
    assert len(passed["broken"]) >= 8 and not passed["healthy"]


def test_an_unknown_exhibit_is_named():
    with pytest.raises(InvalidSetting, match="'dropped block'.*'leaked block'"):
        exhibit("dropped block")


@pytest.mark.parametrize("each", ALL, ids=[each.name for each in ALL])
def test_the_notebook_tells_its_symptom(each: Exhibit):
    book = json.loads((NOTEBOOKS / "06_faults.ipynb").read_text(encoding="utf-8"))
    prose = " ".join(" ".join("".join(cell["source"]).split()) for cell in book["cells"])
    assert each.symptom in prose
    assert all(thread.split("#")[1] in prose for thread in each.threads)
