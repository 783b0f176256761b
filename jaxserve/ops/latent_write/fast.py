"""Norm, rotations and writes of latent attention for CUDA: one Pallas-Triton kernel where XLA makes five.

A program takes one token: some query heads of it, or (the last one) its latent and rotated part. All
of it is memory traffic: on few tokens the time is that of a kernel's start.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.ops.kv_write.cached import cached

QUERY_HEADS = 16  # of one program


def rotate_and_write_latent(
    query,
    down,
    norm_weight_L,
    rotation,
    latent_pages,
    rope_pages,
    page_T,
    offset_T,
    *,
    num_heads: int,
    eps: float,
    interleaved: bool,
    page_offset,
    interpret: bool = False,
):
    """See `latent_write.rotate_and_write_latent`."""
    T, H, K = query.array_TC.shape[0], num_heads, rope_pages.shape[-1]
    N, dtype = query.count // H - K, query.array_TC.dtype
    if T == 0:
        return jnp.zeros((0, H, N), dtype), jnp.zeros((0, H, K), dtype), latent_pages, rope_pages
    heads = min(QUERY_HEADS, pl.next_power_of_2(H))
    # As an operand: a constant of each layer would make every layer a kernel of its own.
    page_offset_1 = jnp.full((1,), page_offset, jnp.int32)
    inputs = (
        *(query.array_TC, down.array_TC, norm_weight_L[None], *rotation),
        *(page_T, offset_T, page_offset_1, latent_pages, rope_pages),
    )
    pools = len(inputs) - 2
    return pl.pallas_call(
        functools.partial(
            _kernel, firsts=(query.first, down.first), heads=heads, eps=eps, interleaved=interleaved
        ),
        grid=(T, pl.cdiv(H, heads) + 1),
        out_shape=(
            *(jax.ShapeDtypeStruct((T, H, size), dtype) for size in (N, K)),
            *(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (latent_pages, rope_pages)),
        ),
        input_output_aliases={pools: 2, pools + 1: 3},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotate_and_write_latent",
    )(*inputs)


def _kernel(
    query_ref,
    down_ref,
    norm_weight_ref,
    cos_ref,
    sin_ref,
    page_ref,
    offset_ref,
    page_offset_ref,
    old_latents_ref,
    old_ropes_ref,
    query_nope_ref,
    query_rope_ref,
    latent_pages_ref,
    rope_pages_ref,
    *,
    firsts,
    heads,
    eps,
    interleaved,
):
    del old_latents_ref, old_ropes_ref  # the same memory as latent_pages_ref and rope_pages_ref
    t, part = pl.program_id(0), pl.program_id(1)
    (_, H, N), K, L = query_nope_ref.shape, rope_pages_ref.shape[-1], latent_pages_ref.shape[-1]
    is_latent = part == pl.num_programs(1) - 1
    one_row = jnp.full((1, 1), True)

    def turn_and_store(ref, begin, is_row, out_ref, at):
        """The rotated numbers of `ref` from column `begin` [rows, 1] on."""
        half = K // 2
        cos, sin = (_load(x, t, 0, half, one_row) for x in (cos_ref, sin_ref))
        second, stride = (1, 2) if interleaved else (half, 1)
        one, two = (_load(ref, t, begin + i, half, is_row, stride).astype(jnp.float32) for i in (0, second))
        for i, x in enumerate((one * cos - two * sin, two * cos + one * sin)):
            _store(out_ref, at, i * half, half, is_row, x.astype(ref.dtype))

    @pl.when(~is_latent)
    def _():
        head = (part * heads + jnp.arange(heads))[:, None]
        is_head, begin = head < H, firsts[0] + head * (N + K)
        nope = _load(query_ref, t, begin, N, is_head)
        _store(query_nope_ref, (t, head), 0, N, is_head, nope)
        turn_and_store(query_ref, begin + N, is_head, query_rope_ref, (t, head))

    @pl.when(is_latent & (page_ref[t] >= 0))
    def _():
        at = page_ref[t] + page_offset_ref[0], offset_ref[t]
        wide = _load(down_ref, t, firsts[1], L, one_row).astype(jnp.float32)
        gain = _load(norm_weight_ref, 0, 0, L, one_row).astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.sum(wide * wide, axis=1, keepdims=True) / L + eps)
        _store(latent_pages_ref, at, 0, L, one_row, (wide * scale * gain).astype(down_ref.dtype))
        turn_and_store(down_ref, firsts[1] + L, one_row, rope_pages_ref, at)


def _load(ref, t, begin, count, is_row, stride=1):
    """Columns begin, begin + stride, ... of row t, for every `begin` [rows, 1]: [rows, power of two]."""
    column = jnp.arange(pl.next_power_of_2(count))[None, :]
    at = ref.at[t, begin + stride * column]
    return plt.load(at, mask=is_row & (column < count), other=jnp.asarray(0, ref.dtype))


def _store(ref, at, begin, count, is_row, value):
    """Lanes that store nothing lie past the end or are stored next: in interpret mode they write back
    what they read."""
    column = jnp.arange(value.shape[1])[None, :]
    mask = is_row & (column < count)
    plt.store(ref.at[*at, begin + column], cached(value, ref.dtype), mask=mask)
