"""The ladder's result as a table for a terminal, as JSON, and as one self-contained page."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from stepengine.bench.runs import Run

STILL = 1.1  # a gain of tokens/s below this calls for a reason
WIDTH = 96


def why(before: Run, after: Run) -> str:
    """One line on where the time went if tokens/s did not move, else "". All of it comes from the two runs."""
    ratio = after.tokens_per_s / before.tokens_per_s
    if ratio >= STILL:
        return ""
    (prompts, decodes), (new_prompts, new_decodes) = before.step_ms, after.step_ms
    if not decodes or not new_decodes:
        return f"tokens/s {ratio:.2f}x: prompts alone took {sum(prompts):.0f} ms, now {sum(new_prompts):.0f} ms."
    return (
        f"tokens/s {ratio:.2f}x: {len(decodes)} decode steps of {median(decodes):.0f} ms became {len(new_decodes)} of "
        f"{median(new_decodes):.0f} ms; prompts {sum(prompts) / 1e3:.1f} s in {len(prompts)} "
        f"step{'s' if len(prompts) != 1 else ''} became {sum(new_prompts) / 1e3:.1f} s in {len(new_prompts)}."
    )


def table(result: Mapping[str, Any]) -> str:
    """The result as text of at most 100 columns: a line per stage, and below it what the stage exists for."""
    work, box = result["workload"], result["machine"]
    lines = [
        f"{Path(result['model']).name:.40}, fp32: {work['requests']} requests, K/V memory for {result['slots']} of "
        f"{result['max_model_len']} tokens; prompts {work['prompt_tokens']['min']} to {work['prompt_tokens']['max']}, "
        f"outputs {work['output_tokens']['min']} to {work['output_tokens']['max']}",
        f"{box['cpu']:.50}, {box['cores']} cores, {box['torch_threads']} threads, torch {box['versions']['torch']}",
        "",
        f"{'':38}{'':>9} {'first token':>17} {'next token':>15} {'same':>7}",
        f"{'stage':38}{'tokens/s':>9} {'TTFT p50/p99 ms':>17} {'ITL p50/p99 ms':>15} {'tokens':>7}",
        "-" * 89,
    ]
    for row in result["stages"]:
        lines.append(
            f"{row['stage']:<4}{row['title']:34.34}{row['tokens_per_s']:>9.1f} {_pair(row['ttft_ms']):>17} "
            f"{_pair(row['itl_ms']):>15} {_same(row, result):>7}"
        )
        metric = row["metric"]
        if metric is not None:
            gains = "; ".join(_gain(number) for number in (metric, *metric.get("also", ())))
            lines += _wrapped(f"{gains}  ({metric['note']})")
        if row["note"]:
            lines += _wrapped(row["note"])
    names = ", ".join(f"{row['near_ties']} in {row['stage']}" for row in result["stages"] if row["near_ties"])
    if names:
        lines += ["", f"Sequences that part at a near tie (two logits within 1e-4, either is right): {names}."]
    for row in result["stages"]:
        if row["agreement"] is not None:
            lines += ["", *own_tokens(row, result)]
    return "\n".join(lines)


def own_tokens(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """What to know of the tokens of a stage with weights of its own."""
    return [
        f"Stage {row['stage']} has other weights, hence its own tokens. At the same place,",
        f"stage {result['stages'][0]['stage']} chooses {row['agreement']:.1%} of them; its own weights, with nothing "
        f"cached, {row['own_agreement']:.1%}.",
    ]


def _same(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if row is result["stages"][0]:
        return "-"
    return {True: "yes", False: "NO", None: "own"}[row["same_tokens"]]


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")


def _pair(values: Mapping[str, float] | None) -> str:
    return "-" if values is None else f"{values['p50']:,.0f} / {values['p99']:,.0f}"


def _gain(metric: Mapping[str, Any]) -> str:
    before, after = metric["before"], metric["after"]
    unit = " ms" if metric["unit"] == "ms" else ""
    text = f"{metric['name']}: {_number(before)} -> {_number(after)}{unit}"
    if before and after and before != after:
        ratio = max(before, after) / min(before, after)
        more, fewer = ("higher", "lower") if unit else ("more", "fewer")
        text += f", {ratio:.1f} times {more if after > before else fewer}" if ratio >= 1.05 else ", about the same"
    return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def render(result: Mapping[str, Any], console: Any = None) -> None:
    """Print the table, and where the files are, on a rich console (or with `print`)."""
    text = table(result)
    if "files" in result:
        text += f"\n\n{result['seconds']:.0f} s. Written: " + ", ".join(result["files"])
    if console is None:
        print(text)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def write(result: dict[str, Any], folder: Path) -> None:
    """Write `ladder.json` and `ladder.html` into `folder`; their names go into the result."""
    folder.mkdir(parents=True, exist_ok=True)
    result["files"] = [str(folder / name) for name in ("ladder.json", "ladder.html")]
    (folder / "ladder.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "ladder.html").write_text(page(result), encoding="utf-8")


def page(result: Mapping[str, Any]) -> str:
    """A page that needs no network: charts (where plotly is installed) above the table and the machine."""
    try:
        from stepengine.viz.figures import ladder_bars

        chart = ladder_bars(result).to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})
    except ModuleNotFoundError as error:
        chart = f"<p>No charts: {html.escape(str(error.name))} is not installed.</p>"
    machine = html.escape(json.dumps(result["machine"], indent=2))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>stepengine: the ladder</title>\n'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;"
        "background:#fff;color:#1b1f23}pre{overflow-x:auto;font-size:13px}</style></head><body>\n"
        f"<h1>The ladder, {html.escape(str(result['time']))}</h1>\n{chart}\n<pre>{html.escape(table(result))}</pre>\n"
        f"<details><summary>Machine</summary><pre>{machine}</pre></details>\n</body></html>\n"
    )
