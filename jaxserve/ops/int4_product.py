"""Products with weights of four-bit integers (`ops.int4`) that lie whole on one device, or on each of a mesh.

On GPUs for Hopper rows meet the codes (`grouped_gemm.hopper_packed`: a dense layer is one expert to it), so a
step reads a quarter of what it would of bfloat16. Many rows, and what no kernel computes, are multiplied with
the weight that is made first.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.ops import backend, dense_product, four_bits, int4
from jaxserve.ops.grouped_gemm.hopper_packed import Packed, Tile, multiply
from jaxserve.ops.grouped_gemm.hopper_product import alone
from jaxserve.ops.grouped_gemm.rows import Places
from jaxserve.ops.hopper import NUM_SMS, is_supported

DEPTH = 128  # a multiple of it is what a device must have of the inputs
MAX_KERNEL_ROWS = 2048  # more are multiplied with the weight, made first
SHARED_BYTES = 225_000  # of a multiprocessor
MAX_PARTS = 4
FEW = 48  # rows with which products are bound by the memory


Gate = Callable[[jax.Array, jax.Array], jax.Array]
"""(gate, up) -> inner, elementwise, in float32: one function for all layers."""


class Weight(NamedTuple):
    """[N, K], as `ops.int4` packs it: codes, uint8 [N / 64, K / 2, 64]; scales and zeros, of 16 bits,
    [N / 64, K / group, 64]."""

    numbers: jax.Array
    scales: jax.Array
    zeros: jax.Array


class Cut(NamedTuple):
    """How a product is cut, and in how many parts its sums are."""

    tile: Tile
    num_parts: int


def project(x_TK: jax.Array, weight: Weight, out_dtype: DTypeLike, gate: Gate | None = None) -> jax.Array:
    """x times the weight: [T, N]; or with a gate, of two that are joined, gate(first, second): [T, N / 2]."""
    if fits(x_TK, weight):
        T, K = x_TK.shape
        cut = choose_cut(T, K, weight.numbers.shape[0], 1 if gate else MAX_PARTS)
        return by_hopper(x_TK, weight, cut, gate, out_dtype=out_dtype)
    wide_NK = int4.widen(weight.numbers, weight.scales, weight.zeros).astype(x_TK.dtype)
    if gate is None:
        return dense_product.multiply(x_TK, wide_NK, out_dtype)
    return gate(
        *(dense_product.multiply(x_TK, part[0], out_dtype) for part in four_bits.apart(wide_NK[None]))
    )


def fits(x_TK: jax.Array, weight: Weight) -> bool:
    """Whether `by_hopper` can compute this here, and is the faster."""
    is_here = backend.chosen() == "fast" and is_supported() and x_TK.dtype == weight.scales.dtype
    return is_here and x_TK.shape[0] <= MAX_KERNEL_ROWS


@cache
def over_mesh(
    mesh: Mesh,
    out_axes: tuple[str, ...],
    in_axes: tuple[str, ...],
    out_dtype: str,
    gate: Gate | None = None,
) -> Callable[[jax.Array, Weight], jax.Array]:
    """`project` on each device of what it has, and the sum of those that share the inputs.

    Rows are dp ranks'; `out_axes` split the weight's tiles, `in_axes` its inputs. One function for all
    layers, so that a kernel in it is lowered once a program.
    """

    def on_device(x_tK: jax.Array, weight: Weight) -> jax.Array:
        part_tn = project(x_tK, weight, out_dtype, gate)
        return lax.psum(part_tn, in_axes) if in_axes else part_tn

    split: Any = PartitionSpec(out_axes or None, in_axes or None)
    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(PartitionSpec("dp", in_axes or None), Weight(split, split, split)),
            out_specs=PartitionSpec("dp", out_axes or None),
            check_vma=False,
        )
    )


def choose_cut(T: int, K: int, num_tiles: int, max_parts: int = MAX_PARTS) -> Cut:
    """Of some fifty on an H200 (Llama-3.1-8B's four products, 8 to 2,048 rows) the best or nearly.

    Few rows want many small programs, of which three or more share a multiprocessor; from FEW on a matrix of
    few columns is cut so that each has one.
    """
    blocks = -(-T // (128 if T < 1024 else 176))
    block_rows = 8 * -(-T // (8 * blocks))
    is_few = T <= FEW
    groups = 2 if num_tiles > (2 * NUM_SMS if is_few else 1) else 1
    depth = 256 if block_rows <= 64 and K % 256 == 0 else DEPTH
    programs = blocks * -(-num_tiles // groups)
    wanted = (3 if is_few else 1) * NUM_SMS
    parts = 1
    while 2 * parts <= max_parts and 2 * parts * programs <= wanted and K % (2 * parts * depth) == 0:
        parts *= 2
    columns = groups * four_bits.ROWS
    of_stage = depth * (2 * block_rows + columns // 2 + columns // 16)
    of_results = block_rows * columns * (4 if parts > 1 else 2)
    stages = (SHARED_BYTES - of_results) // of_stage
    return Cut(Tile(block_rows, groups, depth, min(4, stages)), parts)


@partial(jax.jit, static_argnames=("cut", "gate", "out_dtype", "interpret"))
def by_hopper(
    x_TK: jax.Array,
    weight: Weight,
    cut: Cut,
    gate: Gate | None = None,
    *,
    out_dtype: DTypeLike,
    interpret=None,
) -> jax.Array:
    """`project`, by the kernel."""
    T, block_rows = x_TK.shape[0], cut.tile.block_rows
    blocks = -(-T // block_rows)
    start_B = np.arange(blocks, dtype=np.int32) * block_rows
    places = Places(
        jnp.asarray(np.arange(T, dtype=np.int32)),
        jnp.asarray(np.zeros(blocks, np.int32)),
        jnp.asarray(start_B),
        jnp.asarray(np.minimum(start_B + block_rows, T)),
        block_rows,
    )
    if missing := blocks * block_rows - T:
        x_TK = jnp.pad(x_TK, ((0, missing), (0, 0)))
    packed = Packed(weight.numbers[None], (weight.scales[None], weight.zeros[None]))
    out = multiply(
        x_TK,
        packed,
        places,
        gate or alone,
        2 if gate else 1,
        cut.tile,
        num_parts=cut.num_parts,
        name="int4_product",
        interpret=interpret,
    )
    if cut.num_parts > 1:
        out = out.sum(axis=0).T
    return out[:T].astype(out_dtype)
