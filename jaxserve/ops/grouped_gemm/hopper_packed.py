"""A grouped matrix product for Hopper GPUs whose matrices are numbers of four bits, in Pallas-Mosaic.

They lie as `ops.four_bits` has them, in MXFP4 (`ops.mxfp4`) or as integers (`ops.int4`).

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

from jaxserve.ops import four_bits, int4, mxfp4
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

    def choose(numbers: jax.Array, scales: jax.Array) -> Tile:
        num_tiles, num_scales = scales.shape[1:3]
        group, line = numbers.shape[2] * 2 // num_scales, scales.dtype.itemsize * four_bits.LINE
        at_once = min(most_groups, num_tiles)
        if num_scales * line % 128 and at_once % 2:  # no copy of exponents would be a multiple of 128 bytes
            at_once = min(2, num_tiles)
        counts = range(1, max(1, most // group) + 1)
        fits = (n for n in counts if num_scales % n == 0 == at_once * n * line % 128)
        return Tile(block_rows, at_once, max(fits, default=0) * group, STAGES)

    return choose(weights.gate_EFD, weights.gate_scale), choose(weights.down_EDF, weights.down_scale)


class Packed(NamedTuple):
    """A matrix or two joined ones: numbers, uint8 [E, tiles, K / 2, 64]; what their rows have for each group
    of columns, [E, tiles, K / group, 64], exponents of MXFP4 or scales and zeros of integers; and a bias for
    each column, [E, N], or none."""

    numbers: jax.Array
    of_rows: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...] = ()

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.numbers.shape[2] * 2 // self.of_rows[0].shape[2]


def multiply(
    x_MK: jax.Array,
    packed: Packed,
    places: Places,
    finish: Callable[..., jax.Array],
    num_matrices: int,
    tile: Tile,
    *,
    num_parts: int = 1,
    name: str,
    interpret=None,
) -> jax.Array:
    """finish(x @ matrix.T + bias, ...) of each block's rows and its expert's matrices, [M, N].

    Args:
        num_parts: in which K is cut, where there are too few columns to fill a GPU. Above 1 the result is
            what each part adds to a product, float32 [num_parts, N, M].
    """
    M, K = x_MK.shape
    num_tiles = packed.numbers.shape[1]
    columns = four_bits.ROWS // num_matrices
    at_once, block_rows = tile.groups, tile.block_rows
    assert K % (tile.depth * num_parts) == 0 and num_tiles >= at_once and block_rows == places.block_rows
    assert tile.depth % packed.group == 0
    out_type = jax.ShapeDtypeStruct((M, num_tiles * columns), x_MK.dtype)
    out_tile = block_rows, columns
    if num_parts > 1:
        assert num_matrices == 1 and not packed.biases
        out_type = jax.ShapeDtypeStruct((num_parts, num_tiles * columns, M), jnp.float32)
        out_tile = columns, block_rows
    scratch = {}
    if interpret is not None:  # which knows no products of what is in registers
        scratch["wide_smem"] = plgpu.SMEM((tile.groups, four_bits.ROWS, PIECE), x_MK.dtype)

    def ring(array: jax.Array) -> Any:
        """Of what an iteration takes of a packed array."""
        lines = array.shape[2] * tile.depth // K
        return plgpu.SMEM((tile.stages, at_once, lines, four_bits.LINE), array.dtype)

    run = plgpu.kernel(
        functools.partial(
            _kernel,
            format=_format(packed),
            num_parts=num_parts,
            num_matrices=num_matrices,
            num_biases=len(packed.biases),
            finish=finish,
            tile=tile,
        ),
        out_type=out_type,
        grid=(places.expert_B.shape[0], pl.cdiv(num_tiles, at_once), num_parts),
        grid_names=("block", "column", "part"),
        num_threads=tile.groups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=swizzled((tile.stages, block_rows, tile.depth), x_MK.dtype),
            packed_smem=[ring(array) for array in (packed.numbers, *packed.of_rows)],
            out_smem=plgpu.SMEM((tile.groups, *out_tile), out_type.dtype),
            filled=plgpu.Barrier(num_arrivals=2 + len(packed.of_rows), num_barriers=tile.stages),
            emptied=plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.stages),
            **scratch,
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name=name,
        interpret=interpret,
    )
    arrays = packed.numbers, *packed.of_rows, *packed.biases
    return run(x_MK, *arrays, places.expert_B, places.start_B, places.end_B)


def _kernel(
    x_ref,
    *refs,
    x_smem,
    packed_smem,
    out_smem,
    filled,
    emptied,
    format,
    num_parts,
    num_matrices,
    num_biases,
    finish,
    tile,
    wide_smem: Any = None,
):
    packed_refs, refs = refs[: len(packed_smem)], refs[len(packed_smem) :]
    bias_refs, (expert_ref, start_ref, end_ref, out_ref) = refs[:num_biases], refs[num_biases:]
    block, part, warpgroup = (lax.axis_index(axis) for axis in ("block", "part", "warpgroup"))
    at_once = tile.groups
    # The last program ends with the matrix: the one before it may compute some of its tiles too.
    first_tile = jnp.minimum(lax.axis_index("column") * at_once, packed_refs[0].shape[1] - at_once)
    has_rows = end_ref[block] > start_ref[block]
    steps = x_ref.shape[1] // tile.depth // num_parts
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
                    packed = [_piece(ref.at[stage, warpgroup], piece, size, tile) for ref in packed_smem]
                    if wide_smem is None:
                        wide = _widen(format, *packed)
                    else:
                        wide = wide_smem.at[warpgroup, :, pl.ds(0, size)]
                        wide[...] = format.widen(*(ref[...][None] for ref in packed))
                    plgpu.wgmma(sums, wide, x_smem.at[stage, :, pl.ds(piece, size)].transpose((1, 0)))
                    plgpu.wgmma_wait(int(tile.is_ahead))
                    if piece == 0 and tile.is_ahead:  # all products of the step before are done
                        pl.when(step > 0)(lambda: plgpu.barrier_arrive(emptied.at[stage_of(step - 1)]))
                if not tile.is_ahead:
                    plgpu.barrier_arrive(emptied.at[stage])

            return sums[...]

        accumulator = plgpu.WGMMAAccumulatorRef((four_bits.ROWS, block_rows), jnp.float32)
        sums = pl.run_scoped(sum_up, accumulator)
        if tile.is_ahead:
            plgpu.barrier_arrive(emptied.at[(steps - 1) % tile.stages])
        width = four_bits.ROWS // num_matrices
        columns = pl.ds((first_tile + warpgroup) * width, width)
        if num_parts > 1:
            out_smem[warpgroup] = sums
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_ref.at[part, columns, my_rows])
            plgpu.wait_smem_to_gmem(0)
            return
        parts = _turn(sums, num_matrices, wide_smem is not None)
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
            at = part * steps + step
            for source, target in zip(packed_refs, packed_smem):
                lines = target.shape[2]
                source = source.at[expert, tiles, pl.ds(at * lines, lines)]
                plgpu.copy_gmem_to_smem(source, target.at[stage], filled.at[stage])
            source = x_ref.at[my_rows, pl.ds(at * tile.depth, tile.depth)]
            plgpu.copy_gmem_to_smem(source, x_smem.at[stage], filled.at[stage])

        for stage in range(min(tile.stages, steps)):  # the program ends when all buffers are free again
            plgpu.barrier_wait(emptied.at[stage])

    @pl.when((warpgroup == tile.groups) & has_rows)
    def _copy():
        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(_fill)


def _piece(ref, begin: int, size: int, tile: Tile):
    """Of an iteration's lines those of `size` columns: a line of scales may be of more."""
    lines = ref.shape[0]
    return ref.at[pl.ds(begin * lines // tile.depth, max(1, size * lines // tile.depth))]


# ---- what only a warpgroup's registers show ----


class _Format(NamedTuple):
    """How a number of `dtype` is made of its bits in a word: as (the number of bits | offset, less its row's
    zero where there are zeros) times its row's scale, of which `spread` makes a pair."""

    dtype: Any
    parts: four_bits.Parts
    offset: int
    spread: int
    widen: Callable[..., jax.Array]


def _format(packed: Packed) -> _Format:
    dtype = packed.of_rows[0].dtype
    if dtype == jnp.uint8:  # an exponent goes to bits 7 to 14 of both halves
        return _Format(jnp.bfloat16, mxfp4.PARTS, 0, 0x00800080, mxfp4.widen)
    return _Format(dtype, int4.PARTS, int4.offset(dtype).bits * 0x00010001, 0x00010001, int4.widen)


def _widen(format: _Format, numbers_ref, *of_rows_refs) -> jax.Array:
    """Of a tile in shared memory, [64, columns]."""
    shape = four_bits.ROWS, numbers_ref.shape[0] // four_bits.LINES * four_bits.COLUMNS
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * (1 + len(of_rows_refs)),
        return_type=plgpu.ShapeDtypeStruct(shape, format.dtype, layout=plgpu.Layout.WGMMA),
    )(functools.partial(_widen_in_registers, format=format, shape=shape))(numbers_ref, *of_rows_refs)


def _widen_in_registers(
    _, numbers, *of_rows, format: _Format, shape: tuple[int, int]
) -> mgpu.FragmentedArray:
    """Products of bfloat16 take and make numbers without an exponent (PTX ISA 9.0, section 9.7.4.7)."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    number_type = ir.BF16Type if format.dtype == jnp.bfloat16 else ir.F16Type
    pair_type = ir.VectorType.get((2,), number_type.get())

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

    def load(ref, line, place, count: int, bits: int) -> list:
        """So many integers of so many bits, as words."""
        element, kind = ref.type.element_type, ir.IntegerType.get_signless(bits)
        some = vector.load(ir.VectorType.get((count * bits // element.width,), element), ref, [line, place])
        some = vector.bitcast(ir.VectorType.get((count,), kind), some)
        values = [vector.extract(some, dynamic_position=[], static_position=[i]) for i in range(count)]
        return values if bits == 32 else [arith.extui(i32, value) for value in values]

    thread = arith.remui(gpu.thread_id(gpu.Dimension.x), at(WARPGROUP))
    place, line = arith.muli(arith.remui(thread, at(8)), at(8)), arith.divui(thread, at(8))
    my_rows = arith.muli(arith.divui(thread, at(4)), at(2))

    def factors(ref, line: int) -> list:
        """What the thread's two rows have, for both numbers of a pair."""
        bits = ref.type.element_type.width
        [both] = load(ref, at(line), my_rows, 1, 2 * bits)
        rows = (arith.andi(shifted(both, -bits * row), word((1 << bits) - 1)) for row in range(2))
        return [pair_of(arith.muli(row, word(format.spread))) for row in rows]

    groups = shape[1] // four_bits.COLUMNS
    registers = np.empty((4 * groups, 2), dtype=object)
    for group in range(groups):
        scales, *zeros = (factors(ref, group * ref.type.shape[0] // groups) for ref in of_rows)
        of_group = arith.addi(at(group * four_bits.LINES), line)
        for half, codes in enumerate(load(numbers, of_group, place, 2, 32)):
            for pair, parts in enumerate(format.parts):
                bits = [arith.andi(shifted(codes, left), word(mask | mask << 16)) for mask, left in parts]
                bits += [word(format.offset)] * (format.offset != 0)
                number, row = pair_of(functools.reduce(arith.ori, bits)), pair % 2
                for zero in zeros:
                    number = arith.subf(number, zero[row])
                registers[4 * group + 2 * half + pair // 2, row] = arith.mulf(number, scales[row])
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
        return [part[0].T for part in (four_bits.apart(sums[None]) if num_matrices == 2 else [sums[None]])]
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
