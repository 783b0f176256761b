"""Hugging Face directories: config.json, tokenizer files and safetensors shards.

The format is an 8-byte little-endian header length, a JSON header of name -> dtype, shape and
byte range, then the bytes. Reading it here rather than through a library lets a part of a tensor
be read in any dtype (bf16 and fp8 too) and lets errors name the tensor.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.weights.checkpoint import (
    DTYPES,
    CheckpointError,
    Index,
    TensorInfo,
    find_tensor,
    full_index,
    read_json,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FORMAT_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit


# Where tools write how they quantised, when config.json does not say so.
QUANTISED_BY = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory, with what another file tells of its quantization."""
    config = read_json(path / "config.json")
    if not config.get("quantization_config"):
        for name, method in QUANTISED_BY.items():
            if (path / name).is_file():
                config["quantization_config"] = {**read_json(path / name), "quant_method": method}
    return config


class SafetensorsCheckpoint:
    """A directory with `config.json` and one safetensors file, or shards and their index.

    Raises: CheckpointError for a directory that is none, a missing shard, a damaged file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        self.generation_config = read_json(path / "generation_config.json", required=False)
        self._offsets: dict[str, int] = {}
        tensors: dict[str, TensorInfo] = {}
        for file, wanted in _shards(path).items():
            found = _read_header(file)
            for name in sorted(wanted - found.keys()) if wanted else ():
                raise CheckpointError(
                    f"{file}: tensor {name} is missing; {path / INDEX_FILE} says it is here"
                )
            for name in wanted or found:
                tensors[name], self._offsets[name] = found[name]
        self.tensors: Mapping[str, TensorInfo] = tensors

    @property
    def tokenizer_dir(self) -> Path:
        return self.path

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info = find_tensor(self.tensors, name, self.path)
        return read_part(info, self._offsets[name], index)


def read_part(info: TensorInfo, offset: int, index: Index | None) -> np.ndarray:
    """Part of the row-major array that begins at byte `offset` of `info.file`, as a fresh array.

    A range of leading rows is one read; anything else goes through a mapping that is closed
    again, so that no page of the file stays in this process.
    """
    parts = full_index(info.shape, index)
    shape = tuple(part.stop - part.start for part in parts)
    inner_is_whole = all(part == slice(0, size) for part, size in zip(parts[1:], info.shape[1:]))
    if not inner_is_whole:
        try:
            mapping = np.memmap(info.file, info.dtype, "r", offset, info.shape)
        except (OSError, ValueError) as error:  # gone, or shorter than when it was opened
            raise CheckpointError(
                f"{info.file}: truncated at tensor {info.name} {list(info.shape)}: {error}"
            ) from error
        return np.array(mapping[parts])
    out = np.empty(shape, info.dtype)
    if out.size:
        row_bytes = info.num_bytes // info.shape[0] if info.shape else info.dtype.itemsize
        start = offset + (parts[0].start * row_bytes if parts else 0)
        got = _read_into(info.file, start, memoryview(out.reshape(-1).view(np.uint8)))
        if got != out.nbytes:
            raise CheckpointError(
                f"{info.file}: truncated at tensor {info.name} {list(info.shape)}: "
                f"expected {out.nbytes} bytes from byte {start}, got {got}"
            )
    return out


def _read_into(path: Path, offset: int, buffer: memoryview) -> int:
    done = 0
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed below; only opening is in the try)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    with file:
        while done < len(buffer):
            # Linux reads at most 2 GiB a call.
            got = os.preadv(file.fileno(), [buffer[done : done + (1 << 30)]], offset + done)
            if got == 0:
                break
            done += got
    return done


def _shards(path: Path) -> dict[Path, set[str]]:
    """The files to read and the tensors expected of each (empty: whatever the file has)."""
    index_path = path / INDEX_FILE
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: expected a non-empty weight_map")
        shards: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index_path}: tensor {name} is in {file!r}, not a file beside it")
            shards.setdefault(path / file, set()).add(name)
        missing = sorted(file.name for file in shards if not file.exists())
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:5])}"
            )
        return shards
    if (path / SINGLE_FILE).exists():
        return {path / SINGLE_FILE: set()}
    raise CheckpointError(f"{path}: {_what_is_there(path)}")


def _what_is_there(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    wanted = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    if other := [n for n in names if n.endswith(".safetensors")]:
        return f"{wanted}, got {', '.join(other[:5])} without an index"
    if pickled := [n for n in names if n.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"has only pickled weights ({', '.join(pickled[:5])}); they can run code when opened and are "
            "not read. Save the model again with safe_serialization=True"
        )
    if gguf := [n for n in names if n.endswith(".gguf")]:
        return f"{wanted}; to serve a GGUF file name the file itself: {path / gguf[0]}"
    return f"not a checkpoint: {wanted}, got {', '.join(names[:8]) or 'an empty directory'}"


def _read_header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Tensor -> (info, byte offset in the file). Raises CheckpointError for a damaged file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: truncated: {size} bytes, a safetensors header takes 8 at least")
        (header_len,) = struct.unpack("<Q", prefix)
        if header_len > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file: header length {header_len}")
        raw = file.read(header_len)
    if len(raw) < header_len:
        raise CheckpointError(
            f"{path}: truncated: expected {8 + header_len} bytes of header, got {size} bytes in all"
        )
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {n: (e["dtype"], tuple(e["shape"]), tuple(e["data_offsets"])) for n, e in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header: {error!r}") from error
    start = 8 + header_len
    return {name: _entry(path, name, start, size, *entry) for name, entry in entries.items()}


def _entry(path, name, start, file_bytes, dtype_name, shape, offsets) -> tuple[TensorInfo, int]:
    if dtype_name not in _FORMAT_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype_name}; readable are {', '.join(_FORMAT_DTYPES)}"
        )
    numbers = (*shape, *offsets)
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(f"{path}: tensor {name} has shape {list(shape)}, bytes {list(offsets)}")
    info = TensorInfo(name, shape, DTYPES[_FORMAT_DTYPES[dtype_name]], path)
    begin, end = offsets
    if end - begin != info.num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name} {dtype_name} {list(shape)}: expected {info.num_bytes} bytes, "
            f"got {end - begin} in the header"
        )
    if start + end > file_bytes:
        raise CheckpointError(
            f"{path}: truncated at tensor {name} {list(shape)}: "
            f"expected {start + end} bytes, got {file_bytes}"
        )
    return info, start + begin
