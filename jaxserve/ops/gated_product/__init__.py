"""act(x @ gate.T) * (x @ up.T), the first half of a gated feed-forward layer, where one kernel makes it.

XLA writes the products with gate and up to memory and reads them again to make one of them. The kernel
writes only what comes out.
"""

from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from jaxserve.ops import backend
from jaxserve.ops.gated_product import hopper
from jaxserve.ops.hopper import NUM_SMS, is_supported

GateActivation = Callable[[jax.Array], jax.Array]
"""Of the gate, elementwise, in float32; written in jax.numpy so that a kernel can fuse it."""

Scales = tuple[jax.Array, jax.Array]
"""Of float8 numbers: of each row of x [T, 1], and of each row of the weight [W]; float32."""


def fits(num_rows: int, weight_WK: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether `multiply` takes so many rows of the weight's dtype, and is the faster for them."""
    return backend.chosen() == "fast" and is_supported(NUM_SMS) and hopper.fits(num_rows, weight_WK)


def multiply(
    x_TK: jax.Array,
    weight_WK: jax.Array,
    scales: Scales | None,
    activation: GateActivation,
    dtype: DTypeLike,
) -> jax.Array:
    """[T, W / 2] in `dtype`, for arrays that fit.

    Args:
        x_TK: in the weight's dtype. With float8 `scales` are given.
        weight_WK: gate's rows, then as many of up's.
    """
    columns = hopper.choose_columns(x_TK.shape[0], weight_WK.shape[0] // 2)
    return hopper.multiply(x_TK, weight_WK, scales, activation, dtype, columns=columns)
