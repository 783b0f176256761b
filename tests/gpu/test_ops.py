"""The kernels on a GPU: the cases of tests/ops, and what only real memory can show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import backend, paged_attention, sampling
from jaxserve.ops.mla_attention import hopper as hopper_mla
from jaxserve.ops.paged_attention import hopper, reference
from jaxserve.ops.sampling import fast as fast_sampling
from jaxserve.ops.sampling import reference as sorted_sampling
from jaxserve.ops.split_keys import Split
from tests.ops import test_hopper_mla, test_mla_attention
from tests.ops.cases import KERNEL_HEADS, Decode, Heads, Pool, Prefill, decode_case, prefill_case, tolerance
from tests.ops.test_hopper_prefill import HEADS as HOPPER_HEADS
from tests.ops.test_hopper_prefill import arguments as with_nan_past_each_end
from tests.ops.test_hopper_prefill import uneven_case
from tests.ops.test_sampling import filtered_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


def traced(case):
    options = case.pool.options()
    if isinstance(case, Prefill):
        return functools.partial(paged_attention.prefill, block_size=case.block_size, **options)
    return functools.partial(paged_attention.decode, **options)


@pytest.mark.parametrize("where", ["fast", "reference"])
@pytest.mark.parametrize("heads", KERNEL_HEADS, ids=str)
@pytest.mark.parametrize("make", [decode_case, prefill_case])
def test_attention_equals_a_dense_softmax(make, heads, where):
    case = make(heads)
    with backend.use(where):
        out = jax.jit(traced(case))(*case.arguments())
    out = np.asarray(out, np.float32)
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=tolerance(heads))


@pytest.mark.parametrize("heads", KERNEL_HEADS[:5], ids=str)
def test_prefill_blocks_of_128_equal_a_dense_softmax(heads):
    case = prefill_case(heads)
    case = Prefill(case.pool, case.num_tokens, case.chunks, block_size=128)
    out = np.asarray(jax.jit(traced(case))(*case.arguments()), np.float32)
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=tolerance(heads))


@pytest.mark.parametrize("heads", HOPPER_HEADS, ids=str)
@pytest.mark.parametrize("tile", [hopper.Tile(), hopper.Tile(keys=64, stages=4)], ids=str)
def test_prefill_for_hopper_equals_a_dense_softmax(heads, tile):
    case = uneven_case(heads)
    run = functools.partial(hopper.prefill, **case.pool.options(), tile=tile)
    out = np.asarray(jax.jit(run)(*with_nan_past_each_end(case)), np.float32)
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=tolerance(heads))


@pytest.mark.parametrize("H", [8, 16, 128])
def test_latent_prefill_for_hopper_equals_a_dense_softmax(H):
    case = test_hopper_mla.DEEPSEEK(H)
    options = {**test_hopper_mla.options(case), "block_size": 128}
    run = functools.partial(hopper_mla.prefill, **options)
    out = np.asarray(jax.jit(run)(*test_hopper_mla.arguments(case, 128)), np.float32)
    np.testing.assert_allclose(out, test_hopper_mla.expected(case), rtol=0, atol=case.tolerance())


def test_latent_decode_for_hopper_equals_a_dense_softmax():
    case = test_hopper_mla.DEEPSEEK(128)
    out, want = test_hopper_mla.run_decode(case), test_hopper_mla.expected_decode(case)
    np.testing.assert_allclose(out, want, rtol=0, atol=case.tolerance())


@pytest.mark.parametrize("shape", [(9, 3, 64), (32, 8, 128)], ids=str)
def test_decode_of_many_rows_equals_a_dense_softmax(shape):
    """A program for each row and KV head, which writes in the queries' place; SmolLM2's heads, Llama's."""
    heads = Heads(*shape, dtype="bfloat16")
    pool = Pool(heads, num_slots=90, pages_per_slot=32)
    lens = np.random.default_rng(2).integers(0, 513, 90)
    lens[:30] = 300
    case = Decode(pool, slots=tuple(range(90)), lens=tuple(int(n) for n in lens))
    out = np.asarray(jax.jit(traced(case))(*case.arguments()), np.float32)
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=tolerance(heads))


@pytest.mark.parametrize("split", [Split(1), Split(2), Split(8), Split(64), Split(4, min_blocks=2)], ids=str)
def test_decode_gives_the_same_for_any_split(split):
    case = decode_case(KERNEL_HEADS[5])
    decode = functools.partial(paged_attention.fast.decode, split=split, **case.pool.options())
    out = np.asarray(jax.jit(decode)(*case.arguments()), np.float32)
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=tolerance(case.pool.heads))


