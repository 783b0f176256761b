"""What goes into a product of float8 numbers, and what comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

FLOAT8_MAX = 448.0  # of float8_e4m3fn; XLA makes NaN of anything that rounds beyond


class Float8Rows(NamedTuple):
    """numbers_TI * scale_T1 is what they stand for; float8_e4m3fn and float32."""

    numbers_TI: jax.Array
    scale_T1: jax.Array


@dataclass(frozen=True)
class Unscaled:
    """A product whose scales are still to be applied, a token's and a channel's; `dtype` is to be its own."""

    sums_TO: jax.Array
    scale_T1: jax.Array
    scale_O: jax.Array
    dtype: DTypeLike

    def value(self) -> jax.Array:
        return (self.sums_TO.astype(jnp.float32) * self.scale_T1 * self.scale_O).astype(self.dtype)
