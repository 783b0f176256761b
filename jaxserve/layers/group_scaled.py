"""Linear weights in integers of four bits, with a scale and a zero for each group of inputs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.placed import Placed
from jaxserve.ops import four_bits, int4_product


class GroupScaled(Placed):
    """A linear layer's weight [*out, *in] as `int4_product.Weight` has it; `shape` is the weight's own.

    `is_joined`: it is gate and up, whose outputs take turns (`ops.four_bits.join`).
    """

    ARRAYS = ("numbers", "scales", "zeros")

    def __init__(
        self,
        numbers: nnx.Param,
        scales: nnx.Param,
        zeros: nnx.Param,
        *,
        shape: tuple[int, ...],
        is_joined: bool = False,
    ):
        super().__init__()
        self.numbers, self.scales, self.zeros = numbers, scales, zeros
        self.shape, self.is_joined = shape, is_joined

    @property
    def size(self) -> int:
        """Of all outputs."""
        return self.numbers.get_value().shape[0] * four_bits.ROWS

    @property
    def packed(self) -> int4_product.Weight:
        return int4_product.Weight(self.numbers[...], self.scales[...], self.zeros[...])

    def product(self, x_TI: jax.Array, out_dtype: DTypeLike) -> jax.Array:
        """x [T, in] times the weight: [T, out], both of merged dimensions."""
        assert not self.is_joined
        return self._multiply(x_TI, out_dtype)

    def gated(self, x_TD: jax.Array, activation: int4_product.Gate) -> jax.Array:
        """activation(gate(x), up(x)): [T, F], of such that are joined."""
        assert self.is_joined
        return self._multiply(x_TD, x_TD.dtype, activation)

    def _multiply(
        self, x_TI: jax.Array, out_dtype: DTypeLike, gate: int4_product.Gate | None = None
    ) -> jax.Array:
        out_dtype = jnp.dtype(out_dtype).name
        if self.mesh is None:
            return int4_product.project(x_TI, self.packed, out_dtype, gate)
        product = int4_product.over_mesh(self.mesh, self.axes(0), self.axes(1), out_dtype, gate)
        return product(x_TI, self.packed)
