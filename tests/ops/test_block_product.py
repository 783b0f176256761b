"""Products with scales for blocks of 128 x 128: by XLA, and by the kernel for Hopper, interpreted."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.ops import backend, block_product
from jaxserve.ops.hopper import NUM_SMS
from tests.ops.cases import H100, in_float8


def gate(gate, up):
    return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class Case:
    T: int
    N: int  # of each matrix
    K: int
    gated: bool = False
    dtype: str = "bfloat16"

    @property
    def num_matrices(self) -> int:
        return 2 if self.gated else 1

    def arguments(self):
        """(x, numbers, scale): products of size 1."""
        rng = np.random.default_rng(self.T)
        rows = self.num_matrices * self.N
        x = jnp.asarray(rng.normal(size=(self.T, self.K)), self.dtype)
        numbers = jnp.asarray(rng.normal(size=(rows, self.K)), jnp.float8_e4m3fn)
        scale = rng.uniform(0.5, 2, (-(-rows // 128), self.K // 128)) * self.K**-0.5
        return x, numbers, jnp.asarray(scale, jnp.float32)

    def shapes(self) -> Any:
        return jax.eval_shape(self.arguments)

    def expected(self, *, in_float8_too: bool) -> np.ndarray:
        """In float64; rows as they are, or as float8 numbers stand for them."""
        x, numbers, scale = self.arguments()
        x = in_float8(x, 128) if in_float8_too else np.asarray(x, np.float64)
        weight = np.asarray(scale, np.float64).repeat(128, 0)[: len(numbers)].repeat(128, 1)
        out = x @ (np.asarray(numbers, np.float64) * weight).T
        if not self.gated:
            return out
        return np.asarray(gate(*jnp.split(jnp.asarray(out, jnp.float32), 2, axis=1)), np.float64)

    def by_hopper(self, **options):
        return functools.partial(
            block_product.by_hopper,
            finish=gate if self.gated else block_product.alone,
            out_dtype=self.dtype,
            num_matrices=self.num_matrices,
            **options,
        )

    def check(self, **options) -> None:
        """A number halfway between two of float8, 2**-4 apart, goes either way: so the mean error counts."""
        got = np.asarray(jax.jit(self.by_hopper(**options))(*self.arguments()), np.float64)
        want = self.expected(in_float8_too=True)
        assert got.shape == want.shape
        assert np.sqrt(np.mean((got - want) ** 2)) < 0.01 * np.sqrt(np.mean(want**2))


CASES = (
    Case(T=20, N=96, K=256),  # the last block of the weight is cut
    Case(T=130, N=128, K=128, dtype="float16"),
    Case(T=70, N=128, K=384, gated=True),
)
LARGE = (  # for GPUs
    Case(T=16, N=2048, K=4096),
    Case(T=256, N=5120, K=2048),
    Case(T=2048, N=576, K=7168),
    Case(T=256, N=1536, K=2048, gated=True),
    Case(T=16, N=128, K=128 * 253),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float8_rows_meet_the_weight_with_a_scale_for_each_128_numbers(case):
    case.check(interpret=plgpu.InterpretGPUParams())


@pytest.mark.parametrize(
    "case", [Case(T=1, N=200, K=256), Case(T=15, N=128, K=1024, dtype="float16")], ids=str
)
def test_few_rows_are_multiplied_as_they_are(case):
    got = np.asarray(block_product.by_block(*case.arguments(), case.dtype), np.float64)
    np.testing.assert_allclose(got, case.expected(in_float8_too=False), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_kernel_lowers_to_cuda_without_a_gpu(case):
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(case.by_hopper()).trace(*case.shapes())
        assert "hopper_block_product" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "T, N, num_matrices, groups, columns",
    [
        (16, 2048, 1, 1, 32),
        (256, 5120, 1, 2, 128),
        (2048, 5120, 1, 2, 128),
        (2048, 576, 1, 2, 64),
        (256, 1536, 2, 2, 32),
        (2048, 6144, 2, 2, 64),
    ],
)
def test_tiles_are_those_that_end_soonest(T, N, num_matrices, groups, columns):
    tile = block_product.choose_tile(T, N, num_matrices)
    assert (tile.groups, tile.columns) == (groups, columns)
    assert NUM_SMS == 132, "what the cases are made for"


@pytest.mark.parametrize(
    "case, where, is_supported, expected",
    [
        (Case(T=16, N=128, K=256), "fast", True, "by_hopper"),
        (Case(T=15, N=128, K=256), "fast", True, "by_block"),
        (Case(T=15, N=128, K=256), "fast", False, "by_block"),
        (Case(T=16, N=128, K=256), "fast", False, "dequantise"),
        (Case(T=16, N=128, K=256), "reference", True, "dequantise"),
        (Case(T=15, N=128, K=256), "reference", True, "dequantise"),
        (Case(T=16, N=128, K=256, dtype="float32"), "fast", True, "dequantise"),
        (Case(T=15, N=128, K=256, dtype="float32"), "fast", True, "dequantise"),
        (Case(T=16, N=136, K=256), "fast", True, "dequantise"),
        (Case(T=16, N=128, K=128 * 254), "fast", True, "dequantise"),
    ],
    ids=str,
)
def test_how_rows_meet_the_weight(monkeypatch, case, where, is_supported, expected):
    asked = []
    for name in ("by_hopper", "by_block", "dequantise"):
        of_module = getattr(block_product, name)

        def note(*arguments, name=name, of_module=of_module):
            asked.append(name)
            return of_module(*arguments)

        monkeypatch.setattr(block_product, name, note)
    monkeypatch.setattr(block_product, "is_supported", lambda: is_supported)
    with backend.use(where):
        out = jax.eval_shape(functools.partial(block_product.project, out_dtype=case.dtype), *case.shapes())
        assert asked == [expected]
        jax.eval_shape(functools.partial(block_product.project, out_dtype=jnp.float32), *case.shapes())
    assert asked[-1] == ("dequantise" if expected == "by_hopper" else expected), "of float32 results"
    assert (out.shape, out.dtype) == ((case.T, case.N), case.dtype)
