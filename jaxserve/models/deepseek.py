"""DeepSeek V2 (with and without a query latent), V3 and R1, and Kimi-K2, which is V3 in other sizes.

Latent attention; the first layers dense, the others with experts chosen within groups of experts
and a shared expert. V2 scores experts by softmax, V3 by sigmoid with a bias on the choice.
The layer for multi-token prediction, which checkpoints put after the last one, is read when it is to
make drafts.
"""

from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.block import PreNormBlock, Sublayer
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import LatentSpec
from jaxserve.layers.mla import LatentAttention, LatentSizes
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.moe import Experts, ExpertSpec, MoE, Routing
from jaxserve.layers.nextn import NextToken
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.quant import BlockFP8
from jaxserve.layers.rope import rope_parameters, yarn_amplitude
from jaxserve.layers.step_context import StepContext
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

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
QUANTIZATIONS = ("fp8",)


class DeepseekV3ForCausalLM(Decoder):
    nextn_key = "num_nextn_predict_layers"

    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike, *, with_nextn: bool = False):
        config = hf_config
        sizes = LatentSizes(
            num_heads=need(config, "num_attention_heads"),
            query_rank=config.get("q_lora_rank"),
            latent=need(config, "kv_lora_rank"),
            nope=need(config, "qk_nope_head_dim"),
            rope=need(config, "qk_rope_head_dim"),
            value=need(config, "v_head_dim"),
        )
        size = replace(Dimensions.read({**config, "num_key_value_heads": sizes.num_heads}), K=sizes.rope)
        rope, self.max_position = rope_and_reach(config, size)
        scale = _score_scale(config, sizes)
        interleaved = config.get("rope_interleave", True)
        activation = one_of(config, "hidden_act", ("silu",), "silu")
        bias = config.get("attention_bias", False)
        routing = self.routing(config)
        first, every = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
        sparse = [n for n in range(size.num_layers) if n >= first and n % every == 0]
        tied = config.get("tie_word_embeddings", False)
        quant = BlockFP8.read(config)

        self.kv = LatentSpec(size.num_layers + with_nextn, sizes.latent, sizes.rope)
        self.experts = ExpertSpec(len(sparse), routing.num_experts)
        self.num_q_heads, self.vocab_size = sizes.num_heads, size.V
        self.unserved = extra_layers(config)

        def feed(layer: int, name: str) -> Sublayer:
            if layer < size.num_layers and layer not in sparse:
                return GatedMLP(name, size.D, size.F, activation=activation, dtype=dtype, quant=quant)
            ffn = need(config, "moe_intermediate_size")
            experts = Experts(
                *(f"{name}.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")),
                num_experts=routing.num_experts,
                hidden=size.D,
                ffn=ffn,
                dtype=dtype,
                quant=quant,
            )
            shared = None
            if num_shared := config.get("n_shared_experts"):
                shared = GatedMLP(
                    f"{name}.shared_experts",
                    size.D,
                    ffn * num_shared,
                    activation=activation,
                    dtype=dtype,
                    quant=quant,
                )
            return MoE(
                sparse.index(layer) if layer in sparse else len(sparse),  # the layer after the last one
                routing,
                experts,
                hidden=size.D,
                router=f"{name}.gate.weight",
                choice_bias=f"{name}.gate.e_score_correction_bias" if routing.score == "sigmoid" else None,
                shared=shared,
                dtype=dtype,
            )

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = LatentAttention(
                f"{name}.self_attn",
                layer,
                sizes,
                hidden=size.D,
                rope=rope,
                scale=scale,
                interleaved=interleaved,
                bias=bias,
                dtype=dtype,
                quant=quant,
            )
            return PreNormBlock(
                name, attention, feed(layer, f"{name}.mlp"), hidden=size.D, eps=size.eps, dtype=dtype
            )

        def next_token_layer(layer: int) -> NextToken:
            return NextToken(f"model.layers.{layer}", block(layer), size.D, eps=size.eps, dtype=dtype)

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)
        self.nextn = next_token_layer(size.num_layers) if with_nextn else None
        if self.nextn is not None:
            self.unserved = (*self.nextn.unserved, *self.unserved[1:])

    @staticmethod
    def routing(config: dict[str, Any]) -> Routing:
        one_of(config, "scoring_func", ("sigmoid",), "sigmoid")
        one_of(config, "topk_method", ("noaux_tc",), "noaux_tc")
        return Routing(
            num_experts(config),
            need(config, "num_experts_per_tok"),
            score="sigmoid",
            renormalize=config.get("norm_topk_prob", True),
            scale=config.get("routed_scaling_factor", 1.0),
            group_by="best_two",
            **routing_groups(config),
        )

    def next_token(self, token_T: jax.Array, hidden_TD: jax.Array, step: StepContext) -> jax.Array:
        """Hidden states whose logits are of the token after `token_T`, which follows that of `hidden_TD`."""
        assert self.nextn is not None, "the layer for multi-token prediction was not read"
        return self.nextn(self.vocabulary.embed(token_T, step), hidden_TD, step)


class DeepseekV2ForCausalLM(DeepseekV3ForCausalLM):
    @staticmethod
    def routing(config: dict[str, Any]) -> Routing:
        one_of(config, "scoring_func", ("softmax",), "softmax")
        method = one_of(config, "topk_method", ("greedy", "group_limited_greedy"), "greedy")
        return Routing(
            num_experts(config),
            need(config, "num_experts_per_tok"),
            renormalize=config.get("norm_topk_prob", False),
            scale=config.get("routed_scaling_factor", 1.0),
            **(routing_groups(config) if method == "group_limited_greedy" else {}),
        )


def _score_scale(config: dict[str, Any], sizes: LatentSizes) -> float:
    """1 / sqrt(head size), times the square of YaRN's temperature where the file names one for all
    dimensions: queries and keys would each have it, but the cached rope part goes without."""
    scale = (sizes.nope + sizes.rope) ** -0.5
    rope = rope_parameters(config)
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= yarn_amplitude(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale
