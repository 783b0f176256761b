"""tools.bench_ops: rows of products and of float8 pools run, and count their bytes and operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.mesh import AXES
from jaxserve.parallel.links import LinkPlan
from tests.ops.test_gated_product import by_definition
from tools import bench_exchange, bench_ops, bench_products
from tools.bench_products import ExpertSizes, LayerSizes
from tools.bench_timing import Card

CARD = Card("a card", bytes_per_s=1e9, flops_per_s=1e12, fp8_flops_per_s=2e12)


def test_floor_is_bytes_or_operations_at_the_rate_of_their_kind():
    assert CARD.floor_s(2e9) == 2
    assert CARD.floor_s(1e9, 4e12) == 4
    assert CARD.floor_s(1e9, 4e12, fp8=True) == 2


def test_layer_in_8_bits_has_half_the_bytes_and_scales():
    sizes = LayerSizes(D=32, F=48, QKV=64)
    rows = [bench_products.bench_layer(CARD, way, 16, sizes, False, 2) for way in ("bf16", "fp8 W8A8")]
    count = 64 * 32 + 32 * 32 + 96 * 32 + 32 * 48
    scales = 4 * (64 + 32 + 96 + 32)
    assert [row.floor_us for row in rows] == pytest.approx([2 * count / 1e3, (count + scales) / 1e3])


def test_products_of_every_way_agree():
    wide = bench_products.random(0, (24, 32))
    x = bench_products.random(1, (16, 32))
    want = np.asarray(bench_products.product_of("bf16")(x, wide), np.float32)
    for way in bench_products.WAYS[1:]:
        weights = bench_products.in_8_bits(wide, "int8" if way.startswith("int8") else "fp8", 1)
        got = np.asarray(bench_products.product_of(way)(x, weights), np.float32)
        assert np.sqrt(np.mean((got - want) ** 2)) < 0.06 * np.sqrt(np.mean(want**2)), way


def test_rows_in_float8_count_what_is_read_and_written():
    rows = bench_products.operand_rows(CARD, LayerSizes(D=32, F=48), (4,))
    norm, gate = 4 * 32 * 2 + 32 * 4 + 4 * (32 + 4), 4 * 96 * 2 + 96 * 4 + 4 * 4 + 4 * (48 + 4)
    assert [row.floor_us for row in rows] == pytest.approx([norm / 1e3, gate / 1e3])


def test_gated_products_count_what_is_read_and_written():
    rows = bench_products.gated_rows(CARD, LayerSizes(D=32, F=48), (4,))
    wide, float8 = 96 * 32 * 2 + 2 * 4 * (32 + 48), 96 * 32 + 96 * 4 + 2 * 4 * (32 + 48)
    assert [row.floor_us for row in rows] == pytest.approx([wide / 1e3, float8 / 1e3])
    assert [row.shape for row in rows] == ["T4 bf16, XLA", "T4 fp8 W8A8, XLA"]


@pytest.mark.parametrize("way", ["bf16", "fp8 W8A8"])
def test_a_gated_product_is_given_to_the_kernel_as_to_xla(monkeypatch, way):
    monkeypatch.setattr(bench_products.gated_product, "multiply", by_definition)
    x, weight = bench_products.random(1, (16, 32)), bench_products.random(0, (96, 32))
    if way != "bf16":
        weight = bench_products.in_8_bits(weight, "fp8", 1)
    got, want = (bench_products.gated(way, x, weight, by_kernel) for by_kernel in (True, False))
    got, want = (np.asarray(y, np.float32) for y in (got, want))
    np.testing.assert_allclose(got, want, rtol=2**-5, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize(
    "scheme, sizes, scales",
    [
        ("int8", ExpertSizes(E=4, X=2, D=16, F=8), 8 + 8 + 16),
        ("fp8", ExpertSizes(E=4, X=2, D=16, F=8), 8 + 8 + 16),
        ("fp8 blocks", ExpertSizes(E=2, X=1, D=128, F=256), 3 * 2),
    ],
)
def test_experts_count_the_bytes_of_those_that_tokens_choose(scheme, sizes, scales):
    row = bench_products.bench_experts(CARD, scheme, 64, sizes, 2)
    numbers = 3 * sizes.D * sizes.F
    assert row.floor_us == pytest.approx(sizes.E * (numbers + 4 * scales) / 1e3)


def test_experts_in_four_bits_count_their_exponents_and_biases():
    sizes = ExpertSizes(E=2, X=1, D=64, F=128, biased=True)
    row = bench_products.bench_experts(CARD, "mxfp4", 64, sizes, 2)
    a_matrix = 64 * 128 // 2 + 64 * 128 // 32
    assert row.floor_us == pytest.approx(2 * (3 * a_matrix + 2 * (2 * 128 + 64)) / 1e3)
    assert bench_products.GPT_OSS_20B.biased and row.shape == "T64 E2 top-1 mxfp4"


def test_float8_pools_are_timed_as_such(monkeypatch):
    monkeypatch.setattr(bench_ops, "PAGE_SIZE", 16)
    pool = bench_ops.in_float8(bench_ops.make_pool(512, (bench_ops.G, bench_ops.K)))
    assert {x.dtype for x in pool} == {jnp.dtype(jnp.float8_e4m3fn)}
    row = bench_ops.bench_decode(pool, CARD, R=2, context=32, table_len=64)
    assert (row.name, row.floor_us) == ("decode fp8", 2 * 32 * 8 * 128 * 2 / 1e3)
    latents = bench_ops.make_pool(512, (32,), (16,))
    row = bench_ops.bench_latent(latents, CARD, R=2, context=32, heads=16)
    assert (row.name, row.floor_us) == ("latent", 2 * 32 * 48 * 2 / 1e3)
    assert jax.tree.map(jnp.shape, latents) == ((32, 16, 32), (32, 16, 16))


def test_sums_over_devices_run_one_after_the_other_and_count_what_is_sent(monkeypatch):
    assert bench_exchange.exchange_rows() == [], "CPUs do not write into each other's memory"
    of = classmethod(lambda cls, mesh: cls(tuple(mesh.shape[axis] for axis in AXES)))
    monkeypatch.setattr(LinkPlan, "of", of)
    rows = bench_exchange.exchange_rows((1, 512), width=256, iterations=2, link_bytes=1 << 10)
    num = len(jax.devices())
    assert [row.shape for row in rows] == [
        f"{count} rows of 256 over {num}, {way}" for count in (1, 512) for way in ("kernel", "XLA")
    ]
    one, _, many, _ = [row.floor_us for row in rows]
    assert many == pytest.approx(512 * one)


def test_sums_by_links_and_by_xla_are_the_same():
    mesh = bench_exchange.make_mesh(bench_exchange.Layout(4), jax.devices())
    plan = LinkPlan((1, 1, 4))
    arrays, _ = plan.make(mesh)
    made = []
    for by_xla in (False, True):
        call = bench_exchange.chain(mesh, plan, arrays, (8, 256), 3, by_xla)
        x, arrays = call(arrays)
        made.append(np.asarray(x, np.float32))
    np.testing.assert_array_equal(*made)
    assert [int(number) for number in arrays.number] == [1 + 3]
