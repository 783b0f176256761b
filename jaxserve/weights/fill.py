"""Filling an abstract model: from a checkpoint, or with random weights.

Knows parameters (their declared shape, dtype, sources) and arrays, not formats and not meshes.
"""

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx
from jax.sharding import Sharding

from jaxserve.layers.channel_quant import STORED_SUFFIX
from jaxserve.layers.group_quant import CODES, SUFFIXES
from jaxserve.layers.weight import Assemble, Sliced, Stacked
from jaxserve.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    Index,
    TensorInfo,
    find_tensor,
    full_index,
)
from jaxserve.weights.declared import Shardings, declared

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

SCALE_SUFFIXES = (STORED_SUFFIX, "_scale_inv")  # of what lies beside quantised numbers
# Buffers that some checkpoints carry and every engine computes itself.
_COMPUTED = ("rotary_emb.inv_freq", "rope.freqs", "attn.masked_bias", "attn.bias")


def load(model: nnx.Module, checkpoint: Checkpoint, shardings: Shardings, progress: Progress) -> None:
    """Replace every abstract parameter of `model` by an array of its sharding.

    One parameter at a time, quantised on its devices where that is declared; a device reads only its
    own part where the parameter is one stored tensor. Host memory: the sources of one parameter, plus
    one more that is still on its way to the device. Every shape is checked before anything is read.
    `progress(done, total)` counts bytes of the filled model. Tensors that no parameter uses are named
    in one warning.

    Raises: CheckpointError for a missing or misshapen tensor, and for a quantised one that is to be read as
    it is.
    """
    weights = list(declared(model))
    used = {source for weight in weights for target in weight.targets for source in target.sources}
    for weight in weights:
        _check_sources(checkpoint, weight.path, weight.param, used)
    _report_unused(checkpoint, used, getattr(model, "unserved", ()))
    total = sum(weight.num_bytes for weight in weights)
    done, previous = 0, None
    progress(done, total)
    for weight in weights:
        want = weight.param.get_raw_value()
        read = _reader(checkpoint, weight.path, weight.param)
        array = jax.make_array_from_callback(want.shape, shardings(weight.param), read, dtype=want.dtype)
        if previous is not None:
            previous.block_until_ready()  # its host copy is free now; two at most are alive
        done += sum(array.nbytes for array in weight.set(array, shardings))
        previous = array
        progress(done, total)
    if previous is not None:
        previous.block_until_ready()


def load_dummy(model: nnx.Module, shardings: Shardings, seed: int, progress: Progress) -> None:
    """Fill `model` with random weights made on the devices; no host memory, no host randomness.

    Norm scales (rank 1) are ones, biases zeros; `init="ones"` or `"zeros"` in a parameter's
    metadata says otherwise. Everything else is uniform with variance 1 / its last dimension, the
    fan-in of an [out, in] layer, so that activations keep their size; of packed numbers (uint8) any is
    as likely. Values depend on `seed` and the parameter's path alone, not on the sharding. One compiled
    program a distinct shape.
    """
    weights = list(declared(model))
    total, done = sum(weight.num_bytes for weight in weights), 0
    progress(done, total)
    for weight in weights:
        param, path_hash = weight.param, np.uint32(xxhash.xxh32_intdigest(weight.path.encode()))
        want = param.get_raw_value()
        dtype, order = jnp.dtype(want.dtype), param.get_metadata().get("order")
        make = _dummy_program(want.shape, dtype, _dummy_kind(param), shardings(param), order)
        array = make(np.uint32(seed & 0xFFFFFFFF), path_hash)
        done += sum(array.nbytes for array in weight.set(array, shardings))
        progress(done, total)
        if len(weight.targets) > 1:
            weight.targets[0].get_raw_value().block_until_ready()  # one wide weight at a time
    for weight in weights:
        weight.targets[0].get_raw_value().block_until_ready()


# ---- from a checkpoint ----


def _check_sources(checkpoint: Checkpoint, path: str, param: nnx.Param, used: set[str]) -> None:
    """`used` are the sources of all parameters."""
    assert param.sources, f"{path} names no checkpoint tensor"
    infos = [find_tensor(checkpoint.tensors, source, checkpoint.path) for source in param.sources]
    for source, scale in ((s, s + suffix) for s in param.sources for suffix in SCALE_SUFFIXES):
        if scale in checkpoint.tensors and scale not in used:
            raise CheckpointError(
                f"{checkpoint.tensors[source].file}: tensor {source} is quantised ({scale} is beside it), "
                "but this model reads it as it is; convert the checkpoint with that layer left out"
            )
    if param.assemble in (None, Stacked()):
        _check_numbers(param, infos)
    if isinstance(param.assemble, Stacked):
        return _check_slices(path, param, infos)
    if param.assemble is not None:
        return  # its result is checked when it is made
    assert len(infos) == 1, f"{path} has {len(infos)} sources and no way to assemble them"
    want, info = param.stored, infos[0]
    if _split_dimensions(info.shape, want) is None:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}, expected "
            f"{list(_unsplit(want, len(info.shape)))}"
        )


