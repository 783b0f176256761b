"""Weights in 8 bits with a scale a channel: made at load or stored, against a dense file of the same."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.layers.attention import Attention
from jaxserve.layers.block import PreNormBlock
from jaxserve.layers.channel_quant import (
    ChannelQuant,
    ChannelScaled,
    quantise,
    quantise_model,
    read_stored,
)
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import Product, add, wide
from jaxserve.layers.rope import Rope
from jaxserve.layers.step_context import QueryBlocks, StepContext
from jaxserve.ops import backend
from jaxserve.ops.float8_rows import Scaled
from jaxserve.ops.quantized_gemm import W8A8_MIN_ROWS
from jaxserve.weights import CheckpointError, load, open_checkpoint
from tests.models.tiny import GOLDEN, Golden, read_config, read_tensors
from tests.ops.cases import H100
from tools import convert_checkpoint

CASES = (
    ("llama", "fp8"),
    ("llama", "int8"),
    ("qwen3_moe", "fp8"),
    ("deepseek_v3", "int8"),
    ("gpt_oss", "fp8"),  # experts with biases
    ("minimax_text", "fp8"),  # gates and joint projections of lightning attention
)
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
# What stays as it is: vocabulary, norms, biases, routers, and the up-projections of latent attention.
PLAIN = re.compile(r"embed_tokens|lm_head|norm|bias|\.gate\.|router|kv_b_proj|sinks|shared_expert_gate")


def by_channel(tensor, scheme, inner):
    """(numbers, scales) in numpy, the channel's inputs along axis `inner`."""
    kind, largest = (ml_dtypes.float8_e4m3fn, 448) if scheme == "fp8" else (np.int8, 127)
    scale = np.abs(tensor).max(axis=inner, keepdims=True).astype(np.float32) / np.float32(largest)
    ratio = np.clip(tensor / scale, -largest, largest)
    return (np.rint(ratio) if scheme == "int8" else ratio).astype(kind), scale


def write(path, config, tensors):
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return str(path)


def dense_file(path, family, scheme):
    """A float32 checkpoint whose linear weights are what the 8 bits stand for."""
    tensors = {}
    for name, tensor in read_tensors(family).items():
        if not PLAIN.search(name):
            numbers, scale = by_channel(
                tensor, scheme, -2 if tensor.ndim == 3 else -1
            )  # GPT-OSS: [E, in, out]
            tensor = numbers.astype(np.float32) * scale
        tensors[name] = np.ascontiguousarray(tensor)
    return write(path, read_config(family), tensors)


def tokens(served, family):
    prompts = [prompt.tolist() for prompt in Golden.read(family).prompts]
    return [list(reply["output_ids"]) for reply in served.generate(input_ids=prompts, sampling_params=GREEDY)]


@pytest.mark.parametrize("family, scheme", CASES)
def test_quantised_engine_gives_the_tokens_of_the_dequantised_weights(family, scheme, engine, tmp_path):
    want = tokens(engine(dense_file(tmp_path, family, scheme)), family)
    assert want != tokens(engine(family), family)[: len(want)], "the test would not see unquantised weights"
    assert tokens(engine(family, quantization=scheme), family) == want


@pytest.mark.parametrize(
    "family, scheme, layout",
    [
        ("llama", "fp8", {"tp": 4, "dp_size": 2, "enable_dp_attention": True}),
        ("qwen3_moe", "fp8", {"tp": 2}),  # the FFN of every expert is split: scales of down are whole
        ("deepseek_v3", "int8", {"tp": 4, "dp_size": 2, "ep": 2, "enable_dp_attention": True}),
    ],
)
def test_meshes_give_the_tokens_of_one_device(engine, family, scheme, layout):
    one = tokens(engine(family, quantization=scheme), family)
    assert tokens(engine(family, quantization=scheme, **layout), family) == one


# ---- numbers ----


