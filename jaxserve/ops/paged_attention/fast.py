"""Paged attention for CUDA: two flash kernels in Pallas-Triton over the reference's arrays.

`decode` splits long rows' keys over several programs (`split_keys`); the heads of one KV group are the rows
of its matrix products. Programs start in the order of the rows: where lengths differ, the longest rows should
come first (256 of some 1,000 tokens: 287 us, in any order 348, on one H200).
`prefill` gives each program some query rows of one block and one head.

The softmax runs in base 2 (exp2 is one instruction), sums and products accumulate in float32.
Offsets: Pallas-Triton indexes an array of more than 2**32 bytes with 64 bits, and all smaller ones
of two- and four-byte types have offsets below 2**31, so a full pool needs nothing from us. A float8
pool of 2**31 to 2**32 bytes would: the engine makes none (`Blueprint.num_pages`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.hopper import NUM_SMS
from jaxserve.ops.split_keys import Split, combine

NEG_INF = -1e30  # finite: the maximum over no key at all makes no NaN
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """How a kernel is cut: keys of one iteration, warps, pipeline stages, query rows (prefill only)."""

    keys: int
    warps: int
    stages: int
    rows: int = 16


# Decode tiles, H32 G8 K128, bfloat16, page size 16, one H200, us of (64, 4, 3), (64, 2, 3) and (64, 2, 5),
# which has three buffers of keys and values: 1 row of 4,096 tokens 12.4, 12.1, 10.9; 32 of 4,096 150, 138,
# 126; 48 of about 1,000 112, 100, 85; 64 of 300 24, 24, 28; 256 of 300 84, 82, 84. float8, and (128, 4, 3):
# 1 of 4,096 12, 15, 16, 10; 32 of 4,096 150, 185, 175, 127; 64 of 1,000 80, 65, 68, 68; 256 of 300 88, 84,
# 87, 101. K64 was not timed again. K256 on an H100, GB/s: (32, 4, 3) 2518 and 2640, (64, 4, 3) 2419 and 2458.
# Prefill tiles: the fastest of 14 on one H100, bfloat16, page size 16, two runs; of 4,096 tokens, TFLOP/s:
# (64, 4, 3, rows 128) 250 and 258; (64, 8, 5, 128) 242 and 248; (64, 4, 5, rows 64) 227 and 229. K256:
# (32, 8, 2, 128) 215 and 220, (32, 4, 3, 64) 201 and 207. K64: (128, 8, 5, 128) 143 and 159, (64, 8, 5, 128)
# 134 and 138.
# A third run, on another card, repeated these within 5 %; 4096 took 256 and 8192 took 302 TFLOP/s.
# Loading the next block's page ids one iteration ahead won nothing.


def decode_tile(K: int, itemsize: int, programs: int) -> Tile:
    if itemsize == 4:
        return Tile(keys=32, warps=4, stages=2)
    if K > 128:
        return Tile(keys=32, warps=4, stages=3)
    if programs > 3 * NUM_SMS:
        return Tile(keys=64, warps=2, stages=3)
    return Tile(keys=64, warps=2, stages=5) if itemsize == 2 else Tile(keys=128, warps=4, stages=3)


def prefill_tile(K: int, itemsize: int, block_size: int) -> Tile:
    rows = min(block_size, 128)
    if itemsize == 4:
        return Tile(keys=32, warps=4, stages=1, rows=min(rows, 64 if K <= 128 else 32))
    if K > 128:
        return Tile(keys=32, warps=8 if rows == 128 else 4, stages=2 if rows == 128 else 3, rows=rows)
    if rows < 128:
        return Tile(keys=64, warps=4, stages=5, rows=rows)
    return (
        Tile(keys=128, warps=8, stages=5, rows=128) if K <= 64 else Tile(keys=64, warps=4, stages=3, rows=128)
    )


def choose_split(programs: int, max_context: int) -> Split:
    """By how many programs there are, were each row and KV head one.

    Fewer than two for each multiprocessor leave the GPU idle: 16 rows of 2048 tokens take 77 us in one share
    and 64 in 2, 8 rows of 1024 take 41, 31 and 27 us in 1, 2 and 4; one row of 4096 takes 24, 19, 18, 19 and
    19 us in 4, 8, 16, 32 and 64. More only cost: 64 rows of 300 take 45, 47, 50 and 55 us in 1, 2, 4 and 8.
    Shares of 1,024 tokens for long rows alone: 64 rows of about 1,000 90 us instead of 113, but of about 300
    42 instead of 38, and 96 and more rows always longer.
    """
    wanted = min(max(1, 2 * NUM_SMS // programs), max(1, max_context // 128), 64)
    return Split(1 << (wanted.bit_length() - 1))


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
    interpret: bool = False,
    tile: Tile | None = None,
    split: Split | None = None,
):
    """See `paged_attention.decode`. `tile` and `split` are chosen from the shapes unless given."""
    R, (_, H, K) = slot_R.shape[0], query_THK.shape
    page_size, G = key_pages.shape[1:3]
    if R == 0:
        return query_THK
    split = split or choose_split(R * G, page_table_SN.shape[1] * page_size)
    tile = tile or decode_tile(K, key_pages.dtype.itemsize, R * G)
    kernel = functools.partial(
        _decode_kernel,
        tile=tile,
        split=split,
        group=H // G,
        score=_score(scale, softcap),
        window=window,
    )
    out, *parts = pl.pallas_call(
        kernel,
        grid=(G, R, split.most),
        out_shape=(jax.ShapeDtypeStruct(query_THK.shape, query_THK.dtype), *split.parts(R, H, K)),
        input_output_aliases={0: 0},  # a row of one share is written where it was read
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="paged_decode",
    )(
        query_THK,
        key_pages,
        value_pages,
        page_table_SN,
        slot_R,
        context_len_R,
        _sinks(sinks_H, H),
        _scalar(page_offset),
    )
    return combine(out, *parts, warps=2, interpret=interpret) if parts else out


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
    interpret: bool = False,
    tile: Tile | None = None,
):
    """See `paged_attention.prefill`. `tile` is chosen from the shapes unless given."""
    T, H, K = query_THK.shape
    G = key_pages.shape[2]
    B = block_slot_B.shape[0]
    if T == 0 or B == 0:
        return query_THK
    tile = tile or prefill_tile(K, key_pages.dtype.itemsize, block_size)
    parts = pl.cdiv(block_size, tile.rows)
    kernel = functools.partial(
        _prefill_kernel,
        tile=tile,
        parts=parts,
        group=H // G,
        score=_score(scale, softcap),
        window=window,
    )
    inputs = (
        query_THK,
        key_pages,
        value_pages,
        page_table_SN,
        block_slot_B,
        block_start_B,
        block_len_B,
        block_pos_B,
        _sinks(sinks_H, H),
        _scalar(page_offset),
    )
    return pl.pallas_call(
        kernel,
        grid=(H, B * parts),
        out_shape=jax.ShapeDtypeStruct(query_THK.shape, query_THK.dtype),
        input_output_aliases={0: 0},  # a program writes only where it has read its queries
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="paged_prefill",
    )(*inputs)


# ---- kernels ----


def _decode_kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    slot_ref,
    len_ref,
    sink_ref,
    offset_ref,
    out_ref,
    *part_refs,
    tile,
    split,
    group,
    score,
    window,
):
    """Row r, KV head g, one of the equal shares of the row's blocks of keys."""
    g, r, number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    K = query_ref.shape[-1]
    end = len_ref[r]
    first = jnp.int32(0) if window is None else jnp.maximum(end - window, 0)
    first_block, end_block = first // tile.keys, pl.cdiv(end, tile.keys)
    shares, share = split.shares(end_block - first_block)
    begin = first_block + number * share

    row = jnp.arange(max(16, pl.next_power_of_2(group)))  # a matrix product has at least 16 rows
    head, is_head = g * group + row, row < group
    query = _load_heads(query_ref, (r, head[:, None]), K, is_head)
    query = query.astype(_product_dtype(query_ref, key_ref))
    pages = _PageTable(table_ref, slot_ref[r], key_ref.shape[1], offset_ref[0])

    def attend_block(block, state):
        position = block * tile.keys + jnp.arange(tile.keys)
        seen = (position >= first) & (position < end)
        page, offset = pages.locate(position, seen)
        key = _load_heads(key_ref, (page[:, None], offset[:, None], g), K, seen)
        value = _load_heads(value_ref, (page[:, None], offset[:, None], g), K, seen)
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        logits = jnp.where(seen[None, :], score(_dot(query, key.T)), NEG_INF)
        return _update(state, logits, value)

    # The sink is a key without a value, seen by the first share.
    sink = plt.load(sink_ref.at[head], mask=is_head & (number == 0), other=jnp.float32(NEG_INF))
    state = _start(sink * LOG2_E, query.shape[1])
    state = lax.fori_loop(begin, jnp.minimum(begin + share, end_block), attend_block, state)
    out, lse = _finish(state)
    _store_heads(out_ref, (r, head[:, None]), K, is_head & (shares == 1) & (number == 0) & (end > 0), out)
    if part_refs:
        part_ref, lse_ref, shares_ref = part_refs
        is_part = is_head & (shares > 1) & (number < shares)
        _store_heads(part_ref, (r, number, head[:, None]), K, is_part, out)
        plt.store(lse_ref.at[r, number, head], lse, mask=is_part)
        plt.store(shares_ref.at[r], shares)


