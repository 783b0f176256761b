"""Numbers of four bits, every one of them with every exponent that is served."""

import jax
import numpy as np
import pytest

from jaxserve.ops import mxfp4


def published(codes: np.ndarray) -> np.ndarray:
    """[..., groups, 32] codes as files have them: neighbours in a byte, the first in its low half."""
    pairs = codes.reshape(*codes.shape[:-1], 16, 2).astype(np.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4


def test_every_number_with_every_exponent_is_exact_or_next_to_nothing():
    exponents = np.arange(mxfp4.MAX_EXPONENT + 1, dtype=np.uint8)[:, None]  # one group a row
    codes = np.tile(np.arange(32) % 16, (len(exponents), 1, 1))
    got = np.asarray(jax.jit(mxfp4.widen)(mxfp4.repack(published(codes)), exponents), np.float64)
    want = np.ldexp(mxfp4.E2M1[codes[:, 0]].astype(np.float64), exponents.astype(int) - 127)
    np.testing.assert_array_equal(got[3:], want[3:])
    assert np.abs(got[:3]).max() < 2.0**-121 > np.abs(want[:3]).max()


@pytest.mark.parametrize("lead", [(), (3,), (2, 5)], ids=str)
def test_numbers_keep_their_places(lead):
    rng = np.random.default_rng(0)
    codes, exponents = (
        rng.integers(0, 16, (*lead, 4, 32)),
        rng.integers(110, 130, (*lead, 4)).astype(np.uint8),
    )
    packed = mxfp4.repack(published(codes))
    assert packed.shape == (*lead, 64)
    want = mxfp4.E2M1[codes] * 2.0 ** (exponents.astype(int)[..., None] - 127)
    np.testing.assert_array_equal(
        np.asarray(mxfp4.widen(packed, exponents), np.float64), want.reshape(*lead, -1)
    )
