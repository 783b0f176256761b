"""Many tokens in several parts, so that what lies between two products stays small."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops.output import with_zeros

WORKSPACE_BYTES = 512 << 20  # of the rows between the products


def num_parts(num_tokens: int, bytes_of_token: int, workspace_bytes: int) -> int:
    """A power of two that divides the tokens, so large that a part fits into the workspace if any does."""
    parts = 1
    while num_tokens % (2 * parts) == 0 and num_tokens // parts * bytes_of_token > workspace_bytes:
        parts *= 2
    return parts


def in_parts(
    feed: Callable[..., jax.Array],
    parts: int,
    hidden_TD: jax.Array,
    expert_TX: jax.Array,
    weight_TX: jax.Array,
) -> jax.Array:
    """`feed(hidden, expert, weight)` of as many tokens at a time, float32 [T, D]."""
    size = hidden_TD.shape[0] // parts
    hidden_TD, zeros_TD = with_zeros(hidden_TD, jnp.float32)

    def add_part(i, out_TD):
        tokens = [lax.dynamic_slice_in_dim(x, i * size, size) for x in (hidden_TD, expert_TX, weight_TX)]
        return lax.dynamic_update_slice_in_dim(out_TD, feed(*tokens), i * size, axis=0)

    return lax.fori_loop(0, parts, add_part, zeros_TD)
