"""What goes into a product of float8 numbers."""

from typing import NamedTuple

import jax

FLOAT8_MAX = 448.0  # of float8_e4m3fn; XLA makes NaN of anything that rounds beyond


class Float8Rows(NamedTuple):
    """numbers_TI * scale_T1 is what they stand for; float8_e4m3fn and float32."""

    numbers_TI: jax.Array
    scale_T1: jax.Array
