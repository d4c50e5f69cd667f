"""Other engines in the GPU suite: `transformers` eager, compiled, batched and `generate_batch`; vLLM where it is."""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import torch

from stepengine.bench import workloads
from stepengine.bench.gpu_setup import Setup, attempt, sync
from stepengine.bench.workloads import Workload
from stepengine.stage5_gptq.checkpoint import QuantizedCheckpoint

Entries = Iterator[tuple[str, Any]]


def load(setup: Setup, dtype: str | None = None) -> Any:
    """The checkpoint as a `transformers` model with SDPA that decodes greedily and knows no end of text."""
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype or setup.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        setup.checkpoint(), dtype=kind, local_files_only=True, attn_implementation="sdpa"
    )
    own = model.generation_config
    own.eos_token_id, own.pad_token_id, own.do_sample = None, 0, False
    own.temperature = own.top_p = own.top_k = None  # unused by greedy search; set, they would warn
    return model.eval().to(setup.device)


@torch.no_grad()
def quantize(setup: Setup, models: Iterable[Any]) -> None:
    """Give models the weights that stage 5 runs, multiplied out and rounded to their dtype."""
    checkpoint = QuantizedCheckpoint(setup.quantized())
    each = list(models)
    for name in checkpoint.names:
        weight = checkpoint.read(name)
        for model in each:
            target = model.get_parameter(f"{name}.weight")
            target.copy_(weight.dequantized(target.dtype))


def offline_set(setup: Setup, count: int | None = None, most: int | None = None) -> Workload:
    """The usual bench: 256 requests, prompts and outputs uniform 100..1024, seed 0; or its first few, shortened."""
    ids = workloads.corpus(None, setup.config.vocab_size, seed=0)
    span = setup.of((100, 1024), (4, 16))
    work = workloads.uniform(ids, 0, setup.of(256, 6), span, span)
    count = count or len(work.prompts)
    lens = tuple(min(n, most or n) for n in work.output_lens[:count])
    return Workload(work.name, work.prompts[:count], lens, work.seed)


