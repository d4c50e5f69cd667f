"""Checks of the exercises of notebook 03a: the online softmax, and the bytes that a walk over tiles moves."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepengine.contracts.report import Promise, Report, called, expect, run_promises, same_number
from stepengine.core.batch import Batch
from stepengine.core.kv_pool import KVPool
from stepengine.errors import StepEngineError
from stepengine.model.config import ModelConfig

State = tuple[Tensor, Tensor, Tensor]
OnlineUpdate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], State]
Count = Callable[[Sequence[tuple[int, int, int]]], list[int]]

HEAD_DIM, BYTES = 16, 4  # of `hbm_bytes`: one head in fp32
_NAMES = ("m", "l", "acc")


class TiledAttention:
    """An attention whose arithmetic is the reader's `online_update`, tile after tile: for `LLM(attention=...)`.

    A tile is a block of K/V. Slow: a call for each request, head and tile.
    """

    capturable = False

    def __init__(self, config: ModelConfig, pool: KVPool, online_update: OnlineUpdate) -> None:
        self.pool, self.online_update = pool, online_update
        self.num_kv_heads = config.num_kv_heads
        self.scale = math.log2(math.e) / math.sqrt(config.head_dim)  # scores in units of log2

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]; k and v are stored on the way."""
        self.pool.store(layer, k, v, batch)
        rows = zip(q.split(batch.lengths), batch.tables.tolist(), batch.starts, strict=True)
        return torch.cat([self._chunk(self.pool.layers[layer], *row) for row in rows])

    def _chunk(self, storage: Tensor, q: Tensor, table: list[int], start: int) -> Tensor:
        """One request's queries [L, Hq, D], the first at position `start`."""
        length, heads, dim = q.shape
        size, group, end = self.pool.block_size, heads // self.num_kv_heads, start + length
        queries = q.float().view(length, -1, group, dim).transpose(0, 1).flatten(1, 2)  # [Hk, L x G, D]
        seen = torch.arange(start, end).repeat_interleave(group)[:, None]  # the last key of each row
        out = []
        for head, rows in enumerate(queries):
            state: State = torch.full((len(rows),), -math.inf), torch.zeros(len(rows)), torch.zeros(len(rows), dim)
            for begin in range(0, end, size):
                keys, values = storage[table[begin // size], :, head, : end - begin].float()  # [K, D]
                hidden = torch.arange(begin, begin + len(keys)) > seen
                scores = (rows @ keys.T * self.scale).masked_fill(hidden, -math.inf)
                state = self.online_update(*state, scores, values)
            out.append(state[2] / state[1][:, None])
        return torch.stack(out).unflatten(1, (length, group)).transpose(0, 1).flatten(1, 2).to(q.dtype)


def tiled(online_update: OnlineUpdate) -> Callable[[ModelConfig, KVPool], TiledAttention]:
    """`TiledAttention` with this update, ready for `LLM(attention=...)`."""
    return lambda config, pool: TiledAttention(config, pool, online_update)


def check_online_update(online_update: OnlineUpdate) -> Report:
    """Notebook 03a: `online_update(m, l, acc, scores, values)` against softmax in float64, tile after tile."""

    def compare(said: str, *tiles: Tensor) -> None:
        """Feed the tiles of scores [R, K] one by one, and hold all that is known after each against float64."""
        rows, generator = tiles[0].shape[0], torch.Generator().manual_seed(sum(tile.shape[1] for tile in tiles))
        state: State = torch.full((rows,), -math.inf), torch.zeros(rows), torch.zeros(rows, 3)
        values = [torch.randn(tile.shape[1], 3, generator=generator) for tile in tiles]
        for count, (scores, shown) in enumerate(zip(tiles, values, strict=True), 1):
            given = (*state, scores, shown)
            kept = [tensor.clone() for tensor in given]
            where = f"{said}, tile {count}"
            got = called(where, online_update, *given)
            unchanged = all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
            expect(unchanged, f"{where}: an argument was changed in place")
            whole = isinstance(got, tuple) and len(got) == 3 and all(isinstance(part, Tensor) for part in got)
            expect(whole, f"{where}: got {got!r}, not the three tensors (m, l, acc)")
            right = _in_float64(torch.cat(tiles[:count], 1), torch.cat(values[:count]))
            for name, mine, wanted in zip(_NAMES, got, right, strict=True):
                _same(f"{where}: {name}", mine, wanted)
            state = got

    def some(*shape: int, seed: int = 0) -> Tensor:
        return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def first() -> None:
        compare("scores [[1, 3, 2]]", torch.tensor([[1.0, 3.0, 2.0]]))
        compare("4 rows of 5 random scores", some(4, 5))

    def rises() -> None:
        compare("scores [[1, 3, 2]], then [[5, 4, 0]]", torch.tensor([[1.0, 3, 2]]), torch.tensor([[5.0, 4, 0]]))

    def stays() -> None:
        compare("scores [[5, 4, 0]], then [[1, 3, 2]]", torch.tensor([[5.0, 4, 0]]), torch.tensor([[1.0, 3, 2]]))

    def masked() -> None:
        none = torch.full((2, 4), -math.inf)
        part = torch.tensor([[1.0, -math.inf], [-math.inf, -math.inf]])
        compare("two rows: a tile, then one fully masked", some(2, 4), none)
        compare("two rows: the first tile is fully masked, then one that is not", none, some(2, 4))
        compare("two rows, the second of them fully masked, then a tile for both", part, some(2, 3))

    def large() -> None:
        for level in (1e4, -1e4):
            compare(f"scores around {level:g}", some(3, 4) + level, some(3, 4, seed=1) + level)
        compare("scores around -1e4, then around 1e4", some(3, 4) - 1e4, some(3, 4, seed=1) + 1e4)
        compare("scores around 1e4, then around -1e4", some(3, 4) + 1e4, some(3, 4, seed=1) - 1e4)

    def many() -> None:
        widths = (3, 1, 8, 5, 2, 7)
        compare("8 rows, tiles of 3, 1, 8, 5, 2, 7 keys", *(some(8, n, seed=i) for i, n in enumerate(widths)))

    return run_promises(
        "online_update",
        [
            Promise("after one tile: its maximum, sum and weighted values", first, "weights are exp2(scores - m)"),
            Promise("a larger score shrinks what was summed before", rises, "by exp2(old m - new m), l and acc alike"),
            Promise("a smaller one leaves it as it is", stays, "m is the larger of the old one and the tile's"),
            Promise(
                "a fully masked tile changes nothing, as the first one too",
                masked,
                "-inf - -inf is NaN",
            ),
            Promise("scores of 1e4 are no problem", large, "exp2 of a difference to the maximum is at most 1"),
            Promise("many tiles of any width", many, "every tile is treated alike"),
        ],
    )


def _in_float64(scores: Tensor, values: Tensor) -> State:
    """(m, l, acc) of all scores [R, K] seen so far at once."""
    scores, values = scores.double(), values.double()
    top = scores.amax(1)
    weights = torch.exp2(scores - top.clamp(min=torch.finfo(torch.float64).min)[:, None])
    return top, weights.sum(1), weights @ values


def _same(where: str, mine: Tensor, wanted: Tensor) -> None:
    expect(mine.shape == wanted.shape, f"{where} has shape {list(mine.shape)}, it must be {list(wanted.shape)}")
    near = torch.isclose(mine.double(), wanted, rtol=1e-5, atol=1e-5)
    if not bool(near.all()):
        at = tuple((~near).nonzero()[0].tolist())
        said = f"{where}[{', '.join(map(str, at))}] is {float(mine[at]):g}, float64 gives {float(wanted[at]):g}"
        expect(False, said)


def _brute_force(q_len: int, kv_len: int, tile: int) -> int:
    """The bytes, by looking at every pair of a query and a key."""
    numbers = 0
    for begin in range(0, q_len, tile):
        queries = range(begin, min(begin + tile, q_len))
        seen = {key for query in queries for key in range(kv_len) if key <= kv_len - q_len + query}
        numbers += (2 * len(queries) + 2 * len(seen)) * HEAD_DIM  # queries and results, keys and values
    return numbers * BYTES


def check_hbm_bytes(hbm_bytes: Callable[[int, int, int], int], kernel_bytes: Count) -> Report:
    """Notebook 03a: `hbm_bytes(q_len, kv_len, tile)` against the loads and stores of stage 3's prefill kernel.

    `kernel_bytes([(q_len, kv_len, tile), ...])` counts them; `bench.kernel_loads` has one. Where it cannot, which
    it says in a StepEngineError, the promise that needs it is named as not checked.
    """

    def compare(case: tuple[int, int, int], wanted: int, source: str) -> None:
        call = f"hbm_bytes({', '.join(map(str, case))})"
        same_number(called(call, hbm_bytes, *case), wanted, call, f"{source} {wanted}")

    def by_hand(*cases: tuple[int, int, int]) -> Callable[[], None]:
        def check() -> None:
            for case in cases:
                compare(case, _brute_force(*case), "counting pair by pair gives")

        return check

    asked = [(1, 1, 16), (1, 33, 16), (16, 16, 16), (20, 20, 16), (48, 80, 16), (37, 37, 32), (70, 101, 32)]
    counted: list[int] = []
    promises = [
        Promise("one tile: everything moves once", by_hand((16, 16, 16), (8, 8, 16)), "q, k, v and the result"),
        Promise(
            "q_len = 1: one query reads all keys and values", by_hand((1, 1, 16), (1, 40, 16)), "nothing is read twice"
        ),
        Promise(
            "each tile of queries reads its keys again", by_hand((64, 64, 16), (64, 64, 32)), "how far do they see?"
        ),
        Promise("keys from before the chunk are read by every tile", by_hand((32, 72, 16)), "kv_len - q_len of them"),
        Promise("a last tile may be partly filled", by_hand((20, 20, 16), (37, 50, 16)), "min(begin + tile, q_len)"),
    ]
    text = "the loads and stores of the real kernel, byte for byte"
    missing = ""
    try:
        counted = kernel_bytes(asked)
    except StepEngineError as why:
        missing = str(why)

    def kernel() -> None:
        for case, wanted in zip(asked, counted, strict=True):
            compare(case, wanted, "the interpreter counts")

    if not missing:
        promises.append(Promise(text, kernel, "make the promises above hold first"))
    report = run_promises("hbm_bytes", promises)
    if missing:
        report.remarks.append(f"not checked: {text!r}. {missing}")
    return report
