"""Sampling: exact filters, the right distribution, and no dependence on anything but the row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.ops import backend, sampling
from jaxserve.ops.sampling import candidates, fast, reference
from tests.ops.cases import H100

few = functools.partial(settings, deadline=None, derandomize=True)
sorted_kept = jax.jit(reference.kept)
searched_kept = [jax.jit(functools.partial(fast.kept, bits=bits)) for bits in (1, 2, 4)]
samplers = [jax.jit(reference.sample), jax.jit(fast.sample)]


def array(*values):
    return jnp.asarray(values, jnp.float32)


def keeps(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Ids that both implementations keep of one row; for any number of bits a pass."""
    arguments = (
        jnp.asarray([logits], jnp.float32),
        array(temperature),
        jnp.asarray([top_k]),
        array(top_p),
        array(min_p),
    )
    kept = np.asarray(sorted_kept(*arguments))
    for searched in searched_kept:
        np.testing.assert_array_equal(searched(*arguments), kept)
    return np.flatnonzero(kept[0]).tolist()


QUARTERS = np.log([0.1, 0.4, 0.2, 0.3]).tolist()  # of ids 0..3


def test_top_k_keeps_the_k_largest():
    assert keeps(QUARTERS, top_k=2) == [1, 3]


def test_top_k_of_zero_minus_one_or_more_than_the_vocabulary_keeps_all():
    assert (
        keeps(QUARTERS, top_k=0)
        == keeps(QUARTERS, top_k=-1)
        == keeps(QUARTERS, top_k=1 << 30)
        == [0, 1, 2, 3]
    )


def test_top_k_keeps_every_token_tied_with_the_kth():
    assert keeps([1.0, 3.0, 1.0, 0.0, 1.0], top_k=2) == [0, 1, 2, 4]


def test_zero_and_minus_zero_are_tied():
    assert keeps([0.0, 3.0, -0.0, -1.0], top_k=2) == [0, 1, 2]


def test_top_p_keeps_the_fewest_most_likely_tokens_that_reach_it():
    assert keeps(QUARTERS, top_p=0.65) == [1, 3]
    assert keeps(QUARTERS, top_p=0.75) == [1, 2, 3]
    assert keeps(QUARTERS, top_p=0.01) == [1]


def test_top_p_of_one_keeps_even_tokens_lost_to_rounding():
    assert keeps([0.0, -30.0, -60.0], top_p=1.0) == [0, 1, 2]


def test_top_p_counts_mass_after_top_k():
    # 0.4 and 0.3 are left; 0.4 is 57 % of that, though only 40 % of everything.
    assert keeps(QUARTERS, top_k=2, top_p=0.5) == [1]


def test_min_p_is_relative_to_the_most_likely_token():
    assert keeps(QUARTERS, min_p=0.45) == [1, 2, 3]
    assert keeps(QUARTERS, min_p=0.55) == [1, 3]


def test_temperature_comes_before_top_p_and_min_p():
    # Squared and renormalised: 0.01, 0.16, 0.04, 0.09 of 0.30.
    assert keeps(QUARTERS, temperature=0.5, top_p=0.52) == [1]
    assert keeps(QUARTERS, temperature=0.5, min_p=0.5) == [1, 3]


rows = st.fixed_dictionaries(
    dict(
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 7, 100, 5000]),
        top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
        min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    )
)


@few(max_examples=30)
@given(row=rows, seed=st.integers(0, 999), V=st.sampled_from([5, 257, 3000]), coarse=st.booleans())
def test_radix_search_keeps_exactly_what_the_sort_keeps(row, seed, V, coarse):
    random = np.random.default_rng(seed)
    logits = random.normal(size=V) * 3
    if coarse:  # many ties
        logits = np.round(logits)
    weights = np.sort(np.exp((logits - logits.max()).astype(np.float64) / row["temperature"]))[::-1]
    k = min(row["top_k"], V) or V
    weights = weights[: np.searchsorted(-weights, -weights[k - 1], side="right")]
    shares = np.cumsum(weights) / weights.sum()
    if np.abs(shares - row["top_p"]).min() < 1e-5 and row["top_p"] < 1:
        return  # float32 sums in another order may fall on the other side of such an edge
    keeps(logits, **row)


