"""The gated product for Hopper GPUs, interpreted on a CPU and lowered for one; tests/gpu runs it."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.layers.mlp import ACTIVATIONS
from jaxserve.ops import backend, gated_product
from jaxserve.ops.gated_product import hopper
from tests.ops.cases import H100


def by_definition(x_TK, weight_WK, scales, activation, dtype):
    """In the place of `gated_product.multiply`."""
    x, weight = x_TK.astype(jnp.float32), weight_WK.astype(jnp.float32)
    if scales is not None:
        x, weight = x * scales[0], weight * scales[1][:, None]
    gate, up = jnp.split(x @ weight.T, 2, axis=1)
    return (activation(gate) * up).astype(dtype)


@dataclass(frozen=True)
class Case:
    T: int
    F: int
    K: int
    dtype: str = "bfloat16"
    activation: str = "silu"
    bias: float = 0.0  # of gates, about: the first number of x is 1

    @property
    def out_dtype(self) -> str:
        return "bfloat16" if self.dtype == "float8_e4m3fn" else self.dtype

    def arguments(self):
        """(x, weight, scales): products of size 1."""
        rng = np.random.default_rng(self.T + self.F)
        x, weight = rng.normal(size=(self.T, self.K)), rng.normal(size=(2 * self.F, self.K)) * self.K**-0.5
        x[:, 0], weight[: self.F, 0] = 1, self.bias
        if self.dtype != "float8_e4m3fn":
            return jnp.asarray(x, self.dtype), jnp.asarray(weight, self.dtype), None
        scales = rng.uniform(0.01, 0.1, (self.T, 1)), rng.uniform(0.001, 0.01, 2 * self.F)
        x, weight = x / scales[0], weight / scales[1][:, None]
        short = [jnp.clip(jnp.asarray(a, jnp.float32), -448, 448).astype(self.dtype) for a in (x, weight)]
        return *short, tuple(jnp.asarray(scale, jnp.float32) for scale in scales)

    def expected(self) -> np.ndarray:
        """In float64 of the numbers that the arguments hold."""
        x, weight, scales = self.arguments()
        x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
        if scales is not None:
            x, weight = x * np.asarray(scales[0]), weight * np.asarray(scales[1])[:, None]
        gate, up = x @ weight[: self.F].T, x @ weight[self.F :].T
        return np.asarray(ACTIVATIONS[self.activation](jnp.asarray(gate, jnp.float32)), np.float64) * up

    def run(self, **options) -> np.ndarray:
        x, weight, scales = self.arguments()
        options.setdefault("columns", hopper.choose_columns(self.T, self.F))
        function = functools.partial(
            hopper.multiply, activation=ACTIVATIONS[self.activation], dtype=self.out_dtype, **options
        )
        return np.asarray(jax.jit(function)(x, weight, scales), np.float64)

    def check(self, **options) -> None:
        """Results are of size 1 to 10, of which 2**-8 are lost in rounding. Tensor cores add up float8
        products with some 13 bits, as they do for XLA."""
        rtol, atol = (2**-5, 5e-2) if self.dtype == "float8_e4m3fn" else (2**-8, 2e-4 if self.bias else 4e-3)
        np.testing.assert_allclose(self.run(**options), self.expected(), rtol=rtol, atol=atol)


CASES = (
    Case(T=128, F=96, K=128),
    Case(T=256, F=224, K=320, activation="gelu_tanh"),
    Case(T=384, F=128, K=64, dtype="float16"),
    Case(T=128, F=192, K=384, dtype="float8_e4m3fn"),
)


LARGE = (  # for GPUs
    Case(T=128, F=14336, K=4096),
    Case(T=2048, F=1536, K=576, activation="gelu_pytorch_tanh"),
    Case(T=128, F=1536, K=576, activation="gelu_tanh", bias=-4),  # its tail
    Case(T=256, F=14336, K=4096, dtype="float8_e4m3fn"),
    Case(T=2048, F=3072, K=1024, dtype="float8_e4m3fn"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("programs", [1, 2])
def test_each_result_is_the_gated_product(case, programs):
    case.check(programs=programs, interpret=plgpu.InterpretGPUParams())


SIZES = (Case(256, 14336, 4096), Case(2048, 14336, 4096, "float8_e4m3fn"))


@pytest.mark.parametrize("case", (*CASES, *SIZES), ids=str)
def test_the_kernel_lowers_to_cuda_without_a_gpu(case):
    x, weight, scales = (
        jax.ShapeDtypeStruct((case.T, case.K), case.dtype),
        jax.ShapeDtypeStruct((2 * case.F, case.K), case.dtype),
        None,
    )
    if case.dtype == "float8_e4m3fn":
        scales = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((case.T, 1), (2 * case.F,)))
    activation = ACTIVATIONS[case.activation]
    multiply = functools.partial(gated_product.multiply, activation=activation, dtype=case.out_dtype)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(multiply).trace(x, weight, scales)
        assert "hopper_gated_product" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "T, F, columns",
    [(128, 14336, 112), (256, 14336, 112), (2048, 14336, 128), (128, 12288, 96), (128, 100, 0)],
)
def test_tiles_are_those_that_end_soonest(T, F, columns):
    assert hopper.choose_columns(T, F) == columns


def test_what_it_does_not_compute_or_not_faster_stays_with_xla(monkeypatch):
    monkeypatch.setattr(gated_product, "is_supported", lambda min_sms: min_sms == 132)

    def fits(T=256, F=14336, K=4096, dtype="bfloat16", where="fast"):
        with backend.use(where):
            return gated_product.fits(T, jax.ShapeDtypeStruct((2 * F, K), dtype))

    assert fits() and fits(dtype="float16") and fits(dtype="float8_e4m3fn") and fits(T=128) and fits(T=2048)
    assert not fits(where="reference") and not fits(where="interpret")
    assert not fits(dtype="float32") and not fits(dtype="int8")
    assert not fits(T=64) and not fits(T=192)
    assert not fits(K=96) and not fits(K=64, dtype="float8_e4m3fn")
    assert not fits(F=1000), "no tile divides it"
    assert not fits(F=2816) and not fits(F=2816, T=2048), "22 tiles of 132 programs, 352 of 396"
    monkeypatch.setattr(gated_product, "is_supported", lambda min_sms: False)
    assert not fits()
