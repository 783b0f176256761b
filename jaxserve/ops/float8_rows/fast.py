"""Rows in float8 for CUDA: a program holds a row in registers and reads it once.

XLA makes one kernel for the row's largest number and one for the quotients, and computes in both what
the row is made of.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.float8_rows.rows import FLOAT8_MAX, Float8Rows

# Traced once for all layers, as `jax.jit` does: a kernel costs milliseconds to trace.


@functools.partial(jax.jit, static_argnames="interpret")
def quantise(x_TI, *, interpret: bool = False):
    """See `float8_rows.quantise`."""
    return Float8Rows(*_call(_quantise_kernel, (x_TI,), interpret=interpret, name="quantise_rows"))


@functools.partial(jax.jit, static_argnames=("eps", "offset", "interpret"))
def normalise(x_TD, gain_D, *, eps: float, offset: float = 0.0, interpret: bool = False):
    """See `float8_rows.normalise`."""
    kernel = functools.partial(_normalise_kernel, eps=eps, offset=offset)
    return Float8Rows(*_call(kernel, (x_TD, gain_D), interpret=interpret, name="normalise_rows"))


@functools.partial(jax.jit, static_argnames=("eps", "offset", "interpret"))
def add_and_normalise(x_TD, product, gain_D, *, eps: float, offset: float = 0.0, interpret: bool = False):
    """See `float8_rows.add_and_normalise`."""
    kernel = functools.partial(_add_and_normalise_kernel, eps=eps, offset=offset)
    arrays = x_TD, *product, gain_D
    sum_TD, *rows = _call(kernel, arrays, x_TD, interpret=interpret, name="add_and_normalise_rows")
    return sum_TD, Float8Rows(*rows)


def _call(kernel, arrays, *like, interpret, name):
    """A program for each row: the results are arrays as `like`, then numbers and scales."""
    T, I = arrays[0].shape
    return pl.pallas_call(
        kernel,
        grid=(T,),
        out_shape=(
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in like),
            jax.ShapeDtypeStruct((T, I), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((T, 1), jnp.float32),
        ),
        # 16 numbers a thread up to rows of 16,384, two loads of 16 bytes.
        compiler_params=plt.CompilerParams(
            num_warps=min(32, max(1, pl.next_power_of_2(I) // 512)), num_stages=1
        ),
        interpret=interpret,
        name=name,
    )(*arrays)


def _quantise_kernel(x_ref, numbers_ref, scale_ref):
    t = pl.program_id(0)
    _store(_load(x_ref, t), t, numbers_ref, scale_ref)


def _normalise_kernel(x_ref, gain_ref, numbers_ref, scale_ref, *, eps, offset):
    t = pl.program_id(0)
    _store_normalised(_load(x_ref, t), t, gain_ref, x_ref, numbers_ref, scale_ref, eps, offset)


def _add_and_normalise_kernel(
    x_ref, sums_ref, row_ref, column_ref, gain_ref, sum_ref, numbers_ref, scale_ref, *, eps, offset
):
    t, dtype = pl.program_id(0), x_ref.dtype
    product = (_load(sums_ref, t) * row_ref[t, 0] * _load(column_ref)).astype(dtype)
    total = (_load(x_ref, t) + product.astype(jnp.float32)).astype(dtype)
    lane = jnp.arange(total.shape[0])
    plt.store(sum_ref.at[t, lane], total, mask=lane < sum_ref.shape[1])
    _store_normalised(total.astype(jnp.float32), t, gain_ref, x_ref, numbers_ref, scale_ref, eps, offset)


def _store_normalised(x, t, gain_ref, like_ref, numbers_ref, scale_ref, eps, offset):
    """The norm of a row is rounded as `like_ref` is before it is quantised."""
    mean = jnp.sum(x * x, axis=0) / like_ref.shape[1]
    normed = x * jax.lax.rsqrt(mean + eps) * (_load(gain_ref) + jnp.float32(offset))
    _store(normed.astype(like_ref.dtype).astype(jnp.float32), t, numbers_ref, scale_ref)


def _load(ref, *row):
    """A row in float32, with zeros up to a power of two."""
    I = ref.shape[-1]
    lane = jnp.arange(pl.next_power_of_2(I))
    loaded = plt.load(ref.at[*row, lane], mask=lane < I, other=jnp.asarray(0, ref.dtype))
    return loaded.astype(jnp.float32)


def _store(x, t, numbers_ref, scale_ref):
    lane = jnp.arange(x.shape[0])
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=0), jnp.float32(1e-12)) / FLOAT8_MAX
    numbers = jnp.clip(x / scale, -FLOAT8_MAX, FLOAT8_MAX).astype(numbers_ref.dtype)
    plt.store(numbers_ref.at[t, lane], numbers, mask=lane < numbers_ref.shape[1])
    scale_ref[t, 0] = scale
