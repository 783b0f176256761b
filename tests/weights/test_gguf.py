"""GGUF files: names, layouts, dequantisation and config come back as Hugging Face has them."""

import math

import gguf
import numpy as np
import pytest

from jaxserve.weights import Checkpoint, CheckpointError, open_checkpoint
from tests.weights.tiny import LLAMA, byte_tokenizer, llama_tensors, to_gguf_names, write_gguf

TYPE = gguf.GGMLQuantizationType


def write_llama(path, tensors=None, quantise=None, **values):
    return write_gguf(
        path / "m.gguf", "llama", LLAMA | values, tensors or to_gguf_names(llama_tensors()), quantise
    )


def test_llama_tensors_come_back_under_their_names_with_rotary_rows_in_order(tmp_path):
    expected = llama_tensors()
    checkpoint = open_checkpoint(write_llama(tmp_path))
    assert isinstance(checkpoint, Checkpoint)
    assert sorted(checkpoint.tensors) == sorted(expected)
    for name, values in expected.items():
        assert checkpoint.tensors[name].shape == values.shape
        np.testing.assert_array_equal(checkpoint.read(name), values, err_msg=name)


@pytest.mark.parametrize("stem", ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"])
@pytest.mark.parametrize("rows", [slice(0, 16), slice(16, 32), slice(5, 9), slice(3, 3)])
def test_a_part_of_a_tensor_is_what_slicing_the_whole_gives(tmp_path, stem, rows):
    name = f"model.layers.1.{stem}.weight"
    checkpoint = open_checkpoint(write_llama(tmp_path, quantise=TYPE.Q8_0))
    got = checkpoint.read(name, (rows, slice(8, 40)))
    np.testing.assert_array_equal(got, checkpoint.read(name)[rows, 8:40])


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(TYPE.Q8_0, 8), (TYPE.Q5_1, 5), (TYPE.Q4_0, 4), (TYPE.Q4_1, 4), (TYPE.BF16, 8), (TYPE.F16, 11)],
)
def test_quantised_tensors_are_near_what_was_quantised(tmp_path, kind, bits):
    expected = llama_tensors()
    checkpoint = open_checkpoint(write_llama(tmp_path, quantise=kind))
    for name, values in expected.items():
        # One step of a block's range, which is at most twice the tensor's largest value.
        step = 2 * np.abs(values).max() / (2**bits - 1)
        assert np.abs(checkpoint.read(name).astype(np.float32) - values).max() <= step, name
    matrix = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert matrix.dtype.name == {TYPE.BF16: "bfloat16", TYPE.F16: "float16"}.get(kind, "float32")


