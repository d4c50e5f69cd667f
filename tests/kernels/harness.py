"""What every Triton kernel must pass: the same cases in the interpreter and on a GPU, and compilation without one.

    python -m tests.kernels.harness interpret    each case on the CPU, under Triton's interpreter
    python -m tests.kernels.harness compile      each kernel for each GPU of LIMITS, without one: what it takes

Both print one JSON object a line, and are run by tests in a process of their own: whether Triton interprets
is decided when a kernel is defined, and an interpreted kernel cannot be compiled. This module therefore
imports no kernel; a kernel's tests are a `Kernel` in a module that MODULES names.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("paged", "flash", "fused", "int4")  # modules beside this one, each with its KERNELS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The interpreter's tl.dot is wrong on bf16; fp32 and fp16 are exact there.
ON = {"interpreter": ("fp32", "fp16"), "cuda": ("fp32", "fp16", "bf16")}
# Rounding of inputs, of the softmax's weights and of the result: a few times the dtype's epsilon.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

HEAD_DIMS: Mapping[str, tuple[int, ...]] = dict.fromkeys(DTYPES, (64, 128))
# KiB of shared memory that one program may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"). Triton uses no tensor cores on sm_75: there a kernel has to compile and to fit, and may spill.
LIMITS = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227}
COMPILED = {75: ("fp16",), **dict.fromkeys((80, 89, 90, 100), ("fp16", "bf16", "fp32"))}
# With at most 128 registers a thread, 16 warps fit on a multiprocessor, a quarter of what it can hold. A kernel that
# lives on large tiles names its own bound.
MAX_REGISTERS = 128


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (there is none for macOS)")
# There, the interpreter takes int() of an array of one number, which NumPy has stopped to allow.
needs_newer_triton = pytest.mark.skipif(
    HAS_TRITON and _version("triton") < (3, 7) and _version("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.7 needs NumPy before 2.4",
)


class Kernel(NamedTuple):
    """One kernel's tests. `module` names the file that holds it, its wrapper and its twin."""

    module: str
    shapes: Mapping[str, Mapping[str, Any]]  # case -> the keyword arguments of `check`, and `dtypes` if not for all
    check: Callable[..., None]  # check(module, device, dtype, **shape): AssertionError where kernel or twin is wrong
    launch: Callable[..., None]  # launch(module, dtype, head_dim): calls the wrapper once, on meta tensors
    head_dims: Mapping[str, tuple[int, ...]] = HEAD_DIMS  # what is compiled for each dtype
    registers: int = MAX_REGISTERS  # of a thread, at most


class Resources(NamedTuple):
    """What a compiled kernel takes: registers and stack bytes of a thread, shared memory bytes of a program."""

    registers: int
    stack: int  # a kernel has no local arrays, so its stack holds nothing but spilled registers
    shared: int
    wgmma: int = 0  # instructions in the PTX that multiply tiles as sm_90's tensor cores do it best


def kernels() -> dict[str, Kernel]:
    """All kernels, by name."""
    found: dict[str, Kernel] = {}
    for name in MODULES:
        found |= importlib.import_module(f"tests.kernels.{name}").KERNELS
    return found


def cases(where: str) -> list[str]:
    """Names of all cases on the interpreter or on "cuda": kernel/case/dtype."""
    return [
        f"{name}/{case}/{dtype}"
        for name, kernel in kernels().items()
        for case, shape in kernel.shapes.items()
        for dtype in ON[where]
        if dtype in shape.get("dtypes", DTYPES)
    ]


def check(name: str, device: str) -> None:
    """Run one case of `cases`."""
    kernel_name, case, dtype = name.split("/")
    kernel = kernels()[kernel_name]
    shape = {name: value for name, value in kernel.shapes[case].items() if name != "dtypes"}
    kernel.check(importlib.import_module(kernel.module), device, DTYPES[dtype], **shape)


def builds() -> list[str]:
    """Names of all compilations: kernel/sm/dtype/head_dim."""
    return [
        f"{name}/{sm}/{dtype}/{head_dim}"
        for name, kernel in kernels().items()
        for sm, dtypes in COMPILED.items()
        for dtype in dtypes
        for head_dim in kernel.head_dims[dtype]
    ]


