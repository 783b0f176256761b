"""Mistral: Llama with a sliding window on every layer where the file names one."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.attention import Attention
from jaxserve.layers.block import PreNormBlock
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Dimensions, one_of, rope_and_reach, windows

ARCHITECTURES = ("MistralForCausalLM",)
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}


class MistralForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config = {**DEFAULTS, **hf_config}
        size = Dimensions.read(config)
        rope, self.max_position = rope_and_reach(config, size)
        has_window = config["sliding_window"] is not None
        window_of = windows(config, size, [has_window] * size.num_layers)
        activation = one_of(config, "hidden_act", ("silu",), "silu")
        tied = config.get("tie_word_embeddings", False)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.num_q_heads, self.vocab_size = size.H, size.V

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn", layer, rope=rope, window=window_of[layer], dtype=dtype, **size.heads
            )
            mlp = GatedMLP(f"{name}.mlp", size.D, size.F, activation=activation, dtype=dtype)
            return PreNormBlock(name, attention, mlp, hidden=size.D, eps=size.eps, dtype=dtype)

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)
