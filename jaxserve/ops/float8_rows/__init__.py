"""Rows of a float8 product: a token's activations in float8 with a float32 scale of its own.

What comes before is part of it where it needs the same one pass over the row: the norm in front of a
product, or the gate of a feed-forward layer with the scales of the product that made it.

Every function is for rows that lie whole on one device: a row over which a mesh is spread is
`reference.quantise`'s, which XLA partitions.
"""

from collections.abc import Callable

import jax

from jaxserve.ops import backend
from jaxserve.ops.float8_rows import fast, reference
from jaxserve.ops.float8_rows.rows import FLOAT8_MAX, Float8Rows, Unscaled

__all__ = ["FLOAT8_MAX", "Float8Rows", "Unscaled", "gate", "normalise", "quantise"]


def quantise(x_TI: jax.Array) -> Float8Rows:
    """Each row's largest number becomes 448."""
    if (chosen := backend.chosen()) == "reference":
        return reference.quantise(x_TI)
    return fast.quantise(x_TI, interpret=chosen == "interpret")


def normalise(x_TD: jax.Array, gain_D: jax.Array, *, eps: float, offset: float = 0.0) -> Float8Rows:
    """`jaxserve.ops.norm.rms_norm` of each row, in the dtype of `x_TD`, quantised."""
    if (chosen := backend.chosen()) == "reference":
        return reference.normalise(x_TD, gain_D, eps=eps, offset=offset)
    return fast.normalise(x_TD, gain_D, eps=eps, offset=offset, interpret=chosen == "interpret")


def gate(product: Unscaled, activation: Callable[[jax.Array], jax.Array]) -> Float8Rows:
    """activation(first half) * second half of each row of a product [T, 2 F], quantised: [T, F]."""
    if (chosen := backend.chosen()) == "reference":
        return reference.gate(product, activation)
    return fast.gate(product, activation, interpret=chosen == "interpret")
