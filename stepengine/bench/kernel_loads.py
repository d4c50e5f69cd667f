"""What the real kernels load and store: run under Triton's interpreter, every access written down.

The interpreter runs a kernel's programs one after another on the CPU, each load and store as one call with all
its addresses. `record` starts a process of its own for it, since Triton decides at import whether it interprets.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from stepengine.errors import InvalidSetting

KERNELS = ("flash_prefill", "paged_decode", "materialised")
INDEXES = ("block_table", "cu_q", "kv_lens")  # whole numbers that say where things lie; all else is data
_MOST = 4096  # tokens: the interpreter is slow


class Case(NamedTuple):
    """One request to run: its last `q_len` tokens attend to all of its `kv_len`. fp32, one K/V head."""

    kernel: str
    q_len: int
    kv_len: int
    tile: int = 16  # tokens of a tile, of queries and of keys
    head_dim: int = 16
    group: int = 1  # query heads of the K/V head
    block_size: int = 16
    splits: int = 1  # of paged_decode


class Access(NamedTuple):
    """One load or store of one program: which elements of which tensor, as runs [begin, end) in order of address."""

    launch: int
    program: int  # of this launch, in the order in which the interpreter ran them
    store: bool
    tensor: str
    runs: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        return sum(end - begin for begin, end in self.runs)


class Dot(NamedTuple):
    """One product of two tiles, [rows, inner] x [inner, columns], padding included."""

    launch: int
    program: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Record:
    """All that happened in one case, in order. An element counts once for each instruction that names it."""

    case: Case
    launches: tuple[tuple[str, int], ...]  # kernel, programs
    tensors: Mapping[str, tuple[int, int]]  # name -> elements, bytes of one
    accesses: tuple[Access, ...]
    dots: tuple[Dot, ...]
    error: float  # largest difference from attention in float64

    def moved(self, *tensors: str, store: bool | None = None) -> int:
        """Bytes loaded and stored (or one of them) of these tensors; of all but the INDEXES where none is named."""
        names = tensors or tuple(name for name in self.tensors if name not in INDEXES)
        return sum(
            access.elements * self.tensors[access.tensor][1]
            for access in self.accesses
            if access.tensor in names and store in (None, access.store)
        )


def missing() -> str:
    """Why kernels cannot be interpreted here, in a sentence; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (there is none for macOS): its interpreter cannot record the kernels here."
    return ""


def record(cases: Sequence[Case]) -> list[Record]:
    """What each case loads and stores, in one process for all. InvalidSetting where a case or Triton is not there."""
    for case in cases:
        _check(case)
    if why := missing():
        raise InvalidSetting(why)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stepengine.bench.kernel_loads"]
    asked = json.dumps([case._asdict() for case in cases])
    ran = subprocess.run(command, env=environment, input=asked, capture_output=True, text=True, timeout=600)
    if ran.returncode:
        raise RuntimeError(f"the interpreter ended with status {ran.returncode}:\n{ran.stderr}")
    return [_read(case, json.loads(line)) for case, line in zip(cases, ran.stdout.splitlines(), strict=True)]


def kernel_bytes(cases: Sequence[tuple[int, int, int]]) -> list[int]:
    """Bytes that `flash_prefill` moves for each (q_len, kv_len, tile), one head of head_dim 16 in fp32."""
    return [found.moved() for found in record([Case("flash_prefill", *case) for case in cases])]


def _check(case: Case) -> None:
    if case.kernel not in KERNELS:
        raise InvalidSetting(f"kernel is {case.kernel!r}; those recorded are {', '.join(KERNELS)}.")
    if not 1 <= case.q_len <= case.kv_len <= _MOST:
        raise InvalidSetting(f"q_len {case.q_len}, kv_len {case.kv_len}: give 1 <= q_len <= kv_len <= {_MOST} tokens.")
    for name, least in (("tile", 16), ("head_dim", 16), ("group", 1)):
        value = getattr(case, name)
        if value < least or value & (value - 1):
            raise InvalidSetting(f"{name} is {value}; give a power of two of at least {least}.")
    if case.block_size < 1 or not 1 <= case.splits <= 64:
        raise InvalidSetting(f"block_size {case.block_size}, splits {case.splits}: from 1, and from 1 to 64.")
    if case.kernel == "paged_decode" and (case.q_len != 1 or case.tile > 128):
        raise InvalidSetting(f"paged_decode has q_len {case.q_len}, tile {case.tile}; it takes 1, and at most 128.")
    if case.kernel == "materialised" and case.group != 1:
        raise InvalidSetting(f"materialised has group {case.group}; it is recorded for one head.")


def _read(case: Case, found: dict[str, Any]) -> Record:
    accesses = [Access(*rest, tuple(map(tuple, runs))) for *rest, runs in found["accesses"]]
    launches = tuple((name, programs) for name, programs in found["launches"])
    tensors = {name: (elements, size) for name, (elements, size) in found["tensors"].items()}
    dots = tuple(Dot(*dot) for dot in found["dots"])
    return Record(case, launches, tensors, tuple(accesses), dots, found["error"])


# --- in the interpreter's process --------------------------------------------------------------------------------


