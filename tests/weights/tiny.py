"""Tiny checkpoints for the tests of this folder, written as the formats' own writers do."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_directory(path: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    """A Hugging Face directory with one safetensors file."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    return path
