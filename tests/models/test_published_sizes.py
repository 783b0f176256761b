"""Models in their published shapes: as many parameters as their authors count, and bytes as they are kept."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from jaxserve.mesh import Layout, rules, weight_sharding
from jaxserve.models import resolve

SHAPES = Path(__file__).parents[2] / "tools" / "shapes"


def build(name, **change):
    config = {**json.loads((SHAPES / f"{name}.json").read_text()), **change}
    model = resolve(config)(config, jnp.bfloat16)
    return model, [param for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize(
    "name, billions",
    [
        ("deepseek-v2-lite", 15.7),
        ("deepseek-v3", 671.0),
        ("qwen3-30b-a3b", 30.5),
        ("qwen3-235b-a22b", 235.1),
        ("kimi-k2", 1026.4),
        ("minimax-m2", 228.7),
        ("minimax-text-01", 456.1),
        ("gpt-oss-20b", 20.9),
        ("gpt-oss-120b", 116.8),
        ("gemma-3-12b", 11.8),
        ("glm-4.5-air", 106.9),
        ("mixtral-8x7b", 46.7),
        ("qwen3-8b", 8.2),
    ],
)
def test_model_has_as_many_parameters_as_published(name, billions):
    _, params = build(name, quantization_config=None)
    count = sum(math.prod(param.get_value().shape) for param in params)
    assert round(count / 1e9, 1) == billions


def test_deepseek_v3_takes_a_byte_a_parameter_in_float8():
    _, params = build("deepseek-v3")
    size = sum(math.prod(p.get_value().shape) * p.get_value().dtype.itemsize for p in params)
    assert size / 671e9 == pytest.approx(1.0, abs=0.02)


def test_experts_of_gpt_oss_120b_in_four_bits_leave_room_on_a_card_of_80_gb():
    kept = json.loads((SHAPES / "gpt-oss-120b.json").read_text())["quantization_config"] | {"keep": True}
    _, params = build("gpt-oss-120b", quantization_config=kept)
    size = sum(math.prod(p.get_value().shape) * p.get_value().dtype.itemsize for p in params)
    assert size / 1e9 == pytest.approx(65.2, abs=0.1)  # 4.25 bits a parameter of experts


def test_deepseek_v3_keeps_1152_bytes_of_a_token_and_layer():
    """(512 + 64) bfloat16 numbers, where 128 heads' keys and values would be 57 times that."""
    model, _ = build("deepseek-v3")
    assert (model.kv.latent_dim + model.kv.rope_dim) * 2 == 1152


@pytest.mark.parametrize(
    "layout", [Layout(8, dp=8, ep=8), Layout(16, dp=16, ep=16), Layout(8, ep=1)], ids=str
)
def test_every_weight_of_deepseek_v3_divides_over_the_layouts_it_is_served_on(layout):
    model, params = build("deepseek-v3")
    table = rules(
        layout,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.kv.num_kv_heads,
        num_experts=model.experts.num_experts,
    )
    mesh = AbstractMesh(layout.shape, ("dp", "ep", "tp"))
    for param in params:
        weight_sharding(mesh, table, param)
