"""Gemma 3, the text model: alone, or inside a checkpoint that also has a vision tower (not served).

Against Llama: gains stored as distance from one, norms around both sides of attention and
feed-forward, q/k norms, embeddings scaled by sqrt(D), and two kinds of layer: local ones with a
window and their own rotary base, and global ones.
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.config import ConfigError
from jaxserve.layers.attention import Attention
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rope import Rope, rope_parameters
from jaxserve.layers.step_context import StepContext
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Dimensions, one_of, windows

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
# Published files leave out what equals the reference implementation's defaults.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


class Gemma3ForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config, prefix = _text_part(hf_config)
        size = Dimensions.read(config)
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        window_of = windows(config, size, [(layer + 1) % pattern > 0 for layer in range(size.num_layers)])
        local_rope, global_rope = _ropes(config, size)
        activation = one_of(config, "hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        one_of(config, "use_bidirectional_attention", (False,), False)
        bias = config.get("attention_bias", False)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.num_q_heads, self.vocab_size = size.H, size.V
        self.max_position = size.max_position

        def norm(name: str) -> RMSNorm:
            return RMSNorm(name, size.D, eps=size.eps, offset=1.0, dtype=dtype)

        def block(layer: int) -> SandwichBlock:
            name, window = f"{prefix}layers.{layer}", window_of[layer]
            attention = Attention(
                f"{name}.self_attn",
                layer,
                rope=global_rope if window is None else local_rope,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm_eps=size.eps,
                norm_offset=1.0,
                scale=config["query_pre_attn_scalar"] ** -0.5,
                window=window,
                softcap=config.get("attn_logit_softcapping"),
                dtype=dtype,
                **size.heads,
            )
            mlp = GatedMLP(f"{name}.mlp", size.D, size.F, activation=activation, dtype=dtype)
            return SandwichBlock(
                norm(f"{name}.input_layernorm"),
                attention,
                norm(f"{name}.post_attention_layernorm"),
                norm(f"{name}.pre_feedforward_layernorm"),
                mlp,
                norm(f"{name}.post_feedforward_layernorm"),
            )

        self.vocabulary = Vocabulary(
            prefix,
            size.V,
            size.D,
            tied=config.get("tie_word_embeddings", True),
            head=prefix.replace("model.", "lm_head.weight"),
            scale=math.sqrt(size.D),
            softcap=config.get("final_logit_softcapping"),
            dtype=dtype,
        )
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = norm(f"{prefix}norm")


Gemma3ForConditionalGeneration = Gemma3ForCausalLM  # its text part; `_text_part` finds it


class SandwichBlock(nnx.Module):
    """Norms before and after attention, and before and after feed-forward."""

    def __init__(
        self,
        before_attention: RMSNorm,
        attention: Attention,
        after_attention: RMSNorm,
        before_mlp: RMSNorm,
        mlp: GatedMLP,
        after_mlp: RMSNorm,
    ):
        self.before_attention, self.attention, self.after_attention = (
            before_attention,
            attention,
            after_attention,
        )
        self.before_mlp, self.mlp, self.after_mlp = before_mlp, mlp, after_mlp

    def __call__(self, hidden_TD: jax.Array, step: StepContext) -> jax.Array:
        attended_TD = self.attention(self.before_attention.operand(hidden_TD), step)
        hidden_TD = hidden_TD + self.after_attention(attended_TD)
        return hidden_TD + self.after_mlp(self.mlp(self.before_mlp.operand(hidden_TD), step))


def _text_part(hf_config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The text model's configuration and the prefix of its tensors."""
    if "text_config" not in hf_config:
        return {**DEFAULTS, **hf_config}, "model."
    shared = {key: hf_config[key] for key in ("tie_word_embeddings",) if key in hf_config}
    return {**DEFAULTS, **shared, **hf_config["text_config"]}, "language_model.model."


def _ropes(config: dict[str, Any], size: Dimensions) -> tuple[Rope, Rope]:
    """(local, global). Older files scale only the global one; newer ones have a mapping for each."""
    nested = config.get("rope_parameters") or {}
    if nested and not isinstance(nested.get("full_attention"), dict):
        raise ConfigError(f"config.json: rope_parameters={nested!r} must have full_attention for Gemma 3")
    scaling = nested.get("full_attention") or config.get("rope_scaling")
    local_theta = config.get("rope_local_base_freq") or 10_000.0
    settings = (
        {"rope_parameters": nested.get("sliding_attention"), "rope_theta": local_theta},
        {"rope_parameters": scaling, "rope_theta": config.get("rope_theta") or 1_000_000.0},
    )
    local, wide = (Rope.from_parameters(rope_parameters(s), size.K, size.max_position) for s in settings)
    return local, wide
