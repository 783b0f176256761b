"""Root-mean-square normalization as a formula."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, gain: jax.Array, *, eps: float, offset: float = 0.0) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + gain) over the last axis, in float32 inside.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    gain = gain.astype(jnp.float32)
    if offset:
        gain = gain + offset
    return (wide * jax.lax.rsqrt(variance + eps) * gain).astype(x.dtype)
