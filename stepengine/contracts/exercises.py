"""Checks of the notebooks' exercises: each compares the reader's function with something independent."""

import random
from collections.abc import Callable
from typing import Any

import torch

from stepengine.contracts.chunk_exercises import check_decode_last, check_mix
from stepengine.contracts.graph_exercises import check_bucket, check_idle_fraction
from stepengine.contracts.paged_exercises import check_copies, check_pick_victim, check_slot
from stepengine.contracts.prefix_exercises import check_hit_tokens
from stepengine.contracts.quant_exercises import check_compensate, check_quantize_group
from stepengine.contracts.report import (
    Promise,
    Report,
    called,
    expect,
    name_of,
    run_promises,
    same_number,
    whole_number,
)
from stepengine.core.kv_pool import KVPool
from stepengine.core.request import Request, SamplingParams
from stepengine.core.seams import KVCache, Limits
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import tiny_config

__all__ = [
    "check_bucket",
    "check_compensate",
    "check_continuous_steps",
    "check_copies",
    "check_decode_last",
    "check_greedy_generate",
    "check_hit_tokens",
    "check_idle_fraction",
    "check_kv_bytes_per_token",
    "check_mix",
    "check_my_cache",
    "check_pick_victim",
    "check_quantize_group",
    "check_slot",
    "check_static_steps",
    "check_tokens_computed",
]


def check_greedy_generate(greedy_generate: Callable[..., list[int]], llm: Any) -> Report:
    """Notebook 00: `greedy_generate(model, ids, max_tokens, eos)` against stage 0's engine, run as `llm`."""
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    for first in range(10, 100):  # until the answer holds two different tokens
        prompt = list(range(first, first + 6))
        right = llm.generate([prompt], params)[0].outputs[0].token_ids
        if len(set(right)) > 1:
            break
    absent = next(token for token in range(llm.config.vocab_size) if token not in right)

    passes = 0

    def model(ids: Any) -> Any:
        nonlocal passes
        passes += 1
        expect(passes <= 3 * params.max_tokens, f"{passes} forward passes for at most {params.max_tokens} new tokens")
        return llm.logits(ids)

    def compare(max_tokens: int, eos: int, wanted: list[int]) -> None:
        nonlocal passes
        ids, passes = list(prompt), 0
        case = f"prompt of {len(prompt)} tokens, max_tokens={max_tokens}, eos={eos}"
        got = called(case, greedy_generate, model, ids, max_tokens, eos)
        expect(ids == prompt, f"{case}: the list `ids` was changed")
        expect(isinstance(got, list), f"{case}: the answer is a {type(got).__name__}, not a list of token ids")
        new = [whole_number(token, f"{case}: new token {place}") for place, token in enumerate(got)]
        expect(new == wanted, f"{case}: got {new}, stage 0 gives {wanted}")

    def one() -> None:
        compare(1, absent, right[:1])

    def several() -> None:
        compare(6, absent, right)

    def at_once() -> None:
        compare(6, right[0], right[:1])

    def midway() -> None:
        stop = next(token for token in right if token != right[0])
        compare(6, stop, right[: right.index(stop) + 1])

    return run_promises(
        "greedy_generate",
        [
            Promise("one new token is the most likely one", one, "argmax of the last row of model(ids)"),
            Promise("six new tokens are stage 0's", several, "append each token before the next pass"),
            Promise("an end token that comes at once is the whole answer", at_once, "check for eos after appending"),
            Promise("nothing comes after the end token", midway, "return as soon as the new token is eos"),
        ],
    )


