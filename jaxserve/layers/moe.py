"""Mixture of experts: a router that picks experts for each token, and the experts, stacked.

Which device holds an expert is not known here: the step context takes tokens, ids and weights to
the experts and back.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.linear import project
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.operand import Rows, wide
from jaxserve.layers.quant import BlockFP8, stacked_weight
from jaxserve.layers.step_context import StepContext
from jaxserve.layers.weight import weight
from jaxserve.ops.grouped_gemm import Activation, ExpertWeights
from jaxserve.ops.routing import Routing, choose


@dataclass(frozen=True)
class ExpertSpec:
    """What the engine must know of a model's experts to count their load, and to move them."""

    num_layers: int  # with experts
    num_experts: int
    num_redundant: int = 0  # slots that the stacked weights of a layer have beyond one an expert

    @property
    def num_slots(self) -> int:
        return self.num_experts + self.num_redundant


def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate * jax.nn.sigmoid(gate) * up


class ExpertStack(Protocol):
    def weights(self) -> ExpertWeights: ...


class Experts(nnx.Module):
    """The stacked weights of a layer's experts, from a checkpoint tensor for each of them.

    Args:
        gate, up, down: checkpoint names with `{}` for the expert's number.
    """

    def __init__(
        self,
        gate: str,
        up: str,
        down: str,
        *,
        num_experts: int,
        hidden: int,
        ffn: int,
        dtype: DTypeLike,
        quant: BlockFP8 | None = None,
    ):
        E, F, D = num_experts, ffn, hidden
        up_axes = ("expert", "expert_ffn", "embed")

        def stacked(name: str, shape: tuple[int, int, int], axes: tuple[str, str, str]) -> Any:
            names = [name.format(expert) for expert in range(E)]
            return stacked_weight(shape, axes, names, dtype=dtype, quant=quant)

        self.gate, self.gate_scale = stacked(gate, (E, F, D), up_axes)
        self.up, self.up_scale = stacked(up, (E, F, D), up_axes)
        self.down, self.down_scale = stacked(down, (E, D, F), ("expert", "embed", "expert_ffn"))
        # `layers.group_packing` declares them.
        self.gate_zero: nnx.Param | None = nnx.data(None)
        self.down_zero: nnx.Param | None = nnx.data(None)

    def weights(self) -> ExpertWeights:
        def value(param: nnx.Param | None) -> Any:
            return None if param is None else param[...]

        return ExpertWeights(
            self.gate[...],
            value(self.up),
            self.down[...],
            gate_scale=value(self.gate_scale),
            up_scale=value(self.up_scale),
            down_scale=value(self.down_scale),
            gate_zero=value(self.gate_zero),
            down_zero=value(self.down_zero),
        )


class MoE(nnx.Module):
    """Router, experts, and a dense expert that every token goes through where the model has one.

    Args:
        index: number of this layer among those with experts.
        router: checkpoint tensor [E, D]; logits are float32 in any dtype, as sums of exact products.
        router_bias: of the logits. choice_bias: of the choice alone (DeepSeek's correction bias).
        shared: its output is added, times a sigmoid gate when `shared_gate` names a tensor [1, D].
    """

    def __init__(
        self,
        index: int,
        routing: Routing,
        experts: ExpertStack,
        *,
        hidden: int,
        router: str,
        router_bias: str | None = None,
        choice_bias: str | None = None,
        shared: GatedMLP | None = None,
        shared_gate: str | None = None,
        activation: Activation = silu_gated,
        dtype: DTypeLike,
    ):
        E, D = routing.num_experts, hidden
        self.index, self.routing, self.activation = index, routing, activation

        def per_expert(name: str | None) -> nnx.Param | None:
            return None if name is None else weight((E,), (None,), name, dtype=jnp.float32, init="zeros")

        self.router = weight((E, D), (None, "embed"), router, dtype=dtype)
        self.router_bias, self.choice_bias = per_expert(router_bias), per_expert(choice_bias)
        self.experts = experts
        self.shared = shared
        self.shared_gate = (
            None if shared_gate is None else weight((1, D), (None, "embed"), shared_gate, dtype=dtype)
        )

    def __call__(self, hidden_TD: Rows, step: StepContext) -> jax.Array:
        wide_TD = wide(hidden_TD)
        with jax.named_scope("route"):
            logits_TE = project(wide_TD, self.router, self.router_bias, out_dtype=jnp.float32)
            bias_E = None if self.choice_bias is None else self.choice_bias[...]
            tokens = logits_TE, step.slot_T
            expert_TX, weight_TX = step.per_rank(partial(_choose, self.routing), tokens, shared=bias_E)
        with jax.named_scope("experts"):
            out_TD = step.feed_experts(
                self.index, wide_TD, expert_TX, weight_TX, self.experts.weights(), self.activation
            )
        if self.shared is None:
            return out_TD.astype(hidden_TD.dtype)
        with jax.named_scope("shared_expert"):
            shared_TD = wide(self.shared(hidden_TD, step))
            if self.shared_gate is not None:
                gate_T1 = project(wide_TD, self.shared_gate, out_dtype=jnp.float32)
                shared_TD = shared_TD * jax.nn.sigmoid(gate_T1).astype(shared_TD.dtype)
            return (out_TD + shared_TD.astype(out_TD.dtype)).astype(hidden_TD.dtype)


def _choose(
    routing: Routing, tokens: tuple[jax.Array, jax.Array], bias_E: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    logits_TE, slot_T = tokens
    return choose(routing, logits_TE, bias_E, slot_T)
