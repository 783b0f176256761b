"""Weights of linear layers whose kernels must know where the numbers lie, once they are loaded."""

from typing import cast

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]  # of a mesh


class Placed(nnx.Module):
    """Nothing is known until `place` has said it: XLA then computes what it can anywhere."""

    numbers: nnx.Param

    def __init__(self, *, is_alone: bool = False):
        self.is_alone = is_alone  # on one device
        self.mesh: Mesh | None = None
        self.spec = PartitionSpec()

    def place(self, sharding: NamedSharding) -> None:
        """The numbers lie on one device, or dimensions of theirs are split over several."""
        self.is_alone = sharding.mesh.size == 1
        if not self.is_alone:
            self.mesh, self.spec = cast(Mesh, sharding.mesh), sharding.spec

    def axes(self, dimension: int) -> Axes:
        """Of several devices, that split a dimension."""
        assert self.mesh is not None
        axes = self.spec[dimension] if dimension < len(self.spec) else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)
