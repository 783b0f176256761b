"""Linear weights in integers of four bits, with a scale and a zero for each group of inputs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.placed import Placed
from jaxserve.ops import four_bits, int4_product


class GroupScaled(Placed):
    """A linear layer's weight [*out, *in] as `int4_product.Weight` has it; `shape` is the weight's own."""

    ARRAYS = ("numbers", "scales", "zeros")

    def __init__(self, numbers: nnx.Param, scales: nnx.Param, zeros: nnx.Param, *, shape: tuple[int, ...]):
        super().__init__()
        self.numbers, self.scales, self.zeros, self.shape = numbers, scales, zeros, shape

    @property
    def size(self) -> int:
        """Of all outputs."""
        return self.numbers.get_value().shape[0] * four_bits.ROWS

    @property
    def packed(self) -> int4_product.Weight:
        return int4_product.Weight(self.numbers[...], self.scales[...], self.zeros[...])

    def product(self, x_TI: jax.Array, out_dtype: DTypeLike) -> jax.Array:
        """x [T, in] times the weight: [T, out], both of merged dimensions."""
        if self.mesh is None:
            return int4_product.project(x_TI, self.packed, out_dtype)
        product = int4_product.over_mesh(self.mesh, self.axes(0), self.axes(1), jnp.dtype(out_dtype).name)
        return product(x_TI, self.packed)
