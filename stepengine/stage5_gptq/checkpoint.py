"""GPTQ checkpoints in the community's format, read and written one matrix at a time."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import stepengine
from stepengine.errors import InvalidSetting, ModelError
from stepengine.model.config import ModelConfig
from stepengine.model.decoder import Decoder
from stepengine.model.loader import checkpoint_tensors, weight_files
from stepengine.stage5_gptq.grid import BITS, Grid, QuantizedWeight
from stepengine.stage5_gptq.packing import (
    VERSIONS,
    WORD,
    pack_weight,
    packable_step,
    stored_zeros,
    unpack_weight,
)

_PROJECTION = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight")
_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_SCALE_TYPES = ("F16", "BF16", "F32")
_FLOAT_TYPES = ("F64", *_SCALE_TYPES)
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1}
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
_SHOWN = 4  # names listed in a message


@dataclass(frozen=True)
class QuantizationConfig:
    """How a GPTQ checkpoint was quantised: the `quantization_config` of its `config.json`.

    desc_act: columns of a group need not be neighbours. sym: every zero point is the middle code.
    checkpoint_format: "gptq" stores zero points less one, "gptq_v2" as they are.
    """

    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str = "gptq"
    damp_percent: float | None = None
    true_sequential: bool = True
    static_groups: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "QuantizationConfig":
        """Check a `quantization_config`. Raises `ModelError`, naming the key, for whatever is not read exactly."""
        method = given.get("quant_method", given.get("method"))
        if method != "gptq":
            raise ModelError(
                f"quant_method={method!r} is not supported; use a GPTQ checkpoint (quant_method='gptq'), or the "
                "unquantised model and quantise that."
            )
        form = given.get("checkpoint_format", given.get("format")) or "gptq"
        if given.get("is_marlin_format"):
            form = "marlin"
        if form not in VERSIONS.values():
            raise ModelError(
                f"checkpoint_format={form!r} is not supported; use a checkpoint with 'gptq' or 'gptq_v2', from which "
                "engines make such layouts themselves."
            )
        if given.get("pack_dtype") not in (None, "int32", "torch.int32"):
            raise ModelError(f"pack_dtype={given['pack_dtype']!r} is not supported; codes must be packed in int32.")
        if given.get("lm_head"):
            raise ModelError("lm_head=true is not supported; use a checkpoint whose head is not quantised.")
        if given.get("dynamic"):
            raise ModelError(
                f"dynamic has {len(given['dynamic'])} rules for single modules, which is not supported; use a "
                "checkpoint that quantises all layers alike."
            )
        bits, size = _whole(given, "bits"), _whole(given, "group_size")
        if bits not in BITS:
            raise ModelError(f"bits={bits} is not supported; use a checkpoint of {', '.join(map(str, BITS))} bits.")
        if size != -1 and size < 8:
            raise ModelError(f"group_size={size} is not supported; it must be -1 or at least 8.")
        damping = given.get("damp_percent")
        meta = given.get("meta")
        return cls(
            bits=bits,
            group_size=size,
            desc_act=_flag(given, "desc_act", False),
            sym=_flag(given, "sym", True),
            checkpoint_format=form,
            damp_percent=float(damping) if isinstance(damping, int | float) else None,
            true_sequential=_flag(given, "true_sequential", True),
            static_groups=_flag(given, "static_groups", False),
            meta=dict(meta) if isinstance(meta, Mapping) else {},
        )

    def as_dict(self) -> dict[str, Any]:
        """The `quantization_config` that `from_dict` and other loaders read."""
        made: dict[str, Any] = {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size}
        made |= {"desc_act": self.desc_act, "sym": self.sym, "lm_head": False}
        made |= {"true_sequential": self.true_sequential, "static_groups": self.static_groups}
        if self.damp_percent is not None:
            made["damp_percent"] = self.damp_percent
        return made | {"checkpoint_format": self.checkpoint_format, "meta": dict(self.meta)}

    @property
    def version(self) -> int:
        """1 where zero points are stored less one, else 2."""
        return 2 if self.checkpoint_format == "gptq_v2" else 1

    @property
    def grid(self) -> Grid:
        """The grid that the weights lie on."""
        return Grid(self.bits, self.group_size, self.sym)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The layers that are quantised, in the order they compute: "model.layers.0.self_attn.q_proj" -> (N, K)."""
    found = []
    for name, shape in _model_shapes(config).items():
        if match := _PROJECTION.fullmatch(name):
            found.append((int(match[1]), _ORDER.index(match[2]), name.removesuffix(".weight"), (shape[0], shape[1])))
    return {name: shape for _, _, name, shape in sorted(found)}


