"""What the engine relies on in an attention backend: it stores a step's K/V and attends to all that came before."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepengine.contracts.report import Promise, Report, expect, name_of, run_promises
from stepengine.core.batch import Staging
from stepengine.core.kv_pool import KVPool
from stepengine.core.plan import Chunk
from stepengine.core.request import Request, SamplingParams
from stepengine.core.seams import AttentionBackend
from stepengine.model.config import ModelConfig
from stepengine.model.tiny import tiny_config

LONGEST = 48  # tokens of a request
ROWS = 8
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.12}  # of values drawn from a unit normal

Make = Callable[[ModelConfig, KVPool], AttentionBackend]
Step = Sequence[tuple[int, int]]  # (request, tokens) of each chunk


class _Run:
    """One backend and its storage through several steps, every output compared with float64."""

    def __init__(
        self,
        make: Make,
        block_size: int,
        heads: tuple[int, int, int] = (4, 2, 16),
        num_layers: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        strided: bool = False,
        stale: bool = False,
    ) -> None:
        self.heads, self.strided, self.size = heads, strided, block_size
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        config = tiny_config("llama", num_hidden_layers=num_layers, **dict(zip(names, heads, strict=True)))
        place, table = torch.device(device), -(-LONGEST // block_size) if block_size else 0
        self.pool = KVPool(ModelConfig.from_dict(config), ROWS * table, block_size, place, dtype)
        self.random = torch.Generator().manual_seed(0)
        if stale:
            for layer in self.pool.layers:
                layer.copy_(torch.randn(layer.shape, generator=self.random) * 3)
        self.backend = make(ModelConfig.from_dict(config), self.pool)
        self.staging = Staging(place, ROWS, 4 * LONGEST, table, block_size)
        self.free = list(range(1, ROWS * table + 1))
        random.Random(0).shuffle(self.free)
        self.requests: dict[int, Request] = {}
        self.fused: dict[int, Tensor] = {}  # request -> [layers, LONGEST, Hq + 2 Hk, D], q, k and v of all tokens
        self.steps: list[str] = []
        self.shape, self.dtype, self.place = (num_layers, LONGEST, heads[0] + 2 * heads[1], heads[2]), dtype, place

    def chunk(self, number: int, length: int, again: bool) -> Chunk:
        if number not in self.requests:
            self.requests[number] = Request(number, [1], SamplingParams(), LONGEST)
            self.fused[number] = torch.randn(self.shape, generator=self.random).to(self.place, self.dtype)
        request = self.requests[number]
        start = request.computed - (length if again else 0)
        end = start + length
        request.token_ids = [1] * end
        while len(request.blocks) * self.size < end and self.size:
            request.blocks.append(self.free.pop())
        start = start if self.size else 0  # where nothing is stored, all tokens run again
        return Chunk(number, start, end - start)

    def step(self, step: Step, again: bool = False) -> None:
        """Run chunks of so many tokens each; `again`: their K/V are stored already, and they run for their logits."""
        chunks = [self.chunk(number, length, again) for number, length in step]
        self.steps.append(", ".join(f"request {c.request} [{c.start}, {c.end})" for c in chunks))
        batch = self.staging.fill(chunks, self.requests)
        queries, groups, dim = self.heads
        for layer in range(self.shape[0]):
            rows = torch.cat([self.fused[c.request][layer, c.start : c.end] for c in chunks])  # [T, Hq + 2 Hk, D]
            q, k, v = rows.split((queries, groups, groups), dim=1)
            if not self.strided:
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            with torch.inference_mode():
                out = self.backend.forward(layer, q, k, v, batch)
            wanted = (batch.num_tokens, queries, dim)
            expect(tuple(out.shape) == wanted, f"{self.case}: the shape is {tuple(out.shape)}, not {wanted}")
            expect(out.dtype == self.dtype, f"{self.case}: the output is {out.dtype}, q is {self.dtype}")
            for chunk, part in zip(chunks, out.split([c.length for c in chunks]), strict=True):
                self.compare(layer, chunk, part.double().cpu())
        for chunk in chunks:
            self.requests[chunk.request].computed = chunk.end

    @property
    def case(self) -> str:
        queries, groups, dim = self.heads
        shape = f"{queries} query heads on {groups} K/V heads of {dim}"
        return f"block_size {self.size}, {shape}; steps: {'; '.join(self.steps)}"

    def compare(self, layer: int, chunk: Chunk, got: Tensor) -> None:
        """Every query against all keys up to its own position, one token after another."""
        queries, groups, dim = self.heads
        q, k, v = self.fused[chunk.request][layer].double().cpu().split((queries, groups, groups), dim=1)
        k, v = (part.repeat_interleave(queries // groups, dim=1) for part in (k, v))  # [L, Hq, D]
        for at, position in enumerate(range(chunk.start, chunk.end)):
            scores = torch.einsum("hd,lhd->hl", q[position], k[: position + 1]) / dim**0.5
            right = torch.einsum("hl,lhd->hd", scores.softmax(-1), v[: position + 1])
            error = (got[at] - right).abs().amax(-1).nan_to_num(torch.inf)  # [Hq]
            head = int(error.argmax())
            off = f"layer {layer}, request {chunk.request}, token {position}, head {head} is off by {error[head]:.2g}"
            expect(float(error[head]) <= TOLERANCE[self.dtype], f"{self.case}: {off}")


def check_attention(
    make: Make,
    block_size: int | Sequence[int] = (1, 3, 16),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Report:
    """Check a backend, made by `make(config, pool)`, against attention in float64 over ragged batches.

    block_size: 0 for a backend that stores nothing, 48 or more for one whose requests hold one block each, or
    several sizes to be tried one after another. Never raises; see the report.
    """
    sizes = [block_size] if isinstance(block_size, int) else list(block_size)

    def play(*cases: Sequence[Step], heads: Sequence[tuple[int, int, int]] = ((4, 2, 16),), **how: bool | int) -> None:
        for size in sizes:
            for case in cases:
                for shape in heads:
                    run = _Run(make, size, shape, dtype=dtype, device=device, **how)  # type: ignore[arg-type]
                    for step in case:
                        run.step(step)

    def alone() -> None:
        play([[(0, 1)]], heads=[(1, 1, 16), (4, 2, 16)])

    def causal() -> None:
        play(*([[(0, length)]] for length in (2, 5, 17, 33)))

    def decode() -> None:
        play([[(0, 1)], [(0, 1)]], [[(0, 3)], *[[(0, 1)]] * 20])

    def ragged() -> None:
        play(
            [[(0, 1), (1, 2)]],
            [[(0, 5), (1, 1), (2, 17)]],
            [[(0, 2), (1, 1)], [(0, 1), (1, 1)]],
            [[(0, 5), (1, 16), (2, 3)], [(2, 1), (0, 1)], [(1, 1), (2, 1), (0, 1)], [(1, 1)]],
        )

    def late() -> None:
        play([[(0, 2)], [(0, 2)]], [[(0, 5)], [(0, 4)], [(0, 9)], [(0, 1)]], [[(0, 5), (1, 3)], [(1, 2), (0, 17)]])

    def mixed() -> None:
        play([[(0, 3)], [(0, 1), (1, 2)]], [[(0, 17), (1, 2)], [(2, 16), (0, 1), (1, 3)], [(1, 1), (0, 1), (2, 1)]])

    def again() -> None:
        for size in sizes:
            for tokens in (1, 3, 16, 17):
                run = _Run(make, size, dtype=dtype, device=device)
                run.step([(0, tokens), (1, 2)])
                run.step([(0, 1)], again=True)
                run.step([(1, 1), (0, 1)])

    def groups() -> None:
        shapes = [(count * shared, shared, 8) for count in range(1, 9) for shared in (1, 2)]
        play([[(0, 3), (1, 1)], [(0, 1), (1, 1)], [(0, 1)]], heads=shapes)

    def layers() -> None:
        play([[(0, 3)], [(0, 1)]], [[(0, 5), (1, 2)], [(0, 1), (1, 1)], [(1, 2)]], num_layers=3)

    def strided() -> None:
        play([[(0, 2)], [(0, 1)]], [[(0, 5), (1, 2)], [(0, 1), (1, 1)], [(1, 2), (0, 1)]], strided=True)

    def stale() -> None:
        play([[(0, 1)]], [[(0, 3)], [(0, 1)]], [[(0, 17), (1, 2)], [(0, 1), (1, 1)], [(1, 3), (0, 1)]], stale=True)

    def any_order() -> None:
        for steps in (2, 4, 8, 16):
            rng = random.Random(steps)
            case: list[list[tuple[int, int]]] = []
            left = [LONGEST] * ROWS
            for _ in range(steps):
                rows = [number for number in rng.sample(range(ROWS), rng.randint(1, 5)) if left[number]]
                longest = rng.choice((1, 1, 4, 12))
                step = [(number, rng.randint(1, min(longest, left[number]))) for number in rows]
                for number, length in step:
                    left[number] -= length
                case += [step] if step else []
            play(case, stale=True, strided=True)

    return run_promises(
        f"Attention {name_of(make)}",
        [
            Promise("one token attends to itself", alone, "the softmax of one score is 1: the output is its value"),
            Promise("a prompt attends causally", causal, "token i sees tokens 0 to i; scores are scaled by 1/sqrt(D)"),
            Promise("a decode step reads what earlier steps stored", decode, "write k and v to batch.slots first"),
            Promise("requests of different lengths keep apart", ragged, "each row has its own table and kv_lens"),
            Promise("a chunk that starts late reads what came before it", late, "its queries begin at batch.starts"),
            Promise("prompts and decodes may share a batch", mixed, "chunks are told apart by their length alone"),
            Promise(
                "a token may run again when its K/V are stored", again, "slot 0 lies in block 0, which nobody reads"
            ),
            Promise("query heads share K/V heads, 1 to 8 on one", groups, "head h reads K/V head h // (Hq / Hk)"),
            Promise(
                "each layer has K/V of its own", layers, "use self.pool.layers[layer]; batch.memo is for all layers"
            ),
            Promise("q, k and v may be slices of one matrix", strided, "do not count on contiguous rows"),
            Promise("what others left in a block is not seen", stale, "mask what lies beyond kv_lens"),
            Promise("batches of any kind, one after another", any_order, "try the promises above first"),
        ],
    )