def _check_numbers(param: nnx.Param, infos: list[TensorInfo]) -> None:
    """Integers mean nothing without a scale, which a weight of more bits has no use for."""
    want = jnp.dtype(param.get_raw_value().dtype)
    for info in infos:
        dtype = jnp.dtype(info.dtype)
        if jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize == 1 and want.itemsize > 1:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} holds {dtype.name}, but this model reads it as numbers of "
                f"{want.name}; config.json's quantization_config does not cover it: convert the checkpoint "
                "with that layer left out"
            )


def _check_slices(path: str, param: nnx.Param, infos: list[TensorInfo]) -> None:
    want = tuple(param.get_raw_value().shape)
    slices = param.assemble.slices(tuple(infos))
    assert len(slices) == want[0], f"{path} has {len(slices)} slices, its shape is {want}"
    if param.assemble.each is not None:
        return
    for (info,) in slices:
        if info.shape != want[1:]:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} has shape {list(info.shape)}, expected {list(want[1:])}"
            )


def _unsplit(want: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """What to call expected: leading dimensions merged if that is how the ranks can agree."""
    if 0 < rank < len(want):
        lead = len(want) - rank + 1
        return (math.prod(want[:lead]), *want[lead:])
    return want


def _split_dimensions(stored: tuple[int, ...], want: tuple[int, ...]) -> list[range] | None:
    """For each stored dimension the wanted ones it is split into ([H*K, D] -> [H, K, D]), or None.

    Nothing but splitting: a tensor of the right size and another shape is a wrong tensor.
    """
    groups, at = [], 0
    for size in stored:
        begin, product = at, 1
        while at < len(want) and (at == begin or product < size):
            product *= want[at]
            at += 1
        if product != size or at == begin:
            return None
        groups.append(range(begin, at))
    return groups if at == len(want) else None


def _reader(checkpoint: Checkpoint, path: str, param: nnx.Param) -> Callable[[Index | None], np.ndarray]:
    """Index of the parameter -> that part in the parameter's dtype; equal parts are read once.

    What lies behind the stored shape is zeros.
    """
    want, stored = param.get_raw_value(), param.stored
    dtype = jnp.dtype(want.dtype)
    parts: dict[Any, np.ndarray] = {}
    whole: list[np.ndarray] = []

    def read(index: Index | None) -> np.ndarray:
        index = full_index(want.shape, index)
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            if param.assemble is None:
                inside = tuple(
                    slice(*(min(end, n) for end in (p.start, p.stop))) for p, n in zip(index, stored)
                )
                part = _read_split(checkpoint, param.sources[0], stored, inside)
                missing = [(0, p.stop - p.start - n) for p, n in zip(index, part.shape)]
                part = np.pad(part, missing) if any(after for _, after in missing) else part
            elif isinstance(param.assemble, Stacked | Sliced):
                part = _read_slices(checkpoint, path, param, index)
            else:
                if not whole:
                    whole.append(_assembled(checkpoint, path, param))
                part = whole[0][index]
            # An own contiguous copy: on CPU the array may keep this memory as it is.
            parts[key] = np.ascontiguousarray(part.astype(dtype, copy=False))
        return parts[key]

    return read


def _read_split(checkpoint: Checkpoint, name: str, want: tuple[int, ...], index: Index) -> np.ndarray:
    """Part `index` of the tensor seen in shape `want`, reading as little as its layout allows."""
    groups = _split_dimensions(checkpoint.tensors[name].shape, want)
    assert groups is not None, (name, want)
    stored_index, rest, shape = [], [], []
    for group in groups:
        first, *inner = group
        if all(index[i] == slice(0, want[i]) for i in inner):
            row = math.prod(want[i] for i in inner)
            stored_index.append(slice(index[first].start * row, index[first].stop * row))
            rest.append(slice(None))
            shape.append(index[first].stop - index[first].start)
        else:
            stored_index.append(slice(None))
            rest.append(index[first])
            shape.append(want[first])
        rest.extend(index[i] for i in inner)
        shape.extend(want[i] for i in inner)
    return checkpoint.read(name, tuple(stored_index)).reshape(shape)[tuple(rest)]


def _read_slices(checkpoint: Checkpoint, path: str, param: nnx.Param, index: Index) -> np.ndarray:
    """Part `index` of a parameter that is made slice by slice, reading no others; in its dtype."""
    want, assemble = param.get_raw_value(), param.assemble
    out = np.empty([part.stop - part.start for part in index], jnp.dtype(want.dtype))
    for at, number in enumerate(range(index[0].start, index[0].stop)):
        each = assemble.each
        if isinstance(assemble, Sliced):
            sources = param.sources
            arrays = [_read_slice(checkpoint, s, assemble.source_slice(number)) for s in sources]
        else:
            sources = assemble.slices(param.sources)[number]
            if each is None:
                out[at] = checkpoint.read(sources[0], index[1:])
                continue
            arrays = [checkpoint.read(source) for source in sources]
        assert each is not None
        whole = _assemble(checkpoint, path, each, sources, arrays, tuple(want.shape[1:]))
        out[at] = whole[index[1:]]
    return out


def _read_slice(checkpoint: Checkpoint, name: str, number: int) -> np.ndarray:
    """Slice `number` of a tensor's first dimension."""
    rest = checkpoint.tensors[name].shape[1:]
    return checkpoint.read(name, (slice(number, number + 1), *(slice(0, size) for size in rest)))[0]


def _assembled(checkpoint: Checkpoint, path: str, param: nnx.Param) -> np.ndarray:
    want = tuple(param.get_raw_value().shape)
    sources = [checkpoint.read(source) for source in param.sources]
    return _assemble(checkpoint, path, param.assemble, param.sources, sources, want)


def _assemble(
    checkpoint: Checkpoint,
    path: str,
    assemble: Assemble,
    names: tuple[str, ...],
    sources: list[np.ndarray],
    want: tuple[int, ...],
) -> np.ndarray:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in zip(names, sources))
    file = checkpoint.tensors[names[0]].file
    try:
        out = assemble(*sources)
    except ValueError as error:
        raise CheckpointError(f"{file}: {shapes} do not make {path} {list(want)}: {error}") from error
    if out.shape != want:
        raise CheckpointError(f"{file}: {shapes} make {path} {list(out.shape)}, expected {list(want)}")
    return out


