"""Norm, feed-forward, vocabulary and products against plain numpy."""

import math
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.layers.channel_quant import ChannelQuant, quantise_model
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.linear import Projections, project
from jaxserve.layers.mlp import Gated, GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import wide
from jaxserve.layers.quant import BlockFP8, BlockScaled
from jaxserve.mesh import GROUP, Layout, make_mesh
from jaxserve.ops import backend, block_product, gated_product
from tests.ops.test_gated_product import by_definition

rng = np.random.default_rng(0)
EXACT = 2e-6  # float32 rounding of sums of a few terms of size one


def filled(module: nnx.Module) -> nnx.Module:
    for _, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        want = param.get_value()
        param.set_value(jnp.asarray(rng.normal(size=want.shape), want.dtype))
    return module


def test_norm_with_offset_one_scales_by_one_plus_weight():
    norm = filled(RMSNorm("n", 8, eps=1e-6, offset=1.0, dtype=jnp.float32))
    x = rng.normal(size=(3, 8)).astype(np.float32)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + np.asarray(norm.weight[...]))
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, atol=EXACT)


def test_norm_of_bfloat16_is_rounded_once_at_the_end():
    norm = filled(RMSNorm("n", 8, eps=1e-6, dtype=jnp.bfloat16))
    x = jnp.asarray(rng.normal(size=(5, 8)), jnp.bfloat16)
    full = np.asarray(x, np.float32)
    want = full / np.sqrt((full**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.weight[...], np.float32)
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(got, np.float32), want, rtol=2**-8
    )  # half a bfloat16 step and a bit


def test_product_with_head_weights_contracts_every_input_dimension():
    weight = nnx.Param(jnp.asarray(rng.normal(size=(6, 2, 4)), jnp.float32))
    bias = nnx.Param(jnp.asarray(rng.normal(size=(6,)), jnp.float32))
    x_THK = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    want = np.einsum("thk,dhk->td", x_THK, weight[...]) + np.asarray(bias[...])
    np.testing.assert_allclose(project(x_THK, weight, bias), want, atol=EXACT)


def test_product_keeps_heads_apart_in_its_result():
    weight = nnx.Param(jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32))
    x_TD = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    np.testing.assert_allclose(project(x_TD, weight), np.einsum("td,hkd->thk", x_TD, weight[...]), atol=EXACT)


def test_mlp_gates_with_silu_and_adds_its_biases():
    mlp = filled(GatedMLP("m", 4, 6, activation="silu", bias=True, dtype=jnp.float32))
    x = rng.normal(size=(3, 4)).astype(np.float32)
    (gate_w, up_w), (gate_b, up_b) = mlp.gate_up.weights, mlp.gate_up.biases
    gate = x @ gate_w[...].T + gate_b[...]
    up = x @ up_w[...].T + up_b[...]
    want = (gate / (1 + np.exp(-gate)) * up) @ mlp.down[...].T + mlp.down_bias[...]
    np.testing.assert_allclose(mlp(jnp.asarray(x)), want, atol=1e-5)


def test_fused_projections_give_what_the_separate_ones_gave():
    weights = [
        nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32)) for shape in ((4, 3, 6), (2, 3, 6))
    ]
    biases = [nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32)) for shape in ((4, 3), (2, 3))]
    projections = Projections(weights, biases)
    x_TD = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    separate = projections(x_TD)
    projections.fuse()
    assert len(projections.weights) == 1
    for got, want in zip(projections(x_TD), separate, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=EXACT)


@pytest.mark.parametrize("dp, split", [(1, True), (4, False), (2, True)])
def test_projections_fused_over_a_mesh_give_what_the_separate_ones_gave(dp, split):
    mesh = make_mesh(Layout(4, dp=dp), jax.devices())
    spec, rank = PartitionSpec(GROUP if split else None), PartitionSpec("dp")

    def put(shape, spec):
        value = jnp.asarray(rng.normal(size=shape), jnp.float32)
        return jax.device_put(value, NamedSharding(mesh, spec))

    shapes = ((8, 3), (4, 3), (4, 3))
    weights = [nnx.Param(put((*shape, 6), spec)) for shape in shapes]
    biases = [nnx.Param(put(shape, spec)) for shape in shapes]
    projections = Projections(weights, biases)
    x_TD = put((8, 6), rank)
    separate = projections(x_TD)
    projections.fuse(mesh)
    assert len(projections.weights) == 1 and projections.ways == (4 // dp if split else 1)
    (joined,) = projections.weights
    assert joined.get_value().addressable_shards[0].data.shape == (48 // projections.ways, 6)
    compiled = jax.jit(lambda x: (projections(x), projections.heads(x))).lower(x_TD).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|permute", compiled.as_text()), "nothing travels"
    for got, want in zip(projections(x_TD), separate, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=EXACT)
    for heads, want in zip(projections.heads(x_TD), separate, strict=True):
        np.testing.assert_allclose(heads.value_THK, want, atol=EXACT)


def test_projections_of_which_a_mesh_splits_some_stay_apart():
    mesh = make_mesh(Layout(4), jax.devices())
    specs = PartitionSpec(GROUP), PartitionSpec()
    weights = [nnx.Param(jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, spec))) for spec in specs]
    projections = Projections(weights)
    projections.fuse(mesh)
    assert not projections.fused and len(projections.weights) == 2


