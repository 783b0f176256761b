"""Latent attention in jax.numpy: the truth for the kernels and the path on a CPU.

Both functions walk the latents in blocks of whole pages with an online softmax in float32; work
follows the longest context present.
"""

import jax.numpy as jnp
from jax import lax

NEG_INF = -1e30  # finite, so that the maximum of a row without keys makes no NaN


def decode(
    query_latent_THL,
    query_rope_THK,
    latent_pages,
    rope_pages,
    page_table_SN,
    slot_R,
    context_len_R,
    *,
    page_offset: int,
    scale: float,
    key_block: int = 128,
):
    """See `mla_attention.decode`. `key_block`: tokens of one block of keys."""
    pages_RN = jnp.take(page_table_SN, slot_R, axis=0, mode="clip")
    R = slot_R.shape[0]
    query_RHC = _join(query_latent_THL[:R], query_rope_THK[:R]) * scale
    L, page_size = query_latent_THL.shape[-1], latent_pages.shape[1]
    pages_a_block = max(1, key_block // page_size)
    block_len = pages_a_block * page_size

    def attend_block(block, state):
        position_S = block * block_len + jnp.arange(block_len)
        seen_RS = position_S < context_len_R[:, None]
        pages_RB = _table_block(pages_RN, block, pages_a_block) + page_offset
        key_RSC = _read(latent_pages, rope_pages, pages_RB, seen_RS)
        score_RHS = _einsum("rhc,rsc->rhs", query_RHC, key_RSC)
        weight_RHS, state = _online_softmax(state, score_RHS, seen_RS[:, None])
        return _accumulate(state, _einsum("rhs,rsl->rhl", weight_RHS, key_RSC[..., :L]))

    end = (jnp.max(context_len_R, initial=0) + block_len - 1) // block_len
    state = lax.fori_loop(0, end, attend_block, _start((*query_RHC.shape[:-1], L)))
    out_RHL = _finish(state).astype(query_latent_THL.dtype)
    kept_RHL = jnp.where((context_len_R > 0)[:, None, None], out_RHL, query_latent_THL[:R])
    return lax.dynamic_update_slice_in_dim(query_latent_THL, kept_RHL, 0, axis=0)


def prefill(
    query_latent_THL,
    query_rope_THK,
    latent_pages,
    rope_pages,
    page_table_SN,
    block_slot_B,
    block_start_B,
    block_len_B,
    block_pos_B,
    *,
    block_size: int,
    page_offset: int,
    scale: float,
    key_block: int = 128,
):
    """See `mla_attention.prefill`. One query block after the other, each over its own keys."""
    T, H, L = query_latent_THL.shape
    page_size = latent_pages.shape[1]
    pages_a_block = max(1, key_block // page_size)
    block_len = pages_a_block * page_size
    past = ((0, block_size), (0, 0), (0, 0))  # a block may end past T
    query_THC = jnp.pad(_join(query_latent_THL, query_rope_THK) * scale, past)
    out_THL = jnp.pad(query_latent_THL, past)

    def attend_query_block(b, out_THL):
        start, length, pos = block_start_B[b], block_len_B[b], block_pos_B[b]
        pages_N = jnp.take(page_table_SN, block_slot_B[b], axis=0, mode="clip")
        query_QHC = lax.dynamic_slice_in_dim(query_THC, start, block_size)
        token_Q = jnp.arange(block_size)

        def attend_block(block, state):
            position_S = block * block_len + jnp.arange(block_len)
            in_chunk_S = position_S < pos + length
            seen_Q1S = ((position_S <= pos + token_Q[:, None]) & in_chunk_S)[:, None]
            pages_B = _table_block(pages_N, block, pages_a_block) + page_offset
            key_SC = _read(latent_pages, rope_pages, pages_B, in_chunk_S)
            score_QHS = _einsum("qhc,sc->qhs", query_QHC, key_SC)
            weight_QHS, state = _online_softmax(state, score_QHS, seen_Q1S)
            return _accumulate(state, _einsum("qhs,sl->qhl", weight_QHS, key_SC[:, :L]))

        end = jnp.where(length > 0, (pos + length + block_len - 1) // block_len, 0)
        state = lax.fori_loop(0, end, attend_block, _start((block_size, H, L)))
        old_QHL = lax.dynamic_slice_in_dim(out_THL, start, block_size)
        new_QHL = jnp.where((token_Q < length)[:, None, None], _finish(state).astype(out_THL.dtype), old_QHL)
        return lax.dynamic_update_slice_in_dim(out_THL, new_QHL, start, axis=0)

    return lax.fori_loop(0, block_len_B.shape[0], attend_query_block, out_THL)[:T]


# ---- one block of keys ----


def _join(latent, rope):
    return jnp.concatenate([latent, rope], axis=-1).astype(jnp.float32)


def _table_block(table, block, num_pages):
    """Entries [block * num_pages, ...) of the last axis; the last entry again past the table's end."""
    return jnp.take(table, block * num_pages + jnp.arange(num_pages), axis=-1, mode="clip")


def _read(latent_pages, rope_pages, pages, seen):
    """Latent and rope part [..., tokens, L + K] in float32; 0 where not seen, whatever the page holds."""
    latent, rope = (
        jnp.take(pool, pages, axis=0, mode="clip").reshape(*seen.shape, pool.shape[-1])
        for pool in (latent_pages, rope_pages)
    )
    return jnp.where(seen[..., None], _join(latent, rope), 0)


def _einsum(letters, a, b):
    return jnp.einsum(letters, a, b, precision=lax.Precision.HIGHEST)


# ---- online softmax: state is (maximum, sum of weights, weighted latents) ----


def _start(shape):
    rows = shape[:-1]
    return jnp.full(rows, NEG_INF, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(shape, jnp.float32)


def _online_softmax(state, score, seen):
    old_maximum, total, out = state
    score = jnp.where(seen, score, NEG_INF)
    maximum = jnp.maximum(old_maximum, score.max(-1))
    decay = jnp.exp(old_maximum - maximum)
    weight = jnp.where(seen, jnp.exp(score - maximum[..., None]), 0)
    return weight, (maximum, total * decay + weight.sum(-1), out * decay[..., None])


def _accumulate(state, update):
    maximum, total, out = state
    return maximum, total, out + update


def _finish(state):
    _, total, out = state
    return jnp.where(total[..., None] > 0, out / jnp.maximum(total, 1e-30)[..., None], 0)
