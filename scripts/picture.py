"""Takes the README's pictures of the step player, from a real run: docs/images/stepplayer.png and an animation.

Needs the extras `notebooks` and `browser` (playwright, Pillow) and a Chromium: `python scripts/picture.py`.
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WIDTH, HEIGHT = 1120, 688
FRAMES, COLORS, LIMIT = 16, 160, 1_500_000  # frames of the animation, its colours, and bytes at most
SHARED = "A patient teacher explains computers to a curious student, one plain sentence at a time. "
BEGINNINGS = (  # what each request adds, its output tokens, the step before which it arrives
    ("A cache keeps copies of", 30, 0),
    ("When a program needs more memory than there is left for everybody who is running, it", 22, 0),
    ("A queue is", 26, 2),
    ("A word is made of", 24, 4),
    ("To share one machine between many people who all want an answer at the same time, we", 22, 6),
)


def recorded(model: str) -> Any:
    """The trace of texts with a common beginning, which arrive one after the other in a pool too small for all."""
    from stepengine import LLM, SamplingParams

    llm = LLM(model, stage=4, trace=True, block_size=8, num_blocks=22, max_num_seqs=5, max_num_batched_tokens=32,
              max_model_len=160)  # fmt: skip
    coming = list(BEGINNINGS)
    step = 0
    while coming or llm.engine.has_unfinished():
        for entry in [later for later in coming if later[2] <= step]:
            coming.remove(entry)
            ids = llm.tokenizer.encode(SHARED + entry[0])
            llm.engine.add_request(list(ids), SamplingParams(max_tokens=entry[1], temperature=0, ignore_eos=True))
        llm.engine.advance()
        step += 1
    return llm.trace


def chosen(trace: Any) -> list[int]:
    """Steps to show: those with most to tell, and one in between where nothing happens."""
    from stepengine.viz.payload import player_data

    steps = player_data(trace)["steps"]
    weight = {"preemption": 5, "hit": 4, "arrival": 3, "finish": 2}
    worth = [max((weight.get(kind, 1) for kind in step.get("kinds", ())), default=0) for step in steps]
    best = sorted(range(len(steps)), key=lambda t: (-worth[t], t))[: FRAMES - 1]
    return sorted({0, *best, len(steps) - 1})


def best_still(trace: Any, steps: list[int]) -> int:
    """A step in which somebody is preempted or finds its prompt cached, with the most requests at work."""

    def told(t: int) -> tuple[int, int]:
        plan = trace.steps[t].plan
        return 2 * bool(plan.preempted) + any(chunk.cached for chunk in plan.chunks), len(plan.chunks)

    return max(steps, key=told)


def taken(trace: Any, steps: list[int], chromium: str) -> dict[int, bytes]:
    """A PNG of the page at each of these steps."""
    from playwright.sync_api import sync_playwright

    from stepengine.viz.player import StepPlayer

    pictures = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        panels = ["schedule", "kv", "tokens", "texts"]
        page_file = StepPlayer(trace, panels=panels).save_html(Path(folder) / "player.html")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"{page_file.as_uri()}?theme=light")
        page.wait_for_selector(".stepplayer[data-step]")
        for step in steps:
            page.get_by_role("slider").fill(str(step))
            page.wait_for_selector(f".stepplayer[data-step='{step}']")
            page.evaluate("() => document.activeElement.blur()")
            pictures[step] = page.screenshot()
        browser.close()
    return pictures


def animated(pictures: list[bytes], path: Path) -> None:
    """One GIF of all, each shown long enough to read its sentence."""
    from PIL import Image

    frames = [Image.open(io.BytesIO(png)).convert("RGB") for png in pictures]
    every = Image.new("RGB", (WIDTH, HEIGHT * len(frames)), "white")
    for i, frame in enumerate(frames):
        every.paste(frame, (0, HEIGHT * i))
    counted = sorted(every.getcolors(1 << 24) or [], reverse=True)[:COLORS]  # exact: grounds keep their white
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for _, color in counted for channel in color])
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    drawn[0].save(path, save_all=True, append_images=drawn[1:], duration=[2200] * (len(drawn) - 1) + [4000], loop=0,
                  optimize=True)  # fmt: skip


def main() -> None:
    """Run, look, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("picture.py needs a Chromium on the PATH.")
    trace = recorded(arguments.model)
    if not any(record.plan.preempted for record in trace.steps):
        print("note: nobody was preempted in this run")
    steps = chosen(trace)
    pictures = taken(trace, steps, chromium)
    still = best_still(trace, steps)
    (arguments.out / "stepplayer.png").write_bytes(pictures[still])
    film = arguments.out / "stepplayer.gif"
    animated([pictures[step] for step in steps], film)
    size = film.stat().st_size
    print(f"{trace}: step {still} in stepplayer.png, steps {steps} in {film.name}, {size / 1e6:.2f} MB")
    if size > LIMIT:
        sys.exit(f"{film} has {size} bytes, above {LIMIT}: take fewer frames.")


if __name__ == "__main__":
    main()
