"""What is DeepSeek's own: extra layers in checkpoints, groups of experts, what is refused."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.config import ConfigError
from jaxserve.models import resolve
from jaxserve.weights import load, open_checkpoint
from tests.models.tiny import read_config, read_tensors


def load_from(path):
    checkpoint = open_checkpoint(path)
    model = resolve(checkpoint.config)(checkpoint.config, jnp.float32)
    load(model, checkpoint, lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda *_: None)


@pytest.mark.parametrize("extra_layers, warnings", [(1, 0), (0, 1)])
def test_prediction_layers_are_left_out_without_a_warning_when_the_config_names_them(
    tmp_path, caplog, extra_layers, warnings
):
    config = {**read_config("deepseek_v3"), "num_nextn_predict_layers": extra_layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    extra = {
        "model.layers.2.eh_proj.weight": np.zeros((32, 64), np.float32),
        "model.layers.2.mlp.experts.0.gate_proj.weight": np.zeros((16, 32), np.float32),
    }
    save_file({**read_tensors("deepseek_v3"), **extra}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_from(tmp_path)
    assert len(caplog.records) == warnings


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("deepseek_v3", {"n_group": 3}, "n_group=3 must divide the 8 experts"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 5}, "topk_group=5 lie in 1..4"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
        ("deepseek_v2", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
    ],
)
def test_unsupported_value_is_refused_with_key_and_value(family, change, message):
    config = {**read_config(family), **change}
    with pytest.raises(ConfigError, match=message):
        resolve(config)(config, jnp.float32)


def test_yarn_moves_the_scale_of_scores_and_not_only_the_rotation():
    config = read_config("deepseek_v2")
    scale = resolve(config)(config, jnp.float32).blocks[0].attention.scale
    temperature = 0.1 * 1.2 * np.log(8.0) + 1  # mscale_all_dim 1.2, factor 8
    assert scale == pytest.approx(20**-0.5 * temperature**2)
