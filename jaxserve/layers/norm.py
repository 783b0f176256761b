"""Root-mean-square normalization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.weight import weight


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, in float32 inside.

    `offset` is 1 for families that store the gain's distance from one (Gemma), else 0.
    Source: Zhang and Sennrich 2019, equation 4.
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        eps: float,
        dtype: DTypeLike,
        offset: float = 0.0,
        axis: str | None = "embed",
    ):
        self.weight = weight((size,), (axis,), f"{name}.weight", dtype=dtype)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        gain = self.weight[...].astype(jnp.float32)
        if self.offset:
            gain = gain + self.offset
        return (wide * jax.lax.rsqrt(variance + self.eps) * gain).astype(x.dtype)
