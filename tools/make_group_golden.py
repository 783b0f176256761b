"""Record goldens of checkpoints in integer groups, as `make_golden.py` does of others.

Run once, with an environment that has torch (CPU), transformers, gptqmodel and compressed-tensors:

    python tools/make_group_golden.py [--out tests/golden/groups] [NAME ...]

Each tiny checkpoint is rounded here, and packed and unpacked by the library that made the format, in
float32: GPTQModel's linear layer (GPTQ) and functions (AWQ, as AutoAWQ's), compressed-tensors' compressor.
What it unpacked is given to transformers as a plain model: GPTQModel's layers compute in 16 bits (logits
lie 0.01 off), and transformers 5.24 with compressed-tensors 0.20 does not load packed zeros; run as it is,
`llama_packed` gives the very logits that are recorded.
Rows of one sign make zeros of 0 and of the largest code, which GPTQ's first format stores as -1 and one less.
"""

# pyright: reportMissingImports=false

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from make_golden import COMMON, continue_greedily, forward, spread_weights
from safetensors.torch import load_file, save_file

PROMPT_LENS = (1, 16, 33)
TINY = {**COMMON, "vocab_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 128}
FAMILIES = {
    "llama": (transformers.LlamaConfig, TINY),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            **TINY,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
}
GROUP = 32
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}


