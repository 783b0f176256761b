"""Numbers of four bits, every one of them with every exponent that is served, in jax and in a GPU's words."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.ops import mxfp4

MASK = 0xFFFFFFFF


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
        rng.integers(110, 128, (*lead, 4)).astype(np.uint8),
    )
    packed = mxfp4.repack(published(codes))
    assert packed.shape == (*lead, 64)
    want = mxfp4.E2M1[codes] * 2.0 ** (exponents.astype(int)[..., None] - 127)
    np.testing.assert_array_equal(
        np.asarray(mxfp4.widen(packed, exponents), np.float64), want.reshape(*lead, -1)
    )


def test_results_have_registers_of_their_own():
    """The first is written before all of what is given is read; only the constraint keeps them apart."""
    for assembly in (mxfp4.LOW, mxfp4.HIGH):
        assert assembly.index("$0") < assembly.rindex("$2")
    traced = jax.make_jaxpr(mxfp4.halves_by_words)(
        jnp.zeros((8, 16), jnp.uint8), jnp.zeros((8, 1), jnp.uint8)
    )
    calls = [e for e in traced.eqns if "constraints" in e.params]
    assert [e.params["constraints"].split(",")[:2] for e in calls] == [["=&r", "=&r"]] * 2


def run(assembly: str, word: int, factor: int) -> list[int]:
    """What the instructions leave in $0 and $1; $2 is the word, $3 and $4 two factors each."""
    registers = {"$2": word, "$3": factor << 16 | factor, "$4": factor << 16 | factor}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def product(a: int, b: int, c: int) -> int:
        """Of two bfloat16 each, with numbers below 2**-126: float64 has them all."""
        lanes = [np.array([a, b, c]) >> shift & 0xFFFF for shift in (0, 16)]
        x, y, z = np.array(lanes, np.uint16).view(ml_dtypes.bfloat16).astype(np.float64).T
        assert (z == 0).all()
        low, high = (x * y).astype(ml_dtypes.bfloat16).view(np.uint16).tolist()
        return high << 16 | low

    body = re.fullmatch(r"\{ \.reg \.b32 [^;]*; (.*) \}", assembly)[1]
    for line in body.rstrip(";").split("; "):
        operation, operands = line.split(" ", 1)
        target, *given = operands.split(", ")
        match operation, [value(name) for name in given]:
            case "prmt.b32", [a, 0, selector]:
                given = [*a.to_bytes(4, "little"), 0, 0, 0, 0]
                out = int.from_bytes(given[selector >> 4 * i & 7] for i in range(4))
                out = int.from_bytes(out.to_bytes(4), "little")
            case "mov.b32", [a]:
                out = a
            case "shl.b32", [a, b]:
                out = a << b & MASK
            case "and.b32", [a, b]:
                out = a & b
            case "lop3.b32", [a, b, c, 0xEA]:
                out = a & b | c
            case "fma.rn.bf16x2", [a, b, c]:
                out = product(a, b, c)
            case _:
                raise AssertionError(line)
        registers[target] = out
    return [registers["$0"], registers["$1"]]


def test_words_of_a_gpu_give_the_same_numbers():
    """All numbers in all places, with the exponents at both ends and some between."""
    rng = np.random.default_rng(1)
    for exponent in (0, 1, 64, 119, 120, mxfp4.MAX_EXPONENT):
        codes = rng.permutation(np.arange(256) % 16).reshape(8, 1, 32)
        packed = mxfp4.repack(published(codes))
        halves = mxfp4.halves(jnp.asarray(packed), jnp.full((8, 1), exponent, jnp.uint8))
        for want, assembly in zip(halves, (mxfp4.LOW, mxfp4.HIGH)):
            words = packed.view(np.uint32).reshape(-1).tolist()
            got = [run(assembly, word, exponent + 126 << 7) for word in words]
            got = np.array(got, np.uint32).view(np.uint16).view(ml_dtypes.bfloat16)
            if exponent > 2:  # XLA for CPUs has no numbers below 2**-126
                np.testing.assert_array_equal(got.reshape(want.shape), np.asarray(want))
            else:
                assert np.abs(got.astype(np.float64)).max() < 2.0**-122


def test_bytes_of_four_are_given_out_as_the_numbers_lie():
    """The first of LOW's words has numbers 0 and 1 of a group, the second 2 and 3."""
    codes = np.zeros((1, 32), int)
    codes[0, :4], codes[0, 16:20] = (1, 2, 3, 4), (5, 6, 7, 9)
    [word, *_] = mxfp4.repack(published(codes)).view(np.uint32).tolist()
    one = 127 << 7
    for assembly, numbers in ((mxfp4.LOW, (0.5, 1, 1.5, 2)), (mxfp4.HIGH, (3, 4, 6, -0.5))):
        words = np.array(run(assembly, word, one + (126 << 7)), np.uint32)
        assert words.view(np.uint16).view(ml_dtypes.bfloat16).astype(float).tolist() == list(numbers)