@few(max_examples=20)
@given(row=rows, seed=st.integers(0, 999), uniform=st.floats(0, 1, exclude_max=True, width=32))
def test_both_implementations_draw_the_same_token(row, seed, uniform):
    logits = jnp.asarray(np.random.default_rng(seed).normal(size=(1, 1000)) * 3, jnp.float32)
    filters = (
        array(row["temperature"]),
        jnp.asarray([row["top_k"]]),
        array(row["top_p"]),
        array(row["min_p"]),
    )
    kept = np.asarray(sorted_kept(logits, *filters))[0]
    weights = np.where(kept, np.exp(np.asarray(logits[0], np.float64) / row["temperature"]), 0)
    edges = np.cumsum(weights) / weights.sum()
    if np.abs(edges - uniform).min() < 1e-5 and row["top_k"] != 1:
        return  # rounding decides between two neighbours
    want = int(np.argmax(edges > uniform)) if row["top_k"] != 1 else int(np.argmax(logits[0]))
    for sample in samplers:
        assert sample(logits, array(uniform), *filters).tolist() == [want]


@pytest.mark.parametrize("twin", [reference, fast])
@pytest.mark.parametrize("filtered", [False, True])
def test_draws_follow_the_distribution(twin, filtered):
    logits = array(2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 0.2)
    draws, temperature = 20_000, 1.3
    uniform = sampling.uniform(jnp.full((draws,), 7), jnp.arange(draws))
    tiled = jnp.tile(logits, (draws, 1))
    temperatures = jnp.full((draws,), temperature)
    if filtered:
        token = twin.sample(tiled, uniform, temperatures, jnp.full((draws,), 5))
        kept = np.asarray(logits) >= 0.2
    else:
        token = twin.sample_temperature(tiled, uniform, temperatures)
        kept = np.ones(8, bool)
    probability = np.where(kept, np.exp(np.asarray(logits) / temperature), 0)
    expected = draws * probability / probability.sum()
    seen = np.bincount(np.asarray(token), minlength=8)
    assert (seen[~kept] == 0).all()
    chi_square = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 24.3  # 0.1 % of fair samples with 7 degrees of freedom exceed it; seed fixed


@pytest.mark.parametrize("twin", [reference, fast])
def test_extreme_uniforms_draw_tokens_of_positive_probability(twin):
    logits = jnp.full((3, 5000), -jnp.inf).at[:, 1234].set(1.0).at[:, 4000].set(0.0)
    uniform = array(0, 0.5, 1 - 2**-24)
    token = twin.sample(
        logits, uniform, jnp.ones(3), jnp.zeros(3, jnp.int32), array(0.999, 1, 1), jnp.zeros(3)
    )
    assert token.tolist() == [1234, 1234, 4000]


def test_temperature_zero_and_top_k_one_take_the_lowest_id_of_the_largest():
    logits = jnp.asarray([[0.0, 5.0, 5.0, 1.0]] * 2, jnp.float32)
    for twin in (reference, fast):
        token = twin.sample(
            logits, array(0.9, 0.9), array(0, 1), jnp.asarray([0, 1]), jnp.ones(2), jnp.zeros(2)
        )
        assert token.tolist() == [1, 1]
        assert twin.sample_temperature(logits[:1], array(0.9), array(0)).tolist() == [1]
    assert sampling.greedy(logits).tolist() == [1, 1]


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("vocab", [4000, 4096])
def test_devices_with_a_part_of_the_logits_draw_what_whole_rows_give(num_devices, vocab):
    rows = 200
    logits = 3 * jax.random.normal(jax.random.key(1), (rows, vocab))
    # Largest ones that are equal, on one device and on several; all on one device; near both ends.
    logits = logits.at[0, 3000].set(50.0).at[0, 17].set(50.0).at[1, 3001:3004].set(50.0)
    logits = logits.at[2].set(-jnp.inf).at[2, 2001].set(0.0).at[2, 3999].set(-1.0)
    uniform = (
        sampling.uniform(jnp.arange(rows), jnp.arange(rows)).at[2:5].set(array(1 - 2**-24, 0, 1 - 2**-24))
    )
    temperature = jnp.where(jnp.arange(rows) % 3 < 2, 0.0, 0.8).at[2:5].set(1.0)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("tp",))
    spec = PartitionSpec(None, "tp")

    def on_device(logits_RU):
        group = sampling.Group(
            jax.lax.axis_index("tp"), functools.partial(jax.lax.all_gather, axis_name="tp")
        )
        return sampling.sample_temperature_split(logits_RU, uniform, temperature, group)[None]

    got = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("tp")))(logits)
    want = sampling.sample_temperature(logits, uniform, temperature).tolist()
    assert want[:3] == [17, 3001, 3999]
    for tokens in got.tolist():
        assert tokens == want


