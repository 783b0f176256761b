"""The kernels around attention on a GPU: the cases of tests/ops, compiled instead of interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import backend, routing
from jaxserve.ops.grouped_gemm import rows, rows_fast
from tests.ops import test_block_product as blocks
from tests.ops import test_float8_rows as float8
from tests.ops import test_gated_product as gated
from tests.ops import test_grouped_gemm as experts
from tests.ops import test_hopper_experts as hopper_experts
from tests.ops import test_int4 as int4
from tests.ops import test_kv_write as kv
from tests.ops import test_latent_write as latent
from tests.ops import test_mla_attention as mla
from tests.ops.test_routing import RULES

LARGE = (
    experts.Case(T=600, X=6, E=16, D=512, F=320, dtype="bfloat16"),
    experts.Case(T=130, X=1, E=2, D=1024, F=704, dtype="bfloat16", padding=0.0),
)

LARGE_PACKED = tuple(
    experts.Case(T=T, X=4, E=8, D=768, F=768, dtype="bfloat16", is_mxfp4=True, biases=True, activation=gate)
    for T, gate in ((1, experts.clamped), (16, experts.silu), (60, experts.clamped), (600, experts.clamped))
)

LARGE_INT4 = (
    experts.Case(T=60, X=4, E=8, D=768, F=768, dtype="bfloat16", int4_group=128),
    experts.Case(T=600, X=4, E=8, D=768, F=768, dtype="bfloat16", int4_group=64),
    experts.Case(T=200, X=4, E=8, D=640, F=576, dtype="bfloat16", int4_group=32),  # pieces of 160 and 192
)

LARGE_FLOAT8 = (
    hopper_experts.Float8Case(T=600, X=6, E=16, D=512, F=384),
    hopper_experts.Float8Case(T=9, X=2, E=20, D=1024, F=768, padding=0.0),
    hopper_experts.Float8Case(T=600, X=6, E=16, D=512, F=320, block=None),
    hopper_experts.Float8Case(T=130, X=1, E=2, D=1024, F=704, block=None, padding=0.0),
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("case", (*kv.CASES, *latent.CASES), ids=str)
def test_rotation_and_write_equal_the_reference(case):
    for got, want in zip(case.run("fast"), case.run("reference"), strict=True):
        atol = kv.ROUNDING[str(got.dtype)]
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), atol=atol)


@pytest.mark.parametrize("interleaved", [True, False])
def test_latents_are_normalized_turned_and_land_where_they_belong(interleaved):
    latent.check_against_the_formulas(latent.Case(interleaved=interleaved), "fast")


def test_float8_pool_of_latents_cuts_what_is_beyond_448():
    latent.check_cut("fast")


def test_latent_pools_are_written_in_place():
    """As below: donated pools of 2.2 GB."""
    case = latent.Case(T=8, H=16, N=128, K=64, L=512, dtype="bfloat16", pool_dtype="bfloat16")
    function, (columns, page_offset, weight, rotation, _, _, *places) = case.traced()
    pools = [jax.ShapeDtypeStruct((131072, 16, size), jnp.bfloat16) for size in (512, 64)]
    donating = jax.jit(
        lambda pools, columns, *rest: function(columns, *rest[:3], *pools, *rest[3:]), donate_argnums=0
    )
    compiled = donating.lower(pools, columns, page_offset, weight, rotation, *places).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20


def test_pool_is_written_in_place():
    """A donated pool of 4 GB: a copy of it would not go unnoticed."""
    case = kv.Case(T=8, H=32, G=8, K=128, turned=128, dtype="bfloat16", pool_dtype="bfloat16")
    function, arguments = case.traced()
    shape = (131072, 16, 8, 128)
    pools = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 2
    heads, rotation, _, _, *places = arguments
    donating = jax.jit(lambda pools, *rest: function(rest[0], rest[1], *pools, *rest[2:]), donate_argnums=0)
    memory = donating.lower(pools, heads, rotation, *places).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_experts_are_chosen_as_the_reference_does(rule):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(300, rule.num_experts)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=rule.num_experts), jnp.float32) if rule.score == "sigmoid" else None
    slot = jnp.asarray(rng.integers(-1, 3, 300), jnp.int32)
    expert, weight = jax.jit(functools.partial(routing.fast.choose, rule))(logits, bias, slot)
    want_expert, want_weight = jax.jit(functools.partial(routing.reference.choose, rule))(logits, bias, slot)
    # Scores of two experts may differ by less than the two exponentials do.
    same = np.asarray(expert == want_expert).all(axis=1)
    assert same.mean() > 0.98
    np.testing.assert_allclose(np.asarray(weight)[same], np.asarray(want_weight)[same], rtol=1e-5)


@pytest.mark.parametrize("M, E, block_rows", [(1, 4, 16), (48, 64, 16), (1536, 64, 32), (18432, 128, 128)])
def test_rows_are_grouped_as_the_reference_does(M, E, block_rows):
    expert_TX = jnp.asarray(np.random.default_rng(M).integers(-1, E, (M, 1)), jnp.int32)
    arguments = {"num_experts": E, "block_rows": block_rows}
    got = jax.jit(functools.partial(rows_fast.group, **arguments))(expert_TX)
    want = jax.jit(functools.partial(rows.group, **arguments))(expert_TX)
    experts.check_same_groups(got, want, num_rows=int((expert_TX >= 0).sum()))


@pytest.mark.parametrize("case", (*experts.KERNEL_CASES, *experts.FEW_TOKENS), ids=str)
def test_experts_equal_the_dense_sum(case):
    experts.check(case, "fast")


@pytest.mark.parametrize("case", (*hopper_experts.CASES, *LARGE), ids=str)
def test_experts_for_hopper_equal_the_dense_sum(case):
    for tiles in (None, *hopper_experts.TILES):
        hopper_experts.check(case, tiles=tiles)


@pytest.mark.parametrize("case", (*hopper_experts.PACKED_CASES, *LARGE_PACKED, *LARGE_INT4), ids=str)
def test_packed_experts_for_hopper_equal_the_dense_sum(case):
    hopper_experts.check(case)


@pytest.mark.parametrize("tile", hopper_experts.PACKED_RINGS, ids=str)
def test_a_ring_of_packed_tiles_goes_round(tile):
    hopper_experts.check(hopper_experts.PACKED_RING_CASE, tiles=(tile, tile))


@pytest.mark.parametrize("T, sizes, cut, dtype", int4.CUTS, ids=str)
def test_rows_meet_codes(T, sizes, cut, dtype):
    int4.check(T, sizes, cut, dtype)


@pytest.mark.parametrize("T", [1, 33, 64, 100, 256, 600, 1500])
def test_rows_meet_codes_as_cuts_are_chosen(T):
    for sizes in ((384, 1024, 128), (4096, 512, 32)):
        int4.check(T, sizes, int4.int4_product.choose_cut(T, sizes[1], sizes[0] // 64), "float16")


@pytest.mark.parametrize("case", (*hopper_experts.FLOAT8_CASES, *LARGE_FLOAT8), ids=str)
def test_float8_experts_for_hopper_equal_the_dense_sum(case):
    case.check()


@pytest.mark.parametrize("case", (*blocks.CASES, *blocks.LARGE), ids=str)
def test_products_with_scales_for_blocks(case):
    case.check()


@pytest.mark.parametrize("case", [blocks.Case(T=1, N=5120, K=2048), blocks.Case(T=8, N=200, K=7168)], ids=str)
def test_few_rows_by_scaled_blocks_are_multiplied_as_they_are(case):
    with backend.use("fast"):
        product = functools.partial(blocks.block_product.project, out_dtype=case.dtype)
        got = np.asarray(jax.jit(product)(*case.arguments()), np.float64)
    np.testing.assert_allclose(got, case.expected(in_float8_too=False), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("case", (*gated.CASES, *gated.LARGE), ids=str)
def test_a_gated_product_for_hopper_equals_the_two_products(case):
    for programs in (1, 132):
        case.check(programs=programs)


@pytest.mark.parametrize("latents", mla.CASES, ids=str)
def test_latent_attention_equals_a_dense_softmax(latents):
    atol = latents.tolerance()
    with backend.use("fast"):
        decoded, prefilled = mla.run_decode(latents, "fast"), mla.run_prefill(latents, "fast")
    np.testing.assert_allclose(decoded, mla.expected_decode(latents), rtol=0, atol=atol)
    np.testing.assert_allclose(prefilled, mla.expected_prefill(latents), rtol=0, atol=atol)


@pytest.mark.parametrize("case", float8.CASES, ids=str)
def test_rows_in_float8_equal_the_reference(case):
    float8.check(case.run("fast"), case.expected(), case)
