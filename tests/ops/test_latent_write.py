"""Norm, rotations and write of latent attention: the formulas, then the kernel against the reference."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import backend
from jaxserve.ops.latent_write import Columns, rotate_and_write_latent
from tests.ops.cases import H100

PAGES, PAGE_SIZE, OFFSET = 6, 4, 2
EPS = 1e-3  # large enough that leaving it out shows
# One rounding of the type that a number is kept in, for numbers up to 4.
ROUNDING = {"float32": 1e-6, "bfloat16": 2e-2, "float8_e4m3fn": 0.25}


@dataclass(frozen=True)
class Case:
    """`T` tokens of `H` heads; `large` makes rotated numbers of some hundreds."""

    T: int = 7
    H: int = 4
    N: int = 8
    K: int = 8
    L: int = 16
    interleaved: bool = True
    joined: bool = True
    large: bool = False
    dtype: str = "float32"
    pool_dtype: str = "float32"

    def arguments(self):
        rng = np.random.default_rng(self.T)
        sizes = self.H * (self.N + self.K), self.L + self.K
        everything = rng.normal(size=(self.T, 3 + sum(sizes))) * (300 if self.large else 1)
        everything = jnp.asarray(everything, self.dtype)
        columns = Columns(everything, 3, sizes[0]), Columns(everything, 3 + sizes[0], sizes[1])
        if not self.joined:
            columns = tuple(Columns.whole(part.value_TC) for part in columns)
        weight_L = jnp.asarray(rng.uniform(0.5, 1.5, self.L), self.dtype)
        angle = rng.uniform(0, 6, (self.T, self.K // 2)).astype(np.float32)
        shapes = ((OFFSET + PAGES, PAGE_SIZE, size) for size in (self.L, self.K))
        pools = (jnp.full(shape, fill, self.pool_dtype) for shape, fill in zip(shapes, (7.0, 8.0)))
        place = rng.permutation(PAGES * PAGE_SIZE)[: self.T]
        page = place // PAGE_SIZE
        page[1::3] = -1  # padding
        address = jnp.asarray(page), jnp.asarray(place % PAGE_SIZE)
        return columns, weight_L, (jnp.cos(angle), jnp.sin(angle)), *pools, *address

    def traced(self):
        """`rotate_and_write_latent` of arrays alone, and its arguments."""
        columns, *arrays = self.arguments()
        places = [(part.first, part.count) for part in columns]

        def function(arrays_TC, page_offset, *arrays):
            parts = [Columns(array, *place) for array, place in zip(arrays_TC, places)]
            options = {"num_heads": self.H, "eps": EPS, "interleaved": self.interleaved}
            return rotate_and_write_latent(*parts, *arrays, page_offset=page_offset, **options)

        return jax.jit(function), ([part.array_TC for part in columns], jnp.int32(OFFSET), *arrays)

    def run(self, where):
        function, arguments = self.traced()
        with backend.use(where):
            return function(*arguments)


CASES = (
    Case(),
    Case(interleaved=False),
    Case(joined=False, T=1),
    Case(T=5, H=3, N=12, K=12, L=24),  # nothing is a power of two
    Case(T=13, H=20, interleaved=False, dtype="bfloat16", pool_dtype="bfloat16"),  # a program of four heads
    Case(T=8, H=16, N=128, K=64, L=512, dtype="bfloat16", pool_dtype="bfloat16"),  # DeepSeek-V2-Lite
    Case(joined=False, dtype="bfloat16", pool_dtype="float8_e4m3fn"),
    Case(H=40, dtype="bfloat16", pool_dtype="float8_e4m3fn", interleaved=False),
)


def turned(x, cos, sin, interleaved):
    """In float64, of pairs that are one complex number each."""
    x, half = np.asarray(x, np.float64), x.shape[-1] // 2
    one, two = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pairs = (one + 1j * two) * (np.asarray(cos) + 1j * np.asarray(sin))
    return np.concatenate((pairs.real, pairs.imag), axis=-1)


def check_against_the_formulas(case, where):
    (query, down), weight_L, (cos, sin), _, _, page_T, offset_T = case.arguments()
    query_THN, query_THK, *pools = case.run(where)

    heads = np.asarray(query.value_TC).reshape(case.T, case.H, case.N + case.K)
    np.testing.assert_array_equal(query_THN, heads[..., : case.N])
    want = turned(heads[..., case.N :], cos[:, None], sin[:, None], case.interleaved)
    np.testing.assert_allclose(query_THK, want, atol=1e-6)  # float32 against float64

    latent = np.asarray(down.value_TC[:, : case.L], np.float64)
    latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight_L)
    rope = turned(down.value_TC[:, case.L :], cos, sin, case.interleaved)
    for pool, tokens, fill in zip(pools, (latent, rope), (7, 8), strict=True):
        want = np.full(pool.shape, fill, np.float64)
        for token, (page, offset) in enumerate(zip(page_T, offset_T)):
            if page >= 0:
                want[OFFSET + page, offset] = tokens[token]
        np.testing.assert_allclose(pool, want, atol=1e-6)


@pytest.mark.parametrize("where", ["reference", "interpret"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_parts_are_normalized_turned_and_land_where_they_belong(where, interleaved):
    check_against_the_formulas(Case(interleaved=interleaved), where)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_reference(case):
    """To the bit but for how products and sums are joined in float32."""
    for got, want in zip(case.run("interpret"), case.run("reference"), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        kept = str(got.dtype)
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=ROUNDING[kept])


def check_cut(where):
    *_, rope_pages = Case(large=True, pool_dtype="float8_e4m3fn").run(where)
    largest = np.abs(np.asarray(rope_pages, np.float32)).max()
    assert largest == 448  # and no NaN, which would be the maximum


@pytest.mark.parametrize("where", ["reference", "interpret"])
def test_float8_pool_cuts_what_is_beyond_448(where):
    check_cut(where)


@pytest.mark.parametrize("where", ["reference", "interpret"])
def test_step_without_tokens_leaves_the_pools_alone(where):
    case = Case(T=0)
    query_THN, query_THK, latent_pages, rope_pages = case.run(where)
    assert query_THN.shape == (0, case.H, case.N) and query_THK.shape == (0, case.H, case.K)
    assert (latent_pages == 7).all() and (rope_pages == 8).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_lowers_to_cuda_without_a_gpu_and_is_one(case):
    function, arguments = case.traced()
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        text = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1
