"""A checkpoint seen in 8 bits: what `tools.convert_checkpoint --quantization` writes."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.layers.channel_quant import LARGEST, STORED_SUFFIX, Scheme
from jaxserve.weights.checkpoint import Checkpoint, Index, TensorInfo, find_tensor, full_index

NUMPY_DTYPES: dict[Scheme, np.dtype] = {"fp8": np.dtype(ml_dtypes.float8_e4m3fn), "int8": np.dtype(np.int8)}


class QuantisedCheckpoint:
    """`source`, in which each of the matrices `names` [out, in] is numbers in 8 bits and scales [out, 1].

    Its config says so in the words of compressed-tensors. One matrix is kept, since its scales are asked
    for after its numbers.
    """

    def __init__(self, source: Checkpoint, names: Collection[str], scheme: Scheme):
        self.source, self.names = source, frozenset(names)
        self.scheme: Scheme = scheme
        self.path: Path = source.path
        self.generation_config = source.generation_config
        modules = [name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight")]
        is_matrix = {name.removesuffix(".weight") for name in names}
        weights = {"num_bits": 8, "type": "float" if scheme == "fp8" else "int", "strategy": "channel"}
        self.config: dict[str, Any] = {
            **source.config,
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized" if scheme == "fp8" else "int-quantized",
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": {**weights, "symmetric": True}}
                },
                "ignore": [module for module in modules if module not in is_matrix],
            },
        }
        tensors: dict[str, TensorInfo] = {}
        for name, info in source.tensors.items():
            tensors[name] = info
            if name in self.names:
                tensors[name] = TensorInfo(name, info.shape, NUMPY_DTYPES[scheme], info.file)
                scale = name + STORED_SUFFIX
                tensors[scale] = TensorInfo(scale, (info.shape[0], 1), np.dtype(np.float32), info.file)
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._last: tuple[str, np.ndarray, np.ndarray] | None = None

    @property
    def tokenizer_dir(self) -> Path:
        return self.source.tokenizer_dir

    def is_quantised(self, name: str) -> bool:
        """Whether the source's own format has it quantised (GGUF)."""
        of_source = getattr(self.source, "is_quantised", None)
        return of_source is not None and name in self.source.tensors and of_source(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info = find_tensor(self.tensors, name, self.path)
        matrix = name.removesuffix(STORED_SUFFIX)
        if matrix not in self.names:
            return self.source.read(name, index)
        if self._last is None or self._last[0] != matrix:
            self._last = (matrix, *quantise_rows(self.source.read(matrix), self.scheme))
        part = self._last[1] if name == matrix else self._last[2]
        return np.ascontiguousarray(part[full_index(info.shape, index)])


def quantise_rows(wide: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """(numbers [out, in], scales [out, 1]), as `jaxserve.layers.channel_quant.quantise` makes them."""
    wide, largest = wide.astype(np.float32), np.float32(LARGEST[scheme])
    scale = np.abs(wide).max(axis=1, keepdims=True) / largest
    ratio = np.clip(wide / np.where(scale > 0, scale, 1), -largest, largest)
    return (np.rint(ratio) if scheme == "int8" else ratio).astype(NUMPY_DTYPES[scheme]), scale
