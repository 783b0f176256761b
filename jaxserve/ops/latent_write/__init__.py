"""What happens to the projections of latent attention (MLA) before it attends: rotated parts are
rotated, the latent is normalized, and what is kept of a token written into the paged pools.

Projections may lie side by side in one array, as a joined one leaves them, so that nothing has to be
copied out of it first.
"""

import math
from typing import NamedTuple

import jax

from jaxserve.ops import backend
from jaxserve.ops.joined import columns_of
from jaxserve.ops.latent_write import fast, reference


class Columns(NamedTuple):
    """Columns [first, first + count) of an array [T, C], as `kv_write.Heads` are heads."""

    array_TC: jax.Array
    first: int
    count: int
    ways: int = 1

    @classmethod
    def whole(cls, array_T: jax.Array) -> "Columns":
        """All of an array [T, ...], its other dimensions merged."""
        count = math.prod(array_T.shape[1:])
        return cls(array_T.reshape(-1, count), 0, count)

    @property
    def value_TC(self) -> jax.Array:
        return columns_of(self.array_TC, self.first, self.count, self.ways)


def rotate_and_write_latent(
    query: Columns,
    down: Columns,
    norm_weight_L: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    latent_pages: jax.Array,
    rope_pages: jax.Array,
    page_T: jax.Array,
    offset_T: jax.Array,
    *,
    num_heads: int,
    eps: float,
    interleaved: bool,
    page_offset: int | jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(query_THN, query_THK, latent_pages, rope_pages).

    Args:
        query: of every head, N numbers that stay as they are and K that are rotated.
        down: of every token, the latent [L] before its norm and K numbers that are rotated.
        norm_weight_L, eps: of the latent's RMSNorm.
        rotation: cosines and sines, float32 [T, K / 2].
        latent_pages, rope_pages: [pages, page_size, L] and [pages, page_size, K], updated in place where
            they are donated.
        page_T, offset_T: where each token's latent and rotated part go; page -1: nowhere.
        interleaved: pairs are (2i, 2i + 1), else (i, i + K / 2); either come out as (i, i + K / 2).
        page_offset: of the layer, added to every page.
    """
    arrays = (query, down, norm_weight_L, rotation, latent_pages, rope_pages, page_T, offset_T)
    options = {
        "num_heads": num_heads,
        "eps": eps,
        "interleaved": interleaved,
        "page_offset": page_offset,
    }
    if (chosen := backend.chosen()) == "reference":
        return reference.rotate_and_write_latent(*arrays, **options)
    return fast.rotate_and_write_latent(*arrays, **options, interpret=chosen == "interpret")
