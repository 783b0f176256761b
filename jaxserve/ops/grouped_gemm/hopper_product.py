"""A grouped matrix product for Hopper GPUs, in Pallas-Mosaic.

Rows lie in blocks, each of one expert and beginning at a multiple of its size, so that hardware copies
whole tiles to shared memory. A program computes some columns of one block: a warpgroup for each 64 rows,
and one more that keeps a ring of tiles filled. Blocks without rows end at once. What a block has beyond
its expert's rows is computed from whatever memory holds, and never read.

One program for each multiprocessor that takes tiles in turn, as `gated_product` has it, loses a tenth at
2,048 tokens: blocks have different numbers of rows, and the hardware shares them out better.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxserve.ops.grouped_gemm.rows import Places
from jaxserve.ops.hopper import ROWS, load_along, swizzled

MAX_COLUMNS = 256  # of all matrices of a product: what an instruction takes, and a warpgroup's registers hold
BLOCK = 128  # numbers that share a scale, where blocks of a matrix have their own
STORED = 128  # columns of a result at a time: what the ring leaves of shared memory
FEW = 16  # rows of a first copy for a warpgroup: its others are not copied where a block has no more
SCALES = 32  # a copy of blocks' scales is a multiple of so many
ALIGNED = 4  # and begins at a multiple of so many
MAX_DEPTH = BLOCK * (256 - ALIGNED + 1)  # of matrices with blocks: a copy is of 256 numbers at most


class Tile(NamedTuple):
    """How a product is cut: warpgroups that compute, output columns, columns of one iteration, ring size."""

    groups: int
    columns: int
    depth: int
    stages: int

    @property
    def block_rows(self) -> int:
        return ROWS * self.groups


class Rows(NamedTuple):
    """What is multiplied, [M, K]; float8 numbers have a scale a row, [1, M], or each 128, [K / 128, M]."""

    values_MK: jax.Array
    scale_SM: jax.Array | None = None


class Matrices(NamedTuple):
    """Of one shape, [E, N, K]; those in float8 with a scale a channel, [E, N, 1], or for each block of
    128 x 128, [E, N / 128, K / 128], rounded up.

    Joined ones lie one after the other in one array, [E, count * N, K], which is named `count` times.
    """

    values: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...] = ()
    is_joined: bool = False

    @classmethod
    def joined(cls, values: jax.Array, scales: jax.Array, count: int) -> "Matrices":
        return cls((values,) * count, (scales,) * count, True)

    @property
    def num_columns(self) -> int:
        return self.values[0].shape[1] // (len(self.values) if self.is_joined else 1)

    @property
    def begins(self) -> tuple[int, ...]:
        """Where in its array each of them begins."""
        return tuple(i * self.num_columns if self.is_joined else 0 for i in range(len(self.values)))

    @property
    def has_blocks(self) -> bool:
        return bool(self.scales) and self.scales[0].shape[1] != self.values[0].shape[1]


def alone(product: jax.Array) -> jax.Array:
    """The finish of one matrix."""
    return product


def multiply(
    rows: Rows,
    matrices: Matrices,
    places: Places,
    finish,
    dtype: DTypeLike,
    tile: Tile,
    *,
    name: str,
    interpret=None,
) -> jax.Array:
    """finish(x @ matrix.T, ...) of each block's rows and its expert's matrices, [M, N] in `dtype`."""
    x_MK, count = rows.values_MK, len(matrices.values)
    (M, K), N = x_MK.shape, matrices.num_columns
    width = count * tile.columns
    assert N % tile.columns == 0 and K % tile.depth == 0 and width <= MAX_COLUMNS
    copies = 2 * tile.groups + count
    scratch, scales = {}, ()
    if matrices.has_blocks:
        # An iteration sees one scale of each row and matrix; sums are held twice.
        assert tile.depth == BLOCK and BLOCK % tile.columns == 0 and width <= MAX_COLUMNS // 2
        copies += 1
        length = pl.cdiv(K // BLOCK + ALIGNED - 1, SCALES) * SCALES
        flat = [scale.reshape(-1) for scale in matrices.scales]
        missing = max(length, pl.cdiv(flat[0].size, ALIGNED) * ALIGNED) - flat[0].size
        scales = rows.scale_SM, *(jnp.pad(scale, (0, missing)) for scale in flat)
        scratch = dict(
            row_scale_smem=plgpu.SMEM((tile.stages, tile.groups * ROWS), jnp.float32),
            block_scale_smem=plgpu.SMEM((count, length), jnp.float32),
            scaled=plgpu.Barrier(num_arrivals=count),
        )
    elif matrices.scales:
        assert not matrices.is_joined
        scales = rows.scale_SM, *(scale.reshape(-1, N) for scale in matrices.scales)
    run = plgpu.kernel(
        functools.partial(
            _kernel,
            begins=matrices.begins,
            block_rows=matrices.scales[0].shape[1] if matrices.has_blocks else None,
            finish=finish,
            tile=tile,
        ),
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(places.expert_B.shape[0], N // tile.columns),
        grid_names=("block", "column"),
        num_threads=tile.groups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=swizzled((tile.stages, tile.groups, ROWS, tile.depth), x_MK.dtype),
            matrix_smem=swizzled((tile.stages, width, tile.depth), x_MK.dtype),
            out_smem=swizzled((tile.groups, ROWS, min(tile.columns, STORED)), dtype),
            filled=plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            emptied=plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.stages),
            **scratch,
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name=name,
        interpret=interpret,
    )
    return run(x_MK, *matrices.values, *scales, places.expert_B, places.start_B, places.end_B)


def _kernel(
    x_ref,
    *refs,
    x_smem,
    matrix_smem,
    out_smem,
    filled,
    emptied,
    begins,
    block_rows,
    finish,
    tile,
    row_scale_smem: Any = None,
    block_scale_smem: Any = None,
    scaled: Any = None,
):
    """`begins`: of the matrices in their arrays. `block_rows`: of an expert's scales, None without blocks."""
    count, has_blocks = len(begins), block_rows is not None
    matrix_refs, (*scale_refs, expert_ref, start_ref, end_ref, out_ref) = refs[:count], refs[count:]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    first_column = pl.multiple_of(lax.axis_index("column") * tile.columns, tile.columns)
    first_row = block * (tile.groups * ROWS)
    num_rows = end_ref[block] - start_ref[block]
    steps = x_ref.shape[1] // tile.depth

    def rows(first, size):
        return pl.ds(pl.multiple_of(first_row + first, size), size)

    def stage_of(step):
        return lax.rem(step, jnp.int32(tile.stages))

    def place_of_scales(begin):
        """Of a matrix's first scale here: where a copy that holds it begins, and its place in there."""
        row = expert_ref[block] * block_rows + lax.div(first_column + begin, jnp.int32(BLOCK))
        start = lax.div(row * steps, jnp.int32(ALIGNED)) * ALIGNED
        start = jnp.minimum(start, scale_refs[1].shape[0] - block_scale_smem.shape[1])
        return pl.multiple_of(start, ALIGNED), row * steps - start

    @pl.when((warpgroup < tile.groups) & (num_rows > 0))
    def _compute():
        if tile.groups > 1:  # else two programs may fit on a multiprocessor
            plgpu.set_max_registers(232, action="increase")
        my_rows = rows(warpgroup * ROWS, ROWS)

        def add_product(sums, stage):
            """Returns at once."""
            plgpu.wgmma(sums, x_smem.at[stage, warpgroup], matrix_smem.at[stage].transpose((1, 0)))

        def apart(sums):
            """Of each matrix, [ROWS, columns]."""
            return [sums[:, i * tile.columns : (i + 1) * tile.columns] for i in range(count)]

        def sum_up(sums):
            @pl.loop(0, steps)
            def _(step):
                stage = stage_of(step)
                plgpu.barrier_wait(filled.at[stage])
                add_product(sums, stage)
                plgpu.wgmma_wait(1)  # for all products but this step's
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(emptied.at[stage_of(step - 1)]))

            return sums[...]

        def add_scaled_product(step, totals, first_scales):
            stage = stage_of(step)
            plgpu.barrier_wait(filled.at[stage])

            def product(sums):
                add_product(sums, stage)
                return sums[...]

            sums = pl.run_scoped(product, accumulator)
            scales = row_scale_smem.at[stage, pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)]
            of_row = load_along(scales, axis=0, shape=totals[0].shape)
            plgpu.barrier_arrive(emptied.at[stage])
            return tuple(
                total + part * (of_row * block_scale_smem[i, first_scales[i] + step])
                for i, (total, part) in enumerate(zip(totals, apart(sums)))
            )

        accumulator = plgpu.WGMMAAccumulatorRef((ROWS, count * tile.columns), jnp.float32)
        if has_blocks:
            plgpu.barrier_wait(scaled)
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, tile.columns), jnp.float32), plgpu.Layout.WGMMA)
            add = functools.partial(
                add_scaled_product, first_scales=[place_of_scales(begin)[1] for begin in begins]
            )
            sums = lax.fori_loop(0, steps, add, (zeros,) * count)
        else:
            sums = apart(pl.run_scoped(sum_up, accumulator))
            plgpu.barrier_arrive(emptied.at[(steps - 1) % tile.stages])
            if scale_refs:
                shape, columns = sums[0].shape, pl.ds(first_column, tile.columns)
                of_row = load_along(scale_refs[0].at[0, my_rows], axis=0, shape=shape)
                expert = expert_ref[block]
                of_column = [load_along(r.at[expert, columns], axis=1, shape=shape) for r in scale_refs[1:]]
                sums = [part * (of_row * scale) for part, scale in zip(sums, of_column)]
        out, width = finish(*sums).astype(out_smem.dtype), out_smem.shape[-1]
        for column in range(0, tile.columns, width):
            out_smem[warpgroup] = out[:, column : column + width]
            plgpu.commit_smem()
            target = out_ref.at[my_rows, pl.ds(first_column + column, width)]
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=column + width < tile.columns)

    @pl.when((warpgroup == tile.groups) & (num_rows > 0))
    def _copy():
        if tile.groups > 1:
            plgpu.set_max_registers(40, action="decrease")
        expert = expert_ref[block]
        if has_blocks:
            for i, (scale_ref, begin) in enumerate(zip(scale_refs[1:], begins)):
                source = scale_ref.at[pl.ds(place_of_scales(begin)[0], block_scale_smem.shape[1])]
                plgpu.copy_gmem_to_smem(source, block_scale_smem.at[i], scaled)

        @pl.loop(0, steps)
        def _(step):
            stage = stage_of(step)
            depth = pl.ds(pl.multiple_of(step * tile.depth, tile.depth), tile.depth)
            pl.when(step >= tile.stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            for i, (matrix_ref, begin) in enumerate(zip(matrix_refs, begins)):
                columns = pl.ds(pl.multiple_of(first_column + begin, tile.columns), tile.columns)
                source = matrix_ref.at[expert, columns, depth]
                target = matrix_smem.at[stage, pl.ds(i * tile.columns, tile.columns)]
                plgpu.copy_gmem_to_smem(source, target, filled.at[stage])
            for group, (row, size) in itertools.product(range(tile.groups), ((0, FEW), (FEW, ROWS - FEW))):
                first = group * ROWS + row
                source = x_ref.at[pl.ds(pl.multiple_of(first_row + first, FEW), size), depth]
                target = x_smem.at[stage, group, pl.ds(row, size)]

                @pl.when(first < num_rows)
                def _(source=source, target=target):
                    plgpu.copy_gmem_to_smem(source, target, filled.at[stage])

                pl.when(first >= num_rows)(lambda: plgpu.barrier_arrive(filled.at[stage]))
            if has_blocks:
                source = scale_refs[0].at[step, rows(0, tile.groups * ROWS)]
                plgpu.copy_gmem_to_smem(source, row_scale_smem.at[stage], filled.at[stage])

        for stage in range(min(tile.stages, steps)):  # the program ends when all buffers are free again
            plgpu.barrier_wait(emptied.at[stage])