def test_filters_left_out_are_filters_that_keep_all():
    logits = jax.random.normal(jax.random.key(0), (4, 777))
    uniform, ones = sampling.uniform(jnp.arange(4), jnp.arange(4)), jnp.ones(4)
    off = (jnp.zeros(4, jnp.int32), ones, jnp.zeros(4))
    want = sampling.sample(logits, uniform, ones, *off).tolist()
    assert sampling.sample(logits, uniform, ones).tolist() == want
    assert sampling.sample_temperature(logits, uniform, ones).tolist() == want


def test_a_random_number_depends_on_seed_and_position_alone():
    alone = [
        float(sampling.uniform(jnp.asarray([s]), jnp.asarray([p]))[0]) for s, p in ((3, 10), (3, 11), (4, 10))
    ]
    crowd = sampling.uniform(jnp.asarray([9, 4, 3, 3, 1]), jnp.asarray([10, 10, 11, 10, 2]))
    assert alone == [float(crowd[i]) for i in (3, 2, 1)]
    assert len(set(alone)) == 3
    assert min(alone) >= 0 and max(alone) < 1


def test_every_bit_of_the_seed_counts():
    seeds = jnp.asarray([0, 1, -1, 2**31 - 1, -(2**31)], jnp.int32)
    numbers = np.asarray(sampling.uniform(seeds, jnp.zeros(5, jnp.int32)))
    assert len(set(numbers.tolist())) == 5
    unsigned = jnp.asarray(np.asarray(seeds).view(np.uint32))
    np.testing.assert_array_equal(sampling.uniform(unsigned, jnp.zeros(5, jnp.int32)), numbers)


def test_random_numbers_of_neighbouring_seeds_and_positions_are_uniform():
    seed, position = (jnp.asarray(x).ravel() for x in np.mgrid[0:100, 0:100])
    counts = np.histogram(np.asarray(sampling.uniform(seed, position)), bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 0.1 % with 19 degrees of freedom; seeds fixed


def test_a_rows_token_does_not_depend_on_the_rows_beside_it():
    logits = jax.random.normal(jax.random.key(3), (6, 900)) * 2
    seed, position = jnp.arange(6), jnp.arange(6) * 5
    filters = (
        array(1, 0.5, 2, 1, 0, 1),
        jnp.asarray([0, 5, 50, 0, 0, 9]),
        array(0.9, 1, 0.8, 1, 1, 0.5),
        jnp.zeros(6),
    )
    uniform = sampling.uniform(seed, position)
    sample = jax.jit(sampling.sample)
    crowd = sample(logits, uniform, *filters)
    for order in ([4, 2, 0], [5], [3, 1]):
        rows = jnp.asarray(order)
        part = sample(logits[rows], uniform[rows], *(f[rows] for f in filters))
        assert part.tolist() == crowd[rows].tolist()


@pytest.mark.parametrize("V", [1024, 1000])
def test_a_vocabulary_sharded_over_devices_gives_the_same_tokens(V):
    devices = jax.devices()
    assert len(devices) >= 2, "tests/conftest.py makes eight"
    logits = jax.random.normal(jax.random.key(3), (6, V)) * 2
    filters = (
        array(1, 0.5, 2, 1, 0, 1),
        jnp.asarray([0, 5, 50, 0, 0, 9]),
        array(0.9, 1, 0.8, 1, 1, 0.5),
        jnp.zeros(6),
    )
    uniform = sampling.uniform(jnp.arange(6), jnp.arange(6))
    want = jax.jit(sampling.sample)(logits, uniform, *filters)
    mesh = Mesh(np.asarray(devices[:2]), ("tp",))
    sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, "tp")))
    assert jax.jit(sampling.sample)(sharded, uniform, *filters).tolist() == want.tolist()
    assert jax.jit(sampling.greedy)(sharded).tolist() == sampling.greedy(logits).tolist()
    for got, expected in zip(sampling.top_logprobs(sharded, 5), sampling.top_logprobs(logits, 5)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_penalties_follow_their_formulas():
    logits = array(2, -2, 1, 3)[None]
    counts = jnp.asarray([[2, 0, 1, 0]], jnp.int32)
    in_prompt = jnp.asarray([[False, True, False, False]])
    got = sampling.penalize(logits, counts, in_prompt, array(0.5), array(0.25), array(2))
    # 2/2 - 2*0.5 - 0.25, -2*2, 1/2 - 0.5 - 0.25, untouched
    assert got.tolist() == [[-0.25, -4.0, -0.25, 3.0]]


def test_neutral_penalties_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (2, 50))
    counts = jnp.ones((2, 50), jnp.int32)
    zero = jnp.zeros(2)
    got = sampling.penalize(logits, counts, counts > 0, zero, zero, jnp.ones(2))
    np.testing.assert_array_equal(got, logits)