@pytest.mark.parametrize("split", [Split(1), Split(4), Split(4, min_blocks=2)], ids=str)
def test_latent_decode_gives_the_same_for_any_split(split):
    latents = test_mla_attention.CASES[2]
    got = test_mla_attention.run_decode(latents, "fast", split=split)
    want = test_mla_attention.expected_decode(latents)
    np.testing.assert_allclose(got, want, rtol=0, atol=latents.tolerance())


def test_pages_beyond_2_to_the_31_elements_are_read():
    G, K, page_size, H = 8, 128, 16, 32
    num_pages = 2**31 // (page_size * G * K) + 4096  # 4.5 GB a pool
    last = num_pages - 64

    @jax.jit
    def make(seed):
        pool = jnp.full((num_pages, page_size, G, K), jnp.inf, jnp.bfloat16)
        used = jax.random.normal(jax.random.key(seed), (64, page_size, G, K), jnp.bfloat16)
        return jax.lax.dynamic_update_slice_in_dim(pool, used, last, axis=0)

    keys, values = make(0), make(1)
    offset = last - 100  # the layer's offset takes part in the arithmetic
    table = jnp.asarray(np.random.default_rng(0).permutation(64).reshape(2, 32) + 100, jnp.int32)
    rows = (jnp.asarray([1, 0], jnp.int32), jnp.asarray([512, 300], jnp.int32))
    blocks = [jnp.asarray(x, jnp.int32) for x in ([0, 0], [0, 64], [64, 30], [200, 264])]
    query = jax.random.normal(jax.random.key(2), (100, H, K), jnp.bfloat16)
    options = dict(page_offset=offset, scale=K**-0.5)
    small = (keys[last:], values[last:], table - 100)

    out = jax.jit(functools.partial(paged_attention.decode, **options))(query[:2], keys, values, table, *rows)
    options["page_offset"] = 0
    want = jax.jit(functools.partial(reference.decode, **options))(query[:2], *small, *rows)
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=2e-2)

    options.update(page_offset=offset, block_size=64)
    out = jax.jit(functools.partial(paged_attention.prefill, **options))(query, keys, values, table, *blocks)
    options["page_offset"] = 0
    want = jax.jit(functools.partial(reference.prefill, **options))(query, *small, *blocks)
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=2e-2)


@pytest.mark.parametrize("where", ["fast", "reference"])
@pytest.mark.parametrize("V", [49152, 128256, 262144, 151646])
def test_sampler_keeps_the_same_tokens_as_the_sort(V, where):
    logits, *filters = filtered_rows(V)
    want = jax.jit(sorted_sampling.kept)(logits, *filters)
    with backend.use(where):
        got = jax.jit(lambda *a: fast_sampling.kept(*a))(logits, *filters)
        uniform = sampling.uniform(jnp.arange(10), jnp.arange(10))
        token = jax.jit(lambda *a: sampling.sample(*a))(logits, uniform, *filters)
    # The two sum 262k float32 weights in different orders: the nucleus may end a few tokens apart
    # where each holds less of the mass than that rounding (about 1e-6).
    differing = np.asarray((want != got).sum(1))
    assert (differing <= 1e-3 * np.asarray(want.sum(1))).all(), differing
    assert bool(jnp.take_along_axis(got, token[:, None], axis=1).all())


def test_top_logprobs_are_those_of_the_whole_row():
    logits = jnp.round(2.5 * jax.random.normal(jax.random.key(2), (5, 128256)) * 16) / 16  # many ties
    values, ids = jax.jit(lambda x: sampling.top_logprobs(x, 20))(logits)
    want_values, want_ids = sorted_sampling.top_logprobs(logits, 20)
    assert ids.tolist() == want_ids.tolist()
    np.testing.assert_allclose(values, want_values, rtol=0, atol=1e-4)


def test_random_numbers_are_those_of_the_cpu():
    got = jax.jit(sampling.uniform)(jnp.arange(4) - 2, jnp.asarray([0, 1, 70000, 2**30]))
    with jax.default_device(jax.devices("cpu")[0]):
        want = sampling.uniform(jnp.arange(4) - 2, jnp.asarray([0, 1, 70000, 2**30]))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