def build(name: str, **changed: Any) -> Resources:
    """Compile one of `builds` exactly as its wrapper would launch it, but for what is `changed`.

    Where the wrapper launches several kernels, the most that any of them takes.
    """
    kernel_name, sm, dtype, head_dim = name.split("/")
    kernel = kernels()[kernel_name]
    module = importlib.import_module(kernel.module)
    on_sm = mock.patch.object(module, "capability", lambda _: divmod(int(sm), 10))
    with on_sm if hasattr(module, "capability") else nullcontext():
        made = launches(module, lambda: kernel.launch(module, DTYPES[dtype], int(head_dim)))
    return Resources(*map(max, *(compiled(int(sm), *launch, **changed) for launch in made), Resources(0, 0, 0)))


def launches(module: ModuleType, call: Callable[[], None]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, keywords) of each launch that `call` makes from `module`, written down instead of made."""
    import triton

    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: made.append((self.kernel, args, kwargs))

    with ExitStack() as replaced:
        for name, value in vars(module).copy().items():
            if isinstance(value, triton.JITFunction):
                replaced.enter_context(mock.patch.object(module, name, Recorder(value)))
        call()
    return made


def compiled(sm: int, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **changed: Any) -> Resources:
    """Compile a launch for a GPU of compute capability sm / 10.

    Arguments are specialised as Triton does at a launch: tensors are aligned to 16 bytes, and whether a
    whole number is 1 or a multiple of 16 is known to the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {dtype: f"*{name}" for name, dtype in DTYPES.items()}
    pointers |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
    constants = {name: value for name, value in (kwargs | changed).items() if name in kernel.arg_names}
    options = {name: value for name, value in (kwargs | changed).items() if name not in kernel.arg_names}
    signature, attributes = {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = pointers[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            constants[name] = value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack, fixed = read_cubin(built.asm["cubin"])
    shared = fixed + built.metadata.shared  # Triton's own part is allotted at launch
    return Resources(registers, stack, shared, built.asm["ptx"].count("wgmma.mma_async"))


def read_cubin(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, fixed shared memory bytes) of the one kernel in a cubin, read by NVIDIA's cuobjdump."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    return int(found[0]), int(found[1]), int(found[2])


def complaints(sm: int, used: Resources, max_registers: int = MAX_REGISTERS) -> list[str]:
    """What is wrong with a kernel on this GPU; nothing, if it fits and runs as compiled code should."""
    found = []
    if used.shared > LIMITS[sm] * 1024:
        found.append(f"{used.shared} bytes of shared memory exceed sm_{sm}'s {LIMITS[sm]} KiB")
    if used.stack and sm != 75:
        found.append(f"{used.stack} bytes of registers spilled on sm_{sm}")
    if used.registers > max_registers and sm != 75:
        found.append(f"{used.registers} registers exceed {max_registers} on sm_{sm}")
    return found


def interpret() -> Iterator[tuple[str, str]]:
    """(case, what went wrong or "") of each case under the interpreter."""
    for name in cases("interpreter"):
        try:
            check(name, "cpu")
            yield name, ""
        except Exception:
            yield name, traceback.format_exc()


def compile_all() -> Iterator[tuple[str, Resources]]:
    """Each build, and two that must be complained of, so that the reading is known to see what it looks for."""
    for name in builds():
        yield name, build(name)
    yield "starved", build("paged_attention/90/fp16/128", maxnreg=32)
    yield "oversized", build("paged_attention/89/fp16/128", TILE=256)


def run(verb: str, cache: Path) -> dict[str, Any]:
    """What `python -m tests.kernels.harness verb` found, with Triton's cache in a folder of its own."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": str(int(verb == "interpret"))}
    command = [sys.executable, "-m", "tests.kernels.harness", verb]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    last = (ran.stdout.splitlines() or ["nothing"])[-1]
    assert ran.returncode == 0, f"{verb} ended with status {ran.returncode} after {last}\n{ran.stderr}"
    return dict(json.loads(line) for line in ran.stdout.splitlines())


def main() -> None:
    torch.set_num_threads(1)
    for line in {"interpret": interpret, "compile": compile_all}[sys.argv[1]]():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
