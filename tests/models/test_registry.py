"""Finding a family by config.json, and what a family refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.config import ConfigError
from jaxserve.models import UnknownArchitectureError, resolve
from jaxserve.models.llama import LlamaForCausalLM
from tests.models.tiny import (
    FAMILIES,
    MOE_FAMILIES,
    Chunk,
    Golden,
    TinyEngine,
    build,
    read_config,
    read_tensors,
)

SLIDING = {"use_sliding_window": True, "sliding_window": 8}


def model_of(config):
    return resolve(config)(config, jnp.float32)


def test_architecture_names_its_class():
    assert resolve({"architectures": ["LlamaForCausalLM"]}) is LlamaForCausalLM


def test_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(UnknownArchitectureError) as error:
        resolve({"architectures": ["BertModel"]})
    assert str(error.value) == (
        "config.json: architectures=['BertModel'] is unknown; known: DeepseekV2ForCausalLM, "
        "DeepseekV3ForCausalLM, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Glm4MoeForCausalLM, "
        "GptOssForCausalLM, LlamaForCausalLM, MiniMaxForCausalLM, MiniMaxM1ForCausalLM, "
        "MiniMaxM2ForCausalLM, MiniMaxText01ForCausalLM, MistralForCausalLM, MixtralForCausalLM, "
        "Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"
    )


def test_config_without_architectures_says_so():
    with pytest.raises(UnknownArchitectureError, match="architectures is missing; known: Deepseek"):
        resolve({"model_type": "llama"})


def test_quantized_checkpoint_is_refused_by_method():
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(
        ConfigError, match=r"'bitsandbytes' is not supported .*fp8, AWQ, GPTQ or compressed-tensors"
    ):
        resolve(config)
    with pytest.raises(ConfigError, match="quantization_config has no quant_method"):
        resolve({**config, "quantization_config": {"load_in_8bit": True}})


@pytest.mark.parametrize("family", FAMILIES + MOE_FAMILIES)
def test_building_a_model_allocates_nothing_and_names_every_checkpoint_tensor(family):
    model = model_of(read_config(family))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves
    assert all(isinstance(param.get_value(), jax.ShapeDtypeStruct) for param in params)
    unserved = getattr(model, "unserved", ())
    assert {source for param in params for source in param.sources} == {
        name for name in read_tensors(family) if not name.startswith(unserved)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_models_say_what_the_engine_needs(family):
    config = read_config(family)
    model = model_of(config)
    assert model.kv.num_layers == config["num_hidden_layers"]
    assert model.kv.num_kv_heads == config["num_key_value_heads"]
    assert model.kv.head_dim == config.get("head_dim", 16)
    assert model.num_q_heads == 4
    assert model.vocab_size == 320
    assert model.max_position == 512


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu' is not supported; use one of 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "64"}, "hidden_size='64' must be a positive integer"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 must be a positive integer"),
        ("llama", {"head_dim": 16.0}, "head_dim=16.0 must be a positive integer"),
        ("llama", {"num_key_value_heads": 3}, "heads=4 is not a multiple of num_key_value_heads=3"),
        ("qwen2", {**SLIDING, "layer_types": ["chunked"] * 2}, "layer_types='chunked'"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be a positive integer"),
        ("qwen2", {**SLIDING, "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "must have full_attention"),
    ],
)  # fmt: skip
def test_unsupported_value_is_refused_with_key_and_value(family, change, message):
    with pytest.raises(ConfigError, match=message):
        model_of({**read_config(family), **change})


def windows_of(model):
    return [block.attention.window for block in model.blocks]


def ropes_of(model):
    return [block.attention.rope for block in model.blocks]


def test_qwen_windows_start_at_max_window_layers_and_only_when_switched_on():
    config = {**read_config("qwen2"), "sliding_window": 20, "max_window_layers": 1, "layer_types": None}
    assert windows_of(model_of({**config, "use_sliding_window": False})) == [None, None]
    assert windows_of(model_of({**config, "use_sliding_window": True})) == [None, 20]


def test_qwen3_moe_has_its_window_on_all_layers():
    config = {**read_config("qwen3_moe"), "sliding_window": 20, "max_window_layers": 1, "layer_types": None}
    assert set(windows_of(model_of({**config, "use_sliding_window": False}))) == {None}
    assert set(windows_of(model_of({**config, "use_sliding_window": True}))) == {20}


def test_mistral_with_a_null_window_attends_everything():
    assert windows_of(model_of({**read_config("mistral"), "sliding_window": None})) == [None, None]


def test_old_gemma_config_means_the_same_as_the_new_one():
    new = read_config("gemma3")
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    old |= {
        "sliding_window_pattern": 2,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "torch_dtype": "float32",
    }
    assert windows_of(model_of(old)) == windows_of(model_of(new)) == [20, None, 20]
    assert ropes_of(model_of(old)) == ropes_of(model_of(new))


def test_yarn_reaches_factor_times_the_original_length():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert (
        model_of({**read_config("llama"), "rope_scaling": rope, "rope_parameters": None}).max_position == 2048
    )


def test_text_part_of_a_multimodal_gemma_gives_the_recorded_logits():
    text = read_config("gemma3")
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    tensors = {f"language_model.{name}": tensor for name, tensor in read_tensors("gemma3").items()}
    golden = Golden.read("gemma3")
    engine = TinyEngine(build(config, tensors))
    (logits,) = engine.step([[]], [[Chunk(0, 0, golden.prompts[1])]], R=0, P=16)
    np.testing.assert_allclose(logits, golden.logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_model_stays_near_the_recorded_logits(family):
    """bfloat16 keeps 8 bits: about 0.4 % a rounding, a dozen roundings on the way, logits to 20."""
    golden = Golden.read(family)
    model = build(read_config(family), read_tensors(family), jnp.bfloat16)
    engine = TinyEngine(model, dtype=jnp.bfloat16)
    (logits,) = engine.step([[]], [[Chunk(0, 0, golden.prompts[2])]], R=0, P=48)
    error = np.abs(logits[:33] - golden.logits[2])
    assert logits.dtype == np.float32
    assert error.mean() < 0.03 * golden.logits[2].std()
