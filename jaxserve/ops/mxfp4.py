"""Numbers of four bits (e2m1) with an exponent for each group of 32: MXFP4.

Two lie in a byte. In published files they are neighbours; on a device byte j of a group's 16 holds number j
in its low half and number j + 16 in its high half, so that each half of the bytes is whole runs of numbers.

Source: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt

GROUP = 32  # numbers that share an exponent
HALF = GROUP // 2  # and the bytes that hold them
MAX_EXPONENT = 128  # as stored, biased by 127: with more, `halves_by_words` would need more than bfloat16 has
# The 16 values of an e2m1 number: one sign, two exponent bits, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def repack(published: np.ndarray) -> np.ndarray:
    """uint8 [..., groups, 16], the low half of a byte before its high half -> [..., groups * 16] as above."""
    codes = np.stack([published & 15, published >> 4], axis=-1).reshape(*published.shape[:-1], 2, HALF)
    return (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(*published.shape[:-2], -1)


def halves(packed: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers in the low and in the high halves of bytes, in bfloat16, which holds them exactly.

    As the leading bits of a float16, which too has numbers without an exponent, one is 2**14 times too small.

    Args:
        packed: uint8 [..., K / 2]. exponent: uint8 [..., K / 32].
    """
    code = packed.astype(jnp.int32)
    factor = _spread(lax.bitcast_convert_type((exponent.astype(jnp.int32) + 14) << 23, jnp.float32))

    def widen(code: jax.Array) -> jax.Array:
        bits = ((code & 8) << 12 | (code & 7) << 9).astype(jnp.uint16)
        number = lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
        return (number * factor).astype(jnp.bfloat16)

    return widen(code & 15), widen(code >> 4)


def halves_by_words(packed: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same in a Pallas-Triton kernel, four bytes at a time: half of the instructions of its loop.

    As the leading bits of a bfloat16 a number is 2**126 times too small; fused multiply-add takes and makes
    numbers without an exponent (PTX ISA 9.0, section 9.7.4.6).
    """
    power = ((exponent.astype(jnp.int32) + 126) << 7).astype(jnp.uint16)
    args = [packed, _spread(lax.bitcast_convert_type(power, jnp.bfloat16))]
    low, high = (
        plt.elementwise_inline_asm(
            assembly,
            args=args,
            constraints="=&r,=&r,r,r,r",  # four numbers, in other registers than four bytes and four factors
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.bfloat16)],
        )[0]
        for assembly in (LOW, HIGH)
    )
    return low, high


def _assembly(to_sign: int, to_rest: int) -> str:
    """Two bytes to a word of 32 bits, each shifted left for its sign, and for what is below its sign."""
    lines = ["{ .reg .b32 bytes, sign, rest, none;", "mov.b32 none, 0x80008000;"]  # -0: it changes no sum
    for i, pair in enumerate(("0x4140", "0x4342")):
        lines += [
            f"prmt.b32 bytes, $2, 0, {pair};",
            f"shl.b32 sign, bytes, {to_sign}; shl.b32 rest, bytes, {to_rest};",
            "and.b32 rest, rest, 0x01C001C0;",
            "lop3.b32 rest, sign, none, rest, 0xEA;",  # sign & none | rest
            f"fma.rn.bf16x2 ${i}, rest, ${3 + i}, none;",
        ]
    return " ".join([*lines, "}"])


LOW, HIGH = _assembly(12, 6), _assembly(8, 2)


def _spread(of_group: jax.Array) -> jax.Array:
    """[..., groups] -> [..., groups * 16]: one for each byte."""
    spread = lax.broadcast_in_dim(of_group, (*of_group.shape, HALF), range(of_group.ndim))
    return spread.reshape(*of_group.shape[:-1], -1)


def widen(packed: jax.Array, exponent: jax.Array) -> jax.Array:
    """uint8 [..., K / 2] and uint8 [..., K / 32] -> bfloat16 [..., K]."""
    groups = [half.reshape(*exponent.shape, HALF) for half in halves(packed, exponent)]
    return jnp.concatenate(groups, axis=-1).reshape(*packed.shape[:-1], -1)
