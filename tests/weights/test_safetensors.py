"""Hugging Face directories: what is read, and what is refused with which words."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.config import ConfigError
from jaxserve.models import resolve
from jaxserve.weights import Checkpoint, CheckpointError, open_checkpoint
from tests.weights.tiny import write_directory, write_sharded

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def test_a_directory_is_a_checkpoint_with_config_and_tokenizer_beside_it(tmp_path):
    write_directory(tmp_path, {"a": VALUES}, {"architectures": ["X"], "hidden_size": 4})
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.config == {"architectures": ["X"], "hidden_size": 4}
    assert checkpoint.generation_config == {"temperature": 0.6}
    assert checkpoint.tokenizer_dir == tmp_path
    info = checkpoint.tensors["a"]
    assert (info.shape, info.dtype, info.file.name) == ((2, 3, 4), np.float32, "model.safetensors")


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(None)),
        (slice(1, 2), slice(None), slice(None)),
        (slice(0, 0), slice(None), slice(None)),
        (slice(None), slice(1, 3), slice(None)),
        (slice(1, 2), slice(None), slice(2, None)),
    ],
)
def test_a_part_of_a_tensor_is_what_slicing_the_whole_gives(tmp_path, index):
    write_directory(tmp_path, {"first": np.ones(5, np.int8), "a": VALUES})
    got = open_checkpoint(tmp_path).read("a", index)
    np.testing.assert_array_equal(got, VALUES[index])
    assert (got.dtype == np.float32 and got.base is None) or not isinstance(got.base, np.memmap)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.int64, np.bool_, ml_dtypes.float8_e5m2])
def test_every_dtype_is_read_bit_for_bit(tmp_path, dtype):
    values = np.array([[0, 1, 2], [3, 4, 0]]).astype(dtype)
    write_directory(tmp_path, {"a": values})
    got = open_checkpoint(tmp_path).read("a")
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.view(np.uint8), values.view(np.uint8))


def test_a_scalar_tensor_is_read(tmp_path):
    write_directory(tmp_path, {"a": np.array(2.5, np.float32)})
    assert open_checkpoint(tmp_path).read("a") == 2.5


def test_shards_are_found_through_the_index(tmp_path):
    write_sharded(tmp_path, [{"a": VALUES}, {"b": VALUES + 1}])
    checkpoint = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("b"), VALUES + 1)
    assert checkpoint.tensors["a"].file.name == "model-00001-of-00002.safetensors"


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path, [{"a": VALUES}, {"b": VALUES}])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"1 of 2 shards are missing: model-00002-of-00002\.safetensors"
    ):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_index_places_in_another_shard_is_named(tmp_path):
    write_sharded(tmp_path, [{"a": VALUES}, {"b": VALUES}])
    save_file({"c": VALUES}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: tensor b is missing"):
        open_checkpoint(tmp_path)


def test_an_index_that_points_outside_its_directory_is_refused(tmp_path):
    write_sharded(tmp_path, [{"a": VALUES}])
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_checkpoint(tmp_path)


def test_a_truncated_file_is_named_with_tensor_expected_and_got_bytes(tmp_path):
    write_directory(tmp_path, {"a": VALUES})
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError,
        match=rf"safetensors: truncated at tensor a \[2, 3, 4\]: expected {size} bytes, got {size - 1}",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"abc", "truncated: 3 bytes"),
        (struct.pack("<Q", 64) + b"{}", "expected 72 bytes of header, got 10"),
        (struct.pack("<Q", 1 << 60), "not a safetensors file: header length"),
        (struct.pack("<Q", 4) + b"{]}}", "damaged safetensors header"),
        (struct.pack("<Q", 4) + b"[1] ", "damaged safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a safetensors file"),
    ],
)
def test_a_file_without_a_good_header_is_refused(tmp_path, content, message):
    write_directory(tmp_path, {"a": VALUES})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
            "tensor a has dtype F4; readable are F64, F32",
        ),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            r"tensor a F32 \[2\]: expected 8 bytes, got 4",
        ),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, r"tensor a has shape \[-1\]"),
        ({"dtype": "F32", "shape": [2]}, "damaged safetensors header"),
    ],
)
def test_a_header_entry_that_contradicts_itself_is_named(tmp_path, entry, message):
    write_directory(tmp_path, {"a": VALUES})
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "not a checkpoint: expected model.safetensors .* got config.json"),
        (["pytorch_model.bin"], "only pickled weights .*pytorch_model.bin.*safe_serialization=True"),
        (["weights.gguf"], "name the file itself: .*weights.gguf"),
        (["part.safetensors"], "got part.safetensors without an index"),
    ],
)
def test_a_directory_without_readable_weights_says_what_it_holds(tmp_path, files, message):
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json: no such file"),
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object, got list"),
    ],
)
def test_a_directory_without_a_good_config_is_refused(tmp_path, config, message):
    write_directory(tmp_path, {"a": VALUES})
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a single file must be a \.gguf"):
        open_checkpoint(tmp_path / "model.bin")


def test_a_quantization_that_another_file_tells_of_is_refused_by_name(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"]}
    write_directory(tmp_path, {"a.weight": np.ones((2, 3), np.float32)}, config)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="quant_method='modelopt' is not supported for LlamaForCausalLM"):
        resolve(open_checkpoint(tmp_path).config)
    config["quantization_config"] = {"quant_method": "fp8"}  # what config.json says counts
    write_directory(tmp_path, {"a.weight": np.ones((2, 3), np.float32)}, config)
    assert open_checkpoint(tmp_path).config == config


def test_reading_an_unknown_tensor_names_the_nearest(tmp_path):
    write_directory(tmp_path, {"model.norm.weight": VALUES})
    with pytest.raises(
        CheckpointError, match=r"tensor norm\.weight is missing \(of 1 tensors\); it has model\.norm"
    ):
        open_checkpoint(tmp_path).read("norm.weight")
