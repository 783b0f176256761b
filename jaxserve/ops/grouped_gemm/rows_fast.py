"""`rows.group` and `rows.place` for CUDA: a counting sort in one small kernel.

XLA makes ten kernels of the reference, a radix sort among them. At a few rows a layer of experts
reads few weights, and the time of its kernels is the time to start them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.grouped_gemm.rows import Blocks, Places

CHUNK = 1024  # pairs that a program looks at in one iteration


def group(expert_TX: jax.Array, num_experts: int, block_rows: int, *, interpret: bool = False) -> Blocks:
    """As `rows.group`, but `order_M` is unset from the last row of an expert on, and any block may be empty.

    The blocks of expert e begin with number first_e // block_rows + e, first_e being its first row. Those
    of the experts before it have room there, however many rows each of them has, so that a program counts
    its own expert's rows and all before, and not each expert's.
    """
    return Blocks(*_sort(expert_TX, num_experts, block_rows, padded=False, interpret=interpret))


def place(expert_TX: jax.Array, num_experts: int, block_rows: int, *, interpret: bool = False) -> Places:
    """Blocks have the numbers that `group` gives them, and a place for as many rows as a block can have."""
    row_M, *blocks = _sort(expert_TX, num_experts, block_rows, padded=True, interpret=interpret)
    return Places(row_M, *blocks, block_rows=block_rows)


def _sort(expert_TX, num_experts, block_rows, *, padded, interpret):
    expert_M = expert_TX.reshape(-1)
    M, E = expert_M.shape[0], num_experts
    B = M // block_rows + E
    chunk = min(CHUNK, pl.next_power_of_2(M))
    return pl.pallas_call(
        functools.partial(_kernel, num_experts=E, chunk=chunk, block_rows=block_rows, padded=padded),
        grid=(E,),
        out_shape=tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (M, B, B, B)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="experts_place",
    )(expert_M)


def _kernel(expert_ref, sorted_ref, owner_ref, start_ref, end_ref, *, num_experts, chunk, block_rows, padded):
    """The rows and the blocks of expert e, and the empty blocks after those.

    `sorted_ref` gets the pair of each row, or where blocks are padded, the row of each pair.
    """
    expert, B = pl.program_id(0), owner_ref.shape[0]
    num_chunks = pl.cdiv(expert_ref.shape[0], chunk)

    def count(i, counts):
        before, own = counts
        other = _load_chunk(expert_ref, i, chunk)
        return before + _sum((other >= 0) & (other < expert)), own + _sum(other == expert)

    before, size = lax.fori_loop(0, num_chunks, count, (jnp.int32(0), jnp.int32(0)))
    begin = before // block_rows + expert
    first = begin * block_rows if padded else before
    last = first + size

    def place(i, row):
        mine = _load_chunk(expert_ref, i, chunk) == expert
        rank = jnp.cumsum(mine.astype(jnp.int32))
        pair, own = i * chunk + jnp.arange(chunk), row + rank - 1
        at, value = (pair, own) if padded else (own, pair)
        # Lanes that store nothing point past the end: in interpret mode they write back what they read.
        plt.store(sorted_ref.at[jnp.where(mine, at, sorted_ref.shape[0])], value, mask=mine)
        return row + rank.max(axis=0)

    lax.fori_loop(0, num_chunks, place, first)

    block = jnp.arange(pl.next_power_of_2(B))
    until = jnp.where(expert == num_experts - 1, B, (before + size) // block_rows + expert + 1)
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