class _Clock:
    """A streamer of `generate` that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def alone(setup: Setup, compiled: bool) -> Entries:
    """One request alone through `generate`: ms per token, eager or with a static cache and a compiled forward."""
    if compiled and setup.smoke:
        yield "note", "compiles for CUDA graphs: needs a GPU"
        return
    model = load(setup)
    for context in setup.of((512, 4096), (16,)):
        yield str(context), attempt(lambda c=context: _alone(setup, model, c, compiled))


@torch.no_grad()
def _alone(setup: Setup, model: Any, context: int, compiled: bool) -> dict[str, Any]:
    warmup, steps, rounds = setup.of((8, 64, 3), (1, 3, 1))
    asked = {"cache_implementation": "static"} if compiled else {}
    gaps: list[float] = []
    for turn in range(1 + rounds):
        ids = torch.randint(model.config.vocab_size, (1, context - steps // 2), device=setup.device)
        clock = _Clock()
        # All calls end at the same length, so that what was compiled in the first is used in the others.
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=warmup + steps + 1, streamer=clock, **asked
        )
        times = clock.times[-steps - 1 :]
        if turn:
            gaps += [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
    return {"ms": gaps, "ms_per_token": median(gaps), "by": "host clock between tokens, as a streamer sees them"}


def generate_batched(setup: Setup) -> Entries:
    """`generate` on the usual set, left-padded, in the largest batches that fit; each runs to its longest request."""
    model, work = load(setup), offline_set(setup)
    _batch(setup, model, Workload("warm-up", work.prompts[:4], (4,) * 4, 0), 60)
    for size in setup.of((256, 128, 64), (3,)):
        found = attempt(lambda s=size: _batches(setup, model, work, s))
        yield f"batches of {size}", found
        if "error" not in found:
            yield "best", found
            return


def _batches(setup: Setup, model: Any, work: Workload, size: int) -> dict[str, Any]:
    began, tokens, complete = time.perf_counter(), 0, True
    for at in range(0, len(work.prompts), size):
        window = slice(at, at + size)
        part = Workload(work.name, work.prompts[window], work.output_lens[window], work.seed)
        # Its own limit of time ends a batch in an orderly way; what came until then counts.
        got = _batch(setup, model, part, max(1.0, setup.left_s() - 8))
        tokens += got
        complete = complete and got == part.num_outputs
    return rate(work, tokens, time.perf_counter() - began, complete)


@torch.inference_mode()
def _batch(setup: Setup, model: Any, work: Workload, seconds: float) -> int:
    """Tokens that were asked for and came."""
    longest = max(map(len, work.prompts))
    ids = torch.zeros(len(work.prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(work.prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    found = model.generate(
        ids.to(setup.device),
        attention_mask=mask.to(setup.device),
        max_new_tokens=max(work.output_lens),
        max_time=seconds,
    )
    sync(setup.device)
    return sum(min(n, found.shape[1] - longest) for n in work.output_lens)


def rate(work: Workload, tokens: int, seconds: float, complete: bool) -> dict[str, Any]:
    """Tokens per second of a run; `complete` says whether it got to its end."""
    return {
        "workload": work.describe(),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "complete": complete,
    }


def generate_batch(setup: Setup) -> Entries:
    """`transformers`' continuous batching (`generate_batch`'s manager) on the usual set, each request to its length."""
    from transformers import GenerationConfig

    model, work = load(setup), offline_set(setup)
    asked = GenerationConfig(max_new_tokens=max(work.output_lens), do_sample=False, eos_token_id=-1, pad_token_id=0)
    opened = model.continuous_batching_context_manager
    taken = inspect.signature(opened).parameters
    extra: dict[str, Any] = {"warmup": True} if "warmup" in taken else {}
    if setup.smoke and "continuous_batching_config" in taken:  # by itself it fills all free memory
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        extra["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    with opened(generation_config=asked, block=True, timeout=5, **extra) as manager:
        warm = Workload("warm-up", work.prompts[:8], (8,) * 8, 0) if not setup.smoke else offline_set(setup, 2, 2)
        _serve(manager, warm, setup.left_s)
        began = time.perf_counter()
        tokens = _serve(manager, work, lambda: setup.left_s() - 8)
        seconds = time.perf_counter() - began
        found = rate(work, tokens, seconds, tokens == work.num_outputs)
        yield "best", {**found, "attention": str(model.config._attn_implementation)}


def _serve(manager: Any, work: Workload, left_s: Callable[[], float]) -> int:
    """Tokens that came before the time was over.

    Only ended requests say how many they got. All run side by side, so the others are credited with as
    many as the longest of those: rather too many for the peer than too few.
    """
    each = zip(work.prompts, work.output_lens, strict=True)
    pending = {manager.add_request(input_ids=list(prompt), max_new_tokens=length): length for prompt, length in each}
    tokens = longest = 0
    while pending and left_s() > 0:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            if result.error:
                raise RuntimeError(f"generate_batch gave up on a request: {result.error}")
            got = len(result.generated_tokens)
            del pending[result.request_id]
            tokens, longest = tokens + got, max(longest, got)
        elif result is None and not manager.is_running():
            raise RuntimeError("generate_batch's thread ended before its requests")
    return tokens + sum(min(length, longest) for length in pending.values())


def vllm(setup: Setup) -> Entries:
    """vLLM on the usual set, where it is installed."""
    try:
        from vllm import LLM as Engine
        from vllm import SamplingParams
    except ImportError:
        yield "note", "vLLM is not installed"
        return
    work = offline_set(setup)
    llm = Engine(
        str(setup.checkpoint()), skip_tokenizer_init=True, dtype=setup.dtype, max_model_len=2048, max_num_seqs=256
    )
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in work.prompts]
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in work.output_lens]
    llm.generate(prompts[:8], params[0], use_tqdm=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    yield "best", rate(work, tokens, seconds, tokens == work.num_outputs)
