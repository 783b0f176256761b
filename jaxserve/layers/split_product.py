"""Products whose inputs the devices of an attention group share, and the sum of what each of them has."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.group_scaled import GroupScaled
from jaxserve.layers.linear import project, project_leaving_scales
from jaxserve.layers.operand import Rows, wide
from jaxserve.layers.quant import BlockFP8, BlockScaled, Weight
from jaxserve.mesh import GROUP
from jaxserve.parallel.links import LinkArrays, LinkPlan, Links

if TYPE_CHECKING:
    from jaxserve.layers.step_context import StepContext

SplitKind = Literal["matrix", "channels", "blocks", "groups"]


def project_split(x_TX: Rows, weight: Weight, bias: nnx.Param | None, step: "StepContext | None") -> Rows:
    """`project` where the devices of an attention group have each a share of the numbers that are summed.

    Args:
        x_TX: [T, *in], whose second dimension is split, as is the second one of `weight` [D, *in].

    Without links, and for many tokens, XLA adds what the devices have. With them, float8 rows have a scale
    on each device, of what it has of them, where XLA's have one for all.
    """
    links = None if step is None else step.links
    if step is None or links is None:
        return project_leaving_scales(x_TX, weight, bias)
    array_TX = wide(x_TX)
    kind, parts = _split_parts(weight, array_TX)
    num_out = weight.get_value().shape[0] if isinstance(weight, nnx.Param) else weight.shape[0]
    of_rank = jax.ShapeDtypeStruct((x_TX.shape[0] // step.num_ranks, num_out), x_TX.dtype)
    count = links.count(of_rank, GROUP)
    if not count:
        return project_leaving_scales(x_TX, weight, bias)
    key = "project_split", array_TX.ndim, kind, num_out
    product = step.once(key, lambda: _project_split(step.mesh, links.plan, kind, num_out))
    ahead = links.claim(GROUP, count)
    out_TD = links.last = product(array_TX, parts, ahead, links.arrays, links.last)
    return out_TD if bias is None else out_TD + bias[...].astype(out_TD.dtype)


def _split_parts(weight: Weight, x_TX: jax.Array) -> tuple[SplitKind, tuple[jax.Array, ...]]:
    """The matrix of a weight [D, *in]; or its numbers in 8 or 4 bits, and the scales of outputs, blocks, or
    groups."""
    if isinstance(weight, ChannelScaled):
        return "channels", (weight.numbers[...], weight.scale[...])
    if isinstance(weight, GroupScaled):
        return "groups", weight.packed
    if isinstance(weight, BlockScaled):
        in_size = math.prod(x_TX.shape[1:])
        if weight.split(in_size) is not None:
            return "blocks", (weight.numbers[...], weight.scale[...])
        return "matrix", (weight.matrix(in_size, x_TX.dtype).reshape(weight.shape),)
    return "matrix", (weight[...],)


def _project_split(
    mesh: Mesh | None, plan: LinkPlan, kind: SplitKind, num_out: int
) -> Callable[..., jax.Array]:
    def on_device(
        x_tX: jax.Array,
        parts: tuple[jax.Array, ...],
        ahead: jax.Array,
        arrays: LinkArrays,
        last: jax.Array,
    ) -> jax.Array:
        weight: Any = parts[0]
        if kind == "channels":
            weight = ChannelScaled(*map(nnx.Param, parts), is_alone=True)
        elif kind == "blocks":
            numbers, scale = map(nnx.Param, parts)
            weight = BlockScaled(numbers, scale, BlockFP8(), is_alone=True)
        elif kind == "groups":
            weight = GroupScaled(*map(nnx.Param, parts), shape=(num_out, *x_tX.shape[1:]))
        out_tD = Links(plan, arrays, last, {GROUP: ahead}).sum(project(x_tX, weight), GROUP)
        assert out_tD is not None
        return out_tD

    P = PartitionSpec
    split = P(None, GROUP)
    scales = {"matrix": (), "channels": (P(),), "blocks": (split,), "groups": (split, split)}
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P("dp", GROUP), (split, *scales[kind]), P(), *Links.SPECS),
        out_specs=P("dp"),
        check_vma=False,
    )
