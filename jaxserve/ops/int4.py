"""Integers of four bits with a scale and a zero point for each group of a row's numbers.

A weight is (code - zero) * scale, code and zero being 0 to 15. On a device codes lie as
`ops.four_bits` has them; scales are in the model's dtype, of 16 bits, and so are zeros: as the number that is
subtracted from one whose lowest bits are a code's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxserve.ops import four_bits

MAX_GROUP = 128  # numbers that share a scale on a device: a larger group's is repeated
# So shifted, a word has a code in the low bits of each half.
PARTS: four_bits.Parts = tuple(((0x000F, -4 * pair),) for pair in range(4))
PLACED = four_bits.placed(PARTS, np.arange(16))


class Offset(NamedTuple):
    """The number from which a dtype counts by ones, and its bits."""

    value: int
    bits: int


def offset(dtype: DTypeLike) -> Offset:
    return Offset(128, 0x4300) if dtype == jnp.bfloat16 else Offset(1024, 0x6400)


def group_on_device(group: int) -> int:
    """Numbers that share a scale there, where so many do in a checkpoint; 0 where that cannot be."""
    if group % four_bits.COLUMNS:
        return 0
    return MAX_GROUP if group % MAX_GROUP == 0 else group if MAX_GROUP % group == 0 else 0


def pack(codes: np.ndarray) -> np.ndarray:
    """uint8 [N, K] of 0 to 15 -> [N / 64 rounded up, K / 2, 64]."""
    pairs = codes[:, 0::2] | codes[:, 1::2] << 4
    return four_bits.pack(pairs.reshape(len(codes), -1, four_bits.COLUMNS // 2), PLACED)


def pack_scales(scales: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """[N, K / group] -> [N / 64 rounded up, K / group, 64]."""
    return four_bits.pack_rows(scales.astype(jnp.dtype(dtype)))


def pack_zeros(zeros: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Codes that stand for 0, as `pack_scales`."""
    return pack_scales(zeros.astype(np.float32) + offset(dtype).value, dtype)


def widen(packed: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """[..., N, K] in the scales' dtype: each number's distance from its zero times its scale."""
    group = packed.shape[-2] * 2 // scales.shape[-2]
    codes = four_bits.halves(packed, PARTS).astype(jnp.float32) + offset(scales.dtype).value
    of_pairs = (four_bits.of_pairs(array.astype(jnp.float32), group) for array in (scales, zeros))
    scale, zero = of_pairs
    return four_bits.unpack((codes - zero) * scale).astype(scales.dtype)
