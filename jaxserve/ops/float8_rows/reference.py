"""Rows in float8 in jax.numpy: the truth for the kernels, and the path on a CPU and on a mesh."""

import jax.numpy as jnp

from jaxserve.ops.float8_rows.rows import FLOAT8_MAX, Float8Rows
from jaxserve.ops.norm import rms_norm


def quantise(x_TI):
    """See `float8_rows.quantise`."""
    x_TI = x_TI.astype(jnp.float32)
    scale_T1 = jnp.maximum(jnp.max(jnp.abs(x_TI), axis=1, keepdims=True), 1e-12) / FLOAT8_MAX
    numbers_TI = jnp.clip(x_TI / scale_T1, -FLOAT8_MAX, FLOAT8_MAX)
    return Float8Rows(numbers_TI.astype(jnp.float8_e4m3fn), scale_T1)


def normalise(x_TD, gain_D, *, eps: float, offset: float = 0.0):
    """See `float8_rows.normalise`."""
    return quantise(rms_norm(x_TD, gain_D, eps=eps, offset=offset))


def add_and_normalise(x_TD, product, gain_D, *, eps: float, offset: float = 0.0):
    """See `float8_rows.add_and_normalise`."""
    sum_TD = x_TD + product.value(x_TD.dtype)
    return sum_TD, normalise(sum_TD, gain_D, eps=eps, offset=offset)