def block_scaled(
    shape: tuple[int, ...], block: int, *, num_in: int = 1, is_alone: bool = False
) -> BlockScaled:
    """A weight [*out, *in] with a scale for each `block` x `block`; products of size 1."""
    sizes = math.prod(shape[:-num_in]), math.prod(shape[-num_in:])
    scale = rng.uniform(0.5, 2, [-(-size // block) for size in sizes]) * sizes[1] ** -0.5
    numbers = jnp.asarray(rng.normal(size=shape), jnp.float8_e4m3fn)
    scale = nnx.Param(jnp.asarray(scale, jnp.float32))
    return BlockScaled(nnx.Param(numbers), scale, BlockFP8(block, block), is_alone=is_alone)


@pytest.mark.parametrize(
    "shapes, on_a_mesh, are_joined",
    [
        (((4, 4, 16), (2, 4, 16), (3, 4, 16)), False, True),  # the last block alone is cut
        (((3, 4, 16), (2, 4, 16)), False, False),
        (((4, 4, 16), (2, 4, 16)), True, False),
    ],
)
def test_weights_with_scales_for_blocks_are_joined_where_blocks_stay_whole(shapes, on_a_mesh, are_joined):
    projections = Projections([block_scaled(shape, 8) for shape in shapes])
    x_TD = jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
    separate = projections(x_TD)
    projections.fuse(make_mesh(Layout(4), jax.devices()) if on_a_mesh else None)
    assert projections.fused == are_joined
    for got, want in zip(projections(x_TD), separate, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=EXACT)


@pytest.mark.parametrize("rows", [8, 64], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize(
    "shape, spec, split",
    [
        ((4, 128, 256), (GROUP,), "outputs"),
        ((128, 4, 128), (None, GROUP), "inputs"),
        ((256, 256), (), "nothing"),
        ((4, 64, 256), (GROUP,), "blocks"),
        ((128, 4, 64), (None, GROUP), "blocks"),
    ],
)
def test_each_device_of_a_mesh_multiplies_its_blocks(shape, spec, split, dp, rows):
    mesh = make_mesh(Layout(4, dp=dp), jax.devices())
    num_in = 2 if spec[:1] == (None,) else 1
    weight, in_size = block_scaled(shape, 128, num_in=num_in), math.prod(shape[-num_in:])
    x = jax.random.normal(jax.random.key(rows), (rows, in_size), jnp.bfloat16)
    want = np.asarray(weight.product(x, jnp.bfloat16), np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    weight.numbers.set_raw_value(jax.device_put(weight.numbers.get_value(), sharding))
    weight.place(sharding)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("dp")))
    assert (weight.split(in_size) is None) == (split == "blocks" and dp == 1)
    with backend.use("fast"):
        got = np.asarray(jax.jit(lambda x: weight.product(x, jnp.bfloat16))(x), np.float32)
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("rows, by_kernel", [(20, True), (8, False)])
def test_weights_with_scales_for_blocks_meet_float8_rows_in_a_kernel(monkeypatch, rows, by_kernel):
    mlp = GatedMLP("m", 128, 256, activation="silu", dtype=jnp.bfloat16)
    mlp.gate_up = Projections([block_scaled((256, 128), 128) for _ in range(2)])
    mlp.down = block_scaled((128, 256), 128, is_alone=True)
    x = jnp.asarray(rng.normal(size=(rows, 128)), jnp.bfloat16)
    want, calls, kernel = np.asarray(wide(mlp(x)), np.float32), [], block_product.by_hopper

    def interpreted(*args, **options):
        calls.append(options.get("num_matrices", 1))
        return kernel(*args, **options, interpret=plgpu.InterpretGPUParams())

    monkeypatch.setattr(block_product, "is_supported", lambda: True)
    monkeypatch.setattr(block_product, "by_hopper", interpreted)
    mlp.gate_up.fuse()
    with backend.use("fast"):
        got = np.asarray(wide(mlp(x)), np.float32)
    assert calls == ([2, 1] if by_kernel else []), "gate and up in one, down"
    assert np.sqrt(np.mean((got - want) ** 2)) < (0.05 if by_kernel else 0.01) * want.std()


def test_mlp_gates_with_the_tanh_form_of_gelu():
    mlp = filled(GatedMLP("m", 4, 6, activation="gelu_pytorch_tanh", dtype=jnp.float32))
    x = rng.normal(size=(3, 4)).astype(np.float32)
    gate_w, up_w = mlp.gate_up.weights
    gate = np.asarray(x @ gate_w[...].T)
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(mlp(jnp.asarray(x)), gelu * (x @ up_w[...].T) @ mlp.down[...].T, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows, by_kernel", [(128, True), (16, False)])
def test_gate_and_up_go_through_one_kernel_where_they_are_joined_and_rows_fill_it(
    monkeypatch, fused, rows, by_kernel
):
    mlp = filled(GatedMLP("m", 64, 14336, activation="silu", dtype=jnp.bfloat16))
    x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.bfloat16)
    want = np.asarray(mlp(x), np.float32)
    calls, kernel = [], gated_product.hopper.multiply

    def interpreted(*args, **options):
        calls.append(options)
        return kernel(*args, **options, programs=2, interpret=plgpu.InterpretGPUParams())

    monkeypatch.setattr(gated_product, "is_supported", lambda min_sms: True)
    monkeypatch.setattr(gated_product.hopper, "multiply", interpreted)
    if fused:
        mlp.gate_up.fuse()
    with backend.use("fast"):
        got = np.asarray(mlp(x), np.float32)
    assert bool(calls) == (fused and by_kernel)
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize("in_float8", [False, True], ids=["bfloat16", "float8"])
@pytest.mark.parametrize("dp, split", [(1, True), (2, True), (2, False)])
def test_each_device_of_a_mesh_gates_what_it_has_joined(monkeypatch, dp, split, in_float8):
    """By a kernel that sees a device's rows, and its part of gate above its part of up."""
    mesh = make_mesh(Layout(4, dp=dp), jax.devices())
    step: Any = SimpleNamespace(mesh=mesh, num_ranks=dp, links=None, once=lambda key, make: jax.jit(make()))
    mlp = GatedMLP("m", 16, 48, activation="silu", dtype=jnp.bfloat16)
    if in_float8:
        quantise_model(mlp, ChannelQuant("fp8"))
    for path, param in nnx.to_flat_state(nnx.state(mlp, nnx.Param)):
        spec = PartitionSpec(GROUP) if split and "down" not in path else PartitionSpec()
        value = jnp.asarray(rng.uniform(-1, 1, param.get_value().shape), param.get_value().dtype)
        param.set_raw_value(jax.device_put(value, NamedSharding(mesh, spec)))
    x = jax.device_put(
        jnp.asarray(rng.normal(size=(32, 16)), jnp.bfloat16), NamedSharding(mesh, PartitionSpec("dp"))
    )
    mlp.gate_up.fuse(mesh)
    want, seen = np.asarray(Gated(x, mlp.gate_up, "silu", step).wide, np.float32), []

    def kernel(x_TK, weight_WK, scales, activation, dtype):
        seen.append((x_TK.shape, weight_WK.shape))
        return by_definition(x_TK, weight_WK, scales, activation, dtype)

    monkeypatch.setattr(gated_product, "fits", lambda rows, weight: (rows, weight.shape) == seen_by_a_device)
    monkeypatch.setattr(gated_product, "multiply", kernel)
    seen_by_a_device = (32 // dp, (96 // mlp.gate_up.ways, 16))
    got = np.asarray(Gated(x, mlp.gate_up, "silu", step).wide, np.float32)
    assert seen == [((32 // dp, 16), (96 // mlp.gate_up.ways, 16))]
    np.testing.assert_allclose(got, want, rtol=2**-5, atol=2**-7 * np.abs(want).max())


def test_tied_vocabulary_declares_one_matrix_and_uses_it_at_both_ends():
    vocabulary = filled(Vocabulary("model.", 5, 4, tied=True, dtype=jnp.float32))
    (only,) = nnx.to_flat_state(nnx.state(vocabulary, nnx.Param)).leaves
    assert only.sources == ("model.embed_tokens.weight",)
    hidden_TD = vocabulary.embed(jnp.array([3, 1]))
    np.testing.assert_array_equal(hidden_TD, only[...][np.array([3, 1])])
    np.testing.assert_allclose(vocabulary.logits(hidden_TD), hidden_TD @ only[...].T, atol=EXACT)


def test_embedding_scale_is_rounded_to_the_model_dtype_before_it_multiplies():
    vocabulary = filled(Vocabulary("model.", 5, 4, tied=True, scale=50.596, dtype=jnp.bfloat16))
    got = np.asarray(vocabulary.embed(jnp.array([2])), np.float32)
    want = jnp.asarray(vocabulary.embedding[...][2:3], jnp.float32) * 50.5  # bfloat16 of 50.596
    np.testing.assert_array_equal(got, np.asarray(want.astype(jnp.bfloat16), np.float32))


def test_softcapped_logits_are_float32_and_below_the_cap():
    vocabulary = filled(Vocabulary("", 50, 4, tied=True, softcap=2.0, dtype=jnp.bfloat16))
    hidden_RD = jnp.asarray(rng.normal(size=(3, 4)) * 3, jnp.bfloat16)
    logits_RV = vocabulary.logits(hidden_RD)
    plain = np.asarray(hidden_RD, np.float32) @ np.asarray(vocabulary.embedding[...], np.float32).T
    assert logits_RV.dtype == jnp.float32
    np.testing.assert_allclose(logits_RV, 2 * np.tanh(plain / 2), atol=EXACT)
