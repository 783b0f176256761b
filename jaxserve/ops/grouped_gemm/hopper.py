"""Experts for Hopper GPUs: two grouped matrix products (`hopper_product`), in 16 bits or in float8.

Tokens are first copied to the rows of their experts. Where weights are in float8, tokens and what is between
the products meet them in float8 too, with a scale a row, or each 128 numbers where weights have blocks.

Only what `fits` says is computed here; the rest is `fast.feed_forward`'s.

Measured on H200s (docs/kernels.md), us a layer, `fast.feed_forward` in brackets; in bfloat16 for
DeepSeek-V2-Lite (64 experts, 6 a token), tokens that spread and such that choose the same six: 315 and 86
(303 and 123) at 128, 380 and 220 (414 and 273) at 1,024. In float8 for Qwen3-30B-A3B (128 experts, 8 a
token), spread, a scale a channel and a block: 36 and 35 (41 and 53) for one token, 226 and 229 (284 and 291)
at 256, 393 and 519 (1,268 and 1,263) at 2,048.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.ops import four_bits
from jaxserve.ops.grouped_gemm import hopper_packed, hopper_rows
from jaxserve.ops.grouped_gemm.hopper_product import (
    BLOCK,
    FEW,
    MAX_DEPTH,
    Matrices,
    Rows,
    Tile,
    alone,
    multiply,
)
from jaxserve.ops.grouped_gemm.parts import WORKSPACE_BYTES, in_parts, num_parts
from jaxserve.ops.grouped_gemm.rows import Places, num_blocks, place_unsorted
from jaxserve.ops.grouped_gemm.rows_fast import place

MIN_ROWS = 12  # of an expert in 16 bits on average, were they spread evenly


def choose_tiles(rows_per_expert: float, weights) -> tuple[Any, Any]:
    """Of the product with gate and up, and the one with down.

    An expert of few rows is read at the memory's speed, which wants wide rows of its matrices; one of many
    wants each tile used for many products.
    """
    if four_bits.is_packed(weights.gate_EFD):
        return hopper_packed.choose_tiles(rows_per_expert, weights)
    _, F, D = weights.gate_EFD.shape
    is_short = weights.gate_scale is not None
    if rows_per_expert < 64:
        groups, depth, columns, stages = 1, 128, (64, 128), 4
    elif _has_blocks(weights):
        groups, depth, columns, stages = 2, BLOCK, (64, 128), 5
    else:
        groups, depth, columns, stages = 2, 128 if is_short else 64, (128, 256), 4
    return tuple(  # pyright: ignore[reportReturnType]
        Tile(groups, _divisor(N, most), _divisor(K, depth), stages)
        for most, N, K in zip(columns, (F, D), (D, F))
    )


def fits(hidden_TD, weights, rows_per_expert: float) -> bool:
    """Whether `feed_forward` here can compute this, and experts have rows enough for it to be the faster."""
    if four_bits.is_packed(weights.gate_EFD):
        tiles = hopper_packed.choose_tiles(rows_per_expert, weights)
        dtype = jnp.bfloat16 if weights.gate_zero is None else weights.gate_scale.dtype
        return hidden_TD.dtype == dtype and all(tile.depth for tile in tiles)
    _, F, D = weights.gate_EFD.shape
    if hidden_TD.dtype not in (jnp.bfloat16, jnp.float16) or weights.gate_bias_EF is not None:
        return False
    if weights.gate_scale is None:
        is_read = weights.gate_EFD.dtype == hidden_TD.dtype and rows_per_expert >= MIN_ROWS
        return is_read and F % 64 == 0 and D % 64 == 0
    if weights.gate_EFD.dtype != jnp.float8_e4m3fn:
        return False
    if weights.gate_scale.shape[1:] == (F, 1):
        return F % 64 == 0 and D % 64 == 0
    has_blocks = weights.gate_scale.shape[1:] == (F // BLOCK, D // BLOCK)
    return has_blocks and F % BLOCK == D % BLOCK == 0 and max(F, D) <= MAX_DEPTH


@functools.partial(jax.jit, static_argnames=("activation", "interpret", "tiles", "workspace_bytes"))
def feed_forward(
    hidden_TD,
    expert_TX,
    weight_TX,
    weights,
    activation,
    tiles: tuple[Any, Any],
    *,
    interpret=None,
    workspace_bytes: int = WORKSPACE_BYTES,
):
    """See `grouped_gemm.feed_forward`."""
    (T, X), E, D, F = expert_TX.shape, weights.gate_EFD.shape[0], hidden_TD.shape[1], _inner_width(weights)
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
    is_interpreted = interpret is not None
    places = _place(expert_TX, E, tiles[0].block_rows, is_interpreted)
    row_TX = places.row_M.reshape(T, X)
    options = dict(places=places, activation=activation, tiles=tiles, interpret=interpret)
    products = _packed_products if four_bits.is_packed(weights.gate_EFD) else _products
    out_MD = products(hidden_TD, expert_TX, row_TX, weights, **options)
    is_named = expert_TX >= 0
    out_TXD = out_MD[jnp.where(is_named, row_TX, 0)].astype(jnp.float32)
    if weights.down_bias_ED is not None:
        out_TXD += weights.down_bias_ED[jnp.where(is_named, expert_TX, 0)].astype(jnp.float32)
    out_TXD *= weight_TX.astype(jnp.float32)[..., None]
    return jnp.sum(jnp.where(is_named[..., None], out_TXD, 0), axis=1)


def _products(hidden_TD, expert_TX, row_TX, weights, *, places, activation, tiles, interpret):
    """Of each row its expert's output, [M, D]."""
    _, F, D = weights.gate_EFD.shape
    up_tile, down_tile = tiles
    is_interpreted = interpret is not None
    up, down = (weights.gate_EFD, weights.up_EFD), (weights.down_EDF,)
    up_group = down_group = None
    if weights.gate_scale is None:
        up, down = Matrices(up), Matrices(down)
    else:
        up = Matrices(up, (weights.gate_scale, weights.up_scale))
        down = Matrices(down, (weights.down_scale,))
        up_group, down_group = (BLOCK, BLOCK) if up.has_blocks else (D, F)
    product = functools.partial(multiply, places=places, dtype=hidden_TD.dtype, interpret=interpret)
    x = hopper_rows.copy(
        hidden_TD, expert_TX, row_TX, places.num_rows, group=up_group, interpret=is_interpreted
    )
    inner_MF = product(x, up, finish=activation, tile=up_tile, name="hopper_experts_up")
    inner = Rows(inner_MF)
    if down_group is not None:
        inner = hopper_rows.quantise(inner_MF, expert_TX, row_TX, group=down_group, interpret=is_interpreted)
    return product(inner, down, finish=alone, tile=down_tile, name="hopper_experts_down")


