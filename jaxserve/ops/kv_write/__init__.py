"""What happens to the heads of new tokens before they are attended: queries and keys are rotated, and
keys and values written into the paged KV pool.

Heads may lie side by side in one array, as a joined projection leaves them, so that nothing has to be
copied out of it first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.ops import backend
from jaxserve.ops.joined import columns_of
from jaxserve.ops.kv_write import fast, reference


class Heads(NamedTuple):
    """Heads [first, first + count) of an array [T, heads, K]; all but the arrays is static.

    Of an array that is split in `ways`, each part has its share of them, in the same places. With `scales`,
    float32 [T, 1] and [heads, K], it holds sums that are still to be multiplied by them.
    """

    array_TXK: jax.Array
    first: int
    count: int
    ways: int = 1
    scales: tuple[jax.Array, jax.Array] | None = None

    @classmethod
    def whole(cls, array_THK: jax.Array) -> "Heads":
        return cls(array_THK, 0, array_THK.shape[1])

    @property
    def value_THK(self) -> jax.Array:
        sums_THK = columns_of(self.array_TXK, self.first, self.count, self.ways)
        if self.scales is None:
            return sums_THK
        row_T1, column_XK = self.scales
        column_HK = column_XK[self.first : self.first + self.count]
        return (sums_THK.astype(jnp.float32) * row_T1[..., None] * column_HK).astype(sums_THK.dtype)


def rotate_and_write(
    query: Heads,
    key: Heads,
    value: Heads,
    rotation: tuple[jax.Array, jax.Array] | None,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_T: jax.Array,
    offset_T: jax.Array,
    *,
    page_offset: int | jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(query_THK, key_pages, value_pages).

    Args:
        rotation: cosines and sines, float32 [T, n / 2]: the pairs (i, i + n / 2) of the first n numbers
            of every query and key head turn, the rest stays. None: nothing turns.
        key_pages, value_pages: [pages, page_size, G, K], updated in place where they are donated.
        page_T, offset_T: where each token's key and value go; page -1: nowhere.
        page_offset: of the layer, added to every page.
    """
    arrays = (query, key, value, rotation, key_pages, value_pages, page_T, offset_T)
    if (chosen := backend.chosen()) == "reference":
        return reference.rotate_and_write(*arrays, page_offset=page_offset)
    return fast.rotate_and_write(*arrays, page_offset=page_offset, interpret=chosen == "interpret")
