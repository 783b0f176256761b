"""Rotation and KV write: the formula, then the kernel against the reference on the same cases."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import backend, kv_write
from jaxserve.ops.kv_write import HeadNorm, Heads
from tests.ops.cases import H100

PAGES, PAGE_SIZE, OFFSET = 5, 4, 2
# One rounding of the type that a number is kept in, for numbers up to 4.
ROUNDING = {"float32": 1e-6, "bfloat16": 2e-2, "float8_e4m3fn": 0.25}


@dataclass(frozen=True)
class Case:
    """`T` tokens; `turned` numbers of a head rotate."""

    T: int = 7
    H: int = 4
    G: int = 2
    K: int = 16
    turned: int = 16
    joined: bool = True
    scaled: tuple[bool, bool, bool] = (False, False, False)  # queries, keys, values
    normed: bool = False  # queries and keys
    dtype: str = "float32"
    pool_dtype: str = "float32"

    def arguments(self):
        rng = np.random.default_rng(self.T)
        everything = jnp.asarray(rng.normal(size=(self.T, self.H + 2 * self.G, self.K)), self.dtype)
        H, G = self.H, self.G
        heads = Heads(everything, 0, H), Heads(everything, H, G), Heads(everything, H + G, G)
        if any(self.scaled):
            row, column = rng.uniform(0.25, 1, (self.T, 1)), rng.uniform(0.25, 1, everything.shape[1:])
            scales = jnp.asarray(row, jnp.float32), jnp.asarray(column, jnp.float32)
            heads = tuple(
                replace(part, scales=scales if scaled else None) for part, scaled in zip(heads, self.scaled)
            )
        if not self.joined:
            heads = tuple(Heads.whole(part.value_THK) for part in heads)
        if self.normed:
            gains = jnp.asarray(rng.uniform(-0.9, -0.1, size=(2, self.K)), self.dtype)
            norms = HeadNorm(gains[0], eps=1e-6), HeadNorm(gains[1], eps=1e-3, offset=1.0), None
            heads = tuple(replace(part, norm=norm) for part, norm in zip(heads, norms))
        angle = rng.uniform(0, 6, (self.T, self.turned // 2)).astype(np.float32)
        rotation = (jnp.cos(angle), jnp.sin(angle)) if self.turned else None
        shape = (OFFSET + PAGES, PAGE_SIZE, self.G, self.K)
        pools = (jnp.full(shape, fill, self.pool_dtype) for fill in (7.0, 8.0))
        place = rng.permutation(PAGES * PAGE_SIZE)[: self.T]
        page = place // PAGE_SIZE
        page[1::3] = -1  # padding
        return heads, rotation, *pools, jnp.asarray(page), jnp.asarray(place % PAGE_SIZE)

    def traced(self):
        """`rotate_and_write` of arrays alone, and its arguments."""

        def function(heads, *arrays):
            return kv_write.rotate_and_write(*heads, *arrays, page_offset=OFFSET)

        heads, *arrays = self.arguments()
        return jax.jit(function), (heads, *arrays)

    def run(self, where):
        function, arguments = self.traced()
        with backend.use(where):
            return function(*arguments)


CASES = (
    Case(),
    Case(joined=False, turned=0),
    Case(H=3, G=3, K=24, turned=12),  # a part of the head turns, nothing is a power of two
    Case(H=20, G=1, dtype="bfloat16", pool_dtype="bfloat16"),
    Case(H=16, G=8, K=128, turned=128, dtype="bfloat16", pool_dtype="bfloat16"),
    Case(H=3, G=3, K=24, turned=12, scaled=(True, True, True)),
    Case(H=16, G=8, K=128, turned=128, dtype="bfloat16", pool_dtype="bfloat16", scaled=(True, True, True)),
    Case(scaled=(False, False, True)),
    Case(normed=True),
    Case(H=3, G=3, K=24, turned=12, scaled=(True, True, True), normed=True),
    Case(H=16, G=8, K=128, turned=128, dtype="bfloat16", pool_dtype="bfloat16", normed=True),
    Case(joined=False, turned=0, normed=True),
    Case(dtype="bfloat16", pool_dtype="float8_e4m3fn", joined=False),
)


@pytest.mark.parametrize("where", ["reference", "interpret"])
def test_pairs_turn_by_their_angle_and_land_where_they_belong(where):
    case = Case(turned=8)
    (query, key, value), (cos, sin), _, _, page_T, offset_T = case.arguments()
    query_THK, key_pages, value_pages = case.run(where)

    def turned(x_THK):
        x = np.asarray(x_THK, np.float64)
        turn = (np.asarray(cos) + 1j * np.asarray(sin))[:, None, :]
        pairs = (x[..., :4] + 1j * x[..., 4:8]) * turn
        return np.concatenate((pairs.real, pairs.imag, x[..., 8:]), axis=-1)

    np.testing.assert_allclose(query_THK, turned(query.value_THK), atol=1e-6)  # float32 against float64
    for pool, heads, fill in ((key_pages, turned(key.value_THK), 7), (value_pages, value.value_THK, 8)):
        want = np.full(pool.shape, fill, np.float64)
        for token, (page, offset) in enumerate(zip(page_T, offset_T)):
            if page >= 0:
                want[OFFSET + page, offset] = heads[token]
        np.testing.assert_allclose(pool, want, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_reference(case):
    """To the bit but for how a product and a sum are joined in float32."""
    for got, want in zip(case.run("interpret"), case.run("reference"), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        kept = str(got.dtype)
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=ROUNDING[kept])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_lowers_to_cuda_without_a_gpu_and_is_one(case):
    function, arguments = case.traced()
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        text = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1