def weights(seed, shape=(6, 40)):
    rows = np.random.default_rng(seed).normal(size=shape) * np.geomspace(1e-3, 1e3, shape[0])[:, None]
    return rows.astype(np.float32)


def test_int8_is_off_by_half_a_scale_at_most():
    wide = weights(0)
    numbers, scale = quantise(jnp.asarray(wide), "int8", 1)
    assert numbers.dtype == jnp.int8 and scale.shape == (6,)
    error = np.abs(np.asarray(numbers, np.float32) * np.asarray(scale)[:, None] - wide)
    # 1e-6: the ratio itself is rounded to float32.
    assert (error <= np.asarray(scale)[:, None] * (0.5 + 1e-4)).all()


def test_float8_is_off_by_a_sixteenth_of_a_number_or_half_its_smallest_step():
    """Three bits of mantissa: numbers in [2**n, 2 * 2**n) lie 2**n / 8 apart; below 2**-6, 2**-9 apart."""
    wide = weights(1)
    numbers, scale = quantise(jnp.asarray(wide), "fp8", 1)
    scale = np.asarray(scale)[:, None]
    error = np.abs(np.asarray(numbers, np.float32) * scale - wide)
    assert (error <= np.maximum(np.abs(wide) / 16, scale * 2**-10) * (1 + 1e-5)).all()
    assert np.isfinite(np.asarray(numbers, np.float32)).all()


def test_channel_of_zeros_stays_zero():
    for scheme in ("fp8", "int8"):
        numbers, scale = quantise(jnp.zeros((2, 3)), scheme, 1)
        assert not np.asarray(numbers, np.float32).any() and not np.asarray(scale).any()


def test_heads_have_a_scale_a_channel_of_each_head():
    wide = weights(2, (12, 8)).reshape(4, 3, 8)
    _, scale = quantise(jnp.asarray(wide), "int8", 2)
    np.testing.assert_allclose(scale, np.abs(wide).max(-1) / 127, rtol=1e-6)


def product(x, numbers, scale):
    return ChannelScaled(nnx.Param(numbers), nnx.Param(scale)).product(x, x.dtype)


def test_few_rows_are_weight_only_and_many_meet_float8_activations():
    """Weight-only is exact but for bfloat16; W8A8 rounds each activation by 1/16 of it at most."""
    numbers, scale = quantise(jnp.asarray(weights(3, (32, 512)) / 1e3), "fp8", 1)
    dense = np.asarray(numbers, np.float32) * np.asarray(scale)[:, None]
    x = jnp.asarray(np.random.default_rng(4).normal(size=(W8A8_MIN_ROWS, 512)), jnp.bfloat16)

    def error(x):
        want = np.asarray(x, np.float32) @ dense.T
        got = np.asarray(product(x, numbers, scale), np.float32)
        return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))

    assert error(x[:-1]) < 2**-8  # two roundings to bfloat16 of 2**-9 relative each, at most
    assert 2**-8 < error(x) < 3**-0.5 / 16  # errors spread evenly up to 1/16 have that root mean square
    assert error(x.astype(jnp.float32)) < 1e-6


def test_row_of_huge_activations_changes_no_other_row():
    numbers, scale = quantise(jnp.asarray(weights(5, (8, 64))), "fp8", 1)
    x = np.random.default_rng(6).normal(size=(32, 64)).astype(np.float32)
    x[3] *= 1e6
    calm = x.copy()
    calm[3] = 0
    got, want = (product(jnp.asarray(rows, jnp.bfloat16), numbers, scale) for rows in (x, calm))
    others = np.arange(32) != 3
    np.testing.assert_array_equal(np.asarray(got)[others], np.asarray(want)[others])
    assert np.isfinite(np.asarray(got, np.float32)).all()


# ---- operands ----


