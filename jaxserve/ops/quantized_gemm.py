"""A product with weights in 8 bits that have one float32 scale an output channel.

Two ways, chosen when a program is traced:

- weight-only: the numbers are converted to the activations' dtype on the way into the product;
- W8A8: each token's activations are brought to float8 by a scale of their own, and the product is
  one of float8 numbers, twice a bfloat16 product's rate on GPUs that have it.

Scales come after the product, so neither way makes a copy of the weights. Weights lie [out, in], the
order in which cuBLASLt takes float8 without a transposition.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

W8A8_MIN_ROWS = 16
"""Rows of a step, all dp ranks together, from which float8 weights meet float8 activations.

Llama-3.1-8B shape on an H100, ms a step: at 16 rows 3.44 against 3.50 weight-only, at 64 rows 3.88
against 4.27, at 256 rows 5.09 against 10.12 (bfloat16: 7.07). Below 16 rows cuBLASLt would pad to 16,
and weight-only is the more accurate of the two.
"""

FLOAT8_MAX = 448.0  # of float8_e4m3fn; XLA makes NaN of anything that rounds beyond


def multiply(x_TI: jax.Array, numbers_OI: jax.Array, scale_O: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """x times (numbers * scale) transposed: [T, O].

    float32 activations are never quantised: what is computed in float32 is meant to be exact.
    """
    way = multiply_float8 if takes_float8(x_TI.shape[0], x_TI.dtype, numbers_OI.dtype) else multiply_wide
    return way(x_TI, numbers_OI, scale_O, out_dtype)


def multiply_float8(
    x_TI: jax.Array, numbers_OI: jax.Array, scale_O: jax.Array, out_dtype: DTypeLike
) -> jax.Array:
    """W8A8. XLA:GPU makes one cuBLASLt call of it, `__cublas$lt$matmul$f8`, with two kernels before it and
    one behind for the scales, and no transposition (read in the program compiled for an H100)."""
    x_TI, scale_T1 = quantise_rows(x_TI)
    # bfloat16 holds any sum of float8 products and halves what is written, and summed over devices.
    sums = jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32
    y_TO = lax.dot_general(x_TI, numbers_OI, _LAST_AXES, preferred_element_type=sums)
    return (y_TO.astype(jnp.float32) * scale_T1 * scale_O).astype(out_dtype)


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
    """Whether a product of so many rows is one of float8 numbers on both sides."""
    short = jnp.dtype(activations).itemsize == 2
    return short and numbers == jnp.float8_e4m3fn and num_rows >= W8A8_MIN_ROWS


def quantise_rows(x_TI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float8 numbers, float32 scale [T, 1]): each row's largest number becomes 448."""
    x_TI = x_TI.astype(jnp.float32)
    scale_T1 = jnp.maximum(jnp.max(jnp.abs(x_TI), axis=1, keepdims=True), 1e-12) / FLOAT8_MAX
    numbers_TI = jnp.clip(x_TI / scale_T1, -FLOAT8_MAX, FLOAT8_MAX)
    return numbers_TI.astype(jnp.float8_e4m3fn), scale_T1


_LAST_AXES = (((1,), (1,)), ((), ()))
