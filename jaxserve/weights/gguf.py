"""GGUF files as checkpoints: Hugging Face names, layouts and config, tensor by tensor.

What llama.cpp's converters change is undone on reading: names; the rotary rows of llama's q and k
(stored interleaved, Hugging Face keeps halves); gemma's norm scales (stored as 1 + w).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.weights.checkpoint import CheckpointError, Index, TensorInfo, find_tensor, full_index
from jaxserve.weights.gguf_config import config_of, generation_config_of
from jaxserve.weights.gguf_file import StoredTensor, read_gguf
from jaxserve.weights.gguf_tokenizer import tokenizer_directory

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<kind>weight|bias)")


class GGUFCheckpoint:
    """One `.gguf` file. Quantised tensors read as float32; others keep their dtype."""

    def __init__(self, path: Path):
        self.path = path
        self._file = read_gguf(path)
        metadata = self._file.metadata
        if metadata.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{path}: part {metadata.get('split.no', 0) + 1} of a GGUF split in "
                f"{metadata['split.count']}; merge the parts into one file first"
            )
        self.config: dict[str, Any] = config_of(self._file)
        self.generation_config = generation_config_of(self._file)
        self._arch = metadata["general.architecture"]
        self._tokenizer_dir: Path | None = None
        self._stored: dict[str, StoredTensor] = {}
        for stored in self._file.tensors.values():
            if stored.name != "rope_freqs.weight":  # in the config as rope_scaling
                self._stored[hugging_face_name(self._arch, stored.name)] = stored
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, stored.shape, stored.dtype, path) for name, stored in self._stored.items()
        }

    @property
    def tokenizer_dir(self) -> Path:
        """Written from the metadata into the user's cache directory the first time."""
        if self._tokenizer_dir is None:
            self._tokenizer_dir = tokenizer_directory(self._file, self.config)
        return self._tokenizer_dir

    def is_quantised(self, name: str) -> bool:
        return self._stored[name].is_quantised

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        info = find_tensor(self.tensors, name, self.path)
        first, *inner = full_index(info.shape, index)
        stored = self._stored[name]
        if len(info.shape) == 1:
            out = stored.read_rows(0, 1)[0]
            if (heads := self._rotary_heads(name)) is not None:
                out = out[_interleaved_rows(info.shape[0], heads)]
            out = out[first]
        else:
            lead = stored.num_rows // info.shape[0]
            if (heads := self._rotary_heads(name)) is not None:
                rows = _interleaved_rows(info.shape[0], heads)[first]
                low, high = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
                out = stored.read_rows(low, high)[rows - low]
            else:
                out = stored.read_rows(first.start * lead, first.stop * lead)
            out = out.reshape(first.stop - first.start, *info.shape[1:])[(slice(None), *inner)]
        if self._arch == "gemma3" and name.endswith("norm.weight"):
            out = out - np.ones((), out.dtype)
        return out

    def _rotary_heads(self, name: str) -> int | None:
        """Heads of a tensor whose rows are stored interleaved; None where they are not."""
        if self._arch != "llama":
            return None
        if ".q_proj." in name:
            return self.config["num_attention_heads"]
        if ".k_proj." in name:
            return self.config["num_key_value_heads"]
        return None


def hugging_face_name(arch: str, name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one is kept, and so reported as unused."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    stem = match["stem"]
    if match["layer"] is None:
        return f"{_TOP[stem]}.{match['kind']}" if stem in _TOP else name
    known = _BLOCK | _BLOCK_NORMS.get(arch, _BLOCK_NORMS["llama"])
    return f"model.layers.{match['layer']}.{known[stem]}.{match['kind']}" if stem in known else name


def _interleaved_rows(num_rows: int, num_heads: int) -> np.ndarray:
    """stored row of each Hugging Face row: pairs (i, i + K/2) of a head are stored side by side."""
    half = num_rows // num_heads // 2
    return np.arange(num_rows).reshape(num_heads, half, 2).swapaxes(1, 2).reshape(-1)
