"""Norm, rotations and writes of latent attention in jax.numpy: the truth for the kernel and the path on
a CPU."""

from jaxserve.ops.kv_write.reference import rotate, write
from jaxserve.ops.norm import rms_norm


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
):
    """See `latent_write.rotate_and_write_latent`."""
    L, K = latent_pages.shape[-1], rope_pages.shape[-1]
    down_TC = down.value_TC
    latent_TL = rms_norm(down_TC[:, :L], norm_weight_L, eps=eps)
    rope_TK = rotate(down_TC[:, None, L:], rotation, interleaved=interleaved)[:, 0]
    query_THC = query.value_TC.reshape(-1, num_heads, query.count // num_heads)
    query_THN = query_THC[..., :-K]
    query_THK = rotate(query_THC[..., -K:], rotation, interleaved=interleaved)
    latent_pages = write(latent_pages, page_T, offset_T, page_offset, latent_TL)
    rope_pages = write(rope_pages, page_T, offset_T, page_offset, rope_TK)
    return query_THN, query_THK, latent_pages, rope_pages
