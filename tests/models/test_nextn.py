"""The layer for multi-token prediction: its logits, and what is said where there is none."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from jaxserve.config import ConfigError
from jaxserve.models import declare
from jaxserve.weights import CheckpointError, load, open_checkpoint
from tests.models.tiny import Chunk, TinyEngine, fill, read_config, read_tensors
from tools.tiny_deepseek import Shape, TinyDeepseek


class Guesses(TinyEngine):
    """Gives the layer's logits in place of the model's."""

    def logits(self, model, token_T, step):
        hidden_TD = model(token_T, step)
        return model.logits(model.next_token(jnp.roll(token_T, -1), hidden_TD, step))


def test_layer_gives_the_logits_of_the_training_code():
    """Written apart, for whole sequences, after the technical report: no cache, unabsorbed attention."""
    shape = Shape(vocab=320, hidden=32, dense_ffn=48, expert_ffn=16, layers=1, heads=4, q_rank=24, kv_rank=16)
    trained = TinyDeepseek(shape, nnx.Rngs(1))
    trained.enorm.weight[...] = jnp.linspace(0.5, 1.5, 32)  # that norms and halves are told apart
    trained.hnorm.weight[...] = jnp.linspace(1.5, 0.7, 32)
    trained.mtp_norm.weight[...] = jnp.linspace(0.6, 1.4, 32)
    served = declare(shape.hf_config(), jnp.float32, with_nextn=True)
    fill(served, {name: np.asarray(x, np.float32) for name, x in trained.hf_tensors().items()})
    token_T = np.random.default_rng(0).integers(0, 256, 40)
    guess = nnx.jit(lambda model, token_BT: model(token_BT, 100.0)[1])  # room for every token at any expert
    want_BTV = guess(trained, jnp.asarray(token_T[None]))
    [got_TV] = Guesses(served).step([[]], [[Chunk(0, 0, token_T)]], R=4, P=48)
    np.testing.assert_allclose(got_TV[4 : 4 + 39], want_BTV[0], atol=1e-4)


def one_device(_):
    return SingleDeviceSharding(jax.devices()[0])


def test_missing_layer_is_told_with_file_and_tensor(tmp_path):
    config = {**read_config("deepseek_v3"), "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(read_tensors("deepseek_v3"), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    model = declare(checkpoint.config, jnp.float32, with_nextn=True)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.2\.\S+ is missing") as error:
        load(model, checkpoint, one_device, lambda *_: None)
    assert str(tmp_path) in str(error.value)
    load(declare(checkpoint.config, jnp.float32), checkpoint, one_device, lambda *_: None)


@pytest.mark.parametrize(
    "family, change, message",
    [
        (
            "deepseek_v3",
            {"num_nextn_predict_layers": 0},
            "num_nextn_predict_layers=0 says that this checkpoint",
        ),
        ("deepseek_v3", {"num_nextn_predict_layers": None}, "num_nextn_predict_layers=None says"),
        ("glm4_moe", {}, "no layer for multi-token prediction is served of Glm4MoeForCausalLM, only of Deep"),
    ],
)
def test_model_without_the_layer_is_refused(family, change, message):
    with pytest.raises(ConfigError, match=message):
        declare({**read_config(family), **change}, jnp.float32, with_nextn=True)
