"""Experts for CUDA: two grouped matrix products in Pallas-Triton.

The first gathers each row's token, multiplies with gate and up and applies the activation; the
second multiplies with down and stores rows in the order of (token, choice), so that what is left
is a weighted sum over a token's choices. A block of rows belongs to one expert; blocks that hold
no rows end at once, so padding and other devices' experts cost an empty program. Few tokens are not
sorted: all of them together are a block of each expert that any of them names.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.grouped_gemm.parts import WORKSPACE_BYTES, in_parts, num_parts
from jaxserve.ops.grouped_gemm.rows import num_blocks
from jaxserve.ops.grouped_gemm.rows_fast import group


class Tile(NamedTuple):
    """How a product is cut: rows, output columns, columns of one iteration, warps, pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def choose_tile(rows_per_expert: float, itemsize: int) -> Tile:
    """By how many rows an expert has on average, were they spread evenly over all experts.

    Of twelve tiles on an H200 (DeepSeek-V2-Lite, 64 experts, 6 a token), the best when tokens spread, and
    among the best when all choose the same six: us a layer, spread and same, at 32, 128, 256 and 512
    tokens 278, 292, 324, 334 and 64, 108, 130, 198. The bytes take 278 and some 30.
    """
    if itemsize == 4:
        return Tile(16 if rows_per_expert <= 16 else 32, 64, 32, warps=4, stages=2)
    if rows_per_expert <= 8:
        return Tile(16, 64, 128, warps=4, stages=3)
    if rows_per_expert <= 16:
        return Tile(32, 64, 128, warps=4, stages=3)
    if rows_per_expert <= 64:
        return Tile(64, 64, 64, warps=4, stages=4)
    return Tile(128, 128, 64, warps=8, stages=3)


class Rows(NamedTuple):
    """How the programs of a product find their rows.

    `find(*refs of arrays, tile_rows)` is traced in the kernel, for the block of its program. It gives the
    block's expert, whether it holds any rows, and by row: whether there is one, its number and its pair.
    """

    find: Callable
    num_rows: int
    num_blocks: int
    arrays: tuple[jax.Array, ...]

    @classmethod
    def of(cls, expert_TX: jax.Array, num_experts: int, tile_rows: int, interpret: bool) -> "Rows":
        """Sorted by expert, unless all tokens fit into one block and sorting would leave as many blocks."""
        num_tokens, num_rows = expert_TX.shape[0], expert_TX.size
        if num_tokens <= tile_rows and num_blocks(num_rows, num_experts, tile_rows) == num_rows:
            return cls(_find_unsorted, num_rows, num_rows, (expert_TX,))
        blocks = group(expert_TX, num_experts, tile_rows, interpret=interpret)
        return cls(_find_sorted, num_rows, blocks.expert_B.shape[0], tuple(blocks))


@functools.partial(jax.jit, static_argnames=("activation", "interpret", "tile", "workspace_bytes"))
def feed_forward(
    hidden_TD,
    expert_TX,
    weight_TX,
    weights,
    activation,
    tile: Tile,
    *,
    interpret: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
):
    """See `grouped_gemm.feed_forward`.

    Traced and lowered once for all layers: once for each of 26 it was 5 of the 6.6 s that Python took
    for a program of DeepSeek-V2-Lite, where all programs take turns.

    There is a row for every (token, choice), though few of them may be of this device's experts: on
    8 devices with 2,048 prompt tokens each, DeepSeek-V3's would take 2.4 GB.
    """
    T, X = expert_TX.shape
    (E, F, _), D = weights.gate_EFD.shape, hidden_TD.shape[1]
    parts = num_parts(T, X * (D + F) * hidden_TD.dtype.itemsize, workspace_bytes)
    if parts > 1:
        options = dict(interpret=interpret, workspace_bytes=workspace_bytes)
        return in_parts(
            lambda *tokens: feed_forward(*tokens, weights, activation, tile, **options),
            parts,
            hidden_TD,
            expert_TX,
            weight_TX,
        )
    rows = Rows.of(expert_TX, E, tile.rows, interpret)
    call = functools.partial(_call, rows=rows, num_choices=X, tile=tile, interpret=interpret)
    inner_MF = call(
        hidden_TD,
        [weights.gate_EFD, weights.up_EFD],
        [weights.gate_scale, weights.up_scale],
        [weights.gate_bias_EF, weights.up_bias_EF],
        finish=activation,
        gather=True,
        name="experts_up",
    )
    out_MD = call(
        inner_MF,
        [weights.down_EDF],
        [weights.down_scale],
        [weights.down_bias_ED],
        finish=lambda down: down,
        gather=False,
        name="experts_down",
    )
    # Rows of no expert were never written: whatever memory held there must not reach the sum.
    out_TXD = out_MD.reshape(T, X, D).astype(jnp.float32) * weight_TX.astype(jnp.float32)[..., None]
    return jnp.sum(jnp.where((expert_TX >= 0)[..., None], out_TXD, 0), axis=1)


