"""The structure of a GGUF file: typed metadata, and where each tensor's bytes are.

Knows the container (version 2 and 3, little-endian) and nothing about models. Parsed here because
the `gguf` package's reader makes one numpy view a vocabulary entry: 2.0 s for 49,152 tokens on one
core, against 0.1 s here, and this runs at every start. The package still supplies type numbers,
block sizes and the dequantisers.
Source: the GGUF specification, version 3.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from jaxserve.weights.checkpoint import DTYPES, CheckpointError, TensorInfo
from jaxserve.weights.safetensors import read_part

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    GGMLQuantizationType.F32: DTYPES["float32"],
    GGMLQuantizationType.F16: DTYPES["float16"],
    GGMLQuantizationType.BF16: DTYPES["bfloat16"],
    GGMLQuantizationType.F64: DTYPES["float64"],
    GGMLQuantizationType.I8: DTYPES["int8"],
    GGMLQuantizationType.I16: DTYPES["int16"],
    GGMLQuantizationType.I32: DTYPES["int32"],
    GGMLQuantizationType.I64: DTYPES["int64"],
}
_ROWS_BYTES = 64 << 20  # dequantised at a time, so that temporaries stay below a few times this


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file has it. `shape` is row-major (the file lists the innermost size first)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    file: Path
    offset: int  # bytes from the beginning of the file

    @property
    def dtype(self) -> np.dtype:
        """What `read_rows` returns: the stored dtype, float32 for every quantised type."""
        return _PLAIN.get(self.type, DTYPES["float32"])

    @property
    def is_quantised(self) -> bool:
        return self.type not in _PLAIN

    @property
    def row_bytes(self) -> int:
        values, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // values * size

    @property
    def num_rows(self) -> int:
        """Product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the tensor seen as [num_rows, last dimension], dequantised."""
        raw_info = TensorInfo(self.name, (self.num_rows, self.row_bytes), DTYPES["uint8"], self.file)
        rows = slice(start, stop), slice(0, self.row_bytes)
        if not self.is_quantised:
            return read_part(raw_info, self.offset, rows).view(self.dtype)
        out = np.empty((stop - start, self.shape[-1]), np.float32)
        step = max(1, _ROWS_BYTES // (4 * self.shape[-1]))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            raw = read_part(raw_info, self.offset, (slice(begin, end), rows[1]))
            out[begin - start : end - start] = quants.dequantize(raw, self.type)
        return out


@dataclass(frozen=True)
class GGUFFile:
    """Parsed header. `digest` identifies the metadata (all keys and values)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    digest: str


def read_gguf(path: Path) -> GGUFFile:
    """Parse the header and check that every tensor lies inside the file.

    Raises: CheckpointError for another kind of file, a damaged or truncated one, or a tensor type
    that cannot be dequantised.
    """
    file_bytes = path.stat().st_size
    if file_bytes < 24:
        raise CheckpointError(f"{path}: truncated: {file_bytes} bytes, a GGUF header takes 24 at least")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        reader = _Reader(view)
        try:
            magic, version = reader.scalar("<I"), reader.scalar("<I")
            if magic != int.from_bytes(b"GGUF", "little"):
                raise CheckpointError(f"{path}: not a GGUF file: it begins with {bytes(view[:4])!r}")
            if version not in (2, 3):
                raise CheckpointError(f"{path}: GGUF version {version}; readable are 2 and 3, little-endian")
            num_tensors, num_keys = reader.scalar("<Q"), reader.scalar("<Q")
            metadata = {}
            for _ in range(num_keys):
                key = reader.string()
                metadata[key] = reader.value(reader.scalar("<I"))
            digest = xxhash.xxh3_128_hexdigest(view[: reader.at])
            entries = [reader.tensor() for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, _DamagedError) as error:
            raise CheckpointError(
                f"{path}: damaged or truncated GGUF header at byte {reader.at} of {file_bytes}: {error}"
            ) from error
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a positive number")
        data_start = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, shape, type_number, offset in entries:
        tensors[name] = _checked(path, file_bytes, name, shape, type_number, data_start + offset)
    return GGUFFile(path, metadata, tensors, digest)


def _checked(path, file_bytes, name, shape, type_number, offset) -> StoredTensor:
    try:
        kind = GGMLQuantizationType(type_number)
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor {name} has an unknown type number {type_number}") from error
    if not _can_read(kind):
        known = ", ".join(sorted(t.name for t in GGMLQuantizationType if _can_read(t)))
        raise CheckpointError(
            f"{path}: tensor {name} is {kind.name}, which cannot be read; use one of {known}"
        )
    stored = StoredTensor(name, shape, kind, path, offset)
    values = GGML_QUANT_SIZES[kind][0]
    if not shape or shape[-1] % values:
        raise CheckpointError(
            f"{path}: tensor {name} {list(shape)} is {kind.name}: expected rows of a multiple of {values}"
        )
    end = offset + stored.num_rows * stored.row_bytes
    if end > file_bytes:
        raise CheckpointError(
            f"{path}: truncated at tensor {name} {list(shape)}: expected {end} bytes, got {file_bytes}"
        )
    return stored


@cache
def _can_read(kind: GGMLQuantizationType) -> bool:
    if kind in _PLAIN:
        return True
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # how the gguf package says that it cannot
        return False
    return True


class _DamagedError(ValueError):
    """What was read cannot be a header."""


class _Reader:
    """A cursor over the header."""

    def __init__(self, view: mmap.mmap):
        self.view = view
        self.at = 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.view, self.at)
        self.at += struct.calcsize(form)
        return value

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.view):
            raise _DamagedError(f"{size} bytes wanted")
        out = self.view[self.at : self.at + size]
        self.at += size
        return out

    def string(self) -> str:
        # A few vocabularies hold pieces of characters; such a token cannot be text anyway.
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in _SCALARS:
                form = np.dtype(_SCALARS[item])
                return np.frombuffer(self.take(count * form.itemsize), form).tolist()
            if count > len(self.view):
                raise _DamagedError(f"an array of {count} entries")
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise _DamagedError(f"value type {kind}")
        return self.scalar(_SCALARS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self.string(), self.scalar("<I")
        if rank > 8:
            raise _DamagedError(f"tensor {name!r} of rank {rank}")
        shape = tuple(self.scalar("<Q") for _ in range(rank))[::-1]
        return name, shape, self.scalar("<I"), self.scalar("<Q")