@pytest.mark.parametrize("kind", [TYPE.Q2_K, TYPE.Q3_K, TYPE.Q4_K, TYPE.Q5_K, TYPE.Q6_K, TYPE.IQ4_XS])
def test_k_quants_are_dequantised_block_by_block(tmp_path, kind):
    """The package cannot write these, so random bytes stand for blocks; its dequantiser is the truth."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (8, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for key, value in LLAMA.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "k.gguf")
    got = checkpoint.read("model.layers.0.mlp.down_proj.weight", (slice(2, 5), slice(0, 2 * values)))
    np.testing.assert_array_equal(got, gguf.quants.dequantize(raw, kind)[2:5])


def test_rows_are_dequantised_the_same_in_small_steps(tmp_path, monkeypatch):
    path = write_llama(tmp_path, quantise=TYPE.Q8_0)
    whole = open_checkpoint(path).read("model.embed_tokens.weight")
    monkeypatch.setattr("jaxserve.weights.gguf_file._ROWS_BYTES", 7 * 64 * 4)
    np.testing.assert_array_equal(open_checkpoint(path).read("model.embed_tokens.weight"), whole)


def test_the_config_has_the_keys_of_hugging_face(tmp_path):
    checkpoint = open_checkpoint(write_llama(tmp_path, quantise=TYPE.Q8_0))
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "vocab_size": 288,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}


def test_an_output_tensor_unties_the_embeddings(tmp_path):
    tensors = to_gguf_names(llama_tensors()) | {"output.weight": np.ones((288, 64), np.float32)}
    checkpoint = open_checkpoint(write_llama(tmp_path, tensors))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.read("lm_head.weight").sum() == 288 * 64


def test_the_dtype_is_that_of_the_matrices(tmp_path):
    assert open_checkpoint(write_llama(tmp_path)).config["torch_dtype"] == "float32"
    assert open_checkpoint(write_llama(tmp_path, quantise=TYPE.F16)).config["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.yarn_ext_factor": -1.0,
                "rope.scaling.attn_factor": 1.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
        ({"rope.scaling.type": "none"}, None),
    ],
)
def test_rope_scaling_is_named_as_hugging_face_does(tmp_path, values, expected):
    assert open_checkpoint(write_llama(tmp_path, **values)).config["rope_scaling"] == expected


@pytest.mark.parametrize(
    "name", ["attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"]
)
def test_what_would_change_yarn_unread_is_refused(tmp_path, name):
    scaling = {"type": "yarn", "factor": 4.0, name: 0.5}
    with pytest.raises(
        CheckpointError, match=rf"rope\.scaling\.{name} is 0\.5; (0|1)\.0( or -1\.0)? is served"
    ):
        open_checkpoint(write_llama(tmp_path, **{f"rope.scaling.{key}": v for key, v in scaling.items()}))


def llama3_divisors(base, dim, factor):
    """The rule in its published form, one frequency at a time."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_rope_scaling_is_recovered_from_its_divisors(tmp_path):
    tensors = to_gguf_names(llama_tensors()) | {"rope_freqs.weight": llama3_divisors(5e5, 16, 32.0)}
    checkpoint = open_checkpoint(write_llama(tmp_path, tensors, **{"rope.freq_base": 5e5}))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_rope_divisors_are_refused(tmp_path):
    tensors = to_gguf_names(llama_tensors()) | {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight \[8\] is not Llama 3's rope scaling"):
        open_checkpoint(write_llama(tmp_path, tensors))


def test_a_window_makes_llama_a_mistral(tmp_path):
    config = open_checkpoint(write_llama(tmp_path, **{"attention.sliding_window": 32})).config
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], 32)


def test_qwen_tensors_keep_their_rows_and_have_norms_and_biases(tmp_path):
    q = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    tensors = {
        "token_embd.weight": np.ones((288, 64), np.float32),
        "blk.0.attn_q.weight": q,
        "blk.0.attn_q.bias": np.arange(64, dtype=np.float32),
        "blk.0.attn_q_norm.weight": np.full(16, 3, np.float32),
    }
    for arch, name in (("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")):
        checkpoint = open_checkpoint(write_gguf(tmp_path / f"{arch}.gguf", arch, LLAMA, tensors))
        assert checkpoint.config["architectures"] == [name]
        assert checkpoint.config["attention_bias"] is True
        np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), q)
        np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), np.arange(64))
        assert (checkpoint.read("model.layers.0.self_attn.q_norm.weight") == 3).all()


def test_llama_biases_of_q_and_k_are_reordered_as_their_rows(tmp_path):
    tensors = to_gguf_names(llama_tensors()) | {"blk.0.attn_k.bias": np.arange(32, dtype=np.float32)}
    got = open_checkpoint(write_llama(tmp_path, tensors)).read("model.layers.0.self_attn.k_proj.bias")
    even, odd = np.arange(0, 16, 2), np.arange(1, 16, 2)
    np.testing.assert_array_equal(got, np.concatenate([even, odd, 16 + even, 16 + odd]))


