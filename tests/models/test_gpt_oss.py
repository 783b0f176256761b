"""GPT-OSS: MXFP4 experts against the numbers they stand for, and the clamped gate."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.quantization import declare_model
from jaxserve.models import resolve
from jaxserve.models.gpt_oss import ClampedGate, _Every, _Widened
from jaxserve.weights import load, open_checkpoint
from tests.engine.asking import ask, golden_rows, greedy, tokens
from tests.models.tiny import Chunk, Golden, TinyEngine, read_config, read_tensors

E, D, F = 8, 32, 32
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def test_two_numbers_lie_in_a_byte_the_first_in_its_low_half_times_a_power_of_two():
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, :3] = 0x72, 0x9F, 0x10  # codes 2 and 7, 15 and 9, 0 and 1
    values = _Widened(_Every(1, 0))(blocks, np.array([[128]], np.uint8))  # exponent 1
    assert values.shape == (1, 32)
    assert values[0, :6].tolist() == [2.0, 12.0, -12.0, -1.0, 0.0, 1.0]
    assert not values[0, 6:].any()


def checkpoints(tmp_path, F=F):
    """(MXFP4 file, plain file) of the recorded model with random experts."""
    rng = np.random.default_rng(0)
    config = {**read_config("gpt_oss"), "intermediate_size": F}
    packed, plain = {}, {}
    for name, tensor in read_tensors("gpt_oss").items():
        if ".experts." not in name:
            packed[name] = plain[name] = tensor
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        for part, rows, groups in (("gate_up_proj", 2 * F, D // 32), ("down_proj", D, F // 32)):
            blocks = rng.integers(0, 256, (E, rows, groups, 16)).astype(np.uint8)
            exponents = rng.integers(122, 126, (E, rows, groups)).astype(np.uint8)
            packed[f"{at}{part}_blocks"], packed[f"{at}{part}_scales"] = blocks, exponents
            whole = np.stack([_Widened(_Every(1, 0))(b, e) for b, e in zip(blocks, exponents)])
            plain[f"{at}{part}"] = np.ascontiguousarray(whole.transpose(0, 2, 1))
            bias = rng.normal(size=(E, rows)).astype(np.float32)
            packed[f"{at}{part}_bias"] = plain[f"{at}{part}_bias"] = bias
    for folder, tensors, extra in (("packed", packed, {"quantization_config": MXFP4}), ("plain", plain, {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, tmp_path / folder / "model.safetensors")
    return tmp_path / "packed", tmp_path / "plain"


def logits(path, **stored):
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    if stored:
        config = {**config, "quantization_config": {**config["quantization_config"], **stored}}
    model = resolve(config)(config, jnp.float32)
    load(model, checkpoint, lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda *_: None)
    prompt = Golden.read("gpt_oss").prompts[2]
    return TinyEngine(model).step([[]], [[Chunk(0, 0, prompt)]], R=0, P=48)[0][: len(prompt)]


def test_mxfp4_file_gives_the_logits_of_the_plain_file(tmp_path):
    packed, plain = checkpoints(tmp_path)
    want = logits(plain)
    assert np.isfinite(want).all() and np.abs(want).max() > 1
    np.testing.assert_array_equal(logits(packed), want)


def test_experts_kept_in_four_bits_give_the_same_logits(tmp_path):
    packed, _ = checkpoints(tmp_path)
    np.testing.assert_array_equal(logits(packed, keep=True), logits(packed))


LAYOUTS = (
    {},
    {"tp": 2},
    {"tp": 4, "dp_size": 2, "enable_dp_attention": True, "ep": 4},
    {
        "tp": 2,
        "ep": 2,
        "enable_eplb": True,
        "ep_num_redundant_experts": 2,
        "eplb_rebalance_num_iterations": 4,
    },
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(layout) or "alone")
def test_engine_keeps_four_bits_and_gives_the_tokens_of_the_plain_file(tmp_path, engine, layout):
    packed, plain = checkpoints(tmp_path, F=64)
    rows = golden_rows(Golden.read("gpt_oss"))
    want = tokens(ask(engine(str(plain)), rows))
    served = engine(str(packed), quantization="mxfp4", **layout)
    assert tokens(ask(served, rows)) == want
    if not layout:
        assert served.info.weight_bytes < engine(str(packed)).info.weight_bytes


def test_experts_stay_in_four_bits_by_default_unless_devices_would_cut_groups(tmp_path, engine, caplog):
    packed, _ = checkpoints(tmp_path, F=64)
    asked = engine(str(packed), quantization="mxfp4", dtype="bfloat16").info.weight_bytes
    assert engine(str(packed), dtype="bfloat16").info.weight_bytes == asked
    assert engine(str(packed), dtype="bfloat16", dequantize_weights=True).info.weight_bytes > asked
    with caplog.at_level("INFO"):
        cut = engine(str(packed), dtype="bfloat16", tp=4)
    assert cut.info.weight_bytes > asked
    assert "widened from MXFP4 when they are loaded: 4 devices would cut a group of 32" in caplog.text


def test_experts_are_widened_at_load_where_no_kernel_takes_them(tmp_path):
    packed, _ = checkpoints(tmp_path, F=64)
    config, stored = ServerConfig(model_path=str(packed)), json.loads((packed / "config.json").read_text())
    for has_kernel, dtype in ((True, jnp.bfloat16), (False, jnp.bfloat16), (True, jnp.float16)):
        model = declare_model(config, stored, dtype, has_kernel)
        assert (model.blocks[0].feed.experts.up is None) == (has_kernel and dtype == jnp.bfloat16)


def test_random_experts_in_four_bits_give_finite_logits(tmp_path, engine):
    packed, _ = checkpoints(tmp_path)
    served = engine(str(packed), quantization="mxfp4", load_format="dummy")
    [reply] = ask(served, [greedy([5, 6, 7])], return_logprob=True)
    logprobs = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
    assert np.isfinite(logprobs).all() and len(set(reply["output_ids"])) > 1


def test_devices_that_cut_a_group_of_scales_are_refused(tmp_path, engine):
    packed, _ = checkpoints(tmp_path, F=64)
    with pytest.raises(ConfigError, match="32 numbers of MXFP4 have one; use a larger ep, or leave"):
        engine(str(packed), quantization="mxfp4", tp=4)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_four_bits_are_kept_of_checkpoints_that_have_them_alone(engine, family):
    with pytest.raises(ConfigError, match="keeps a checkpoint's own numbers in MXFP4, and this one has none"):
        engine(family, quantization="mxfp4")


def test_experts_that_do_not_fill_groups_of_scales_are_refused():
    config = {**read_config("gpt_oss"), "quantization_config": MXFP4}
    with pytest.raises(ConfigError, match="intermediate_size=16 must be multiples of 32"):
        resolve(config)(config, jnp.float32)


def test_gate_is_clamped_above_only_and_up_on_both_sides():
    act = ClampedGate(alpha=1.0, limit=2.0)

    def at(gate, up):
        return float(act(jnp.float32(gate), jnp.float32(up)))

    assert at(5, 0) == at(2, 0)
    assert at(-5, 0) == pytest.approx(-5 / (1 + np.exp(5)))
    assert at(1, 9) == at(1, 2) and at(1, -9) == at(1, -2)
