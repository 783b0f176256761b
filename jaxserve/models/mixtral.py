"""Mixtral: Mistral with eight experts instead of one feed-forward layer."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.attention import Attention
from jaxserve.layers.block import PreNormBlock
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec
from jaxserve.layers.moe import Experts, ExpertSpec, MoE, Routing
from jaxserve.layers.norm import RMSNorm
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Dimensions, need, one_of, rope_and_reach, windows

ARCHITECTURES = ("MixtralForCausalLM",)
DEFAULTS = {"num_key_value_heads": 8, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2}


class MixtralForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config = {**DEFAULTS, **hf_config}
        size = Dimensions.read(config)
        rope, self.max_position = rope_and_reach(config, size)
        has_window = config.get("sliding_window") is not None
        window_of = windows(config, size, [has_window] * size.num_layers)
        one_of(config, "hidden_act", ("silu",), "silu")
        routing = Routing(need(config, "num_local_experts"), config["num_experts_per_tok"], renormalize=True)
        tied = config.get("tie_word_embeddings", False)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.experts = ExpertSpec(size.num_layers, routing.num_experts)
        self.num_q_heads, self.vocab_size = size.H, size.V

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn", layer, rope=rope, window=window_of[layer], dtype=dtype, **size.heads
            )
            moe = f"{name}.block_sparse_moe"
            experts = Experts(
                f"{moe}.experts.{{}}.w1.weight",
                f"{moe}.experts.{{}}.w3.weight",
                f"{moe}.experts.{{}}.w2.weight",
                num_experts=routing.num_experts,
                hidden=size.D,
                ffn=size.F,
                dtype=dtype,
            )
            feed = MoE(layer, routing, experts, hidden=size.D, router=f"{moe}.gate.weight", dtype=dtype)
            return PreNormBlock(name, attention, feed, hidden=size.D, eps=size.eps, dtype=dtype)

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)
