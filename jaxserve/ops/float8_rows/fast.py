"""Rows in float8 for CUDA: a program takes a row, holds it in registers and reads it once.

XLA makes one kernel for the row's largest number and one for the quotients, and computes in both, and
in the one behind the product that applies the scales, what the row is made of.
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
    return _call(_quantise_kernel, x_TI.shape, x_TI, interpret=interpret, name="quantise_rows")


@functools.partial(jax.jit, static_argnames=("eps", "offset", "interpret"))
def normalise(x_TD, gain_D, *, eps: float, offset: float = 0.0, interpret: bool = False):
    """See `float8_rows.normalise`."""
    kernel = functools.partial(_normalise_kernel, eps=eps, offset=offset)
    return _call(kernel, x_TD.shape, x_TD, gain_D, interpret=interpret, name="normalise_rows")


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
    T, O = sums_TO.shape
    kernel = functools.partial(_gate_kernel, dtype=dtype, activation=activation)
    return _call(kernel, (T, O // 2), sums_TO, scale_T1, scale_O, interpret=interpret, name="gate_rows")


def _call(kernel, shape, *inputs, interpret, name):
    T, I = shape
    numbers_TI, scale_T1 = pl.pallas_call(
        kernel,
        grid=(T,),
        out_shape=(
            jax.ShapeDtypeStruct((T, I), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((T, 1), jnp.float32),
        ),
        # 16 numbers a thread up to rows of 8,192, two loads of 16 bytes.
        compiler_params=plt.CompilerParams(num_warps=min(16, max(1, _power_of_two(I) // 512)), num_stages=1),
        interpret=interpret,
        name=name,
    )(*inputs)
    return Float8Rows(numbers_TI, scale_T1)


def _quantise_kernel(x_ref, numbers_ref, scale_ref):
    _store(_load(x_ref, 0, numbers_ref), numbers_ref, scale_ref)


def _normalise_kernel(x_ref, gain_ref, numbers_ref, scale_ref, *, eps, offset):
    D = x_ref.shape[1]
    x = _load(x_ref, 0, numbers_ref)
    gain = _load(gain_ref, 0, numbers_ref) + jnp.float32(offset)
    mean = jnp.sum(x * x, axis=0) / D
    _store(_rounded(x * jax.lax.rsqrt(mean + eps) * gain, x_ref.dtype), numbers_ref, scale_ref)


def _gate_kernel(sums_ref, scale_T1_ref, scale_O_ref, numbers_ref, scale_ref, *, dtype, activation):
    scale = scale_T1_ref[pl.program_id(0), 0]

    def half(begin):
        channel = _load(scale_O_ref, begin, numbers_ref)
        return _rounded(_load(sums_ref, begin, numbers_ref) * scale * channel, dtype)

    inner = activation(half(0)) * half(numbers_ref.shape[1])
    _store(_rounded(inner, dtype), numbers_ref, scale_ref)


def _load(ref, begin, numbers_ref):
    """Columns of this program's row, or of the only one there is, in float32 and as many as it writes."""
    lane = jnp.arange(_power_of_two(numbers_ref.shape[1]))
    at = ref.at[begin + lane] if len(ref.shape) == 1 else ref.at[pl.program_id(0), begin + lane]
    loaded = plt.load(at, mask=lane < numbers_ref.shape[1], other=jnp.asarray(0, ref.dtype))
    return loaded.astype(jnp.float32)


def _store(x, numbers_ref, scale_ref):
    t, lane = pl.program_id(0), jnp.arange(x.shape[0])
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=0), jnp.float32(1e-12)) / FLOAT8_MAX
    numbers = jnp.clip(x / scale, -FLOAT8_MAX, FLOAT8_MAX).astype(numbers_ref.dtype)
    plt.store(numbers_ref.at[t, lane], numbers, mask=lane < numbers_ref.shape[1])
    scale_ref[t, 0] = scale


def _rounded(x, dtype):
    """float32 as `dtype` would have kept it."""
    return x.astype(dtype).astype(jnp.float32)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
