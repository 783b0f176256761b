"""Converted checkpoints: orbax items beside config and tokenizer, under a manifest of hashes.

Layout of a directory:

    config.json  generation_config.json  tokenizer files
    items/<item>/          one orbax PyTree checkpoint, a dict of tensor name -> array
    items/<item>.json      written when the item is complete: its tensors and their hashes
    jaxserve_manifest.json written last, by rename: the directory is a checkpoint only with it

Writing goes through orbax. Reading opens the arrays with tensorstore, orbax's own storage layer,
because that reads part of an array into numpy without a device or a sharding.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and fp8 with numpy, which tensorstore needs)
import numpy as np
import xxhash

from jaxserve.weights.checkpoint import (
    DTYPES,
    CheckpointError,
    Index,
    TensorInfo,
    find_tensor,
    full_index,
    read_json,
)

MANIFEST = "jaxserve_manifest.json"
BEGUN = "jaxserve_conversion.json"  # there from the beginning: what is being converted
ITEMS = "items"
_FORMAT = 1
# A read of a few rows decodes whole chunks; a chunk is also what one core decodes at a time.
_CHUNK_BYTES = 16 << 20


class OrbaxCheckpoint:
    """A finished conversion. A tensor that is read whole is compared with its hash."""

    def __init__(self, path: Path):
        self.path = path
        manifest = read_json(path / MANIFEST)
        if manifest.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path / MANIFEST}: format {manifest.get('format')!r}, this version reads {_FORMAT}; "
                "convert the source again"
            )
        self.manifest = manifest
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json", required=False)
        self._hashes: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for item, entries in manifest["items"].items():
            folder = path / ITEMS / item
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: missing; {path / MANIFEST} lists {len(entries)} tensors in it"
                )
            for name, entry in entries.items():
                tensors[name] = TensorInfo(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], folder)
                self._hashes[name] = entry["xxh3_128"]
        self.tensors: Mapping[str, TensorInfo] = tensors

    @property
    def tokenizer_dir(self) -> Path:
        return self.path

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info = find_tensor(self.tensors, name, self.path)
        part = full_index(info.shape, index)
        out = _read_array(info, part)
        if part == full_index(info.shape, None):
            got = tensor_hash(out)
            if got != self._hashes[name]:
                raise CheckpointError(
                    f"{info.file}: tensor {name} {list(info.shape)} is damaged: "
                    f"expected xxh3 {self._hashes[name]}, got {got}"
                )
        return out


def tensor_hash(array: np.ndarray) -> str:
    """xxh3-128 of the values' bytes in row-major order."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write_item(path: Path, item: str, arrays: dict[str, np.ndarray]) -> None:
    """Write one item of a conversion and, when it is complete, the record of its hashes.

    An item with a record is complete; anything else of that name is replaced. Raises CheckpointError for
    what tensorstore cannot write, such as to a full disk.
    """
    import orbax.checkpoint as ocp  # 1 s of imports that serving a checkpoint does not need

    folder = (path / ITEMS / item).absolute()
    save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        try:
            writer.save(folder, args=ocp.args.PyTreeSave(arrays, save_args=save_args), force=True)
        except ValueError as error:
            raise CheckpointError(f"{folder}: not written: {str(error).splitlines()[0]}") from error
    record = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "xxh3_128": tensor_hash(array)}
        for name, array in arrays.items()
    }
    write_json(_record_path(path, item), record)


def item_record(path: Path, item: str) -> dict[str, Any] | None:
    """What `write_item` recorded of a complete item, or None."""
    if not (path / ITEMS / item).is_dir() or not _record_path(path, item).exists():
        return None
    return read_json(_record_path(path, item))


def write_manifest(path: Path, source: dict[str, Any], items: dict[str, dict[str, Any]]) -> None:
    """The last act of a conversion; everything written before is on the disk first."""
    os.sync()
    write_json(path / MANIFEST, {"format": _FORMAT, "source": source, "items": items})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file that is there complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _record_path(path: Path, item: str) -> Path:
    return path / ITEMS / f"{item}.json"


def _read_array(info: TensorInfo, part: Index) -> np.ndarray:
    import tensorstore as ts

    if math.prod(info.shape) == 0:
        return np.empty(tuple(p.stop - p.start for p in part), info.dtype)
    store = {"driver": "ocdbt", "base": info.file.absolute().as_uri(), "path": f"{info.name}/"}
    try:
        array = ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        shape, dtype = tuple(array.shape), array.dtype.numpy_dtype
        if shape != info.shape or dtype != info.dtype:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} is {dtype} {list(shape)}, "
                f"expected {info.dtype} {list(info.shape)}"
            )
        return np.asarray(array[part].read(order="C").result())
    except CheckpointError:
        raise
    except ValueError as error:  # every tensorstore failure: missing, cut or undecodable bytes
        raise CheckpointError(
            f"{info.file}: tensor {info.name} {list(info.shape)} cannot be read: {error}"
        ) from error
