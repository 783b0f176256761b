"""GPT-OSS: attention sinks, a window on every other layer, experts with biases and a clamped gate.

Published files hold the experts in MXFP4; other files hold them as they are, [E, in, out]. In both, gate and
up alternate along the output.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.config import ConfigError
from jaxserve.layers.attention import Attention
from jaxserve.layers.block import PreNormBlock
from jaxserve.layers.embed import Vocabulary
from jaxserve.layers.kv import KVSpec
from jaxserve.layers.moe import ExpertSpec, MoE, Routing
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.weight import Assemble, Sliced, weight
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Dimensions, num_experts, one_of, rope_and_reach, windows
from jaxserve.ops import four_bits, mxfp4
from jaxserve.ops.grouped_gemm import ExpertWeights

ARCHITECTURES = ("GptOssForCausalLM",)
QUANTIZATIONS = ("mxfp4",)
DUMMY_EXPONENT = int(mxfp4.stored_exponent(127 - 7))  # keeps the size of activations at published widths
DEFAULTS = {"num_key_value_heads": 8, "head_dim": 64, "rope_theta": 150_000.0, "rms_norm_eps": 1e-5}


class GptOssForCausalLM(Decoder):
    def __init__(self, hf_config: dict[str, Any], dtype: DTypeLike):
        config = {**DEFAULTS, **hf_config}
        size = Dimensions.read(config)
        rope, self.max_position = rope_and_reach(config, size)
        window_of = windows(config, size, [layer % 2 == 0 for layer in range(size.num_layers)])
        one_of(config, "hidden_act", ("silu",), "silu")
        chosen = config.get("num_experts_per_tok") or config.get("experts_per_token") or 4
        routing = Routing(num_experts(config), chosen, score="softmax_of_chosen")
        activation = ClampedGate(config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0))
        bias = config.get("attention_bias", True)
        stored = config.get("quantization_config") or {}
        tied = config.get("tie_word_embeddings", False)

        self.kv = KVSpec(size.num_layers, size.G, size.K)
        self.experts = ExpertSpec(size.num_layers, routing.num_experts)
        self.num_q_heads, self.vocab_size = size.H, size.V

        def block(layer: int) -> PreNormBlock:
            name = f"model.layers.{layer}"
            attention = Attention(
                f"{name}.self_attn",
                layer,
                rope=rope,
                qkv_bias=bias,
                out_bias=bias,
                window=window_of[layer],
                sinks=True,
                dtype=dtype,
                **size.heads,
            )
            experts = BiasedExperts(
                f"{name}.mlp.experts",
                routing.num_experts,
                size.D,
                size.F,
                is_mxfp4=bool(stored),
                keep=bool(stored.get("keep")),
                dtype=dtype,
            )
            feed = MoE(
                layer,
                routing,
                experts,
                hidden=size.D,
                router=f"{name}.mlp.router.weight",
                router_bias=f"{name}.mlp.router.bias",
                activation=activation,
                dtype=dtype,
            )
            return PreNormBlock(name, attention, feed, hidden=size.D, eps=size.eps, dtype=dtype)

        self.vocabulary = Vocabulary("model.", size.V, size.D, tied=tied, dtype=dtype)
        self.blocks = nnx.List([block(layer) for layer in range(size.num_layers)])
        self.norm = RMSNorm("model.norm", size.D, eps=size.eps, dtype=dtype)


@dataclass(frozen=True)
class ClampedGate:
    """(up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up within +-`limit`."""

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.minimum(jnp.maximum(up, -self.limit), self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


class BiasedExperts(nnx.Module):
    """The stacked experts of a layer and their biases.

    Args:
        is_mxfp4: in the checkpoint. keep: on the device too, see `jaxserve.ops.mxfp4`.
    """

    def __init__(
        self,
        name: str,
        num_experts: int,
        hidden: int,
        ffn: int,
        *,
        is_mxfp4: bool,
        keep: bool,
        dtype: DTypeLike,
    ):
        E, F, D = num_experts, ffn, hidden
        if is_mxfp4 and (F % mxfp4.GROUP or D % mxfp4.GROUP):
            raise ConfigError(
                f"config.json: hidden_size={D} and intermediate_size={F} must be multiples of {mxfp4.GROUP} "
                "for quant_method='mxfp4'"
            )

        def wide(part: str, shape: tuple[int, int, int], axes: tuple[str, ...], take: Assemble) -> nnx.Param:
            sources, each = (f"{name}.{part}",), _Transposed(take)
            if is_mxfp4:
                sources, each = (f"{name}.{part}_blocks", f"{name}.{part}_scales"), _Widened(take)
            return weight(shape, axes, *sources, dtype=dtype, assemble=Sliced(each), num_out=2)

        def packed(
            part: str, rows: int, inner: int, axes: tuple[str, str, str], take: Assemble
        ) -> tuple[nnx.Param, nnx.Param]:
            """Numbers and exponents, as `ops.mxfp4` has them."""
            lead, groups = (E, four_bits.num_tiles(rows)), inner // mxfp4.GROUP

            def lines(source: str, count: int, each: Assemble, **more: Any) -> nnx.Param:
                shape = *lead, count, four_bits.LINE
                return weight(shape, (*axes, None), source, dtype=np.uint8, assemble=Sliced(each), **more)

            numbers = lines(f"{name}.{part}_blocks", groups * four_bits.LINES, _Packed(take))
            exponents = lines(
                f"{name}.{part}_scales", groups, _Exponents(take), init=DUMMY_EXPONENT, is_scale=True
            )
            return numbers, exponents

        def bias(part: str, size: int, axis: str, take: Assemble) -> nnx.Param:
            return weight(
                (E, size), ("expert", axis), f"{name}.{part}_bias", dtype=dtype, assemble=Sliced(take)
            )

        even, odd, all_rows = _Every(2, 0), _Every(2, 1), _Every(1, 0)
        up_axes, down_axes = ("expert", "expert_ffn", "embed"), ("expert", "embed", "expert_ffn")
        if keep:
            self.gate, self.gate_scale = packed("gate_up_proj", 2 * F, D, up_axes, _by_turns)
            self.down, self.down_scale = packed("down_proj", D, F, down_axes, all_rows)
            self.up = self.up_scale = None
        else:
            self.gate = wide("gate_up_proj", (E, F, D), up_axes, even)
            self.up = wide("gate_up_proj", (E, F, D), up_axes, odd)
            self.down = wide("down_proj", (E, D, F), down_axes, all_rows)
            self.gate_scale = self.up_scale = self.down_scale = None
        self.gate_bias = bias("gate_up_proj", F, "expert_ffn", even)
        self.up_bias = bias("gate_up_proj", F, "expert_ffn", odd)
        self.down_bias = bias("down_proj", D, "embed", all_rows)

    def weights(self) -> ExpertWeights:
        def value(param: nnx.Param | None) -> Any:
            return None if param is None else param[...]

        return ExpertWeights(
            self.gate[...],
            value(self.up),
            self.down[...],
            self.gate_bias[...],
            self.up_bias[...],
            self.down_bias[...],
            gate_scale=value(self.gate_scale),
            up_scale=value(self.up_scale),
            down_scale=value(self.down_scale),
        )


# ---- one expert of a checkpoint ----


@dataclass(frozen=True)
class _Every:
    """Every `step`-th output, from `first` on."""

    step: int
    first: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return rows[self.first :: self.step]


@dataclass(frozen=True)
class _Transposed:
    """Of a matrix stored [in, out]."""

    take: Assemble

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        return self.take(stored.T)


@dataclass(frozen=True)
class _Widened:
    """Of a matrix stored as [out, groups, 16] pairs of numbers, the first in a byte's low half, and
    [out, groups] exponents."""

    take: Assemble

    def __call__(self, blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        blocks, exponents = self.take(blocks), self.take(exponents)
        numbers = np.stack([mxfp4.E2M1[blocks & 15], mxfp4.E2M1[blocks >> 4]], axis=-1)
        numbers = numbers.reshape(*exponents.shape, -1)
        scaled = np.ldexp(numbers, exponents.astype(np.int32)[..., None] - 127)
        return scaled.reshape(len(scaled), -1)


@dataclass(frozen=True)
class _Packed:
    take: Assemble

    def __call__(self, blocks: np.ndarray) -> np.ndarray:
        return mxfp4.pack(self.take(blocks))


@dataclass(frozen=True)
class _Exponents:
    take: Assemble

    def __call__(self, exponents: np.ndarray) -> np.ndarray:
        return mxfp4.pack_exponents(self.take(exponents))


def _by_turns(rows: np.ndarray) -> np.ndarray:
    """Of gate and up, which alternate."""
    return four_bits.join(rows[0::2], rows[1::2])
