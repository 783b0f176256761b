"""Qwen3 (dense): queries and keys normalized per head before rotation."""

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
from jaxserve.models.hf_config import Dimensions, one_of, rope_and_reach, upper_layer_windows

ARCHITECTURES = ("Qwen3ForCausalLM",)
QUANTIZATIONS = ("fp8",)
DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}


class Qwen3ForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config = {**DEFAULTS, **hf_config}
        size = Dimensions.read(config)
        rope, self.max_position = rope_and_reach(config, size)
        window_of = upper_layer_windows(config, size)
        activation = one_of(config, "hidden_act", ("silu",), "silu")
        bias = config.get("attention_bias", False)
        tied = config.get("tie_word_embeddings", False)
        quant = BlockFP8.read(config)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.num_q_heads, self.vocab_size = size.H, size.V

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn",
                layer,
                rope=rope,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm_eps=size.eps,
                window=window_of[layer],
                dtype=dtype,
                quant=quant,
                **size.heads,
            )
            mlp = GatedMLP(f"{name}.mlp", size.D, size.F, activation=activation, dtype=dtype, quant=quant)
            return PreNormBlock(name, attention, mlp, hidden=size.D, eps=size.eps, dtype=dtype)

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)