class QuantizedCheckpoint:
    """A folder with a GPTQ checkpoint, of which only headers are read until a tensor is asked for.

    config: the model. quantization: how it was quantised. names: the quantised layers, such as
    "model.layers.0.self_attn.q_proj". others: the names of all other tensors, biases included.
    Raises `ModelError` naming what is missing, surplus, of a wrong shape or type, or not supported.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = ModelConfig.from_folder(self.folder)
        if self.config.quantization is None:
            raise ModelError(
                f"{self.folder} is not quantised: its config.json has no quantization_config; quantise it first."
            )
        self.quantization = QuantizationConfig.from_dict(self.config.quantization)
        self._linear = linear_shapes(self.config)
        self.names = tuple(self._linear)
        self._found = _headers(_files(self.folder))
        others = {
            name: shape
            for name, shape in _model_shapes(self.config).items()
            if name.removesuffix(".weight") not in self._linear
        }
        self.others = tuple(others)
        self._check_names(others)
        self._check_shapes(others)
        self._check_surplus_biases()

    def read(self, name: str) -> QuantizedWeight:
        """The matrix [N, K] of the layer `name`. Raises `ModelError` where its numbers cannot be right."""
        rows, columns = self._shape(name)
        given, grid = self.quantization, self.quantization.grid
        # Small tensors first: a broken one is found before the large one is read.
        scales = self._tensor(f"{name}.scales").half()
        if not (scales.isfinite() & (scales > 0)).all():
            bad = scales[~(scales.isfinite() & (scales > 0))][0].item()
            raise ModelError(
                f"{name}.scales holds {bad:g} once in fp16; scales must be finite and above 0. Fetch the checkpoint "
                "again, or quantise the model anew."
            )
        groups = grid.groups(columns)
        if f"{name}.g_idx" in self._found:
            stored = self._tensor(f"{name}.g_idx")
            if stored.min() < 0 or stored.max() >= len(scales):
                raise ModelError(
                    f"{name}.g_idx holds groups from {int(stored.min())} to {int(stored.max())}, but there are "
                    f"{len(scales)} (0 to {len(scales) - 1}); fetch the checkpoint again."
                )
            # Early exports without activation order left zeros in it, which their readers took for "in order".
            if stored.any():
                groups = stored.to(torch.int32)
        qzeros = self._tensor(f"{name}.qzeros")
        version = given.version
        # Some exports call themselves "gptq" and store zero points as they are. A symmetric one shows it: its one
        # zero point is the middle code.
        if version == 1 and given.sym and (stored_zeros(qzeros, given.bits, 2) == 2 ** (given.bits - 1)).all():
            version = 2
        parts = {"qweight": self._tensor(f"{name}.qweight"), "qzeros": qzeros, "scales": scales, "g_idx": groups}
        weight = unpack_weight(parts, given.bits, version)
        assert weight.shape == (rows, columns)
        return weight

    def bias(self, name: str) -> Tensor | None:
        """The bias [N] of the layer `name`, in the file's type; None where the model has none."""
        self._shape(name)
        return self._tensor(f"{name}.bias") if f"{name}.bias" in self.others else None

    def tensor(self, name: str) -> Tensor:
        """One of `others`, in the file's type."""
        if name not in self.others:
            raise ModelError(f"{name!r} is not among the unquantised tensors of {self.folder}; `others` lists them.")
        return self._tensor(name)

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """All of `others`, one at a time: (name, tensor in the file's type)."""
        for name in self.others:
            yield name, self._tensor(name)

    def _shape(self, name: str) -> tuple[int, int]:
        if name not in self._linear:
            raise ModelError(f"{name!r} is not a quantised layer of {self.folder}; `names` lists them.")
        return self._linear[name]

    def _tensor(self, name: str) -> Tensor:
        path = self._found[name].path
        try:
            # Opened anew for each tensor: pages that were read stay mapped, and count, until the file is closed.
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read from {path} ({error}); fetch the checkpoint again.") from error

    def _check_names(self, others: Mapping[str, tuple[int, ...]]) -> None:
        plain = [
            name for name in self.names if f"{name}.qweight" not in self._found and f"{name}.weight" in self._found
        ]
        if plain:
            raise ModelError(
                f"{len(plain)} of {len(self.names)} layers in {self.folder} are not quantised ({_some(plain)}), which "
                "is not supported; use a checkpoint that quantises all layers alike."
            )
        # Exports without activation order may leave g_idx out.
        wanted = [f"{name}.{part}" for name in self.names for part in _PARTS[:3]]
        wanted += [f"{name}.g_idx" for name in self.names if self.quantization.desc_act]
        missing = [name for name in (*wanted, *others) if name not in self._found]
        if missing:
            raise ModelError(
                f"{self.folder} lacks {len(missing)} tensors ({_some(missing)}); fetch the checkpoint again, or "
                "correct its config.json."
            )
        known = {f"{name}.{part}" for name in self.names for part in (*_PARTS, "bias")} | others.keys()
        surplus = [name for name in self._found if name not in known and not _ignorable(name)]
        if surplus:
            raise ModelError(
                f"{self.folder} holds {len(surplus)} tensors that its config.json does not account for "
                f"({_some(surplus)}); the model has parts that are not supported."
            )

    def _check_shapes(self, others: Mapping[str, tuple[int, ...]]) -> None:
        bits, grid = self.quantization.bits, self.quantization.grid
        for name, (rows, columns) in self._linear.items():
            groups = math.ceil(columns / grid.columns(columns))
            self._expect(f"{name}.qweight", (columns * bits // WORD, rows), ("I32",))
            self._expect(f"{name}.qzeros", (groups, rows * bits // WORD), ("I32",))
            self._expect(f"{name}.scales", (groups, rows), _SCALE_TYPES)
            if f"{name}.g_idx" in self._found:
                self._expect(f"{name}.g_idx", (columns,), ("I32", "I64"))
        for name, shape in others.items():
            self._expect(name, shape, _FLOAT_TYPES)

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        found = self._found[name]
        if found.shape != shape:
            given = self.quantization
            raise ModelError(
                f"{name} in {self.folder} has shape {list(found.shape)}, but its config.json (bits={given.bits}, "
                f"group_size={given.group_size}) asks for {list(shape)}; correct one of the two."
            )
        if found.dtype not in dtypes:
            raise ModelError(
                f"{name} in {self.folder} is of type {found.dtype}, but the format asks for {' or '.join(dtypes)}; "
                "quantise the model anew."
            )

    def _check_surplus_biases(self) -> None:
        # Early exports gave each layer a bias of zeros, wanted or not.
        for name in self.names:
            bias = f"{name}.bias"
            if bias in self._found and bias not in self.others and self._tensor(bias).any():
                raise ModelError(
                    f"{bias} in {self.folder} is not zero, but the {self.config.architecture} architecture has no such "
                    "bias; the model has parts that are not supported."
                )


def check_written_format(config: ModelConfig, grid: Grid, short_groups: bool = False) -> None:
    """Raise `InvalidSetting` if a model quantised on `grid` would not fit the format that other engines read.

    `short_groups` lets the last group of a layer be a short one, which this project reads and others may not.
    """
    shapes = linear_shapes(config)
    for name, (rows, columns) in shapes.items():
        for size, word in ((rows, "outputs"), (columns, "inputs")):
            if size * grid.bits % WORD:
                raise InvalidSetting(
                    f"{name} has {size} {word}, which {grid.bits} bits cannot pack into whole words of {WORD}: a "
                    f"multiple of {packable_step(grid.bits)} is needed; choose other bits."
                )
        if grid.group_size != -1 and columns % grid.group_size and not short_groups:
            common = math.gcd(*(width for _, width in shapes.values()))
            fitting = [str(size) for size in (256, 128, 64, 32, 16, 8) if common % size == 0]
            raise InvalidSetting(
                f"{name} has {columns} inputs, which groups of {grid.group_size} do not divide, and other engines do "
                f"not read a short last group; choose a group_size of {', '.join([*fitting, '-1'])}."
            )


def write_checkpoint(
    out: str | Path,
    source: str | Path,
    weights: Mapping[str, QuantizedWeight] | Iterable[tuple[str, QuantizedWeight]],
    grid: Grid,
    *,
    damp_percent: float | None = None,
    act_order: bool = False,
    static_groups: bool = True,
    true_sequential: bool = True,
    checkpoint_format: str | None = None,
    short_groups: bool = False,
) -> Path:
    """Write the folder `out`: the checkpoint `source` with its layers replaced by `weights`, as other engines load it.

    `weights` names each of `linear_shapes(config)` once, in any order; given as an iterator it is consumed one matrix
    at a time. `act_order` is noted only: columns stay in their order, so the file's desc_act is false.
    `checkpoint_format` is "gptq" or "gptq_v2"; None takes the one that most engines read, "gptq" for symmetric grids
    and "gptq_v2" for others. Returns `out`, which appears in one piece or not at all.
    Raises `InvalidSetting` for what the format cannot hold and for a folder that is in use, `ModelError` otherwise.
    """
    out, source = Path(out), Path(source)
    config = ModelConfig.from_folder(source)
    if config.quantization is not None:
        raise ModelError(f"{source} is quantised already; give the unquantised checkpoint.")
    check_written_format(config, grid, short_groups)
    # GPTQModel refuses asymmetric files of version 1, and version 1 has no zero point of 0.
    form = checkpoint_format or ("gptq" if grid.symmetric else "gptq_v2")
    if form not in VERSIONS.values():
        raise InvalidSetting(f"checkpoint_format is {form!r}; it must be 'gptq' or 'gptq_v2'.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidSetting(f"{out} exists and is not an empty folder; give a new name, or remove it first.")
    quantization = QuantizationConfig(
        bits=grid.bits,
        group_size=grid.group_size,
        desc_act=False,
        sym=grid.symmetric,
        checkpoint_format=form,
        damp_percent=damp_percent,
        true_sequential=true_sequential,
        static_groups=static_groups,
        meta={"quantizer": [f"stepengine:{stepengine.__version__}"], "act_order": act_order},
    )
    aside: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.writing-", dir=out.parent))
        fresh = aside / out.name
        fresh.mkdir()
        _write_tensors(fresh / "model.safetensors", source, config, weights, quantization)
        _write_settings(fresh, source, quantization)
        if out.exists():
            out.rmdir()
        fresh.rename(out)
    except OSError as error:
        raise ModelError(f"{out} cannot be written ({error}); free some space there or give another folder.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return out


def _write_tensors(
    path: Path,
    source: Path,
    config: ModelConfig,
    weights: Mapping[str, QuantizedWeight] | Iterable[tuple[str, QuantizedWeight]],
    quantization: QuantizationConfig,
) -> None:
    shapes, bits, grid = linear_shapes(config), quantization.bits, quantization.grid
    found = _headers(weight_files(source))
    kept = {name: entry for name, entry in found.items() if name.removesuffix(".weight") not in shapes}
    entries: dict[str, tuple[str, tuple[int, ...]]] = {name: (entry.dtype, entry.shape) for name, entry in kept.items()}
    for name, (rows, columns) in shapes.items():
        groups = math.ceil(columns / grid.columns(columns))
        entries[f"{name}.qweight"] = ("I32", (columns * bits // WORD, rows))
        entries[f"{name}.qzeros"] = ("I32", (groups, rows * bits // WORD))
        entries[f"{name}.scales"] = ("F16", (groups, rows))
        entries[f"{name}.g_idx"] = ("I32", (columns,))
    with _TensorFile(path, entries) as file:
        done = set()
        for name, weight in weights.items() if isinstance(weights, Mapping) else weights:
            if name in done or name not in shapes:
                problem = "comes twice" if name in done else "is no layer of this model"
                raise ModelError(f"Quantised weight {name!r} {problem}; give each of linear_shapes(config) once.")
            _check_weight(name, weight, shapes[name], grid)
            for part, tensor in pack_weight(weight, quantization.version).items():
                file.put(f"{name}.{part}", tensor)
            done.add(name)
        missing = [name for name in shapes if name not in done]
        if missing:
            raise ModelError(
                f"{len(missing)} of {len(shapes)} layers have no quantised weight ({_some(missing)}); quantise all."
            )
        for name, entry in kept.items():
            with safe_open(entry.path, framework="pt") as tensors:
                file.put(name, tensors.get_tensor(name))


def _check_weight(name: str, weight: QuantizedWeight, shape: tuple[int, int], grid: Grid) -> None:
    if weight.shape != shape or weight.bits != grid.bits:
        raise ModelError(
            f"The quantised {name} is {list(weight.shape)} of {weight.bits} bits, but {list(shape)} of {grid.bits} is "
            "to be written; quantise it from this source and with this grid."
        )
    if not torch.equal(weight.groups.cpu(), grid.groups(shape[1])):
        raise ModelError(
            f"The groups of {name} are not columns {grid.columns(shape[1])} by {grid.columns(shape[1])} in order, but "
            "such are to be written; quantise with groups that are fixed beforehand."
        )


def _write_settings(fresh: Path, source: Path, quantization: QuantizationConfig) -> None:
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, fresh / path.name)  # not its rights: a cache may be kept read-only
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(
            source / "additional_chat_templates",
            fresh / "additional_chat_templates",
            copy_function=shutil.copyfile,
        )
    given = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(fresh / "config.json", given | {"quantization_config": quantization.as_dict()})
    # Loaders from before `quantization_config` look here, and take the file's name from it.
    _write_json(fresh / "quantize_config.json", quantization.as_dict() | {"model_file_base_name": "model"})


class _TensorFile:
    """A safetensors file written one tensor at a time, in any order: its header is known beforehand.

    The library's own writer wants all tensors in memory at once.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide types first, as the library does it, so that each tensor is aligned to its type.
        for name in sorted(entries, key=lambda name: (-_BYTES.get(entries[name][0], 0), name)):
            dtype, shape = entries[name]
            if dtype not in _BYTES:
                raise ModelError(f"{name} is of type {dtype}, which is not supported; use {', '.join(_FLOAT_TYPES)}.")
            start, end = end, end + math.prod(shape) * _BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._data = header, 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def __enter__(self) -> "_TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, name: str, tensor: Tensor) -> None:
        start, end = self._header[name]["data_offsets"]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert len(data) == end - start, name
        self._file.seek(self._data + start)
        self._file.write(data)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies, and what its file says of it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def _headers(files: list[Path]) -> dict[str, _Entry]:
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = _Entry(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is not a whole safetensors file ({error}); fetch the checkpoint again."
            ) from error
    return found


def _files(folder: Path) -> list[Path]:
    # AutoGPTQ's own name for its one file is of the kind gptq_model-4bit-128g.safetensors.
    named = sorted(folder.glob("gptq_model-*.safetensors"))
    usual = (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()
    return named if len(named) == 1 and not usual else weight_files(folder)


def _model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    tensors = checkpoint_tensors(Decoder(config, "meta", torch.float32, 1))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _ignorable(name: str) -> bool:
    # A tied head's copy, and frequencies that follow from the config.
    return name == "lm_head.weight" or name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos", "rotary_emb.sin"))


def _whole(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"quantization_config gives {key}={value!r}; it must be a whole number.")
    return value


def _flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"quantization_config gives {key}={value!r}; it must be true or false.")
    return default if value is None else value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
