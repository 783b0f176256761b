"""What the kernels for Hopper GPUs share: where they run, and parts of a warpgroup's program."""

import math
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

NUM_SMS = 132  # multiprocessors of an H100 and an H200
ROWS = 64  # of a warpgroup: a tensor core instruction has 64
TILE_ROWS = 8  # of swizzled shared memory


def swizzled(shape: tuple[int, ...], dtype: DTypeLike):
    """Shared memory as tensor cores and fast copies want it: rows lie in pieces of 128 bytes at most."""
    size = jnp.dtype(dtype).itemsize
    piece = math.gcd(shape[-1] * size, 128)
    assert piece >= 32, f"rows of {shape[-1]} numbers are no multiple of 32 bytes"
    tiling = plgpu.TilingTransform((TILE_ROWS, piece // size))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(piece)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def is_supported(min_sms: int = 0) -> bool:
    """Whether jax's devices can run these kernels, and have so many multiprocessors.

    Only from CUDA 13 on: jax's own causal kernel refuses 12.8 to 12.9, whose assembler compiles it wrongly.
    """
    device = jax.devices()[0]
    cuda = re.search(r"cuda (\d+)", device.client.platform_version)
    return (
        getattr(device, "compute_capability", None) == "9.0"
        and cuda is not None
        and int(cuda[1]) >= 13000
        and getattr(device, "core_count", 0) >= min_sms
    )


def clear_rows(value_ref, count):
    """Zero the rows from `count` on: a weight of 0 does not silence a NaN that a former owner left."""
    row = plgpu.broadcasted_iota(jnp.int32, value_ref.shape, 0, layout=plgpu.Layout.WGMMA)
    value = plgpu.load(value_ref, layout=plgpu.Layout.WGMMA)
    value_ref[...] = jnp.where(row < count, value, jnp.zeros_like(value))
    plgpu.commit_smem()


def store_rows(ref, value):
    """Into shared memory that is not swizzled, whose banks the store makes wait for each other.

    jax 0.11 does so without being told, and has no `store`; 0.12 wants to be told.
    """
    if (store := getattr(plgpu, "store", None)) is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)


def load_along(ref, *, axis, shape):
    """Numbers of rows (axis 0) or columns (1) as an array of products."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return lax.broadcast_in_dim(plgpu.load(ref, layout=layout, optimized=False), shape, [axis])


def columns(values, shape):
    """[rows] as `shape`, the same in all columns."""
    return lax.broadcast_in_dim(values, shape, [0])


def cdiv(a, b: int):
    return lax.div(a + (b - 1), jnp.int32(b))
