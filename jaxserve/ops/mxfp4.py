"""Numbers of four bits (e2m1) with an exponent for each group of 32: MXFP4.

Two lie in a byte. Published files have neighbours there; on a device byte j of a group's 16 holds number j
in its low half and number j + 16 in its high half, so that each half of the bytes is whole runs of numbers.

Source: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GROUP = 32  # numbers that share an exponent
HALF = GROUP // 2  # and the bytes that hold them
MAX_EXPONENT = 240  # as stored, biased by 127: more would not fit into a float32 as `halves` has it
# The 16 values of an e2m1 number: one sign, two exponent bits, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def repack(published: np.ndarray) -> np.ndarray:
    """uint8 [..., groups, 16], the low half of a byte before its high half -> [..., groups * 16] as above."""
    codes = np.stack([published & 15, published >> 4], axis=-1).reshape(*published.shape[:-1], 2, HALF)
    low, high = codes[..., 0, :], codes[..., 1, :]
    return (low | high << 4).reshape(*published.shape[:-2], -1)


def halves(packed: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers in the low and in the high halves of bytes, in float32; bfloat16 holds them exactly.

    Plain arithmetic, so that a kernel may do it too: as the leading bits of a float16, which has numbers
    without an exponent as e2m1 has, a number is 2**14 times too small.

    Args:
        packed: uint8 [..., K / 2]. exponent: uint8 [..., K / 32].
    """
    power = lax.bitcast_convert_type((exponent.astype(jnp.int32) + 14) << 23, jnp.float32)
    factor, code = _spread(power), packed.astype(jnp.int32)

    def widen(high: jax.Array, rest: jax.Array) -> jax.Array:
        bits = ((high & 0x8000) | (rest & 0x0E00)).astype(jnp.uint16)
        return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * factor

    return widen(code << 12, code << 9), widen(code << 8, code << 5)


def _spread(of_group: jax.Array) -> jax.Array:
    """[..., groups] -> [..., groups * 16]: one for each byte."""
    spread = lax.broadcast_in_dim(of_group, (*of_group.shape, HALF), range(of_group.ndim))
    return spread.reshape(*of_group.shape[:-1], -1)


def widen(packed: jax.Array, exponent: jax.Array) -> jax.Array:
    """uint8 [..., K / 2] and uint8 [..., K / 32] -> float32 [..., K], see `halves`."""
    groups = [half.reshape(*exponent.shape, HALF) for half in halves(packed, exponent)]
    return jnp.concatenate(groups, axis=-1).reshape(*packed.shape[:-1], -1)
