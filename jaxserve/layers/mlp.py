"""The gated feed-forward layer."""

import math
from collections.abc import Callable
from functools import cache, partial

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.group_scaled import GroupScaled
from jaxserve.layers.linear import Projections
from jaxserve.layers.operand import Operand, Rows, wide
from jaxserve.layers.quant import BlockFP8, BlockScaled, linear_weight
from jaxserve.layers.split_product import project_split
from jaxserve.layers.step_context import StepContext
from jaxserve.layers.weight import weight
from jaxserve.mesh import GROUP
from jaxserve.ops import block_product, gated_product
from jaxserve.ops.gated_product import GateActivation


def gelu_tanh(x: jax.Array) -> jax.Array:
    """x / 2 * (1 + tanh(u)) as x * sigmoid(2 u), in which nothing cancels where x is far below zero: a GPU's
    fast tanh is off by 2**-11. Source: Hendrycks and Gimpel 2016, section 2."""
    return x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


# By the names that config.json uses; both Gemma spellings mean the tanh approximation.
ACTIVATIONS: dict[str, GateActivation] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_tanh": gelu_tanh,
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
        if (inner_TF := self._multiply_by_kernel()) is not None:
            return inner_TF
        gate_TF, up_TF = self.gate_up(self.hidden_TD)
        return self.activation(gate_TF) * up_TF

    def _multiply_by_kernel(self) -> jax.Array | None:
        """None where there is no kernel for this, or none that is faster."""
        gate_up, hidden_TD, step = self.gate_up, self.hidden_TD, self.step
        if isinstance(joined := gate_up.weights[0], GroupScaled) and joined.is_joined:
            return joined.gated(wide(hidden_TD), _gate(self.activation))
        if not gate_up.fused or gate_up.biases or (step is None and not gate_up.is_alone):
            return None
        (weight,), scales = gate_up.weights, None
        if isinstance(weight, BlockScaled):
            x_TD, numbers_WD = wide(hidden_TD), weight.numbers[...]
            if not (weight.is_alone and weight.has_kernels and block_product.fits(x_TD, numbers_WD, 2)):
                return None
            arrays = x_TD, numbers_WD, weight.scale[...]
            return block_product.by_hopper(*arrays, _gate(self.activation), self.dtype, num_matrices=2)
        if isinstance(weight, GroupScaled):
            return None
        matrix_WD = weight.numbers if isinstance(weight, ChannelScaled) else weight
        mesh, num_ranks = (None, 1) if gate_up.is_alone or step is None else (step.mesh, step.num_ranks)
        (W, D), dtype = matrix_WD[...].shape, matrix_WD[...].dtype
        of_device = jax.ShapeDtypeStruct((W // gate_up.ways, D), dtype)
        if not gated_product.fits(hidden_TD.shape[0] // num_ranks, of_device):
            return None
        if not isinstance(weight, ChannelScaled):
            x_TD = wide(hidden_TD)
        elif weight.takes_float8(hidden_TD):
            x_TD, x_scale_T1 = weight.float8_rows(hidden_TD)
            scales = x_scale_T1, weight.scale[...]
        else:
            return None
        multiply = partial(gated_product.multiply, activation=self.activation, dtype=self.dtype)
        if step is not None and mesh is not None:
            cut = gate_up.ways, scales is not None
            key = "gated", self.activation, self.dtype, *cut
            multiply = step.once(key, partial(_on_each_device, multiply, mesh, *cut))
        return multiply(x_TD, matrix_WD[...], scales)


@cache
def _gate(activation: GateActivation) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """One function for all layers, so that a kernel with it is traced once."""
    return lambda gate, up: activation(gate) * up


def _on_each_device(
    multiply: Callable[..., jax.Array], mesh: Mesh, ways: int, scaled: bool
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