def _report_unused(checkpoint: Checkpoint, used: set[str], unserved: tuple[str, ...]) -> None:
    """One warning for what no parameter uses, but for what the model says it leaves out (`unserved`)."""
    tied = checkpoint.config.get("tie_word_embeddings", False)
    unused = [
        name
        for name in checkpoint.tensors
        if name not in used
        and name + CODES not in used  # another form of the same weight
        and not _is_part(name, checkpoint)
        and not name.startswith(unserved)
        and not name.endswith(_COMPUTED)
        and not (tied and name == "lm_head.weight")
    ]
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        logger.warning(
            "%s: %d tensors are not used by this model: %s%s",
            checkpoint.path,
            len(unused),
            ", ".join(unused[:5]),
            more,
        )


def _is_part(name: str, checkpoint: Checkpoint) -> bool:
    """Whether it is the codes, scales or zeros of a weight that is there too."""
    return any(name.endswith(s) and name.removesuffix(s) in checkpoint.tensors for s in SUFFIXES)


# ---- random ----


def _dummy_kind(param: nnx.Param) -> str | int:
    kind = param.get_metadata().get("init")
    if kind is not None:
        return kind
    if param.sources and all(source.endswith("bias") for source in param.sources):
        return "zeros"
    return "ones" if len(param.get_raw_value().shape) == 1 else "random"


@cache
def _dummy_program(
    shape: tuple[int, ...], dtype: Any, kind: str | int, sharding: Sharding, order: tuple[int, ...] | None
) -> Callable[..., jax.Array]:
    def make(seed, path_hash):
        if kind != "random":
            return jnp.full(shape, {"ones": 1, "zeros": 0}[kind] if isinstance(kind, str) else kind, dtype)
        bits = _mix(_mix(seed) ^ path_hash)
        for axis in range(len(shape)):
            number = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            if axis == 0 and order is not None:  # equal slices, as from a checkpoint
                number = jnp.asarray(order, jnp.uint32).reshape(-1, *(1,) * (len(shape) - 1))
            bits = _mix(bits ^ number)
        if dtype == jnp.uint8:
            return (bits >> 24).astype(dtype)
        unit = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1  # in [-1, 1), as 24 bits allow
        return (unit * math.sqrt(3 / shape[-1])).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def _mix(bits: jax.Array) -> jax.Array:
    """A bijection of 32 bits that spreads every bit over all (two rounds of multiply and xor-shift).

    Elementwise, so the whole program is one loop without temporaries. `jax.random.uniform` took 8
    times the output in temporaries on CPU (8192 x 4096 bf16), too much for a large embedding.
    Source: the constants are those of C. Wellons' lowbias32 (public domain).
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
