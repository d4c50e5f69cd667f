"""Controls: real runs redone with other settings, what they say of it, and their page (where there is a browser)."""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stepengine import LLM, SamplingParams
from stepengine.errors import InvalidRequest, InvalidSetting, TraceError
from stepengine.trace import Trace
from stepengine.viz.choices import read_setting
from stepengine.viz.compare import Compare
from stepengine.viz.controls import MOST_OWN, Controls, serve
from stepengine.viz.player import StepPlayer

sys.path.insert(0, str(Path(__file__).parent))
from formpage import contrasts, show  # noqa: E402

GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
PROMPTS = [[3 + i] * (5 + i) for i in range(6)]
SETTINGS = {"block_size": [16, 4, 8], "num_blocks": (5, 64), "preemption": ["recompute", "swap"]}


def ids(prompt: str | Sequence[int]) -> list[int]:
    """tiny-random has no tokenizer: a text's bytes will do."""
    return [3 + byte % 200 for byte in prompt.encode()] if isinstance(prompt, str) else list(prompt)


def make(prompts: Any, params: Any, arrivals: Any = None, **settings: Any) -> LLM:
    llm = LLM("tiny-random", stage=2, max_num_seqs=8, max_model_len=64, trace=True, **settings)
    return serve(llm, [ids(prompt) for prompt in prompts], params, arrivals or [0] * len(prompts))


def controls(**more: Any) -> Controls:
    return Controls(make, SETTINGS, PROMPTS, GREEDY, **{"start": {"num_blocks": 16}, **more})


def test_the_first_run_is_the_engine_s_and_shows_a_player() -> None:
    shown = controls()
    alone = LLM("tiny-random", stage=2, max_num_seqs=8, max_model_len=64, num_blocks=16, block_size=16, trace=True)
    outputs = alone.generate(PROMPTS, GREEDY)
    assert list(shown.trace.output_ids().values()) == [tuple(o.outputs[0].token_ids) for o in outputs]
    assert isinstance(shown.player, StepPlayer) and shown.before is None
    assert shown.box.children == (shown.panel, shown.player)
    steps = len(alone.trace.steps)
    assert repr(shown) == f"Controls(block_size=16, num_blocks=16, preemption='recompute': 6 requests, {steps} steps)"
    bundle = shown._repr_mimebundle_()
    assert (bundle[0] if isinstance(bundle, tuple) else bundle)["text/plain"] == repr(shown)


def test_a_turned_setting_is_run_again_and_compared() -> None:
    shown = controls()
    first = shown.trace
    shown.set(block_size=4)
    assert shown.trace is first and shown.panel.pending == "Not run yet: block_size 16 -> 4."
    shown.rerun()
    steps = [len(first.steps), len(shown.trace.steps)]
    away = [sum(len(r.plan.preempted) for r in trace.steps) for trace in (first, shown.trace)]
    assert steps[1] > steps[0] and away[1] > away[0] == 0  # a pool of a quarter of the bytes
    assert shown.sentence.startswith(f"block_size 16 -> 4: {steps[0]} -> {steps[1]} steps, 0 -> {away[1]} preemptions")
    assert shown.sentence.endswith("; the same tokens.")
    assert isinstance(shown.player, Compare) and shown.player.traces == (first, shown.trace)
    rows = {row.name: (row.before, row.now) for row in shown.table}
    assert rows["steps"] == tuple(steps) and rows["preemptions"] == tuple(away)
    computed = [sum(r.plan.num_tokens for r in trace.steps) for trace in (first, shown.trace)]
    assert rows["tokens run"] == tuple(computed)
    assert rows["largest step, tokens"] == tuple(max(r.plan.num_tokens for r in t.steps) for t in (first, shown.trace))
    assert shown.panel.pending == "" and shown.panel.runs == 2
    shown.rerun()
    assert shown.sentence == f"Nothing changed: still {steps[1]} steps; the same tokens."


def test_waste_is_what_the_blocks_in_use_leave_empty() -> None:
    shown = controls(start={"num_blocks": 64})
    waste = {}
    for size in (16, 4):
        shown.set(block_size=size)
        shown.rerun()
        lengths = [[len(prompt) + step for prompt in PROMPTS] for step in range(GREEDY.max_tokens)]
        waste[size] = max(sum(-length % size for length in row) for row in lengths)
        assert {row.name: row.now for row in shown.table}["empty K/V places, most"] == waste[size]
    assert waste[4] < waste[16]