class _Recorder:
    """Notes what the interpreter does. Its methods stand in for the interpreter's own, and call them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.launches: list[list[Any]] = []
        self.accesses: list[tuple[int, int, bool, str, list[tuple[int, int]]]] = []
        self.dots: list[tuple[int, ...]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        with ExitStack() as replaced:
            for owner, name, stand_in in (
                (GridExecutor, "__call__", self._launch),
                (InterpreterBuilder, "set_grid_idx", self._program),
                (InterpreterBuilder, "create_masked_load", self._load),
                (InterpreterBuilder, "create_masked_store", self._store),
                (InterpreterBuilder, "create_dot", self._dot),
            ):
                replaced.enter_context(mock.patch.object(owner, name, stand_in(getattr(owner, name))))
            yield

    def _launch(self, own: Any) -> Any:
        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches.append([executor.fn.__name__, 0])
            return own(executor, *args, **kwargs)

        return launch

    def _program(self, own: Any) -> Any:
        def set_grid_idx(builder: Any, *index: int) -> Any:
            self.launches[-1][1] += 1
            return own(builder, *index)

        return set_grid_idx

    def _load(self, own: Any) -> Any:
        def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._note(False, pointers, mask)
            return own(builder, pointers, mask, *rest)

        return create_masked_load

    def _store(self, own: Any) -> Any:
        def create_masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note(True, pointers, mask)
            return own(builder, pointers, value, mask, *rest)

        return create_masked_store

    def _dot(self, own: Any) -> Any:
        def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.dots.append((*self._here(), *a.data.shape, b.data.shape[-1]))
            return own(builder, a, b, *rest)

        return create_dot

    def _here(self) -> tuple[int, int]:
        return len(self.launches) - 1, self.launches[-1][1] - 1

    def _note(self, store: bool, pointers: Any, mask: Any) -> None:
        addresses = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64))
        if not addresses.size:
            return
        for name, tensor in self.tensors.items():
            elements, rest = np.divmod(addresses - tensor.data_ptr(), tensor.element_size())
            if 0 <= elements[0] and elements[-1] < tensor.numel() and not rest.any():
                breaks = np.flatnonzero(np.diff(elements) != 1) + 1
                runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(elements, breaks)]
                self.accesses.append((*self._here(), store, name, runs))
                return
        raise AssertionError(f"{self.launches[-1][0]} touched memory that belongs to none of {list(self.tensors)}")


def _run(case: Case) -> dict[str, Any]:
    """One case, run on random data in blocks in no order, and compared with float64."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(case.q_len, case.group, case.head_dim, generator=generator)
    k, v = torch.randn(2, case.kv_len, 1, case.head_dim, generator=generator)
    scale = 1 / math.sqrt(case.head_dim)
    before = case.kv_len if case.kernel == "paged_decode" else case.kv_len - case.q_len
    used = -(-before // case.block_size)
    storage = torch.full((used + 1, 2, 1, case.block_size, case.head_dim), math.nan)
    table = torch.zeros(1, max(used, 1), dtype=torch.int32)
    table[0, :used] = 1 + torch.randperm(used, generator=generator).int()
    for at in range(before):
        place = int(table[0, at // case.block_size]), slice(None), slice(None), at % case.block_size
        storage[place] = torch.stack((k[at], v[at]))
    cu_q, lens = torch.tensor([0, case.q_len], dtype=torch.int32), torch.tensor([case.kv_len], dtype=torch.int32)
    out = torch.empty_like(q)
    tensors = {"q": q, "storage": storage, "block_table": table, "kv_lens": lens, "out": out}
    own = {"k": k[before:].clone(), "v": v[before:].clone()}
    if case.kernel == "flash_prefill":
        recorder = _Recorder(tensors | own | {"cu_q": cu_q})
        from stepengine.stage3_flash import kernels

        tiles = kernels.Tiles(case.tile * case.group, case.tile, 1, 1)
        with recorder.watching(), mock.patch.object(kernels, "prefill_tiles", lambda *_: tiles):
            kernels.flash_prefill(q, own["k"], own["v"], storage, table, cu_q, lens, case.q_len, scale, out)
    elif case.kernel == "paged_decode":
        from stepengine.stage3_flash import kernels

        room = kernels.decode_workspace(1, case.group, case.head_dim, case.splits)
        workspace = torch.empty(room)
        recorder = _Recorder(tensors | ({"workspace": workspace} if room else {}))
        with recorder.watching(), mock.patch.object(kernels, "_MAX_TILE", case.tile):
            kernels.paged_decode(q, storage, table, lens, scale, case.splits, workspace, out)
    else:
        from stepengine.bench.materialised import materialised

        scores, weights = torch.empty(2, case.q_len, case.kv_len)
        plain = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "scores": scores, "weights": weights, "out": out[:, 0]}
        recorder = _Recorder(plain)
        with recorder.watching():
            materialised(*(plain[name] for name in "qkv"), scale, case.tile, scores, weights, plain["out"])
    hidden = torch.ones(case.q_len, case.kv_len, dtype=torch.bool).triu(case.kv_len - case.q_len + 1)
    right = torch.einsum("qgd,kd->gqk", q.double(), k[:, 0].double()) * scale
    right = right.masked_fill(hidden, -math.inf).softmax(-1)
    error = (out - torch.einsum("gqk,kd->qgd", right, v[:, 0].double())).abs().max()
    return {
        "launches": recorder.launches,
        "tensors": {name: (tensor.numel(), tensor.element_size()) for name, tensor in recorder.tensors.items()},
        "accesses": recorder.accesses,
        "dots": recorder.dots,
        "error": float(error),
    }


def main() -> None:
    torch.set_num_threads(1)
    for case in json.load(sys.stdin):
        print(json.dumps(_run(Case(**case))), flush=True)


if __name__ == "__main__":
    main()
