"""Rows in float8: what they stand for, then the kernels against the reference on the same cases."""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import backend, float8_rows
from jaxserve.ops.float8_rows import Scaled, reference
from jaxserve.ops.norm import rms_norm
from tests.ops.cases import H100


@dataclass(frozen=True)
class Case:
    """`T` rows of `width` numbers, of sizes from a thousandth to a thousand."""

    made_by: Literal["quantise", "normalise", "add_and_normalise"]
    T: int = 5
    width: int = 64
    dtype: str = "bfloat16"
    offset: float = 0.0

    def arguments(self) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(self.width)
        size_T1 = np.geomspace(1e-3, 1e3, self.T)[:, None]
        x = jnp.asarray(rng.normal(size=(self.T, self.width)) * size_T1, self.dtype)
        if self.made_by == "quantise":
            return (x,)
        gain = jnp.asarray(rng.uniform(0.5, 2, self.width), self.dtype)
        if self.made_by == "normalise":
            return x, gain
        sums = jnp.asarray(rng.normal(size=x.shape), self.dtype)
        scales = size_T1 * rng.uniform(0.5, 2, size_T1.shape), rng.uniform(0.5, 2, self.width)
        return x, Scaled(sums, *(jnp.asarray(scale, jnp.float32) for scale in scales)), gain

    def traced(self):
        """The operation of arrays alone."""

        function, options = getattr(float8_rows, self.made_by), {"eps": 1e-5, "offset": self.offset}
        return jax.jit(function if self.made_by == "quantise" else functools.partial(function, **options))

    def run(self, where):
        with backend.use(where):
            return self.traced()(*self.arguments())

    def expected(self):
        """The reference. A sum and a norm are computed on their own, or XLA on a GPU would not round them
        before they are quantised."""
        if self.made_by == "quantise":
            return self.run("reference")
        x, *product, gain = self.arguments()
        if product:
            x = x + product[0].value(x.dtype)
        rows = reference.quantise(rms_norm(x, gain, eps=1e-5, offset=self.offset))
        return (x, rows) if product else rows


CASES = (
    Case("quantise"),
    Case("quantise", width=576),  # not a power of two: masked lanes hold zeros
    Case("quantise", width=4096, dtype="float16"),
    Case("normalise"),
    Case("normalise", width=576, offset=1.0),
    Case("normalise", width=4096),
    Case("quantise", T=3, width=14336),
    Case("add_and_normalise"),
    Case("add_and_normalise", width=576, offset=1.0),
    Case("add_and_normalise", width=4096),
)


def check(got, want, case):
    """Scales to the rounding of `case.dtype`; numbers but where one rounding before tips another.

    A sum or an exponential in another order changes a float32's last bits, which rarely changes the
    bfloat16 they are rounded to (2**-8 relative), and that a float8 (2**-3).
    """
    if case.made_by == "add_and_normalise":
        (sum_, got), (want_sum, want) = got, want
        np.testing.assert_array_equal(sum_, want_sum)
    (numbers, scale), (want_numbers, want_scale) = got, want
    assert numbers.shape == want_numbers.shape and numbers.dtype == jnp.float8_e4m3fn
    assert scale.shape == (case.T, 1) and scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, want_scale, rtol=2**-8)
    numbers, want_numbers = (np.asarray(x, np.float32) for x in (numbers, want_numbers))
    assert (np.abs(numbers).max(axis=1) == 448).all()
    np.testing.assert_allclose(numbers, want_numbers, rtol=2**-3 * 1.01, atol=2**-9)
    assert np.mean(numbers != want_numbers) < 0.005


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_reference(case):
    check(case.run("interpret"), case.expected(), case)


@pytest.mark.parametrize("where", ["reference", "interpret"])
def test_numbers_times_scale_are_the_row(where):
    """448 for the largest, three bits of mantissa for the others; a row of zeros stays one."""
    x = jnp.asarray([[1, -2, 4, 0.5, -0.25], [0, 0, 0, 0, 0], [-3e4, 1e-3, 3e4, 1e4, 0]], jnp.bfloat16)
    with backend.use(where):
        numbers, scale = jax.jit(lambda x: float8_rows.quantise(x))(x)
    expected = [[112, -224, 448, 56, -28], [0, 0, 0, 0, 0], [-448, 0, 448, 144, 0]]
    assert np.asarray(numbers, np.float32).tolist() == expected
    largest = np.asarray([[4], [1e-12], [np.float32(x[2, 2])]], np.float32)
    np.testing.assert_allclose(scale, largest / 448, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_lowers_to_cuda_without_a_gpu_and_is_one(case):
    arguments = case.arguments()
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        text = case.traced().trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1
