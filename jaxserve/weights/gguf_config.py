"""GGUF metadata as the keys of a Hugging Face `config.json` and `generation_config.json`."""

import math
from typing import Any

import numpy as np

from jaxserve.weights.checkpoint import CheckpointError
from jaxserve.weights.gguf_file import GGUFFile

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}

# Control tokens that end a turn. Chat models list one as the end of turn beside the end of text.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
_CONTROL = 3
_GEMMA3_27B_LAYERS = 62

# Values of YaRN that mean what its paper says, the default first; -1 leaves it to the reader.
_YARN_SERVED: dict[str, tuple[float, ...]] = {
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_log_multiplier": (0.0,),
}


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The model's configuration. Raises CheckpointError for an unknown architecture or a missing key."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: GGUF architecture {arch!r} is not known; known are {', '.join(ARCHITECTURES)}"
        )
    get = _Getter(file, arch)
    if experts := get("expert_count", 0):
        raise CheckpointError(
            f"{file.path}: {arch} with {experts} experts is not read from GGUF; use safetensors"
        )
    hidden, heads = get("embedding_length"), get("attention.head_count")
    window = get("attention.sliding_window", None)
    class_name, model_type = ARCHITECTURES[arch]
    if arch == "llama" and window:
        class_name, model_type = "MistralForCausalLM", "mistral"
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "vocab_size": _vocab_size(file),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 1_000_000.0 if arch == "gemma3" else 10_000.0),
        "rope_scaling": _rope_scaling(file, get, hidden // heads),
        "hidden_act": "silu",
        "attention_bias": arch == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _dtype_name(file),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(file),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if arch == "gemma3":
        config |= _gemma3(config, window)
    elif window:
        config["sliding_window"] = window
    return config


def generation_config_of(file: GGUFFile) -> dict[str, Any]:
    """Only what a GGUF file says: the special ids. It has no sampling defaults."""
    ids = {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(file),
    }
    return {key: value for key, value in ids.items() if value is not None}


class _Getter:
    """Looks up `<arch>.<key>`; float32 values come back as the decimal that was written."""

    def __init__(self, file: GGUFFile, arch: str):
        self.file, self.arch = file, arch

    def __call__(self, key: str, *default: Any) -> Any:
        name = f"{self.arch}.{key}"
        value = self.file.metadata.get(name)
        if value is None:
            if not default:
                raise CheckpointError(f"{self.file.path}: metadata key {name} is missing")
            return default[0]
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(
                    f"{self.file.path}: metadata key {name} differs between layers; one value is served"
                )
            value = value[0]
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _vocab_size(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _dtype_name(file: GGUFFile) -> str:
    """The dtype of the layers' matrices; bfloat16 where they are quantised."""
    stored = file.tensors.get("blk.0.attn_q.weight")
    return "bfloat16" if stored is None or stored.is_quantised else stored.dtype.name


def _eos_token_ids(file: GGUFFile) -> int | list[int] | None:
    metadata = file.metadata
    ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    found = [i for i in ids if i is not None]
    types = metadata.get("tokenizer.ggml.token_type", [])
    for token_id, (token, kind) in enumerate(zip(metadata.get("tokenizer.ggml.tokens", []), types)):
        if kind == _CONTROL and token in _END_OF_TURN:
            found.append(token_id)
    unique = list(dict.fromkeys(found))
    return None if not unique else unique[0] if len(unique) == 1 else unique


def _rope_scaling(file: GGUFFile, get: _Getter, default_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, get, default_dim)
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    if kind == "yarn":
        for name, served in _YARN_SERVED.items():
            key = f"rope.scaling.{name}"
            if (given := get(key, served[0])) not in served:
                raise CheckpointError(
                    f"{file.path}: metadata key {get.arch}.{key} is {given}; "
                    f"{' or '.join(map(str, served))} is served"
                )
        betas = {beta: get(f"rope.scaling.yarn_{beta}", None) for beta in ("beta_fast", "beta_slow")}
        return {
            "rope_type": "yarn",
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get(
                "rope.scaling.original_context_length", get("context_length")
            ),
            **{beta: value for beta, value in betas.items() if value is not None},
        }
    raise CheckpointError(f"{file.path}: rope scaling {kind!r} is not known; known are none, linear, yarn")


def _llama3_rope(file: GGUFFile, get: _Getter, default_dim: int) -> dict[str, Any]:
    """Llama 3's scaling is stored as its effect: one divisor a frequency.

    The parameters are recovered (every Llama 3.1 to 3.3 has low 1, high 4, original length 8192)
    and must reproduce the stored divisors.
    Source: Llama 3.1's frequency rule (wavelengths above original/low are divided by the factor,
    those below original/high kept, between them interpolated).
    """
    stored = file.tensors["rope_freqs.weight"].read_rows(0, 1)[0].astype(np.float64)
    factor, low, high, original = float(f"{stored.max():.6g}"), 1.0, 4.0, 8192
    dim = get("rope.dimension_count", get("attention.key_length", default_dim))
    wavelength = 2 * math.pi * get("rope.freq_base", 10_000.0) ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    divisor = 1 / ((1 - smooth) / factor + smooth)
    if divisor.shape != stored.shape or np.abs(divisor / stored - 1).max() > 1e-3:
        raise CheckpointError(
            f"{file.path}: tensor rope_freqs.weight {list(stored.shape)} is not Llama 3's rope scaling "
            f"(factor {factor}, low {low}, high {high}, original length {original}, {dim} dimensions)"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _gemma3(config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Gemma 3's constants that the file leaves to the reader: every sixth layer attends globally."""
    layers = config["num_hidden_layers"]
    # 27B alone scales queries by the hidden size a head, not the head width.
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "query_pre_attn_scalar": per_head if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": 6,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
        "rope_local_base_freq": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
