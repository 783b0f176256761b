"""Declaring a weight: shape, dtype, logical axes and checkpoint tensors in one place.

A model is built abstractly: every parameter is a `jax.ShapeDtypeStruct` with metadata, and
`jaxserve.weights.load` replaces it by an array of the target sharding. No memory is touched
before the layout is known to be valid.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

Assemble = Callable[..., np.ndarray]


def weight(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *sources: str,
    dtype: Any,
    assemble: Assemble | None = None,
    init: Literal["ones", "zeros", "random"] | None = None,
) -> nnx.Param:
    """One abstract parameter.

    Args:
        shape: the full, unsharded shape. Linear layers keep the checkpoint's [out, in] layout.
        axes: one logical axis name a dimension (`jaxserve.mesh.RULES` maps it to mesh axes), or None.
        sources: checkpoint tensors by their Hugging Face names.
        assemble: maps the source arrays to one of `shape`; by default one source, reshaped.
        dtype: what it is kept in on the device.
        init: what dummy weights put here; by default ones at rank 1, zeros for biases, else random.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in rank")
    value = jax.ShapeDtypeStruct(shape, dtype)
    return nnx.Param(value, logical=axes, sources=sources, assemble=assemble, init=init)