def test_a_request_of_one_s_own_arrives_when_it_is_told_to() -> None:
    shown = controls()
    shown.add("hello", max_tokens=5, arrival=3)
    shown.rerun()
    mine = list(shown.trace.requests)[-1]
    assert shown.trace.requests[mine].prompt_ids == tuple(ids("hello"))
    assert [t for t, record in enumerate(shown.trace.steps) if mine in record.plan.arrived] == [3]
    assert len(shown.trace.output_ids()[mine]) == 5
    assert shown.sentence.startswith("1 request more: ") and shown.sentence.endswith("the same tokens.")
    shown.drop()
    shown.rerun()
    assert len(shown.trace.requests) == len(PROMPTS) and shown.sentence.startswith("1 request fewer: ")


def test_an_arrival_after_everything_has_ended_is_still_served() -> None:
    llm = LLM("tiny-random", stage="1b", max_num_seqs=2, max_model_len=64, trace=True)
    serve(llm, [[5, 6], [7, 8]], [GREEDY.replace(max_tokens=2)] * 2, [0, 50])
    assert [len(tokens) for tokens in llm.trace.output_ids().values()] == [2, 2]  # type: ignore[union-attr]


def test_other_tokens_are_told_by_name() -> None:
    def sampled(prompts: Any, params: Any, seed: int) -> LLM:
        llm = LLM("tiny-random", stage="1b", max_num_seqs=4, max_model_len=64, trace=True)
        llm.generate(prompts, [params[0], params[1].replace(seed=seed, temperature=1.0)])
        return llm

    shown = Controls(sampled, {"seed": [1, 2]}, PROMPTS[:2], GREEDY)
    shown.set(seed=2)
    shown.rerun()
    assert shown.sentence.endswith("; other tokens for B.")


def test_a_refused_run_keeps_the_last_good_one() -> None:
    shown = controls()
    trace, sentence, player = shown.trace, shown.sentence, shown.player
    shown.set(block_size=4, num_blocks=5)
    with pytest.raises(InvalidRequest, match="K/V cache holds 20"):
        shown.rerun()
    assert (shown.trace, shown.sentence, shown.player) == (trace, sentence, player) and not shown.panel.busy
    shown._asked(None, {"do": "run"}, [])
    assert "holds 20" in shown.panel.note and shown.panel.note.endswith("The last run stays.")
    assert shown.trace is trace and shown.panel.runs == 1 and not shown.panel.busy
    shown.set(block_size=16, num_blocks=16)
    shown.rerun()
    assert shown.panel.note == "" and shown.panel.runs == 2


def test_an_interrupted_run_keeps_the_last_good_one() -> None:
    stop = [False]

    def run(prompts: Any, params: Any, **settings: Any) -> LLM:
        if stop[0]:
            raise KeyboardInterrupt
        return make(prompts, params, **settings)

    shown = Controls(run, SETTINGS, PROMPTS, GREEDY, start={"num_blocks": 16})
    trace, stop[0] = shown.trace, True
    with pytest.raises(KeyboardInterrupt):
        shown.rerun()
    shown._asked(None, {"do": "run"}, [])
    assert shown.panel.note == "Interrupted: the last run stays." and shown.trace is trace and not shown.panel.busy


def test_a_fault_in_the_reader_s_own_run_is_a_sentence_on_the_page() -> None:
    shown = controls()
    shown._run = lambda *args, **settings: 1 / 0
    shown._asked(None, {"do": "run"}, [])
    assert shown.panel.note == "run() failed with ZeroDivisionError: division by zero. The last run stays."


def test_settings_that_do_nothing_are_not_passed_on() -> None:
    passed = []

    def run(prompts: Any, params: Any, **settings: Any) -> LLM:
        passed.append(settings)
        stage = settings.pop("stage")
        return serve(
            LLM("tiny-random", stage=stage, max_model_len=64, trace=True, **settings), prompts, params, [0] * 6
        )

    def lacks(values: dict[str, Any]) -> dict[str, str]:
        return {"block_size": "from stage 2 on"} if values["stage"] != 2 else {}

    settings = {"stage": ["1b", 2], "block_size": [16, 4]}
    shown = Controls(run, settings, PROMPTS, GREEDY, lacks=lacks)
    assert "block_size" not in passed[-1] and shown.panel.fields[1]["lacks"] == "from stage 2 on"
    shown.set(stage=2)
    shown.rerun()
    assert passed[-1] == {"block_size": 16} and shown.panel.fields[1]["lacks"] == ""
    assert shown.sentence.startswith("stage 1b -> 2 and block_size 16: ")


