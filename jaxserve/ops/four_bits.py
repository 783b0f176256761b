"""Matrices of numbers of four bits, as a Hopper tensor core takes its first operand from registers.

A matrix lies in tiles of 64 rows and 32 columns. Thread 32 * w + 4 * g + t of a warpgroup has rows 16 * w + g
and 8 further, and of 16 columns 2 * t, the next, and those 8 further. A tile is 1,024 bytes, 8 of each thread
in turn: a word of 32 bits for each 16 columns. A word is four pairs of neighbours (row, row + 8, then both 8
columns further), the first of each pair in its lower 16 bits, the second in its upper; a format's `Parts` say
where their bits are. What rows have for a group of columns, such as a scale, is 64 numbers a tile, by w, g,
and row or row + 8.

Source: PTX ISA 9.0, section 9.7.15.5.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.row_blocks import in_row_blocks

ROWS = 64  # of a tile
COLUMNS = 32
TURN = 8  # rows of one matrix before as many of the other, where two are joined
LINE = 64  # bytes of the last dimension of what is packed, and rows of a tile
LINES = 16  # of a tile's numbers

Parts = tuple[tuple[tuple[int, int], ...], ...]
"""Of each pair: (mask, shift) whose sum has a number of the pair in each half of a word that is shifted left
by so many bits."""


def shifted(bits: Any, left: int) -> Any:
    return bits << left if left >= 0 else bits >> -left


def placed(parts: Parts, bits: np.ndarray) -> np.ndarray:
    """uint32 [4, 256]: what a byte of two neighbours, the first in its low half, is in a word, as each of its
    pairs. `bits` are those of each of the 16 numbers in a half of a shifted word."""
    byte = np.arange(256)
    words = np.zeros((len(parts), len(byte)), np.uint32)
    for word, of_pair in zip(words, parts):
        for mask, left in of_pair:
            for half, code in enumerate((byte & 15, byte >> 4)):
                word |= shifted(bits.astype(np.uint32)[code] & mask, -left) << 16 * half
    return words


def pack(pairs: np.ndarray, table: np.ndarray) -> np.ndarray:
    """uint8 [N, K / 32, 16], two neighbours a byte -> [N / 64 rounded up, K / 2, 64], by what `placed` made.

    Rows beyond N are of code 0.
    """
    pairs = _filled(pairs)
    return in_row_blocks(lambda rows: _pack(pairs[rows], table), slice(0, len(pairs)))


def _pack(pairs: np.ndarray, table: np.ndarray) -> np.ndarray:
    N, groups, _ = pairs.shape
    # row: 16 w + 8 h + g; byte of a group: 8 s + 4 l + t; word w, g, t, s has pairs l, h.
    pairs = pairs.reshape(N // ROWS, 4, 2, 8, groups, 2, 2, 4)
    tiles = np.ascontiguousarray(pairs.transpose(0, 4, 1, 3, 7, 5, 6, 2)).reshape(-1, 4)
    words = np.take(table[0], tiles[:, 0])
    for pair in range(1, 4):
        words |= np.take(table[pair], tiles[:, pair])
    return words.view(np.uint8).reshape(N // ROWS, groups * LINES, LINE)


def pack_rows(of_rows: np.ndarray) -> np.ndarray:
    """What rows have for each group of columns, [N, G] -> [N / 64 rounded up, G, 64]; 0 beyond N."""
    of_rows = _filled(of_rows)
    N, G = of_rows.shape
    return of_rows.reshape(N // ROWS, 4, 2, 8, G).transpose(0, 4, 1, 3, 2).reshape(N // ROWS, G, LINE)


def num_tiles(rows: int) -> int:
    return -(-rows // ROWS)


def _filled(rows: np.ndarray) -> np.ndarray:
    missing = num_tiles(len(rows)) * ROWS - len(rows)
    return np.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1))) if missing else rows


def is_packed(matrix: jax.Array) -> bool:
    return matrix.dtype == jnp.uint8


def halves(packed: jax.Array, parts: Parts) -> jax.Array:
    """Of what `pack` made, [..., tiles, K / 2, 64], the bits that have each number's: uint32
    [..., tiles, K / 32, 4, 8, 4, 2, 4, 2], by w, g, t, 16 columns, pair, which of a pair."""
    *lead, tiles, lines, _ = packed.shape
    shape = *lead, tiles, lines // LINES, 4, 8, 4, 2, 4
    words = lax.bitcast_convert_type(packed.reshape(shape), jnp.uint32)
    both = words[..., None] >> jnp.arange(0, 32, 16, dtype=jnp.uint32)
    numbers = []
    for of_pair in parts:
        bits = jnp.zeros_like(both)
        for mask, left in of_pair:
            bits |= shifted(both, left) & mask
        numbers.append(bits)
    return jnp.stack(numbers, axis=-2)


def of_pairs(of_rows: jax.Array, columns: int) -> jax.Array:
    """What `pack_rows` made for each `columns`, to be broadcast against `halves`."""
    of_rows = jnp.repeat(of_rows, columns // COLUMNS, axis=-2)
    *lead, _ = of_rows.shape
    by_row = of_rows.reshape(*lead, 4, 8, 1, 1, 2, 1)
    return jnp.concatenate([by_row, by_row], axis=-2)  # pairs: two rows, then both 8 columns further


def unpack(numbers: jax.Array) -> jax.Array:
    """Of each of `halves` its number -> [..., N, K]."""
    *lead, tiles, groups = numbers.shape[:-6]
    numbers = numbers.reshape(*lead, tiles, groups, 4, 8, 4, 2, 2, 2, 2)  # w, g, t, s, l, h, which
    n = len(lead)
    order = (*range(n), *(n + i for i in (0, 2, 7, 3, 1, 5, 6, 4, 8)))
    return jnp.transpose(numbers, order).reshape(*lead, tiles * ROWS, groups * COLUMNS)


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
