"""Mixture of experts: a router that picks experts for each token, and the experts, stacked.

Which device holds an expert is not known here: the step context takes tokens, ids and weights to
the experts and back.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxserve.layers.attention import StepContext
from jaxserve.layers.linear import project
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.quant import BlockFP8, stacked_weight
from jaxserve.layers.weight import weight
from jaxserve.ops.grouped_gemm import Activation, ExpertWeights


@dataclass(frozen=True)
class ExpertSpec:
    """What the engine must know of a model's experts to count their load."""

    num_layers: int  # with experts
    num_experts: int


@dataclass(frozen=True)
class Routing:
    """How a router's logits become experts and weights.

    Args:
        score: of an expert: `softmax` over all experts, `sigmoid` of its own logit, or
            `softmax_of_chosen`: experts are chosen by logit, softmax is over the chosen ones.
        renormalize: the weights of a token's experts sum to 1.
        scale: what weights are multiplied with at the end.
        num_groups, top_groups: experts come from the best `top_groups` of `num_groups` runs of
            experts (1: no groups).
        group_by: a group is as good as its best expert, or the sum of its best two.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_by: Literal["best", "best_two"] = "best"

    def choose(self, logits_TE: jax.Array, bias_E: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(expert_TX int32, weight_TX float32). `bias_E` moves the choice and not the weights.

        Source: DeepSeek-V3 technical report, section 2.1.2 (sigmoid, bias); DeepSeek-V2, 2.2.1 (groups).
        """
        logits_TE = logits_TE.astype(jnp.float32)
        if self.score == "softmax_of_chosen":
            top_TX, expert_TX = lax.top_k(logits_TE, self.top_k)
            return expert_TX, jax.nn.softmax(top_TX, axis=-1) * self.scale
        score_TE = jax.nn.softmax(logits_TE) if self.score == "softmax" else jax.nn.sigmoid(logits_TE)
        choice_TE = score_TE if bias_E is None else score_TE + bias_E.astype(jnp.float32)
        if self.top_groups < self.num_groups:
            choice_TE = jnp.where(self._in_best_groups(choice_TE), choice_TE, -jnp.inf)
        _, expert_TX = lax.top_k(choice_TE, self.top_k)
        weight_TX = jnp.take_along_axis(score_TE, expert_TX, axis=1)
        if self.renormalize:
            weight_TX = weight_TX / (weight_TX.sum(axis=-1, keepdims=True) + 1e-20)
        return expert_TX, weight_TX * self.scale

    def _in_best_groups(self, choice_TE: jax.Array) -> jax.Array:
        size = self.num_experts // self.num_groups
        by_group = choice_TE.reshape(-1, self.num_groups, size)
        best = lax.top_k(by_group, 1 if self.group_by == "best" else 2)[0].sum(axis=-1)
        _, group = lax.top_k(best, self.top_groups)
        kept = jax.nn.one_hot(group, self.num_groups, dtype=jnp.bool_).any(axis=1)
        return jnp.repeat(kept, size, axis=1)


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

    def weights(self) -> ExpertWeights:
        def value(scale: nnx.Param | None) -> jax.Array | None:
            return None if scale is None else scale[...]

        return ExpertWeights(
            self.gate[...],
            self.up[...],
            self.down[...],
            gate_scale=value(self.gate_scale),
            up_scale=value(self.up_scale),
            down_scale=value(self.down_scale),
        )


class MoE(nnx.Module):
    """Router, experts, and a dense expert that every token goes through where the model has one.

    Args:
        index: number of this layer among those with experts.
        router: checkpoint tensor [E, D]; its product is always float32.
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

        self.router = weight((E, D), (None, "embed"), router, dtype=jnp.float32)
        self.router_bias, self.choice_bias = per_expert(router_bias), per_expert(choice_bias)
        self.experts = experts
        self.shared = shared
        self.shared_gate = (
            None if shared_gate is None else weight((1, D), (None, "embed"), shared_gate, dtype=dtype)
        )

    def __call__(self, hidden_TD: jax.Array, step: StepContext) -> jax.Array:
        with jax.named_scope("route"):
            logits_TE = project(hidden_TD.astype(jnp.float32), self.router, self.router_bias)
            bias_E = None if self.choice_bias is None else self.choice_bias[...]
            expert_TX, weight_TX = step.per_rank(self.routing.choose, logits_TE, shared=bias_E)
        with jax.named_scope("experts"):
            out_TD = step.feed_experts(
                self.index, hidden_TD, expert_TX, weight_TX, self.experts.weights(), self.activation
            )
        if self.shared is None:
            return out_TD
        with jax.named_scope("shared_expert"):
            shared_TD = self.shared(hidden_TD)
            if self.shared_gate is not None:
                gate_T1 = project(hidden_TD, self.shared_gate, out_dtype=jnp.float32)
                shared_TD = shared_TD * jax.nn.sigmoid(gate_T1).astype(shared_TD.dtype)
            return out_TD + shared_TD
