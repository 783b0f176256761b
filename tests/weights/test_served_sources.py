"""One model from every kind of `--model-path`, through the whole engine: the recorded tokens."""

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.asking import Golden, ask, check_greedy, golden_rows
from tests.models.tiny import read_config, read_tensors
from tests.text import tiny_tokenizer
from tests.weights.test_hub import hub  # noqa: F401  (a fixture)
from tests.weights.tiny import byte_tokenizer, to_gguf_names, write_gguf
from tools import convert_checkpoint

GOLDEN = Golden.read("llama")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The recorded tiny Llama with a tokenizer beside it."""
    shutil.copytree(Path(__file__).parents[1] / "golden" / "llama", tmp_path / "llama")
    tiny_tokenizer.write(tmp_path / "llama")
    return tmp_path / "llama"


def check_served(engine, path) -> None:
    served = engine(str(path), skip_tokenizer_init=False)
    check_greedy(GOLDEN, ask(served, golden_rows(GOLDEN)))
    [token] = served.generate(prompt="e", sampling_params={"max_new_tokens": 1})["output_ids"]
    assert 0 <= token < served.info.vocab_size


def test_hub_id_is_served(engine, hub, directory):  # noqa: F811
    hub.files = {entry.name: entry.read_bytes() for entry in directory.iterdir()}
    check_served(engine, "acme/tiny")
    assert "model.safetensors" in hub.fetched and "golden.npz" not in hub.fetched


def test_converted_directory_is_served(engine, directory, tmp_path):
    assert convert_checkpoint.main(["--from", str(directory), "--to", str(tmp_path / "converted")]) == 0
    check_served(engine, tmp_path / "converted")


@pytest.mark.parametrize("convert", [False, True], ids=["as it is", "converted"])
def test_gguf_file_is_served(engine, tmp_path, convert):
    config = read_config("llama")
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": 10000.0,
    }
    tensors = read_tensors("llama")
    head = tensors.pop("lm_head.weight")
    named = {**to_gguf_names(tensors), "output.weight": head}
    pairs = [f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"]
    tokenizer = byte_tokenizer(merges=pairs[: config["vocab_size"] - 259])  # 256 bytes, 3 special tokens
    path = write_gguf(tmp_path / "llama.gguf", "llama", values, named, tokenizer=tokenizer)
    if convert:
        assert convert_checkpoint.main(["--from", str(path), "--to", str(tmp_path / "converted")]) == 0
        path = tmp_path / "converted"
        assert json.loads((path / "config.json").read_text())["vocab_size"] == config["vocab_size"]
    check_served(engine, path)
