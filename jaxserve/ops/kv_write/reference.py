"""Rotation and KV write in jax.numpy: the truth for the kernel and the path on a CPU."""

import jax
import jax.numpy as jnp

from jaxserve.ops.kv_write.cached import cached


def rotate_and_write(query, key, value, rotation, key_pages, value_pages, page_T, offset_T, *, page_offset):
    """See `kv_write.rotate_and_write`."""
    query_THK, key_TGK = (rotate(heads.value_THK, rotation) for heads in (query, key))
    key_pages = write(key_pages, page_T, offset_T, page_offset, key_TGK)
    value_pages = write(value_pages, page_T, offset_T, page_offset, value.value_THK)
    return query_THK, key_pages, value_pages


def rotate(
    x_THK: jax.Array, rotation: tuple[jax.Array, jax.Array] | None, *, interleaved: bool = False
) -> jax.Array:
    """Rotates the pairs (i, i + n/2) of the first n numbers of every head; the rest stays.

    n is all of the head but where a family rotates a part. `interleaved`: pairs are (2i, 2i + 1)
    and come out as (i, i + n/2), the same change for queries and keys, which no score sees. In
    float32, back to the dtype of `x_THK`. Source: Su et al. 2021, equation 34.
    """
    if rotation is None:
        return x_THK
    cos, sin = (x[:, None, :] for x in rotation)
    n = 2 * cos.shape[-1]
    if interleaved:
        x_THK = jnp.concatenate((x_THK[..., 0:n:2], x_THK[..., 1:n:2], x_THK[..., n:]), axis=-1)
    first, second = jnp.split(x_THK[..., :n].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return jnp.concatenate((rotated.astype(x_THK.dtype), x_THK[..., n:]), axis=-1)


def write(
    pages: jax.Array, page_T: jax.Array, offset_T: jax.Array, page_offset: int | jax.Array, x: jax.Array
) -> jax.Array:
    """Token t's part of `x` to its page and offset; nowhere for page -1.

    Tokens that go nowhere get pages past the pool, all different, so that the scatter may be told
    that no two indices are equal.
    """
    nowhere_T = pages.shape[0] + jnp.arange(page_T.shape[0], dtype=page_T.dtype)
    page_T = jnp.where(page_T < 0, nowhere_T, page_T + page_offset)
    return pages.at[page_T, offset_T].set(cached(x, pages.dtype), mode="drop", unique_indices=True)
