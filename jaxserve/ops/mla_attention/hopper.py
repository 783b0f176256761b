"""Latent attention for Hopper GPUs: a warp-specialised flash kernel in Pallas-Mosaic.

Heads share keys and values, so a query row is a pair (token, head). A program has 64 rows of one block: 4
tokens of 16 heads, half a token of 128. Two warpgroups compute, a third copies blocks of 64 keys, a page a
copy. The weighted sum of 64 rows is 64 x 512 float32, more than a warpgroup has registers: each holds one
half of the columns. Blocks go to the two in turn for scores and softmax; the weights, and the maximum that
they refer to, reach the other one through shared memory.

Shared memory, of 232,448 bytes: queries 64 x 576 take 73,728, two blocks of keys 147,456. What is left is too
little for the weights of both, so they take the place of the rope part of their block, which no one reads
after its scores. The halves of a block's latents are let go one by one, as each is a value of one warpgroup
only, so that the next block's first half arrives early. Registers of a thread, of 232: 128 for the sum, 32
for scores, 16 for weights.

Tensor cores need 2,176 cycles for 64 keys. Shared memory moves 128 bytes a cycle: 1,152 cycles for operands
of scores, 704 for weights and values, 576 for the copies. An SM gets perhaps 27 bytes a cycle from the second
level cache (not measured here), 72 KB in 2,700: the narrowest place, if nothing else waits.

While one warpgroup does its softmax, the other's products run.

Measured on one H200 (latent 512, rope 64, page size 16, one prompt of 2048, 4096, 8192 tokens in chunks of
2,048), TFLOP/s: 286, 389, 465 with 16 heads and 317, 413, 487 with 128; `fast.prefill` 131, 144, 151 and 147,
154, 154. Decode of 128 rows of 4096 tokens with 128 heads: 432, `fast.decode` 152. Scoring side 1's blocks
after the first half or all of what side 0 hands over: 359 and 354 of 389. Weights from registers: the same.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.ops.hopper import ROWS, TILE_ROWS, cdiv, clear_rows, columns, swizzled
from jaxserve.ops.mla_attention.fast import LOG2_E, NEG_INF

KEYS = 64  # of a block; as many as the rope part is wide, whose place the weights take
STAGES = 2  # blocks of keys in shared memory, one for each warpgroup that computes
SIDES = 2  # warpgroups that compute, halves of the latent
MIN_PROGRAMS = 64  # of a decode step: about half of 132 SMs; fewer do better with split keys


def fits(query_latent_THL, query_rope_THK, latent_pages) -> bool:
    """Whether shapes and dtypes are those that `prefill` here can compute."""
    T, H, L = query_latent_THL.shape
    page_size = latent_pages.shape[1]
    return (
        latent_pages.dtype in (jnp.bfloat16, jnp.float16)
        and L % (SIDES * 64) == 0
        and L <= SIDES * 256  # columns of one tensor core instruction
        and query_rope_THK.shape[-1] == KEYS
        and H % TILE_ROWS == 0
        and (ROWS % H == 0 or H % ROWS == 0)
        and T * H >= ROWS
        and page_size % TILE_ROWS == 0
        and KEYS % page_size == 0
    )


def fits_decode(query_latent_THL, query_rope_THK, latent_pages, num_rows: int) -> bool:
    """Whether `decode` here can compute so many rows, and they are enough to fill the GPU."""
    H = query_latent_THL.shape[1]
    return (
        H % ROWS == 0
        and num_rows * (H // ROWS) >= MIN_PROGRAMS
        and fits(query_latent_THL, query_rope_THK, latent_pages)
    )


def decode(
    query_latent_THL,
    query_rope_THK,
    latent_pages,
    rope_pages,
    page_table_SN,
    slot_R,
    context_len_R,
    **options,
):
    """See `mla_attention.decode`. A row is a block of one token; its keys are not split."""
    rows = jnp.arange(slot_R.shape[0], dtype=jnp.int32)
    blocks = (slot_R, rows, jnp.minimum(context_len_R, 1), context_len_R - 1)
    arrays = (query_latent_THL, query_rope_THK, latent_pages, rope_pages, page_table_SN)
    return prefill(*arrays, *blocks, block_size=1, **options)


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
    page_offset: int | jax.Array,
    scale: float,
    interpret=None,
):
    """See `mla_attention.prefill`."""
    T, H, L = query_latent_THL.shape
    page_size = latent_pages.shape[1]
    dtype, half = latent_pages.dtype, L // SIDES
    pages = KEYS // page_size

    def barriers(num_arrivals):
        return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=STAGES)

    run = plgpu.kernel(
        functools.partial(_kernel, H=H, scale=scale * LOG2_E),
        grid=(block_slot_B.shape[0], pl.cdiv(block_size * H, ROWS)),
        grid_names=("block", "part"),
        num_threads=SIDES + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            query_smem=swizzled((SIDES, ROWS, half), dtype),
            query_rope_smem=swizzled((ROWS, KEYS), dtype),
            latent_smem=swizzled((SIDES, STAGES, KEYS, half), dtype),
            rope_smem=swizzled((STAGES, KEYS, KEYS), dtype),
            maximum_smem=plgpu.SMEM((STAGES, ROWS), jnp.float32),
            total_smem=plgpu.SMEM((SIDES, ROWS), jnp.float32),
            query_ready=plgpu.Barrier(num_arrivals=SIDES + 1),
            filled=tuple(barriers(pages * copies) for copies in (1, 2)),  # the second side's with the rope
            emptied=tuple(barriers(1) for _ in range(SIDES)),
            weights_ready=barriers(1),
            total_ready=barriers(1),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="hopper_mla_prefill",
        interpret=interpret,
    )
    query_and_out = jax.new_ref(query_latent_THL.astype(dtype).reshape(T * H, L))
    run(
        query_and_out,
        query_rope_THK.astype(dtype).reshape(T * H, KEYS),
        latent_pages,
        rope_pages,
        page_table_SN,
        block_slot_B,
        block_start_B,
        block_len_B,
        block_pos_B,
        jnp.full((1,), page_offset, jnp.int32),
    )
    return jax.freeze(query_and_out).reshape(T, H, L).astype(query_latent_THL.dtype)


def _kernel(
    query_and_out_ref,
    query_rope_ref,
    latent_ref,
    rope_ref,
    table_ref,
    slot_ref,
    start_ref,
    len_ref,
    pos_ref,
    offset_ref,
    *,
    H,
    scale,
    **shared,
):
    """Late blocks, the longest, start first; the parts of one block run side by side.

    What a program copies of queries beyond its own may have been overwritten: it makes no use of them.
    """
    query_ref = out_ref = query_and_out_ref
    block = lax.axis_size("block") - 1 - lax.axis_index("block")
    row = lax.axis_index("part") * ROWS  # of the block's (token, head) rows, this program's first
    warpgroup = lax.axis_index("warpgroup")
    length, pos = len_ref[block], pos_ref[block]
    rows = length * H - row
    first_token = lax.div(row, jnp.int32(H))
    end = pos + cdiv(row + jnp.minimum(rows, ROWS), H)  # of the keys that the last row sees
    part = _Part(
        first=start_ref[block] * H + row,
        rows=rows,
        row=row,
        pos=pos,
        end=pos + length,
        num_clear=lax.div(pos + first_token + 1, jnp.int32(KEYS)),
        num_blocks=jnp.where(rows > 0, cdiv(end, KEYS), 0),
    )
    memory = _Memory(**shared)
    for side in range(SIDES):
        pl.when((warpgroup == side) & (rows > 0))(
            functools.partial(_compute, side, part, memory, out_ref, H=H, scale=scale)
        )

    @pl.when((warpgroup == SIDES) & (rows > 0))
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        first = pl.multiple_of(part.first, TILE_ROWS)
        for side in range(SIDES):
            plgpu.copy_gmem_to_smem(
                query_ref.at[pl.ds(first, ROWS), _half(side, query_ref)],
                memory.query_smem.at[side],
                memory.query_ready,
            )
        plgpu.copy_gmem_to_smem(
            query_rope_ref.at[pl.ds(first, ROWS)], memory.query_rope_smem, memory.query_ready
        )
        slot, offset = slot_ref[block], offset_ref[0]
        page_size = latent_ref.shape[1]
        last = lax.div(end - 1, jnp.int32(page_size))
        pages_of_block = KEYS // page_size

        @pl.loop(0, part.num_blocks)
        def _(key_block):
            stage = lax.rem(key_block, jnp.int32(STAGES))
            begin = key_block * pages_of_block
            # Past the end the last page comes again, instead of what the table holds there.
            pages = [table_ref[slot, jnp.minimum(begin + i, last)] + offset for i in range(pages_of_block)]
            for side in range(SIDES):
                pl.when(key_block >= STAGES)(
                    lambda side=side: plgpu.barrier_wait(memory.emptied[side].at[stage])
                )
                filled = memory.filled[side].at[stage]
                for i, page in enumerate(pages):
                    rows = pl.ds(i * page_size, page_size)
                    plgpu.copy_gmem_to_smem(
                        latent_ref.at[page, :, _half(side, latent_ref)],
                        memory.latent_smem.at[side, stage, rows],
                        filled,
                    )
                    if side == 1:  # here both sides have let go the weights, which lie in the rope's place
                        plgpu.copy_gmem_to_smem(rope_ref.at[page], memory.rope_smem.at[stage, rows], filled)

        for stage in range(STAGES):  # the program ends when all buffers are free again
            for side in range(SIDES):
                pl.when(part.num_blocks > stage)(
                    lambda side=side, stage=stage: plgpu.barrier_wait(memory.emptied[side].at[stage])
                )


class _Part(NamedTuple):
    """What a program computes: 64 rows, or those that the block still has."""

    first: Any  # row of the packed queries
    rows: Any  # rows from there to the block's end; more than 64 are other programs'
    row: Any  # the first one's number in its block
    pos: Any  # position of the block's first token
    end: Any  # of the block's context: nothing is written from there on
    num_clear: Any  # blocks of keys that every row sees
    num_blocks: Any  # blocks of keys that some row sees


class _Memory(NamedTuple):
    """Shared memory, [stages, ...], and barriers; a tuple or a leading axis of two is by side."""

    query_smem: Any
    query_rope_smem: Any
    latent_smem: Any
    rope_smem: Any
    maximum_smem: Any
    total_smem: Any
    query_ready: Any
    filled: Any
    emptied: Any
    weights_ready: Any
    total_ready: Any


class _State(NamedTuple):
    """Online softmax: this side's columns of the weighted sum; the maximum; the sum of own weights."""

    out: Any
    maximum: Any
    total: Any


