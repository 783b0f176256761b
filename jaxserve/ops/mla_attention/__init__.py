"""Latent attention (MLA) over a paged pool of latents: absorbed, so that all heads read one latent.

A token keeps a latent [L], which is key and value of every head at once, and a rotated part [K]
that is only key. The score of a query head is query_latent . latent + query_rope . rope, the
result its weighted sum of latents; projections into and out of the latent space are the caller's.
Pools are [pages, page_size, L] and [pages, page_size, K]; pages, tables, rows and query blocks are
as in `jaxserve.ops.paged_attention`.

Source: DeepSeek-V2 technical report, section 2.1.2 and appendix C.
"""

import jax

from jaxserve.ops import backend
from jaxserve.ops.hopper import is_supported
from jaxserve.ops.mla_attention import fast, hopper, reference


def decode(
    query_latent_THL: jax.Array,
    query_rope_THK: jax.Array,
    latent_pages: jax.Array,
    rope_pages: jax.Array,
    page_table_SN: jax.Array,
    slot_R: jax.Array,
    context_len_R: jax.Array,
    *,
    page_offset: int,
    scale: float,
) -> jax.Array:
    """The first R queries, each at position context_len - 1 of its slot; [T, H, L] in the place of
    `query_latent_THL`, if free.

    A row with context_len 0, and tokens after the first R, keep their query.
    """
    arrays = (query_latent_THL, query_rope_THK, latent_pages, rope_pages, page_table_SN, slot_R)
    options = {"page_offset": page_offset, "scale": scale}
    if (chosen := backend.chosen()) == "reference":
        return reference.decode(*arrays, context_len_R, **options)
    if chosen == "fast" and is_supported() and hopper.fits_decode(*arrays[:3], slot_R.shape[0]):
        return hopper.decode(*arrays, context_len_R, **options)
    return fast.decode(*arrays, context_len_R, **options, interpret=chosen == "interpret")


def prefill(
    query_latent_THL: jax.Array,
    query_rope_THK: jax.Array,
    latent_pages: jax.Array,
    rope_pages: jax.Array,
    page_table_SN: jax.Array,
    block_slot_B: jax.Array,
    block_start_B: jax.Array,
    block_len_B: jax.Array,
    block_pos_B: jax.Array,
    *,
    block_size: int,
    page_offset: int,
    scale: float,
) -> jax.Array:
    """Causal attention of packed prompt chunks; [T, H, L] in the place of `query_latent_THL`, if free.

    Tokens that no block covers keep their query.
    """
    arrays = (query_latent_THL, query_rope_THK, latent_pages, rope_pages, page_table_SN)
    blocks = (block_slot_B, block_start_B, block_len_B, block_pos_B)
    options = {"block_size": block_size, "page_offset": page_offset, "scale": scale}
    if (chosen := backend.chosen()) == "reference":
        return reference.prefill(*arrays, *blocks, **options)
    if chosen == "fast" and is_supported() and hopper.fits(*arrays[:3]):
        return hopper.prefill(*arrays, *blocks, **options)
    return fast.prefill(*arrays, *blocks, **options, interpret=chosen == "interpret")
