"""MiniMax-Text-01 as it is published: the same network under other keys, and what of it is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ConfigError
from jaxserve.models import resolve
from jaxserve.models.minimax_text import ScaledBlock
from tests.models.tiny import Chunk, Golden, TinyEngine, build, read_config, read_tensors

RENAMED = {
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}


def published(**change):
    """The recorded model's config.json, said as MiniMax-Text-01 says it."""
    config = read_config("minimax_text")
    kinds = {"linear_attention": 0, "full_attention": 1}
    told = {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "attn_type_list": [kinds[kind] for kind in config.pop("layer_types")],
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "rotary_dim": config["head_dim"],
        "postnorm": True,
        "shared_intermediate_size": 0,
        **{new: config.pop(old) for old, new in RENAMED.items()},
    }
    return {**config, **told, **change}


@pytest.mark.parametrize("name", ["MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"])
def test_published_keys_and_tensors_give_the_recorded_logits(name):
    """Decays differ by 1e-5 / layers, which no logit of so short a prompt shows."""
    tensors = {key: array for key, array in read_tensors("minimax_text").items() if "decay" not in key}
    model, golden = build(published(architectures=[name]), tensors), Golden.read("minimax_text")
    (logits,) = TinyEngine(model).step([[]], [[Chunk(0, 0, golden.prompts[2])]], R=0, P=48)
    np.testing.assert_allclose(logits[:33], golden.logits[2], rtol=0, atol=1e-4)


def test_part_of_a_head_is_rotated_when_rotary_dim_says_so():
    config = published(rotary_dim=4)
    model = resolve(config)(config, jnp.float32)
    assert len(model.blocks[2].attention.rope.frequencies) == 2


def test_seven_of_eight_layers_keep_states_and_the_eighth_keys_and_values():
    config = published(num_hidden_layers=16, attn_type_list=[0, 0, 0, 0, 0, 0, 0, 1] * 2)
    model = resolve(config)(config, jnp.float32)
    assert (model.kv.num_layers, model.states.num_layers) == (2, 14)
    assert [block.attention.layer for block in model.blocks[7::8]] == [0, 1]
    linear = [block.attention for number, block in enumerate(model.blocks) if number % 8 != 7]
    assert [attention.state_layer for attention in linear] == list(range(14))
    assert linear[0].slope[0] == pytest.approx(0.5 * (1 + 1e-5))
    assert linear[-1].slope[0] == pytest.approx(0.5 * (1 - 14 / 15 + 1e-5))


@pytest.mark.parametrize("postnorm, want", [(True, 2 * 2.0 + 3 * 10), (False, 2 * 7.0 + 3 * 10)])
def test_residual_is_the_normalized_input_or_the_input_itself(postnorm, want):
    scales = {"attention_scales": (2.0, 3.0), "feed_scales": (1.0, 0.0)}
    block = ScaledBlock(
        "x", lambda x, step: x * 5, lambda x, step: x, **scales, postnorm=postnorm, hidden=4, eps=0.0,
        dtype=jnp.float32,
    )  # fmt: skip
    block.attention_norm = lambda x: jnp.full_like(x, 2.0)
    block.feed_norm = lambda x: x
    np.testing.assert_allclose(block(jnp.full((1, 4), 7.0), None), want)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_type_list": None}, "attn_type_list is missing"),
        ({"attn_type_list": [0, 0, 2, 0]}, "attn_type_list=2 is not supported; use one of 0, 1"),
        ({"attn_type_list": [0, 1]}, "attn_type_list has 2 entries, num_hidden_layers=4"),
        ({"attn_type_list": [0, 0, 0, 0]}, "attn_type_list must name layers of both kinds"),
        ({"shared_intermediate_size": 64}, "shared_intermediate_size=64 is not supported"),
        ({"sliding_window": 128}, "sliding_window=128 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; use one of 'silu'"),
        ({"num_attention_heads": 12, "num_key_value_heads": 2}, "num_attention_heads=12 is not supported"),
    ],
)
def test_what_this_family_has_never_been_is_refused_by_its_key(change, message):
    config = published(**change)
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        resolve(config)(config, jnp.float32)


def test_kinds_of_layers_are_those_of_transformers_own_class():
    config = {**read_config("minimax_text"), "layer_types": ["linear_attention", "mamba"] * 2}
    with pytest.raises(
        ConfigError, match="layer_types='mamba' is not supported; use one of 'linear_attention'"
    ):
        resolve(config)(config, jnp.float32)
