"""Declaring a weight: shape, dtype, logical axes and checkpoint tensors in one place.

A model is built abstractly: every parameter is a `jax.ShapeDtypeStruct` with metadata, and
`jaxserve.weights.load` replaces it by an array of the target sharding. No memory is touched
before the layout is known to be valid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

Assemble = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Stacked:
    """Assembles a parameter whose slices along dimension 0 have sources of their own (experts).

    A loader that knows this reads only the slices a device keeps.

    Args:
        each: makes one slice of its sources; by default there is one source, of the slice's shape.
        num_sources: of one slice.
    """

    each: Assemble | None = None
    num_sources: int = 1

    def slices(self, sources: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The sources of each slice."""
        n = self.num_sources
        return [sources[i : i + n] for i in range(0, len(sources), n)]

    def __call__(self, *sources: np.ndarray) -> np.ndarray:
        return np.stack([self.each(*s) if self.each else s[0] for s in self.slices(sources)])


@dataclass(frozen=True)
class Sliced:
    """Assembles a parameter slice by slice of dimension 0, which its sources have too (experts).

    `each` makes one slice of the parameter of the same slice of every source, or of slice `order[i]`.
    """

    each: Assemble
    order: tuple[int, ...] | None = None

    def source_slice(self, number: int) -> int:
        return number if self.order is None else self.order[number]

    def __call__(self, *sources: np.ndarray) -> np.ndarray:
        slices = list(zip(*sources, strict=True))
        return np.stack([self.each(*slices[self.source_slice(i)]) for i in range(len(self.order or slices))])


def weight(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *sources: str,
    dtype: Any,
    assemble: Assemble | None = None,
    init: Literal["ones", "zeros", "random"] | float | None = None,
    stored: tuple[int, ...] | None = None,
    num_out: int | None = None,
    is_scale: bool = False,
    made: Any = None,
) -> nnx.Param:
    """One abstract parameter.

    Args:
        shape: the full, unsharded shape. Linear layers keep the checkpoint's [out, in] layout.
        axes: one logical axis name a dimension (`jaxserve.mesh.RULES` maps it to mesh axes), or None.
        sources: checkpoint tensors by their Hugging Face names.
        assemble: maps the source arrays to one of `shape`; by default one source, reshaped.
        dtype: what it is kept in on the device.
        init: what dummy weights put here, a number everywhere; by default ones at rank 1, zeros for
            biases, else random.
        stored: the shape in the checkpoint, when zeros behind it make up `shape`.
        num_out: leading dimensions that are outputs, of a linear weight that may be quantised.
        is_scale: it is the scales of another parameter.
        made: how it is made of a wide weight at load (`jaxserve.layers.channel_quant.Made`).
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in rank")
    value = jax.ShapeDtypeStruct(shape, dtype)
    return nnx.Param(
        value,
        logical=axes,
        sources=sources,
        assemble=assemble,
        init=init,
        stored=stored or shape,
        num_out=num_out,
        is_scale=is_scale,
        made=made,
    )


def reorder(param: nnx.Param, order: Sequence[int]) -> None:
    """Declare dimension 0 anew: slice i becomes what slice `order[i]` was; one may come several times."""
    value, assemble = param.get_raw_value(), param.assemble
    if isinstance(assemble, Stacked):
        slices = assemble.slices(param.sources)
        param.set_metadata(sources=tuple(source for number in order for source in slices[number]))
    else:
        assert isinstance(assemble, Sliced), f"{param.sources[0]} is not made slice by slice"
        param.set_metadata(assemble=replace(assemble, order=tuple(order)))
    shape = (len(order), *value.shape[1:])
    param.set_metadata(order=tuple(order), stored=shape)
    param.set_raw_value(jax.ShapeDtypeStruct(shape, value.dtype))
