"""Linear weights in 8 bits, float8 or int8, with a float32 scale for each output channel.

`quantise_model` declares the linear weights of any abstract model anew: attention's and feed-forward
projections and the experts, which are what a step reads. Embedding, output head, norms, biases,
routers, and the parts of latent attention that are made of `kv_b_proj` stay as they are. The numbers
are made when a weight is loaded, from a checkpoint in any float dtype; or read, from a checkpoint that
holds them.
"""

import fnmatch
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.config import ConfigError
from jaxserve.layers.operand import Operand, Rows, wide
from jaxserve.layers.quant_config import quantization_of
from jaxserve.layers.weight import Stacked, weight
from jaxserve.ops import float8_rows
from jaxserve.ops.float8_rows import FLOAT8_MAX, Float8Rows, Scaled, reference
from jaxserve.ops.quantized_gemm import multiply_float8, multiply_wide, takes_float8

Scheme = Literal["fp8", "int8"]
DTYPES: dict[Scheme, Any] = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
LARGEST: dict[Scheme, float] = {"fp8": FLOAT8_MAX, "int8": 127.0}
PLAIN_FORMATS = ("dense", "float-quantized", "int-quantized", "naive-quantized")  # a number a byte
PACKED_FORMAT = "pack-quantized"  # several in an integer, see `jaxserve.layers.group_quant`
STORED_SUFFIX = "_scale"  # of the scales' names in checkpoints that hold the numbers


@dataclass(frozen=True)
class ChannelQuant:
    """How linear weights are kept.

    Args:
        scheme: fp8 is float8_e4m3fn.
        is_stored: the checkpoint has the numbers and scales; else they are made at load.
        skip: modules that a stored checkpoint left as they are: names, or patterns after `re:`.
    """

    scheme: Scheme
    is_stored: bool = False
    skip: tuple[str, ...] = ()

    def covers(self, source: str) -> bool:
        """Whether the weight called `source` is quantised."""
        return not is_skipped(source, self.skip)


def is_skipped(source: str, skip: tuple[str, ...]) -> bool:
    """Whether one of `skip`, names of modules or patterns, means the weight called `source`."""
    module = source.removesuffix(".weight")
    return any(_matches(module, pattern) for pattern in skip)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.endswith(f".{pattern}") or fnmatch.fnmatchcase(module, pattern)


class ChannelScaled(nnx.Module):
    """A linear layer's weight: `numbers` [*out, *in] in 8 bits, `scale` [*out] in float32.

    `is_alone`: there is one device, so that rows lie whole on it and kernels may quantise them. Over a
    mesh XLA does, with the largest number of a row that is spread from all its devices.
    """

    def __init__(self, numbers: nnx.Param, scale: nnx.Param, *, is_alone: bool = False):
        self.numbers, self.scale, self.is_alone = numbers, scale, is_alone

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.get_value().shape

    def product(self, x_TI: Rows, out_dtype: DTypeLike) -> jax.Array:
        """x [T, in] times the weight: [T, out], both of merged dimensions."""
        if self.takes_float8(x_TI):
            return self.scaled_product(x_TI, out_dtype).value(out_dtype)
        return multiply_wide(wide(x_TI), *self._merged(x_TI), out_dtype)

    def scaled_product(self, x_TI: Rows, out_dtype: DTypeLike) -> Scaled:
        """`product`, where it is one of float8 numbers on both sides, before its scales."""
        return multiply_float8(self.float8_rows(x_TI), *self._merged(x_TI), out_dtype)

    def _merged(self, x_TI: Rows) -> tuple[jax.Array, jax.Array]:
        return self.numbers[...].reshape(-1, x_TI.shape[1]), self.scale[...].reshape(-1)

    def takes_float8(self, x_TI: Rows) -> bool:
        """Whether the product is one of float8 numbers on both sides."""
        return takes_float8(x_TI.shape[0], x_TI.dtype, self.numbers.get_value().dtype)

    def leaves_scales(self, x_TI: Rows) -> bool:
        """Whether scales may be left to who reads the product: its sums have its dtype, and are whole."""
        return self.is_alone and self.takes_float8(x_TI) and x_TI.dtype == jnp.bfloat16

    def float8_rows(self, x_TI: Rows) -> Float8Rows:
        if not self.is_alone:
            return reference.quantise(wide(x_TI))
        return x_TI.float8 if isinstance(x_TI, Operand) else float8_rows.quantise(x_TI)


# ---- declaring ----


@dataclass(frozen=True)
class Made:
    """Metadata of numbers that are made at load of a wide weight of `dtype`, with a scale over the first
    `num_out` dimensions. The scale has the same sources, assembled alike."""

    scheme: Scheme
    dtype: Any
    num_out: int


def quantise_model(model: nnx.Module, quant: ChannelQuant) -> None:
    """Declare every linear weight of an abstract model in 8 bits, with scales that its devices share.

    A scale is sharded as its channel is. Stacked experts keep a parameter of their own for scales,
    [E, out, 1], which is what `jaxserve.ops.grouped_gemm` takes.
    """
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.List):
            for number, param in enumerate(node):
                if _is_linear(param, quant):
                    node[number] = ChannelScaled(*_declare(param, quant))
        elif isinstance(node, nnx.Module):
            for name, param in list(vars(node).items()):
                if not _is_linear(param, quant):
                    continue
                numbers, scale = _declare(param, quant)
                if param.logical[0] == "expert":
                    setattr(node, name, numbers)
                    setattr(node, f"{name}_scale", nnx.data(scale))
                else:
                    setattr(node, name, ChannelScaled(numbers, scale))