def _prefill_kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    slot_ref,
    start_ref,
    len_ref,
    pos_ref,
    sink_ref,
    offset_ref,
    out_ref,
    *,
    tile,
    parts,
    group,
    score,
    window,
):
    """Head h, `tile.rows` consecutive queries of one block. Late blocks, the longest, start first."""
    h, part = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)
    g, K = h // group, query_ref.shape[-1]
    block, skipped = part // parts, part % parts * tile.rows
    length = jnp.clip(len_ref[block] - skipped, 0, tile.rows)
    start, pos = start_ref[block] + skipped, pos_ref[block] + skipped
    end = jnp.where(length > 0, pos + length, 0)

    row = jnp.arange(tile.rows)
    is_token = row < length
    query = _load_heads(query_ref, ((start + row)[:, None], h), K, is_token)
    query = query.astype(_product_dtype(query_ref, key_ref))
    pages = _PageTable(table_ref, slot_ref[block], key_ref.shape[1], offset_ref[0])

    def attend_block(block, state, *, masked):
        position = block * tile.keys + jnp.arange(tile.keys)
        seen = position < end if masked else None
        page, offset = pages.locate(position, seen)
        key = _load_heads(key_ref, (page[:, None], offset[:, None], g), K, seen)
        value = _load_heads(value_ref, (page[:, None], offset[:, None], g), K, seen)
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        logits = score(_dot(query, key.T))
        if masked:
            allowed = position[None, :] <= (pos + row)[:, None]
            if window is not None:
                allowed &= position[None, :] > (pos + row)[:, None] - window
            logits = jnp.where(allowed, logits, NEG_INF)
        return _update(state, logits, value)

    # Only blocks that the diagonal or the window's edge crosses pay for a mask. A row that the
    # window hides from a whole block counts its NEG_INF keys there with weight 1, until its first
    # real key (every row sees itself) scales that by exp2(NEG_INF - real) = 0.
    masked = functools.partial(attend_block, masked=True)
    clear_end = jnp.where(length > 0, (pos + 1) // tile.keys, 0)
    clear_begin = jnp.int32(0)
    sink = plt.load(sink_ref.at[h]) * LOG2_E
    state = _start(jnp.full((tile.rows,), sink, jnp.float32), query.shape[1])
    if window is not None:
        first = jnp.maximum(pos - window + 1, 0) // tile.keys
        clear_begin = jnp.minimum(pl.cdiv(jnp.maximum(end - window, 0), tile.keys), clear_end)
        state = lax.fori_loop(first, clear_begin, masked, state)
    state = lax.fori_loop(clear_begin, clear_end, functools.partial(attend_block, masked=False), state)
    state = lax.fori_loop(clear_end, pl.cdiv(end, tile.keys), masked, state)
    out, _ = _finish(state)
    _store_heads(out_ref, ((start + row)[:, None], h), K, is_token, out)


# ---- parts of a kernel ----


class _PageTable(NamedTuple):
    """Where a sequence's tokens lie in the pools."""

    table_ref: Any
    slot: jax.Array
    page_size: int
    page_offset: jax.Array

    def locate(self, position, seen):
        """Pool page and offset of each position; unseen ones read nothing from the table."""
        ref = self.table_ref.at[self.slot, position // self.page_size]
        page = plt.load(ref) if seen is None else plt.load(ref, mask=seen, other=jnp.int32(0))
        return page + self.page_offset, position % self.page_size


def _load_heads(ref, index, K, is_row):
    """[rows, K up to a power of two] of `ref[*index]`; 0 outside and in rows that are not."""
    column = jnp.arange(pl.next_power_of_2(K))[None, :]
    mask = _mask(column, K, is_row)
    if mask is None:
        return plt.load(ref.at[*index, column])
    return plt.load(ref.at[*index, column], mask=mask, other=jnp.asarray(0, ref.dtype))


def _store_heads(ref, index, K, is_row, value):
    column = jnp.arange(pl.next_power_of_2(K))[None, :]
    plt.store(ref.at[*index, column], value.astype(ref.dtype), mask=_mask(column, K, is_row))


def _mask(column, K, is_row):
    if is_row is None:
        return None if column.shape[1] == K else column < K
    return is_row[:, None] & (column < K)


def _dot(a, b):
    return plt.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _score(scale, softcap):
    """From products of query and key to base-2 logits."""
    if softcap is None:
        return lambda product: product * (scale * LOG2_E)
    return lambda product: jnp.tanh(product * (scale / softcap)) * (softcap * LOG2_E)


def _start(sink, columns):
    """Online softmax after the sink alone: (maximum, sum of weights, weighted values).

    NEG_INF stands for no sink: the first real key scales its weight of 1 to 0.
    """
    return sink, jnp.ones(sink.shape, jnp.float32), jnp.zeros((*sink.shape, columns), jnp.float32)


def _update(state, logits, value):
    old_maximum, total, out = state
    maximum = jnp.maximum(old_maximum, logits.max(axis=1))
    decay = jnp.exp2(old_maximum - maximum)
    weight = jnp.exp2(logits - maximum[:, None])
    out = out * decay[:, None] + _dot(weight.astype(value.dtype), value)
    return maximum, total * decay + weight.sum(axis=1), out


def _finish(state):
    """The softmax's result and the base-2 logarithm of its denominator."""
    maximum, total, out = state
    return out / total[:, None], maximum + jnp.log2(total)


# ---- outside the kernels ----


def _scalar(value):
    """One number as a kernel's operand. As a constant it would make every layer a kernel of its own."""
    return jnp.full((1,), value, jnp.int32)


def _product_dtype(query, pages):
    """Of the matrix products: the pool's, unless that is float8, which is widened where it is read."""
    return query.dtype if pages.dtype.itemsize == 1 else pages.dtype


def _sinks(sinks_H, H):
    return jnp.full((H,), NEG_INF, jnp.float32) if sinks_H is None else sinks_H.astype(jnp.float32)