def test_gemma_norms_lose_the_one_that_the_converter_added(tmp_path):
    tensors = {
        "token_embd.weight": np.ones((288, 64), np.float32),
        "blk.0.attn_norm.weight": np.full(64, 1.25, np.float32),
        "blk.0.post_attention_norm.weight": np.full(64, 2.0, np.float32),
        "blk.0.ffn_norm.weight": np.full(64, 1.5, np.float32),
        "blk.0.post_ffw_norm.weight": np.full(64, 0.5, np.float32),
    }
    values = LLAMA | {"attention.key_length": 32, "attention.sliding_window": 16, "block_count": 7}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "g.gguf", "gemma3", values, tensors))
    at = "model.layers.0."
    assert {name: checkpoint.read(name)[0] for name in checkpoint.tensors if name.startswith(at)} == {
        f"{at}input_layernorm.weight": 0.25,
        f"{at}post_attention_layernorm.weight": 1.0,
        f"{at}pre_feedforward_layernorm.weight": 0.5,
        f"{at}post_feedforward_layernorm.weight": -0.5,
    }
    config = checkpoint.config
    assert (config["head_dim"], config["query_pre_attn_scalar"], config["sliding_window"]) == (32, 32, 16)
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5]


def test_end_of_turn_tokens_end_generation_too(tmp_path):
    tokenizer = byte_tokenizer() | {"ggml.eos_token_id": 0}
    path = write_gguf(tmp_path / "e.gguf", "llama", LLAMA, to_gguf_names(llama_tensors()), None, tokenizer)
    assert open_checkpoint(path).generation_config["eos_token_id"] == [0, 2]


# ---- what is refused ----


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf", "mamba", LLAMA, {"token_embd.weight": np.ones((4, 64), np.float32)}
    )
    with pytest.raises(CheckpointError, match="'mamba' is not known; known are llama, qwen2, qwen3, gemma3"):
        open_checkpoint(path)


def test_experts_are_refused_by_name(tmp_path):
    values = {**LLAMA, "expert_count": 8}
    path = write_gguf(tmp_path / "x.gguf", "llama", values, to_gguf_names(llama_tensors()))
    with pytest.raises(CheckpointError, match="llama with 8 experts is not read from GGUF"):
        open_checkpoint(path)


def test_a_missing_metadata_key_is_named(tmp_path):
    values = {key: value for key, value in LLAMA.items() if key != "block_count"}
    path = write_gguf(tmp_path / "x.gguf", "llama", values, to_gguf_names(llama_tensors()))
    with pytest.raises(CheckpointError, match=r"metadata key llama\.block_count is missing"):
        open_checkpoint(path)


def test_a_truncated_file_is_named_with_tensor_expected_and_got_bytes(tmp_path):
    path = write_llama(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-4096])
    with pytest.raises(
        CheckpointError, match=rf"truncated at tensor blk\.1\.\w+\.weight .* got {len(content) - 4096}"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 10, 23, 30, 200, 2000])
def test_a_cut_header_is_refused(tmp_path, keep):
    path = write_llama(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf: (damaged or )?truncated"):
        open_checkpoint(path)


def test_every_single_damaged_byte_of_the_first_kilobyte_is_refused_or_harmless(tmp_path):
    path = write_llama(tmp_path)
    content = path.read_bytes()
    for at in range(0, 1024, 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            assert "m.gguf" in str(error)


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file: it begins with"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(100))
    with pytest.raises(CheckpointError, match="little-endian"):
        open_checkpoint(path)


def test_a_part_of_a_split_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_uint16("split.no", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="part 2 of a GGUF split in 3"):
        open_checkpoint(tmp_path / "s.gguf")


def test_a_type_that_cannot_be_dequantised_is_named_with_those_that_can(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 2 * 40), np.uint8), raw_dtype=TYPE.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"token_embd\.weight is Q8_1, .* use one of BF16, F16, .* Q8_0"
    ):
        open_checkpoint(tmp_path / "q.gguf")
