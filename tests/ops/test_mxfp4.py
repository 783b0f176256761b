"""Numbers of four bits, every one with every exponent that is served, and where a tensor core wants them."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxserve.ops import four_bits, mxfp4


def published(codes: np.ndarray) -> np.ndarray:
    """[N, K] codes as files have them, [N, K / 32, 16]: neighbours in a byte, the first in its low half."""
    pairs = codes.reshape(len(codes), -1, 16, 2).astype(np.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4


def widened(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    packed, powers = mxfp4.pack(published(codes)), mxfp4.pack_exponents(exponents)
    return np.asarray(jax.jit(mxfp4.widen)(packed, powers), np.float64)


def test_every_number_with_every_exponent_is_exact_or_next_to_nothing():
    exponents = np.arange(mxfp4.MAX_EXPONENT + 1, dtype=np.uint8)[:, None]  # one group a row
    codes = np.tile(np.arange(32) % 16, (len(exponents), 1))
    got = widened(codes, exponents)[: len(codes)]
    want = np.ldexp(mxfp4.E2M1[codes].astype(np.float64), exponents.astype(int) - 127)
    np.testing.assert_array_equal(got[3:], want[3:])
    assert np.abs(got[:3]).max() < 2.0**-121 > np.abs(want[:3]).max()


@pytest.mark.parametrize("rows", [64, 192, 100])
def test_numbers_keep_their_places(rows):
    rng = np.random.default_rng(0)
    codes, exponents = rng.integers(0, 16, (rows, 96)), rng.integers(110, 128, (rows, 3)).astype(np.uint8)
    got = widened(codes, exponents)
    want = mxfp4.E2M1[codes] * 2.0 ** (np.repeat(exponents, 32, axis=1).astype(int) - 127)
    assert got.shape == (-(-rows // 64) * 64, 96)
    np.testing.assert_array_equal(got[:rows], want)
    assert not got[rows:].any()


def test_a_thread_has_what_a_tensor_core_takes_from_it():
    """Two numbers of a row, of the row 8 further, and both again 8 columns further, of each 16 columns."""
    rng = np.random.default_rng(1)
    codes, exponents = rng.integers(0, 16, (64, 64)), rng.integers(100, 128, (64, 2)).astype(np.uint8)
    numbers = mxfp4.E2M1[codes]
    packed, powers = mxfp4.pack(published(codes)), mxfp4.pack_exponents(exponents)
    for thread in (0, 1, 6, 31, 77, 127):
        row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
        for tile in range(2):
            mine = packed[0, 16 * tile : 16 * (tile + 1)].reshape(-1)[8 * thread : 8 * thread + 8]
            for of_16, word in enumerate(mine.view(np.uint32)):
                begin = 32 * tile + 16 * of_16 + column
                for pair, (down, right) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                    want = numbers[row + down, begin + right : begin + right + 2]
                    assert as_numbers(int(word), pair) == list(want)
            at = 2 * (thread // 4)
            want = exponents[[row, row + 8], tile] + np.uint8(126)
            np.testing.assert_array_equal(powers[0, tile, at : at + 2], want)


def as_numbers(word: int, pair: int) -> list[float]:
    """As `hopper_packed` makes them, but for the exponent of the group."""
    bits = 0
    for mask, left in mxfp4.PARTS[pair]:
        bits |= four_bits.shifted(word, left) & (mask | mask << 16)
    small = np.array([bits & 0xFFFF, bits >> 16], np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    return list(small * 2.0**mxfp4.TOO_SMALL)


def test_no_bit_of_a_word_belongs_to_two_numbers():
    taken = [four_bits.shifted(mask | mask << 16, -left) for parts in mxfp4.PARTS for mask, left in parts]
    assert sum(taken) == 0xFFFFFFFF and all(a & b == 0 for i, a in enumerate(taken) for b in taken[:i])


def test_rows_of_two_matrices_take_turns_of_eight():
    first, second = np.arange(32).reshape(16, 2), 100 + np.arange(32).reshape(16, 2)
    joined = four_bits.join(first, second)
    np.testing.assert_array_equal(joined[:24, 0], [*range(0, 16, 2), *range(100, 116, 2), *range(16, 32, 2)])
    for part, want in zip(four_bits.apart(joined[None]), (first, second)):
        np.testing.assert_array_equal(part[0], want)


def test_exponents_too_large_for_any_weight_are_refused():
    with pytest.raises(ValueError, match="exponent of 129 is above 128; --dequantize-weights takes it"):
        mxfp4.pack_exponents(np.full((64, 1), mxfp4.MAX_EXPONENT + 1, np.uint8))
