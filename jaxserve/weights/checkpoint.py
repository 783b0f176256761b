"""What every checkpoint format gives the engine: a config, a tokenizer directory, tensors by name.

Formats differ only in how they answer `read`. Tensor names are always the Hugging Face ones and
tensors always have the Hugging Face layout; a format that stores something else undoes it here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

Index = tuple[slice, ...]


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message names the file, and the tensor where there is one."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor. `dtype` is what `read` returns, `file` where the bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class Checkpoint(Protocol):
    """An opened checkpoint. Opening reads headers only; `read` reads what it is asked for.

    `config` has the keys of a Hugging Face `config.json`, `generation_config` those of
    `generation_config.json` (empty when absent). `tokenizer_dir` holds `tokenizer.json`,
    `tokenizer_config.json` and the chat template where there is one. `read` may be called from
    several threads.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def tokenizer_dir(self) -> Path: ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part that `index` (slices of step 1, one a dimension) selects.

        Raises: CheckpointError when it is missing or its bytes are.
        """
        ...


DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    **{n: np.dtype(n) for n in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    "bool": np.dtype(np.bool_),
}
"""Every dtype a checkpoint may hold, by the name that numpy and ml_dtypes give it."""


def find_tensor(tensors: Mapping[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    """The entry called `name`. Raises CheckpointError with the nearest names there are."""
    if name in tensors:
        return tensors[name]
    tail = name.rsplit(".", 2)[-2:]
    near = [n for n in tensors if n.rsplit(".", 2)[-2:] == tail][:3]
    hint = f"; it has {', '.join(near)}" if near else ""
    raise CheckpointError(f"{path}: tensor {name} is missing (of {len(tensors)} tensors){hint}")


def full_index(shape: tuple[int, ...], index: Index | None) -> Index:
    """`index` with every bound written out: one slice a dimension, 0 <= start <= stop <= size."""
    given = (slice(None),) * len(shape) if index is None else index
    if len(given) != len(shape):
        raise ValueError(f"index {given} and shape {shape} differ in rank")
    out = []
    for part, size in zip(given, shape):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"index {given} has a step; read takes steps of 1")
        out.append(slice(start, max(start, stop)))
    return tuple(out)


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """The object in a JSON file, {} when it is absent and not required. Raises CheckpointError."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError as error:
        if not required:
            return {}
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
