"""Experts for Hopper GPUs: two grouped matrix products in Pallas-Mosaic.

Tokens are first copied to the rows of their experts: a block of rows belongs to one expert and begins at a
multiple of its size, so that hardware copies whole tiles to shared memory. A program computes some columns
of one block: a warpgroup for each 64 rows, and one more that keeps a ring of tiles filled. Blocks without
rows end at once. What a block has beyond its expert's rows is computed from whatever memory holds, and
never read.

Only what `fits` says is computed here; the rest is `fast.feed_forward`'s.

Measured on H200s (DeepSeek-V2-Lite: 64 experts, 6 a token), us a layer, `fast.feed_forward` in brackets,
tokens that spread and such that choose the same six: 315 and 86 (303 and 123) at 128, 321 and 108 (321 and
130) at 256, 380 and 220 (414 and 273) at 1,024, 542 and 387 (660 and 472) at 2,048, where products alone
would take 304 at 700 TFLOP/s. At 64 tokens there is nothing to win. docs/performance.md has more.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as plt

from jaxserve.ops.grouped_gemm.parts import WORKSPACE_BYTES, in_parts, num_parts
from jaxserve.ops.grouped_gemm.rows import Places
from jaxserve.ops.grouped_gemm.rows_fast import place
from jaxserve.ops.hopper import ROWS, swizzled

MIN_ROWS = 12  # of an expert on average, were they spread evenly
MAX_COLUMNS = 256  # of all matrices of a product: what a warpgroup's registers hold
STORED = 128  # columns of a result at a time: what the ring leaves of shared memory
PIECE = 16  # rows of a copy: those of a block that has fewer are not copied


class Tile(NamedTuple):
    """How a product is cut: warpgroups that compute, output columns, columns of one iteration, ring size."""

    groups: int
    columns: int
    depth: int
    stages: int


def choose_tiles(rows_per_expert: float, weights) -> tuple[Tile, Tile]:
    """Of the product with gate and up, and the one with down.

    An expert of few rows is read at the memory's speed, which wants wide rows of its matrices; one of many
    wants each tile used for many products.
    """
    _, F, D = weights.gate_EFD.shape
    if rows_per_expert >= 64:
        sizes = ((2, 128, 64, 4), (2, 256, 64, 4))
    else:
        sizes = ((1, 64, 128, 4), (1, 128, 128, 4))
    return tuple(  # pyright: ignore[reportReturnType]
        Tile(groups, _divisor(N, columns), _divisor(K, depth), stages)
        for (groups, columns, depth, stages), N, K in zip(sizes, (F, D), (D, F))
    )


def fits(hidden_TD, weights, rows_per_expert: float) -> bool:
    """Whether `feed_forward` here can compute this, and experts have rows enough for it to be the faster."""
    _, F, D = weights.gate_EFD.shape
    return (
        hidden_TD.dtype in (jnp.bfloat16, jnp.float16)
        and weights.gate_EFD.dtype == hidden_TD.dtype
        and weights.gate_bias_EF is None
        and weights.gate_scale is None
        and F % 64 == 0
        and D % 64 == 0
        and rows_per_expert >= MIN_ROWS
    )


@functools.partial(jax.jit, static_argnames=("activation", "interpret", "tiles", "workspace_bytes"))
def feed_forward(
    hidden_TD,
    expert_TX,
    weight_TX,
    weights,
    activation,
    tiles: tuple[Tile, Tile],
    *,
    interpret=None,
    workspace_bytes: int = WORKSPACE_BYTES,
):
    """See `grouped_gemm.feed_forward`."""
    (T, X), (E, F, D) = expert_TX.shape, weights.gate_EFD.shape
    parts = num_parts(T, X * (2 * D + F) * hidden_TD.dtype.itemsize, workspace_bytes)
    if parts > 1:
        options = dict(interpret=interpret, workspace_bytes=workspace_bytes)
        return in_parts(
            lambda *tokens: feed_forward(*tokens, weights, activation, tiles, **options),
            parts,
            hidden_TD,
            expert_TX,
            weight_TX,
        )
    up_tile, down_tile = tiles
    is_interpreted = interpret is not None
    places = place(expert_TX, E, ROWS * up_tile.groups, interpret=is_interpreted)
    row_TX = places.row_M.reshape(T, X)
    x_MD = _copy_rows(hidden_TD, expert_TX, row_TX, places.num_rows, interpret=is_interpreted)
    product = functools.partial(_product, places=places, interpret=interpret)
    up = weights.gate_EFD, weights.up_EFD
    inner_MF = product(x_MD, up, finish=activation, tile=up_tile, name="hopper_experts_up")
    down = (weights.down_EDF,)
    out_MD = product(inner_MF, down, finish=lambda down: down, tile=down_tile, name="hopper_experts_down")
    is_named = expert_TX >= 0
    out_TXD = out_MD[jnp.where(is_named, row_TX, 0)].astype(jnp.float32)
    out_TXD *= weight_TX.astype(jnp.float32)[..., None]
    return jnp.sum(jnp.where(is_named[..., None], out_TXD, 0), axis=1)


def _copy_rows(hidden_TD, expert_TX, row_TX, num_rows, *, interpret):
    """Each token at the rows of its experts, [num_rows, D]; other rows are unset."""
    T, D = hidden_TD.shape
    return pl.pallas_call(
        _copy_kernel,
        grid=(T,),
        out_shape=jax.ShapeDtypeStruct((num_rows, D), hidden_TD.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="experts_copy",
    )(hidden_TD, expert_TX, row_TX)


def _copy_kernel(hidden_ref, expert_ref, row_ref, out_ref):
    token, D = pl.program_id(0), hidden_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(D))
    is_column = column < D
    value = plt.load(hidden_ref.at[token, column], mask=is_column, other=jnp.asarray(0, hidden_ref.dtype))
    for choice in range(expert_ref.shape[1]):
        is_named = expert_ref[token, choice] >= 0
        # What is not stored points past the end: in interpret mode it is read and written back.
        row = jnp.where(is_named, row_ref[token, choice], out_ref.shape[0])
        plt.store(out_ref.at[row, column], value, mask=is_column & is_named)


def _product(x_MK, matrices, *, places: Places, finish, tile: Tile, name, interpret):
    """finish(x @ matrix.T, ...) of each block's rows and its expert's matrices, [M, N]."""
    (M, K), N, dtype = x_MK.shape, matrices[0].shape[1], x_MK.dtype
    num_matrices = len(matrices)
    assert N % tile.columns == 0 and K % tile.depth == 0 and num_matrices * tile.columns <= MAX_COLUMNS

    copies = tile.groups * (ROWS // PIECE) + num_matrices
    run = plgpu.kernel(
        functools.partial(_kernel, num_matrices=num_matrices, finish=finish, tile=tile),
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(places.expert_B.shape[0], N // tile.columns),
        grid_names=("block", "column"),
        num_threads=tile.groups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=swizzled((tile.stages, tile.groups, ROWS, tile.depth), dtype),
            matrix_smem=swizzled((tile.stages, num_matrices, tile.columns, tile.depth), dtype),
            out_smem=swizzled((tile.groups, ROWS, min(tile.columns, STORED)), dtype),
            filled=plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            emptied=plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.stages),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name=name,
        interpret=interpret,
    )
    return run(x_MK, *matrices, places.expert_B, places.start_B, places.end_B)


def _kernel(x_ref, *refs, x_smem, matrix_smem, out_smem, filled, emptied, num_matrices, finish, tile):
    matrix_refs, (expert_ref, start_ref, end_ref, out_ref) = refs[:num_matrices], refs[num_matrices:]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    first_column = pl.multiple_of(lax.axis_index("column") * tile.columns, tile.columns)
    first_row = block * (tile.groups * ROWS)
    num_rows = end_ref[block] - start_ref[block]
    steps = x_ref.shape[1] // tile.depth

    def rows(first, count):
        return pl.ds(pl.multiple_of(first_row + first, count), count)

    @pl.when((warpgroup < tile.groups) & (num_rows > 0))
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def multiply(sums):
            @pl.loop(0, steps)
            def _(step):
                stage = lax.rem(step, jnp.int32(tile.stages))
                plgpu.barrier_wait(filled.at[stage])
                for i, total in enumerate(sums):
                    _add_product(total, x_smem.at[stage, warpgroup], matrix_smem.at[stage, i])
                plgpu.wgmma_wait(num_matrices)  # for all products but this step's
                before = lax.rem(step + (tile.stages - 1), jnp.int32(tile.stages))
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(emptied.at[before]))

            return tuple(total[...] for total in sums)

        accumulator = plgpu.WGMMAAccumulatorRef((ROWS, tile.columns), jnp.float32)
        sums = pl.run_scoped(lambda *sums: multiply(sums), *[accumulator] * num_matrices)
        plgpu.barrier_arrive(emptied.at[(steps - 1) % tile.stages])
        out, width = finish(*sums).astype(out_smem.dtype), out_smem.shape[-1]
        for column in range(0, tile.columns, width):
            out_smem[warpgroup] = out[:, column : column + width]
            plgpu.commit_smem()
            target = out_ref.at[rows(warpgroup * ROWS, ROWS), pl.ds(first_column + column, width)]
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=column + width < tile.columns)

    @pl.when((warpgroup == tile.groups) & (num_rows > 0))
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        expert = expert_ref[block]

        @pl.loop(0, steps)
        def _(step):
            stage = lax.rem(step, jnp.int32(tile.stages))
            depth = pl.ds(pl.multiple_of(step * tile.depth, tile.depth), tile.depth)
            pl.when(step >= tile.stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            for i, matrix_ref in enumerate(matrix_refs):
                source = matrix_ref.at[expert, pl.ds(first_column, tile.columns), depth]
                plgpu.copy_gmem_to_smem(source, matrix_smem.at[stage, i], filled.at[stage])
            for group, row in itertools.product(range(tile.groups), range(0, ROWS, PIECE)):
                first = group * ROWS + row
                source = x_ref.at[rows(first, PIECE), depth]
                target = x_smem.at[stage, group, pl.ds(row, PIECE)]

                @pl.when(first < num_rows)
                def _(source=source, target=target):
                    plgpu.copy_gmem_to_smem(source, target, filled.at[stage])

                pl.when(first >= num_rows)(lambda: plgpu.barrier_arrive(filled.at[stage]))

        for stage in range(min(tile.stages, steps)):  # the program ends when all buffers are free again
            plgpu.barrier_wait(emptied.at[stage])


def _add_product(total, x_ref, matrix_ref):
    """total += x @ matrix.T; [ROWS, depth] and [columns, depth] in shared memory. Returns at once."""
    plgpu.wgmma(total, x_ref, matrix_ref.transpose((1, 0)))


def _divisor(n: int, most: int) -> int:
    """The greatest power of two that divides n, or `most` if that is less."""
    return min(n & -n, most)
