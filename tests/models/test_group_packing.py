"""Integers of four bits that stay so on the devices: the answers of what is widened, in fewer bytes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.layers.group_packing import keep_packed
from jaxserve.layers.group_quant import GroupQuant
from jaxserve.layers.group_scaled import GroupScaled
from jaxserve.models import declare
from tests.engine.asking import ask, greedy
from tests.models.tiny import read_config

GROUP = 32
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "dtype": "float16",
}
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


def config_of(family: str, **changes) -> dict:
    """Of a family's tiny checkpoint, wide enough to be cut into tiles, its weights in groups."""
    experts = {"moe_intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = {**read_config(family), **SIZES, **(experts if family == "qwen3_moe" else {})}
    quantization = {"quant_method": "groups", "bits": 4, "group_size": GROUP, "is_ordered": False}
    return {
        **config,
        **changes,
        "quantization_config": {**quantization, "modules_to_not_convert": ["lm_head"]},
    }


def write(path, family: str, dtype: str = "float16"):
    """As `tools.convert_checkpoint` writes groups: each linear weight as codes, scales and zeros."""
    config, rng, tensors = config_of(family), np.random.default_rng(0), {}
    model = declare({k: v for k, v in config.items() if k != "quantization_config"}, jnp.dtype(dtype))
    for _, param in nnx.iter_graph(model):
        if not isinstance(param, nnx.Param):
            continue
        shape, num_out = param.get_raw_value().shape, param.num_out
        for name in param.sources:
            if num_out is None:
                one = shape[len(shape) - 2 :] if len(param.sources) > 1 else shape
                tensors[name] = np.ones(one, dtype) if len(one) == 1 else draw(rng, one, dtype)
                continue
            inner = shape[num_out:]
            outer = shape[1:num_out] if len(param.sources) > 1 else shape[:num_out]
            N, K = int(np.prod(outer)), int(np.prod(inner))
            if name.startswith("lm_head"):
                tensors[name] = draw(rng, (N, K), dtype)
                continue
            scales = rng.uniform(0.5, 1.5, (N, K // GROUP)) / (4.6 * K**0.5)
            tensors[f"{name}.codes"] = rng.integers(0, 16, (N, K)).astype(np.uint8)
            tensors[f"{name}.scales"] = scales.astype(np.float16).astype(np.float32)
            tensors[f"{name}.zeros"] = rng.integers(6, 10, (N, K // GROUP)).astype(np.uint8)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def draw(rng, shape, dtype):
    return (rng.normal(size=shape) / shape[-1] ** 0.5).astype(dtype)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("groups")
    return {family: write(path / family, family) for family in ("llama", "qwen3_moe")}


def logprobs(engine) -> np.ndarray:
    """Of the prompts' tokens, and of some that follow."""
    replies = ask(
        engine, [greedy(prompt, new=4) for prompt in PROMPTS], return_logprob=True, logprob_start_len=0
    )
    parts = ("input_token_logprobs", "output_token_logprobs")
    return np.array(
        [e[0] for r in replies for part in parts for e in r["meta_info"][part] if e[0] is not None]
    )


@pytest.mark.parametrize(
    "family, layout",
    [
        ("llama", {}),
        ("llama", {"tp": 2}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"tp": 2, "ep": 2, "dp_size": 2, "enable_dp_attention": True}),
    ],
    ids=str,
)
def test_what_stays_in_four_bits_answers_as_what_is_widened(engine, checkpoints, family, layout):
    options = {"dtype": "float16", **layout}
    wide = engine(checkpoints[family], dequantize_weights=True, **options)
    kept = engine(checkpoints[family], quantization="int4", **options)
    want, got = logprobs(wide), logprobs(kept)
    assert np.isfinite(want).all() and np.ptp(want) > 1
    np.testing.assert_allclose(got, want, atol=2e-3)
    assert kept.info.weight_bytes < 0.6 * wide.info.weight_bytes, "embedding and head are a quarter of it"


def test_random_weights_in_four_bits_give_finite_logits(engine, checkpoints):
    served = engine(checkpoints["llama"], quantization="int4", dtype="float16", load_format="dummy")
    assert np.isfinite(logprobs(served)).all()


def kept_on(tp: int, group_size: int = GROUP, **changes) -> tuple[tuple[int, int], set[str]]:
    """((how many weights stay, how many are widened), names of what stays) of a llama on so many devices."""
    config = config_of("llama", **changes)
    model = declare({k: v for k, v in config.items() if k != "quantization_config"}, jnp.bfloat16)
    split = ("q_heads", "kv_heads", "ffn")
    counts = keep_packed(model, GroupQuant(4, group_size), lambda axis: tp if axis in split else 1)
    kept = [node for _, node in nnx.iter_graph(model) if isinstance(node, GroupScaled)]
    return counts, {name.split(".")[-3] for node in kept for name in node.numbers.sources}


def test_what_devices_would_cut_is_widened():
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kept_on(1) == kept_on(2) == ((6, 0), every)
    # 32 rows of keys a device, 64 inputs of two products.
    assert kept_on(4) == ((2, 4), every - {"k_proj", "v_proj", "o_proj", "down_proj"})
    assert kept_on(1, group_size=48) == ((0, 7), set()), "no tile of 32 columns"
    assert kept_on(1, group_size=0) == ((6, 0), every), "for each 128 on the device the same scale"
    assert kept_on(1, intermediate_size=96) == ((5, 1), every - {"down_proj"})


@pytest.mark.parametrize("plain", ["experts.0.gate_proj", "experts.3.up_proj", "experts.1.down_proj"])
def test_experts_of_which_some_are_plain_are_widened(plain):
    model = drawn(
        "qwen3_moe", {"modules_to_not_convert": [f"model.layers.0.mlp.{plain}"]}, dtype="float16"
    ).model
    assert model.blocks[0].feed.experts.gate.get_value().dtype == jnp.float16
    assert isinstance(model.blocks[0].attention.o, GroupScaled)


def test_copies_of_an_expert_are_alike_in_dummy_weights_too():
    options = {"tp": 2, "ep": 2, "enable_eplb": True, "ep_num_redundant_experts": 2}
    experts = drawn("qwen3_moe", dtype="float16", **options).model.blocks[0].feed.experts
    for param in (experts.gate, experts.gate_scale, experts.gate_zero, experts.down):
        order = param.get_metadata()["order"]
        assert len(order) == param.get_value().shape[0] == 6 > len(set(order))


def drawn(family: str = "llama", quantization_config=None, **options):
    config = ServerConfig.from_keywords(model_path="x", **options)
    hf_config = config_of(family)
    hf_config["quantization_config"].update(quantization_config or {})
    return draw_on_paper(config, hf_config)


def is_kept(blueprint) -> bool:
    return any(isinstance(node, GroupScaled) for _, node in nnx.iter_graph(blueprint.model))


def test_four_bits_stay_by_default_where_a_kernel_takes_them(caplog):
    assert is_kept(drawn(dtype="bfloat16")) and is_kept(drawn(dtype="float16"))
    for why, options in (
        ("as the configuration asks", {"dequantize_weights": True}),
        ("as the configuration asks", {"quantization": "fp8"}),
        ("its kernel needs bfloat16 or float16", {"dtype": "float32"}),
        ("only those of 4 bits stay", {"quantization_config": {"bits": 8}}),
        ("permuted (act-order)", {"quantization_config": {"is_ordered": True}}),
    ):
        with caplog.at_level("INFO"):
            assert not is_kept(drawn(**options))
        assert why in caplog.text
        caplog.clear()


def test_int4_is_refused_where_nothing_can_stay_in_it():
    for message, options in (
        ("quantization=int4: only those of 4 bits stay", {"quantization_config": {"bits": 8}}),
        (
            r"quantization=int4: their inputs are permuted \(act-order\)",
            {"quantization_config": {"is_ordered": True}},
        ),
        ("quantization=int4: its kernel needs bfloat16 or float16", {"dtype": "float32"}),
    ):
        with pytest.raises(ConfigError, match=message):
            drawn(quantization="int4", **options)
    with pytest.raises(ConfigError, match="no weight has whole tiles and groups"):
        drawn(quantization_config={"group_size": 48}, quantization="int4")
    config = ServerConfig.from_keywords(model_path="x", quantization="int4")
    with pytest.raises(ConfigError, match="quantization=int4 keeps a checkpoint's own integers of 4 bits"):
        draw_on_paper(config, read_config("llama"))
