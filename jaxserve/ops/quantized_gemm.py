"""A product with weights in 8 bits that have one float32 scale an output channel.

Two ways, chosen when a program is traced:

- weight-only: the numbers are converted to the activations' dtype on the way into the product;
- W8A8: each token's activations are brought to float8 by a scale of their own (`ops.float8_rows`), and
  the product is one of float8 numbers, twice a bfloat16 product's rate on GPUs that have it.

Scales come after the product, so neither way makes a copy of the weights. Weights lie [out, in], the
order in which cuBLASLt takes float8 without a transposition.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxserve.ops.float8_rows import Float8Rows, Scaled

W8A8_MIN_ROWS = 16
"""Rows of a step, all dp ranks together, from which float8 weights meet float8 activations.

Llama-3.1-8B shape on an H100, ms a step: at 16 rows 3.44 against 3.50 weight-only, at 64 rows 3.88
against 4.27, at 256 rows 5.09 against 10.12 (bfloat16: 7.07). Below 16 rows cuBLASLt would pad to 16,
and weight-only is the more accurate of the two.
"""


def multiply_float8(
    rows: Float8Rows, numbers_OI: jax.Array, scale_O: jax.Array, out_dtype: DTypeLike
) -> Scaled:
    """W8A8, before its scales. XLA:GPU makes one cuBLASLt call of it, `__cublas$lt$matmul$f8`, and no
    transposition (read in the program compiled for an H100); it joins scales with what is elementwise
    behind them."""
    # bfloat16 holds any sum of float8 products and halves what is written, and summed over devices.
    sums = jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32
    sums_TO = lax.dot_general(rows.numbers_TI, numbers_OI, _LAST_AXES, preferred_element_type=sums)
    return Scaled(sums_TO, rows.scale_T1, scale_O)


def multiply_wide(
    x_TI: jax.Array, numbers_OI: jax.Array, scale_O: jax.Array, out_dtype: DTypeLike
) -> jax.Array:
    """Weight-only. XLA:GPU's Triton GEMM takes the conversion of the numbers into itself."""
    y_TO = lax.dot_general(
        x_TI,
        numbers_OI.astype(x_TI.dtype),
        _LAST_AXES,
        precision=lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else None,
        # float16 has no room for sums that are not scaled yet.
        preferred_element_type=jnp.float32 if x_TI.dtype == jnp.float16 else x_TI.dtype,
    )
    return (y_TO.astype(jnp.float32) * scale_O).astype(out_dtype)


def takes_float8(num_rows: float, activations: DTypeLike, numbers: DTypeLike) -> bool:
    """Whether a product of so many rows is one of float8 numbers on both sides.

    float32 activations never are: what is computed in float32 is meant to be exact.
    """
    short = jnp.dtype(activations).itemsize == 2
    return short and numbers == jnp.float8_e4m3fn and num_rows >= W8A8_MIN_ROWS


_LAST_AXES = (((1,), (1,)), ((), ()))
