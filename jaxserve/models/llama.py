"""Llama 2, 3 and 3.x, and what shares their code (SmolLM2, TinyLlama, ...)."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.attention import Attention
from jaxserve.layers.block import PreNormBlock
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.quant import BlockFP8
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Dimensions, one_of, rope_and_reach

ARCHITECTURES = ("LlamaForCausalLM",)
QUANTIZATIONS = ("fp8",)


class LlamaForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        size = Dimensions.read(hf_config)
        rope, self.max_position = rope_and_reach(hf_config, size)
        activation = one_of(hf_config, "hidden_act", ("silu",), "silu")
        attention_bias, mlp_bias = hf_config.get("attention_bias", False), hf_config.get("mlp_bias", False)
        tied = hf_config.get("tie_word_embeddings", False)
        quant = BlockFP8.read(hf_config)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.num_q_heads, self.vocab_size = size.H, size.V

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn",
                layer,
                rope=rope,
                qkv_bias=attention_bias,
                out_bias=attention_bias,
                dtype=dtype,
                quant=quant,
                **size.heads,
            )
            mlp = GatedMLP(
                f"{name}.mlp",
                size.D,
                size.F,
                activation=activation,
                bias=mlp_bias,
                dtype=dtype,
                quant=quant,
            )
            return PreNormBlock(name, attention, mlp, hidden=size.D, eps=size.eps, dtype=dtype)

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)
