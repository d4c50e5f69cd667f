"""The calculator's answer in words: each formula with its numbers, each number with its source."""

from dataclasses import dataclass

from stepengine.calculator import (
    WEIGHTS,
    Answer,
    Work,
    groups,
    kv_bytes_by_hidden_size,
    weight_parts,
)

NOT_MEASURED = (
    "Arithmetic, not measurement: none of these GPUs was measured here. Times are lower bounds: full bandwidth, peak "
    "rate, no launches, no host. 1 GB is 1e9 bytes; a driver may show the vendor's GB as up to 7 % more."
)


@dataclass(frozen=True)
class Block:
    """One result: what it is, the number, the formulas with numbers, and where their inputs come from."""

    name: str  # "weights" | "kv" | "fit" | "time"
    title: str
    value: str
    lines: tuple[str, ...]
    sources: tuple[str, ...]


def size(count: int) -> str:
    """Bytes in words: "16.06 GB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(count) >= 0.99995 * unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Seconds in words: "4.64 ms"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (0.0, "ns")):
        if seconds >= (unit or 0):
            value = seconds / {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[name]
            return f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
    return "0 s"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def sentence(answer: Answer) -> str:
    """What came out, or why it does not fit."""
    q = answer.question
    what = f"{q.shape.name} in {q.weights}"
    if not answer.sequences:
        return (
            f"{what} does not fit: needs {size(answer.needed)} with one sequence of {plural(q.context, 'token')}, the "
            f"GPU has {size(answer.memory)}, of which {q.utilisation:g} may be used ({size(answer.usable)})."
        )
    time = duration(answer.decode.seconds(q.gpu))
    fits = f"{plural(answer.sequences, 'sequence')} of {plural(q.context, 'token')}"
    if q.batch > answer.sequences:
        return f"{what} fits on one {q.gpu.name}, a batch of {q.batch:,} does not: there is room for {fits}."
    step = f"a decode step of {plural(q.batch, 'sequence')}"
    return f"{what} on one {q.gpu.name}: room for {fits}; {step} takes at least {time}."


def blocks(answer: Answer) -> tuple[Block, ...]:
    """Weights, K/V, fit and time."""
    return _weights(answer), _kv(answer), _fit(answer), _time(answer)


def _weights(answer: Answer) -> Block:
    q, s, parts = answer.question, answer.question.shape, answer.parts
    heads, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    table = "embedding = head" if s.tied else "embedding and head"
    rows = f"{s.vocab:,}" if s.tied else f"2 x {s.vocab:,}"
    rows = f"({rows} + {s.positions:,} positions)" if s.positions else rows
    bits = WEIGHTS[q.weights]
    lines = [
        f"attention: {s.layers} layers x {s.hidden:,} x (2 x {heads:,} + 2 x {kv:,}) = {s.attention:,}",
        f"MLP: {s.layers} layers x {3 if s.gated else 2} x {s.hidden:,} x {s.intermediate:,} = {s.mlp:,}",
        f"{table}: {rows} x {s.hidden:,} = {s.tables:,}",
        f"norms and biases: {s.small:,}",
    ]
    total = answer.weight_bytes
    if bits >= 16:
        lines.append(f"{s.parameters:,} parameters x {bits // 8} bytes = {total:,} bytes")
    else:
        inner, count = s.attention + s.mlp, groups(s, q.group_size)
        group = "one a row" if q.group_size == -1 else f"groups of {q.group_size}"
        each = f"{q.table_bits} bits" + (" and a scale a row" if q.table_bits == 8 else "")
        lines += [
            f"{s.parameters:,} parameters in all",
            f"attention and MLP in {bits} bits: {inner:,} x {bits} / 8 = {inner * bits // 8:,}",
            f"scales and zeros, {group}: {count:,} x (16 + {bits} bits) / 8 = {parts['scales and zeros']:,}",
            f"{table} in {each}: {parts['embedding and head']:,}",
            f"norms and biases in 16 bits: {parts['norms and biases']:,}",
            f"sum: {total:,} bytes",
        ]
        wide = weight_parts(s, "bf16")
        before = wide["attention"] + wide["mlp"]
        after = parts["attention"] + parts["mlp"] + parts["scales and zeros"]
        lines.append(
            f"against bf16: the quantised layers are {before / after:.2f} times smaller, the whole model "
            f"{sum(wide.values()) / total:.2f} times"
        )
    fields = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
    return Block("weights", "Weights", f"{size(total)} in {q.weights}", tuple(lines), _config_source(answer, fields))


def _kv(answer: Answer) -> Block:
    q, s = answer.question, answer.question.shape
    each = "1 byte" if q.kv_bits == 8 else f"{q.kv_bits // 8} bytes"
    wrong = kv_bytes_by_hidden_size(s, q.kv_bits)
    lines = [
        f"2 x {s.layers} layers x {s.kv_heads} K/V heads x {s.head_dim} x {each} = {answer.kv_token:,} bytes a token",
        f"{answer.kv_token:,} x {plural(q.context, 'token')} = {answer.kv_sequence:,} bytes a sequence",
    ]
    formula = f"with hidden_size: 2 x {s.layers} x {s.hidden:,} x {each} = {wrong:,}"
    if wrong != answer.kv_token:
        lines.append(f"{formula}, {wrong / answer.kv_token:.3g} times the truth")
    elif s.heads == s.kv_heads:
        lines.append(f"{formula}, the same: each query head has its own K/V")
    else:
        lines.append(f"{formula}, the same by chance: {s.kv_heads} x {s.head_dim} happens to be {s.hidden:,}")
    if q.kv_bits == 8:
        lines.append(
            "K/V in 8 bits is arithmetic only: this engine stores them as the model's dtype, scales not counted"
        )
    if s.window is not None and q.context > s.window:
        lines.append(f"the model attends to {s.window:,} tokens at most; all {q.context:,} are counted")
    if s.longest is not None and q.context > s.longest:
        lines.append(f"{q.context:,} tokens are more than the {s.longest:,} positions that the model was made for")
    value = f"{answer.kv_token:,} bytes a token, {size(answer.kv_sequence)} a sequence"
    return Block("kv", "K/V cache", value, tuple(lines), _config_source(answer, ("layers", "kv_heads", "head_dim")))


def _fit(answer: Answer) -> Block:
    q = answer.question
    rest = f"{size(answer.weight_bytes)} weights - {size(answer.reserve)} reserve"
    lines = [f"{q.gpu.memory_gb:g} GB x {q.utilisation:g} - {rest} = {size(answer.room)} for K/V"]
    if answer.sequences:
        value = f"{plural(answer.sequences, 'sequence')} of {plural(q.context, 'token')}"
        each = f"{size(answer.room)} / {size(answer.kv_sequence)} a sequence"
        lines.append(f"{each} = {answer.room / answer.kv_sequence:,.2f}, whole ones: {answer.sequences:,}")
    else:
        value = f"does not fit: needs {size(answer.needed)}, the GPU has {size(answer.memory)}"
        asked = f"{size(answer.weight_bytes)} + {size(answer.reserve)} + {size(answer.kv_sequence)} of one sequence"
        lines.append(f"{asked} = {size(answer.needed)}, and {size(answer.usable)} may be used")
    if answer.sequences and q.batch > answer.sequences:
        lines.append(f"a batch of {q.batch:,} is more than that")
    sources = (
        f"{q.gpu.memory_gb:g} GB: {q.gpu.sources[0]}",
        "reserve for activations: your number; an engine runs its largest step once and looks (stepengine.sizing)",
    )
    return Block("fit", "What fits", value, tuple(lines), sources)


def _time(answer: Answer) -> Block:
    q, s = answer.question, answer.question.shape
    inner, head = s.attention + s.mlp, s.hidden * s.vocab
    attends = f"4 x {s.layers} layers x {s.heads} heads x {s.head_dim}"
    b, n = q.batch, q.context
    lines = [
        f"decode, {plural(b, 'sequence')} of {plural(n, 'token')}: at least "
        f"{duration(answer.decode.seconds(q.gpu))} a token",
        *_roofline(
            answer,
            answer.decode,
            f"{b:,} x {n:,} x {answer.kv_token:,}",
            f"{b:,} x (2 x ({inner:,} + {head:,}) + {attends} x {n:,})",
        ),
    ]
    if b > 1:
        lines.append(f"all together at most {b / answer.decode.seconds(q.gpu):,.0f} tokens/s")
    lines += [
        f"prefill of {plural(n, 'token')}: at least {duration(answer.prefill.seconds(q.gpu))}",
        *_roofline(
            answer, answer.prefill, f"{n:,} x {answer.kv_token:,}",
            f"2 x ({n:,} x {inner:,} + {head:,}) + {attends} x {n:,} x {n + 1:,} / 2",
        ),
    ]  # fmt: skip
    if not answer.sequences:
        lines.insert(0, "as if it fitted: its memory is too small")
    if WEIGHTS[q.weights] != 16:
        what = (
            "unpacked and multiplied in 16 bits"
            if WEIGHTS[q.weights] < 16
            else "taken at the 16-bit rate, so really more"
        )
        lines.append(f"products: {what}")
    value = (
        f"at least {duration(answer.decode.seconds(q.gpu))} a token, prefill {duration(answer.prefill.seconds(q.gpu))}"
    )
    sources = (
        f"{q.gpu.bandwidth_gb_s:,g} GB/s: {q.gpu.sources[1]}",
        f"{q.gpu.tflops:,g} TFLOP/s dense, 16-bit: {q.gpu.sources[2]}",
    )
    return Block("time", "Time", value, tuple(lines), sources)


def _roofline(answer: Answer, work: Work, kv: str, products: str) -> tuple[str, str]:
    gpu = answer.question.gpu
    memory, compute = work.memory_s(gpu), work.compute_s(gpu)
    marks = (" <- decides", "") if memory >= compute else ("", " <- decides")
    looked_up = answer.weight_bytes - work.weight_bytes
    but = f" (the other {size(looked_up)} are looked up by the row)" if looked_up else ""
    return (
        f"bytes: {size(work.weight_bytes)} weights{but} + {kv} K/V = {size(work.bytes)} / {gpu.bandwidth_gb_s:,g} GB/s "
        f"= {duration(memory)}{marks[0]}",
        f"FLOP: {products} = {_flop(work.flops)} / {gpu.tflops:,g} TFLOP/s = {duration(compute)}{marks[1]}",
    )


def _flop(count: int) -> str:
    for unit, name in ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,} FLOP"


def _config_source(answer: Answer, fields: tuple[str, ...]) -> tuple[str, ...]:
    shape = answer.question.shape
    named = ", ".join(shape.given[name] for name in fields if name in shape.given)
    return (f"{named}: {shape.source}" if named else shape.source, *shape.notes)


def bar_text(answer: Answer) -> str:
    """The memory bar in words."""
    parts = ", ".join(f"{name} {size(count)}" for name, count in answer.bar)
    return f"of {size(answer.memory)}: {parts}"


def as_text(answer: Answer) -> str:
    """Everything, as plain text."""
    lines = [sentence(answer)]
    for block in blocks(answer):
        lines += ["", f"{block.title}: {block.value}"]
        lines += [f"  {line}" for line in block.lines]
        lines += [f"  [{source}]" for source in block.sources]
    return "\n".join([*lines, "", f"Memory {bar_text(answer)}", NOT_MEASURED])
