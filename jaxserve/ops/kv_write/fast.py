"""Rotation and KV write for CUDA: one Pallas-Triton kernel where XLA makes three and a slice.

A program takes one token and some query heads; the first one of a token its keys and values too. All
of it is memory traffic: on few tokens the time is that of a kernel's start, and there is one instead
of four in every layer.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.kv_write.cached import cached

QUERY_HEADS = 16  # of one program


def rotate_and_write(
    query,
    key,
    value,
    rotation,
    key_pages,
    value_pages,
    page_T,
    offset_T,
    *,
    page_offset,
    interpret: bool = False,
):
    """See `kv_write.rotate_and_write`."""
    T, _, K = query.array_TXK.shape
    H = query.count
    if T == 0:
        return query.value_THK, key_pages, value_pages
    heads = min(QUERY_HEADS, pl.next_power_of_2(H))
    kernel = functools.partial(
        _kernel,
        first=(query.first, key.first, value.first),
        H=H,
        heads=heads,
        half=0 if rotation is None else rotation[0].shape[1],
    )
    turn = (jnp.zeros((T, 1), jnp.float32),) * 2 if rotation is None else rotation
    # As an operand: a constant of each layer would make every layer a kernel of its own.
    page_offset_1 = jnp.full((1,), page_offset, jnp.int32)
    inputs = (
        [(part.array_TXK, *(part.scales or ())) for part in (query, key, value)],
        turn,
        (page_T, offset_T, page_offset_1),
        (key_pages, value_pages),
    )
    flat, tree = jax.tree.flatten(inputs)
    return pl.pallas_call(
        functools.partial(kernel, inputs=tree),
        grid=(T, pl.cdiv(H, heads)),
        out_shape=(
            jax.ShapeDtypeStruct((T, H, K), query.array_TXK.dtype),
            *(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (key_pages, value_pages)),
        ),
        input_output_aliases={len(flat) - 2: 1, len(flat) - 1: 2},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotate_and_write",
    )(*flat)


def _kernel(*refs, inputs, first, H, heads, half):
    *in_refs, out_ref, key_pages_ref, value_pages_ref = refs
    # The pools that are read are the same memory as those that are written.
    parts, (cos_ref, sin_ref), (page_ref, offset_ref, page_offset_ref), _ = jax.tree.unflatten(
        inputs, in_refs
    )
    t, part = pl.program_id(0), pl.program_id(1)
    G = key_pages_ref.shape[2]

    rotation = _load_rotation(cos_ref, sin_ref, t, half) if half else None

    head = part * heads + jnp.arange(heads)
    is_head = head < H
    query = _load(parts[0], t, first[0] + head, is_head, rotation, half)
    _store(out_ref, (t,), head, is_head, query)

    head = jnp.arange(pl.next_power_of_2(G))
    is_written = (page_ref[t] >= 0) & (part == 0)
    is_head = (head < G) & is_written
    # Lanes that store nothing point past the end: in interpret mode they write back what they read.
    at = jnp.where(is_written, page_ref[t] + page_offset_ref[0], key_pages_ref.shape[0]), offset_ref[t]
    key = _load(parts[1], t, first[1] + head, is_head, rotation, half)
    value = _load(parts[2], t, first[2] + head, is_head, None, 0)
    _store(key_pages_ref, at, head, is_head, key)
    _store(value_pages_ref, at, head, is_head, value)


def _load_rotation(cos_ref, sin_ref, t, half):
    column = jnp.arange(pl.next_power_of_2(half))
    return tuple(
        plt.load(ref.at[t, column], mask=column < half, other=jnp.float32(0))[None, :]
        for ref in (cos_ref, sin_ref)
    )


def _load(refs, t, head, is_head, rotation, half):
    """Some heads of token t, rotated, as runs of columns: [(first column, columns, values)]."""
    ref, *scale_refs = refs

    def run(begin, count):
        column = jnp.arange(pl.next_power_of_2(count))[None, :]
        at, mask = (head[:, None], begin + column), is_head[:, None] & (column < count)
        loaded = plt.load(ref.at[t, *at], mask=mask, other=jnp.asarray(0, ref.dtype))
        if not scale_refs:
            return loaded
        row_ref, column_ref = scale_refs
        scale = plt.load(column_ref.at[*at], mask=mask, other=jnp.float32(0)) * row_ref[t, 0]
        return (loaded.astype(jnp.float32) * scale).astype(ref.dtype)

    runs, K = [], ref.shape[-1]
    if rotation is not None:
        cos, sin = rotation
        one, two = run(0, half).astype(jnp.float32), run(half, half).astype(jnp.float32)
        runs.append((0, half, (one * cos - two * sin).astype(ref.dtype)))
        runs.append((half, half, (two * cos + one * sin).astype(ref.dtype)))
    if kept := K - 2 * half:
        runs.append((2 * half, kept, run(2 * half, kept)))
    return runs


def _store(ref, at, head, is_head, runs):
    for begin, count, value in runs:
        column = jnp.arange(pl.next_power_of_2(count))[None, :]
        mask = is_head[:, None] & (column < count)
        plt.store(ref.at[*at, head[:, None], begin + column], cached(value, ref.dtype), mask=mask)
