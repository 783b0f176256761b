"""Numbers of four bits (e2m1) with an exponent for each group of 32: MXFP4.

In published files a byte holds two neighbours, the first in its low half. On a device numbers lie as
`ops.four_bits` has them, and an exponent of each row and group is a byte.

Source: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.ops import four_bits

GROUP = 32  # numbers that share an exponent
MAX_EXPONENT = 128  # as published, biased by 127: more would be more than a bfloat16 has
# So shifted, a word has the bits of two bfloat16, whose sign, lowest two bits of exponent and highest of
# mantissa are those of the numbers.
PARTS: four_bits.Parts = (
    ((0x81C0, 0),),
    ((0x81C0, 3),),
    ((0x81C0, 6),),
    ((0x8000, 1), (0x0100, -5), (0x00C0, -4)),
)
TOO_SMALL = 126  # powers of two, for such a bfloat16
# The 16 values of an e2m1 number: one sign, two exponent bits, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
CODES = np.arange(16)
PLACED = four_bits.placed(PARTS, (CODES & 8) << 12 | (CODES & 7) << 6)


def pack(published: np.ndarray) -> np.ndarray:
    """uint8 [N, K / 32, 16], as in files -> [N / 64 rounded up, K / 2, 64]; rows beyond N are 0."""
    return four_bits.pack(published, PLACED)


def pack_exponents(published: np.ndarray) -> np.ndarray:
    """uint8 [N, K / 32], as in files -> [N / 64 rounded up, K / 32, 64].

    Raises ValueError for one that no weight needs.
    """
    if (largest := int(published.max())) > MAX_EXPONENT:
        raise ValueError(f"an exponent of {largest} is above {MAX_EXPONENT}; --dequantize-weights takes it")
    return stored_exponent(four_bits.pack_rows(published))


def stored_exponent(published: Any) -> Any:
    """As that of the bfloat16 by which a number of `PARTS` must be multiplied."""
    return published + np.uint8(TOO_SMALL)


def widen(packed: jax.Array, exponents: jax.Array) -> jax.Array:
    """What `pack` made, and its exponents -> bfloat16 [..., N, K], which holds the numbers exactly.

    As the leading bits of a float16, which too has numbers without an exponent, one is 2**14 times too small.
    """
    bits = four_bits.halves(packed, PARTS)
    bits = (bits & 0x8000) | (bits & 0x01C0) << 3
    number = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    power = exponents.astype(jnp.int32) - TOO_SMALL + 14
    factor = lax.bitcast_convert_type(power << 23, jnp.float32)
    return four_bits.unpack(number * four_bits.of_pairs(factor, GROUP)).astype(jnp.bfloat16)