def _call(x, matrices, scales, biases, *, rows, num_choices, finish, gather, tile, interpret, name):
    N, K = matrices[0].shape[1], x.shape[1]
    depth = tile.depth
    if scales[0] is not None:
        depth = min(depth, K // scales[0].shape[2])  # one iteration sees one scale a column
    tile = tile._replace(columns=min(tile.columns, _power_of_two(N)), depth=min(depth, _power_of_two(K)))
    operands = [a for a in (*matrices, *scales, *biases) if a is not None]
    kernel = functools.partial(
        _kernel,
        num_matrices=len(matrices),
        has_scale=scales[0] is not None,
        has_bias=biases[0] is not None,
        find_rows=rows.find,
        num_row_refs=len(rows.arrays),
        num_choices=num_choices,
        finish=finish,
        gather=gather,
        tile=tile,
    )
    return pl.pallas_call(
        kernel,
        grid=(rows.num_blocks, pl.cdiv(N, tile.columns)),
        out_shape=jax.ShapeDtypeStruct((rows.num_rows, N), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=name,
    )(x, *rows.arrays, *operands)


def _kernel(
    x_ref,
    *refs,
    num_matrices,
    has_scale,
    has_bias,
    find_rows,
    num_row_refs,
    num_choices,
    finish,
    gather,
    tile,
):
    """One block of rows, some output columns, of each matrix.

    With `gather` row i reads the token of its pair and is written to row i; without, row i is read
    and written to its pair.
    """
    row_refs, (*refs, out_ref) = refs[:num_row_refs], refs[num_row_refs:]
    matrix_refs = refs[:num_matrices]
    scale_refs = refs[num_matrices : 2 * num_matrices] if has_scale else [None] * num_matrices
    bias_refs = refs[-num_matrices:] if has_bias else [None] * num_matrices
    N, K = matrix_refs[0].shape[1], x_ref.shape[1]
    expert, has_rows, is_row, row, pair = find_rows(*row_refs, tile.rows)
    read, write = (pair // num_choices, row) if gather else (row, pair)
    column = pl.program_id(1) * tile.columns + jnp.arange(tile.columns)
    is_column = column < N

    def multiply(k, sums):
        inner = k * tile.depth + jnp.arange(tile.depth)
        is_inner = inner < K
        x = _load(x_ref, (), read, inner, is_row, is_inner)
        out = []
        for total, matrix_ref, scale_ref in zip(sums, matrix_refs, scale_refs):
            matrix = _load(matrix_ref, (expert,), column, inner, is_column, is_inner)
            product = _dot(x, matrix.astype(x.dtype).T)
            if scale_ref is not None:
                rows, depth = scale_ref.shape[1:]
                at = scale_ref.at[expert, column // (N // rows), k * tile.depth // (K // depth)]
                product *= plt.load(at, mask=is_column, other=jnp.float32(0))[None, :]
            out.append(total + product)
        return tuple(out)

    zeros = tuple(jnp.zeros((tile.rows, tile.columns), jnp.float32) for _ in matrix_refs)
    steps = jnp.where(has_rows, pl.cdiv(K, tile.depth), jnp.int32(0))
    sums = lax.fori_loop(0, steps, multiply, zeros)
    for i, bias_ref in enumerate(bias_refs):
        if bias_ref is not None:
            bias = plt.load(bias_ref.at[expert, column], mask=is_column, other=jnp.asarray(0, bias_ref.dtype))
            sums = (*sums[:i], sums[i] + bias.astype(jnp.float32)[None, :], *sums[i + 1 :])
    plt.store(
        out_ref.at[write[:, None], column[None, :]],
        finish(*sums).astype(out_ref.dtype),
        mask=is_row[:, None] & is_column[None, :],
    )


def _find_sorted(order_ref, expert_ref, start_ref, end_ref, tile_rows):
    block = pl.program_id(0)
    start, end = start_ref[block], end_ref[block]
    row = start + jnp.arange(tile_rows)
    is_row = row < end
    # Lanes without a row point past the end: in interpret mode a masked store writes back what it read.
    pair = plt.load(order_ref.at[row], mask=is_row, other=jnp.int32(order_ref.shape[0]))
    return expert_ref[block], start < end, is_row, row, pair


def _find_unsorted(expert_ref, tile_rows):
    """The block of a pair: all tokens that name its expert, where no pair before it does; a row is a pair."""
    T, X = expert_ref.shape
    block = pl.program_id(0)
    expert = expert_ref[block // X, block % X]
    token, choice = jnp.arange(tile_rows)[:, None], jnp.arange(pl.next_power_of_2(X))[None, :]
    named = plt.load(expert_ref.at[token, choice], mask=(token < T) & (choice < X), other=jnp.int32(-1))
    pair = jnp.where((named == expert) & (named >= 0), token * X + choice, T * X).min(axis=1)
    has_rows = pair.min(axis=0) == block
    is_row = has_rows & (pair < T * X)
    pair = jnp.where(is_row, pair, T * X)
    return jnp.maximum(expert, 0), has_rows, is_row, pair, pair


def _load(ref, which, row, column, is_row, is_column):
    mask = is_row[:, None] & is_column[None, :]
    ref = ref.at[*which, row[:, None], column[None, :]]
    return plt.load(ref, mask=mask, other=jnp.asarray(0, ref.dtype))


def _dot(a, b):
    return plt.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, and at least 16, as a matrix product needs."""
    return max(16, pl.next_power_of_2(n))
