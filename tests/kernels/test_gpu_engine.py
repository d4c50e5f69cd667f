"""Engines on a real GPU: captured and pipelined steps give the tokens of eager ones: `make gpu-test`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepengine import LLM, SamplingParams
from tests.kernels import harness

pytestmark = [
    pytest.mark.gpu,
    harness.needs_triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda is not available"),
]
SIZES: dict[str, Any] = dict(device="cuda", max_num_seqs=12, max_model_len=256, block_size=16, trace=True)
PROMPTS = [[(7 * n + i) % 250 for i in range(3 + 9 * n)] for n in range(16)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, max_tokens=24, seed=3)
SWITCHES = [{"cuda_graphs": True}, {"pipelined": True}, {"cuda_graphs": True, "pipelined": True}]


def tokens(folder: Path, params: SamplingParams, **settings: Any) -> tuple[list[list[int]], LLM]:
    llm = LLM(folder, stage=3, **{**SIZES, "num_blocks": 120, **settings})
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params)], llm


@pytest.mark.parametrize("switches", SWITCHES, ids=" ".join)
@pytest.mark.parametrize(
    "params", [GREEDY, GREEDY.replace(repetition_penalty=1.3), DRAWN, DRAWN.replace(top_k=5)], ids=str
)
def test_fp32_tokens_do_not_change(
    switches: dict[str, bool], params: SamplingParams, checkpoint: Callable[..., Path]
) -> None:
    want, _ = tokens(checkpoint("qwen3"), params, dtype="float32")
    got, llm = tokens(checkpoint("qwen3"), params, dtype="float32", **switches)
    assert got == want
    assert llm.trace is not None
    if "cuda_graphs" in switches:
        decodes = [r for r in llm.trace.steps if r.plan.chunks and r.plan.num_tokens == len(r.plan.chunks)]
        assert decodes and all(record.replayed >= record.plan.num_tokens for record in decodes)
    assert all(r.device_ended > r.device_began > 0 for r in llm.trace.steps if r.plan.chunks)


@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[2]], ids=" ".join)
def test_bf16_tokens_are_those_of_eager_steps_padded_alike(
    switches: dict[str, bool], checkpoint: Callable[..., Path]
) -> None:
    want, _ = tokens(checkpoint("qwen3"), GREEDY, dtype="bfloat16", cuda_graphs="padded")
    got, _ = tokens(checkpoint("qwen3"), GREEDY, dtype="bfloat16", **switches)
    assert got == want


def test_replays_allocate_nothing(checkpoint: Callable[..., Path]) -> None:
    _, llm = tokens(checkpoint("qwen3"), GREEDY, dtype="bfloat16", cuda_graphs=True)
    for prompt in PROMPTS[:4]:
        llm.engine.add_request(prompt, GREEDY)
    for _ in range(6):
        llm.engine.advance()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(8):
        llm.engine.advance()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_tight_pool_changes_no_token(preemption: str, checkpoint: Callable[..., Path]) -> None:
    want, _ = tokens(checkpoint("qwen3"), GREEDY, dtype="float32")
    got, llm = tokens(checkpoint("qwen3"), GREEDY, dtype="float32", num_blocks=24, preemption=preemption, **SWITCHES[2])
    assert got == want and llm.stats()["preemptions"] > 0