def _compute(side, part, memory, out_ref, *, H, scale):
    """One side: scores and softmax of every second block of keys, half the columns of the sums of all."""
    plgpu.set_max_registers(232, action="increase")
    plgpu.barrier_wait(memory.query_ready)

    def score(key_block, masked):
        """Base-2 logits of a block of this side's, [ROWS, KEYS]."""
        stage = side

        def products(accumulator):
            for half in range(SIDES):
                plgpu.barrier_wait(memory.filled[half].at[stage])
                keys = memory.latent_smem.at[half, stage]
                plgpu.wgmma(accumulator, memory.query_smem.at[half], keys.transpose((1, 0)))
            plgpu.wgmma(accumulator, memory.query_rope_smem, memory.rope_smem.at[stage].transpose((1, 0)))
            return accumulator[...]

        logits = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, KEYS), jnp.float32)) * scale
        if masked:
            limit = lax.div(part.row + _iota(0), jnp.int32(H)) + (part.pos - key_block * KEYS)
            logits = jnp.where(_iota(1) <= limit, logits, NEG_INF)
        return logits

    def weigh(logits, maximum, total):
        """Hand the weights of an own block over; (decay, maximum, total)."""
        new_maximum = jnp.maximum(maximum, logits.max(axis=1))
        decay = jnp.exp2(maximum - new_maximum)
        weight = jnp.exp2(logits - columns(new_maximum, logits.shape))
        total = total * decay + weight.sum(axis=1)
        memory.rope_smem[side] = weight.astype(memory.rope_smem.dtype)
        memory.maximum_smem[side] = new_maximum
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.weights_ready.at[side])
        return decay, new_maximum, total

    def take(maximum, total):
        """The other side's weights are in their place; (decay, maximum, total)."""
        plgpu.barrier_wait(memory.weights_ready.at[1 - side])
        new_maximum = plgpu.load(
            memory.maximum_smem.at[1 - side], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
        )
        decay = jnp.exp2(maximum - new_maximum)
        return decay, new_maximum, total * decay

    def add(out, decay, stage, *, clear_from=None, **meanwhile):
        """The sum after a block; `clear_from`: its first key where nothing may be written."""
        value = memory.latent_smem.at[side, stage]
        if clear_from is not None:
            pl.when(clear_from < KEYS)(lambda: _clear(value, clear_from))
        weight = memory.rope_smem.at[stage]
        out, result = _accumulate(out * columns(decay, out.shape), weight, value, **meanwhile)
        plgpu.barrier_arrive(memory.emptied[side].at[stage])
        return out, result

    def first_of_pair(pair, state, *, masked, is_last):
        """The block that side 0 scores."""
        if side == 0:
            decay, maximum, total = weigh(score(pair * 2, masked), state.maximum, state.total)
        else:
            decay, maximum, total = take(state.maximum, state.total)
        clear_from = part.end - pair * 2 * KEYS if is_last else None
        out, _ = add(state.out, decay, 0, clear_from=clear_from)
        return _State(out, maximum, total)

    def attend(pair, state, *, masked):
        """Two blocks. Side 1 adds the first one while it makes weights of the scores of the second."""
        second = pair * 2 + 1
        if side == 0:
            out, maximum, total = first_of_pair(pair, state, masked=masked, is_last=False)
            decay, maximum, total = take(maximum, total)
        else:
            logits = score(second, masked)
            decay, maximum, total = take(state.maximum, state.total)
            out, (decay, maximum, total) = add(
                state.out,
                decay,
                0,
                meanwhile=functools.partial(weigh, logits, maximum, total),
                like=(decay, maximum, total),
            )
        out, _ = add(out, decay, 1, clear_from=part.end - second * KEYS if masked else None)
        return _State(out, maximum, total)

    pairs = lax.div(part.num_blocks, jnp.int32(2))
    clear_pairs = jnp.minimum(lax.div(part.num_clear, jnp.int32(2)), pairs)
    # Only pairs that the diagonal crosses pay for a mask.
    state = _start(memory.query_smem.shape[-1])
    state = lax.fori_loop(0, clear_pairs, functools.partial(attend, masked=False), state)
    state = lax.fori_loop(clear_pairs, pairs, functools.partial(attend, masked=True), state)
    odd = functools.partial(first_of_pair, masked=True, is_last=True)
    state = lax.fori_loop(pairs, cdiv(part.num_blocks, 2), odd, state)

    memory.total_smem[side] = state.total
    plgpu.commit_smem()
    plgpu.barrier_arrive(memory.total_ready.at[side])
    plgpu.barrier_wait(memory.total_ready.at[1 - side])
    other = plgpu.load(memory.total_smem.at[1 - side], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    # No product reads queries any more: the result takes their place.
    rows = memory.query_smem.at[side]
    rows[...] = (state.out / columns(state.total + other, state.out.shape)).astype(rows.dtype)
    plgpu.commit_smem()
    half = _half(side, out_ref)

    @pl.when(part.rows >= ROWS)
    def _():
        plgpu.copy_smem_to_gmem(rows, out_ref.at[pl.ds(pl.multiple_of(part.first, TILE_ROWS), ROWS), half])

    @pl.when(part.rows < ROWS)
    def _():  # the rows after them are another program's
        @pl.loop(0, lax.div(part.rows, jnp.int32(TILE_ROWS)))
        def _(i):
            source, target = (pl.multiple_of(first + i * TILE_ROWS, TILE_ROWS) for first in (0, part.first))
            plgpu.copy_smem_to_gmem(
                rows.at[pl.ds(source, TILE_ROWS)], out_ref.at[pl.ds(target, TILE_ROWS), half]
            )

    plgpu.wait_smem_to_gmem(0)


def _start(half):
    """Online softmax before any key."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    return _State(
        plgpu.layout_cast(jnp.full((ROWS, half), 0, jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), NEG_INF, jnp.float32), rows),
        plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), rows),
    )


def _accumulate(out, weight, value_ref, meanwhile=None, like=()):
    """out + weight @ value, and what `meanwhile()` returns, which runs under the product.

    `like`: arrays of the shapes and types that it returns.
    """

    def product(refs):
        accumulator, *results = refs
        plgpu.wgmma(accumulator, weight, value_ref)
        if meanwhile is not None:
            for ref, value in zip(results, meanwhile()):
                ref[...] = value

    out, *results = pl.run_state(product)((plgpu.WGMMAAccumulatorRef.init(out), *like))
    return out, results


def _clear(value_ref, count):
    for column in range(0, value_ref.shape[-1], 64):  # as few registers as may be
        clear_rows(value_ref.at[:, pl.ds(column, 64)], count)


def _half(side, ref):
    """The columns of one side."""
    half = ref.shape[-1] // SIDES
    return pl.ds(side * half, half)


def _iota(dimension):
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), dimension, layout=plgpu.Layout.WGMMA)