def blocks(is_alone):
    """Two blocks of norms and gated layers in float8, and rows for them."""
    feeds = [mlp(is_alone) for _ in range(4)]
    layers = [
        PreNormBlock("block", *feeds[i : i + 2], hidden=64, eps=1e-5, dtype=jnp.bfloat16) for i in (0, 2)
    ]
    for block in layers:
        for norm in (block.attention_norm, block.feed_norm):
            norm.weight.set_raw_value(jnp.linspace(0.5, 2, 64, dtype=jnp.bfloat16))
    x = np.random.default_rng(9).normal(size=(W8A8_MIN_ROWS, 64))
    return jax.jit(lambda x: wide(layers[1](layers[0](x, None), None))), jnp.asarray(x, jnp.bfloat16)


def mlp(is_alone):
    feed = GatedMLP("mlp", 64, 48, activation="silu", dtype=jnp.bfloat16)
    quantise_model(feed, ChannelQuant("fp8"))
    for seed, layer in enumerate((*feed.gate_up.weights, feed.down)):
        normal = jnp.asarray(np.random.default_rng(seed).normal(size=layer.shape)) / 8
        numbers, scale = quantise(normal, "fp8", 1)
        layer.numbers.set_raw_value(numbers)
        layer.scale.set_raw_value(scale)
    if is_alone:
        feed.gate_up.fuse()
        feed.down.is_alone = True
    return feed


def feed_forward(is_alone):
    """A norm and a gated layer in float8, and rows for them."""
    norm, feed = RMSNorm("norm", 64, eps=1e-5, dtype=jnp.bfloat16), mlp(is_alone)
    norm.weight.set_raw_value(jnp.linspace(0.5, 2, 64, dtype=jnp.bfloat16))
    x = np.random.default_rng(9).normal(size=(W8A8_MIN_ROWS, 64))
    return jax.jit(lambda x: wide(feed(norm.operand(x)))), jnp.asarray(x, jnp.bfloat16)


def test_kernels_make_both_operands_of_a_feed_forward_layer_on_one_device():
    function, x = feed_forward(is_alone=True)
    with backend.use("interpret"):
        got = function(x)
    want = feed_forward(is_alone=False)[0](x)
    # An activation that falls to float8's other side differs by 1/8; errors of 48 sum at random.
    np.testing.assert_allclose(
        *(np.asarray(y, np.float32) for y in (got, want)), atol=0.02 * jnp.abs(want).max()
    )


def test_kernels_make_the_operands_and_sums_of_blocks_on_one_device():
    function, x = blocks(is_alone=True)
    with backend.use("interpret"):
        got = function(x)
    want = blocks(is_alone=False)[0](x)
    # An activation that falls to float8's other side differs by 1/8; such errors sum at random.
    got, want = (np.asarray(y, np.float32) for y in (got, want))
    np.testing.assert_allclose(got, want, atol=0.04 * np.abs(want).max())
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.006 * np.abs(want).max()


@pytest.mark.parametrize("is_alone, kernels", [(True, 8), (False, 0)])
def test_each_product_has_one_kernel_before_it_and_none_where_a_mesh_spreads_rows(is_alone, kernels):
    """It makes the sum with the product before, the norm, and float8 rows; or rows of what is gated."""
    function, x = blocks(is_alone)
    with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
        text = function.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"call @((?:add_and_normalise|normalise|quantise)\w*)\(", text)
    assert len(calls) == kernels
    assert text.count("xla.gpu.triton") == len(set(calls)), "each is lowered once, and there is no other"
    sums = [call for call in calls if call.startswith("add_and_normalise")]
    assert len(sums) == (3 if is_alone else 0), "the last sum is XLA's"


