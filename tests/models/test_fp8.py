"""Checkpoints in block-scaled float8: kept, dequantised at load, and a dense file of the same numbers."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxserve.config import ConfigError
from jaxserve.layers.quant import BlockFP8, BlockScaled, Dequantize
from jaxserve.models import resolve
from jaxserve.weights import load, open_checkpoint
from tests.models.tiny import Chunk, Golden, TinyEngine, read_config, read_tensors

BLOCK = 8
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
DENSE = ("llama", "qwen3")
FAMILIES = ("deepseek_v3", "deepseek_v2_lite", "qwen3_moe", *DENSE)


def is_quantised(name, tensor):
    plain = ("embed_tokens", "lm_head", "norm", ".gate.", "bias")
    return tensor.ndim == 2 and not any(part in name for part in plain)


def quantise(tensor):
    """(float8 numbers, scales): each block's largest number becomes 448, float8's largest."""
    rows, columns = tensor.shape
    padded = np.pad(tensor, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = np.abs(blocks).max(axis=(1, 3)) / 448
    numbers = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return numbers.astype(ml_dtypes.float8_e4m3fn), scale.astype(np.float32)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoints(request, tmp_path_factory):
    """(float8 checkpoint, dense float32 checkpoint of what it stands for)."""
    config, stored, dense = read_config(request.param), {}, {}
    for name, tensor in read_tensors(request.param).items():
        if is_quantised(name, tensor):
            stored[name], stored[f"{name}_scale_inv"] = quantise(tensor)
            dense[name] = Dequantize(BlockFP8(BLOCK, BLOCK), tensor.shape)(
                stored[name], stored[f"{name}_scale_inv"]
            )
        else:
            stored[name] = dense[name] = tensor
    paths = []
    for tensors, extra in ((stored, {"quantization_config": FP8}), (dense, {})):
        path = tmp_path_factory.mktemp(request.param)
        (path / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, path / "model.safetensors")
        paths.append(path)
    return request.param, *paths


def load_model(path, **change):
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    if change:
        config = {**config, "quantization_config": {**config["quantization_config"], **change}}
    model = resolve(config)(config, jnp.float32)
    load(model, checkpoint, lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda *_: None)
    return model


def logits(model, family):
    prompt = Golden.read(family).prompts[2]
    return TinyEngine(model).step([[]], [[Chunk(0, 0, prompt)]], R=0, P=48)[0][: len(prompt)]


def test_kept_and_dequantised_weights_give_the_dense_files_logits(checkpoints):
    family, stored, dense = checkpoints
    want = logits(load_model(dense), family)
    # The products are the same numbers in the same order; only fusion differs.
    np.testing.assert_allclose(logits(load_model(stored), family), want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits(load_model(stored, dequantize=True), family), want, rtol=0, atol=1e-4)


def test_kept_weights_are_float8_on_the_device_and_dequantised_ones_are_not(checkpoints):
    family, stored, _ = checkpoints

    def float8_share(model):
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        sizes = [(leaf.dtype == jnp.float8_e4m3fn, leaf.size) for leaf in leaves]
        return sum(size for is_float8, size in sizes if is_float8) / sum(size for _, size in sizes)

    assert float8_share(load_model(stored)) > (0.5 if family == "llama" else 0.6), "tiny Llama is vocabulary"
    assert float8_share(load_model(stored, dequantize=True)) == 0


def test_router_norms_and_vocabulary_are_not_expected_in_float8(checkpoints):
    family, stored, _ = checkpoints
    model = load_model(stored)
    assert model.vocabulary.head.get_value().dtype == jnp.float32
    if family not in DENSE:
        assert model.blocks[1].feed.router.get_value().dtype == jnp.float32
    if family != "qwen3_moe":
        assert isinstance(model.blocks[0].feed.down, BlockScaled)


def test_whole_engine_on_a_mesh_gives_the_tokens_of_one_device(checkpoints, engine):
    family, stored, _ = checkpoints
    prompts = [prompt.tolist() for prompt in Golden.read(family).prompts]
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}

    def tokens(**options):
        replies = engine(str(stored), **options).generate(input_ids=prompts, sampling_params=greedy)
        return [list(reply["output_ids"]) for reply in replies]

    one = tokens()
    assert tokens(dequantize_weights=True) == one
    assert tokens(tp=4, dp_size=2, ep=1 if family in DENSE else 4, enable_dp_attention=True) == one


@pytest.mark.parametrize("checkpoints", ["deepseek_v3"], indirect=True)
def test_dense_blocks_may_lie_on_several_devices(checkpoints, engine):
    """Of 8 devices each has 2 rows of a feed-forward of 16, a quarter of a block, and a head of 20 rows."""
    family, stored, _ = checkpoints
    prompts = [prompt.tolist() for prompt in Golden.read(family).prompts]
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    one, split = (
        [
            list(reply["output_ids"])
            for reply in engine(str(stored), **options).generate(input_ids=prompts, sampling_params=greedy)
        ]
        for options in ({}, {"tp": 8, "ep": 8})
    )
    assert split == one


@pytest.mark.parametrize("checkpoints", ["deepseek_v3", "qwen3_moe"], indirect=True)
def test_experts_whose_blocks_do_not_divide_over_the_devices_are_refused_with_what_works(checkpoints, engine):
    """Two blocks of 8 rows in an expert of 16, over 8 devices."""
    _, stored, _ = checkpoints
    with pytest.raises(ConfigError, match=r"_scale_inv: dimension expert_ffn=2 .* over 8 devices.*larger ep"):
        engine(str(stored), tp=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_block_size": None}, "weight_block_size=None"),
        ({"fmt": "e5m2"}, "fmt='e5m2' is not supported; use fp8 in e4m3"),
        ({"quant_method": "hqq"}, "quant_method='hqq' is not supported for Deepseek.*quantized as fp8, AWQ"),
        ({"weight_block_size": [128, 128]}, "16 x 32 does not divide into blocks.*use --dequantize-weights"),
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_with_what_works(change, message):
    config = {**read_config("deepseek_v3"), "quantization_config": {**FP8, **change}}
    with pytest.raises(ConfigError, match=message):
        resolve(config)(config, jnp.float32)