@pytest.mark.parametrize(
    "call",
    [
        lambda: Controls(make, {**SETTINGS, "seed": [0, 1]}, PROMPTS, GREEDY),
        lambda: Controls(make, {"block_size": [16]}, PROMPTS, GREEDY),
        lambda: Controls(make, {"block_size": [16, 16]}, PROMPTS, GREEDY),
        lambda: Controls(make, {"block_size": (4, 3)}, PROMPTS, GREEDY),
        lambda: Controls(make, {"block_size": "16"}, PROMPTS, GREEDY),
        lambda: Controls(make, {}, [], GREEDY),
        lambda: Controls(make, {}, PROMPTS, [GREEDY]),
        lambda: Controls(lambda prompts, params: None, {}, PROMPTS, GREEDY, arrivals=[0] * 6),
        lambda: Controls(lambda prompts, params: None, {}, PROMPTS, GREEDY),
        lambda: controls(start={"num_blocks": 4}),
        lambda: controls(start={"nothing": 5}),
        lambda: controls().set(block_size=5),
        lambda: controls().set(block_size="large"),
        lambda: controls().set(num_blocks=True),
        lambda: controls().set(num_blocks=6.5),
        lambda: controls().add(""),
        lambda: controls().add("x", max_tokens=0),
        lambda: controls().add("x", max_tokens="many"),
        lambda: controls().add("x", arrival=-1),
        lambda: controls().drop(),
        lambda: (
            [controls().add("x") for _ in [0]]
            and [shown.add("x") for shown in [controls()] for _ in range(MOST_OWN + 1)]
        ),
    ],
)
def test_bad_input_gets_one_sentence(call: Any) -> None:
    with pytest.raises(InvalidSetting) as error:
        call()
    assert 20 < len(str(error.value)) < 220 and "\n" not in str(error.value)


def test_more_than_three_controls_are_for_the_sandbox() -> None:
    shown = Controls(
        make, {**SETTINGS, "swap_space": [None, 0]}, PROMPTS, GREEDY, start={"num_blocks": 16}, sandbox=True
    )
    assert len(shown.panel.fields) == 4 and shown.panel.fields[3]["value"] == "default"


def test_a_run_without_steps_or_with_an_old_trace_is_refused() -> None:
    with pytest.raises(TraceError, match="0 steps"):
        Controls(lambda prompts, params: Trace({"stage": "0"}), {}, PROMPTS, GREEDY)
    llm = make(PROMPTS, [GREEDY] * 6, num_blocks=16)
    shown = Controls(lambda prompts, params: llm, {}, PROMPTS, GREEDY)
    with pytest.raises(InvalidSetting, match="new LLM"):
        shown.rerun()


def test_what_the_page_may_send() -> None:
    shown = controls()
    messages: list[Any] = [
        None, {}, {"do": "set"}, {"do": "set", "name": "block_size", "value": "5"}, {"do": "set", "name": "num_blocks"},
        {"do": "drop", "number": "x"}, {"do": "add", "request": {}},
        {"do": "add", "request": {"text": "a", "tokens": "x"}},
    ]  # fmt: skip
    for message in messages:
        shown._asked(None, message, [])
    assert shown.values == {"block_size": 16, "num_blocks": 16, "preemption": "recompute"}
    assert len(shown.panel.requests) == 6 and shown.panel.runs == 1
    shown._asked(None, {"do": "set", "name": "block_size", "value": "8"}, [])
    shown._asked(None, {"do": "set", "name": "num_blocks", "value": "20"}, [])
    assert shown.values["block_size"] == 8 and shown.values["num_blocks"] == 20 and shown.panel.note == ""


def test_numbers_keep_their_kind() -> None:
    assert read_setting("n", (4, 64, 4)).check("8") == 8 and isinstance(read_setting("n", (4, 64)).check("8"), int)
    assert read_setting("n", (0.5, 2.0, 0.5)).check("1.5") == 1.5
    with pytest.raises(InvalidSetting, match="in steps of 4"):
        read_setting("n", (4, 64, 4)).check(9)
    assert read_setting("on", True).check(False) is False


