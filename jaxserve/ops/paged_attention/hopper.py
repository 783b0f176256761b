"""Prefill attention for Hopper GPUs: a warp-specialised flash kernel in Pallas-Mosaic.

A program has the queries of one block and one head: two warpgroups of 64 rows each, and a third that
copies keys and values from the pool into a ring of shared-memory buffers, a page a copy. The two take
turns at the tensor cores: while one computes its softmax, the other's matrix products run.

Products and sums accumulate in float32, the softmax runs in base 2. Only what `fits` says is computed
here; the rest is `fast.prefill`'s.

Measured on one H200 (H32 G8 K128, page size 16, one prompt of 2048, 4096, 8192 tokens), TFLOP/s: 260, 397,
494; `fast.prefill` 180, 244, 286. Tile(64, 4): 240, 363, 438.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.ops.hopper import ROWS, TILE_ROWS, cdiv, clear_rows, columns, store_rows, swizzled
from jaxserve.ops.paged_attention.fast import LOG2_E, NEG_INF

GROUPS = 2  # warpgroups that compute
BLOCK = ROWS * GROUPS


class Tile(NamedTuple):
    """How the kernel is cut: keys of one iteration, and buffers of as many keys in the ring."""

    keys: int = 128
    stages: int = 2


def fits(query_THK, key_pages, block_size: int) -> bool:
    """Whether shapes and dtypes are those that `prefill` here can compute."""
    T, _, K = query_THK.shape
    page_size = key_pages.shape[1]
    return (
        key_pages.dtype in (jnp.bfloat16, jnp.float16)
        and K in (64, 128)
        and block_size == BLOCK
        and T >= BLOCK
        and T % TILE_ROWS == 0
        and page_size % TILE_ROWS == 0
        and Tile().keys % page_size == 0
    )


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
    page_offset: int | jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H=None,
    interpret=None,
    tile: Tile | None = None,
):
    """See `paged_attention.prefill`; blocks are of `BLOCK` tokens."""
    _, H, K = query_THK.shape
    page_size, G = key_pages.shape[1:3]
    tile = tile or Tile()
    dtype = key_pages.dtype
    ring = swizzled((tile.stages, tile.keys, K), dtype)
    filled = plgpu.Barrier(num_arrivals=tile.keys // page_size, num_barriers=tile.stages)
    emptied = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=tile.stages)
    run = plgpu.kernel(
        functools.partial(_kernel, tile=tile, group=H // G, scale=scale, window=window, softcap=softcap),
        grid=(block_slot_B.shape[0], H),
        grid_names=("block", "head"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            query_smem=swizzled((GROUPS, ROWS, K), dtype),
            rows_smem=plgpu.SMEM((GROUPS, ROWS, K), dtype),
            key_smem=ring,
            value_smem=ring,
            query_ready=plgpu.Barrier(num_barriers=GROUPS),
            key_filled=filled,
            value_filled=filled,
            key_emptied=emptied,
            value_emptied=emptied,
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="hopper_prefill",
        interpret=interpret,
    )
    sinks = jnp.full((H,), NEG_INF, jnp.float32) if sinks_H is None else sinks_H.astype(jnp.float32)
    query_and_out = jax.new_ref(query_THK.astype(dtype))
    run(
        query_and_out,
        key_pages,
        value_pages,
        page_table_SN,
        block_slot_B,
        block_start_B,
        block_len_B,
        block_pos_B,
        sinks,
        jnp.full((1,), page_offset, jnp.int32),
    )
    return jax.freeze(query_and_out).astype(query_THK.dtype)


def _kernel(
    query_and_out_ref,
    key_ref,
    value_ref,
    table_ref,
    slot_ref,
    start_ref,
    len_ref,
    pos_ref,
    sink_ref,
    offset_ref,
    *,
    query_smem,
    rows_smem,
    key_smem,
    value_smem,
    query_ready,
    key_filled,
    value_filled,
    key_emptied,
    value_emptied,
    turn,
    tile,
    group,
    scale,
    window,
    softcap,
):
    """Late blocks, the longest, start first; the heads of one block run side by side.

    What a program copies of queries beyond its own may have been overwritten: it makes no use of them.
    """
    query_ref = out_ref = query_and_out_ref
    block = lax.axis_size("block") - 1 - lax.axis_index("block")
    head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    length, pos = len_ref[block], pos_ref[block]
    end = pos + length
    first = (
        jnp.int32(0) if window is None else lax.div(jnp.maximum(pos - window + 1, 0), jnp.int32(tile.keys))
    )
    steps = jnp.where(length > 0, cdiv(end, tile.keys) - first, 0)

    @pl.when((warpgroup < GROUPS) & (steps > 0))
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        start = start_ref[block] + warpgroup * ROWS
        row = pos + warpgroup * ROWS  # position of this warpgroup's first query
        query = query_smem.at[warpgroup]
        rows = rows_smem.at[warpgroup]
        # A copy into or out of swizzled memory moves whole tiles of 8 rows; others go through `rows`.
        in_tiles = lax.rem(start, jnp.int32(TILE_ROWS)) == 0

        @pl.when(in_tiles)
        def _():
            begin = pl.multiple_of(start, TILE_ROWS)
            plgpu.copy_gmem_to_smem(query_ref.at[pl.ds(begin, ROWS), head], query, query_ready.at[warpgroup])
            plgpu.barrier_wait(query_ready.at[warpgroup])

        @pl.when(jnp.logical_not(in_tiles))
        def _():
            plgpu.copy_gmem_to_smem(query_ref.at[pl.ds(start, ROWS), head], rows, query_ready.at[warpgroup])
            plgpu.barrier_wait(query_ready.at[warpgroup])
            query[...] = plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)
            plgpu.commit_smem()

        def attend(step, state, *, masked):
            out, maximum, total = state
            stage = lax.rem(step, jnp.int32(tile.stages))
            first_key = (first + step) * tile.keys
            plgpu.barrier_wait(key_filled.at[stage])

            def products(accumulator):
                plgpu.wgmma(accumulator, query, key_smem.at[stage].transpose((1, 0)))
                plgpu.barrier_arrive(turn.at[1 - warpgroup])
                return accumulator[...]

            logits = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, tile.keys), jnp.float32))
            plgpu.barrier_arrive(key_emptied.at[stage])
            logits = _score(logits, scale, softcap)
            if masked:
                query_pos = row + _iota(0, tile)
                key_pos = first_key + _iota(1, tile)
                seen = key_pos <= query_pos
                if window is not None:
                    seen &= key_pos > query_pos - window
                logits = jnp.where(seen, logits, NEG_INF)
            new_maximum = jnp.maximum(maximum, logits.max(axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            weight = jnp.exp2(logits - columns(new_maximum, logits.shape))
            total = total * decay + weight.sum(axis=1)
            weight = weight.astype(key_smem.dtype)
            plgpu.barrier_wait(value_filled.at[stage])
            if masked:
                pl.when(first_key + tile.keys > end)(
                    lambda: clear_rows(value_smem.at[stage], end - first_key)
                )
            plgpu.barrier_wait(turn.at[warpgroup])
            summed = _weighted_sum(weight, value_smem.at[stage])
            plgpu.barrier_arrive(value_emptied.at[stage])
            return out * columns(decay, out.shape) + summed, new_maximum, total

        # Only steps that the diagonal or the window's edge crosses pay for a mask.
        masked, clear = (functools.partial(attend, masked=flag) for flag in (True, False))
        clear_end = jnp.clip(lax.div(row + 1, jnp.int32(tile.keys)) - first, 0, steps)
        clear_begin = jnp.int32(0)
        state = _start(sink_ref[head] * LOG2_E, query_smem.shape[-1])
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(turn.at[1]))
        if window is not None:
            edge = cdiv(jnp.maximum(row + ROWS - window, 0), tile.keys) - first
            clear_begin = jnp.clip(edge, 0, clear_end)
            state = lax.fori_loop(0, clear_begin, masked, state)
        state = lax.fori_loop(clear_begin, clear_end, clear, state)
        out, _, total = lax.fori_loop(clear_end, steps, masked, state)
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(turn.at[1]))

        out = (out / columns(total, out.shape)).astype(out_ref.dtype)
        own = length - warpgroup * ROWS  # the rows after them are another program's

        @pl.when((own >= ROWS) & in_tiles)
        def _():
            query[...] = out
            plgpu.commit_smem()
            begin = pl.multiple_of(start, TILE_ROWS)
            plgpu.copy_smem_to_gmem(query, out_ref.at[pl.ds(begin, ROWS), head])

        @pl.when((own > 0) & ((own < ROWS) | jnp.logical_not(in_tiles)))
        def _():
            store_rows(rows, out)
            plgpu.commit_smem()

            @pl.when(own >= ROWS)
            def _():
                plgpu.copy_smem_to_gmem(rows, out_ref.at[pl.ds(start, ROWS), head])

            @pl.loop(0, jnp.where(own < ROWS, own, 0))
            def _(row):
                plgpu.copy_smem_to_gmem(rows.at[row], out_ref.at[start + row, head])

        plgpu.wait_smem_to_gmem(0)

    @pl.when((warpgroup == GROUPS) & (steps > 0))
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        slot, offset = slot_ref[block], offset_ref[0]
        kv_head = lax.div(head, jnp.int32(group))
        page_size = key_ref.shape[1]
        last = lax.div(end - 1, jnp.int32(page_size))
        pages_of_step = tile.keys // page_size

        @pl.loop(0, steps)
        def _(step):
            stage = lax.rem(step, jnp.int32(tile.stages))
            begin = (first + step) * pages_of_step
            # Past the end the last page comes again, instead of what the table holds there.
            pages = [table_ref[slot, jnp.minimum(begin + i, last)] + offset for i in range(pages_of_step)]
            for pool_ref, smem, filled, emptied in (
                (key_ref, key_smem, key_filled, key_emptied),
                (value_ref, value_smem, value_filled, value_emptied),
            ):
                pl.when(step >= tile.stages)(lambda emptied=emptied: plgpu.barrier_wait(emptied.at[stage]))
                for i, page in enumerate(pages):
                    plgpu.copy_gmem_to_smem(
                        pool_ref.at[page, :, kv_head],
                        smem.at[stage, pl.ds(i * page_size, page_size)],
                        filled.at[stage],
                    )

        for stage in range(tile.stages):  # the program ends when all buffers are free again
            for emptied in (key_emptied, value_emptied):
                pl.when(steps > stage)(
                    lambda emptied=emptied, stage=stage: plgpu.barrier_wait(emptied.at[stage])
                )


def _start(sink, K):
    """Online softmax after the sink alone: (weighted values, maximum, sum of weights)."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(jnp.full((ROWS, K), 0, jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), sink, jnp.float32), rows),
        plgpu.layout_cast(jnp.full((ROWS,), 1, jnp.float32), rows),
    )


def _score(product, scale, softcap):
    """From products of query and key to base-2 logits."""
    if softcap is None:
        return product * (scale * LOG2_E)
    return jnp.tanh(product * (scale / softcap)) * (softcap * LOG2_E)


def _weighted_sum(weight, value_ref):
    """weight [ROWS, keys] in registers times values [keys, K] in shared memory."""

    def product(accumulator):
        plgpu.wgmma(accumulator, weight, value_ref)
        return accumulator[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, value_ref.shape[-1]), jnp.float32))


def _iota(dimension, tile):
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, tile.keys), dimension, layout=plgpu.Layout.WGMMA)