def attention(is_alone, normed):
    """Attention in float8 over a prompt of 16 tokens: (what it gives before scales, output, pools)."""
    layer = Attention(
        "attention",
        0,
        hidden=64,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=Rope.from_parameters({"rope_type": "default", "rope_theta": 1e4}, 16, 64),
        dtype=jnp.bfloat16,
        qk_norm_eps=1e-5 if normed else None,
    )
    quantise_model(layer, ChannelQuant("fp8"))
    for seed, weight in enumerate((*layer.qkv.weights, layer.o)):
        normal = jnp.asarray(np.random.default_rng(seed).normal(size=weight.shape)) / 8
        numbers, scale = quantise(normal, "fp8", 1 if weight is layer.o else 2)
        weight.numbers.set_raw_value(numbers)
        weight.scale.set_raw_value(scale)
    for norm in (layer.q_norm, layer.k_norm):
        if norm is not None:
            norm.weight.set_raw_value(jnp.linspace(0.5, 2, 16, dtype=jnp.bfloat16))
    if is_alone:
        layer.qkv.fuse()
        layer.o.is_alone = True
    pool, number = jnp.zeros((8, 4, 2, 16), jnp.bfloat16), jnp.arange(16, dtype=jnp.int32)
    step = StepContext(
        key_pages=pool,
        value_pages=pool,
        page_table_SN=jnp.arange(8, dtype=jnp.int32)[None],
        position_T=number,
        slot_T=jnp.zeros(16, jnp.int32),
        context_len_R=None,
        blocks=QueryBlocks(*(jnp.asarray([n], jnp.int32) for n in (0, 0, 16, 0))),
        block_size=16,
        num_pages=8,
        page_size=4,
    )
    x = jnp.asarray(np.random.default_rng(9).normal(size=(16, 64)), jnp.bfloat16)
    out = layer(x, step)
    arrays = wide(out), step.key_pages, step.value_pages
    return isinstance(out, Product), [np.asarray(array, np.float32) for array in arrays]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("where, rtol", [("reference", 0), ("interpret", 2**-5)])
def test_attention_gives_the_same_whoever_applies_its_scales(where, rtol, normed):
    with backend.use("reference"):
        is_unscaled, want = attention(is_alone=False, normed=normed)
    assert not is_unscaled
    with backend.use(where):
        is_unscaled, got = attention(is_alone=True, normed=normed)
    assert is_unscaled
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("first", ["wide", "float8"])
def test_norm_of_a_sum_is_the_same_whichever_form_is_asked_for_first(first):
    norm = RMSNorm("norm", 64, eps=1e-5, dtype=jnp.bfloat16)
    norm.weight.set_raw_value(jnp.linspace(0.5, 2, 64, dtype=jnp.bfloat16))
    rng = np.random.default_rng(3)
    x, sums = (jnp.asarray(rng.normal(size=(16, 64)), jnp.bfloat16) for _ in range(2))
    product = Product(Scaled(sums, jnp.full((16, 1), 0.5), jnp.linspace(1, 2, 64)), jnp.bfloat16)
    total = add(x, product)
    operand = norm.operand(total)
    getattr(operand, first)
    want = x + product.wide
    np.testing.assert_array_equal(wide(total), want)
    np.testing.assert_array_equal(operand.wide, norm(want))
    for got, expected in zip(operand.float8, norm.operand(want).float8):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


# ---- what is declared ----


def blueprint(family, **options):
    config = ServerConfig.from_keywords(model_path="m", **options)
    return draw_on_paper(config, {**read_config(family), "dtype": "bfloat16"})


def test_vocabulary_norms_router_and_latent_up_projections_stay_as_they_are():
    model = blueprint("deepseek_v3", quantization="fp8").model
    sparse = model.blocks[1]
    kept = [
        model.vocabulary.embedding,
        model.vocabulary.head,
        model.norm.weight,
        sparse.attention.key_up,
        sparse.attention.value_up,
        sparse.feed.router,
    ]
    assert {param.get_value().dtype for param in kept} == {jnp.dtype(jnp.bfloat16)}
    assert isinstance(sparse.attention.out, ChannelScaled) and isinstance(
        sparse.feed.shared.down, ChannelScaled
    )
    experts = sparse.feed.experts
    E, D, F = experts.down.get_value().shape
    assert experts.down.get_value().dtype == jnp.float8_e4m3fn
    assert experts.down_scale.get_value().shape == (E, D, 1)
    assert experts.gate_scale.get_value().shape == (E, F, 1)


