"""Tiny checkpoints for tests, written as the formats' own writers do."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

LLAMA = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}


def write_directory(path: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    """A Hugging Face directory with one safetensors file."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    return path


def write_sharded(path: Path, shards: list[dict[str, np.ndarray]]) -> Path:
    """A Hugging Face directory with an index and one file a shard."""
    path.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return path


def llama_tensors(layers: int = 2, hidden: int = 64, ffn: int = 96, vocab: int = 288, seed: int = 0):
    """Hugging Face tensors of a llama with 4 query heads and 2 key/value heads of width 16."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32) / 8

    tensors = {"model.embed_tokens.weight": draw(vocab, hidden), "model.norm.weight": draw(hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (64, hidden),
            "self_attn.k_proj": (32, hidden),
            "self_attn.v_proj": (32, hidden),
            "self_attn.o_proj": (hidden, 64),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            tensors[f"{at}.{name}.weight"] = draw(*shape)
    return tensors


def write_gguf(
    path: Path,
    arch: str,
    values: dict,
    tensors: dict[str, np.ndarray],
    quantise: gguf.GGMLQuantizationType | None = None,
    tokenizer: dict | None = None,
) -> Path:
    """A GGUF file of tensors under their GGUF names; matrices are quantised when a type is given."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](f"{arch}.{key}", value)
    for key, value in (tokenizer or byte_tokenizer()).items():
        add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.{key}", value)
    for name, array in tensors.items():
        if quantise is None or array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_characters() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, in byte order (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(b if b in kept else next(shifted)) for b in range(256)]


def byte_tokenizer(pre: str = "gpt-2", merges: list[str] | None = None) -> dict:
    """Tokenizer metadata: three special tokens, every byte, then one token a merge."""
    merges = merges or ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_characters()]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "ggml.merges": merges,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.padding_token_id": 2,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def to_gguf_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a converter makes of llama_tensors: GGUF names, q and k rows interleaved a head."""
    stems = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    out = {}
    for name, array in tensors.items():
        top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        if name in top:
            out[top[name]] = array
            continue
        _, _, layer, stem = name.removesuffix(".weight").split(".", 3)
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(stem)
        if heads:
            half = array.shape[0] // heads // 2
            rows = []
            for head in range(heads):
                for i in range(half):
                    rows += [2 * half * head + i, 2 * half * head + half + i]
            array = array[rows]
        out[f"blk.{layer}.{stems[stem]}.weight"] = array
    return out
