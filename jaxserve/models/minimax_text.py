"""MiniMax-Text-01 and M1: lightning attention in most layers and softmax attention in every eighth,
experts in all of them, residual streams that are scaled on both sides of every addition.

The published checkpoints and those of transformers' own class hold the same tensors, and the same
facts in config.json under other keys.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.config import ConfigError
from jaxserve.layers.attention import Attention
from jaxserve.layers.block import Sublayer
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec, StateSpec
from jaxserve.layers.lightning import LightningAttention, slopes
from jaxserve.layers.moe import Experts, ExpertSpec, MoE, Routing
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import wide
from jaxserve.layers.step_context import StepContext
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Dimensions, need, num_experts, one_of, rope_and_reach

ARCHITECTURES = ("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxForCausalLM")
DEFAULTS = {"num_key_value_heads": 8, "rope_theta": 1e6, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
NORM_EPS = 1e-6  # of lightning attention's norm; config.json does not say it
BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # kept by some, computed here


class ScaledBlock(nnx.Module):
    """residual * alpha + sublayer * beta, twice, where the residual is the normalized input.

    With `postnorm` off it is the input itself.
    """

    def __init__(
        self,
        name: str,
        attention: Sublayer,
        feed: Sublayer,
        *,
        attention_scales: tuple[float, float],
        feed_scales: tuple[float, float],
        postnorm: bool,
        hidden: int,
        eps: float,
        dtype: DTypeLike,
    ):
        self.attention_norm = RMSNorm(f"{name}.input_layernorm", hidden, eps=eps, dtype=dtype)
        self.attention = attention
        self.feed_norm = RMSNorm(f"{name}.post_attention_layernorm", hidden, eps=eps, dtype=dtype)
        self.feed = feed
        self.attention_scales, self.feed_scales = attention_scales, feed_scales
        self.postnorm = postnorm

    def __call__(self, hidden_TD: jax.Array, step: StepContext) -> jax.Array:
        for norm, sublayer, (alpha, beta) in (
            (self.attention_norm, self.attention, self.attention_scales),
            (self.feed_norm, self.feed, self.feed_scales),
        ):
            normed_TD = norm(hidden_TD)
            residual_TD = normed_TD if self.postnorm else hidden_TD
            hidden_TD = residual_TD * alpha + wide(sublayer(normed_TD, step)) * beta
        return hidden_TD


class MiniMaxText01ForCausalLM(Decoder):
    """As published: `attn_type_list`, `layernorm_*`, `rotary_dim`."""

    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config = {**DEFAULTS, **hf_config}
        size = Dimensions.read(config)
        is_linear = self.linear_layers(config, size.num_layers)
        scales = {part: self.scales(config, part) for part in ("full", "linear", "mlp")}
        if rotated := config.get("rotary_dim"):
            config["partial_rotary_factor"] = rotated / size.K
        rope, self.max_position = rope_and_reach(config, size)
        one_of(config, "hidden_act", ("silu",), "silu")
        one_of(config, "sliding_window", (None,), None)
        one_of(config, "shared_intermediate_size", (0, [0] * size.num_layers), 0)
        if size.H & (size.H - 1):
            raise ConfigError(
                f"config.json: num_attention_heads={size.H} is not supported; the decays of this family are "
                "known for powers of two"
            )
        routing = Routing(num_experts(config), config["num_experts_per_tok"], renormalize=True)
        tied = config.get("tie_word_embeddings", False)

        self.kv = KVSpec(size.num_layers - sum(is_linear), size.G, size.K)
        self.states = StateSpec(sum(is_linear), size.H, size.K)
        self.experts = ExpertSpec(size.num_layers, routing.num_experts)
        self.num_q_heads, self.vocab_size = size.H, size.V
        self.unserved = tuple(
            f"model.layers.{layer}.self_attn.{name}" for layer in range(size.num_layers) for name in BUFFERS
        )

        def attention(name: str, layer: int) -> Sublayer:
            index = sum(linear == is_linear[layer] for linear in is_linear[:layer])
            if not is_linear[layer]:
                return Attention(name, index, rope=rope, dtype=dtype, **size.heads)
            return LightningAttention(
                name,
                index,
                hidden=size.D,
                num_heads=size.H,
                head_dim=size.K,
                slope=slopes(size.H, self.slope_share(layer, size.num_layers)),
                norm_eps=NORM_EPS,
                dtype=dtype,
            )

        def block(layer: int) -> ScaledBlock:
            name = f"model.layers.{layer}"
            moe = f"{name}.block_sparse_moe"
            experts = Experts(
                *(f"{moe}.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2")),
                num_experts=routing.num_experts,
                hidden=size.D,
                ffn=size.F,
                dtype=dtype,
            )
            return ScaledBlock(
                name,
                attention(f"{name}.self_attn", layer),
                MoE(layer, routing, experts, hidden=size.D, router=f"{moe}.gate.weight", dtype=dtype),
                attention_scales=scales["linear" if is_linear[layer] else "full"],
                feed_scales=scales["mlp"],
                postnorm=self.postnorm(config),
                hidden=size.D,
                eps=size.eps,
                dtype=dtype,
            )

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)

    # ---- what the two kinds of config.json say in their own ways ----

    @staticmethod
    def linear_layers(config: dict[str, Any], num_layers: int) -> list[bool]:
        """Whether each layer has lightning attention."""
        kinds = need(config, "attn_type_list")
        return _by_kind(kinds, {0: True, 1: False}, "attn_type_list", num_layers)

    @staticmethod
    def scales(config: dict[str, Any], part: str) -> tuple[float, float]:
        """(alpha, beta) of `full` or `linear` attention, or of `mlp`."""
        name = f"layernorm_{part}" if part == "mlp" else f"layernorm_{part}_attention"
        return config.get(f"{name}_alpha", 1.0), config.get(f"{name}_beta", 1.0)

    @staticmethod
    def postnorm(config: dict[str, Any]) -> bool:
        return config.get("postnorm", False)

    @staticmethod
    def slope_share(layer: int, num_layers: int) -> float:
        """Later layers forget more slowly."""
        return 1 - layer / max(num_layers - 1, 1) + 1e-5


class MiniMaxM1ForCausalLM(MiniMaxText01ForCausalLM):
    """The same network, trained on to reason."""


class MiniMaxForCausalLM(MiniMaxText01ForCausalLM):
    """As transformers saves it: `layer_types`, `*_factor`."""

    @staticmethod
    def linear_layers(config: dict[str, Any], num_layers: int) -> list[bool]:
        default = [("linear_attention", "full_attention")[layer % 2 == 0] for layer in range(num_layers)]
        kinds = config.get("layer_types") or default
        known = {"linear_attention": True, "full_attention": False}
        return _by_kind(kinds, known, "layer_types", num_layers)

    @staticmethod
    def scales(config: dict[str, Any], part: str) -> tuple[float, float]:
        name = part if part == "mlp" else f"{part}_attn"
        return config.get(f"{name}_alpha_factor", 1.0), config.get(f"{name}_beta_factor", 1.0)

    @staticmethod
    def postnorm(config: dict[str, Any]) -> bool:
        return True

    @staticmethod
    def slope_share(layer: int, num_layers: int) -> float:
        return 1 - layer / (num_layers - 1 + 1e-5) + 1e-5


def _by_kind(kinds: Sequence[Any], known: dict[Any, bool], key: str, num_layers: int) -> list[bool]:
    """Raises ConfigError for a list that does not fit the layers, or that has no softmax attention."""
    for kind in kinds:
        if kind not in known:
            choices = ", ".join(map(repr, known))
            raise ConfigError(f"config.json: {key}={kind!r} is not supported; use one of {choices}")
    if len(kinds) != num_layers:
        raise ConfigError(f"config.json: {key} has {len(kinds)} entries, num_hidden_layers={num_layers}")
    is_linear = [known[kind] for kind in kinds]
    if all(is_linear) or not any(is_linear):
        raise ConfigError(
            f"config.json: {key} must name layers of both kinds, lightning and softmax attention"
        )
    return is_linear
