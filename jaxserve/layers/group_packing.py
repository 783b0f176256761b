"""Keeping integers of four bits as they are: declaring linear weights of checkpoints that hold them
(`weights.grouped`) anew.

They then stay in four bits on the devices: `ops.int4_product` and `ops.grouped_gemm` multiply with them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from jaxserve.layers.group_quant import GroupQuant
from jaxserve.layers.group_scaled import GroupScaled
from jaxserve.layers.linear import Projections
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.moe import Experts
from jaxserve.layers.weight import Assemble, Stacked, weight
from jaxserve.ops import four_bits, int4
from jaxserve.ops.int4_product import DEPTH

Ways = Callable[[str | None], int]
"""Logical axis of a dimension -> over how many devices it is split."""


def keep_packed(model: nnx.Module, quant: GroupQuant, ways: Ways) -> tuple[int, int]:
    """Declare the linear weights that `quant` covers as they are stored, if a device's part of them is a
    whole number of tiles and groups. Returns how many stay packed, layers' experts being one, and how many
    do not: those are widened at load."""
    kept = left = 0
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, Experts) and any(_is_covered(p, quant) for p in (node.gate, node.up, node.down)):
            is_kept = _keep_experts(node, quant, ways)
            kept, left = kept + is_kept, left + (not is_kept)
        elif isinstance(node, GatedMLP):
            kept += _join_gate_up(node.gate_up, quant, ways)
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.List):
            places, put = list(enumerate(node)), node.__setitem__
        elif isinstance(node, nnx.Module) and not isinstance(node, Experts):
            places, put = list(vars(node).items()), partial(setattr, node)
        else:
            continue
        for place, param in places:
            if _is_covered(param, quant):
                if (packed := _declare(param, quant, ways)) is not None:
                    put(place, packed)  # pyright: ignore[reportArgumentType]
                kept, left = kept + (packed is not None), left + (packed is None)
    return kept, left


def _is_covered(param: Any, quant: GroupQuant) -> bool:
    if not isinstance(param, nnx.Param) or param.get_metadata().get("num_out") is None:
        return False
    return all(quant.covers(source) for source in param.sources)


@dataclass(frozen=True)
class _Packing:
    """How matrices [N, K] of one shape are packed: how many are joined by turns, and which are stacked."""

    N: int
    K: int
    group: int  # on the device
    dtype: Any
    num_joined: int = 1
    lead: tuple[int, ...] = ()  # dimensions of stacked ones

    def declare(self, axes: tuple[str | None, ...], sources: tuple[str, ...]) -> tuple[nnx.Param, ...]:
        """(numbers, scales, zeros), given the logical axes of stacked ones, outputs and inputs."""
        tiles = self.num_joined * self.N // four_bits.ROWS

        def part(name: str, lines: int, each: Assemble, **options: Any) -> nnx.Param:
            shape = *self.lead, tiles, lines, four_bits.LINE
            names = (f"{source}.{name}" for source in sources)
            assemble = Stacked(each, self.num_joined) if self.lead else each
            return weight(shape, (*axes, None), *names, assemble=assemble, **options)

        num_groups = self.K // self.group
        of_rows: dict[str, Any] = {"dtype": self.dtype, "is_scale": True}
        pack_scales, pack_zeros = (
            _Packed(partial(pack, dtype=self.dtype), num_groups)
            for pack in (int4.pack_scales, int4.pack_zeros)
        )
        # Codes that are drawn evenly are 4.6 from their middle: the root of their mean square.
        scale, zero = 1 / (4.6 * math.sqrt(self.K)), 8 + int4.offset(self.dtype).value
        return (
            part("codes", self.K // 2, _Packed(int4.pack), dtype=np.uint8),
            part("scales", num_groups, pack_scales, init=scale, **of_rows),
            part("zeros", num_groups, pack_zeros, init=zero, **of_rows),
        )


def _declare(param: nnx.Param, quant: GroupQuant, ways: Ways) -> GroupScaled | None:
    shape, num_out = param.get_raw_value().shape, param.num_out
    axes = param.logical[0], param.logical[num_out]
    N, K = math.prod(shape[:num_out]), math.prod(shape[num_out:])
    group = int4.group_on_device(quant.group_size or K)
    is_whole = N % (four_bits.ROWS * ways(axes[0])) == 0 == K % (DEPTH * ways(axes[1]))
    if param.assemble is not None or not group or not is_whole:
        return None
    return GroupScaled(
        *_Packing(N, K, group, param.get_raw_value().dtype).declare(axes, param.sources), shape=shape
    )


def _join_gate_up(gate_up: Projections, quant: GroupQuant, ways: Ways) -> bool:
    """So that one kernel computes both and what is between them, where that can be."""
    weights: list[Any] = list(gate_up.weights)
    gate, up = weights
    if not _is_covered(gate, quant) or not _is_covered(up, quant) or len(gate_up.biases):
        return False
    (F, D), axes = gate.get_raw_value().shape, gate.logical
    group = int4.group_on_device(quant.group_size or D)
    if gate.assemble is not None or not group or D % DEPTH or F % (four_bits.ROWS // 2 * ways(axes[0])):
        return False
    packing = _Packing(F, D, group, gate.get_raw_value().dtype, num_joined=2)
    arrays = packing.declare(axes, (*gate.sources, *up.sources))
    joined: Any = GroupScaled(*arrays, shape=(2 * F, D), is_joined=True)
    gate_up.weights = nnx.List([joined])
    gate_up.fused = True
    return True


def _keep_experts(experts: Experts, quant: GroupQuant, ways: Ways) -> bool:
    if not all(_is_covered(param, quant) for param in (experts.gate, experts.up, experts.down)):
        return False
    (E, F, D), axes = experts.gate.get_raw_value().shape, experts.gate.logical
    up_group, down_group = (int4.group_on_device(quant.group_size or K) for K in (D, F))
    is_whole = D % four_bits.ROWS == 0 == F % (math.lcm(four_bits.ROWS, down_group or 1) * ways(axes[1]))
    if not up_group or not down_group or not is_whole or D % up_group:
        return False
    pairs = zip(experts.gate.sources, experts.up.sources)
    dtype, order = experts.gate.get_raw_value().dtype, experts.gate.get_metadata().get("order")
    up = _Packing(F, D, up_group, dtype, num_joined=2, lead=(E,))
    down = _Packing(D, F, down_group, dtype, lead=(E,))
    experts.gate, gate_scale, gate_zero = up.declare(axes, tuple(name for pair in pairs for name in pair))
    down_axes = experts.down.logical
    experts.down, down_scale, down_zero = down.declare(down_axes, experts.down.sources)
    experts.gate_scale, experts.gate_zero = nnx.data(gate_scale), nnx.data(gate_zero)
    experts.down_scale, experts.down_zero = nnx.data(down_scale), nnx.data(down_zero)
    experts.up = experts.up_scale = nnx.data(None)
    for param in (experts.gate, gate_scale, gate_zero, experts.down, down_scale, down_zero):
        param.set_metadata(order=order)
    return True


@dataclass(frozen=True)
class _Packed:
    """Assembles a part of one matrix, or of two joined ones. Groups on the device may be parts of stored
    ones, `num_groups` in all."""

    pack: Callable[[np.ndarray], np.ndarray]
    num_groups: int | None = None

    def __call__(self, *stored: np.ndarray) -> np.ndarray:
        matrix = stored[0] if len(stored) == 1 else four_bits.join(*stored)
        if self.num_groups is not None:
            matrix = np.repeat(matrix, self.num_groups // matrix.shape[1], axis=1)
        return self.pack(matrix)
