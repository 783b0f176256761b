"""The gated feed-forward layer."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.layers.linear import project
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
    ):
        declare = partial(weight, dtype=dtype)
        self.activation = activation
        self.gate = declare((ffn, hidden), ("ffn", "embed"), f"{name}.gate_proj.weight")
        self.up = declare((ffn, hidden), ("ffn", "embed"), f"{name}.up_proj.weight")
        self.down = declare((hidden, ffn), ("embed", "ffn"), f"{name}.down_proj.weight")
        self.gate_bias = declare((ffn,), ("ffn",), f"{name}.gate_proj.bias") if bias else None
        self.up_bias = declare((ffn,), ("ffn",), f"{name}.up_proj.bias") if bias else None
        self.down_bias = declare((hidden,), ("embed",), f"{name}.down_proj.bias") if bias else None

    def __call__(self, hidden_TD: jax.Array) -> jax.Array:
        gate_TF = project(hidden_TD, self.gate, self.gate_bias)
        up_TF = project(hidden_TD, self.up, self.up_bias)
        inner_TF = ACTIVATIONS[self.activation](gate_TF) * up_TF
        return project(inner_TF, self.down, self.down_bias)
