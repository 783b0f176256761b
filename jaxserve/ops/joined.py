"""Where results of joined products lie: side by side in one array, or in each part of a split one."""

import jax


def columns_of(x_TX: jax.Array, first: int, count: int, ways: int) -> jax.Array:
    """Columns [first, first + count) of [T, X, ...]; each of `ways` parts of X has its share of them."""
    if ways == 1:
        return x_TX[:, first : first + count]
    T, X, *more = x_TX.shape
    parts = x_TX.reshape(T, ways, X // ways, *more)
    return parts[:, :, first // ways : (first + count) // ways].reshape(T, count, *more)