def _is_linear(param: Any, quant: ChannelQuant) -> bool:
    if not isinstance(param, nnx.Param) or param.get_metadata().get("num_out") is None:
        return False
    return quant.covers(param.sources[0])


def _declare(param: nnx.Param, quant: ChannelQuant) -> tuple[nnx.Param, nnx.Param]:
    """(numbers, scale) of a declared linear weight."""
    shape, axes = param.get_raw_value().shape, param.logical
    num_out, sources = param.num_out, param.sources
    scale_shape, scale_axes = shape[:num_out], axes[:num_out]
    if axes[0] == "expert":
        scale_shape, scale_axes = (*scale_shape, 1), (*scale_axes, None)
    declare_numbers = {"dtype": DTYPES[quant.scheme], "assemble": param.assemble}
    declare_scale: dict[str, Any] = {"dtype": jnp.float32, "init": "ones", "is_scale": True}
    if not quant.is_stored:
        made = Made(quant.scheme, param.get_raw_value().dtype, num_out)
        numbers = weight(shape, axes, *sources, **declare_numbers, made=made)
        # The same sources: whatever declares stacked experts anew does it to both alike.
        return numbers, weight(scale_shape, scale_axes, *sources, **declare_scale, assemble=param.assemble)
    if param.assemble is not None and param.assemble != Stacked():
        raise ConfigError(f"{sources[0]}: weights of this family are not read in 8 bits a channel")
    each = _Spread(scale_shape[1:] if axes[0] == "expert" else scale_shape)
    assemble = Stacked(each) if axes[0] == "expert" else each
    numbers = weight(shape, axes, *sources, **declare_numbers)
    names = [source + STORED_SUFFIX for source in sources]
    return numbers, weight(scale_shape, scale_axes, *names, **declare_scale, assemble=assemble)


@dataclass(frozen=True)
class _Spread:
    """Assembles the scales of a weight: stored one a channel, or one for all."""

    shape: tuple[int, ...]

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        stored = stored.astype(np.float32)
        return np.full(self.shape, stored.item()) if stored.size == 1 else stored.reshape(self.shape)


# ---- making ----


def quantise(wide: jax.Array, scheme: Scheme, num_out: int) -> tuple[jax.Array, jax.Array]:
    """(numbers, scale [*out]): the largest number of each channel becomes the largest that 8 bits hold.

    Rounding to the nearest: int8 is off by half a scale at most, float8 by a sixteenth of a number
    (3 bits of mantissa), or half of its smallest step, 2**-9, times the scale.
    """
    inner = tuple(range(num_out, wide.ndim))
    wide, largest = wide.astype(jnp.float32), LARGEST[scheme]
    scale = jnp.max(jnp.abs(wide), axis=inner, keepdims=True) / largest
    ratio = jnp.clip(wide / jnp.where(scale > 0, scale, 1), -largest, largest)
    numbers = (jnp.round(ratio) if scheme == "int8" else ratio).astype(DTYPES[scheme])
    return numbers, scale.reshape(wide.shape[:num_out])


# ---- reading config.json ----


def read_stored(config: dict[str, Any]) -> ChannelQuant | None:
    """From `quantization_config` of a checkpoint with a scale a channel or a tensor, else None.

    What is packed is left to `jaxserve.layers.group_quant`. Raises ConfigError for a kind of
    compressed-tensors that is not read.
    """
    given = quantization_of(config)
    method = given.get("quant_method")
    if method == "fp8" and not given.get("weight_block_size"):
        skip = given.get("ignored_layers") or given.get("modules_to_not_convert") or ()
        return ChannelQuant("fp8", is_stored=True, skip=tuple(skip))
    if method != "compressed-tensors":
        return None
    holders = (given, *config_groups(given))
    if any(holder.get("format") == PACKED_FORMAT for holder in holders):
        return None
    refuse_transforms(given)
    for holder in holders:
        if (kind := holder.get("format") or PLAIN_FORMATS[0]) not in PLAIN_FORMATS:
            raise ConfigError(
                f"config.json: compressed-tensors in format={kind!r} are not read; use one of "
                f"{', '.join(PLAIN_FORMATS)}"
            )
    schemes: set[Scheme | None] = {_scheme(group.get("weights") or {}) for group in holders[1:]}
    scheme = schemes.pop() if len(schemes) == 1 else None
    if scheme is None:
        raise ConfigError(
            "config.json: quantization_config of compressed-tensors is read for weights of 8 bits, float or "
            "int, symmetric, strategy channel or tensor, alike in all config_groups"
        )
    return ChannelQuant(scheme, is_stored=True, skip=tuple(given.get("ignore") or ()))


def config_groups(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a `quantization_config` of compressed-tensors."""
    return [group for group in (given.get("config_groups") or {}).values() if isinstance(group, dict)]


def refuse_transforms(given: dict[str, Any]) -> None:
    """Raises ConfigError where a `quantization_config` of compressed-tensors makes weights mean others."""
    for name in ("transform_config", "sparsity_config"):
        extra = given.get(name) or {}
        if extra and extra.get("format") != "dense":
            raise ConfigError(
                f"config.json: {name} of quantization_config is not read; weights would mean others"
            )


def _scheme(weights: dict[str, Any]) -> Scheme | None:
    fits = weights.get("num_bits") == 8 and weights.get("strategy") in ("channel", "tensor")
    if not fits or not weights.get("symmetric", True) or weights.get("dynamic"):
        return None
    match weights.get("type"):
        case "float":
            return "fp8"
        case "int":
            return "int8"
    return None
