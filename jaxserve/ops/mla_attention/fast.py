"""Latent attention for CUDA: two flash kernels in Pallas-Triton over the reference's arrays.

`decode` gives each program some heads of one row and a share of its keys (`split_keys`). `prefill` gives each
program some query rows of one block and one head. A block of latents is loaded once and used twice, as keys
and as values.

The softmax runs in base 2, sums and products accumulate in float32. `page_offset` is an operand,
so that all layers share one compiled kernel.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.split_keys import Split, combine

NEG_INF = -1e30  # finite: the maximum over no key at all makes no NaN
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """How a kernel is cut: query rows (heads or tokens), keys of one iteration, warps, stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# Decode with 16 heads on one H200, us: 128 rows of 1,024 tokens in 2 shares take 74, with 2 stages 80, in one
# share 85; of 200 tokens 39, 41 and 36. 256 rows of 1,024 in one share 111, with 2 stages 119.


def decode_tile(H: int, itemsize: int) -> Tile:
    if itemsize == 4:
        return Tile(16, 16, warps=4, stages=1)
    return Tile(16, 32, warps=4, stages=3) if H <= 16 else Tile(min(64, _power_of_two(H)), 32, 8, 2)


def prefill_tile(block_size: int, itemsize: int) -> Tile:
    if itemsize == 4:
        return Tile(16, 16, warps=4, stages=1)
    return Tile(max(16, min(block_size, 64)), 32, warps=8, stages=2)


def choose_split(programs: int, max_context: int, tile: Tile) -> Split:
    """By how many programs there are, were each row and tile of heads one.

    Fewer than one for each multiprocessor leave the GPU idle (they are large: one is enough). Of some more,
    all wait for the longest row: a share of it is to be about as long as the mean row of a full GPU.

    16 heads on one H200, us of one share, two, and these: 256 rows of about 300 tokens, the longest first,
    81, 59, 60, of about 1,000 249, 156, 153; all of 300 35, 45, 40, all of 1,000 90, 101, 104.
    """
    wanted = 1 << (pl.cdiv(132, max(1, programs)) - 1).bit_length()
    useful = 1 << (max(1, max_context // (2 * tile.keys)).bit_length() - 1)
    if tile.rows > 16 or wanted > 4 or programs > 512:
        return Split(min(wanted, useful, 64))
    return Split(min(4, useful), min_blocks=pl.cdiv(2 * programs, tile.keys))


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
    interpret: bool = False,
    tile: Tile | None = None,
    split: Split | None = None,
):
    """See `mla_attention.decode`. `tile` and `split` are chosen from the shapes unless given."""
    R, H = slot_R.shape[0], query_latent_THL.shape[1]
    tile = tile or decode_tile(H, latent_pages.dtype.itemsize)
    head_tiles = pl.cdiv(H, tile.rows)
    max_context = page_table_SN.shape[1] * latent_pages.shape[1]
    split = split or choose_split(R * head_tiles, max_context, tile)
    out_THL = jax.ShapeDtypeStruct(query_latent_THL.shape, query_latent_THL.dtype)
    out, *parts = pl.pallas_call(
        functools.partial(_decode_kernel, tile=tile, split=split, scale=scale * LOG2_E),
        grid=(head_tiles, R, split.most),
        out_shape=(out_THL, *split.parts(R, *out_THL.shape[1:])),
        input_output_aliases={0: 0},  # a row of one share is written where it was read
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="mla_decode",
    )(
        query_latent_THL,
        query_rope_THK.astype(_product_dtype(query_rope_THK, rope_pages)),
        latent_pages,
        rope_pages,
        page_table_SN,
        slot_R,
        context_len_R,
        _scalar(page_offset),
    )
    return combine(out, *parts, warps=4, interpret=interpret) if parts else out


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
    interpret: bool = False,
    tile: Tile | None = None,
):
    """See `mla_attention.prefill`. `tile` is chosen from the shapes unless given."""
    H = query_latent_THL.shape[1]
    B = block_slot_B.shape[0]
    tile = tile or prefill_tile(block_size, latent_pages.dtype.itemsize)
    parts = pl.cdiv(block_size, tile.rows)
    inputs = (
        query_latent_THL,
        query_rope_THK.astype(_product_dtype(query_rope_THK, rope_pages)),
        latent_pages,
        rope_pages,
        page_table_SN,
        block_slot_B,
        block_start_B,
        block_len_B,
        block_pos_B,
        _scalar(page_offset),
    )
    return pl.pallas_call(
        functools.partial(_prefill_kernel, tile=tile, parts=parts, scale=scale * LOG2_E),
        grid=(H, B * parts),
        out_shape=jax.ShapeDtypeStruct(query_latent_THL.shape, query_latent_THL.dtype),
        input_output_aliases={0: 0},  # a program writes only where it has read its queries
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="mla_prefill",
    )(*inputs)


# ---- kernels ----


