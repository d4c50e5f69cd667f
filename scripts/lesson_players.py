"""Record the runs that the instructor's plan projects, and write each as a page that plays offline.

    python scripts/lesson_players.py [-o FOLDER]      (default: lessons/)

The traces are kept beside the pages: `stepengine player FOLDER/paged.jsonl -o page.html` makes another size.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepengine import LLM, SamplingParams
from stepengine.errors import StepEngineError
from stepengine.trace import Trace, save
from stepengine.viz import Compare, StepPlayer

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["Cats, dogs and", "One, two, three,", "In the beginning", "The capital of France is"]
LONG = "The old man walked along the beach every morning, and the sea gave him shells. " * 6
SLOTS = {"max_num_seqs": 4, "max_model_len": 64}
TIGHT = {"max_num_seqs": 8, "max_model_len": 64, "block_size": 4, "num_blocks": 11}
ROOMY = {"max_num_seqs": 4, "max_model_len": 256, "block_size": 8, "num_blocks": 64}
EIGHT = (SHORT * 2, [3, 12, 5, 8, 4, 10, 2, 6])
# name: stage, texts, tokens to generate, a text that arrives in step 2, settings
RUNS: dict[str, tuple[int | str, list[str], list[int], str | None, dict[str, Any]]] = {
    "naive": (0, SHORT[3:], [24], None, {"max_model_len": 64}),
    "cached": ("1a", SHORT[3:], [24], None, {"max_model_len": 64}),
    "static": ("1a", *EIGHT, None, SLOTS),
    "continuous": ("1b", *EIGHT, None, SLOTS),
    "paged": (2, *EIGHT, None, {**TIGHT, "preemption": "swap", "swap_space": 1 << 24}),
    "whole": (3, SHORT[:2], [16, 16], LONG, ROOMY),
    "chunks": ("4a", SHORT[:2], [16, 16], LONG, {**ROOMY, "max_num_batched_tokens": 34}),
    "prefix": ("4b", [LONG + text for text in SHORT], [6] * 4, None, {**ROOMY, "max_num_seqs": 2}),
}
# page: the run it plays, or the two that it plays side by side
PAGES = {
    "1": ("naive", "cached"),
    "2": ("static", "continuous"),
    "3": ("paged",),
    "5a": ("whole", "chunks"),
    "5b": ("prefix",),
}


def record(name: str) -> Trace:
    """Serve the run's requests and return the trace."""
    stage, texts, lengths, later, settings = RUNS[name]
    llm = LLM("smollm2-135m", stage=stage, trace=True, **settings)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    for text, own in zip(texts, params, strict=True):
        llm.engine.add_request(llm.tokenizer.encode(text), own)
    for _ in range(2):
        llm.engine.step()
    if later is not None:
        llm.engine.add_request(llm.tokenizer.encode(later), params[0])
    while llm.engine.has_unfinished():
        llm.engine.step()
    assert llm.trace is not None
    return llm.trace


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the lessons' players.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "lessons", metavar="FOLDER")
    folder = parser.parse_args(argv).output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        traces = {}
        for name in RUNS:
            traces[name] = record(name)
            save(traces[name], folder / f"{name}.jsonl")
        for page, names in PAGES.items():
            shown = [traces[name] for name in names]
            player = StepPlayer(*shown, size="room") if len(shown) == 1 else Compare(*shown, names=names, size="room")
            print(player.save_html(folder / f"{page}.html"))
    except (OSError, StepEngineError) as error:
        print(f"make lessons stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