def packed(**weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


QUANTIZATIONS = {
    "awq": AWQ,
    "gptq": {**GPTQ, "sym": True, "checkpoint_format": "gptq"},
    "gptq_zeros": {**GPTQ, "checkpoint_format": "gptq"},
    "gptq_v2_ordered": {**GPTQ, "checkpoint_format": "gptq_v2", "desc_act": True},
    "gptq_8bit": {**GPTQ, "bits": 8, "group_size": -1},
    "packed": packed(symmetric=True),
    "packed_zeros": packed(symmetric=False),
    "packed_8bit": packed(symmetric=False, num_bits=8, strategy="channel", group_size=None),
}
NAMES = (
    *(f"llama_{kind}" for kind in QUANTIZATIONS),
    *(f"qwen3_moe_{kind}" for kind in ("awq", "gptq_zeros", "packed")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record goldens of checkpoints in integer groups.")
    parser.add_argument("--out", type=Path, default=Path("tests/golden/groups"))
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(NAMES)}; default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    for name in arguments.names or NAMES:
        record(name, arguments.out / name)


def record(name: str, folder: Path) -> None:
    family = next(family for family in FAMILIES if name.startswith(family))
    config_class, options = FAMILIES[family]
    quantization = QUANTIZATIONS[name.removeprefix(f"{family}_")]
    torch.manual_seed(sum(map(ord, name)))
    config = config_class(**options)
    with tempfile.TemporaryDirectory() as plain:
        tensors = random_tensors(config, plain)
        stored, wide = {}, {}
        for key, tensor in tensors.items():
            if not key.endswith("_proj.weight"):
                stored[key], wide[key] = tensor.half(), tensor
                continue
            parts, wide[key] = quantise(tensor, quantization)
            stored |= {f"{key.removesuffix('.weight')}.{part}": array for part, array in parts.items()}
        save_file(wide, f"{plain}/model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        folder.mkdir(exist_ok=True, parents=True)
        save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
        text = json.loads(Path(plain, "config.json").read_text())
        text |= {"dtype": "float16", "quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n")
    write_golden(name, folder, model)


def random_tensors(config: Any, folder: str) -> dict[str, torch.Tensor]:
    """By the names of checkpoints, in numbers that float16 has; config.json is left in `folder`."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    spread_weights(model)
    model.save_pretrained(folder)
    return {key: tensor.half().float() for key, tensor in load_file(f"{folder}/model.safetensors").items()}


def write_golden(name: str, folder: Path, model: torch.nn.Module) -> None:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, model.config.vocab_size, length) for length in PROMPT_LENS]
    prompt_NT = np.full((len(prompts), max(PROMPT_LENS)), -1, np.int32)
    for row, prompt in zip(prompt_NT, prompts, strict=True):
        row[: len(prompt)] = prompt
    greedy, margins = zip(*(continue_greedily(model, prompt) for prompt in prompts), strict=True)
    np.savez_compressed(
        folder / "golden.npz",
        prompt_NT=prompt_NT,
        logits_XV=np.concatenate([forward(model, prompt) for prompt in prompts]),
        greedy_NO=np.array(greedy, np.int32),
        margin_NO=np.array(margins, np.float32),
        made_with=np.array(f"transformers {transformers.__version__}, torch {torch.__version__}"),
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{name}: {size / 1000:.0f} kB, margin min {np.min(margins):.4f}, "
        f"distinct greedy tokens {len(np.unique(greedy))}"
    )


def quantise(
    weight_NK: torch.Tensor, quantization: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What is stored of a weight, and what the format's library makes of that in float32."""
    if quantization["quant_method"] == "compressed-tensors":
        weights = quantization["config_groups"]["group_0"]["weights"]
        bits, group, symmetric = weights["num_bits"], weights["group_size"] or -1, weights["symmetric"]
    else:
        bits, group, symmetric = (quantization.get(key, False) for key in ("bits", "group_size", "sym"))
    K = weight_NK.shape[1]
    group_K = torch.arange(K) // (K if group == -1 else group)
    if quantization.get("desc_act"):
        group_K = group_K[torch.randperm(K)]
    if not symmetric:
        weight_NK = weight_NK.clone()
        weight_NK[3::8], weight_NK[5::8] = weight_NK[3::8].abs(), -weight_NK[5::8].abs()
    scale_NG, zero_NG = choose(weight_NK, group_K, bits, symmetric)
    scale_NK, zero_NK = scale_NG[:, group_K], zero_NG[:, group_K]
    code_NK = (torch.round(weight_NK / scale_NK) + zero_NK).clamp(0, 2**bits - 1)
    match quantization["quant_method"]:
        case "awq":
            return by_awq(code_NK, scale_NG, zero_NG, group)
        case "gptq":
            return by_gptq((code_NK - zero_NK) * scale_NK, scale_NG, zero_NG, group_K, quantization)
    return by_compressed_tensors((code_NK - zero_NK) * scale_NK, scale_NG, zero_NG, bits, weights)


def choose(
    weight_NK: torch.Tensor, group_K: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales in numbers that float16 has, zeros) [N, G] that cover the weights of each group."""
    groups = [weight_NK[:, group_K == number] for number in range(int(group_K.max()) + 1)]
    low = torch.stack([group.amin(1).clamp(max=0) for group in groups], 1)
    high = torch.stack([group.amax(1).clamp(min=0) for group in groups], 1)
    if symmetric:
        scale = torch.maximum(-low, high) * 2 / (2**bits - 1)
        return scale.half().float(), torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def by_awq(code_NK, scale_NG, zero_NG, group: int):
    qweight, qzeros = pack_awq(code_NK.T.int(), zero_NG.T.int(), 4)
    scale_GN = scale_NG.T.contiguous()
    wide_KN = dequantize_gemm(qweight, qzeros, scale_GN, 4, group)
    assert wide_KN.dtype == torch.float32
    return {"qweight": qweight, "qzeros": qzeros, "scales": scale_GN.half()}, wide_KN.T.contiguous()


def by_gptq(wide_NK, scale_NG, zero_NG, group_K, quantization):
    N, K = wide_NK.shape
    keys = ("bits", "group_size", "sym", "desc_act")
    is_first = quantization.get("checkpoint_format", "gptq") == "gptq"
    layer = TorchLinear(
        **{key: quantization[key] for key in keys},
        in_features=K,
        out_features=N,
        format=FORMAT.GPTQ if is_first else FORMAT.GPTQ_V2,
    )
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = wide_NK
    layer.pack_original(linear, scale_NG, zero_NG, group_K.int())
    if is_first:
        convert_gptq_v2_to_v1_format_module(layer, layer)
    parts = {part: getattr(layer, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
    if is_first:
        convert_gptq_v1_to_v2_format_module(layer, layer.bits, layer.pack_dtype)
    layer.scales = layer.scales.float()
    return parts, layer.dequantize_weight().detach().T.contiguous()


def by_compressed_tensors(wide_NK, scale_NG, zero_NG, bits: int, weights: dict[str, Any]):
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    parts = {"weight": wide_NK, "weight_scale": scale_NG}
    parts["weight_zero_point"] = (zero_NG - 2 ** (bits - 1)).to(torch.int8)
    stored = PackedQuantizationCompressor.compress(parts, scheme)
    wide_NK = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert wide_NK.dtype == torch.float32
    return {**stored, "weight_scale": scale_NG.half()}, wide_NK.contiguous()


if __name__ == "__main__":
    main()
