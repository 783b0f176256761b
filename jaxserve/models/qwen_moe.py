"""Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with experts in some or all layers.

Qwen2-MoE also has a dense shared expert behind a sigmoid gate.
"""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.attention import Attention
from jaxserve.layers.block import PreNormBlock, Sublayer
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.moe import Experts, ExpertSpec, MoE, Routing
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.quant import BlockFP8
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import (
    Dimensions,
    need,
    num_experts,
    one_of,
    rope_and_reach,
    upper_layer_windows,
    windows,
)

ARCHITECTURES = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
QUANTIZATIONS = ("fp8",)
COMMON = {"max_position_embeddings": 32768, "decoder_sparse_step": 1, "norm_topk_prob": False}
QWEN2 = {**COMMON, "num_key_value_heads": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
QWEN3 = {**COMMON, "num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


class Qwen3MoeForCausalLM(Decoder):
    """Of this class's options Qwen2-MoE has biases and a shared expert, Qwen3-MoE q/k norms."""

    def __init__(
        self,
        hf_config: dict[str, Any],
        dtype: DTypeLike,
        *,
        defaults: dict[str, Any] = QWEN3,
        has_shared_expert: bool = False,
        has_qk_norm: bool = True,
    ):
        config = {**defaults, **hf_config}
        size = Dimensions.read(config)
        rope, self.max_position = rope_and_reach(config, size)
        if has_qk_norm:  # Qwen3: all layers or none
            window_of = windows(config, size, [config.get("use_sliding_window", False)] * size.num_layers)
        else:
            window_of = upper_layer_windows(config, size)
        activation = one_of(config, "hidden_act", ("silu",), "silu")
        if has_qk_norm:
            qkv_bias = out_bias = config.get("attention_bias", False)
        else:
            qkv_bias, out_bias = config.get("qkv_bias", True), False
        routing = Routing(
            num_experts(config), need(config, "num_experts_per_tok"), renormalize=config["norm_topk_prob"]
        )
        dense = set(config.get("mlp_only_layers") or ())
        every = config["decoder_sparse_step"]
        sparse = [n for n in range(size.num_layers) if n not in dense and (n + 1) % every == 0]
        tied = config.get("tie_word_embeddings", False)
        quant = BlockFP8.read(config)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.experts = ExpertSpec(len(sparse), routing.num_experts)
        self.num_q_heads, self.vocab_size = size.H, size.V

        def feed(layer: int, name: str) -> Sublayer:
            if layer not in sparse:
                return GatedMLP(name, size.D, size.F, activation=activation, dtype=dtype, quant=quant)
            experts = Experts(
                *(f"{name}.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")),
                num_experts=routing.num_experts,
                hidden=size.D,
                ffn=need(config, "moe_intermediate_size"),
                dtype=dtype,
                quant=quant,
            )
            shared = None
            if has_shared_expert:
                ffn = need(config, "shared_expert_intermediate_size")
                shared = GatedMLP(
                    f"{name}.shared_expert", size.D, ffn, activation=activation, dtype=dtype, quant=quant
                )
            return MoE(
                sparse.index(layer),
                routing,
                experts,
                hidden=size.D,
                router=f"{name}.gate.weight",
                shared=shared,
                shared_gate=f"{name}.shared_expert_gate.weight" if shared else None,
                dtype=dtype,
            )

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn",
                layer,
                rope=rope,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
                qk_norm_eps=size.eps if has_qk_norm else None,
                window=window_of[layer],
                dtype=dtype,
                quant=quant,
                **size.heads,
            )
            return PreNormBlock(
                name, attention, feed(layer, f"{name}.mlp"), hidden=size.D, eps=size.eps, dtype=dtype
            )

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)


class Qwen2MoeForCausalLM(Qwen3MoeForCausalLM):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        super().__init__(hf_config, dtype, defaults=QWEN2, has_shared_expert=True, has_qk_norm=False)
