"""Which rows a grouped matrix product has, and how they are cut into blocks of one expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """The (token, choice) pairs sorted by expert, in blocks.

    Pair `order_M[i]` is row i; it is choice `pair % X` of token `pair // X`. Block b holds rows
    [start_B, end_B) of expert `expert_B`. In an empty one, start = end.
    """

    order_M: jax.Array
    expert_B: jax.Array
    start_B: jax.Array
    end_B: jax.Array

    @property
    def count(self) -> jax.Array:
        """Blocks that are not empty."""
        return jnp.sum(self.start_B < self.end_B, dtype=jnp.int32)


class Places(NamedTuple):
    """The (token, choice) pairs by expert, in blocks of `block_rows` places.

    Pair m is in row `row_M[m]`, which means nothing for an expert of -1. Block b is the rows from
    b * block_rows on; those of expert `expert_B` are [start_B, end_B), the first ones, or none.
    """

    row_M: jax.Array
    expert_B: jax.Array
    start_B: jax.Array
    end_B: jax.Array
    block_rows: int

    @property
    def num_rows(self) -> int:
        return self.expert_B.shape[0] * self.block_rows


def group(expert_TX: jax.Array, num_experts: int, block_rows: int) -> Blocks:
    """Sort pairs by expert. Those of expert -1 come last and are in no block; empty blocks come last."""
    expert_M = expert_TX.reshape(-1)
    expert_M = jnp.where(expert_M < 0, num_experts, expert_M)
    order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    size_E = jnp.sum(expert_M[None] == expert_E[:, None], axis=1, dtype=jnp.int32)
    first_E = jnp.cumsum(size_E) - size_E
    blocks_E = (size_E + block_rows - 1) // block_rows
    until_E = jnp.cumsum(blocks_E)
    M = expert_M.shape[0]
    block_B = jnp.arange(num_blocks(M, num_experts, block_rows), dtype=jnp.int32)
    owner_B = jnp.searchsorted(until_E, block_B, side="right", method="compare_all")
    owner_B = jnp.minimum(owner_B, num_experts - 1).astype(jnp.int32)
    is_block_B = block_B < until_E[-1]
    start_B = first_E[owner_B] + (block_B - (until_E - blocks_E)[owner_B]) * block_rows
    end_B = jnp.minimum(start_B + block_rows, (first_E + size_E)[owner_B])
    zero = jnp.zeros_like(start_B)
    return Blocks(
        order_M,
        owner_B,
        jnp.where(is_block_B, start_B, zero),
        jnp.where(is_block_B, end_B, zero),
    )


def place_unsorted(expert_TX: jax.Array, block_rows: int) -> Places:
    """A block for each pair: if it is the first of its expert, of all tokens in their order, else empty.

    Rows of tokens that do not name the expert are nobody's.
    """
    (T, X), expert_M = expert_TX.shape, expert_TX.reshape(-1)
    pair_M = jnp.arange(T * X, dtype=jnp.int32)
    is_same_MM = expert_M[:, None] == expert_M[None]
    first_M = jnp.min(jnp.where(is_same_MM, pair_M[None], T * X), axis=1)
    start_M = pair_M * block_rows
    count_M = jnp.where((first_M == pair_M) & (expert_M >= 0), T, 0)
    row_M = first_M * block_rows + pair_M // X
    return Places(row_M, jnp.maximum(expert_M, 0), start_M, start_M + count_M, block_rows)


def num_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """As many as there can be: every expert may have one that is not full."""
    return min(num_pairs, num_pairs // block_rows + num_experts)
