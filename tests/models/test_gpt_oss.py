"""GPT-OSS: MXFP4 experts against the numbers they stand for, and the clamped gate."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.config import ConfigError
from jaxserve.models import resolve
from jaxserve.models.gpt_oss import ClampedGate, _Every, _Mxfp4
from jaxserve.weights import load, open_checkpoint
from tests.models.tiny import Chunk, Golden, TinyEngine, read_config, read_tensors

E, D, F = 8, 32, 32
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def test_two_numbers_lie_in_a_byte_the_first_in_its_low_half_times_a_power_of_two():
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, :3] = 0x72, 0x9F, 0x10  # codes 2 and 7, 15 and 9, 0 and 1
    values = _Mxfp4(_Every(1, 0))(blocks, np.array([[128]], np.uint8))  # exponent 1
    assert values.shape == (1, 32)
    assert values[0, :6].tolist() == [2.0, 12.0, -12.0, -1.0, 0.0, 1.0]
    assert not values[0, 6:].any()


def checkpoints(tmp_path):
    """(MXFP4 file, plain file) of the recorded model with random experts of F 32."""
    rng = np.random.default_rng(0)
    config = {**read_config("gpt_oss"), "intermediate_size": F}
    packed, plain = {}, {}
    for name, tensor in read_tensors("gpt_oss").items():
        if ".experts." not in name:
            packed[name] = plain[name] = tensor
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        for part, rows in (("gate_up_proj", 2 * F), ("down_proj", D)):
            blocks = rng.integers(0, 256, (E, rows, 1, 16)).astype(np.uint8)
            exponents = rng.integers(122, 126, (E, rows, 1)).astype(np.uint8)
            packed[f"{at}{part}_blocks"], packed[f"{at}{part}_scales"] = blocks, exponents
            whole = np.stack([_Mxfp4(_Every(1, 0))(b, e) for b, e in zip(blocks, exponents)])
            plain[f"{at}{part}"] = np.ascontiguousarray(whole.transpose(0, 2, 1))
            bias = rng.normal(size=(E, rows)).astype(np.float32)
            packed[f"{at}{part}_bias"] = plain[f"{at}{part}_bias"] = bias
    for folder, tensors, extra in (("packed", packed, {"quantization_config": MXFP4}), ("plain", plain, {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, tmp_path / folder / "model.safetensors")
    return tmp_path / "packed", tmp_path / "plain"


def logits(path):
    checkpoint = open_checkpoint(path)
    model = resolve(checkpoint.config)(checkpoint.config, jnp.float32)
    load(model, checkpoint, lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda *_: None)
    prompt = Golden.read("gpt_oss").prompts[2]
    return TinyEngine(model).step([[]], [[Chunk(0, 0, prompt)]], R=0, P=48)[0][: len(prompt)]


def test_mxfp4_file_gives_the_logits_of_the_plain_file(tmp_path):
    packed, plain = checkpoints(tmp_path)
    want = logits(plain)
    assert np.isfinite(want).all() and np.abs(want).max() > 1
    np.testing.assert_array_equal(logits(packed), want)


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
