"""Rows of experts for `hopper_product`: tokens copied to their places, and in float8 on the way.

Rows that nobody has are unset.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.float8_rows import FLOAT8_MAX
from jaxserve.ops.grouped_gemm.hopper_product import Rows


def copy(hidden_TD, expert_TX, row_TX, num_rows: int, *, group: int | None = None, interpret=False) -> Rows:
    """Each token at the rows of its experts, [num_rows, D].

    Args:
        row_TX: where; what stands beside an id of -1 is not used.
        group: how many numbers share a scale, in float8; None: as they are.
    """
    T, D = hidden_TD.shape
    return _call(hidden_TD, expert_TX, row_TX, (num_rows, D), T, group, interpret, "experts_copy")


def quantise(inner_MF, expert_TX, row_TX, *, group: int, interpret=False) -> Rows:
    """The rows of experts in float8, where they are."""
    pairs = expert_TX.size
    arrays = inner_MF, expert_TX.reshape(pairs, 1), row_TX.reshape(pairs, 1)
    return _call(*arrays, inner_MF.shape, pairs, group, interpret, "experts_quantise", in_place=True)


def _call(value, expert_TX, row_TX, shape, programs, group, interpret, name, in_place=False) -> Rows:
    num_rows, width = shape
    numbers = jax.ShapeDtypeStruct(shape, value.dtype if group is None else jnp.float8_e4m3fn)
    scales = () if group is None else (jax.ShapeDtypeStruct((width // group, num_rows), jnp.float32),)
    return Rows(
        *pl.pallas_call(
            functools.partial(_kernel, group=group, in_place=in_place),
            grid=(programs,),
            out_shape=(numbers, *scales),
            # 16 numbers a thread up to rows of 16,384, two loads of 16 bytes.
            compiler_params=plt.CompilerParams(
                num_warps=min(32, max(1, pl.next_power_of_2(width) // 512)), num_stages=1
            ),
            interpret=interpret,
            name=name,
        )(value, expert_TX, row_TX)
    )


def _kernel(value_ref, expert_ref, row_ref, out_ref, *scale_refs, group, in_place):
    """A token, or a row in place, to wherever it belongs."""
    program, width = pl.program_id(0), value_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(width))
    is_column = column < width
    source = program
    if in_place:
        source = jnp.where(expert_ref[program, 0] >= 0, row_ref[program, 0], 0)
    value = plt.load(value_ref.at[source, column], mask=is_column, other=jnp.asarray(0, value_ref.dtype))
    scales = []
    if group is not None:
        value, scale = _quantised(value.astype(jnp.float32), group if group < width else value.shape[0])
        scales.append(scale)
    for choice in range(expert_ref.shape[1]):
        is_named = expert_ref[program, choice] >= 0
        # What is not stored points past the end: in interpret mode it is read and written back.
        row = jnp.where(is_named, row_ref[program, choice], out_ref.shape[0])
        plt.store(out_ref.at[row, column], value.astype(out_ref.dtype), mask=is_column & is_named)
        for scale_ref, scale in zip(scale_refs, scales):
            of_group = jnp.arange(scale.shape[0])
            is_group = (of_group < scale_ref.shape[0]) & is_named
            plt.store(scale_ref.at[of_group, row], scale, mask=is_group)


def _quantised(value, group: int):
    """(numbers, scales), the largest of each group being 448."""
    groups = value.reshape(-1, group)
    scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=1), jnp.float32(1e-12)) / FLOAT8_MAX
    numbers = jnp.clip(groups / scale[:, None], -FLOAT8_MAX, FLOAT8_MAX)
    return numbers.reshape(value.shape), scale
