"""Attention over a paged KV pool: one row a sequence (decode) or blocks of query tokens (prefill).

Pools are [pages, page_size, G, K] for all layers; page `p` of a layer is row `page_offset + p`.
Page tables are per slot and hold layer-less page ids: position t of slot s lies in page
`page_table_SN[s, t // page_size]`, at offset `t % page_size`. Table entries past a sequence's end
may hold anything. The own key and value of every query token are already in the pool.

H query heads share G KV heads: head h reads KV head `h // (H // G)`.
`softcap` maps a scaled score x to softcap * tanh(x / softcap). `window` w lets a query at position
p see positions (p - w, p]. `sinks_H` adds one logit a head to the softmax's denominator, which
takes weight and gives nothing.
"""

from typing import Any

import jax

from jaxserve.ops import backend
from jaxserve.ops.hopper import is_supported
from jaxserve.ops.paged_attention import fast, hopper, reference


def decode(
    query_THK: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table_SN: jax.Array,
    slot_R: jax.Array,
    context_len_R: jax.Array,
    *,
    page_offset: int | jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """The first R queries, each at position context_len - 1 of its slot; [T, H, K] in the query's dtype,
    and place if that is free.

    Row r attends positions [max(0, context_len - window), context_len). A row with context_len 0, and
    tokens after the first R, keep their query.
    """
    options: dict[str, Any] = dict(
        page_offset=page_offset, scale=scale, window=window, softcap=softcap, sinks_H=sinks_H
    )
    arrays = (query_THK, key_pages, value_pages, page_table_SN, slot_R, context_len_R)
    if (chosen := backend.chosen()) == "reference":
        return reference.decode(*arrays, **options)
    return fast.decode(*arrays, **options, interpret=chosen == "interpret")


def prefill(
    query_THK: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table_SN: jax.Array,
    block_slot_B: jax.Array,
    block_start_B: jax.Array,
    block_len_B: jax.Array,
    block_pos_B: jax.Array,
    *,
    block_size: int,
    page_offset: int | jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of packed prompt chunks; [T, H, K] in the query's dtype, and place if that is free.

    Query block b holds tokens [block_start, block_start + block_len) of the T tokens, all of slot
    block_slot, the first one at position block_pos of its sequence. block_len lies in
    0..block_size, 0 is padding. Blocks do not overlap; tokens that no block covers keep their query.
    """
    options: dict[str, Any] = dict(
        block_size=block_size,
        page_offset=page_offset,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks_H=sinks_H,
    )
    blocks = (block_slot_B, block_start_B, block_len_B, block_pos_B)
    arrays = (query_THK, key_pages, value_pages, page_table_SN, *blocks)
    if (chosen := backend.chosen()) == "reference":
        return reference.prefill(*arrays, **options)
    if chosen == "fast" and is_supported() and hopper.fits(query_THK, key_pages, block_size):
        del options["block_size"]
        return hopper.prefill(*arrays, **options)
    return fast.prefill(*arrays, **options, interpret=chosen == "interpret")
