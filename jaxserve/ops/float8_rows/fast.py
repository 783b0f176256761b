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
    return _call(_quantise_kernel, x_TI, interpret=interpret, name="quantise_rows")


@functools.partial(jax.jit, static_argnames=("eps", "offset", "interpret"))
def normalise(x_TD, gain_D, *, eps: float, offset: float = 0.0, interpret: bool = False):
    """See `float8_rows.normalise`."""
    kernel = functools.partial(_normalise_kernel, eps=eps, offset=offset)
    return _call(kernel, x_TD, gain_D, interpret=interpret, name="normalise_rows")


def _call(kernel, x_TI, *others, interpret, name):
    T, I = x_TI.shape
    numbers_TI, scale_T1 = pl.pallas_call(
        kernel,
        grid=(T,),
        out_shape=(
            jax.ShapeDtypeStruct((T, I), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((T, 1), jnp.float32),
        ),
        # 16 numbers a thread up to rows of 16,384, two loads of 16 bytes.
        compiler_params=plt.CompilerParams(
            num_warps=min(32, max(1, pl.next_power_of_2(I) // 512)), num_stages=1
        ),
        interpret=interpret,
        name=name,
    )(x_TI, *others)
    return Float8Rows(numbers_TI, scale_T1)


def _quantise_kernel(x_ref, numbers_ref, scale_ref):
    t = pl.program_id(0)
    _store(_load(x_ref, t), t, numbers_ref, scale_ref)


def _normalise_kernel(x_ref, gain_ref, numbers_ref, scale_ref, *, eps, offset):
    t, D = pl.program_id(0), x_ref.shape[1]
    x = _load(x_ref, t)
    gain = _load(gain_ref) + jnp.float32(offset)
    mean = jnp.sum(x * x, axis=0) / D
    rounded = (x * jax.lax.rsqrt(mean + eps) * gain).astype(x_ref.dtype)
    _store(rounded.astype(jnp.float32), t, numbers_ref, scale_ref)


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
