"""What a record of the GPU suite says: the bars, met or not, and a short table."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

LONG = 100_000  # tokens from which on the decode kernel must reach the copy bandwidth
Record = Mapping[str, Any]


def results(record: Record, part: str) -> dict[str, Any]:
    """What a part found; {} where it did not run."""
    found: dict[str, Any] = record["parts"].get(part, {}).get("results", {})
    return found


def at(found: Any, *names: str) -> Any:
    """found[names[0]][names[1]]...; None where one is not there."""
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def bars(record: Record) -> list[dict[str, Any]]:
    """Each bar of stages 3 to 5: measured, required, and what would be better still; `met` is None if not measured.

    They were set for an H200. Where several settings of the engine were measured, the best counts. A smoke
    run has none.
    """
    if record["smoke"]:
        return []
    return [
        {"name": name, "value": value, "sign": sign, "bar": bar, "stretch": stretch, "met": _met(value, sign, bar)}
        for name, value, sign, bar, stretch in _values(record)
    ]


def _met(value: float | None, sign: str, bar: float) -> bool | None:
    if value is None:
        return None
    return value >= bar if sign == ">=" else value <= bar


def _values(record: Record) -> Iterator[tuple[str, float | None, str, float, float | None]]:
    correct = results(record, "correctness")
    tests = at(correct, "tests", "passed")
    yield "GPU tests pass", None if tests is None else float(tests), ">=", 1, None
    logits = [entry.get("met", False) for name, entry in correct.items() if name.startswith("logits")]
    yield "logits equal transformers'", float(all(logits)) if logits else None, ">=", 1, None

    prefill = at(results(record, "prefill"), "4096")
    yield "prefill 4k over SDPA flash", at(prefill, "speedup_over_flash_attention"), ">=", 1.3, None
    yield "prefill 4k over cuDNN", at(prefill, "speedup_over_cudnn_attention"), ">=", 0.8, None
    yield "prefill 4k of matmul peak", at(prefill, "ours", "of_matmul"), ">=", 0.58, 0.78

    long = [e for e in results(record, "decode").values() if isinstance(e, Mapping) and e.get("tokens", 0) >= LONG]
    shares = [at(entry, "stage3", "of_copy") for entry in long]
    whole = bool(shares) and None not in shares
    yield "paged decode of copy, least from 100k", min(shares) if whole else None, ">=", 0.92, 0.97

    yield from _int4(record)
    alone = results(record, "batch1/stage3")
    ours = _best(alone, ", 512", "ms_per_token", min)
    yield "batch 1, context 512, ms a token", ours, "<=", 0.60, 0.46
    eager = at(results(record, "batch1/transformers"), "512", "ms_per_token")
    yield "batch 1, 512, over generate eager", eager / ours if eager and ours else None, ">=", 15, None

    run = at(results(record, "throughput/stage3"), "best")
    run = run if at(run, "complete") else None  # the first part of a run says nothing of the whole
    yield "usual bench of its roofline", at(run, "of_roofline"), ">=", 0.83, 0.90
    speed, peer = at(run, "tokens_per_s"), at(results(record, "throughput/generate_batch"), "best", "tokens_per_s")
    yield "usual bench over generate_batch", speed / peer if speed and peer else None, ">=", 10, None

    idle = results(record, "idle/stage3")
    at_256 = _best(idle, ", 256", "idle", min)
    yield "GPU idle at batch 256", at_256, "<=", 0.02, None
    yield "GPU idle at batch 1", _best(idle, ", 1", "idle", min), "<=", 0.05, None
    yield "host us a step at batch 256, if idle counts", _host(idle, at_256), "<=", 300, 100
    yield from _serving(record)


def _serving(record: Record) -> Iterator[tuple[str, float | None, str, float, float | None]]:
    found = results(record, "chunked")
    first = at(found, "prefill first", "itl_ms", "p99")
    arms = [entry for name, entry in found.items() if name.startswith("budget") and at(entry, "itl_ms")]
    best = min(arms, key=lambda entry: entry["itl_ms"]["p99"]) if arms else None
    gap = at(best, "itl_ms", "p99")
    yield "P99 gap, prefill first over chunks", first / gap if first and gap else None, ">=", 10, None
    yield "P99 gap of chunks over their P50", gap / best["itl_ms"]["p50"] if best and gap else None, "<=", 1.5, None
    speed = at(found, "prefill first", "tokens_per_s")
    yield (
        "tokens/s of those chunks over prefill first",
        best["tokens_per_s"] / speed if best and speed else None,
        (">="),
        0.97,
        None,
    )
    hits = results(record, "prefix")
    yield "first token on a hit of 4096, times sooner", at(hits, "4096", "gain"), ">=", 12, None
    yield "first token on a hit of 1024, times sooner", at(hits, "1024", "gain"), ">=", 4.5, None
    misses = [at(entry, "miss") for entry in hits.values() if at(entry, "miss")]
    yield "time with nothing to find, over not looking", max(misses) if misses else None, "<=", 1.01, None
    found = results(record, "quantized")
    yield "decode at batch 1, 4 bits over 16", at(found, "1", "speed", "5", "median"), ">=", 1.4, None
    yield "decode at batch 256, 4 bits over 16", at(found, "256", "speed", "5", "median"), ">=", 0.98, None


def _int4(record: Record) -> Iterator[tuple[str, float | None, str, float, float | None]]:
    found = results(record, "int4")
    large = {at(e, "tokens"): at(e, "ours", "speedup") for name, e in found.items() if name.startswith("4096x12288")}
    for tokens, bar in ((1, 2.5), (16, 2.3), (64, 1.2)):
        yield f"int4 4096x12288 over cuBLAS, tokens: {tokens}", large.get(tokens), ">=", bar, None
    speeds = list(large.values())
    yield "the same, least at any number of tokens", min(speeds) if speeds and all(speeds) else None, ">=", 0.97, None
    yield "int4 layer of the model over cuBLAS, 1 token", at(found, "layer, 1", "speedup"), ">=", 1.15, None


def _best(found: Mapping[str, Any], end: str, key: str, choose: Callable[..., float]) -> float | None:
    values = [at(entry, key) for name, entry in found.items() if name.endswith(end)]
    values = [value for value in values if value is not None]
    return choose(values) if values else None


def _host(idle: Mapping[str, Any], at_256: float | None) -> float | None:
    """Host time of the setting that idles least; 0 where it is hidden behind the device, which is as good."""
    if at_256 is None:
        return None
    if at_256 <= 0.02:
        return 0.0
    return next(at(e, "host_us") for name, e in idle.items() if name.endswith(", 256") and at(e, "idle") == at_256)


def table(record: Record) -> str:
    """The record as a short table of at most 100 columns."""
    box = record.get("machine") or {}
    what = "SMOKE RUN on a CPU: every part at toy size, times mean nothing, no bar is judged" if record["smoke"] else ""
    lines = [what] if what else []
    versions = box.get("versions", {})
    lines += [
        f"{box.get('gpu') or box.get('cpu')}, torch {versions.get('torch')}, triton {versions.get('triton')}, "
        f"transformers {versions.get('transformers')}, commit {box.get('commit')}; {record['model']}",
        "",
    ]
    for name, part in record["parts"].items():
        told = "; ".join(_finding(name, part.get("results", {}))) if part["status"] in ("ok", "cut") else ""
        note = f" ({part['error'][:200]})" if part.get("error") else ""
        lines += _fold(f"{name:26} {part['status']:8}{part.get('seconds', 0):5.0f} s  {told}{note}".rstrip())
    if record["bars"]:
        lines += ["", f"{'bar (set for an H200)':46}{'measured':>10}{'bar':>10}{'stretch':>9}"]
    for bar in record["bars"]:
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[bar["met"]]
        limit, stretch = f"{bar['sign']} {bar['bar']:g}", "" if bar["stretch"] is None else f"{bar['stretch']:g}"
        lines.append(f"{bar['name']:46}{_number(bar['value']):>10}{limit:>10}{stretch:>9}  {verdict}")
    return "\n".join(lines)


def _fold(line: str) -> list[str]:
    import textwrap

    return textwrap.wrap(line, 100, subsequent_indent=" " * 8, drop_whitespace=True, break_on_hyphens=False) or [""]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _finding(part: str, found: Mapping[str, Any]) -> Iterator[str]:
    """One part's results, in few words."""
    group = part.split("/")[0]
    errors = [name for name, entry in found.items() if at(entry, "error") or at(entry, "ours", "error")]
    if errors:
        yield "ERRORS in " + ", ".join(errors)
    if found.get("note"):
        yield str(found["note"])
    if group == "ceilings":
        best = found.get("best", {})
        yield f"copy {_number(best.get('copy_gbs'))} GB/s, matmul {_number(best.get('matmul_tflops'))} TFLOP/s"
    elif group == "correctness":
        yield f"tests: {' '.join(at(found, 'tests', 'said') or ['-'])}"
        wrong = [name for name, entry in found.items() if name.startswith("logits") and not entry.get("met")]
        yield "logits wrong: " + ", ".join(wrong) if wrong else "logits of every stage as transformers'"
    elif group == "prefill":
        for name, entry in found.items():
            if at(entry, "ours", "tflops"):
                peers = {key: at(entry, f"{key}_attention", "tflops") for key in ("flash", "cudnn")}
                told = "".join(f", {key} {_number(value)}" for key, value in peers.items() if value)
                yield f"{name}: {_number(entry['ours']['tflops'])} TFLOP/s{told}"
    elif group == "decode":
        for name, entry in found.items():
            speeds = {key: at(entry, key, "gbs") for key in ("stage2", "stage3", "sdpa")}
            if any(speeds.values()):
                yield f"{name}: " + " ".join(f"{key} {_number(value)}" for key, value in speeds.items() if value)
    elif group == "int4":
        for name, entry in found.items():
            speedup = at(entry, "ours", "speedup") or at(entry, "speedup")
            if speedup:
                yield f"{name}: {_number(speedup)}x"
    elif group == "batch1":
        yield from (f"{name}: {_number(e['ms_per_token'])} ms" for name, e in found.items() if at(e, "ms_per_token"))
    elif group == "throughput":
        best = found.get("best")
        if best:
            share = f", {best['of_roofline']:.0%} of its roofline" if best.get("of_roofline") else ""
            yield f"{_number(best['tokens_per_s'])} tokens/s{share}{'' if best['complete'] else ', cut short'}"
    elif group == "idle":
        for name, entry in found.items():
            if at(entry, "wall_us"):
                share = "-" if entry["idle"] is None else f"{entry['idle']:.0%}"
                yield f"{name}: {_number(entry['wall_us'])} us, host {_number(entry['host_us'])}, idle {share}"
    elif group == "chunked":
        for name, entry in found.items():
            if at(entry, "itl_ms"):
                gaps = entry["itl_ms"]
                yield f"{name}: gap P50 {_number(gaps['p50'])}, P99 {_number(gaps['p99'])} ms"
    elif group == "prefix":
        for name, entry in found.items():
            if at(entry, "gain"):
                yield f"{name}: hit {_number(entry['gain'])}x sooner, miss {_number(entry['miss'])}x"
    elif group == "quantized":
        for name, entry in found.items():
            if at(entry, "ms_per_step"):
                ms = entry["ms_per_step"]
                told = ", ".join(f"stage {arm} {_number(ms[arm])} ms" for arm in ms)
                yield f"batch {name}: {told} ({_number(entry['speed']['5']['median'])}x)"
    elif group == "traces":
        yield f"{sum('file' in entry for entry in found.values())} files"
