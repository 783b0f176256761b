"""Matrix products with weights in the checkpoint's [out, in] layout, whatever they are kept in."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.group_scaled import GroupScaled
from jaxserve.layers.operand import Operand, Product, Rows, wide
from jaxserve.layers.quant import BlockScaled, Weight
from jaxserve.mesh import GROUP
from jaxserve.ops.dense_product import multiply
from jaxserve.ops.kv_write import Heads
from jaxserve.ops.latent_write import Columns


def project(
    x: Rows,
    weight: Weight | jax.Array,
    bias: nnx.Param | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """x [T, *in] times weight [*out, *in], plus bias [*out]: [T, *out] in `out_dtype`, else x's dtype.

    Several dimensions (heads) are merged to one around the product, which moves no data. A product
    with three-dimensional weights does: XLA's CPU backend copies such a weight in every call
    (SmolLM2-135M, 8 rows: 107 MB copied a step).
    """
    in_size, num_in, shape = math.prod(x.shape[1:]), len(x.shape) - 1, _shape(weight)
    out_dtype = out_dtype or x.dtype
    x = _merged(x)
    if isinstance(weight, ChannelScaled):
        y = weight.product(x, out_dtype)
    elif isinstance(weight, BlockScaled | GroupScaled):
        y = weight.product(wide(x), out_dtype)
    else:
        y = multiply(wide(x), weight[...].reshape(-1, in_size), out_dtype)
    y = y.reshape(-1, *shape[: len(shape) - num_in])
    return y if bias is None else y + bias[...].astype(y.dtype)


def project_leaving_scales(x: Rows, weight: Weight, bias: nnx.Param | None) -> Rows:
    """`project` to one dimension, [T, out], whose scales may be left to who reads the result."""
    if isinstance(weight, ChannelScaled) and bias is None and weight.leaves_scales(x):
        return Product(weight.scaled_product(_merged(x), x.dtype), x.dtype)
    return project(x, weight, bias)


def _merged(x: Rows) -> Rows:
    return x if isinstance(x, Operand) else x.reshape(-1, math.prod(x.shape[1:]))


def _shape(weight: Weight | jax.Array) -> tuple[int, ...]:
    return weight.get_value().shape if isinstance(weight, nnx.Param) else weight.shape


class Projections(nnx.Module):
    """Several products with one input, such as queries, keys and values.

    `fuse` joins the weights into one, so that there is one GEMM: at few rows a small GEMM does not
    fill a GPU. Where a mesh splits them, each device joins what it has.

    Args:
        biases: one a weight, None for a product without; empty when none has any.
    """

    def __init__(self, weights: Sequence[Weight], biases: Sequence[nnx.Param | None] = ()):
        self.out_shapes = tuple(_shape(weight)[:-1] for weight in weights)
        self.weights = nnx.List(weights)
        self.biases = nnx.List(biases if any(b is not None for b in biases) else ())
        self.fused = False
        self.ways = 1  # in which fused weights are split
        self.is_alone = False  # on one device, fused

    def __call__(self, hidden_TD: Rows) -> list[jax.Array]:
        """One [T, *out] a weight."""
        if not self.fused:
            biases = self.biases or [None] * len(self.weights)
            return [project(hidden_TD, w, b) for w, b in zip(self.weights, biases)]
        parts = self.columns(hidden_TD)
        return [part.value_TC.reshape(-1, *shape) for part, shape in zip(parts, self.out_shapes)]

    def columns(self, hidden_TD: Rows) -> list[Columns]:
        """As a call, but joined products stay where they are."""
        if not self.fused:
            return [Columns.whole(out_TX) for out_TX in self(hidden_TD)]
        joined_TC = wide(self._joined(hidden_TD))
        sizes = [math.prod(shape) for shape in self.out_shapes]
        return [
            Columns(joined_TC, end - size, size, self.ways) for size, end in zip(sizes, accumulate(sizes))
        ]

    def _joined(self, hidden_TD: Rows) -> Rows:
        return project_leaving_scales(hidden_TD, self.weights[0], self.biases[0] if self.biases else None)

    def heads(self, hidden_TD: Rows) -> list[Heads]:
        """As `columns`, for products that all are heads of one width."""
        if not self.fused:
            return [Heads.whole(out_THK) for out_THK in self(hidden_TD)]
        (width,) = {shape[-1] for shape in self.out_shapes}
        joined_TC, scales = self._joined(hidden_TD), None
        if isinstance(joined_TC, Product):
            joined_TC, row_T1, column_C = joined_TC.scaled
            scales = row_T1, column_C.reshape(-1, width)
        joined_TXK = wide(joined_TC).reshape(hidden_TD.shape[0], -1, width)
        counts = [math.prod(shape[:-1]) for shape in self.out_shapes]
        return [
            Heads(joined_TXK, end - count, count, self.ways, scales)
            for count, end in zip(counts, accumulate(counts))
        ]

    def fuse(self, mesh: Mesh | None = None) -> None:
        """Join weights that are loaded; the separate ones are freed.

        Those that are not alike stay apart, products of which only some have a bias, weights of which `mesh`
        splits only some over an attention group, and those with scales for blocks on a mesh or where blocks
        are cut.
        """
        if self.fused:
            return
        weights: list[Any] = list(self.weights)
        kind = type(weights[0])
        biases = [b.get_value() for b in self.biases if b is not None]
        if any(type(w) is not kind for w in weights) or len(biases) < len(self.biases):
            return
        if kind is BlockScaled and (mesh is not None or not BlockScaled.are_joinable(weights)):
            return
        matrices = [w.get_value() if isinstance(w, nnx.Param) else w.numbers.get_value() for w in weights]
        is_split = {matrix.sharding.shard_shape(matrix.shape)[0] < matrix.shape[0] for matrix in matrices}
        if len(is_split) > 1:
            return
        if True in is_split:
            assert mesh is not None
            self.ways = mesh.shape["ep"] * mesh.shape["tp"]
        spec = PartitionSpec(GROUP if self.ways > 1 else None)
        join = partial(_join, mesh=mesh, spec=spec)
        self.weights = nnx.List([_joined(weights, matrices, join, mesh, spec)])
        if biases:
            self.biases = nnx.List([nnx.Param(join(biases, shape=(-1,)))])
        self.fused, self.is_alone = True, mesh is None


def _joined(
    weights: list[Any],
    matrices: list[jax.Array],
    join: Callable[..., jax.Array],
    mesh: Mesh | None,
    spec: PartitionSpec,
) -> Weight:
    """One weight of several that are alike."""

    def of(name: str) -> list[jax.Array]:
        return [getattr(weight, name).get_value() for weight in weights]

    if isinstance(weights[0], GroupScaled):
        packed = (join(of(name), shape=(-1, *of(name)[0].shape[1:])) for name in GroupScaled.ARRAYS)
        size = sum(weight.size for weight in weights)
        joined = GroupScaled(*map(nnx.Param, packed), shape=(size, weights[0].shape[-1]))
        if mesh is not None:
            joined.place(NamedSharding(mesh, spec))
        return joined
    matrix = nnx.Param(join(matrices, shape=(-1, matrices[0].shape[-1])))
    if isinstance(weights[0], ChannelScaled):
        return ChannelScaled(matrix, nnx.Param(join(of("scale"), shape=(-1,))), is_alone=mesh is None)
    if isinstance(weights[0], BlockScaled):
        scale = nnx.Param(join(of("scale"), shape=(-1, of("scale")[0].shape[1])))
        return BlockScaled(matrix, scale, weights[0].quant, is_alone=True)
    return matrix


@partial(jax.jit, static_argnames=("shape", "mesh", "spec"))
def _join(
    arrays: list[jax.Array], *, shape: tuple[int, ...], mesh: Mesh | None, spec: PartitionSpec
) -> jax.Array:
    """The arrays, each of `shape`, one after the other: whole, or what a device has of them."""

    def on_device(arrays: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([array.reshape(shape) for array in arrays])

    if mesh is None:
        return on_device(arrays)
    return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(arrays)
