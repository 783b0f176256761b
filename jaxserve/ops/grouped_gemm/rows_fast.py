"""`rows.group` for CUDA: a counting sort in one small kernel.

XLA makes ten kernels of the reference, a radix sort among them. At a few rows a layer of experts
reads few weights, and the time of its kernels is the time to start them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.grouped_gemm.rows import Blocks

CHUNK = 1024  # pairs that a program looks at in one iteration


def group(expert_TX: jax.Array, num_experts: int, block_rows: int, *, interpret: bool = False) -> Blocks:
    """As `rows.group`, but `order_M` is unset from the last row of an expert on, and any block may be empty.

    The blocks of expert e begin with number first_e // block_rows + e, first_e being its first row. Those
    of the experts before it have room there, however many rows each of them has, so that a program counts
    its own expert's rows and all before, and not each expert's.
    """
    expert_M = expert_TX.reshape(-1)
    M, E = expert_M.shape[0], num_experts
    B = M // block_rows + E
    chunk = min(CHUNK, pl.next_power_of_2(M))
    arrays = pl.pallas_call(
        functools.partial(_kernel, num_experts=E, chunk=chunk, block_rows=block_rows),
        grid=(E,),
        out_shape=tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (M, B, B, B)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="experts_place",
    )(expert_M)
    return Blocks(*arrays)


def _kernel(expert_ref, order_ref, owner_ref, start_ref, end_ref, *, num_experts, chunk, block_rows):
    """The rows and the blocks of expert e, and the empty blocks after those."""
    expert, B = pl.program_id(0), owner_ref.shape[0]
    num_chunks = pl.cdiv(expert_ref.shape[0], chunk)

    def count(i, counts):
        before, own = counts
        other = _load_chunk(expert_ref, i, chunk)
        return before + _sum((other >= 0) & (other < expert)), own + _sum(other == expert)

    first, size = lax.fori_loop(0, num_chunks, count, (jnp.int32(0), jnp.int32(0)))
    last = first + size

    def place(i, row):
        mine = _load_chunk(expert_ref, i, chunk) == expert
        rank = jnp.cumsum(mine.astype(jnp.int32))
        pair = i * chunk + jnp.arange(chunk)
        # Lanes that store nothing point past the end: in interpret mode they write back what they read.
        at = jnp.where(mine, row + rank - 1, order_ref.shape[0])
        plt.store(order_ref.at[at], pair, mask=mine)
        return row + rank.max(axis=0)

    lax.fori_loop(0, num_chunks, place, first)

    block = jnp.arange(pl.next_power_of_2(B))
    begin = first // block_rows + expert
    until = jnp.where(expert == num_experts - 1, B, last // block_rows + expert + 1)
    is_mine = (block >= begin) & (block < until)
    start = jnp.minimum(first + (block - begin) * block_rows, last)
    end = jnp.minimum(start + block_rows, last)
    for ref, value in ((owner_ref, jnp.full(block.shape, expert)), (start_ref, start), (end_ref, end)):
        plt.store(ref.at[jnp.where(is_mine, block, B)], value, mask=is_mine)


def _load_chunk(expert_ref, i, chunk):
    pair = i * chunk + jnp.arange(chunk)
    return plt.load(expert_ref.at[pair], mask=pair < expert_ref.shape[0], other=jnp.int32(-1))


def _sum(is_counted):
    return is_counted.astype(jnp.int32).sum(axis=0)