def check_tokens_computed(tokens_computed: Callable[[int, int], int], llm: Any) -> Report:
    """Notebook 00: `tokens_computed(P, N)` against the traces of stage 0's engine, run as `llm`."""

    def against_trace(prompt_tokens: int, new_tokens: int) -> None:
        prompt = [1 + number % 100 for number in range(prompt_tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        before = len(llm.trace.steps)
        llm.generate([prompt], params)
        spent = sum(step.plan.num_tokens for step in llm.trace.steps[before:])
        case = f"P={prompt_tokens}, N={new_tokens}"
        got = called(case, tokens_computed, prompt_tokens, new_tokens)
        same_number(got, spent, case, f"the trace sums to {spent}")

    def large() -> None:
        wanted = sum(1000 + step for step in range(5000))
        case = "P=1000, N=5000"
        same_number(called(case, tokens_computed, 1000, 5000), wanted, case, f"adding up all steps gives {wanted}")

    return run_promises(
        "tokens_computed",
        [
            Promise("one new token runs the prompt once", lambda: against_trace(5, 1), "N = 1 leaves P"),
            Promise("two new tokens run P and P + 1", lambda: against_trace(5, 2), "each step is one token longer"),
            Promise("a longer run sums to the trace", lambda: against_trace(3, 9), "N*P plus a triangle"),
            Promise("five thousand steps agree with the plain sum", large, "0 + 1 + ... + (N-1) = N*(N-1)/2"),
        ],
    )


def check_kv_bytes_per_token(kv_bytes_per_token: Callable[[ModelConfig, torch.dtype], int]) -> Report:
    """Notebook 01a: `kv_bytes_per_token(cfg, dtype)` against the bytes of K/V storage that the engine allocates."""

    def stored(cfg: ModelConfig, dtype: torch.dtype) -> int:
        pool = KVPool(cfg, num_blocks=1, block_size=4, device=torch.device("meta"), dtype=dtype)  # block 0 and one more
        return sum(layer.nbytes for layer in pool.layers) // (2 * pool.block_size)

    def compare(dtype: torch.dtype, *configs: dict[str, Any]) -> None:
        for given in configs:
            cfg = ModelConfig.from_dict(given)
            case = f"num_layers={cfg.num_layers}, num_heads={cfg.num_heads}, num_kv_heads={cfg.num_kv_heads}, "
            case += f"head_dim={cfg.head_dim}, hidden_size={cfg.hidden_size}, {str(dtype).removeprefix('torch.')}"
            wanted = stored(cfg, dtype)
            same_number(called(case, kv_bytes_per_token, cfg, dtype), wanted, case, f"stored are {wanted}")

    def tiny(**changes: Any) -> dict[str, Any]:
        return tiny_config("llama", **changes)

    def one() -> None:
        compare(torch.bfloat16, tiny(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=16))

    def shared() -> None:
        compare(torch.bfloat16, tiny(), tiny(num_key_value_heads=1))

    def wide() -> None:
        compare(torch.bfloat16, tiny(head_dim=64), tiny(head_dim=8, num_hidden_layers=5))

    def dtypes() -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            compare(dtype, tiny())

    def published() -> None:
        smollm2 = tiny(num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
        qwen3 = tiny_config("qwen3", num_hidden_layers=28, hidden_size=1024, num_attention_heads=16) | {
            "num_key_value_heads": 8,
            "head_dim": 128,
        }
        llama3 = tiny(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
        compare(torch.bfloat16, smollm2, qwen3, llama3 | {"head_dim": 128})

    return run_promises(
        "kv_bytes_per_token",
        [
            Promise("one layer with one head: a key and a value", one, "2 x head_dim numbers, each of dtype.itemsize"),
            Promise("query heads that share a K/V head add nothing", shared, "count num_kv_heads, not num_heads"),
            Promise("head_dim is a number of its own", wide, "hidden_size // num_heads need not be head_dim"),
            Promise("bytes follow the dtype", dtypes, "dtype.itemsize is 2 for bf16 and fp16, 4 for fp32"),
            Promise("SmolLM2-135M, Qwen3-0.6B and Llama-3-8B", published, "2 x layers x K/V heads x head_dim x bytes"),
        ],
    )


def check_my_cache(make: Callable[[Limits], KVCache]) -> Report:
    """Notebook 01a: a cache for stage 1a, made by `make(limits)`, in a tiny engine beside stage 0.

    Unlike `check_kv_cache` it also asks for thrift: each token runs through the model once.
    """
    from stepengine.llm import LLM

    prompt = [5, 9, 2, 7, 3]

    def run(stage: str, cache: Callable[[Limits], KVCache] | None, max_tokens: int) -> tuple[list[int], list[str]]:
        llm = LLM("tiny-random", stage=stage, max_num_seqs=2, max_model_len=32, cache=cache, trace=True)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        output = llm.generate([prompt], params)[0]
        assert llm.trace is not None
        chunks = [f"[{chunk.start}, {chunk.end})" for step in llm.trace.steps for chunk in step.plan.chunks]
        return output.outputs[0].token_ids, chunks

    def honest() -> None:
        for upto in (1, 5):
            limits = Limits(2, 64, 32, 32, 2)
            cache, request = make(limits), Request(0, prompt[:upto], SamplingParams(), max_len=32)
            grant = cache.grow(request, upto)
            request.blocks.extend(grant.blocks if grant else ())
            kept = cache.commit(request, upto)
            kept = whole_number(kept, f"commit(request, {upto})")
            expect(
                0 <= kept <= upto,
                f"commit(request, {upto}) answered {kept}: the K/V of token {upto} would be read and never written",
            )

    def right() -> None:
        for max_tokens in (1, 2, 6):
            got, wanted = run("1a", make, max_tokens)[0], run("0", None, max_tokens)[0]
            expect(got == wanted, f"prompt {prompt}, {max_tokens} new tokens: got {got}, stage 0 gives {wanted}")

    def thrifty() -> None:
        for max_tokens in (1, 2, 4):
            chunks = run("1a", make, max_tokens)[1]
            spans = [[int(end) for end in chunk[1:-1].split(", ")] for chunk in chunks]
            spent, needed = sum(end - start for start, end in spans), len(prompt) + max_tokens - 1
            expect(
                spent == needed,
                f"wasteful: {len(prompt)} prompt and {max_tokens} new tokens took {spent} computed tokens where "
                f"{needed} would do; the steps ran {' '.join(chunks)}",
            )

    return run_promises(
        f"KV cache {name_of(make)}",
        [
            Promise("commit claims nothing that was not computed", honest, "commit(request, upto) is at most upto"),
            Promise("the tokens are stage 0's", right, "what survives must be a prefix of what was computed"),
            Promise("no token runs through the model twice", thrifty, "a step runs what commit did not keep"),
        ],
    )


def check_static_steps(static_steps: Callable[[list[int], int], int]) -> Report:
    """Notebook 01b: `static_steps(lengths, slots)` against the decode steps in traces of stage 1a's engine."""
    return _check_steps(
        "static_steps",
        static_steps,
        "1a",
        [
            (
                "one request: its first token comes with its prompt",
                [([1], 1), ([5], 1)],
                "which of its tokens do decode steps write?",
            ),
            ("a batch runs until its longest has ended", [([2, 7, 3], 3), ([4, 4], 3)], "who in the batch ends last?"),
            (
                "the next batch begins when all of the last one have ended",
                [([3, 2], 1), ([2, 7, 3, 4, 1], 2)],
                "take the list in order, `slots` at a time",
            ),
            ("a batch of one-token answers decodes nothing", [([1, 1, 3], 2)], "a batch need not decode at all"),
        ],
    )


def check_continuous_steps(continuous_steps: Callable[[list[int], int], int]) -> Report:
    """Notebook 01b: `continuous_steps(lengths, slots)` against the decode steps in traces of stage 1b's engine."""
    return _check_steps(
        "continuous_steps",
        continuous_steps,
        "1b",
        [
            (
                "one request: its first token comes with its prompt",
                [([1], 1), ([5], 1)],
                "which of its tokens do decode steps write?",
            ),
            ("requests that all find a place end with the longest", [([2, 7, 3], 3)], "nobody has to wait"),
            (
                "who waits takes the first place that falls free",
                [([3, 2], 1), ([2, 7, 3, 4, 1], 2)],
                "which place falls free first, and after how many decode steps?",
            ),
            (
                "the queue keeps its order: who comes last starts last, however long",
                [([2, 2, 2, 2, 9], 2)],
                "neither sort the lengths nor share the work out evenly",
            ),
            (
                "a one-token answer gives its place back at once",
                [([1, 1, 4, 1, 3], 2)],
                "how many decode steps does it keep its place?",
            ),
        ],
    )


def _check_steps(
    name: str,
    answer: Callable[[list[int], int], int],
    stage: str,
    promises: list[tuple[str, list[tuple[list[int], int]], str]],
) -> Report:
    """A count of decode steps against the engine's, case by case; all requests are there from the start."""
    rng = random.Random(1)
    crowd = ([rng.randint(1, 15) for _ in range(20)], 6)
    promises = [*promises, ("twenty requests on six places", [crowd], "run a smaller case by hand, then compare")]

    def check(cases: list[tuple[list[int], int]]) -> Callable[[], None]:
        def compare() -> None:
            for lengths, slots in cases:
                given = list(lengths)
                case = f"lengths={lengths}, slots={slots}"
                got = called(case, answer, given, slots)
                expect(given == lengths, f"{case}: the list `lengths` was changed")
                wanted = _decode_steps(stage, lengths, slots)
                same_number(got, wanted, case, f"the trace of stage {stage} has {wanted} decode steps")

        return compare

    return run_promises(name, [Promise(text, check(cases), hint) for text, cases, hint in promises])


def _decode_steps(stage: str, lengths: list[int], slots: int) -> int:
    """Steps, in a run of a tiny engine, in which no request runs its prompt."""
    from stepengine.llm import LLM

    llm = LLM("tiny-random", stage=stage, max_num_seqs=slots, max_model_len=32, trace=True)
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    llm.generate([[1 + number, 2] for number in range(len(lengths))], params)
    assert llm.trace is not None
    return sum(all(chunk.start > 0 for chunk in step.plan.chunks) for step in llm.trace.steps)
