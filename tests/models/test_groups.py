"""Checkpoints of integers in groups: recorded logits and tokens, what config.json may say, conversion."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.check import check
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.engine.quantization import declare_model
from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.group_quant import SUFFIXES, GroupQuant, read_groups
from jaxserve.weights import load, open_checkpoint
from tests.engine.asking import ask, check_greedy, golden_rows
from tests.models.tiny import GOLDEN, Chunk, Golden, TinyEngine, read_config
from tools import convert_checkpoint

LLAMA = (
    *("llama_awq", "llama_gptq", "llama_gptq_zeros", "llama_gptq_v2_ordered", "llama_gptq_8bit"),
    *("llama_packed", "llama_packed_zeros", "llama_packed_8bit"),
)
QWEN3_MOE = ("qwen3_moe_awq", "qwen3_moe_gptq_zeros", "qwen3_moe_packed")
GROUPS = GOLDEN / "groups"
TOLERANCE = 1e-4  # see test_families.py
WHOLE = 64  # tokens of a step that holds all recorded prompts


def one_device(_):
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def loaded(path, shardings=one_device, **options):
    checkpoint = open_checkpoint(path)
    config = ServerConfig.from_keywords(model_path=str(path), dtype="float32", **options)
    model = draw_on_paper(config, checkpoint.config, on_cpu=True).model
    load(model, checkpoint, shardings, lambda *_: None)
    return model


def leaves(model):
    return {path: np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model, nnx.Param))}


@pytest.fixture(scope="module", params=[LLAMA, QWEN3_MOE], ids=["llama", "qwen3_moe"])
def alike(request):
    """Names of models of one structure, and an engine that was compiled for one of them."""
    return request.param, TinyEngine(loaded(GROUPS / request.param[0]))


def test_every_format_gives_the_recorded_logits(alike):
    names, engine = alike
    for name in names:
        engine.params = nnx.split(loaded(GROUPS / name))[1]
        engine.forget()
        golden = Golden.read(f"groups/{name}")
        chunks = [Chunk(slot, 0, prompt) for slot, prompt in enumerate(golden.prompts)]
        (got,) = engine.step([[]], [chunks], R=0, P=WHOLE)
        want = np.concatenate(golden.logits)
        np.testing.assert_allclose(got[: len(want)], want, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("name, layout", [("llama_gptq_zeros", {}), ("qwen3_moe_awq", {"tp": 2})])
def test_engine_gives_the_recorded_tokens(engine, name, layout):
    golden = Golden.read(f"groups/{name}")
    check_greedy(golden, ask(engine(f"groups/{name}", context_length=128, **layout), golden_rows(golden)))


@pytest.mark.parametrize("name", LLAMA)
def test_devices_of_a_mesh_read_their_parts(name):
    """Split by outputs and by inputs, where a part may begin within a group: 64 inputs over eight."""
    want = leaves(loaded(GROUPS / name))
    mesh = Mesh(np.array(jax.devices()), ("tp",))
    for axis in (0, -1):

        def split(param, axis=axis):
            spec = [None] * len(param.get_raw_value().shape)
            if param.num_out is not None and param.get_raw_value().shape[axis] % 8 == 0:
                spec[axis] = "tp"
            return NamedSharding(mesh, PartitionSpec(*spec))

        for path, got in leaves(loaded(GROUPS / name, split)).items():
            np.testing.assert_array_equal(got, want[path], err_msg=str(path))


# ---- what is declared ----


def declared(name, **options):
    config = ServerConfig.from_keywords(model_path="m", dtype="float32", **options)
    return declare_model(config, read_config(f"groups/{name}"), jnp.float32)


def test_weights_are_widened_with_a_line_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        model = loaded(GROUPS / "llama_awq", dequantize_weights=True)
    assert isinstance(model.blocks[0].feed.down, nnx.Param)
    assert "widened from integers of 4 bits when they are loaded: as the configuration asks" in caplog.text


@pytest.mark.parametrize("name", ["llama_gptq", "llama_packed_zeros"])
def test_widened_weights_can_be_kept_in_8_bits_of_another_kind(name):
    assert isinstance(declared(name, quantization="int8").blocks[0].feed.down, ChannelScaled)
    down = loaded(GROUPS / name, quantization="int8").blocks[0].feed.down
    wide = loaded(GROUPS / name).blocks[0].feed.down[...]
    scale = np.asarray(down.scale[...])[:, None]
    error = np.abs(np.asarray(down.numbers[...], np.float32) * scale - wide)
    assert (error <= scale * (0.5 + 1e-4)).all()  # half a step, and the rounding of a ratio


def test_dummy_weights_of_such_a_config_are_drawn(engine):
    served = engine("groups/llama_packed", load_format="dummy", context_length=128)
    assert len(served.generate(input_ids=[3, 4], sampling_params={"max_new_tokens": 3})["output_ids"]) == 3


def test_check_reads_such_a_config():
    config = ServerConfig.from_keywords(model_path=str(GROUPS / "llama_packed"), dtype="bfloat16")
    assert check(config).cost.num_params == 2 * 64 * 64 + 24_576 + 3 * 64  # vocabulary, matrices, norms


def test_no_tensor_is_told_to_be_unused(caplog):
    loaded(GROUPS / "qwen3_moe_gptq_zeros")
    assert "not used" not in caplog.text


def test_weight_that_no_model_uses_is_told_once(caplog):
    checkpoint = open_checkpoint(GROUPS / "llama_awq")
    info = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    checkpoint.tensors |= {f"extra.weight{part}": info for part in ("", *SUFFIXES)}
    model = draw_on_paper(ServerConfig.from_keywords(model_path="m"), checkpoint.config, on_cpu=True).model
    load(model, checkpoint, one_device, lambda *_: None)
    assert "1 tensors are not used by this model: extra.weight" in caplog.text


# ---- converted checkpoints ----


def converted(name, path, *more):
    command = ["--from", str(GROUPS / name), "--to", str(path), "--verify", *more]
    assert convert_checkpoint.main(command) == 0
    return open_checkpoint(path)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_converted_checkpoint_keeps_codes_scales_and_zeros(dtype, tmp_path):
    source, result = (
        open_checkpoint(GROUPS / "llama_gptq_zeros"),
        converted("llama_gptq_zeros", tmp_path, "--dtype", dtype),
    )
    assert result.config["quantization_config"] == source.config["quantization_config"]
    assert set(result.tensors) == set(source.tensors)
    for name in source.tensors:
        if "_proj" in name:
            np.testing.assert_array_equal(result.read(name), source.read(name), err_msg=name)
    name, part = "model.layers.0.mlp.up_proj.weight", (slice(3, 9), slice(5, 40))
    np.testing.assert_array_equal(result.read(name, part), source.read(name)[part])


def test_converted_checkpoint_with_act_order_is_wide(tmp_path):
    source, result = (
        open_checkpoint(GROUPS / "llama_gptq_v2_ordered"),
        converted("llama_gptq_v2_ordered", tmp_path),
    )
    assert "quantization_config" not in result.config
    assert set(result.tensors) == set(source.tensors)
    for name in source.tensors:
        np.testing.assert_array_equal(result.read(name), source.read(name).astype(np.float16))


def test_converted_checkpoint_may_be_in_8_bits_of_another_kind(tmp_path):
    converted("llama_awq", tmp_path, "--quantization", "int8")
    made, read = leaves(loaded(GROUPS / "llama_awq", quantization="int8")), leaves(loaded(tmp_path))
    assert list(read) == list(made)
    for path, array in read.items():
        # A scale's last bit may differ from numpy's, and codes make many ratios that end in a half.
        np.testing.assert_allclose(
            array, made[path], rtol=2e-7, atol=array.dtype == np.int8, err_msg=str(path)
        )


# ---- what config.json says ----

AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


def packed(weights=(), scheme=(), **change):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, **dict(weights)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **dict(scheme)}},
        "ignore": ["lm_head"],
        **change,
    }


def read(quantization):
    return read_groups({"quantization_config": quantization})


@pytest.mark.parametrize(
    "quantization, expected",
    [
        (None, None),
        ({"quant_method": "fp8"}, None),
        ({**packed(), "format": "int-quantized"}, None),
        (AWQ, GroupQuant(4, 128, ("lm_head",))),
        ({**AWQ, "modules_to_not_convert": ["gate"]}, GroupQuant(4, 128, ("*gate*", "lm_head"))),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, GroupQuant(4, 64, ("lm_head",))),
        (GPTQ, GroupQuant(4, 128, ("lm_head",))),
        ({**GPTQ, "bits": 8, "group_size": -1, "lm_head": True}, GroupQuant(8, 0)),
        ({**GPTQ, "group_size": -1, "desc_act": True}, GroupQuant(4, 0, ("lm_head",))),
        ({**GPTQ, "desc_act": True}, GroupQuant(4, 128, ("lm_head",), is_ordered=True)),
        ({**GPTQ, "dynamic": {r"-:.*\.gate": {}}}, GroupQuant(4, 128, ("lm_head", r"re:.*\.gate"))),
        ({**GPTQ, "dynamic": {"+:x": {"desc_act": True}}}, GroupQuant(4, 128, ("lm_head",), is_ordered=True)),
        (packed(), GroupQuant(4, 128, ("lm_head",))),
        (packed({"strategy": "channel", "group_size": None}), GroupQuant(4, 0, ("lm_head",))),
        (packed({"actorder": "weight", "num_bits": 8}), GroupQuant(8, 128, ("lm_head",))),
        (packed({"actorder": "group"}), GroupQuant(4, 128, ("lm_head",), is_ordered=True)),
        (
            {"quant_method": "groups", "bits": 4, "group_size": 32, "modules_to_not_convert": ["a.b"]},
            GroupQuant(4, 32, plain=frozenset({"a.b"})),
        ),
    ],
)
def test_config_says_bits_groups_and_what_is_left_out(quantization, expected):
    assert read(quantization) == expected


def test_named_modules_patterns_and_words_are_not_covered():
    quant = read({**AWQ, "modules_to_not_convert": ["visual"]})
    assert quant.covers("model.layers.0.mlp.up_proj.weight")
    assert not quant.covers("lm_head.weight") and not quant.covers("model.visual.0.q_proj.weight")
    quant = read({**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]})
    assert quant.covers("model.layers.0.mlp.up_proj.weight")
    assert not quant.covers("model.layers.0.mlp.down_proj.weight") and not quant.covers("lm_head.weight")


OTHER = {"targets": ["x"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}


@pytest.mark.parametrize(
    "quantization, message",
    [
        ({**AWQ, "version": "gemv"}, "AWQ with version='gemv' is not read; use version 'gemm'"),
        ({**AWQ, "version": "gemv_fast"}, "version='gemv_fast'"),
        ({**AWQ, "backend": "llm-awq"}, "AWQ with backend='llm-awq' is not read"),
        ({**AWQ, "bits": 3}, "bits=3 is not read; use 4"),
        ({"quant_method": "awq"}, "bits=None is"),
        ({**GPTQ, "bits": 2}, "bits=2 is not read; use 4 or 8"),
        ({**GPTQ, "bits": 3}, "bits=3 is"),
        ({**GPTQ, "group_size": "all"}, "group_size='all' is not read; use a number of inputs, or -1"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ with checkpoint_format='marlin' is not read"),
        ({**GPTQ, "is_marlin_format": True}, "GPTQ with is_marlin_format is not read"),
        ({**GPTQ, "pack_dtype": "int16"}, "GPTQ with pack_dtype='int16' is not read"),
        (
            {**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}},
            "other bits or groups for '.*down.*' .dynamic. is",
        ),
        (packed({"num_bits": 2}), "bits=2 is"),
        (packed({"strategy": "tensor"}), "packed weights, strategy='tensor' is not read; use 'group'"),
        (packed({"strategy": "block"}), "strategy='block'"),
        (packed({"type": "float"}), "packed weights of type='float'"),
        (packed({"actorder": "random"}), "actorder='random'"),
        (packed({}, {"input_activations": {"num_bits": 8}}), "'pack-quantized' and input_activations is not"),
        (packed({}, {"format": "int-quantized"}), "format='int-quantized' beside 'pack-quantized'"),
        (packed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not read; use none"),
        (packed(transform_config={"config_groups": {}}), "transform_config .*is not read"),
        (
            packed(config_groups={**packed()["config_groups"], "group_1": OTHER}),
            "config_groups, or with ones",
        ),
        (
            packed(config_groups={"W4A16": ["Linear"]}),
            r"Expected `object`, got `array` - at `\$\.config_groups",
        ),
    ],
)
def test_kinds_that_are_not_read_are_refused_by_key_and_value(quantization, message):
    config = {**read_config("llama"), "quantization_config": quantization}
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{message}"):
        draw_on_paper(ServerConfig.from_keywords(model_path="m"), config)