def _packed_products(hidden_TD, expert_TX, row_TX, weights, *, places, activation, tiles, interpret):
    up_tile, down_tile = tiles
    x, _ = hopper_rows.copy(hidden_TD, expert_TX, row_TX, places.num_rows, interpret=interpret is not None)
    biases = tuple(b for b in (weights.gate_bias_EF, weights.up_bias_EF) if b is not None)
    up = hopper_packed.Packed(weights.gate_EFD, _of_rows(weights.gate_scale, weights.gate_zero), biases)
    down = hopper_packed.Packed(weights.down_EDF, _of_rows(weights.down_scale, weights.down_zero))
    product = functools.partial(hopper_packed.multiply, places=places, interpret=interpret)
    inner_MF = product(x, up, finish=activation, num_matrices=2, tile=up_tile, name="packed_experts_up")
    out_MD = product(inner_MF, down, finish=alone, num_matrices=1, tile=down_tile, name="packed_experts_down")
    return out_MD[:, : hidden_TD.shape[1]]


def _of_rows(*arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    return tuple(array for array in arrays if array is not None)


def _place(expert_TX, num_experts: int, block_rows: int, is_interpreted: bool) -> Places:
    """Sorted by expert, unless one copy brings all tokens, and each pair may have a block of its own."""
    T, pairs = expert_TX.shape[0], expert_TX.size
    if min(FEW, block_rows) >= T and num_blocks(pairs, num_experts, block_rows) == pairs:
        return place_unsorted(expert_TX, block_rows)
    return place(expert_TX, num_experts, block_rows, interpret=is_interpreted)


def _inner_width(weights) -> int:
    if four_bits.is_packed(weights.gate_EFD):
        return weights.gate_EFD.shape[1] * four_bits.ROWS // 2
    return weights.gate_EFD.shape[1]


def _has_blocks(weights) -> bool:
    return weights.gate_scale is not None and weights.gate_scale.shape[1] != weights.gate_EFD.shape[1]


def _divisor(n: int, most: int) -> int:
    """The greatest power of two that divides n, or `most` if that is less."""
    return min(n & -n, most)
