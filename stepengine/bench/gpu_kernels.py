"""Parts of the GPU suite that run no model: the GPU's ceilings, prefill, paged decode and products with 4 bits."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from stepengine.bench.gpu_setup import Setup, attempt, relative_error, timed

Entries = Iterator[tuple[str, Any]]
BLOCK = 16  # tokens


def ceilings(setup: Setup) -> Entries:
    """What this GPU reaches today: a copy larger than its caches (bytes read plus written), bf16 matrix products."""
    copied = _copy(setup)
    best = {"copy_gbs": copied["gbs"]}
    yield "copy", copied
    tflops = []
    for side in setup.of((4096, 8192, 16384), (64,)):
        made = [torch.randn(2, side, side, device=setup.device).to(getattr(torch, setup.dtype)) for _ in range(2)]
        product = timed([lambda pair=pair: pair[0] @ pair[1] for pair in made], setup.device)
        tflops.append(2e-9 * side**3 / product["median_ms"])
        yield f"matmul {side}", {**product, "tflops": tflops[-1]}
    yield "best", {**best, "matmul_tflops": max(tflops)}


def _copy(setup: Setup) -> dict[str, Any]:
    size = setup.of(1 << 32, 1 << 20)
    sources = [torch.randint(0, 256, (size // 4,), dtype=torch.uint8, device=setup.device).repeat(4) for _ in range(2)]
    target = torch.empty_like(sources[0])
    times = timed([lambda source=source: target.copy_(source) for source in sources], setup.device)
    return {"bytes_moved": 2 * size, **times, "gbs": 2e-6 * size / times["median_ms"]}


def prefill(setup: Setup) -> Entries:
    """Stage 3's prefill kernel, causal, against SDPA's backends on the same heads.

    FLOPs: 4 x Hq x D x the number of (query, key) pairs that causality leaves.
    """
    from stepengine.stage3_flash import kernels

    ours = kernels.flash_prefill_reference if setup.smoke else kernels.flash_prefill
    total = setup.of(16384, 64)
    lengths = setup.of((1024, 2048, 4096, 8192, 16384), (16, 32))
    rng = torch.Generator().manual_seed(0)
    ragged = (total * torch.rand(12, generator=rng).softmax(0)).long().clamp_min(1).tolist()
    yield "error", _prefill_error(setup, kernels, ours)
    for length in lengths:
        yield str(length), _prefill_case(setup, ours, [length] * (total // length), 0, peers=True)
    yield "ragged", _prefill_case(setup, ours, ragged, 0, peers=False)
    chunk, before = setup.of((1024, 15360), (8, 24))
    yield f"{chunk} after {before}", _prefill_case(setup, ours, [chunk] * 4, before, peers=False)


def _prefill_inputs(setup: Setup, lengths: list[int], before: int) -> tuple[Any, ...]:
    config, device, dtype = setup.config, setup.device, getattr(torch, setup.dtype)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    blocks = max(1, len(lengths) * -(-before // BLOCK))
    q, k, v = (torch.randn(sum(lengths), n, dim, device=device).to(dtype) for n in (heads, kv_heads, kv_heads))
    storage = torch.randn(1 + blocks, 2, kv_heads, BLOCK, dim, device=device).to(dtype)
    table = (1 + torch.randperm(blocks, device=device)).int().view(-1 if before else 1, max(1, -(-before // BLOCK)))
    table = table if before else table.expand(len(lengths), 1).contiguous()
    cu_q = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    kv_lens = (torch.tensor(lengths, device=device) + before).int()
    return q, k, v, storage, table, cu_q, kv_lens, max(lengths), 1 / math.sqrt(dim)


def _prefill_error(setup: Setup, kernels: Any, ours: Callable[..., Tensor]) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        inputs = _prefill_inputs(setup, setup.of([700, 1, 130], [7, 1, 5]), setup.of(500, 9))
        q, k, v, storage, *rest = inputs
        exact = kernels.flash_prefill_reference(q.float(), k.float(), v.float(), storage.float(), *rest)
        found = ours(*inputs, out=torch.full_like(q, torch.nan))
        return {"relative_error": relative_error(found, exact), "against": "the kernel's PyTorch twin in fp32"}

    return attempt(measure)


def _prefill_case(
    setup: Setup, ours: Callable[..., Tensor], lengths: list[int], before: int, peers: bool
) -> dict[str, Any]:
    config = setup.config
    pairs = sum(length * before + length * (length + 1) // 2 for length in lengths)
    flops = 4 * config.num_heads * config.head_dim * pairs
    sets = [_prefill_inputs(setup, lengths, before) for _ in range(2)]
    found: dict[str, Any] = {"sequences": len(lengths), "tokens": sum(lengths), "before": before, "flops": flops}

    def case(calls: list[Callable[[], Any]], **more: Any) -> dict[str, Any]:
        times = timed(calls, setup.device)
        tflops = 1e-9 * flops / times["median_ms"]
        peak = setup.ceiling("matmul_tflops")
        return {**times, "tflops": tflops, "of_matmul": tflops / peak if peak else None, **more}

    found["ours"] = attempt(lambda: case([lambda inputs=inputs: ours(*inputs) for inputs in sets]))
    if not peers:
        return found
    for name in setup.of(("FLASH_ATTENTION", "CUDNN_ATTENTION"), ("MATH",)):
        for expanded in (False, True):  # where a backend cannot share K/V heads, it gets them repeated beforehand
            found[name.lower()] = attempt(lambda n=name, e=expanded: _backend(setup, sets, len(lengths), n, e, case))
            if "error" not in found[name.lower()]:
                break
    mine = found["ours"].get("median_ms")
    for name in ("flash_attention", "cudnn_attention"):
        if mine and (theirs := found.get(name, {}).get("median_ms")):
            found[f"speedup_over_{name}"] = theirs / mine
    return found


def _backend(
    setup: Setup, sets: list[tuple[Any, ...]], rows: int, name: str, expanded: bool, case: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    group = setup.config.num_heads // setup.config.num_kv_heads
    dense = []
    for q, k, v, *_ in sets:
        if expanded:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        dense.append([x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)])  # [B, H, L, D]
    with sdpa_kernel(getattr(SDPBackend, name)):
        return case(
            [lambda x=x: sdpa(*x, is_causal=True, enable_gqa=not expanded) for x in dense], kv_heads_repeated=expanded
        )


def decode(setup: Setup) -> Entries:
    """The paged decode kernels of stages 2 and 3 over batch x context, in bytes of K and V a second.

    Peers: SDPA on K/V that lie gathered already, and with the gathering counted; there a K/V head's queries
    are the rows of one product, so K/V are read once.
    """
    config, device, dtype = setup.config, setup.device, getattr(torch, setup.dtype)
    most = setup.of(1 << 20, 1 << 9)  # tokens
    blocks = most // BLOCK
    storage = torch.empty(1 + blocks, 2, config.num_kv_heads, BLOCK, config.head_dim, device=device, dtype=dtype)
    for part in storage.split(4096):
        part.normal_()
    yield "error", attempt(lambda: _decode_error(setup, storage))
    grid = [(b, c) for c in (1024, 4096, 16384, 65536) for b in (1, 8, 32, 128, 256) if b * c <= most]
    for batch, context in setup.of(grid, [(1, 64), (3, 32)]):
        yield f"{batch} x {context}", _decode_case(setup, storage, [context] * batch)
    rng = torch.Generator().manual_seed(0)
    batch, low, high = setup.of((256, 100, 2049), (3, 5, 40))
    yield "ragged", _decode_case(setup, storage, torch.randint(low, high, (batch,), generator=rng).tolist())


def _decode_kernels(setup: Setup) -> dict[str, Callable[..., Tensor]]:
    """{name: f(q, storage, table, kv_lens, scale)}."""
    from stepengine.stage2_paged import kernels as stage2
    from stepengine.stage3_flash import kernels as stage3

    sms = 4 if setup.smoke else torch.cuda.get_device_properties(0).multi_processor_count

    def split(q: Tensor, storage: Tensor, table: Tensor, kv_lens: Tensor, scale: float) -> Tensor:
        splits = stage3.decode_splits(q.shape[0], storage.shape[2], table.shape[1] * BLOCK, sms)
        kernel = stage3.paged_decode_reference if setup.smoke else stage3.paged_decode
        return kernel(q, storage, table, kv_lens, scale, splits)

    return {"stage2": stage2.paged_attention_reference if setup.smoke else stage2.paged_attention, "stage3": split}


def _decode_inputs(setup: Setup, storage: Tensor, lens: list[int], copies: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, table, kv_lens) for each copy; no two copies share a block."""
    config, device = setup.config, setup.device
    entries = -(-max(lens) // BLOCK)
    ids = 1 + torch.randperm(storage.shape[0] - 1, device=device).int()
    kv_lens = torch.tensor(lens, device=device, dtype=torch.int32)
    each = len(lens) * entries
    made = []
    for copy in range(copies):
        q = torch.randn(len(lens), config.num_heads, config.head_dim, device=device).to(storage.dtype)
        made.append((q, ids[copy * each : (copy + 1) * each].view(len(lens), entries), kv_lens))
    return made


def _decode_error(setup: Setup, storage: Tensor) -> dict[str, Any]:
    from stepengine.stage2_paged.kernels import paged_attention_reference

    (q, table, lens), scale = _decode_inputs(setup, storage, setup.of([1, 700, 4096], [1, 9, 32]), 1)[0], 0.1
    used = storage.float() if setup.smoke else storage[: int(table.max()) + 1].float()
    exact = paged_attention_reference(q.float(), used, table, lens, scale)
    errors = {
        name: relative_error(kernel(q, storage, table, lens, scale), exact)
        for name, kernel in _decode_kernels(setup).items()
    }
    return {"relative_error": errors, "against": "the kernels' PyTorch twin in fp32"}


def _decode_case(setup: Setup, storage: Tensor, lens: list[int]) -> dict[str, Any]:
    config = setup.config
    scale = 1 / math.sqrt(config.head_dim)
    token = 2 * config.num_kv_heads * config.head_dim * storage.element_size()
    moved = sum(lens) * token + 2 * len(lens) * config.num_heads * config.head_dim * storage.element_size()
    tokens = len(lens) * -(-max(lens) // BLOCK) * BLOCK
    # Several times the cache of any GPU, and as few copies as that takes.
    copies = max(1, min(16, -(-(1 << 29) // moved), (storage.shape[0] - 1) * BLOCK // tokens))
    inputs = _decode_inputs(setup, storage, lens, setup.of(copies, 1))
    found: dict[str, Any] = {"batch": len(lens), "tokens": sum(lens), "bytes": moved, "copies": len(inputs)}
    copy_gbs = setup.ceiling("copy_gbs")

    def case(calls: list[Callable[[], Any]]) -> dict[str, Any]:
        times = timed(calls, setup.device, budget_s=0.2)
        gbs = 1e-6 * moved / times["median_ms"]
        return {**times, "gbs": gbs, "of_copy": gbs / copy_gbs if copy_gbs else None}

    for name, kernel in _decode_kernels(setup).items():
        found[name] = attempt(lambda f=kernel: case([lambda x=x: f(x[0], storage, x[1], x[2], scale) for x in inputs]))
    if len(set(lens)) > 1:  # SDPA would need a mask, and would read the padding
        return found
    few = inputs[: max(1, (1 << 32) // moved)]
    pairs = [(_rows(q, config.num_kv_heads), _tiles(table, config.num_kv_heads)) for q, table, _ in few]

    def gathered(tiles: Tensor) -> Tensor:  # [2, B, Hk, L, D]
        flat = storage.view(-1, BLOCK * config.head_dim).index_select(0, tiles)
        return flat.view(2, len(lens), config.num_kv_heads, -1, config.head_dim)

    found["gather + sdpa"] = attempt(
        lambda: case([lambda q=q, t=t: sdpa(q, *gathered(t), scale=scale) for q, t in pairs])
    )

    def ready() -> dict[str, Any]:
        made = [(q, *gathered(tiles)) for q, tiles in pairs]
        return case([lambda x=x: sdpa(*x, scale=scale) for x in made])

    found["sdpa"] = attempt(ready)
    return found


def _rows(q: Tensor, kv_heads: int) -> Tensor:
    return q.view(q.shape[0], kv_heads, -1, q.shape[2])  # [B, Hk, G, D]


def _tiles(table: Tensor, kv_heads: int) -> Tensor:
    """Which tile (one head of one block) comes where, keys before values: [2 x B x Hk x M]."""
    keys = table.long()[:, None] * 2 * kv_heads + torch.arange(kv_heads, device=table.device)[:, None]  # [B, Hk, M]
    return torch.cat((keys.flatten(), keys.flatten() + kv_heads))


def int4(setup: Setup) -> Entries:
    """Stage 5's products with weights of 4 bits against cuBLAS's in bf16: one large matrix, and the model's own layers.

    Each of the kernels is measured at each number of tokens, whichever `path` would take: its numbers are to be set
    from this. Weights are rotated, so that none is found in the cache.
    """
    from stepengine.stage5_gptq import kernels

    width, height = setup.of((4096, 12288), (64, 96))
    yield "error", attempt(lambda: _int4_error(setup, kernels))
    for tokens in setup.of((1, 2, 4, 8, 16, 32, 64, 128, 256, 1024), (1, 3)):
        yield f"{width}x{height}, {tokens}", _int4_case(setup, kernels, (height, width), 128, tokens)
    config = setup.config
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    shapes = [
        (heads, config.hidden_size),
        (config.hidden_size, config.num_heads * config.head_dim),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ]
    for tokens in setup.of((1, 16, 64, 256), (1, 3)):
        yield f"layer, {tokens}", attempt(lambda t=tokens: _int4_layer(setup, kernels, shapes, t))


def _int4_calls(setup: Setup, kernels: Any) -> dict[str, Callable[..., Tensor]]:
    """{name: f(x, weight)}; "ours" is what an engine calls."""
    end = "_reference" if setup.smoke else ""
    found = {name: getattr(kernels, f"int4_{name}{end}") for name in ("gemv", "gemm")}
    found["dequantize + matmul"] = kernels.int4_linear_reference if setup.smoke else kernels.int4_matmul
    return found | {"ours": getattr(kernels, f"int4_linear{end}")}


def _int4_weight(setup: Setup, kernels: Any, shape: tuple[int, int], group: int) -> tuple[Any, Any]:
    """(random codes on random grids, the same for the kernels)."""
    from stepengine.stage5_gptq.grid import QuantizedWeight

    rows, columns = shape
    device, groups = setup.device, -(-columns // group)
    weight = QuantizedWeight(
        torch.randint(0, 16, shape, dtype=torch.uint8, device=device),
        (torch.rand(rows, groups, device=device) / columns).bfloat16().half().float(),
        torch.randint(0, 16, (rows, groups), dtype=torch.uint8, device=device),
        torch.arange(columns, dtype=torch.int32, device=device) // group,
        4,
    )
    return weight, kernels.pack_for_kernel(weight, device, getattr(torch, setup.dtype))


def _int4_error(setup: Setup, kernels: Any) -> dict[str, Any]:
    weight, packed = _int4_weight(setup, kernels, setup.of((1536, 1024), (48, 64)), 64)
    errors: dict[str, float] = {}
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, weight.shape[1], device=setup.device).to(packed.dtype)
        exact = x.double() @ weight.dequantized(torch.float64).T
        for name, call in _int4_calls(setup, kernels).items():
            errors[f"{name}, {tokens}"] = relative_error(call(x, packed), exact)
    return {"relative_error": errors, "against": "float64"}


def _int4_case(setup: Setup, kernels: Any, shape: tuple[int, int], group: int, tokens: int) -> dict[str, Any]:
    dtype = getattr(torch, setup.dtype)
    _, packed = _int4_weight(setup, kernels, shape, group)
    moved = packed.nbytes + tokens * sum(shape) * dtype.itemsize
    copies = setup.of(-(-(1 << 29) // packed.nbytes), 2)
    weights = [packed] + [packed._replace(packed=packed.packed.clone()) for _ in range(copies - 1)]
    x = torch.randn(tokens, shape[1], device=setup.device).to(dtype)
    found: dict[str, Any] = {"tokens": tokens, "group": group, "bytes": moved, "path": kernels.path(tokens)}
    copy_gbs = setup.ceiling("copy_gbs")

    def case(call: Callable[..., Tensor]) -> dict[str, Any]:
        times = timed([lambda w=w: call(x, w) for w in weights], setup.device, budget_s=0.1)
        gbs = 1e-6 * moved / times["median_ms"]
        return {**times, "gbs": gbs, "of_copy": gbs / copy_gbs if copy_gbs else None}

    for name, call in _int4_calls(setup, kernels).items():
        if name != "gemv" or tokens <= 16:  # it reads all of the weight for each token
            found[name] = attempt(lambda f=call: case(f))

    def cublas() -> dict[str, Any]:
        plain = torch.randn(setup.of(6, 2), *shape, device=setup.device, dtype=dtype)
        return timed([lambda w=w: x @ w.T for w in plain], setup.device, budget_s=0.1)

    found["cublas"] = attempt(cublas)
    theirs = found["cublas"].get("median_ms")
    for name in ("gemv", "gemm", "dequantize + matmul", "ours"):
        if theirs and (mine := found.get(name, {}).get("median_ms")):
            found[name]["speedup"] = theirs / mine
    return found


def _int4_layer(setup: Setup, kernels: Any, shapes: list[tuple[int, int]], tokens: int) -> dict[str, Any]:
    """The four products of one layer, one after another, for as many layers as the model has: ms of one layer."""
    dtype, layers = getattr(torch, setup.dtype), setup.config.num_layers
    ours = _int4_calls(setup, kernels)["ours"]
    packed = [_int4_weight(setup, kernels, shape, setup.of(64, 32))[1] for shape in shapes]
    inputs = [torch.randn(tokens, shape[1], device=setup.device).to(dtype) for shape in shapes]

    def run(call: Callable[..., Tensor], weights: list[Any]) -> None:
        for x, weight in zip(inputs, weights, strict=True):
            call(x, weight)

    copies = [[w._replace(packed=w.packed.clone()) for w in packed] for _ in range(layers)]
    plain = [[torch.randn(shape, device=setup.device, dtype=dtype) for shape in shapes] for _ in range(layers)]
    mine = timed([lambda ws=ws: run(ours, ws) for ws in copies], setup.device)
    theirs = timed([lambda ws=ws: run(lambda x, w: x @ w.T, ws) for ws in plain], setup.device)
    return {"tokens": tokens, "ours": mine, "cublas": theirs, "speedup": theirs["median_ms"] / mine["median_ms"]}
