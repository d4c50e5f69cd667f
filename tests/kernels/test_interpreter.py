"""Each kernel and its twin against an oracle, under Triton's interpreter: no GPU, exact in fp32 and fp16."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels import harness

pytestmark = harness.needs_triton


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return harness.run("interpret", tmp_path_factory.mktemp("triton"))


@harness.needs_newer_triton
@pytest.mark.parametrize("name", harness.cases("interpreter"))
def test_kernel_and_twin_equal_the_oracle(outcomes: dict[str, str], name: str) -> None:
    assert not outcomes[name], outcomes[name]


def test_no_case_runs_in_bf16_there() -> None:
    assert not [name for name in harness.cases("interpreter") if "bf16" in name]


ATTENTION_MISTAKES: dict[str, Callable[..., Any]] = {
    "forgets the last token": lambda r, q, s, t, n, scale, out=None: r(q, s, t, (n - 1).clamp(min=0), scale, out),
    "reads a token too many": lambda r, q, s, t, n, scale, out=None: r(q, s, t.clamp(max=1), n + 1, scale, out),
    "pairs heads wrongly": lambda r, q, s, t, n, scale, out=None: r(q, s.flip(2), t, n, scale, out),
    "swaps K and V": lambda r, q, s, t, n, scale, out=None: r(q, s.flip(1), t, n, scale, out),
    "forgets the scale": lambda r, q, s, t, n, scale, out=None: r(q, s, t, n, 1.0, out),
    "leaves `out` alone": lambda r, q, s, t, n, scale, out=None: r(q, s, t, n, scale) if out is None else out,
}
STORE_MISTAKES: dict[str, Callable[..., Any]] = {
    "swaps K and V": lambda r, k, v, s, slots: r(v, k, s, slots),
    "is off by one": lambda r, k, v, s, slots: r(k, v, s, slots + 1),
    "forgets a token": lambda r, k, v, s, slots: r(k[2:], v[2:], s, slots[2:]),
    "stores in block 1": lambda r, k, v, s, slots: r(k, v, s, slots.clamp(max=s.shape[3])),
}
# (right, q, k, v, storage, block table, cu_q, kv_lens, longest chunk, scale, out)
PREFILL_MISTAKES: dict[str, Callable[..., Any]] = {
    "forgets what came before": lambda r, q, k, v, s, t, c, n, m, x, out=None: r(q, k, v, s, t, c, c.diff(), m, x, out),
    "forgets one token before": lambda r, q, k, v, s, t, c, n, m, x, out=None: r(
        q, k, v, s, t, c, (n - 1).clamp(min=0), m, x, out
    ),
    "sees the next token": lambda r, q, k, v, s, t, c, n, m, x, out=None: r(
        q, k.roll(-1, 0), v.roll(-1, 0), s, t, c, n, m, x, out
    ),
    "swaps K and V": lambda r, q, k, v, s, t, c, n, m, x, out=None: r(q, v, k, s.flip(1), t, c, n, m, x, out),
    "pairs heads wrongly": lambda r, q, k, v, s, t, c, n, m, x, out=None: r(q.flip(1), k, v, s, t, c, n, m, x, out),
    "forgets the scale": lambda r, q, k, v, s, t, c, n, m, x, out=None: r(q, k, v, s, t, c, n, m, 1.0, out),
    "ends a chunk too late": lambda r, q, k, v, s, t, c, n, m, x, out=None: r(
        q, k, v, s, t, torch.cat((c[:-1], c[-1:] + 1)), n, m, x, out
    ),
    "leaves `out` alone": lambda r, q, k, v, s, t, c, n, m, x, out=None: (
        r(q, k, v, s, t, c, n, m, x) if out is None else out
    ),
}
DECODE_MISTAKES: dict[str, Callable[..., Any]] = {
    "forgets a split": lambda r, q, s, t, n, x, splits, space=None, out=None: r(
        q, s, t, n - n // splits, x, splits, space, out
    ),
    "leaves `out` alone": lambda r, q, s, t, n, x, splits, space=None, out=None: (
        r(q, s, t, n, x, splits) if out is None else out
    ),
}
# (right, x, weight, splits, out): what a kernel for packed weights gets wrong
PACKED_MISTAKES: dict[str, Callable[..., Any]] = {
    "is off by one in the zero points": lambda r, x, w, *a, out=None: r(x, w._replace(zeros=w.zeros + 1), *a, out=out),
    "takes the next group's scale": lambda r, x, w, *a, out=None: r(
        x, w._replace(scales=w.scales.roll(-1, 0)), *a, out=out
    ),
    "takes the next row's zero point": lambda r, x, w, *a, out=None: r(
        x, w._replace(zeros=w.zeros.roll(-1, 1)), *a, out=out
    ),
    "swaps the halves of a word": lambda r, x, w, *a, out=None: r(
        x, w._replace(packed=w.packed << 16 | (w.packed >> 16 & 0xFFFF)), *a, out=out
    ),
    "is off by one in the columns": lambda r, x, w, *a, out=None: r(x.roll(1, 1), w, *a, out=out),
    "leaves columns in the file's order": lambda r, x, w, *a, out=None: r(x, w._replace(perm=None), *a, out=out),
    "forgets a block": lambda r, x, w, *a, out=None: r(
        x, w._replace(packed=torch.cat((w.packed[:, :-1], torch.zeros_like(w.packed[:, -1:])), 1)), *a, out=out
    ),
    "leaves `out` alone": lambda r, x, w, *a, out=None: r(x, w, *a) if out is None else out,
}
DEQUANTIZE_MISTAKES: dict[str, Callable[..., Any]] = {
    "is off by one in the zero points": lambda r, w, out=None: r(w._replace(zeros=w.zeros + 1), out),
    "rounds twice": lambda r, w, out=None: (
        r(w._replace(dtype=torch.float16), None).to(w.dtype)
        if out is None
        else out.copy_(r(w._replace(dtype=torch.float16), None))
    ),
    "leaves `out` alone": lambda r, w, out=None: r(w) if out is None else out,
}
MISTAKES = {
    "int4_gemv": ("in the order of activations", PACKED_MISTAKES),
    "int4_gemm": ("in the order of activations", PACKED_MISTAKES),
    "dequantize": ("scales of more bits", DEQUANTIZE_MISTAKES),
    "paged_attention": ("lengths", ATTENTION_MISTAKES),
    "store_kv": ("padding", STORE_MISTAKES),
    "flash_prefill": ("prompts, decodes, padding", PREFILL_MISTAKES),
    "paged_decode": ("16 splits", DECODE_MISTAKES),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "case", "mistake"),
    [(name, case, mistake) for name, (case, mistakes) in MISTAKES.items() for mistake in mistakes],
)
def test_the_checks_refuse(name: str, case: str, mistake: str, dtype: torch.dtype) -> None:
    kernel = harness.kernels()[name]
    twin = getattr(importlib.import_module(kernel.module), f"{name}_reference")
    wrong = MISTAKES[name][1][mistake]

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        return wrong(twin, *args, **kwargs)

    mistaken.__name__ = mistake
    with pytest.raises(AssertionError):
        kernel.check(
            SimpleNamespace(**{name: mistaken, f"{name}_reference": twin}), "cpu", dtype, **kernel.shapes[case]
        )
    kernel.check(SimpleNamespace(**{name: twin, f"{name}_reference": twin}), "cpu", dtype, **kernel.shapes[case])
