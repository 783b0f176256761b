"""What happens to the heads of new tokens before they are attended: queries and keys are normed, where a
family does that to each head, and rotated, and keys and values written into the paged KV pool.

Heads may lie side by side in one array, as a joined projection leaves them, so that nothing has to be
copied out of it first.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxserve.ops import backend
from jaxserve.ops.joined import columns_of
from jaxserve.ops.kv_write import fast, reference
from jaxserve.ops.norm import rms_norm

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadNorm:
    """`rms_norm` of each head alone, all with one gain [K]."""

    gain_K: jax.Array
    eps: float = field(metadata=STATIC)
    offset: float = field(default=0.0, metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """Heads [first, first + count) of an array [T, heads, K]; all but the arrays is static.

    Of an array that is split in `ways`, each part has its share of them, in the same places. With `scales`,
    float32 [T, 1] and [heads, K], it holds sums that are still to be multiplied by them; with `norm`, heads
    that are still to go through it.
    """

    array_TXK: jax.Array
    first: int = field(metadata=STATIC)
    count: int = field(metadata=STATIC)
    ways: int = field(default=1, metadata=STATIC)
    scales: tuple[jax.Array, jax.Array] | None = None
    norm: HeadNorm | None = None

    @classmethod
    def whole(cls, array_THK: jax.Array) -> "Heads":
        return cls(array_THK, 0, array_THK.shape[1])

    @property
    def value_THK(self) -> jax.Array:
        value_THK = columns_of(self.array_TXK, self.first, self.count, self.ways)
        if self.scales is not None:
            row_T1, column_XK = self.scales
            column_HK = column_XK[self.first : self.first + self.count]
            scaled_THK = value_THK.astype(jnp.float32) * row_T1[..., None] * column_HK
            value_THK = scaled_THK.astype(value_THK.dtype)
        if self.norm is not None:
            norm = self.norm
            value_THK = rms_norm(value_THK, norm.gain_K, eps=norm.eps, offset=norm.offset)
        return value_THK

    def specs(self, spec: PartitionSpec) -> "Heads":
        """How a mesh splits it: the array by `spec`. A gain is everywhere; scales are of one device."""
        assert self.scales is None, "a mesh splits no scales"
        norm = None if self.norm is None else replace(self.norm, gain_K=PartitionSpec())
        return replace(self, array_TXK=spec, norm=norm)


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
