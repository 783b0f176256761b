"""Numbers of four bits (e2m1) with an exponent for each group of 32: MXFP4.

In published files a byte holds two neighbours, the first in its low half. On a device a matrix lies in
tiles of 64 rows and 32 columns as a Hopper tensor core takes its first operand from registers: thread
32 * w + 4 * g + t of a warpgroup has rows 16 * w + g and 8 further, and of 16 columns 2 * t, the next, and
those 8 further. A tile is 1,024 bytes, 8 of each thread in turn: a word of 32 bits for each 16 columns. A
word is four pairs of neighbours (row, row + 8, then both 8 columns further), the first of each pair in its
lower 16 bits, the second in its upper; `PARTS` says where their bits are. Exponents are 64 bytes a tile, by
w, g, and row or row + 8.

Source: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1; PTX ISA 9.0, section 9.7.15.5.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GROUP = 32  # numbers that share an exponent, and columns of a tile
ROWS = 64  # of a tile
TURN = 8  # rows of one matrix before as many of the other, where two are joined
LINE = 64  # bytes of the last dimension of what is packed
LINES = 16  # of a tile's numbers; its exponents are one
MAX_EXPONENT = 128  # as published, biased by 127: more would be more than a bfloat16 has
# Of each pair: shifted left by the second, a word has in the bits of the first those of two bfloat16, whose
# sign, lowest two bits of exponent and highest of mantissa are those of the numbers.
PARTS = (
    ((0x81C0, 0),),
    ((0x81C0, 3),),
    ((0x81C0, 6),),
    ((0x8000, 1), (0x0100, -5), (0x00C0, -4)),
)
TOO_SMALL = 126  # powers of two, for such a bfloat16
# The 16 values of an e2m1 number: one sign, two exponent bits, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def shifted(bits: Any, left: int) -> Any:
    return bits << left if left >= 0 else bits >> -left


def _placed() -> np.ndarray:
    """uint32 [4, 256]: what a published byte is in a word, as each of its pairs."""
    byte = np.arange(256, dtype=np.uint32)
    words = np.zeros((len(PARTS), len(byte)), np.uint32)
    for word, parts in zip(words, PARTS):
        for mask, left in parts:
            for half, code in enumerate((byte & 15, byte >> 4)):
                bits = ((code & 8) << 12 | (code & 7) << 6) & mask
                word |= shifted(bits, -left) << 16 * half
    return words


PLACED = _placed()


def pack(published: np.ndarray) -> np.ndarray:
    """uint8 [N, K / 32, 16], as in files -> [N / 64 rounded up, K / 2, 64], as above; rows beyond N are 0."""
    published = _filled(published)
    N, groups, _ = published.shape
    # row: 16 w + 8 h + g; byte of a group: 8 s + 4 l + t; word w, g, t, s has pairs l, h.
    pairs = published.reshape(N // ROWS, 4, 2, 8, groups, 2, 2, 4)
    tiles = np.ascontiguousarray(pairs.transpose(0, 4, 1, 3, 7, 5, 6, 2)).reshape(-1, 4)
    words = PLACED[0][tiles[:, 0]]
    for pair in range(1, 4):
        words |= PLACED[pair][tiles[:, pair]]
    return words.view(np.uint8).reshape(N // ROWS, groups * LINES, LINE)


def pack_exponents(published: np.ndarray) -> np.ndarray:
    """uint8 [N, K / 32], as in files -> [N / 64 rounded up, K / 32, 64].

    Raises ValueError for one that no weight needs.
    """
    if (largest := int(published.max())) > MAX_EXPONENT:
        raise ValueError(f"an exponent of {largest} is above {MAX_EXPONENT}; --dequantize-weights takes it")
    published = _filled(published)
    N, groups = published.shape
    tiles = published.reshape(N // ROWS, 4, 2, 8, groups).transpose(0, 4, 1, 3, 2)
    return stored_exponent(tiles).reshape(N // ROWS, groups, LINE)


def num_tiles(rows: int) -> int:
    return -(-rows // ROWS)


def _filled(rows: np.ndarray) -> np.ndarray:
    missing = num_tiles(len(rows)) * ROWS - len(rows)
    return np.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1))) if missing else rows


def stored_exponent(published: Any) -> Any:
    """As that of the bfloat16 by which a number of `PARTS` must be multiplied."""
    return published + np.uint8(TOO_SMALL)


def join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two matrices' rows by turns of eight, so that a thread has a row of both: [N, ...] -> [2 N, ...]."""
    rest = first.shape[1:]
    turns = [matrix.reshape(-1, TURN, *rest) for matrix in (first, second)]
    return np.stack(turns, axis=1).reshape(2 * len(first), *rest)


def apart(joined: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[E, 2 N, K], as `join` made it -> [E, N, K] each."""
    E, rows, K = joined.shape
    turns = joined.reshape(E, -1, 2, TURN, K)
    first, second = (turns[:, :, i].reshape(E, rows // 2, K) for i in range(2))
    return first, second


def is_packed(matrix: jax.Array) -> bool:
    return matrix.dtype == jnp.uint8


def widen(packed: jax.Array, exponents: jax.Array) -> jax.Array:
    """What `pack` made, and its exponents -> bfloat16 [..., N, K], which holds the numbers exactly.

    As the leading bits of a float16, which too has numbers without an exponent, one is 2**14 times too small.
    """
    *lead, tiles, groups, _ = exponents.shape
    words = lax.bitcast_convert_type(packed.reshape(*lead, tiles, groups, 4, 8, 4, 2, 4), jnp.uint32)
    halves = words[..., None] >> jnp.arange(0, 32, 16, dtype=jnp.uint32)
    pairs = []
    for parts in PARTS:
        bits = jnp.zeros_like(halves)
        for mask, left in parts:
            bits |= shifted(halves, left) & mask
        pairs.append((bits & 0x8000) | (bits & 0x01C0) << 3)
    bits = jnp.stack(pairs, axis=-2)  # w, g, t, s, pair, which
    number = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    power = exponents.astype(jnp.int32) - TOO_SMALL + 14
    factor = lax.bitcast_convert_type(power << 23, jnp.float32).reshape(
        *lead, tiles, groups, 4, 8, 1, 1, 1, 2, 1
    )
    n = len(lead)
    number = number.reshape(*lead, tiles, groups, 4, 8, 4, 2, 2, 2, 2)  # w, g, t, s, l, h, which
    number = jnp.transpose(number * factor, (*range(n), *(n + i for i in (0, 2, 7, 3, 1, 5, 6, 4, 8))))
    return number.astype(jnp.bfloat16).reshape(*lead, tiles * ROWS, groups * GROUP)
