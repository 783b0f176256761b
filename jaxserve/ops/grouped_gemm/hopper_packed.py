"""A grouped matrix product for Hopper GPUs whose matrices are in MXFP4 (`ops.mxfp4`), in Pallas-Mosaic.

The matrix is the first operand: a warpgroup widens a tile of it straight into the registers that the tensor
core reads, so numbers of 4 bits take the way of no other memory, and a block may have as few rows as 8.
Rows are the second operand, and results come out with a column a register row; where two matrices are joined,
eight rows of one and eight of the other take turns, so a thread has both numbers that its activation needs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector

from jaxserve.ops import mxfp4
from jaxserve.ops.grouped_gemm.rows import Places
from jaxserve.ops.hopper import store_rows, swizzled

WARPGROUP = 128
PIECE = 64  # columns that are widened at a time
MAX_ROWS = 96  # of a block: three warpgroups' registers hold no more sums beside what they widen
STAGES = 3  # of the ring; with tiles as below they fit into shared memory


class Tile(NamedTuple):
    """How a product is cut: rows of a block, warpgroups that compute 64 rows of the matrix each, columns of
    one iteration, ring size."""

    block_rows: int
    groups: int
    depth: int
    stages: int

    @property
    def is_ahead(self) -> bool:
        """Whether a warpgroup widens numbers while its last product runs. With few rows it does not: their
        registers are better spent on more warpgroups at a time."""
        return self.block_rows >= 64 and self.depth > PIECE


def choose_tiles(rows_per_expert: float, weights) -> tuple[Tile, Tile]:
    """Of the product with gate and up, and the one with down.

    A block costs much the same whatever rows it has, as numbers are widened once for it: so it has room for
    what most experts get, or for a part of it where that is more than 96 rows. Of some forty tiles on an
    H200 (GPT-OSS-20B, 32 experts, 4 a token) the best or nearly, at 1 to 2,048 tokens.
    """
    expected = rows_per_expert + 1.5 * math.sqrt(rows_per_expert)
    num_blocks = max(1, math.ceil(expected / MAX_ROWS))
    block_rows = 8 * max(1, math.ceil(expected / num_blocks / 8))
    most_groups, most = (1, 320) if rows_per_expert <= 2 else (2 if block_rows <= 16 else 3, 192)

    def choose(exponents: jax.Array) -> Tile:
        groups = min(most_groups, exponents.shape[1])
        if exponents.shape[2] % 2 and groups % 2:  # no copy of exponents would be a multiple of 128 bytes
            groups = min(2, exponents.shape[1])
        fits = (n for n in range(1, most // mxfp4.GROUP + 1) if exponents.shape[2] % n == 0 == groups * n % 2)
        depth = max(fits, default=0) * mxfp4.GROUP
        return Tile(block_rows, groups, depth, STAGES)

    return choose(weights.gate_scale), choose(weights.down_scale)


class Packed(NamedTuple):
    """A matrix or two joined ones, as `ops.mxfp4` has them: uint8 [E, tiles, K / 2, 64], their exponents
    [E, tiles, K / 32, 64], and a bias for each column, [E, N], or none."""

    numbers: jax.Array
    exponents: jax.Array
    biases: tuple[jax.Array, ...]


def multiply(
    x_MK: jax.Array,
    packed: Packed,
    places: Places,
    finish: Callable[..., jax.Array],
    num_matrices: int,
    tile: Tile,
    *,
    name: str,
    interpret=None,
) -> jax.Array:
    """finish(x @ matrix.T + bias, ...) of each block's rows and its expert's matrices, [M, N]."""
    M, K = x_MK.shape
    num_tiles = packed.numbers.shape[1]
    columns = mxfp4.ROWS // num_matrices
    at_once, block_rows = tile.groups, tile.block_rows
    assert K % tile.depth == 0 and num_tiles >= at_once and block_rows == places.block_rows
    groups = tile.depth // mxfp4.GROUP
    scratch = {}
    if interpret is not None:  # which knows no products of what is in registers
        scratch["wide_smem"] = plgpu.SMEM((tile.groups, mxfp4.ROWS, PIECE), x_MK.dtype)
    run = plgpu.kernel(
        functools.partial(
            _kernel,
            num_matrices=num_matrices,
            num_biases=len(packed.biases),
            finish=finish,
            tile=tile,
        ),
        out_type=jax.ShapeDtypeStruct((M, num_tiles * columns), x_MK.dtype),
        grid=(places.expert_B.shape[0], pl.cdiv(num_tiles, at_once)),
        grid_names=("block", "column"),
        num_threads=tile.groups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=swizzled((tile.stages, block_rows, tile.depth), x_MK.dtype),
            numbers_smem=plgpu.SMEM((tile.stages, at_once, groups * mxfp4.LINES, mxfp4.LINE), jnp.uint8),
            exponents_smem=plgpu.SMEM((tile.stages, at_once, groups, mxfp4.LINE), jnp.uint8),
            out_smem=plgpu.SMEM((tile.groups, block_rows, columns), x_MK.dtype),
            filled=plgpu.Barrier(num_arrivals=3, num_barriers=tile.stages),
            emptied=plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.stages),
            **scratch,
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name=name,
        interpret=interpret,
    )
    arrays = packed.numbers, packed.exponents, *packed.biases
    return run(x_MK, *arrays, places.expert_B, places.start_B, places.end_B)


def _kernel(
    x_ref,
    numbers_ref,
    exponents_ref,
    *refs,
    x_smem,
    numbers_smem,
    exponents_smem,
    out_smem,
    filled,
    emptied,
    num_matrices,
    num_biases,
    finish,
    tile,
    wide_smem: Any = None,
):
    bias_refs, (expert_ref, start_ref, end_ref, out_ref) = refs[:num_biases], refs[num_biases:]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    at_once = tile.groups
    # The last program ends with the matrix: the one before it may compute some of its tiles too.
    first_tile = jnp.minimum(lax.axis_index("column") * at_once, numbers_ref.shape[1] - at_once)
    has_rows = end_ref[block] > start_ref[block]
    steps, groups = x_ref.shape[1] // tile.depth, tile.depth // mxfp4.GROUP
    block_rows = tile.block_rows
    my_rows = pl.ds(pl.multiple_of(block * block_rows, block_rows), block_rows)

    def stage_of(step):
        return lax.rem(step, jnp.int32(tile.stages))

    @pl.when((warpgroup < tile.groups) & has_rows)
    def _compute():
        pieces = range(0, tile.depth, PIECE)

        def sum_up(sums):
            @pl.loop(0, steps)
            def _(step):
                stage = stage_of(step)
                plgpu.barrier_wait(filled.at[stage])
                for piece in pieces:
                    size = min(PIECE, tile.depth - piece)
                    of_piece = pl.ds(piece // mxfp4.GROUP, size // mxfp4.GROUP)
                    lines = pl.ds(piece // 2, size // 2)
                    mine = (stage, warpgroup)
                    packed = numbers_smem.at[*mine, lines], exponents_smem.at[*mine, of_piece]
                    if wide_smem is None:
                        wide = _widen(*packed)
                    else:
                        wide = wide_smem.at[warpgroup, :, pl.ds(0, size)]
                        wide[...] = mxfp4.widen(*(ref[...][None] for ref in packed))
                    plgpu.wgmma(sums, wide, x_smem.at[stage, :, pl.ds(piece, size)].transpose((1, 0)))
                    plgpu.wgmma_wait(int(tile.is_ahead))
                    if piece == 0 and tile.is_ahead:  # all products of the step before are done
                        pl.when(step > 0)(lambda: plgpu.barrier_arrive(emptied.at[stage_of(step - 1)]))
                if not tile.is_ahead:
                    plgpu.barrier_arrive(emptied.at[stage])

            return sums[...]

        accumulator = plgpu.WGMMAAccumulatorRef((mxfp4.ROWS, block_rows), jnp.float32)
        sums = pl.run_scoped(sum_up, accumulator)
        if tile.is_ahead:
            plgpu.barrier_arrive(emptied.at[(steps - 1) % tile.stages])
        parts = _turn(sums, num_matrices, wide_smem is not None)
        width = out_smem.shape[-1]
        columns = pl.ds((first_tile + warpgroup) * width, width)
        if bias_refs:
            layout = _layout(num_matrices)
            for i, ref in enumerate(bias_refs):
                source = ref.at[expert_ref[block], columns]
                bias = plgpu.load(source, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
                parts[i] += plgpu.layout_cast(lax.broadcast_in_dim(bias, parts[i].shape, [1]), layout)
        store_rows(out_smem.at[warpgroup], finish(*parts).astype(out_smem.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_ref.at[my_rows, columns])
        plgpu.wait_smem_to_gmem(0)

    def _fill():
        expert, tiles = expert_ref[block], pl.ds(first_tile, at_once)

        @pl.loop(0, steps)
        def _(step):
            stage = stage_of(step)
            pl.when(step >= tile.stages)(lambda: plgpu.barrier_wait(emptied.at[stage]))
            depth = pl.ds(step * tile.depth, tile.depth)
            lines = pl.ds(step * (groups * mxfp4.LINES), groups * mxfp4.LINES)
            for source, target in (
                (numbers_ref.at[expert, tiles, lines], numbers_smem),
                (exponents_ref.at[expert, tiles, pl.ds(step * groups, groups)], exponents_smem),
                (x_ref.at[my_rows, depth], x_smem),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[stage], filled.at[stage])

        for stage in range(min(tile.stages, steps)):  # the program ends when all buffers are free again
            plgpu.barrier_wait(emptied.at[stage])

    @pl.when((warpgroup == tile.groups) & has_rows)
    def _copy():
        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(_fill)


# ---- what only a warpgroup's registers show ----


def _widen(numbers_ref, exponents_ref) -> jax.Array:
    """Of a tile in shared memory, [64, columns] in bfloat16."""
    shape = mxfp4.ROWS, exponents_ref.shape[0] * mxfp4.GROUP
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )(functools.partial(_widen_in_registers, shape=shape))(numbers_ref, exponents_ref)


def _widen_in_registers(_, numbers, exponents, *, shape: tuple[int, int]) -> mgpu.FragmentedArray:
    """Products of bfloat16 take and make numbers without an exponent (PTX ISA 9.0, section 9.7.4.7)."""
    i8, i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 16, 32))
    index, pair_type = ir.IndexType.get(), ir.VectorType.get((2,), ir.BF16Type.get())

    def at(value: int):
        return arith.constant(index, value)

    def word(value: int):
        return arith.constant(i32, value - (value >> 31 << 32))

    def shifted(value, left: int):
        if left == 0:
            return value
        return arith.shli(value, word(left)) if left > 0 else arith.shrui(value, word(-left))

    def pair_of(bits):
        return vector.bitcast(pair_type, vector.broadcast(ir.VectorType.get((1,), i32), bits))

    def load(ref, *position, count: int, kind) -> list:
        some = vector.load(ir.VectorType.get((count * kind.width // 8,), i8), ref, position)
        some = vector.bitcast(ir.VectorType.get((count,), kind), some)
        return [vector.extract(some, dynamic_position=[], static_position=[i]) for i in range(count)]

    thread = arith.remui(gpu.thread_id(gpu.Dimension.x), at(WARPGROUP))
    line, place = arith.divui(thread, at(8)), arith.muli(arith.remui(thread, at(8)), at(8))
    of_rows = arith.muli(arith.divui(thread, at(4)), at(2))
    registers = np.empty((shape[1] // 8, 2), dtype=object)
    for group in range(shape[1] // mxfp4.GROUP):
        [powers] = load(exponents, at(group), of_rows, count=1, kind=i16)
        factors = []
        for row in range(2):
            power = arith.andi(shifted(arith.extui(i32, powers), -8 * row), word(0xFF))
            factors.append(pair_of(arith.muli(power, word(0x00800080))))  # to bits 7 to 14 of both halves
        of_group = arith.addi(at(group * mxfp4.LINES), line)
        for half, codes in enumerate(load(numbers, of_group, place, count=2, kind=i32)):
            for pair, parts in enumerate(mxfp4.PARTS):
                bits = [arith.andi(shifted(codes, left), word(mask | mask << 16)) for mask, left in parts]
                number = arith.mulf(pair_of(functools.reduce(arith.ori, bits)), factors[pair % 2])
                registers[4 * group + 2 * half + pair // 2, pair % 2] = number
    layout = mgpu.WGMMA_LAYOUT
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def _layout(num_matrices: int) -> Any:
    """Of results by row: where the registers of a product lie once its columns are told from its rows."""
    if num_matrices == 1:
        tiling, warp = mgpu.fragmented_array.Tiling(((8, 64), (8, 16), (8, 8), (2, 1))), -7
    else:
        tiling, warp = mgpu.fragmented_array.Tiling(((8, 32), (8, 8), (2, 1))), -5
    return plgpu.Layout.TILED(tiling, warp_dims=(warp,), lane_dims=(-3, -4), vector_dim=-2)


def _turn(sums, num_matrices: int, is_interpreted: bool) -> list[jax.Array]:
    """[64, rows] -> of each matrix, [rows, columns]."""
    columns, rows = sums.shape
    if is_interpreted:
        return [part[0].T for part in (mxfp4.apart(sums[None]) if num_matrices == 2 else [sums[None]])]
    shape, layout = (rows, columns // num_matrices), _layout(num_matrices)

    def turn(_, sums):
        registers = sums.registers.reshape(rows // 8, 2)  # two columns of a thread
        apart = [registers] if num_matrices == 1 else [registers[..., i] for i in range(2)]
        of_shape = layout.to_mgpu().registers_shape(shape)
        return tuple(
            mgpu.FragmentedArray(_registers=part.reshape(of_shape), _layout=layout.to_mgpu(), _is_signed=None)
            for part in apart
        )

    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    return list(
        plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(result,) * num_matrices)(turn)(sums)
    )
