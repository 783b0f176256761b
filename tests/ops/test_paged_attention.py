"""Paged attention: the reference against a dense softmax, the kernels against the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.ops import backend, paged_attention
from jaxserve.ops.split_keys import Split
from tests.ops.cases import (
    H100,
    KERNEL_HEADS,
    Decode,
    Heads,
    Pool,
    Prefill,
    decode_case,
    prefill_case,
    tolerance,
)

few = functools.partial(settings, deadline=None, derandomize=True)


def run(case, where="reference"):
    with backend.use(where):
        return np.asarray(jax.jit(traced(case))(*case.arguments()), np.float32)


def traced(case):
    options = case.pool.options()
    if isinstance(case, Prefill):
        return functools.partial(paged_attention.prefill, block_size=case.block_size, **options)
    return functools.partial(paged_attention.decode, **options)


def check(case, where="reference"):
    np.testing.assert_allclose(run(case, where), case.expected(), rtol=0, atol=tolerance(case.pool.heads))


heads = st.builds(
    lambda G, q, K, page_size, window, softcap, sinks: Heads(
        G * q, G, K, page_size, "float32", window, softcap, sinks
    ),
    G=st.sampled_from([1, 2, 3]),
    q=st.sampled_from([1, 2, 5]),
    K=st.sampled_from([8, 24]),
    page_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 9, 200]),
    softcap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
)


@few(max_examples=25)
@given(data=st.data(), heads=heads, seed=st.integers(0, 99))
def test_decode_equals_a_dense_softmax_over_the_rows_own_pages(data, heads, seed):
    pool = Pool(heads, num_slots=4, pages_per_slot=160 // heads.page_size, seed=seed)
    rows = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 160)), min_size=1, max_size=5))
    slots, lens = zip(*rows)
    check(Decode(pool, slots, lens))


@few(max_examples=25)
@given(data=st.data(), heads=heads, seed=st.integers(0, 99), block_size=st.sampled_from([4, 16]))
def test_prefill_equals_a_dense_softmax_over_prefix_and_chunk(data, heads, seed, block_size):
    pool = Pool(heads, num_slots=4, pages_per_slot=160 // heads.page_size, seed=seed)
    chunks, token = [], 0
    for slot in range(data.draw(st.integers(1, 4))):
        token += data.draw(st.integers(0, 3))  # tokens of no block
        length = data.draw(st.integers(1, 24))
        chunks.append((slot, token, length, data.draw(st.integers(0, 160 - length))))
        token += length
    check(Prefill(pool, token + data.draw(st.integers(0, 3)), tuple(chunks), block_size))


def test_rows_of_no_tokens_keep_their_query_even_when_every_row_is_padding():
    pool = Pool(Heads(4, 2, 8, sinks=True), num_slots=2, pages_per_slot=2)
    case = Decode(pool, (0, 1), (0, 0))
    for where in ("reference", "interpret"):
        np.testing.assert_array_equal(run(case, where), case.query())


def test_table_entries_past_a_sequences_end_may_hold_anything():
    case = decode_case(Heads(4, 2, 16))
    query, keys, values, table, slots, lens = case.arguments()
    wild = table.at[2, 5:].set(2**30).at[4, 5:].set(-7)  # lens of these slots end before
    for where in ("reference", "interpret"):
        with backend.use(where):
            out = jax.jit(traced(case))(query, keys, values, wild, slots, lens)
        np.testing.assert_array_equal(np.asarray(out), run(case, where))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    pool = Pool(Heads(4, 2, 16), num_slots=3, pages_per_slot=10)
    crowd = Decode(pool, (0, 1, 2), (40, 150, 160))
    alone = Decode(pool, (0,), (40,))
    np.testing.assert_allclose(run(crowd)[0], run(alone)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", KERNEL_HEADS, ids=str)
def test_decode_kernel_equals_a_dense_softmax(heads):
    check(decode_case(heads), "interpret")


@pytest.mark.parametrize("heads", KERNEL_HEADS, ids=str)
def test_prefill_kernel_equals_a_dense_softmax(heads):
    check(prefill_case(heads), "interpret")


@pytest.mark.parametrize("where", ["reference", "interpret"])
def test_rows_are_the_first_queries(where):
    case = decode_case(Heads(4, 2, 16))
    query, *rest = case.arguments()
    with backend.use(where):
        out = np.asarray(jax.jit(traced(case))(jnp.concatenate([query, query + 1]), *rest))
    np.testing.assert_allclose(out, np.concatenate([case.expected(), query + 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", [Split(1), Split(2), Split(8), Split(4, min_blocks=3)], ids=str)
def test_decode_kernel_gives_the_same_for_any_split(split):
    case = decode_case(Heads(8, 2, 64, window=70, sinks=True))
    decode = functools.partial(paged_attention.fast.decode, interpret=True, split=split)
    out = jax.jit(functools.partial(decode, **case.pool.options()))(*case.arguments())
    np.testing.assert_allclose(out, case.expected(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", KERNEL_HEADS, ids=str)
@pytest.mark.parametrize("make", [decode_case, prefill_case])
def test_kernel_lowers_to_cuda_without_a_gpu(make, heads):
    case = make(heads)
    assert "xla.gpu.triton" in lower_for_cuda(traced(case), *case.arguments())


def lower_for_cuda(function, *arguments) -> str:
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
