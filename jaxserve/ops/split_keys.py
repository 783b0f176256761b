"""Decode rows whose keys several programs share (split-K), for attention kernels in Pallas-Triton.

A row has as many shares as its own length is worth. A row of one share is written where it belongs; of
another each program leaves its part and the logarithm of its denominator, and a second, small kernel combines
them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


class Split(NamedTuple):
    """How rows are cut: the most shares of one, and the blocks of keys that are worth a share."""

    most: int
    min_blocks: int = 1

    def shares(self, num_blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of a row with so many blocks, in a kernel: the number of its shares, and the blocks of each."""
        shares = jnp.clip(pl.cdiv(num_blocks, self.min_blocks), 1, self.most)
        return shares, pl.cdiv(num_blocks, shares)

    def parts(self, R: int, H: int, X: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a kernel makes beside its result, for `combine`: parts, logarithms, numbers of shares."""
        if self.most == 1:
            return ()
        return (
            jax.ShapeDtypeStruct((R, self.most, H, X), jnp.float32),
            jax.ShapeDtypeStruct((R, self.most, H), jnp.float32),
            jax.ShapeDtypeStruct((R,), jnp.int32),
        )


def combine(out_THX: jax.Array, parts_RZHX, lse_RZH, shares_R, *, warps: int, interpret: bool) -> jax.Array:
    """`out_THX`, in place, with those of the first R rows that have several shares.

    lse_RZH: base-2 logarithm of the denominator of each part.
    """
    R, _, H, _ = parts_RZHX.shape
    return pl.pallas_call(
        _combine_kernel,
        grid=(R, H),
        out_shape=jax.ShapeDtypeStruct(out_THX.shape, out_THX.dtype),
        input_output_aliases={3: 0},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="combine_shares",
    )(parts_RZHX, lse_RZH, shares_R, out_THX)


def _combine_kernel(part_ref, lse_ref, shares_ref, _, out_ref):
    """The mean of one row's and head's parts, weighted as the softmax of all keys would."""
    r, h = pl.program_id(0), pl.program_id(1)
    most, _, X = part_ref.shape[1:]
    shares = shares_ref[r]

    @pl.when(shares > 1)
    def _():
        split, column = jnp.arange(pl.next_power_of_2(most)), jnp.arange(pl.next_power_of_2(X))
        is_share, is_column = split < shares, column < X
        lse = plt.load(lse_ref.at[r, split, h], mask=is_share, other=jnp.float32(-jnp.inf))
        weight = jnp.exp2(lse - lse.max(axis=0))
        part = plt.load(
            part_ref.at[r, split[:, None], h, column[None, :]],
            mask=is_share[:, None] & is_column[None, :],
            other=jnp.float32(0),
        )
        mean = (part * weight[:, None]).sum(axis=0) / weight.sum(axis=0)
        plt.store(out_ref.at[r, h, column], mean.astype(out_ref.dtype), mask=is_column)
