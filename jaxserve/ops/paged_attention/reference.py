"""Paged attention in jax.numpy: the truth for the kernels and the path on a CPU.

Both functions walk the keys in blocks of whole pages with an online softmax in float32, so memory
is bounded by one block and work follows the longest context present, not the page table's width.
"""

import jax
import jax.numpy as jnp
from jax import lax

NEG_INF = -1e30  # finite, so that the maximum of a row without keys makes no NaN


def decode(
    query_THK,
    key_pages,
    value_pages,
    page_table_SN,
    slot_R,
    context_len_R,
    *,
    page_offset: int | jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H=None,
    key_block: int = 128,
):
    """See `paged_attention.decode`. `key_block`: tokens of one block of keys."""
    R, (_, H, K) = slot_R.shape[0], query_THK.shape
    page_size, G = key_pages.shape[1:3]
    num_pages = max(1, key_block // page_size)
    block_len = num_pages * page_size
    pages_RN = jnp.take(page_table_SN, slot_R, axis=0, mode="clip")
    query_RGqK = query_THK[:R].reshape(R, G, H // G, K).astype(jnp.float32) * scale
    first_R = jnp.zeros_like(context_len_R) if window is None else jnp.maximum(context_len_R - window, 0)

    def attend_block(block, state):
        pages_RB = _table_block(pages_RN, block, num_pages)
        position = block * block_len + jnp.arange(block_len)
        seen_RS = (position >= first_R[:, None]) & (position < context_len_R[:, None])
        key_RSGK = _read(key_pages, pages_RB + page_offset, seen_RS)
        value_RSGK = _read(value_pages, pages_RB + page_offset, seen_RS)
        # One query a row is a matrix-vector product: the CPU runs it fastest as multiply and sum
        # over a contiguous axis, which is what these contractions become there.
        score_RGqS = _einsum("rgqk,rsgk->rgqs", query_RGqK, key_RSGK)
        score_RGqS = jnp.where(seen_RS[:, None, None], _softcap(score_RGqS, softcap), NEG_INF)
        weight_RGqS, state = _online_softmax(state, score_RGqS, seen_RS[:, None, None])
        update_RGqK = _einsum("rgqs,rsgk->rgqk", weight_RGqS, value_RSGK)
        return _accumulate(state, update_RGqK)

    begin = jnp.min(jnp.where(context_len_R > 0, first_R, jnp.iinfo(jnp.int32).max)) // block_len
    end = (jnp.max(context_len_R, initial=0) + block_len - 1) // block_len
    state = _start(query_RGqK.shape, None if sinks_H is None else sinks_H.reshape(G, H // G))
    state = lax.fori_loop(begin, end, attend_block, state)
    out_RHK = _finish(state).reshape(R, H, K).astype(query_THK.dtype)
    kept_RHK = jnp.where((context_len_R > 0)[:, None, None], out_RHK, query_THK[:R])
    return lax.dynamic_update_slice_in_dim(query_THK, kept_RHK, 0, axis=0)


def prefill(
    query_THK,
    key_pages,
    value_pages,
    page_table_SN,
    block_slot_B,
    block_start_B,
    block_len_B,
    block_pos_B,
    *,
    block_size: int,
    page_offset: int | jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H=None,
    key_block: int = 128,
):
    """See `paged_attention.prefill`. One query block after the other, each over its own keys."""
    T, H, K = query_THK.shape
    page_size, G = key_pages.shape[1:3]
    num_pages = max(1, key_block // page_size)
    block_len = num_pages * page_size
    query_THK = jnp.pad(query_THK, ((0, block_size), (0, 0), (0, 0)))  # a block may end past T
    sinks_Gq1 = None if sinks_H is None else sinks_H.reshape(G, H // G, 1)

    def attend_query_block(b, out_THK):
        start, length, pos = block_start_B[b], block_len_B[b], block_pos_B[b]
        pages_N = jnp.take(page_table_SN, block_slot_B[b], axis=0, mode="clip")
        query_QHK = lax.dynamic_slice_in_dim(query_THK, start, block_size)
        query_GqQK = query_QHK.reshape(block_size, G, H // G, K).transpose(1, 2, 0, 3)
        query_GqQK = query_GqQK.astype(jnp.float32) * scale
        token_Q = jnp.arange(block_size)
        first_Q = jnp.zeros_like(token_Q) if window is None else pos + token_Q - window + 1

        def attend_block(block, state):
            pages_B = _table_block(pages_N, block, num_pages)
            position = block * block_len + jnp.arange(block_len)
            seen_QS = (position >= first_Q[:, None]) & (position <= pos + token_Q[:, None])
            in_chunk_S = (position >= first_Q[0]) & (position < pos + length)
            seen_QS &= in_chunk_S
            key_SGK = _read(key_pages, pages_B + page_offset, in_chunk_S)
            value_SGK = _read(value_pages, pages_B + page_offset, in_chunk_S)
            score_GqQS = _einsum("gqtk,sgk->gqts", query_GqQK, key_SGK)
            score_GqQS = jnp.where(seen_QS, _softcap(score_GqQS, softcap), NEG_INF)
            weight_GqQS, state = _online_softmax(state, score_GqQS, seen_QS)
            return _accumulate(state, _einsum("gqts,sgk->gqtk", weight_GqQS, value_SGK))

        begin = jnp.maximum(first_Q[0], 0) // block_len
        end = jnp.where(length > 0, (pos + length + block_len - 1) // block_len, begin)
        state = lax.fori_loop(begin, end, attend_block, _start(query_GqQK.shape, sinks_Gq1))
        new_QHK = _finish(state).transpose(2, 0, 1, 3).reshape(block_size, H, K).astype(out_THK.dtype)
        old_QHK = lax.dynamic_slice_in_dim(out_THK, start, block_size)
        kept_QHK = jnp.where((token_Q < length)[:, None, None], new_QHK, old_QHK)
        return lax.dynamic_update_slice_in_dim(out_THK, kept_QHK, start, axis=0)

    return lax.fori_loop(0, block_len_B.shape[0], attend_query_block, query_THK)[:T]


# ---- one block of keys ----


def _table_block(table, block, num_pages):
    """Entries [block * num_pages, ...) of the last axis; the last entry again past the table's end."""
    index = block * num_pages + jnp.arange(num_pages)
    return jnp.take(table, index, axis=-1, mode="clip")


def _read(pool, pages, seen):
    """Keys or values [..., tokens, G, K] in float32; 0 where not seen, whatever the page holds there.

    Weight 0 times a stale infinity would be NaN.
    """
    block = jnp.take(pool, pages, axis=0, mode="clip").astype(jnp.float32)
    block = block.reshape(*seen.shape, *pool.shape[2:])
    return jnp.where(seen[..., None, None], block, 0)


def _einsum(letters, a, b):
    return jnp.einsum(letters, a, b, precision=lax.Precision.HIGHEST)


def _softcap(score, softcap):
    return score if softcap is None else softcap * jnp.tanh(score / softcap)


# ---- online softmax: state is (maximum, sum of weights, weighted values) ----


def _start(shape, sink):
    """No key seen yet; a sink is a first logit without a value."""
    maximum = jnp.full(shape[:-1], NEG_INF, jnp.float32)
    if sink is None:
        return maximum, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32)
    maximum = jnp.broadcast_to(sink.astype(jnp.float32), shape[:-1])
    return maximum, jnp.ones(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32)


def _online_softmax(state, score, seen):
    old_maximum, total, out = state
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
