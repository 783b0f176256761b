"""Latent attention: the reference against a dense softmax over keys of latent and rope part; kernels too."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import backend, mla_attention
from jaxserve.ops.split_keys import Split
from tests.ops.cases import H100

PAGE = 8
SLOTS = 5
SCALE = 0.3


@dataclass(frozen=True)
class Latents:
    """Two layers of random pages; those that no slot names hold infinities."""

    H: int = 4
    L: int = 32
    K: int = 16
    dtype: str = "float32"
    seed: int = 0
    kv_dtype: str | None = None  # of the pools, when another
    pages_per_slot: int = 20

    @property
    def pool_dtype(self):
        return self.kv_dtype or self.dtype

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        used = SLOTS * self.pages_per_slot
        num_pages = used + 3
        table = rng.permutation(num_pages)[:used]
        unused = np.setdiff1d(np.arange(num_pages), table)
        pools = []
        for size in (self.L, self.K):
            pool = np.array(
                jnp.asarray(rng.normal(size=(2 * num_pages, PAGE, size)), self.pool_dtype), np.float32
            )
            pool[:num_pages], pool[num_pages + unused] = np.inf, np.inf
            pools.append(pool)
        object.__setattr__(self, "pools", pools)
        object.__setattr__(self, "table", table.reshape(SLOTS, self.pages_per_slot).astype(np.int32))
        object.__setattr__(self, "num_pages", num_pages)

    def queries(self, n):
        rng = np.random.default_rng(self.seed + 1)
        return [
            np.asarray(jnp.asarray(rng.normal(size=(n, self.H, s)), self.dtype)) for s in (self.L, self.K)
        ]

    def arguments(self, n):
        queries = (jnp.asarray(a, self.dtype) for a in self.queries(n))
        pools = (jnp.asarray(a, self.pool_dtype) for a in self.pools)
        return (*queries, *pools, jnp.asarray(self.table))

    def dense(self, query, slot, length):
        """One token's heads over the first `length` positions of a slot, in float64."""
        latent, rope = (
            p[self.num_pages + self.table[slot]].reshape(-1, p.shape[-1])[:length] for p in self.pools
        )
        latent = latent.astype(np.float64)
        score = (query[0].astype(np.float64) @ latent.T + query[1].astype(np.float64) @ rope.T) * SCALE
        weight = np.exp(score - score.max(-1, keepdims=True))
        return weight @ latent / weight.sum(-1, keepdims=True)

    def tolerance(self):
        """float32: summation order; bfloat16: rounded weights and results of size 1..3."""
        return 1e-5 if self.dtype == "float32" else 3e-2


ROWS = {"slots": (3, 1, 0, 4, 2, 3), "lens": (1, 0, 160, 159, 77, 8)}
CHUNKS = ((2, 0, 50, 10), (0, 50, 17, 0), (3, 70, 35, 100), (1, 110, 1, 64))  # slot, start, length, pos
NUM_TOKENS, BLOCK = 115, 16


def blocks(chunks=CHUNKS, size=BLOCK):
    cut = [
        (slot, start + i, min(size, length - i), pos + i)
        for slot, start, length, pos in chunks
        for i in range(0, length, size)
    ]
    return [jnp.asarray(x, jnp.int32) for x in zip(*cut, (0, 0, 0, 0))]


def options(latents):
    return {"page_offset": latents.num_pages, "scale": SCALE}


def run_decode(latents, where, **more):
    rows = [jnp.asarray(ROWS[name], jnp.int32) for name in ("slots", "lens")]
    call = mla_attention.fast.decode if more else mla_attention.decode
    with backend.use(where):
        function = jax.jit(functools.partial(call, **options(latents), **more))
        return np.asarray(function(*latents.arguments(len(ROWS["slots"])), *rows), np.float32)


def run_prefill(latents, where):
    with backend.use(where):
        function = jax.jit(functools.partial(mla_attention.prefill, block_size=BLOCK, **options(latents)))
        return np.asarray(function(*latents.arguments(NUM_TOKENS), *blocks()), np.float32)


