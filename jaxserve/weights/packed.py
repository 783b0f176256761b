"""Linear weights as published formats pack them: integers of 4 or 8 bits in words of 32.

A weight has N outputs and K inputs, in G groups. Each format keeps the same three arrays, named, laid out
and packed in its own way; here they come as codes, scales and zeros with the outputs first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.layers.group_quant import SUFFIXES
from jaxserve.weights.checkpoint import Checkpoint, CheckpointError, TensorInfo, find_tensor


@dataclass(frozen=True)
class Format:
    """How a weight is stored. Zeros are packed along the outputs in all of them.

    Args:
        codes, scales, zeros: names, after the module's.
        order: name of the group of each input [K].
        others: names of what else may lie beside them.
        has_inputs_first: the arrays are [K, N], not [N, K].
        packs_inputs: codes of one output share a word; else those of one input.
        places: where in a word the code of each of its outputs is; by default in order.
    """

    codes: str
    scales: str
    zeros: str
    order: str
    others: tuple[str, ...] = ()
    has_inputs_first: bool = True
    packs_inputs: bool = True
    places: tuple[int, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.codes, self.scales, self.zeros, self.order, *self.others


_GPTQ = ".qweight", ".scales", ".qzeros", ".g_idx"
_PACKED = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx"
FORMATS: Mapping[str, Format] = {
    "awq": Format(*_GPTQ, packs_inputs=False, places=(0, 4, 1, 5, 2, 6, 3, 7)),
    "gptq": Format(*_GPTQ),
    "compressed-tensors": Format(*_PACKED, others=(".weight_shape",), has_inputs_first=False),
}
"""Of each quant_method. Source: AutoAWQ's WQLinear_GEMM, GPTQModel's PackableQuantLinear, and
pack_quantized of compressed-tensors."""


class PackedWeight:
    """One weight of a checkpoint in a published format. Making it reads nothing; headers must fit.

    Args:
        group_size: inputs of a group, 0 for all.
        has_zeros: they are stored; else every zero is the middle, 2 ** (bits - 1).
        are_zeros_less: what is stored is one less than the zero (GPTQ's first format), in whole words: a
            zero of 0 has borrowed from the next, as its writer subtracts and its readers add.

    Raises: CheckpointError for a missing tensor, and for shapes that do not agree.
    """

    def __init__(
        self,
        source: Checkpoint,
        module: str,
        form: Format,
        bits: int,
        group_size: int,
        *,
        has_zeros: bool,
        are_zeros_less: bool,
    ):
        self.source, self.module, self.form, self.bits = source, module, form, bits
        self.group_size = group_size
        self.has_zeros, self.are_zeros_less = has_zeros, are_zeros_less
        self.stored = [module + name for name in form.names if module + name in source.tensors]
        codes, scales = self._find(form.codes), self._find(form.scales, is_float=True)
        self.file: Path = codes.file
        self.num_groups, num_out = scales.shape if form.has_inputs_first else scales.shape[::-1]
        K, N = codes.shape if form.has_inputs_first else codes.shape[::-1]
        per_word = 32 // bits
        if not form.packs_inputs:
            N *= per_word
        else:  # a last word may be filled up
            K = min(K * per_word, self.num_groups * group_size or K * per_word)
        self.shape = num_out, K
        self._check(scales, num_out == N and self.num_groups * (group_size or K) == K, codes)
        words = _words(num_out, per_word), self.num_groups
        if has_zeros:
            zeros = self._find(form.zeros)
            self._check(zeros, zeros.shape == (words[::-1] if form.has_inputs_first else words), codes)
        if form.packs_inputs:
            across = codes.shape[0] if form.has_inputs_first else codes.shape[1]
            self._check(codes, across == _words(K, per_word), scales)
        if (name := module + form.order) in source.tensors:
            self._check(source.tensors[name], source.tensors[name].shape == (K,), codes)

    def codes(self, outputs: slice, inputs: slice) -> np.ndarray:
        """uint8 [outputs, inputs]. Raises CheckpointError where the file says that it is of another shape."""
        self._check_shape()
        if not self.form.packs_inputs:
            return self._unpack(self.form.codes, outputs, inputs)
        words = self._words_of(inputs)
        codes_NK = unpack(self._read(self.form.codes, outputs, words), self.bits)
        return codes_NK[:, inputs.start - words.start * 32 // self.bits :][:, : inputs.stop - inputs.start]

    def scales(self, outputs: slice, groups: slice) -> np.ndarray:
        """float32 [outputs, groups]."""
        return self._read(self.form.scales, outputs, groups).astype(np.float32)

    def zeros(self, outputs: slice, groups: slice) -> np.ndarray:
        """uint8 [outputs, groups]."""
        if not self.has_zeros:
            shape = outputs.stop - outputs.start, groups.stop - groups.start
            return np.full(shape, 1 << self.bits - 1, np.uint8)
        return self._unpack(self.form.zeros, outputs, groups)

    def order(self) -> np.ndarray | None:
        """The group of each input; None where each group is of inputs in a row.

        Raises: CheckpointError where there is no such group.
        """
        name = self.module + self.form.order
        if name not in self.source.tensors:
            return None
        group_K = self.source.read(name)
        in_a_row_K = np.arange(len(group_K)) // (self.shape[1] // self.num_groups)
        is_unset = not self.form.has_inputs_first and -1 in group_K  # as compressed-tensors makes it
        if is_unset or np.array_equal(group_K, in_a_row_K):
            return None
        if group_K.min() < 0 or group_K.max() >= self.num_groups:
            raise CheckpointError(
                f"{self.source.tensors[name].file}: tensor {name} has groups {group_K.min()} to "
                f"{group_K.max()}, expected 0 to {self.num_groups - 1}"
            )
        return group_K

    # ---- reading ----

    def _read(self, name: str, outputs: slice, inputs: slice) -> np.ndarray:
        """Part of an array with the outputs first. Contiguous."""
        index = (inputs, outputs) if self.form.has_inputs_first else (outputs, inputs)
        array = self.source.read(self.module + name, index)
        return np.ascontiguousarray(array.T if self.form.has_inputs_first else array)

    def _unpack(self, name: str, outputs: slice, inputs: slice) -> np.ndarray:
        """uint8 [outputs, inputs] of words that are packed along the outputs."""
        words, each = self._words_of(outputs), 32 // self.bits
        array = self._read(name, words, inputs).view(np.uint32)
        if self.are_zeros_less and name == self.form.zeros:
            array += np.uint32(0xFFFFFFFF // (2**self.bits - 1))  # a one for each
        codes = np.empty((len(array), each, array.shape[1]), np.uint8)
        for number, place in enumerate(self.form.places or range(each)):
            codes[:, number] = array >> np.uint32(place * self.bits) & np.uint32(2**self.bits - 1)
        first = outputs.start - words.start * each
        codes = codes.reshape(len(array) * each, array.shape[1])
        return codes[first : first + outputs.stop - outputs.start]

    def _words_of(self, codes: slice) -> slice:
        """Those that a range of codes lies in."""
        each = 32 // self.bits
        return slice(codes.start // each, _words(codes.stop, each))

    # ---- checking ----

    def _find(self, name: str, *, is_float: bool = False) -> TensorInfo:
        info = self.source.tensors.get(self.module + name)
        if info is None:
            there = self.source.tensors[self.stored[0]]
            raise CheckpointError(
                f"{there.file}: tensor {self.module + name} is missing; {there.name} needs it"
            )
        # bfloat16 is of no kind that numpy knows.
        if len(info.shape) != 2 or (info.dtype.kind in "iub" if is_float else info.dtype != np.int32):
            raise CheckpointError(
                f"{info.file}: tensor {info.name} is {info.dtype.name} {list(info.shape)}, expected a matrix "
                f"of {'floats' if is_float else 'int32'}"
            )
        return info

    def _check(self, info: TensorInfo, fits: bool, beside: TensorInfo) -> None:
        if not fits:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} {list(info.shape)} does not fit {beside.name} "
                f"{list(beside.shape)} in integers of {self.bits} bits, groups of "
                f"{self.group_size or 'all inputs'}"
            )

    def _check_shape(self) -> None:
        if (name := f"{self.module}.weight_shape") not in self.stored:
            return
        if (says := self.source.read(name).tolist()) != [*self.shape]:
            raise CheckpointError(
                f"{self.source.tensors[name].file}: tensor {name} says {says}, but {self.module}"
                f"{self.form.codes} is of {[*self.shape]}"
            )


class UnpackedWeight:
    """One weight of a converted checkpoint, which has codes, scales and zeros as they are used.

    Raises: CheckpointError for a missing part, and for shapes that do not agree.
    """

    def __init__(self, source: Checkpoint, module: str, group_size: int):
        self.source, self.module = source, module
        self.stored = [f"{module}.weight{suffix}" for suffix in SUFFIXES]
        codes, scales, zeros = (find_tensor(source.tensors, name, source.path) for name in self.stored)
        self.file: Path = codes.file
        self.shape = N, K = codes.shape
        self.num_groups = K // (group_size or K)
        for info in (scales, zeros):
            if info.shape != (N, self.num_groups):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} has shape {list(info.shape)}, expected "
                    f"{[N, self.num_groups]}"
                )

    def codes(self, outputs: slice, inputs: slice) -> np.ndarray:
        return self.source.read(self.stored[0], (outputs, inputs))

    def scales(self, outputs: slice, groups: slice) -> np.ndarray:
        return self.source.read(self.stored[1], (outputs, groups))

    def zeros(self, outputs: slice, groups: slice) -> np.ndarray:
        return self.source.read(self.stored[2], (outputs, groups))

    def order(self) -> None:
        return None


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n * 32 / bits] of int32 [..., n]: the lowest bits of a word come first."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return octets
    codes = np.empty((*octets.shape[:-1], 2 * octets.shape[-1]), np.uint8)
    np.bitwise_and(octets, 15, out=codes[..., 0::2])
    np.right_shift(octets, 4, out=codes[..., 1::2])
    return codes


def _words(count: int, per_word: int) -> int:
    return -(-count // per_word)
