"""What goes into a product of float8 numbers, and what comes out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

FLOAT8_MAX = 448.0  # of float8_e4m3fn; XLA makes NaN of anything that rounds beyond


class Float8Rows(NamedTuple):
    """numbers_TI * scale_T1 is what they stand for; float8_e4m3fn and float32."""

    numbers_TI: jax.Array
    scale_T1: jax.Array


class Scaled(NamedTuple):
    """A product of float8 numbers and its scales, of rows and of columns; float32.

    A kernel that reads the sums anyway applies the scales on the way.
    """

    sums_TO: jax.Array
    row_T1: jax.Array
    column_O: jax.Array

    def value(self, dtype: DTypeLike) -> jax.Array:
        """[T, out] in `dtype`."""
        return (self.sums_TO.astype(jnp.float32) * self.row_T1 * self.column_O).astype(dtype)
