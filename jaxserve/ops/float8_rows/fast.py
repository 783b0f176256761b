"""Rows in float8 for CUDA: a program holds a row in registers and reads it once.

XLA makes one kernel for the row's largest number and one for the quotients, and computes in both, and
in the one behind the product that applies the scales, what the row is made of.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.float8_rows.rows import FLOAT8_MAX, Float8Rows

GATE_PROGRAMS = 132
"""As many as a Hopper GPU has multiprocessors. Rows of 28,672 sums on an H200, us at 64, 256 and 2,064 rows:
13, 19, 89; with a program a row, which reads the channels' scales again for each, 15, 23, 156."""

# Traced once for all layers, as `jax.jit` does: a kernel costs milliseconds to trace.


@functools.partial(jax.jit, static_argnames="interpret")
def quantise(x_TI, *, interpret: bool = False):
    """See `float8_rows.quantise`."""
    T, I = x_TI.shape
    return _call(_quantise_kernel, T, I, x_TI, programs=T, interpret=interpret, name="quantise_rows")


@functools.partial(jax.jit, static_argnames=("eps", "offset", "interpret"))
def normalise(x_TD, gain_D, *, eps: float, offset: float = 0.0, interpret: bool = False):
    """See `float8_rows.normalise`."""
    T, D = x_TD.shape
    kernel = functools.partial(_normalise_kernel, eps=eps, offset=offset)
    return _call(kernel, T, D, x_TD, gain_D, programs=T, interpret=interpret, name="normalise_rows")


def gate(product, activation, *, interpret: bool = False):
    """See `float8_rows.gate`."""
    return _gate(
        product.sums_TO,
        product.scale_T1,
        product.scale_O,
        dtype=jnp.dtype(product.dtype),
        activation=activation,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("dtype", "activation", "interpret"))
def _gate(sums_TO, scale_T1, scale_O, *, dtype, activation, interpret):
    T, F = sums_TO.shape[0], sums_TO.shape[1] // 2
    programs = min(T, GATE_PROGRAMS)
    kernel = functools.partial(_gate_kernel, T=T, programs=programs, dtype=dtype, activation=activation)
    inputs = (sums_TO, scale_T1, scale_O)
    return _call(kernel, T, F, *inputs, programs=programs, interpret=interpret, name="gate_rows")


def _call(kernel, T, I, *inputs, programs, interpret, name):
    numbers_TI, scale_T1 = pl.pallas_call(
        kernel,
        grid=(programs,),
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
    )(*inputs)
    return Float8Rows(numbers_TI, scale_T1)


def _quantise_kernel(x_ref, numbers_ref, scale_ref):
    t = pl.program_id(0)
    _store(_load(x_ref, (t,), 0, numbers_ref), t, numbers_ref, scale_ref)


def _normalise_kernel(x_ref, gain_ref, numbers_ref, scale_ref, *, eps, offset):
    t, D = pl.program_id(0), x_ref.shape[1]
    x = _load(x_ref, (t,), 0, numbers_ref)
    gain = _load(gain_ref, (), 0, numbers_ref) + jnp.float32(offset)
    mean = jnp.sum(x * x, axis=0) / D
    _store(_rounded(x * jax.lax.rsqrt(mean + eps) * gain, x_ref.dtype), t, numbers_ref, scale_ref)


def _gate_kernel(
    sums_ref, scale_T1_ref, scale_O_ref, numbers_ref, scale_ref, *, T, programs, dtype, activation
):
    """Every `programs`-th row. The channels' scales are as many bytes as two rows, and read once."""
    first, F = pl.program_id(0), numbers_ref.shape[1]
    channels = [_load(scale_O_ref, (), begin, numbers_ref) for begin in (0, F)]

    def row(i, carry):
        t = first + i * programs
        scale = scale_T1_ref[t, 0]
        gate, up = (
            _rounded(_load(sums_ref, (t,), begin, numbers_ref) * scale * channel, dtype)
            for begin, channel in zip((0, F), channels)
        )
        _store(_rounded(activation(gate) * up, dtype), t, numbers_ref, scale_ref)
        return carry

    jax.lax.fori_loop(0, pl.cdiv(T - first, programs), row, 0)


def _load(ref, row, begin, numbers_ref):
    """Columns from `begin` on, as many as a row of `numbers_ref` has, of a row () or (t,); float32."""
    lane = jnp.arange(pl.next_power_of_2(numbers_ref.shape[1]))
    mask = lane < numbers_ref.shape[1]
    loaded = plt.load(ref.at[*row, begin + lane], mask=mask, other=jnp.asarray(0, ref.dtype))
    return loaded.astype(jnp.float32)


def _store(x, t, numbers_ref, scale_ref):
    lane = jnp.arange(x.shape[0])
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=0), jnp.float32(1e-12)) / FLOAT8_MAX
    numbers = jnp.clip(x / scale, -FLOAT8_MAX, FLOAT8_MAX).astype(numbers_ref.dtype)
    plt.store(numbers_ref.at[t, lane], numbers, mask=lane < numbers_ref.shape[1])
    scale_ref[t, 0] = scale


def _rounded(x, dtype):
    """float32 as `dtype` would have kept it."""
    return x.astype(dtype).astype(jnp.float32)