def test_smaller_weights_are_what_preflight_counts_and_the_engine_has(engine):
    wide, narrow = blueprint("llama"), blueprint("llama", quantization="int8")
    assert narrow.weight_bytes_of_device < 0.75 * wide.weight_bytes_of_device  # of which 36 % is vocabulary
    served = engine("llama", quantization="int8")
    drawn = blueprint("llama", quantization="int8", dtype="float32")
    assert served.info.weight_bytes == drawn.weight_bytes_of_device
    assert served.info.quantization == "int8"


def test_dummy_weights_are_quantised_too(engine):
    served = engine("llama", load_format="dummy", quantization="fp8")
    assert served.info.weight_bytes == engine("llama", quantization="fp8").info.weight_bytes
    assert len(tokens(served, "llama")[0]) == 12


# ---- checkpoints that hold the numbers ----


def stored_file(path, family, scheme, quantization, per_tensor=False):
    tensors = {}
    for name, tensor in read_tensors(family).items():
        if PLAIN.search(name):
            tensors[name] = tensor
            continue
        numbers, scale = by_channel(tensor, scheme, (0, 1) if per_tensor else -1)
        tensors[name] = numbers
        tensors[f"{name}_scale"] = scale.reshape(-1)[:1] if per_tensor else scale.astype(np.float32)
    return write(path, {**read_config(family), "quantization_config": quantization}, tensors)


def compressed(kind, **change):
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, **change}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
    }


