"""How a number is kept in the KV pool."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxserve.ops.float8_rows import FLOAT8_MAX


def cached(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Keys, values or latents as a pool of `dtype` keeps them.

    float8_e4m3 has no infinity and XLA makes NaN of what is beyond 448, so that is cut. No scale: keys
    and values behind a norm's scale are of the order of 1 to 100.
    """
    if dtype == jnp.float8_e4m3fn:
        x = jnp.clip(x.astype(jnp.float32), -FLOAT8_MAX, FLOAT8_MAX)
    return x.astype(dtype)
