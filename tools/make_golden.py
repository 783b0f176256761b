"""Record goldens: tiny random checkpoints and what the reference implementation computes from them.

Run once, with an environment that has torch (CPU) and transformers; the product never imports this:

    python tools/make_golden.py [--out tests/golden] [FAMILY ...]

For each family it writes `config.json` and `model.safetensors` as `save_pretrained` does, and
`golden.npz`:

    prompt_NT     int32, padded with -1; row i is prompt i
    logits_XV     float32, logits of every prompt position, prompts joined
    greedy_NO     int32, greedy continuation of each prompt
    margin_NO     float32, top-1 minus top-2 logit of each greedy step

and, for all of them, `rope.json`: frequencies of rope settings that no tiny model covers.
Deterministic for one version of torch and transformers, which each npz names.
"""

# pyright: reportMissingImports=false
# torch and transformers are not among the project's dependencies, on purpose.

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PROMPT_LENS = (1, 16, 33, 120)
NUM_GREEDY = 24
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama3_tied": (
        transformers.LlamaConfig,
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 24}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "num_attention_heads": 4,
            "sliding_window": 20,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}
# Experts that eight devices can share, and heads that a group of eight can.
MOE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": False,
}
MLA = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.2,
}
FAMILIES |= {
    "mixtral": (transformers.MixtralConfig, {**MOE, "num_local_experts": 8}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {
            **MOE,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 24,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**MOE, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 8, "norm_topk_prob": True},
    ),
    "deepseek_v2_lite": (
        transformers.DeepseekV2Config,
        {**MOE, **MLA, "q_lora_rank": None, "n_shared_experts": 2},
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        {
            **MOE,
            **MLA,
            "q_lora_rank": 24,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
            "rope_parameters": YARN,
        },
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
            **MOE,
            **MLA,
            "q_lora_rank": 24,
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "kimi_k2": (
        transformers.DeepseekV3Config,
        {
            **MOE,
            **MLA,
            "q_lora_rank": 24,
            "n_routed_experts": 16,
            "moe_intermediate_size": 8,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "minimax_m2": (
        transformers.MiniMaxM2Config,
        {**MOE, "num_local_experts": 8, "head_dim": 8, "num_experts_per_tok": 3, "rotary_dim": 4},
    ),
    "minimax_text": (
        transformers.MiniMaxConfig,
        {
            **MOE,
            "vocab_size": 320,
            "num_hidden_layers": 4,
            "num_local_experts": 8,
            "head_dim": 8,
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
            "block_size": 8,
            "full_attn_alpha_factor": 1.4,
            "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 1.2,
            "linear_attn_beta_factor": 1.1,
            "mlp_alpha_factor": 0.9,
            "mlp_beta_factor": 1.3,
        },
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        {
            **MOE,
            "n_routed_experts": 8,
            "head_dim": 16,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.5,
            "num_nextn_predict_layers": 1,
        },
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            **MOE,
            "num_local_experts": 8,
            "head_dim": 8,
            "sliding_window": 20,
            "swiglu_limit": 2.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "truncate": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Record goldens with torch and transformers.")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    parser.add_argument("families", nargs="*", default=[], help=f"of {', '.join(FAMILIES)}; default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    for name in arguments.families or FAMILIES:
        record(name, arguments.out / name)
    (arguments.out / "rope.json").write_text(json.dumps(ropes(), indent=1) + "\n")


# Where the usual seed gives a greedy step that rounding could decide.
OTHER_SEED = {"qwen3_moe": 5, "kimi_k2": 1, "minimax_text": 3}


def record(name: str, folder: Path) -> None:
    config_class, options = FAMILIES[name]
    config = config_class(**{**COMMON, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(OTHER_SEED.get(name, sum(map(ord, name))))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spread_weights(model)

    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, config.vocab_size, length) for length in PROMPT_LENS]
    prompt_NT = np.full((len(prompts), max(PROMPT_LENS)), -1, np.int32)
    logits, greedy, margins = [], [], []
    for row, prompt in zip(prompt_NT, prompts, strict=True):
        row[: len(prompt)] = prompt
        logits.append(forward(model, prompt))
        tokens, step_margins = continue_greedily(model, prompt)
        greedy.append(tokens)
        margins.append(step_margins)
    margin_NO = np.array(margins, np.float32)
    np.savez_compressed(
        folder / "golden.npz",
        prompt_NT=prompt_NT,
        logits_XV=np.concatenate(logits),
        greedy_NO=np.array(greedy, np.int32),
        margin_NO=margin_NO,
        made_with=np.array(f"transformers {transformers.__version__}, torch {torch.__version__}"),
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{name}: {size / 1000:.0f} kB, |logit| <= {np.abs(np.concatenate(logits)).max():.1f}, margin "
        f"min {margin_NO.min():.4f} median {np.median(margin_NO):.3f}, "
        f"distinct greedy tokens {len(np.unique(greedy))}"
    )


def spread_weights(model: torch.nn.Module) -> None:
    """Weights large enough that layers, positions and windows show in the logits.

    The usual 0.02 leaves a tiny model an identity with margins near rounding noise.
    """
    # A tied head favours the token just read, the more the larger the embedding is beside what the
    # layers add: too large, and every greedy continuation repeats one token. Gemma scales it by 8.
    tied, gemma = model.config.tie_word_embeddings, "gemma" in model.config.model_type
    is_gpt_oss = model.config.model_type == "gpt_oss"
    embedding_std = 0.05 if gemma else 0.2 if tied else 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(embedding_std * torch.randn_like(parameter))
            else:
                # GPT-OSS keeps its experts [in, out], all others [out, in].
                fan_in = parameter.shape[-2 if is_gpt_oss and parameter.ndim == 3 else -1]
                parameter.copy_(1.2 * torch.randn_like(parameter) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(0.2 * torch.randn_like(buffer))


@torch.no_grad()
def forward(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence, without a cache."""
    return model(input_ids=torch.tensor(tokens[None]), use_cache=False).logits[0].float().numpy()


def continue_greedily(model: torch.nn.Module, prompt: np.ndarray) -> tuple[list[int], list[float]]:
    """NUM_GREEDY tokens, each from a full forward pass, and how clearly each one won."""
    tokens, margins = list(prompt), []
    for _ in range(NUM_GREEDY):
        last_V = forward(model, np.array(tokens))[-1]
        second, first = np.sort(last_V)[-2:]
        margins.append(float(first - second))
        tokens.append(int(last_V.argmax()))
    return tokens[len(prompt) :], margins


def ropes() -> dict[str, dict]:
    """Frequencies and amplitude of each setting in ROPES, head size 64, 131072 positions."""
    recorded = {}
    for name, parameters in ROPES.items():
        config = transformers.LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            max_position_embeddings=131072,
            rope_parameters=dict(parameters),
        )
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
        recorded[name] = {
            "parameters": parameters,
            "frequencies": frequencies.tolist(),
            "amplitude": float(amplitude),
        }
    return recorded


if __name__ == "__main__":
    main()