def test_logprobs_are_those_of_the_softmax():
    logits = array(*np.log([0.1, 0.4, 0.2, 0.3]))[None] + 5
    values, ids = sampling.top_logprobs(logits, 3)
    assert ids.tolist() == [[1, 3, 2]]
    np.testing.assert_allclose(np.exp(values), [[0.4, 0.3, 0.2]], rtol=1e-5)


def test_top_logprobs_puts_the_lower_id_first_among_equals():
    values, ids = sampling.top_logprobs(array(1, 7, 7, 7, 0)[None], 2)
    assert ids.tolist() == [[1, 2]]
    assert values[0, 0] == values[0, 1]


# ---- the GPU's kernels, in interpret mode ----


def filtered_rows(V):
    """Rows whose thresholds lie among the candidates, beyond them, among many ties, or nowhere."""
    logits = 2.5 * jax.random.normal(jax.random.key(V), (10, V))
    logits = logits.at[4].set(jnp.round(logits[4])).at[5].set(jnp.round(logits[5] * 100) / 100)
    logits = logits.at[8].multiply(4).at[9].set(0.5)
    temperature = array(1, 0.7, 1.3, 1, 1, 1, 2, 1, 1, 1)
    top_k = jnp.asarray([0, 50, V, 1000, 20, -1, 7, 0, 0, 3])
    top_p = array(0.9, 0.95, 0.5, 0.99, 0.8, 0.7, 0.3, 0.999, 0.9, 0.5)
    min_p = array(0, 0.02, 0, 0.1, 0, 0.05, 0, 0, 0, 0)
    return logits, temperature, top_k, top_p, min_p


@pytest.mark.parametrize("V", [999, 40000, 50001])
def test_search_among_candidates_keeps_what_the_sort_keeps(V):
    arguments = filtered_rows(V)
    want = np.asarray(sorted_kept(*arguments))
    with backend.use("interpret"):
        got = np.asarray(jax.jit(lambda *a: fast.kept(*a))(*arguments))
    # A nucleus of thousands may end one token apart: its sum is rounded in another order.
    assert ((got != want).sum(1) <= want.sum(1) // 5000).all()


def test_every_logit_above_the_bound_is_in_a_picked_chunk():
    logits = jnp.round(2.5 * jax.random.normal(jax.random.key(1), (3, 9600)) * 8) / 8
    chunk, bound = jax.jit(functools.partial(candidates.pick_chunks, num_chunks=64, interpret=True))(logits)
    for row in range(3):
        above = np.flatnonzero(np.asarray(fast.ordered(logits[row])) > int(bound[row]))
        assert set(above // candidates.CHUNK) <= set(np.asarray(chunk[row]).tolist())
        assert len(above) >= 32
        assert (np.diff(chunk[row]) > 0).all()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_logprobs_from_candidates_are_those_of_the_whole_row(k):
    logits = jnp.round(2.5 * jax.random.normal(jax.random.key(2), (3, 9611)) * 4) / 4  # many ties
    with backend.use("interpret"):
        values, ids = jax.jit(functools.partial(sampling.top_logprobs, k=k))(logits)
    want_values, want_ids = reference.top_logprobs(logits, k)
    assert ids.tolist() == want_ids.tolist()
    np.testing.assert_allclose(values, want_values, rtol=0, atol=1e-5)


def test_kernels_lower_to_cuda_without_a_gpu():
    arguments = [jax.ShapeDtypeStruct((4, 128256), jnp.float32)]
    arguments += [
        jax.ShapeDtypeStruct((4,), t) for t in ("float32", "float32", "int32", "float32", "float32")
    ]
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        lowered = jax.jit(lambda *a: fast.sample(*a)).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 2
