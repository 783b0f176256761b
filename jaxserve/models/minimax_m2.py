"""MiniMax-M2: grouped-query attention with q/k norms over all heads of a layer, rotation of a part of
each head, and experts scored by sigmoid in every layer."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.attention import Attention
from jaxserve.layers.block import PreNormBlock
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec
from jaxserve.layers.moe import Experts, ExpertSpec, MoE, Routing
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.quant import BlockFP8
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Dimensions, need, num_experts, one_of, rope_and_reach

ARCHITECTURES = ("MiniMaxM2ForCausalLM",)
QUANTIZATIONS = ("fp8",)
DEFAULTS = {"num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e6}


class MiniMaxM2ForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config = {**DEFAULTS, **hf_config}
        size = Dimensions.read(config)
        if rotated := config.get("rotary_dim"):
            config["partial_rotary_factor"] = rotated / size.K
        rope, self.max_position = rope_and_reach(config, size)
        one_of(config, "hidden_act", ("silu",), "silu")
        one_of(config, "scoring_func", ("sigmoid",), "sigmoid")
        one_of(config, "qk_norm_type", ("per_layer",), "per_layer")
        routing = Routing(
            num_experts(config), need(config, "num_experts_per_tok"), score="sigmoid", renormalize=True
        )
        tied = config.get("tie_word_embeddings", False)
        quant = BlockFP8.read(config)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.experts = ExpertSpec(size.num_layers, routing.num_experts)
        self.num_q_heads, self.vocab_size = size.H, size.V

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn",
                layer,
                rope=rope,
                qk_norm_eps=size.eps if config.get("use_qk_norm", True) else None,
                qk_norm_over="layer",
                dtype=dtype,
                quant=quant,
                **size.heads,
            )
            moe = f"{name}.block_sparse_moe"
            experts = Experts(
                *(f"{moe}.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2")),
                num_experts=routing.num_experts,
                hidden=size.D,
                ffn=size.F,
                dtype=dtype,
                quant=quant,
            )
            has_bias = config.get("use_routing_bias", True)
            feed = MoE(
                layer,
                routing,
                experts,
                hidden=size.D,
                router=f"{moe}.gate.weight",
                choice_bias=f"{moe}.e_score_correction_bias" if has_bias else None,
                dtype=dtype,
            )
            return PreNormBlock(name, attention, feed, hidden=size.D, eps=size.eps, dtype=dtype)

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)
