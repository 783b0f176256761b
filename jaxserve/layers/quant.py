"""Weights in float8 with a float32 scale for each block, as DeepSeek-V3 and others ship them.

They stay in float8 on the device, half the bytes of bfloat16 (`ops.block_product` and `ops.grouped_gemm`
multiply with them); or they are dequantised once, when they are loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.config import ConfigError
from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.group_scaled import GroupScaled
from jaxserve.layers.placed import Axes, Placed
from jaxserve.layers.weight import Assemble, Stacked, weight
from jaxserve.ops import block_product
from jaxserve.ops.block_product import BLOCK
from jaxserve.ops.dense_product import multiply

SCALE_SUFFIX = "_scale_inv"  # of the checkpoint's name: the factor from stored numbers to weights


@dataclass(frozen=True)
class BlockFP8:
    """How a checkpoint is quantised.

    Args:
        rows, columns: of a block that shares a scale.
        keep: in float8 on the device; else dequantised at load.
        skip: names of layers that were left as they are, or whole dotted parts of them.
    """

    rows: int = 128
    columns: int = 128
    keep: bool = True
    skip: tuple[str, ...] = ("lm_head",)

    @classmethod
    def read(cls, config: dict[str, Any]) -> "BlockFP8 | None":
        """From `quantization_config`; None where there is none. Raises ConfigError for another kind."""
        given = config.get("quantization_config")
        if not given:
            return None
        block, kind = given.get("weight_block_size"), given.get("fmt", "e4m3")
        known = kind in ("e4m3", "float8_e4m3fn")  # the second is MiniMax-M2's spelling
        if given.get("quant_method") != "fp8" or not block or len(block) != 2 or not known:
            raise ConfigError(
                f"config.json: quantization_config with quant_method={given.get('quant_method')!r}, "
                f"weight_block_size={block!r}, fmt={kind!r} is not supported; use fp8 in e4m3 with blocks "
                "such as [128, 128]"
            )
        skip = (*(given.get("modules_to_not_convert") or ()), "lm_head")
        return cls(*block, keep=not given.get("dequantize", False), skip=skip)

    def covers(self, name: str) -> bool:
        return not any(f".{part}." in f".{name}." for part in self.skip)

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a matrix; the last blocks may be cut."""
        return -(-rows // self.rows), -(-columns // self.columns)


@dataclass(frozen=True)
class Dequantize:
    """Assembles a weight of `shape` from (float8 numbers, scales); `then` takes its part of it."""

    quant: BlockFP8
    shape: tuple[int, ...]
    then: Assemble | None = None

    def __call__(self, stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
        rows, columns = stored.shape
        if scale.shape != self.quant.blocks(rows, columns):
            raise ValueError(f"expected scales of shape {list(self.quant.blocks(rows, columns))}")
        scale = scale.astype(np.float32).repeat(self.quant.rows, 0)[:rows]
        full = stored.astype(np.float32) * scale.repeat(self.quant.columns, 1)[:, :columns]
        return self.then(full) if self.then else full.reshape(self.shape)


class BlockScaled(Placed):
    """A linear layer's weight: `numbers` [*out, *in] in float8, `scale` [out blocks, in blocks] in float32.

    The scales are whole on every device: they are a 16,384th of the weight's count.

    Where the numbers lie is known once they are loaded. Before that XLA multiplies the weight by its scales
    first, as it does where a mesh cuts blocks.
    """

    def __init__(self, numbers: nnx.Param, scale: nnx.Param, quant: BlockFP8, *, is_alone: bool = False):
        super().__init__(is_alone=is_alone)
        self.numbers, self.scale, self.quant = numbers, scale, quant

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.get_value().shape

    @property
    def has_kernels(self) -> bool:
        return (self.quant.rows, self.quant.columns) == (BLOCK, BLOCK)

    @staticmethod
    def are_joinable(weights: "Sequence[BlockScaled]") -> bool:
        """Whether blocks of one after the other are whole."""
        return all(math.prod(w.shape[:-1]) % w.quant.rows == 0 for w in weights[:-1])

    def product(self, x_TI: jax.Array, out_dtype: DTypeLike) -> jax.Array:
        """x [T, in] times the weight: [T, out], both of merged dimensions."""
        arrays = x_TI, self.numbers[...].reshape(-1, x_TI.shape[1]), self.scale[...]
        if self.is_alone and self.has_kernels:
            return block_product.project(*arrays, out_dtype)
        split = self.split(x_TI.shape[1]) if block_product.has_kernels(x_TI) else None
        if split is not None:
            return block_product.over_mesh(self.mesh, *split, jnp.dtype(out_dtype).name)(*arrays)
        return multiply(x_TI, self.matrix(x_TI.shape[1], x_TI.dtype), out_dtype)

    def split(self, in_size: int) -> tuple[Axes, Axes] | None:
        """The axes that split outputs and inputs; None where a device's part has no whole blocks of 128."""
        if self.mesh is None or not self.has_kernels:
            return None
        num_out = next(n for n in range(1, len(self.shape)) if math.prod(self.shape[n:]) == in_size)
        out_axes, in_axes = self.axes(0), self.axes(num_out)
        for size, axes in ((math.prod(self.shape[:num_out]), out_axes), (in_size, in_axes)):
            ways = math.prod(self.mesh.shape[axis] for axis in axes)
            if ways > 1 and size % (ways * BLOCK):
                return None
        return out_axes, in_axes

    def matrix(self, in_size: int, dtype: DTypeLike) -> jax.Array:
        """The weight as [out, in]; XLA may fuse this into the product."""
        numbers_OI, block = self.numbers[...].reshape(-1, in_size), (self.quant.rows, self.quant.columns)
        return block_product.dequantise(numbers_OI, self.scale[...], dtype, block)


Weight = nnx.Param | BlockScaled | ChannelScaled | GroupScaled


def linear_weight(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    name: str,
    *,
    dtype: Any,
    quant: BlockFP8 | None = None,
    num_out: int | None = None,
    assemble: Assemble | None = None,
) -> Any:
    """The weight [*out, *in] of a linear layer: an `nnx.Param`, or `BlockScaled`.

    `num_out` counts the output dimensions, by default all but the last. A weight with an `assemble`
    of its own is dequantised at load.
    """
    num_out = len(shape) - 1 if num_out is None else num_out
    if quant is None or not quant.covers(name):
        linear = None if assemble is not None else num_out
        return weight(shape, axes, name, dtype=dtype, assemble=assemble, num_out=linear)
    sources = name, name + SCALE_SUFFIX
    if assemble is not None or not quant.keep:
        return weight(shape, axes, *sources, dtype=dtype, assemble=Dequantize(quant, shape, assemble))
    blocks = quant.blocks(int(np.prod(shape[:num_out])), int(np.prod(shape[num_out:])))
    stored = weight(shape, axes, sources[0], dtype=jnp.float8_e4m3fn)
    scale = weight(blocks, (None, None), sources[1], dtype=jnp.float32, init="ones", is_scale=True)
    return BlockScaled(stored, scale, quant)


def stacked_weight(
    shape: tuple[int, int, int],
    axes: tuple[str, str, str],
    names: list[str],
    *,
    dtype: Any,
    quant: BlockFP8 | None = None,
) -> tuple[nnx.Param, nnx.Param | None]:
    """(weights [E, out, in], scales [E, out blocks, in blocks] or None) of stacked experts.

    Raises: ConfigError when experts kept in float8 do not divide into whole blocks.
    """
    if quant is None or not quant.covers(names[0]):
        return weight(shape, axes, *names, dtype=dtype, assemble=Stacked(), num_out=2), None
    scales = [name + SCALE_SUFFIX for name in names]
    if not quant.keep:
        sources = [source for pair in zip(names, scales) for source in pair]
        return weight(
            shape, axes, *sources, dtype=dtype, assemble=Stacked(Dequantize(quant, shape[1:]), 2)
        ), None
    if shape[1] % quant.rows or shape[2] % quant.columns:
        raise ConfigError(
            f"{names[0]}: {shape[1]} x {shape[2]} does not divide into blocks of {quant.rows} x "
            f"{quant.columns}; use --dequantize-weights"
        )
    blocks = (shape[0], *quant.blocks(*shape[1:]))
    stored = weight(shape, axes, *names, dtype=jnp.float8_e4m3fn, assemble=Stacked())
    scale = weight(blocks, axes, *scales, dtype=jnp.float32, assemble=Stacked(), init="ones", is_scale=True)
    return stored, scale
