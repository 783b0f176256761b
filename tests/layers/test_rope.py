"""Rotary embedding: frequencies against recorded ones, rotation against complex numbers."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ConfigError
from jaxserve.layers.rope import Rope, rope_parameters
from jaxserve.ops.kv_write.reference import rotate

RECORDED = json.loads((Path(__file__).parent.parent / "golden" / "rope.json").read_text())


def turn(table, x_THK, **options):
    return rotate(x_THK, (table.cos_TK, table.sin_TK), **options)


@pytest.mark.parametrize("name", RECORDED)
def test_scaled_frequencies_are_the_recorded_ones(name):
    """The recording computes in float32, we in float64; YaRN's blend loses some digits to 1 - x."""
    recorded = RECORDED[name]
    rope = Rope.from_parameters(rope_parameters({"rope_parameters": recorded["parameters"]}), 64, 131072)
    np.testing.assert_allclose(rope.frequencies, recorded["frequencies"], rtol=1e-5)
    assert rope.amplitude == pytest.approx(recorded["amplitude"], rel=1e-6)


def test_rotation_turns_the_pair_i_and_i_plus_half_by_position_times_frequency():
    rope = Rope((1.0, 0.25), amplitude=2.0)
    x_THK = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    position_T = np.array([0, 5, 100], np.int32)
    turned = (x_THK[..., :2] + 1j * x_THK[..., 2:]) * np.exp(
        1j * position_T[:, None, None] * np.array([1.0, 0.25])
    )
    want = 2.0 * np.concatenate([turned.real, turned.imag], axis=-1)
    got = turn(rope.table(jnp.asarray(position_T)), jnp.asarray(x_THK))
    np.testing.assert_allclose(got, want, atol=1e-5)  # cosine of 100 rad in float32


def test_old_and_new_spellings_of_a_config_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}}
    assert rope_parameters(old) == rope_parameters(new)


def test_oldest_spelling_says_type():
    config = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = Rope.from_parameters(rope_parameters(config), 4, 100)
    assert rope.frequencies == pytest.approx((0.5, 0.005))


def test_attn_factor_of_yarn_multiplies_the_amplitude():
    """DeepSeek-R1-0528-Qwen3-8B's takes YaRN's own away."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain = Rope.from_parameters(rope_parameters({"rope_scaling": scaling}), 128, 131072)
    scaling = {**scaling, "attn_factor": 0.8782488562869419}
    rope = Rope.from_parameters(rope_parameters({"rope_scaling": scaling}), 128, 131072)
    assert rope.frequencies == plain.frequencies
    assert plain.amplitude == pytest.approx(1.1386, abs=1e-4) and rope.amplitude == pytest.approx(1)


def test_config_without_any_rope_key_has_base_10000():
    assert rope_parameters({}) == {"rope_type": "default", "rope_theta": 10000.0}


def test_scaling_that_was_added_to_a_new_config_wins():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    for kind in ("rope_type", "type"):
        got = rope_parameters({**plain, "rope_scaling": {kind: "yarn", **scaling}})
        want = rope_parameters({"rope_theta": 1e6, "rope_scaling": {kind: "yarn", **scaling}})
        assert got == want and got["rope_type"] == "yarn"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rope_scaling": {"factor": 8.0}}, "factor=8.0 but no rope_type"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2}}, "factor=2 but no rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "for 'full_attention' alone"),
    ],
)
def test_what_would_be_left_out_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        rope_parameters(config)


@pytest.mark.parametrize(
    "parameters",
    [
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 2.0,
            "low_freq_factor": 1,
            "high_freq_factor": 1,
        },
        {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_numbers_that_give_no_frequencies_are_refused(parameters):
    with pytest.raises(
        ConfigError, match=f"rope_type='{parameters['rope_type']}' has numbers that give none"
    ):
        Rope.from_parameters(parameters, 64, 100)


def test_unknown_rope_type_is_refused_by_name_with_the_known_ones():
    with pytest.raises(
        ConfigError, match="rope_type='dynamic' is not supported; use one of 'default', 'linear'"
    ):
        Rope.from_parameters(rope_parameters({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), 64, 100)


def test_missing_rope_key_is_named():
    with pytest.raises(ConfigError, match="rope_type='llama3' needs low_freq_factor"):
        Rope.from_parameters({"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}, 64, 100)


def test_partial_rotation_turns_the_first_numbers_and_keeps_the_rest():
    parameters = rope_parameters({"partial_rotary_factor": 0.25})
    rope = Rope.from_parameters(parameters, 64, 100)
    assert rope == Rope.from_parameters(rope_parameters({}), 16, 100)
    x_THK = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 64)), jnp.float32)
    table = rope.table(jnp.arange(3))
    out = turn(table, x_THK)
    np.testing.assert_array_equal(out[..., 16:], x_THK[..., 16:])
    np.testing.assert_array_equal(out[..., :16], turn(table, x_THK[..., :16]))


def test_partial_rotation_of_an_odd_number_is_refused():
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.05 of head_dim=64 rotates 3 numbers"):
        Rope.from_parameters(rope_parameters({"partial_rotary_factor": 0.05}), 64, 100)


def test_interleaved_pairs_turn_like_separate_ones():
    """Pairs (2i, 2i + 1) come out where the pairs (i, i + K/2) of the reordered head would."""
    x_THK = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 8)), jnp.float32)
    table = Rope.from_parameters(rope_parameters({}), 8, 100).table(jnp.arange(4))
    apart = jnp.concatenate([x_THK[..., 0::2], x_THK[..., 1::2]], axis=-1)
    np.testing.assert_array_equal(turn(table, x_THK, interleaved=True), turn(table, apart))