def leaves(path, **options):
    """Every array of a checkpoint's model, by path."""
    checkpoint = open_checkpoint(path)
    config = ServerConfig.from_keywords(model_path=path, dtype="float32", **options)
    model = draw_on_paper(config, checkpoint.config, on_cpu=True).model
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load(model, checkpoint, lambda _: one_device, lambda *_: None)
    return {path: np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize(
    "family, scheme, kind",
    [("llama", "fp8", "float"), ("qwen3_moe", "fp8", "float"), ("llama", "int8", "int")],
)
def test_stored_channels_are_read_as_what_loading_makes(family, scheme, kind, tmp_path):
    stored = stored_file(tmp_path, family, scheme, compressed(kind))
    made = leaves(str(GOLDEN / family), quantization=scheme)
    for options in ({}, {"quantization": scheme}):
        read = leaves(stored, **options)
        assert list(read) == list(made)
        for path, array in read.items():
            assert array.dtype == made[path].dtype
            # XLA divides by a constant as it multiplies: a scale's last bit may differ from numpy's.
            np.testing.assert_allclose(
                array.astype(np.float32), made[path].astype(np.float32), rtol=2e-7, atol=0, err_msg=str(path)
            )


def test_one_scale_a_tensor_is_spread_over_its_channels(tmp_path):
    name, tensors = "model.layers.0.mlp.down_proj.weight", read_tensors("llama")
    numbers, scale = by_channel(tensors[name], "fp8", (0, 1))
    stored = stored_file(tmp_path, "llama", "fp8", {"quant_method": "fp8"}, per_tensor=True)
    read = {jax.tree_util.keystr(path): array for path, array in leaves(stored).items()}
    at = "['blocks'][0]['feed']['down']"
    np.testing.assert_array_equal(read[f"{at}['numbers'].value"], numbers)
    np.testing.assert_array_equal(read[f"{at}['scale'].value"], np.full(len(numbers), scale.item()))


def test_layers_left_out_of_a_stored_checkpoint_stay_wide():
    quant = ChannelQuant("fp8", is_stored=True, skip=("lm_head", "model.layers.0.mlp", r"re:.*k_proj$"))
    assert not quant.covers("lm_head.weight")
    assert not quant.covers("model.layers.3.self_attn.k_proj.weight")
    assert quant.covers("model.layers.3.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    "options, quantization, message",
    [
        ({"quantization": "int8"}, {"quant_method": "fp8"}, "quantization=int8.*already, as fp8.*channel"),
        ({"quantization": "fp8"}, compressed("int"), "quantization=fp8.*already, as int8"),
        ({"dequantize_weights": True}, compressed("float"), "dequantize_weights takes.*block"),
        ({"dequantize_weights": True, "quantization": "fp8"}, None, "exclude each other"),
        ({}, compressed("float", num_bits=4), "compressed-tensors is read for weights of 8 bits"),
        ({}, compressed("int", symmetric=False), "compressed-tensors is read for weights of 8 bits"),
        ({}, compressed("int", strategy="group"), "compressed-tensors is read for weights of 8 bits"),
        ({}, {**compressed("int"), "format": "marlin-24"}, "format='marlin-24' are not read"),
        (
            {},
            {**compressed("float"), "transform_config": {"config_groups": {}}},
            "transform_config .*is not read",
        ),
        (
            {},
            {**compressed("float"), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config .*is",
        ),
        ({"quantization": "fp8"}, {"quant_method": "hqq"}, "quant_method='hqq' is not supported"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, quantization, message):
    hf_config = {**read_config("llama"), "quantization_config": quantization}
    with pytest.raises(ConfigError, match=message):
        draw_on_paper(ServerConfig.from_keywords(model_path="m", **options), hf_config)


def test_block_quantised_checkpoint_keeps_its_blocks_or_is_refused():
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}
    hf_config = {**read_config("deepseek_v3"), "quantization_config": blocks}
    config = ServerConfig.from_keywords(model_path="m", quantization="fp8")
    assert not isinstance(draw_on_paper(config, hf_config).model.blocks[0].feed.down, ChannelScaled)
    config = ServerConfig.from_keywords(model_path="m", quantization="int8")
    with pytest.raises(ConfigError, match=r"quantization=int8.*already, as fp8 with a scale for each block"):
        draw_on_paper(config, hf_config)


def test_quantised_tensor_of_a_layer_that_is_read_wide_is_refused(tmp_path):
    stored = stored_file(tmp_path, "llama", "fp8", compressed("float"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:.*q_proj$"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"q_proj.weight is quantised .*q_proj.weight_scale is beside it"
    ):
        leaves(stored)


def test_read_stored_leaves_other_methods_alone():
    assert read_stored({}) is None
    assert read_stored({"quantization_config": {"quant_method": "mxfp4"}}) is None


# ---- converted checkpoints ----


def test_converted_checkpoint_is_what_loading_makes(tmp_path):
    source, target = str(GOLDEN / "qwen3_moe"), tmp_path / "converted"
    command = ["--from", source, "--to", str(target), "--verify", "--dtype", "bfloat16"]
    assert convert_checkpoint.main([*command, "--quantization", "fp8"]) == 0
    made, read = leaves(source, quantization="fp8"), leaves(str(target))
    assert list(read) == list(made)
    for path, array in read.items():
        if array.dtype == ml_dtypes.float8_e4m3fn or array.shape[-1:] == (1,):  # others went through bfloat16
            np.testing.assert_allclose(
                array.astype(np.float32), made[path].astype(np.float32), rtol=2e-7, err_msg=str(path)
            )
    assert convert_checkpoint.main([*command, "--quantization", "int8"]) == 1  # the target is fp8


@pytest.mark.parametrize(
    "family, message", [("gpt_oss", "down_proj is not stored as"), ("llama", "quantised already, as fp8")]
)
def test_conversion_of_what_cannot_be_is_refused(family, message, tmp_path, capfd):
    source = GOLDEN / family
    if family == "llama":
        source = stored_file(tmp_path, family, "fp8", compressed("float"))
    command = ["--from", str(source), "--to", str(tmp_path / "to"), "--quantization", "int8"]
    assert convert_checkpoint.main(command) == 1
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "to").exists()
