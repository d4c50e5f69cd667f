"""`LLM`: a model and an engine of any stage behind vLLM's names."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

import stepengine
from stepengine.core.batch import Staging
from stepengine.core.engine import Engine
from stepengine.core.graphs import MOST_TOKENS, Graphs, cuda_capture
from stepengine.core.interrupts import interrupts_held
from stepengine.core.kv_pool import KVPool
from stepengine.core.pipelined import PipelinedEngine
from stepengine.core.request import Request, RequestOutput, SamplingParams
from stepengine.core.runner import Runner
from stepengine.core.seams import Limits, Parts
from stepengine.core.streams import Cuda, Inline, Stream, Thread
from stepengine.errors import InvalidRequest, InvalidSetting
from stepengine.model.catalog import resolve
from stepengine.model.config import ModelConfig, check_run_length
from stepengine.model.tokenizer import load_tokenizer
from stepengine.sizing import DEFAULT_SEQS, Sizes, check_count, fit_blocks, fit_host_blocks, fit_slots, measured_blocks
from stepengine.stage0_naive.attention import RecomputedAttention
from stepengine.stages import check_settings, find_stage
from stepengine.trace import Trace

Prompt = str | Sequence[int]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LLM:
    """A language model served by one stage of the engine.

    model: catalogue name, local folder or hub id. stage: 0, "1a", "1b", 1, 2, 3, "4a", "4b", 4 or a
    folder's name. device: "cpu" or "cuda". dtype: "float32", "bfloat16", "float16", or "auto" (fp32 on
    a CPU, the checkpoint's on a GPU). max_model_len (tokens): prompt and output of one request.
    max_num_batched_tokens: tokens in one step. kv_cache_memory (bytes): K/V storage. seed: of requests
    that bring none. trace: record every step (`llm.trace`). scheduler, cache, block_pool, attention:
    the reader's own part in place of the stage's. From stage 2: block_size (tokens), num_blocks (in
    place of kv_cache_memory), preemption "recompute" or "swap", swap_space (bytes of host memory for
    swapped blocks), gpu_memory_utilization (of the GPU, for weights, activations and K/V together).
    From stage 3: cuda_graphs (on a GPU, replay captured steps; "padded", on any device: run steps at
    the sizes of the graphs, kernel by kernel), pipelined (launch a step while the one before it runs;
    on a CPU in a thread). From stage 4: long_prefill_token_threshold (most tokens of one prompt in a
    step), prefix_index "hash" or "radix", evictor (the reader's own). From stage 5, whose model is a GPTQ
    checkpoint or is quantised once and kept: bits 2, 3, 4 or 8, group_size (columns that share a scale;
    -1: whole rows), quantization "gptq" or "rtn" (round to nearest), int8_head (embedding and head in 8
    bits). Raises `InvalidSetting` or `ModelError`.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        stage: int | str = 1,
        device: str = "cpu",
        dtype: str | torch.dtype = "auto",
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        kv_cache_memory: int | None = None,
        seed: int = 0,
        trace: bool = False,
        scheduler: Callable[..., Any] | None = None,
        cache: Callable[..., Any] | None = None,
        attention: Callable[..., Any] | None = None,
        block_pool: Callable[..., Any] | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        preemption: str | None = None,
        swap_space: int | None = None,
        gpu_memory_utilization: float | None = None,
        cuda_graphs: bool | str | None = None,
        pipelined: bool | None = None,
        long_prefill_token_threshold: int | None = None,
        prefix_index: str | Callable[..., Any] | None = None,
        evictor: Callable[..., Any] | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        quantization: str | None = None,
        int8_head: bool | None = None,
        **later: Any,
    ) -> None:
        self.stage = find_stage(stage)
        sizes = Sizes(max_num_seqs, kv_cache_memory, num_blocks, preemption, swap_space, gpu_memory_utilization)
        staged = {"block_pool": block_pool, "block_size": block_size, **vars(sizes), "max_num_seqs": None}
        staged |= {"cuda_graphs": cuda_graphs, "pipelined": pipelined, "prefix_index": prefix_index}
        staged |= {"evictor": evictor, "long_prefill_token_threshold": long_prefill_token_threshold}
        quantized = {"bits": bits, "group_size": group_size, "quantization": quantization, "int8_head": int8_head}
        check_settings(self.stage, {**staged, **quantized, **later}, _names())
        own = {"scheduler": scheduler, "cache": cache, "attention": attention, "block_pool": block_pool}
        for name, part in own.items():
            if part is not None and not callable(part):
                raise InvalidSetting(f"{name} is {part!r}; it must be a class or a function that makes the part.")
        parts = replace(self.stage.parts, **{name: part for name, part in own.items() if part is not None})
        counts = {"max_num_batched_tokens": max_num_batched_tokens, "max_model_len": max_model_len}
        counts |= {"block_size": block_size, "long_prefill_token_threshold": long_prefill_token_threshold}
        for name, value in counts.items():
            check_count(name, value)
        if prefix_index is not None or evictor is not None:
            parts = _with_prefix_pool(parts, block_pool, prefix_index, evictor)
        if any(value is not None for value in quantized.values()):  # of stage 5, or they would have been refused
            parts = replace(parts, prepare_model=partial(parts.prepare_model, **quantized))
        sizes.check()
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise InvalidSetting(f"seed is {seed!r}; it must be a whole number.")
        self.device = device_named(device)
        _check_switches(cuda_graphs, pipelined, self.device)

        self.name = str(model)
        folder = resolve(model)
        self.config = ModelConfig.from_folder(folder)
        self.dtype = _dtype(dtype, self.device, self.config)
        max_model_len = max_model_len or min(2048, self.config.max_position_embeddings)
        if max_model_len > self.config.max_position_embeddings:
            raise InvalidSetting(
                f"max_model_len is {max_model_len}, and {self.name} was made for at most "
                f"{self.config.max_position_embeddings} positions; lower it."
            )
        check_run_length(self.config, max_model_len)
        budget = max_num_batched_tokens or max(2048, max_model_len)
        _check_chunks(parts.scheduler, budget, max_model_len, max_num_seqs, long_prefill_token_threshold)
        if block_size is not None and block_size > max_model_len:
            raise InvalidSetting(
                f"block_size is {block_size}, above max_model_len {max_model_len}: no request fills one; lower it."
            )
        block_size = parts.block_size(max_model_len, block_size)
        block_bytes = block_size * self.config.kv_bytes_per_token(self.dtype)
        table_length = -(-max_model_len // block_size) if block_size else 0
        num_blocks, host_blocks = None, 0
        if parts.block_pool is None:
            seqs = fit_slots(sizes, block_bytes, self.device)
            num_blocks = seqs if block_size else 0
        else:
            seqs = max_num_seqs or min(DEFAULT_SEQS, budget)
            num_blocks = fit_blocks(sizes, block_bytes, seqs * table_length, self.device)
            host_blocks = fit_host_blocks(sizes, block_bytes, seqs * table_length)

        self.tokenizer = load_tokenizer(folder)
        decoder = parts.prepare_model(folder, self.device, self.dtype, max_model_len)
        if num_blocks is None:
            most = seqs * table_length
            num_blocks = measured_blocks(sizes, block_bytes, most, decoder, self.device, max_model_len, budget, seqs)
        limits = Limits(
            seqs,
            budget,
            max_model_len,
            block_size,
            num_blocks,
            preemption or "recompute",
            host_blocks,
            long_prefill_token_threshold or 0,
        )
        kv_cache = (
            parts.cache(limits) if parts.block_pool is None else parts.cache(limits, parts.block_pool(num_blocks))
        )
        if not block_size and kv_cache.capacity_tokens == 0:
            raise InvalidSetting(f"This cache stores K/V, and stage {self.stage.name} has no storage; use stage 1a.")
        pool = KVPool(self.config, num_blocks, block_size, self.device, self.dtype, host_blocks)
        attend = parts.attention(self.config, pool)
        if cuda_graphs and not attend.capturable:
            raise InvalidSetting(
                f"cuda_graphs is {cuda_graphs!r}, and {type(attend).__name__} cannot be captured; leave one of the two "
                f"out."
            )
        if pipelined and not block_size:
            raise InvalidSetting("pipelined is True, and this engine stores no K/V for the next step; use a cache.")
        if cuda_graphs:  # a row for padding, and room for the largest bucket
            staging = Staging(
                self.device, seqs + 1, max(budget, MOST_TOKENS), table_length, block_size, bool(pipelined)
            )
        else:
            staging = Staging(self.device, seqs, budget, table_length, block_size, bool(pipelined))
        graphs = Graphs(cuda_capture() if cuda_graphs is True else None) if cuda_graphs else None
        runner = Runner(decoder, attend, staging, pool, graphs, _stream(self.device, staging.max_rows, bool(pipelined)))
        runner.warm_up()
        switches = {"cuda_graphs": cuda_graphs or False, "pipelined": bool(pipelined)}
        self.trace = Trace({**self._meta(decoder, limits, parts), **switches}, self.tokenizer) if trace else None
        self.engine = (PipelinedEngine if pipelined else Engine)(
            parts.scheduler(limits, kv_cache),
            kv_cache,
            runner,
            limits,
            eos_ids=self.config.eos_token_ids,
            tokenizer=self.tokenizer,
            recorder=self.trace,
            seed=seed,
        )

    def _meta(self, decoder: torch.nn.Module, limits: Limits, parts: Parts) -> dict[str, Any]:
        """What a trace says of the run it comes from."""
        return {
            "stage": self.stage.name,
            "model": self.name,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            **vars(limits),
            "chunked": _said(parts.scheduler, "chunks_prompts", False),
            "batching": _said(parts.scheduler, "batching", "continuous"),
            "kv_bytes_per_token": self.config.kv_bytes_per_token(self.dtype),
            "weight_bytes": sum(weight.nbytes for weight in decoder.parameters()),
            "versions": {"stepengine": stepengine.__version__, "torch": torch.__version__},
        }

    # -- prompts in, texts out --------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        priority: int | Sequence[int] = 0,
        progress: bool = False,
        cache_salt: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """Run prompts (texts or token-id lists) to their end; outputs in the prompts' order.

        One `params` (`priority`, `cache_salt`) for all, or one per prompt. The whole list is checked before
        anything is scheduled; `InvalidRequest` names the index. Requests that are already in the engine
        go on beside these. Ctrl-C aborts these prompts and leaves the engine usable.
        """
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # arrays and tensors
        if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise InvalidRequest(
                f"prompts is {prompts!r}; it must be a text, a list of token ids, or a list of either."
            )
        single = isinstance(prompts, str) or _is_ids(prompts)
        listed: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        each = (
            _one_per_prompt("params", params, len(listed)) if params is not None else [SamplingParams()] * len(listed)
        )
        order = _one_per_prompt("priority", priority, len(listed))
        salts = _one_per_prompt(
            "cache_salt", [cache_salt] * len(listed) if isinstance(cache_salt, str) else cache_salt, len(listed)
        )
        encoded = []
        for index, (prompt, own, rank, salt) in enumerate(zip(listed, each, order, salts, strict=True)):
            try:
                ids = self._encode(prompt)
                self.engine.check(ids, own, rank, salt)
            except InvalidRequest as error:
                raise InvalidRequest(f"Prompt {index}: {error}") from None
            encoded.append(ids)
        ids_of: list[int] = []
        try:
            for request in zip(encoded, each, order, salts, strict=True):
                with interrupts_held():  # an id that is queued is an id that is known
                    ids_of.append(self.engine.add_request(*request))
                    self.engine.claimed.add(ids_of[-1])
            outputs = {output.request_id: output for output in self._run(ids_of, progress)}
        except BaseException:
            for request_id in ids_of:
                self.engine.abort(request_id)
            self.engine.collect(ids_of)
            raise
        for prompt, request_id in zip(listed, ids_of, strict=True):
            outputs[request_id].prompt = prompt if isinstance(prompt, str) else None
        return [outputs[request_id] for request_id in ids_of]

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate` for one conversation or several, through the model's chat template."""
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = messages if many else [messages]
        return self.generate([self.chat_prompt(talk) for talk in conversations], params)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation [{"role": ..., "content": ...}, ...], ready for the answer."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InvalidRequest(f"{self.name} has no chat template; give generate a text or token ids.")
        if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
            raise InvalidRequest("A conversation is a list of {'role': ..., 'content': ...}; it must not be empty.")
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Run one prompt and yield as it grows: texts are the new pieces, token ids the new tokens.

        The last piece has `finished=True`. Leaving the loop early aborts the request.
        """
        params = SamplingParams() if params is None else params
        ids = self._encode(prompt)
        self.engine.check(ids, params)
        return self._stream(ids, params, prompt if isinstance(prompt, str) else None)

    def _stream(self, ids: list[int], params: SamplingParams, prompt: str | None) -> Iterator[RequestOutput]:
        request_id = self.engine.add_request(ids, params)
        self.engine.claimed.add(request_id)
        told = [(0, 0)] * params.n  # characters and tokens handed out, per sample
        finished = False
        try:
            while not finished:
                self.engine.advance()
                output = self.engine.output(request_id)
                output.prompt, finished = prompt, output.finished
                whole = [(len(sample.text), len(sample.token_ids)) for sample in output.outputs]
                if whole == told and not finished:
                    continue
                pieces = [
                    replace(sample, text=sample.text[chars:], token_ids=sample.token_ids[tokens:])
                    for sample, (chars, tokens) in zip(output.outputs, told, strict=True)
                ]
                told = whole
                yield replace(output, outputs=pieces)
        finally:
            self.engine.abort(request_id)
            self.engine.collect([request_id])

    def _run(self, request_ids: list[int], progress: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        left, done = set(request_ids), []
        with tqdm(total=len(left), unit="request", disable=not progress) as bar:
            while left:
                self.engine.advance()
                ended = self.engine.collect(left)
                left -= {output.request_id for output in ended}
                done += ended
                bar.update(len(ended))
        return done

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _plain_ids(prompt)
        if self.tokenizer is None:
            raise InvalidRequest(f"{self.name} has no tokenizer, so a text cannot be its prompt; give token ids.")
        return list(self.tokenizer.encode(prompt))

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The model as a plain function of one sequence: logits [T, vocab] of its T tokens, nothing cached."""
        self.engine.check(token_ids, SamplingParams(max_tokens=1))
        request = Request(0, list(token_ids), SamplingParams(), max_len=len(token_ids))
        staging = Staging(self.device, 1, len(token_ids), 0, 0)
        batch = staging.fill([request.schedule()], {0: request})
        model = self.engine.runner.model
        return model.logits(model(batch, RecomputedAttention()))

    def stats(self) -> dict[str, Any]:
        """Counters since the model was loaded (steps, tokens, preemptions, swapped bytes, K/V utilisation, ...)

        and the K/V blocks as they are now; see `Engine.stats`.
        """
        return self.engine.stats()


def _names() -> list[str]:
    return [name for name in inspect.signature(LLM).parameters if name != "later"]


def _is_ids(prompts: object) -> bool:
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence) or not prompts:
        return False
    return all(isinstance(item, Integral) for item in prompts)


def _plain_ids(prompt: Any) -> Any:
    """Whole numbers of any kind (numpy's too) as a list of int; what else it may be is left to the engine's check."""
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
        return prompt
    return [int(token) if isinstance(token, Integral) and not isinstance(token, bool) else token for token in prompt]


def _one_per_prompt(name: str, given: Any, count: int) -> list[Any]:
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise InvalidRequest(f"{name} has {len(given)} entries for {count} prompts; give one for all or one each.")
    return list(given)


def device_named(name: str) -> torch.device:
    """The device "cpu" or "cuda"; `InvalidSetting` for another name, or where there is no GPU."""
    if name not in ("cpu", "cuda"):
        raise InvalidSetting(f"device is {name!r}; it must be 'cpu' or 'cuda'.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidSetting(
            "device is 'cuda', but torch finds no GPU here; use device='cpu' or see `stepengine doctor`."
        )
    return torch.device(name)


def _with_prefix_pool(parts: Parts, block_pool: Any, prefix_index: Any, evictor: Any) -> Parts:
    from stepengine.stage4_chunked_prefix.block_pool import prefix_pool

    named = "prefix_index" if prefix_index is not None else "evictor"
    if block_pool is not None:
        raise InvalidSetting(f"{named} is given, and so is block_pool, which brings its own; leave one of them out.")
    if parts.block_pool is None or not hasattr(parts.block_pool(1), "seal"):
        raise InvalidSetting(f"{named} is given, and this stage has no prefix cache; use stage 4b or 4.")
    return replace(parts, block_pool=prefix_pool(prefix_index, evictor))


def _said(part: Any, name: str, default: Any) -> Any:
    """What a part says of itself, one with some arguments filled in (`functools.partial`) too."""
    return getattr(part.func if isinstance(part, partial) else part, name, default)


def _check_chunks(
    scheduler: Any, budget: int, max_model_len: int, max_num_seqs: int | None, threshold: int | None
) -> None:
    if not _said(scheduler, "chunks_prompts", False):
        if budget < max_model_len:
            raise InvalidSetting(
                f"max_num_batched_tokens is {budget}, below max_model_len {max_model_len}; without chunked prefill "
                f"(stage 4a or 4) a prompt runs in one piece, so raise it or lower max_model_len."
            )
        if threshold is not None:
            raise InvalidSetting(
                f"long_prefill_token_threshold is {threshold}, and this stage runs a prompt in one piece; use stage "
                f"4a or 4."
            )
    elif max_num_seqs is not None and budget < max_num_seqs:
        raise InvalidSetting(
            f"max_num_batched_tokens is {budget}, below max_num_seqs {max_num_seqs}: not every request could decode in "
            f"each step; raise it or lower max_num_seqs."
        )


def _check_switches(cuda_graphs: Any, pipelined: Any, device: torch.device) -> None:
    if cuda_graphs not in (None, False, True, "padded"):
        raise InvalidSetting(f"cuda_graphs is {cuda_graphs!r}; it must be True, False or 'padded'.")
    if cuda_graphs is True and device.type != "cuda":
        raise InvalidSetting(
            "cuda_graphs is True, but device is 'cpu', where there is nothing to capture; leave it out, or use "
            "'padded' to run every step at the size of its graph."
        )
    if pipelined not in (None, False, True):
        raise InvalidSetting(f"pipelined is {pipelined!r}; it must be True or False.")


def _stream(device: torch.device, max_rows: int, ahead: bool) -> Stream:
    if device.type == "cuda":
        return Cuda(device, max_rows)
    return Thread() if ahead else Inline()


def _dtype(asked: str | torch.dtype, device: torch.device, config: ModelConfig) -> torch.dtype:
    name = str(asked).removeprefix("torch.")
    if name == "auto":
        name = config.dtype if device.type == "cuda" and config.dtype in DTYPES else "float32"
    if name not in DTYPES:
        raise InvalidSetting(f"dtype is {asked!r}; it must be one of {', '.join(DTYPES)} or 'auto'.")
    return DTYPES[name]