def expected_decode(latents):
    """A row of no tokens keeps its query."""
    query = latents.queries(len(ROWS["slots"]))
    out = np.array(query[0], np.float64)
    for r, (slot, length) in enumerate(zip(*ROWS.values())):
        if length:
            out[r] = latents.dense([q[r] for q in query], slot, length)
    return out


def expected_prefill(latents, num_tokens=NUM_TOKENS, chunks=CHUNKS):
    """Tokens of no block keep their query."""
    query = latents.queries(num_tokens)
    out = np.array(query[0], np.float64)
    for slot, start, length, pos in chunks:
        for i in range(length):
            out[start + i] = latents.dense([q[start + i] for q in query], slot, pos + i + 1)
    return out


CASES = (
    Latents(),
    Latents(H=20, L=24, K=8),  # heads of two tiles, sizes that are no powers of two
    Latents(H=16, L=64, K=16, dtype="bfloat16"),
    Latents(H=16, L=64, K=16, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
)


@pytest.mark.parametrize("where", ["reference", "interpret"])
@pytest.mark.parametrize("latents", CASES, ids=str)
def test_decode_equals_a_dense_softmax_over_the_rows_own_latents(latents, where):
    got = run_decode(latents, where)
    np.testing.assert_allclose(got, expected_decode(latents), rtol=0, atol=latents.tolerance())


@pytest.mark.parametrize("where", ["reference", "interpret"])
@pytest.mark.parametrize("latents", CASES, ids=str)
def test_prefill_equals_a_dense_softmax_over_prefix_and_chunk(latents, where):
    got = run_prefill(latents, where)
    np.testing.assert_allclose(got, expected_prefill(latents), rtol=0, atol=latents.tolerance())
    none = np.r_[67:70, 105:110, 111:NUM_TOKENS]  # tokens of no block
    np.testing.assert_array_equal(got[none], latents.queries(NUM_TOKENS)[0][none].astype(np.float32))


@pytest.mark.parametrize("where", ["reference", "interpret"])
def test_rows_are_the_first_queries(where):
    latents = CASES[0]
    rows = [jnp.asarray(ROWS[name], jnp.int32) for name in ("slots", "lens")]
    latent, rope, *pools = latents.arguments(len(rows[0]))
    more = [jnp.concatenate([x, x + 1]) for x in (latent, rope)]
    with backend.use(where):
        got = jax.jit(functools.partial(mla_attention.decode, **options(latents)))(*more, *pools, *rows)
    want = np.concatenate([expected_decode(latents), latent + 1])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", [Split(1), Split(2), Split(8), Split(4, min_blocks=3)], ids=str)
def test_decode_kernel_gives_the_same_for_any_split(split):
    latents = CASES[0]
    got = run_decode(latents, "interpret", interpret=True, split=split)
    np.testing.assert_allclose(got, expected_decode(latents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads, kv", [(16, jnp.bfloat16), (128, jnp.bfloat16), (128, jnp.float8_e4m3fn)])
def test_kernels_lower_to_cuda_without_a_gpu_in_deepseeks_shape(heads, kv):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def ints(*shape):
        return array(*shape, dtype=jnp.int32)

    pools = (array(1000, 16, 512, dtype=kv), array(1000, 16, 64, dtype=kv), ints(4, 64))
    step = {"page_offset": 100, "scale": 0.1}
    decode = functools.partial(mla_attention.decode, **step)
    prefill = functools.partial(mla_attention.prefill, block_size=64, **step)
    rows = (array(8, heads, 512), array(8, heads, 64), *pools, ints(8), ints(8))
    tokens = (array(256, heads, 512), array(256, heads, 64), *pools, *[ints(6)] * 4)
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        for function, arguments in ((decode, rows), (prefill, tokens)):
            text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
            assert "xla.gpu.triton" in text
