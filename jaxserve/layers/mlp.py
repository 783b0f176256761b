"""The gated feed-forward layer."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.attention import StepContext, project_split
from jaxserve.layers.linear import Projections
from jaxserve.layers.operand import Operand
from jaxserve.layers.quant import BlockFP8, linear_weight
from jaxserve.layers.weight import weight

# By the names that config.json uses; both Gemma spellings mean the tanh approximation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)). Source: Shazeer 2020, "GLU variants improve Transformer"."""

    def __init__(
        self,
        name: str,
        hidden: int,
        ffn: int,
        *,
        activation: str,
        dtype: DTypeLike,
        bias: bool = False,
        quant: BlockFP8 | None = None,
    ):
        matrix, declare = partial(linear_weight, dtype=dtype, quant=quant), partial(weight, dtype=dtype)
        self.activation = activation
        names = ("gate_proj", "up_proj")
        weights = [matrix((ffn, hidden), ("ffn", "embed"), f"{name}.{part}.weight") for part in names]
        biases = [declare((ffn,), ("ffn",), f"{name}.{part}.bias") for part in names if bias]
        self.gate_up = Projections(weights, biases)
        self.down = matrix((hidden, ffn), ("embed", "ffn"), f"{name}.down_proj.weight")
        self.down_bias = declare((hidden,), ("embed",), f"{name}.down_proj.bias") if bias else None

    def __call__(self, hidden_TD: jax.Array | Operand, step: StepContext | None = None) -> jax.Array:
        inner_TF = Gated(hidden_TD, self.gate_up, self.activation)
        return project_split(inner_TF, self.down, self.down_bias, step)


class Gated(Operand):
    """act(gate(x)) * up(x)."""

    def __init__(self, hidden_TD: jax.Array | Operand, gate_up: Projections, activation: str):
        super().__init__((hidden_TD.shape[0], *gate_up.out_shapes[0]), hidden_TD.dtype)
        self.hidden_TD, self.gate_up, self.activation = hidden_TD, gate_up, ACTIVATIONS[activation]

    def make_wide(self) -> jax.Array:
        gate_TF, up_TF = self.gate_up(self.hidden_TD)
        return self.activation(gate_TF) * up_TF