def _decode_kernel(
    query_latent_ref,
    query_rope_ref,
    latent_ref,
    rope_ref,
    table_ref,
    slot_ref,
    len_ref,
    offset_ref,
    out_ref,
    *part_refs,
    tile,
    split,
    scale,
):
    """Row r, `tile.rows` heads, one of the equal shares of the row's blocks of keys."""
    r, number = pl.program_id(1), pl.program_id(2)
    head = pl.program_id(0) * tile.rows + jnp.arange(tile.rows)
    is_head = head < query_latent_ref.shape[1]
    end = len_ref[r]
    num_blocks = pl.cdiv(end, tile.keys)
    shares, share = split.shares(num_blocks)

    @pl.when(number < shares)
    def _():
        query = (
            _load(query_latent_ref, (r, head[:, None]), is_head).astype(
                _product_dtype(query_latent_ref, latent_ref)
            ),
            _load(query_rope_ref, (r, head[:, None]), is_head),
        )
        pools = _Pools(latent_ref, rope_ref, table_ref, slot_ref[r], offset_ref[0], tile.keys)

        def attend(block, state):
            position, latent, rope = pools.load(block, end, query[0].dtype)
            return _update(state, _score(query, latent, rope, scale), (position < end)[None, :], latent)

        begin = number * share
        state = lax.fori_loop(begin, jnp.minimum(begin + share, num_blocks), attend, _start(query[0].shape))
        out, lse = _finish(state)
        _store(out_ref, (r, head[:, None]), is_head & (shares == 1) & (end > 0), out)
        if part_refs:
            part_ref, lse_ref, shares_ref = part_refs
            is_part = is_head & (shares > 1)
            _store(part_ref, (r, number, head[:, None]), is_part, out)
            plt.store(lse_ref.at[r, number, head], lse, mask=is_part)
            plt.store(shares_ref.at[r], shares)


def _prefill_kernel(
    query_latent_ref,
    query_rope_ref,
    latent_ref,
    rope_ref,
    table_ref,
    slot_ref,
    start_ref,
    len_ref,
    pos_ref,
    offset_ref,
    out_ref,
    *,
    tile,
    parts,
    scale,
):
    """Head h, `tile.rows` consecutive queries of one block. Late blocks, the longest, start first."""
    h, part = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)
    block, skipped = part // parts, part % parts * tile.rows
    length = jnp.clip(len_ref[block] - skipped, 0, tile.rows)
    start, pos = start_ref[block] + skipped, pos_ref[block] + skipped
    end = jnp.where(length > 0, pos + length, 0)
    row = jnp.arange(tile.rows)
    is_token = row < length
    at = ((start + row)[:, None], h)
    query = _load(query_latent_ref, at, is_token), _load(query_rope_ref, at, is_token)
    query = query[0].astype(_product_dtype(query_latent_ref, latent_ref)), query[1]
    pools = _Pools(latent_ref, rope_ref, table_ref, slot_ref[block], offset_ref[0], tile.keys)

    def attend(key_block, state):
        position, latent, rope = pools.load(key_block, end, query[0].dtype)
        allowed = position[None, :] <= (pos + row)[:, None]
        return _update(state, _score(query, latent, rope, scale), allowed, latent)

    out, _ = _finish(lax.fori_loop(0, pl.cdiv(end, tile.keys), attend, _start(query[0].shape)))
    _store(out_ref, at, is_token, out)


# ---- parts of a kernel ----


class _Pools(NamedTuple):
    """One sequence's latents and rope parts."""

    latent_ref: Any
    rope_ref: Any
    table_ref: Any
    slot: jax.Array
    page_offset: jax.Array
    keys: int

    def load(self, block, end, dtype):
        """Positions, latents and rope parts of one block in `dtype`; 0 from position `end` on."""
        position = block * self.keys + jnp.arange(self.keys)
        seen = position < end
        page_size = self.latent_ref.shape[1]
        page = plt.load(self.table_ref.at[self.slot, position // page_size], mask=seen, other=jnp.int32(0))
        at = ((page + self.page_offset)[:, None], (position % page_size)[:, None])
        latent, rope = (_load(ref, at, seen).astype(dtype) for ref in (self.latent_ref, self.rope_ref))
        return position, latent, rope


def _load(ref, index, is_row):
    """[rows, last dimension up to a power of two] of `ref[*index]`; 0 outside and in rows that are not."""
    size = ref.shape[-1]
    column = jnp.arange(_power_of_two(size))[None, :]
    mask = is_row[:, None] & (column < size)
    return plt.load(ref.at[*index, column], mask=mask, other=jnp.asarray(0, ref.dtype))


def _store(ref, index, is_row, value):
    size = ref.shape[-1]
    column = jnp.arange(_power_of_two(size))[None, :]
    plt.store(ref.at[*index, column], value.astype(ref.dtype), mask=is_row[:, None] & (column < size))


def _score(query, latent, rope, scale):
    return (_dot(query[0], latent.T) + _dot(query[1], rope.T)) * scale


def _dot(a, b):
    return plt.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _start(shape):
    """Online softmax before any key: (maximum, sum of weights, weighted latents)."""
    rows = shape[0]
    return (
        jnp.full((rows,), NEG_INF, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def _update(state, score, allowed, latent):
    old_maximum, total, out = state
    score = jnp.where(allowed, score, NEG_INF)
    maximum = jnp.maximum(old_maximum, score.max(axis=1))
    decay = jnp.exp2(old_maximum - maximum)
    weight = jnp.where(allowed, jnp.exp2(score - maximum[:, None]), 0.0)
    out = out * decay[:, None] + _dot(weight.astype(latent.dtype), latent)
    return maximum, total * decay + weight.sum(axis=1), out


def _finish(state):
    """The softmax's result, 0 without keys, and the base-2 logarithm of its denominator."""
    maximum, total, out = state
    total = jnp.maximum(total, 1e-30)
    return out / total[:, None], maximum + jnp.log2(total)


# ---- outside the kernels ----


def _scalar(value) -> jax.Array:
    return jnp.full((1,), value, jnp.int32)


def _product_dtype(query, pages):
    """Of the matrix products: the pool's, unless that is float8, which is widened where it is read."""
    return query.dtype if pages.dtype.itemsize == 1 else pages.dtype


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, and at least 16, as a matrix product needs."""
    return max(16, 1 << (n - 1).bit_length())
