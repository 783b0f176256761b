"""What a model asks of a checkpoint: its parameters, those that one wide weight makes taken together."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding

from jaxserve.layers.channel_quant import quantise

Shardings = Callable[[nnx.Param], Sharding]


@dataclass(frozen=True)
class Declared:
    """One weight to be read, or to be made up, and the parameters that come of it.

    Args:
        path: of the parameter; of a quantised weight, what it would be were it not.
        param: in the dtype to be read.
        targets: `param` itself; or the numbers and scales that `param` is quantised to.
    """

    path: str
    param: nnx.Param
    targets: tuple[nnx.Param, ...]

    def set(self, array: jax.Array, shardings: Shardings) -> tuple[jax.Array, ...]:
        """Fill the targets, given what was read. Returns their arrays."""
        arrays = (array,)
        if len(self.targets) > 1:
            made = self.targets[0].made
            out = tuple(shardings(target) for target in self.targets)
            arrays = _quantise(made.scheme, made.num_out, self.targets[1].get_raw_value().shape, out)(array)
        for target, value in zip(self.targets, arrays, strict=True):
            target.set_raw_value(value)
        return arrays

    @property
    def num_bytes(self) -> int:
        """Of the filled targets."""
        values = [target.get_raw_value() for target in self.targets]
        return sum(math.prod(value.shape) * jnp.dtype(value.dtype).itemsize for value in values)


def declared(model: nnx.Module) -> Iterator[Declared]:
    """In the model's order; a shared parameter comes once."""
    params = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)]
    # A scale that is made at load has the sources of its numbers, and is assembled like them.
    scales = {(p.sources, p.assemble): p for _, p in params if p.get_metadata().get("is_scale")}
    made_here = [p for _, p in params if p.get_metadata().get("made") is not None]
    paired = {id(scales[p.sources, p.assemble]) for p in made_here}
    for path, param in params:
        name, made = ".".join(map(str, path)), param.get_metadata().get("made")
        if made is not None:
            scale = scales[param.sources, param.assemble]
            metadata = {**param.get_metadata(), "made": None}
            wide = nnx.Param(jax.ShapeDtypeStruct(param.get_raw_value().shape, made.dtype), **metadata)
            yield Declared(name.removesuffix(".numbers"), wide, (param, scale))
        elif id(param) not in paired:
            yield Declared(name, param, (param,))


@cache
def _quantise(
    scheme: Any, num_out: int, scale_shape: tuple[int, ...], shardings: tuple[Sharding, ...]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def make(wide: jax.Array) -> tuple[jax.Array, jax.Array]:
        numbers, scale = quantise(wide, scheme, num_out)
        return numbers, scale.reshape(scale_shape)

    return jax.jit(make, out_shardings=shardings)