def test_a_run_asked_for_in_another_thread_waits_for_the_kernel_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """JupyterLab hands a widget's messages to a thread beside the cells; an engine must not run there."""
    waiting: list[Any] = []

    class Loop:
        def add_callback(self, call: Any, *args: Any) -> None:
            waiting.append((call, args))

    shell = type("Shell", (), {"kernel": type("Kernel", (), {"io_loop": Loop()})()})()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    shown = controls()
    for _ in range(2):  # an impatient reader
        thread = threading.Thread(target=shown._asked, args=(None, {"do": "run"}, []))
        thread.start()
        thread.join()
    assert len(waiting) == 1 and shown.panel.runs == 1
    call, args = waiting[0]
    call(*args)
    assert shown.panel.runs == 2


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_turns_runs_and_adds(browser: Any, tmp_path: Path) -> None:
    shown = controls()
    page = show(browser, shown.panel, tmp_path, shown._asked)
    assert page.inner_text("[data-sentence]") == shown.sentence
    page.focus("[data-control=block_size]")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("document.querySelector('[data-pending]').textContent")
    assert page.inner_text("[data-pending]") == "Not run yet: block_size 16 -> 4."
    assert page.evaluate("document.activeElement.dataset.control") == "block_size"  # redrawn under the reader's hands
    page.focus("[data-do=run]")
    page.keyboard.press("Enter")
    page.wait_for_selector('.controls[data-runs="2"][data-state="idle"]')
    assert page.inner_text("[data-sentence]") == shown.sentence and shown.sentence.startswith("block_size 16 -> 4: ")
    steps = {row.name: row for row in shown.table}["steps"]
    cells = [cell.inner_text() for cell in page.query_selector_all("tr[data-metric=steps] td")]
    assert cells == [str(steps.before), str(steps.now), f"+{steps.now - steps.before}"]  # type: ignore[operator]

    page.fill("[data-own=text]", "hello")
    page.fill("[data-own=tokens]", "3")
    page.press("[data-own=tokens]", "Enter")
    page.wait_for_selector("[data-request=G][data-mine=yes]")
    assert page.input_value("[data-own=text]") == ""
    page.fill("[data-own=text]", "and another")  # not added: Run takes it along
    page.click("[data-do=run]")
    page.wait_for_selector('.controls[data-runs="3"][data-state="idle"]')
    assert len(shown.trace.requests) == 8 and page.inner_text("[data-sentence]").startswith("2 requests more")
    page.click("[data-request=G] [data-do=drop]")
    page.wait_for_selector('.controls[data-requests="7"]')
    assert page.faults == []


def test_refusals_stand_on_the_page_and_a_silent_kernel_is_told(browser: Any, tmp_path: Path) -> None:
    shown = controls()
    page = show(browser, shown.panel, tmp_path, shown._asked)
    page.fill("[data-control=num_blocks]", "600")
    page.press("[data-control=num_blocks]", "Tab")
    page.wait_for_function("document.querySelector('[data-note]').textContent.includes('from 5 to 64')")
    assert page.input_value("[data-control=num_blocks]") == "16"
    page.evaluate("window.gone = true")
    page.click("[data-do=run]")
    assert page.get_attribute(".controls", "data-state") == "asked"
    page.wait_for_selector('.controls[data-state="silent"]')
    assert "run this cell again" in page.inner_text("[data-note]")
    assert page.faults == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_keeps_its_contrast(browser: Any, tmp_path: Path, dark: bool) -> None:
    shown = controls()
    shown.set(block_size=4)
    shown.rerun()
    shown.set(num_blocks=20)
    shown._asked(None, {"do": "add"}, [])
    page = show(browser, shown.panel, tmp_path, shown._asked, dark=dark)
    names = [
        "[data-sentence]",
        "[data-note]",
        "[data-pending]",
        ".ct-limits",
        "li span",
        "li b",
        "th",
        "td",
        ".ct-line",
    ]
    found = contrasts(page, [*names, "[data-do=run]", "[data-do=add]", "select", ".ct-own label > span"])
    assert {key: value for key, value in found.items() if value < 4.5} == {}
