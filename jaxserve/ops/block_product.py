"""Products with weights in float8 that have a float32 scale for each block of 128 x 128, as DeepSeek's.

Rows and weights lie whole on one device, or on each of a mesh. How they meet is chosen when a program is
traced:

- on GPUs for Hopper, from 16 rows on, both in float8, rows with a scale for each 128 numbers (DeepSeek-AI
  2024, "DeepSeek-V3 Technical Report", section 3.3): a dense layer is one expert to `grouped_gemm`;
- on any GPU, fewer rows are multiplied with the numbers of each block, which are converted on the way into
  the product, and those products are scaled;
- in float32, and where sizes do not allow it, the weight is multiplied by its scales first.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.ops import backend, dense_product
from jaxserve.ops.grouped_gemm import hopper_rows
from jaxserve.ops.grouped_gemm.hopper_product import BLOCK, MAX_DEPTH, Matrices, Tile, alone, multiply
from jaxserve.ops.grouped_gemm.rows import Places
from jaxserve.ops.hopper import NUM_SMS, ROWS, is_supported
from jaxserve.ops.quantized_gemm import W8A8_MIN_ROWS

COLUMNS = (128, 64, 32)  # of a tile
STARTING = 64  # columns that could be multiplied while a program starts and ends
STAGES = 5


def project(x_TK: jax.Array, numbers_NK: jax.Array, scale: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """x times the weight: [T, N]. Scales are [N / 128, K / 128], rounded up."""
    if has_kernels(x_TK) and is_few(x_TK):
        return by_block(x_TK, numbers_NK, scale, out_dtype)
    if fits(x_TK, numbers_NK) and jnp.dtype(out_dtype).itemsize == 2:  # else shared memory is short
        return by_hopper(x_TK, numbers_NK, scale, alone, out_dtype)
    return dense_product.multiply(x_TK, dequantise(numbers_NK, scale, x_TK.dtype), out_dtype)


@cache
def over_mesh(
    mesh: Mesh, out_axes: tuple[str, ...], in_axes: tuple[str, ...], out_dtype: str
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`project` on each device of what it has, and the sum of those that share the inputs.

    Rows are dp ranks'; `out_axes` split the weight's outputs, `in_axes` its inputs, each into whole blocks.
    One function for all layers, so that a kernel in it is lowered once a program.
    """

    def on_device(x_tK: jax.Array, numbers_nk: jax.Array, scale: jax.Array) -> jax.Array:
        part_tn = project(x_tK, numbers_nk, scale, out_dtype)
        return lax.psum(part_tn, in_axes) if in_axes else part_tn

    weight = PartitionSpec(out_axes or None, in_axes or None)
    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(PartitionSpec("dp", in_axes or None), weight, weight),
            out_specs=PartitionSpec("dp", out_axes or None),
            check_vma=False,
        )
    )


def dequantise(
    numbers_NK: jax.Array, scale: jax.Array, dtype: DTypeLike, block: tuple[int, int] = (BLOCK, BLOCK)
) -> jax.Array:
    """The weight; XLA may fuse this into a product."""
    N, K = numbers_NK.shape
    scale_NK = jnp.repeat(jnp.repeat(scale, block[0], axis=0)[:N], block[1], axis=1)[:, :K]
    return (numbers_NK.astype(jnp.float32) * scale_NK).astype(dtype)


def has_kernels(x_TK: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether rows of this dtype are multiplied without making the weight first."""
    return backend.chosen() == "fast" and x_TK.dtype in (jnp.bfloat16, jnp.float16)


def is_few(x_TK: jax.Array) -> bool:
    """Whether rows are so few, and of whole blocks, that widening the numbers on the way costs nothing."""
    return x_TK.shape[0] < W8A8_MIN_ROWS and x_TK.shape[1] % BLOCK == 0


@partial(jax.jit, static_argnames="out_dtype")
def by_block(x_TK: jax.Array, numbers_NK: jax.Array, scale: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """`project` of few rows. XLA:GPU makes two kernels of it, and no copy of the weight."""
    (T, K), N = x_TK.shape, numbers_NK.shape[0]
    blocks = K // BLOCK
    parts = jnp.einsum(
        "tbk,nbk->btn",
        x_TK.reshape(T, blocks, BLOCK),
        numbers_NK.reshape(N, blocks, BLOCK).astype(x_TK.dtype),
        preferred_element_type=jnp.float32,
    )
    # One sum after the other: of a sum over an axis XLA would make another kernel, to turn the scales.
    total_TN = jnp.zeros((T, N), jnp.float32)
    for b in range(blocks):
        total_TN += parts[b] * jnp.repeat(scale[:, b], BLOCK)[:N]
    return total_TN.astype(out_dtype)


def fits(x_TK: jax.Array | jax.ShapeDtypeStruct, numbers_NK: jax.Array, num_matrices: int = 1) -> bool:
    """Whether `by_hopper` can compute this here, of so many matrices that are joined in one."""
    (T, K), N = x_TK.shape, numbers_NK.shape[0] // num_matrices
    return (
        has_kernels(x_TK)
        and is_supported()
        and T >= W8A8_MIN_ROWS
        and N % (BLOCK if num_matrices > 1 else COLUMNS[-1]) == 0
        and K % BLOCK == 0
        and K <= MAX_DEPTH
    )


@partial(jax.jit, static_argnames=("finish", "num_matrices", "out_dtype", "interpret"))
def by_hopper(
    x_TK: jax.Array,
    numbers_NK: jax.Array,
    scale: jax.Array,
    finish: Callable[..., jax.Array],
    out_dtype: DTypeLike,
    *,
    num_matrices: int = 1,
    interpret=None,
) -> jax.Array:
    """finish(x @ part.T, ...) of as many parts that are joined in the weight: [T, N / num_matrices]."""
    T, N = x_TK.shape[0], numbers_NK.shape[0] // num_matrices
    tile = choose_tile(T, N, num_matrices)
    block_rows = tile.groups * ROWS
    blocks = -(-T // block_rows)
    # Arrays of numpy are constants of a program; of jax.numpy each would be a kernel.
    row_T, start_B = np.arange(T, dtype=np.int32), np.arange(blocks, dtype=np.int32) * block_rows
    expert_B, end_B = np.zeros(blocks, np.int32), np.minimum(start_B + block_rows, T)
    arrays = (jnp.asarray(array) for array in (row_T, expert_B, start_B, end_B))
    places = Places(*arrays, block_rows=block_rows)
    pairs = jnp.asarray(np.zeros((T, 1), np.int32)), jnp.asarray(row_T[:, None])
    rows = hopper_rows.copy(x_TK, *pairs, places.num_rows, group=BLOCK, interpret=interpret is not None)
    matrices = Matrices.joined(numbers_NK[None], scale[None], num_matrices)
    out_MN = multiply(
        rows, matrices, places, finish, out_dtype, tile, name="hopper_block_product", interpret=interpret
    )
    return out_MN[:T]


def choose_tile(T: int, N: int, num_matrices: int) -> Tile:
    """The one with which all multiprocessors are done soonest."""
    groups = 1 if T <= ROWS else 2
    blocks = -(-T // (groups * ROWS))

    def cost(columns: int) -> int:
        waves = -(-(blocks * (N // columns)) // NUM_SMS)
        return waves * (num_matrices * columns + STARTING)

    fitting = [c for c in COLUMNS if N % c == 0 and num_matrices * c <= COLUMNS[0]]
    return Tile(groups, min(fitting, key=cost), BLOCK, STAGES)
