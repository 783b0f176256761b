"""The gated product for Hopper GPUs, in Pallas-Mosaic.

One program for each multiprocessor takes tiles of the result in turn: 128 rows, and some columns of gate
with the same ones of up side by side, so that one tensor core instruction multiplies with both. Two
warpgroups compute 64 rows each, and one more keeps a ring of tiles filled, also with those of the next
result while this one is gated and stored. Row tiles of the same columns are neighbours in time: weights
are read once, x stays in the L2 cache.

Held for 0.4 s on one H200, whose power is what is short then (Llama-3.1-8B: 4,096 x 2 x 14,336), us, beside
what XLA's product and gate take, whatever cuBLASLt chose:

    rows           128            256            2,048
    bfloat16       64 (71)        97 (107)       700 (731)
    float8         36 (41)        54 (60)        371 (411)

At 64 rows both take 60 us. Two programs that share the weights' tiles (a cluster) take the same time, and
tiles of 64 columns 15 % more at 256 rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxserve.ops.hopper import NUM_SMS, ROWS, TILE_ROWS, cdiv, load_along, swizzled

GROUPS = 2  # warpgroups that compute
STAGES = 4  # of the ring
ROW_BYTES = 128  # of x and weight in a stage
COLUMNS = (128, 112, 96)  # of gate in a tile: two times 128 are what an instruction takes and registers hold
STORING = 8  # columns that could be multiplied while a tile is gated and stored
MIN_FILLED = 0.9  # of the multiprocessors on average. What was measured fills 0.97 of them


def fits(num_rows: int, weight_WK: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether `multiply` can compute this, and there are tiles enough for it to be the faster."""
    (W, K), dtype = weight_WK.shape, weight_WK.dtype
    return (
        dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn)
        and num_rows % (GROUPS * ROWS) == 0
        and K * dtype.itemsize % ROW_BYTES == 0
        and (columns := choose_columns(num_rows, W // 2)) > 0
        and _waves(num_rows, W // 2, columns)[1] >= MIN_FILLED
    )


def choose_columns(T: int, F: int) -> int:
    """Those of a tile that end soonest, 0 if none divide F."""
    divisors = [columns for columns in COLUMNS if F % columns == 0]
    cost = {columns: _waves(T, F, columns)[0] * (columns + STORING) for columns in divisors}
    return min(cost, key=cost.__getitem__, default=0)


def _waves(T: int, F: int, columns: int) -> tuple[int, float]:
    """How many tiles a program computes at most, and the part of all programs' that is."""
    tiles = T // (GROUPS * ROWS) * (F // columns)
    waves = -(-tiles // NUM_SMS)
    return waves, tiles / max(1, waves * NUM_SMS)


@functools.partial(jax.jit, static_argnames=("activation", "dtype", "columns", "programs", "interpret"))
def multiply(
    x_TK: jax.Array,
    weight_WK: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    activation,
    dtype: DTypeLike,
    *,
    columns: int,
    programs: int = NUM_SMS,
    interpret=None,
) -> jax.Array:
    """See `gated_product.multiply`."""
    (T, K), F = x_TK.shape, weight_WK.shape[0] // 2
    depth = ROW_BYTES // x_TK.dtype.itemsize
    assert x_TK.dtype == weight_WK.dtype and (x_TK.dtype == jnp.float8_e4m3fn) == (scales is not None)
    assert T % (GROUPS * ROWS) == 0 and F % columns == 0 and K % depth == 0
    run = plgpu.kernel(
        functools.partial(_kernel, activation=activation, programs=programs),
        out_type=jax.ShapeDtypeStruct((T, F), dtype),
        grid=(programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=swizzled((STAGES, GROUPS, ROWS, depth), x_TK.dtype),
            weight_smem=swizzled((STAGES, 2 * columns, depth), weight_WK.dtype),
            out_smem=swizzled((GROUPS, ROWS, columns), dtype),
            filled=plgpu.Barrier(num_arrivals=GROUPS + 2, num_barriers=STAGES),
            emptied=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="hopper_gated_product",
        interpret=interpret,
    )
    if scales is None:
        return run(x_TK, weight_WK)
    x_scale_T1, weight_scale_W = scales
    return run(x_TK, weight_WK, x_scale_T1.reshape(T), weight_scale_W)


def _kernel(x_ref, weight_ref, *refs, x_smem, weight_smem, out_smem, filled, emptied, activation, programs):
    *scale_refs, out_ref = refs
    columns, depth = out_smem.shape[-1], x_smem.shape[-1]
    (T, K), F = x_ref.shape, out_ref.shape[1]
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    blocks, steps = T // (GROUPS * ROWS), K // depth  # of rows; of a tile
    count = cdiv(blocks * (F // columns) - program, programs)

    def place(tile):
        """First row and column of this program's so many-th tile."""
        number = program + tile * programs
        row = lax.rem(number, jnp.int32(blocks)) * (GROUPS * ROWS)
        return row, lax.div(number, jnp.int32(blocks)) * columns

    def rows(first):
        return pl.ds(pl.multiple_of(first, ROWS), ROWS)

    def of_weight(first):
        return pl.ds(pl.multiple_of(first, TILE_ROWS), columns)

    def stage_of(step):
        return lax.rem(step, jnp.int32(STAGES))

    @pl.when(warpgroup < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        @pl.loop(0, count)
        def _(tile):
            row, column = place(tile)
            row += warpgroup * ROWS
            begin = tile * steps

            def multiply(sums):
                @pl.loop(begin, begin + steps)
                def _(step):
                    stage = stage_of(step)
                    plgpu.barrier_wait(filled.at[stage])
                    plgpu.wgmma(sums, x_smem.at[stage, warpgroup], weight_smem.at[stage].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # for all products but this step's
                    pl.when(step > begin)(lambda: plgpu.barrier_arrive(emptied.at[stage_of(step - 1)]))

                return sums[...]

            sums = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, 2 * columns), jnp.float32))
            plgpu.barrier_arrive(emptied.at[stage_of(begin + (steps - 1))])
            gate, up = sums[:, :columns], sums[:, columns:]
            if scale_refs:
                x_scale_ref, weight_scale_ref = scale_refs
                of_row = load_along(x_scale_ref.at[rows(row)], axis=0, shape=gate.shape)
                gate *= of_row * load_along(weight_scale_ref.at[of_weight(column)], axis=1, shape=gate.shape)
                up *= of_row * load_along(weight_scale_ref.at[of_weight(column + F)], axis=1, shape=up.shape)
            out = (activation(gate) * up).astype(out_smem.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for the tile before, whose place this takes
            out_smem[warpgroup] = out
            plgpu.commit_smem()
            target = out_ref.at[rows(row), of_weight(column)]
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], target)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, count)
        def _(tile):
            row, column = place(tile)

            @pl.loop(0, steps)
            def _(step):
                at = tile * steps + step
                stage = stage_of(at)
                part = pl.ds(pl.multiple_of(step * depth, depth), depth)
                pl.when(at >= STAGES)(lambda: plgpu.barrier_wait(emptied.at[stage]))
                for i in range(2):
                    source = weight_ref.at[of_weight(column + i * F), part]
                    target = weight_smem.at[stage, pl.ds(i * columns, columns)]
                    plgpu.copy_gmem_to_smem(source, target, filled.at[stage])
                for group in range(GROUPS):
                    source = x_ref.at[rows(row + group * ROWS), part]
                    plgpu.copy_gmem_to_smem(source, x_smem.at[stage, group], filled.at[stage])

        end = count * steps

        @pl.loop(jnp.maximum(end - STAGES, 0), end)
        def _(step):  # the program ends when all buffers are free again
            plgpu.barrier_wait(emptied.at[stage_of(step)])
