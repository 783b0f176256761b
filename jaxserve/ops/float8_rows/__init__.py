"""Rows of a float8 product: a token's activations in float8 with a float32 scale of its own.

The norm in front of a product is part of it: it needs the same pass over the row. A feed-forward layer's
gate is not: `gated_product` makes it, or XLA of the product before in one kernel, and a program a row of
14,336 that did both took longer than XLA's kernel and `quantise` (2,048 rows on an H200: 87 us against 66).

Every function is for rows that lie whole on one device: a row over which a mesh is spread is
`reference.quantise`'s, which XLA partitions.
"""

import jax

from jaxserve.ops import backend
from jaxserve.ops.float8_rows import fast, reference
from jaxserve.ops.float8_rows.rows import FLOAT8_MAX, Float8Rows, Scaled

__all__ = ["FLOAT8_MAX", "Float8Rows", "Scaled", "add_and_normalise", "normalise", "quantise"]


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


def add_and_normalise(
    x_TD: jax.Array, product: Scaled, gain_D: jax.Array, *, eps: float, offset: float = 0.0
) -> tuple[jax.Array, Float8Rows]:
    """The sum of x and a product, in the dtype of `x_TD`, and `normalise` of that sum."""
    if (chosen := backend.chosen()) == "reference":
        return reference.add_and_normalise(x_TD, product, gain_D, eps=eps, offset=offset)
    return fast.add_and_normalise(
        x_TD, product, gain_D, eps=eps, offset=offset, interpret=chosen == "interpret"
    )
