"""What the devices keep of a model's experts: how often each was chosen, and which slots hold it.

Owned by the runner, which launches the programs here like any other: on every host in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.batch import Packing
from jaxserve.layers.moe import ExpertSpec, MoE
from jaxserve.parallel.placement import Placement, plan_moves
from jaxserve.parallel.slots import SlotTable, move_slots


@dataclass(frozen=True)
class Balancing:
    """How experts are moved: `weights` are, for each layer, the numbers of its stacked weights among the
    model's leaves; the others are as the configuration's keys of similar names."""

    weights: Sequence[tuple[int, ...]]
    num_steps: int
    layers_at_once: int


class ExpertState:
    """Counters of all experts and, with `balancing`, the table of their slots.

    Attributes:
        load: uint32 [ranks * L, E], how often each rank's tokens chose each expert; wraps.
        placement: where experts are once the launched programs have run; without `balancing` for ever.
    """

    def __init__(self, spec: ExpertSpec, num_ranks: int, mesh: Mesh, ep: int, balancing: Balancing | None):
        self.spec, self.balancing = spec, balancing
        self.placement = Placement.trivial(spec.num_layers, spec.num_experts, spec.num_slots, ep)
        self._num_ranks, self._mesh = num_ranks, mesh
        self._whole = NamedSharding(mesh, PartitionSpec())
        by_rank = NamedSharding(mesh, PartitionSpec("dp"))
        shape = (num_ranks * spec.num_layers, spec.num_experts)
        self.load = jax.jit(partial(jnp.zeros, shape, jnp.uint32), out_shardings=by_rank)()
        self.slots: SlotTable | None = None
        if balancing is not None:
            table = self.placement.table(spec.num_experts)
            make = jax.jit(lambda: SlotTable(*map(jnp.asarray, table)), out_shardings=self._whole)
            self.slots = make()
        self._seen = np.zeros(shape, np.uint32)
        self._total_LE = np.zeros((spec.num_layers, spec.num_experts), np.uint64)
        self._kinds: list[int] = []  # which program moves each layer's experts

    def count(self, load: np.ndarray) -> np.ndarray:
        """Tokens that chose each expert since the start, uint64 [L, E], given the counters as they are now.

        Differences are added, so a read within every 2**32 tokens keeps the totals right.
        """
        new = (load - self._seen).reshape(self._num_ranks, *self._total_LE.shape)
        self._seen = load
        self._total_LE = self._total_LE + new.sum(axis=0, dtype=np.uint64)
        return self._total_LE

    # ---- moving ----

    def tasks(self, leaves: Sequence[jax.ShapeDtypeStruct]) -> dict[Any, tuple[Any, ...]]:
        """Programs to compile, as the runner's: one for each kind of layer, mostly one for all."""
        if self.balancing is None:
            return {}
        packing, ranks = self._packing, self._num_ranks
        packed = jax.ShapeDtypeStruct(
            (ranks, packing.length), np.int32, sharding=NamedSharding(self._mesh, PartitionSpec("dp"))
        )
        slots = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.slots
        )
        kinds: dict[Any, int] = {}
        tasks = {}
        for numbers in self.balancing.weights:
            weights = tuple(leaves[number] for number in numbers)
            kind = kinds.setdefault(tuple((x.shape, x.dtype, x.sharding) for x in weights), len(kinds))
            self._kinds.append(kind)
            shardings = tuple(x.sharding for x in weights)
            function = partial(move_experts, self._mesh, tuple(s.spec for s in shardings), packing)
            done = (shardings, self._whole, self._whole)
            tasks["move_experts", kind] = (function, (weights, slots, packed), (0, 1), done)
        return tasks

    def pack_move(self, layer: int, logical_P: np.ndarray) -> tuple[Any, np.ndarray]:
        """(program, its argument) to put the experts `logical_P` into a layer's slots, from now on."""
        before = self.placement
        moves = plan_moves(before.logical_LP[layer], logical_P, before.num_devices)
        self.placement = before.with_layer(layer, logical_P)
        first_LE, count_LE, slot_LP = Placement(logical_P[None], before.num_devices).table(
            self.spec.num_experts
        )
        row = np.zeros(self._packing.length, np.int32)
        values = dict(offer=moves.offer_RD.reshape(-1), take=moves.take_P, first=first_LE[0])
        values |= dict(layer=layer, num_rounds=moves.num_rounds, count=count_LE[0], slot=slot_LP[0])
        for name, view in self._packing.views(row).items():
            view[:] = values[name]
        return ("move_experts", self._kinds[layer]), np.tile(row, (self._num_ranks, 1))

    def carry_out(
        self, program: Callable, row: np.ndarray, leaves: list[jax.Array], packed: jax.Array
    ) -> jax.Array:
        """Start a move; its new weights replace those in `leaves`. Returns something to wait for.

        `row` is `packed` as the host has it.
        """
        assert self.balancing is not None
        (layer,) = self._packing.views(row[0])["layer"].tolist()
        numbers = self.balancing.weights[layer]
        weights, self.slots, done = program(tuple(leaves[n] for n in numbers), self.slots, packed)
        for number, array in zip(numbers, weights, strict=True):
            leaves[number] = array
        return done

    @property
    def _packing(self) -> Packing:
        E, P, i = self.spec.num_experts, self.spec.num_slots, np.int32
        return Packing(
            layer=(1, i),
            num_rounds=(1, i),
            offer=(P, i),
            take=(P, i),
            first=(E, i),
            count=(E, i),
            slot=(P, i),
        )


def move_experts(
    mesh: Mesh,
    specs: tuple[PartitionSpec, ...],
    packing: Packing,
    weights: tuple[jax.Array, ...],
    slots: SlotTable,
    packed_RM: jax.Array,
) -> tuple[tuple[jax.Array, ...], SlotTable, jax.Array]:
    """Move a layer's experts and write down where they are. All ranks are given the same row."""
    f = packing.unpack(packed_RM[:1])
    layer = f["layer"][0]
    weights = move_slots(mesh, specs, weights, f["offer"], f["take"], f["num_rounds"][0])
    rows = SlotTable(f["first"], f["count"], f["slot"])
    slots = jax.tree.map(lambda table, row: table.at[layer].set(row), slots, rows)
    return weights, slots, layer


def expert_leaves(model: nnx.Module, leaves: Sequence[jax.Array]) -> list[tuple[int, ...]]:
    """Of each layer with experts, the numbers of its stacked weights among `leaves`."""
    number = {id(leaf): i for i, leaf in enumerate(leaves)}
    layers: dict[int, tuple[int, ...]] = {}
    for _, moe in nnx.iter_graph(model):
        if isinstance(moe, MoE):
            params = [p for _, p in nnx.iter_graph(moe.experts) if isinstance(p, nnx.Param)]
            stacked = [p for p in params if p.logical[:1] == ("expert",)]
            layers[moe.index] = tuple(number[id(p.get_raw_value())] for p in stacked)
    return [layers[index] for index in sorted(layers)]
