"""A checkpoint whose linear weights are integers in groups, seen wide and as numbers a byte."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxserve.layers.group_quant import (
    CODES,
    METHOD,
    SCALES,
    SUFFIXES,
    ZEROS,
    GroupQuant,
    read_groups,
    stores_zeros,
    stores_zeros_less_one,
)
from jaxserve.row_blocks import in_row_blocks
from jaxserve.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    Index,
    TensorInfo,
    find_tensor,
    full_index,
)
from jaxserve.weights.packed import FORMATS, PackedWeight, UnpackedWeight

_ROWS = 256  # are widened at a time, so that what is made on the way stays in the cache
_DTYPES = {CODES: np.dtype(np.uint8), SCALES: np.dtype(np.float32), ZEROS: np.dtype(np.uint8)}


class GroupedCheckpoint:
    """`source`, in which each packed weight of N outputs and K inputs is shown, in place of its tensors, as

        M.weight          float32 [N, K], (code - zero) * scale
        M.weight.codes    uint8 [N, K], 0 .. 2**bits - 1
        M.weight.scales   float32 [N, K / group]
        M.weight.zeros    uint8 [N, K / group], never 2**bits

    the last three where all groups are of inputs in a row. Which weights are packed is found in the files;
    its config says so in words of our own, whatever the format. `read` reads the words that a part lies
    in and keeps nothing.

    Raises: CheckpointError for tensors that are missing or do not fit each other.
    """

    def __init__(self, source: Checkpoint, quant: GroupQuant):
        self.source = source
        self.path: Path = source.path
        self.generation_config = source.generation_config
        self.weights = _find_weights(source, quant)
        self.is_ordered = quant.is_ordered and any(w.order() is not None for w in self.weights.values())
        hidden = {name for weight in self.weights.values() for name in weight.stored}
        tensors = {name: info for name, info in source.tensors.items() if name not in hidden}
        plain = [n for n, info in tensors.items() if n.endswith(".weight") and len(info.shape) == 2]
        self.config: dict[str, Any] = {
            **source.config,
            "quantization_config": {
                "quant_method": METHOD,
                "bits": quant.bits,
                "group_size": quant.group_size,
                "is_ordered": self.is_ordered,
                "modules_to_not_convert": [name.removesuffix(".weight") for name in plain],
            },
        }
        for name, weight in self.weights.items():
            tensors[name] = TensorInfo(name, weight.shape, np.dtype(np.float32), weight.file)
            for suffix in () if self.is_ordered else SUFFIXES:
                shape = weight.shape if suffix == CODES else (weight.shape[0], weight.num_groups)
                tensors[name + suffix] = TensorInfo(name + suffix, shape, _DTYPES[suffix], weight.file)
        self.tensors: Mapping[str, TensorInfo] = tensors

    @property
    def tokenizer_dir(self) -> Path:
        return self.source.tokenizer_dir

    def is_quantised(self, name: str) -> bool:
        return name in self.weights

    def in_form(self, form: Literal["wide", "codes"]) -> "GroupedCheckpoint":
        """Itself with each packed weight once: wide, and with nothing of it in the config; or as codes,
        scales and zeros, of which opening makes both forms again."""
        out = copy.copy(self)
        if form == "codes":
            assert not self.is_ordered, "act-order has no codes in groups"
            out.tensors = {name: info for name, info in self.tensors.items() if name not in self.weights}
        else:
            parts = {name + suffix for name in self.weights for suffix in SUFFIXES}
            out.tensors = {name: info for name, info in self.tensors.items() if name not in parts}
            out.config = {key: v for key, v in self.config.items() if key != "quantization_config"}
        return out

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info = find_tensor(self.tensors, name, self.path)
        module, dot, suffix = name.rpartition(".")
        is_part = dot + suffix in SUFFIXES and module in self.weights
        if not is_part and name not in self.weights:
            return self.source.read(name, index)
        outputs, inputs = full_index(info.shape, index)
        if not is_part:
            return in_row_blocks(lambda rows: widen(self.weights[name], rows, inputs), outputs)
        weight = self.weights[module]
        if weight.order() is not None:
            raise CheckpointError(
                f"{info.file}: {module} has groups of any inputs, but config.json says that they are in a row"
            )
        read = {CODES: weight.codes, SCALES: weight.scales, ZEROS: weight.zeros}[dot + suffix]
        return in_row_blocks(lambda rows: np.ascontiguousarray(read(rows, inputs)), outputs)


def in_groups(source: Checkpoint) -> Checkpoint:
    """`source`, or where its linear weights are integers in groups, that as a GroupedCheckpoint.

    Raises: ConfigError for a kind of groups that is not read; CheckpointError as GroupedCheckpoint.
    """
    quant = read_groups(source.config)
    if quant is None:
        return source
    grouped = GroupedCheckpoint(source, quant)
    return grouped if grouped.weights else grouped.in_form("wide")  # its config says more than its files


def widen(weight: PackedWeight | UnpackedWeight, outputs: slice, inputs: slice) -> np.ndarray:
    """float32 [outputs, inputs], with one rounding: that of a product."""
    codes, group_K = weight.codes(outputs, inputs), weight.order()
    out = np.empty(codes.shape, np.float32)
    if not codes.size:
        return out
    size = weight.shape[1] // weight.num_groups
    is_whole = group_K is None and inputs.start % size == inputs.stop % size == 0
    if group_K is None:
        group_K = np.arange(weight.shape[1]) // size
    group_K = group_K[inputs]
    groups = slice(int(group_K.min()), int(group_K.max()) + 1)
    scales, zeros = weight.scales(outputs, groups), weight.zeros(outputs, groups)
    for at in range(0, len(out), _ROWS):
        rows = slice(at, at + _ROWS)
        if is_whole:  # several times as fast as with an index
            shape = -1, groups.stop - groups.start, size
            arrays = codes[rows].reshape(shape), zeros[rows, :, None], scales[rows, :, None]
            part = out[rows].reshape(shape)
        else:
            index = group_K - groups.start
            arrays = codes[rows], zeros[rows][:, index], scales[rows][:, index]
            part = out[rows]
        np.subtract(arrays[0], arrays[1], out=part, dtype=np.float32)
        part *= arrays[2]
    return out


def _find_weights(source: Checkpoint, quant: GroupQuant) -> dict[str, PackedWeight | UnpackedWeight]:
    """Of each name `M.weight` what it is made of."""
    given = source.config["quantization_config"]
    method, bits, group_size = given["quant_method"], quant.bits, quant.group_size
    if method == METHOD:
        names = [name.removesuffix(CODES) for name in source.tensors if name.endswith(CODES)]
        return {name: UnpackedWeight(source, name.removesuffix(".weight"), group_size) for name in names}
    form = FORMATS[method]
    modules = [name.removesuffix(form.codes) for name in source.tensors if name.endswith(form.codes)]
    how = {"has_zeros": stores_zeros(given), "are_zeros_less": stores_zeros_less_one(given)}
    return {f"{m}.weight": PackedWeight(source, m, form, bits, group_size, **how) for m in modules}
