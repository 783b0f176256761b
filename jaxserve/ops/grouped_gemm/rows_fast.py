"""`rows.group` for CUDA: a counting sort in two small kernels.

XLA makes ten kernels of the reference, a radix sort among them. At a few rows a layer of experts
reads few weights, and the time of its kernels is the time to start them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.grouped_gemm.rows import Blocks, num_blocks

CHUNK = 1024  # pairs that a program looks at in one iteration


def group(expert_TX: jax.Array, num_experts: int, block_rows: int, *, interpret: bool = False) -> Blocks:
    """As `rows.group`, except that `order_M` is unset from the last row of an expert on."""
    expert_M = expert_TX.reshape(-1)
    M, E = expert_M.shape[0], num_experts
    B = num_blocks(M, E, block_rows)
    chunk = min(CHUNK, pl.next_power_of_2(M))
    call = functools.partial(
        pl.pallas_call,
        grid=(E,),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )
    size_E = call(
        functools.partial(_count_kernel, chunk=chunk),
        out_shape=jax.ShapeDtypeStruct((E,), jnp.int32),
        name="experts_count",
    )(expert_M)
    order_M, expert_B, start_B, end_B, count_1 = call(
        functools.partial(_place_kernel, chunk=chunk, block_rows=block_rows),
        out_shape=(
            jax.ShapeDtypeStruct((M,), jnp.int32),
            *(jax.ShapeDtypeStruct((B,), jnp.int32) for _ in range(3)),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ),
        name="experts_place",
    )(expert_M, size_E)
    return Blocks(order_M, expert_B, start_B, end_B, count_1[0])


def _count_kernel(expert_ref, size_ref, *, chunk):
    """How many pairs name expert e."""
    expert = pl.program_id(0)

    def add(i, total):
        return total + (_load_chunk(expert_ref, i, chunk) == expert).astype(jnp.int32).sum(axis=0)

    size_ref[expert] = lax.fori_loop(0, pl.cdiv(expert_ref.shape[0], chunk), add, jnp.int32(0))


def _place_kernel(
    expert_ref, size_ref, order_ref, owner_ref, start_ref, end_ref, count_ref, *, chunk, block_rows
):
    """The rows and the blocks of expert e, and the empty blocks of all."""
    expert, E, B = pl.program_id(0), size_ref.shape[0], owner_ref.shape[0]
    other = jnp.arange(pl.next_power_of_2(E))
    size = plt.load(size_ref.at[other], mask=other < E, other=jnp.int32(0))
    blocks = pl.cdiv(size, block_rows)
    first, first_block = _sum(size, other < expert), _sum(blocks, other < expert)
    own, total = _sum(size, other == expert), blocks.sum(axis=0)

    def place(i, row):
        mine = _load_chunk(expert_ref, i, chunk) == expert
        rank = jnp.cumsum(mine.astype(jnp.int32))
        pair = i * chunk + jnp.arange(chunk)
        # Lanes that store nothing point past the end: in interpret mode they write back what they read.
        at = jnp.where(mine, row + rank - 1, order_ref.shape[0])
        plt.store(order_ref.at[at], pair, mask=mine)
        return row + rank.max(axis=0)

    lax.fori_loop(0, pl.cdiv(expert_ref.shape[0], chunk), place, first)

    block = jnp.arange(pl.next_power_of_2(B))
    number = block - first_block
    is_mine = (number >= 0) & (number < pl.cdiv(own, block_rows))
    is_empty = (expert == 0) & (block >= total) & (block < B)
    start = jnp.where(is_empty, 0, first + number * block_rows)
    end = jnp.where(is_empty, 0, jnp.minimum(start + block_rows, first + own))
    for ref, value in ((owner_ref, jnp.full(block.shape, expert)), (start_ref, start), (end_ref, end)):
        plt.store(ref.at[jnp.where(is_mine | is_empty, block, B)], value, mask=is_mine | is_empty)
    plt.store(
        count_ref.at[jnp.zeros((1,), jnp.int32)], jnp.full((1,), total), mask=jnp.full((1,), expert == 0)
    )


def _load_chunk(expert_ref, i, chunk):
    pair = i * chunk + jnp.arange(chunk)
    return plt.load(expert_ref.at[pair], mask=pair < expert_ref.shape[0], other=jnp.int32(-1))


def _sum(value, where):
    return jnp.where(where, value, jnp.zeros_like(value)).sum(axis=0)
