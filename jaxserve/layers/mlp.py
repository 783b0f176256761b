"""The gated feed-forward layer."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.layers.attention import StepContext, project_split
from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.linear import Projections
from jaxserve.layers.operand import Operand, Rows, wide
from jaxserve.layers.quant import BlockFP8, linear_weight
from jaxserve.layers.weight import weight
from jaxserve.mesh import GROUP
from jaxserve.ops import gated_product

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

    def __call__(self, hidden_TD: Rows, step: StepContext | None = None) -> Rows:
        inner_TF = Gated(hidden_TD, self.gate_up, self.activation, step)
        return project_split(inner_TF, self.down, self.down_bias, step)


class Gated(Operand):
    """act(gate(x)) * up(x)."""

    def __init__(self, hidden_TD: Rows, gate_up: Projections, activation: str, step: StepContext | None):
        super().__init__((hidden_TD.shape[0], *gate_up.out_shapes[0]), hidden_TD.dtype)
        self.hidden_TD, self.gate_up, self.activation = hidden_TD, gate_up, ACTIVATIONS[activation]
        self.step = step

    def make_wide(self) -> jax.Array:
        if (inner_TF := self._by_kernel()) is not None:
            return inner_TF
        gate_TF, up_TF = self.gate_up(self.hidden_TD)
        return self.activation(gate_TF) * up_TF

    def _by_kernel(self) -> jax.Array | None:
        """None where there is no kernel for this, or none that is faster."""
        gate_up, step, hidden_TD, scales = self.gate_up, self.step, self.hidden_TD, None
        if not gate_up.fused or gate_up.biases or (step is None and not gate_up.is_alone):
            return None
        (weight,) = gate_up.weights
        matrix_WD = weight.numbers if isinstance(weight, ChannelScaled) else weight
        assert isinstance(matrix_WD, nnx.Param), "weights with scales for blocks are not joined"
        if not self._fits(matrix_WD[...]):
            return None
        if not isinstance(weight, ChannelScaled):
            x_TD = wide(hidden_TD)
        elif weight.takes_float8(hidden_TD):
            x_TD, x_scale_T1 = weight.float8_rows(hidden_TD)
            scales = x_scale_T1, weight.scale[...]
        else:
            return None
        multiply = partial(gated_product.multiply, activation=self.activation, dtype=self.dtype)
        if step is not None and not gate_up.is_alone:
            cut = gate_up.ways, scales is not None
            key = "gated", self.activation, self.dtype, *cut
            multiply = step.once(key, partial(_on_each_device, multiply, step.mesh, *cut))
        return multiply(x_TD, matrix_WD[...], scales)

    def _fits(self, weight_WD: jax.Array) -> bool:
        """What a device has of it."""
        ranks = 1 if self.gate_up.is_alone or self.step is None else self.step.num_ranks
        W, D = weight_WD.shape
        mine = jax.ShapeDtypeStruct((W // self.gate_up.ways, D), weight_WD.dtype)
        return gated_product.fits(self.hidden_TD.shape[0] // ranks, mine)


def _on_each_device(
    multiply: Callable[..., jax.Array], mesh: Mesh | None, ways: int, scaled: bool
) -> Callable[..., jax.Array]:
    """Rows are dp ranks', gate and up those that each of `ways` devices has joined."""
    rows, split = PartitionSpec("dp"), PartitionSpec(GROUP if ways > 1 else None)
    return jax.shard_map(
        multiply,
        mesh=mesh,
        in_specs=(rows, split, (rows, split) if scaled else None),
        out_specs=PartitionSpec("dp", *split),
        check_vma=False,
    )
