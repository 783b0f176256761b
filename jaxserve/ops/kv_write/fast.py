"""The norm of heads, rotation and KV write for CUDA: one Pallas-Triton kernel where XLA makes up to five and
a slice.

A program takes one token and some query heads; the first one of a token its keys and values too. All
of it is memory traffic: on few tokens the time is that of a kernel's start, and there is one instead
of four in every layer, or of six where queries and keys have norms.
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
    half = 0 if rotation is None else rotation[0].shape[1]
    turn = (jnp.zeros((T, 1), jnp.float32),) * 2 if rotation is None else rotation
    # As an operand: a constant of each layer would make every layer a kernel of its own.
    page_offset_1 = jnp.full((1,), page_offset, jnp.int32)
    inputs = (
        (query, key, value),
        turn,
        (page_T, offset_T, page_offset_1),
        (key_pages, value_pages),
    )
    flat, tree = jax.tree.flatten(inputs)
    return pl.pallas_call(
        functools.partial(_kernel, inputs=tree, heads=heads, half=half),
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


def _kernel(*refs, inputs, heads, half):
    *in_refs, out_ref, key_pages_ref, value_pages_ref = refs
    # The pools that are read are the same memory as those that are written.
    (query, key, value), turn, place, _ = jax.tree.unflatten(inputs, in_refs)
    page_ref, offset_ref, page_offset_ref = place
    t, part = pl.program_id(0), pl.program_id(1)
    G = key_pages_ref.shape[2]

    rotation = (half, *_load_rotation(turn, t, half)) if half else None

    head = part * heads + jnp.arange(heads)
    is_head = head < query.count
    _store(out_ref, (t,), head, is_head, _load(query, t, head, is_head, rotation))

    head = jnp.arange(pl.next_power_of_2(G))
    is_written = (page_ref[t] >= 0) & (part == 0)
    is_head = (head < G) & is_written
    # Lanes that store nothing point past the end: in interpret mode they write back what they read.
    at = jnp.where(is_written, page_ref[t] + page_offset_ref[0], key_pages_ref.shape[0]), offset_ref[t]
    new = _load(key, t, head, is_head, rotation), _load(value, t, head, is_head, None)
    for pages_ref, runs in zip((key_pages_ref, value_pages_ref), new):
        _store(pages_ref, at, head, is_head, runs)


def _load_rotation(turn, t, half):
    column = jnp.arange(pl.next_power_of_2(half))
    return [plt.load(ref.at[t, column], mask=column < half, other=jnp.float32(0))[None, :] for ref in turn]


def _load(part, t, head, is_head, rotation):
    """Some heads of token t, normed and rotated, as runs of columns: [(first column, columns, values)].

    Args:
        rotation: (how many pairs turn, cosines, sines), or None.
    """
    K, dtype = part.array_TXK.shape[-1], part.array_TXK.dtype
    half = 0 if rotation is None else rotation[0]
    bounds = [(begin, count) for begin, count in ((0, half), (half, half), (2 * half, K - 2 * half)) if count]
    values = [_load_run(part, t, head, is_head, *run) for run in bounds]
    if part.norm is not None:
        values = _normalise(part.norm, bounds, values, K)
    if rotation is not None:
        _, cos, sin = rotation
        one, two = (value.astype(jnp.float32) for value in values[:2])
        values[:2] = [x.astype(dtype) for x in (one * cos - two * sin, two * cos + one * sin)]
    return [(*run, value) for run, value in zip(bounds, values)]


def _load_run(part, t, head, is_head, begin, count):
    ref, at_head = part.array_TXK, part.first + head[:, None]
    column = jnp.arange(pl.next_power_of_2(count))[None, :]
    mask = is_head[:, None] & (column < count)
    loaded = plt.load(ref.at[t, at_head, begin + column], mask=mask, other=jnp.asarray(0, ref.dtype))
    if part.scales is None:
        return loaded
    row_ref, column_ref = part.scales
    scale = plt.load(column_ref.at[at_head, begin + column], mask=mask, other=jnp.float32(0)) * row_ref[t, 0]
    return (loaded.astype(jnp.float32) * scale).astype(ref.dtype)


def _normalise(norm, bounds, values, K):
    """See `ops.norm.rms_norm`; columns beyond a run's end are zero."""
    wide = [value.astype(jnp.float32) for value in values]
    mean = sum(jnp.sum(x * x, axis=1) for x in wide) / K
    factor = jax.lax.rsqrt(mean + norm.eps)[:, None]
    out = []
    for (begin, count), value, x in zip(bounds, values, wide):
        column = jnp.arange(pl.next_power_of_2(count))
        gain = plt.load(
            norm.gain_K.at[begin + column], mask=column < count, other=jnp.asarray(0, norm.gain_K.dtype)
        )
        gain = gain.astype(jnp.float32) + jnp.float32(norm.offset)
        out.append((x * factor * gain[None, :]).astype(value.dtype))
    return out


def _store(ref, at, head, is_head, runs):
    for begin, count, value in runs:
        column = jnp.arange(pl.next_power_of_2(count))[None, :]
        mask = is_head[:, None] & (column < count)
        plt.store(ref.at[*at, head[:, None], begin + column], cached(value, ref.dtype), mask=mask)
