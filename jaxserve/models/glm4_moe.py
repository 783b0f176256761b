"""GLM-4.5 and its successors of the same shape: grouped-query attention that rotates half of each head,
DeepSeek-V3's routing, a shared expert, the first layers dense."""

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
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import (
    Dimensions,
    extra_layers,
    need,
    num_experts,
    one_of,
    rope_and_reach,
    routing_groups,
)

ARCHITECTURES = ("Glm4MoeForCausalLM",)
DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
}


class Glm4MoeForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config = {**DEFAULTS, **hf_config}
        size = Dimensions.read(config)
        rope, self.max_position = rope_and_reach(config, size)
        activation = one_of(config, "hidden_act", ("silu",), "silu")
        routing = Routing(
            num_experts(config),
            need(config, "num_experts_per_tok"),
            score="sigmoid",
            renormalize=config.get("norm_topk_prob", True),
            scale=config.get("routed_scaling_factor", 1.0),
            group_by="best_two",
            **routing_groups(config),
        )
        num_dense, num_shared = config["first_k_dense_replace"], config.get("n_shared_experts", 1)
        ffn = need(config, "moe_intermediate_size")
        tied = config.get("tie_word_embeddings", False)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.experts = ExpertSpec(size.num_layers - num_dense, routing.num_experts)
        self.num_q_heads, self.vocab_size = size.H, size.V
        self.unserved = extra_layers(config)

        def feed(layer: int, name: str) -> Sublayer:
            if layer < num_dense:
                return GatedMLP(name, size.D, size.F, activation=activation, dtype=dtype)
            experts = Experts(
                *(f"{name}.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")),
                num_experts=routing.num_experts,
                hidden=size.D,
                ffn=ffn,
                dtype=dtype,
            )
            return MoE(
                layer - num_dense,
                routing,
                experts,
                hidden=size.D,
                router=f"{name}.gate.weight",
                choice_bias=f"{name}.gate.e_score_correction_bias",
                shared=GatedMLP(
                    f"{name}.shared_experts", size.D, ffn * num_shared, activation=activation, dtype=dtype
                ),
                dtype=dtype,
            )

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn",
                layer,
                rope=rope,
                qkv_bias=config.get("attention_bias", False),
                qk_norm_eps=size.eps if config.get("use_qk_norm", False) else None,
                dtype=dtype,
                **size.heads,
            )
            return PreNormBlock(
                name, attention, feed(layer, f"{name}.mlp"), hidden=size.D, eps=size.eps, dtype=dtype
            )

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)
