"""Physical expert slots on the devices: finding a token's slots, and moving experts between them.

With expert balancing a layer has more slots than experts, and hot experts have several. Slots are
sharded over (dp, ep) as experts are without it; which expert a slot holds changes between steps.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

MOVE_BYTES = 128 << 20  # of a device's memory while experts move; weights go through it piece by piece


class SlotTable(NamedTuple):
    """Where experts are, int32, whole on every device; see `placement.Placement.table`."""

    first_LE: jax.Array
    count_LE: jax.Array
    slot_LP: jax.Array

    def layer(self, layer: int) -> "SlotTable":
        return SlotTable(*(array[layer] for array in self))

    def find(self, expert_TX: jax.Array, first_number: jax.Array) -> jax.Array:
        """In a table of one layer: the slot for each expert, -1 for -1.

        The copies of an expert take tokens in turn, by the token's number, from `first_number` on.
        """
        expert = jnp.maximum(expert_TX, 0)
        number_T = first_number + jnp.arange(expert_TX.shape[0], dtype=jnp.int32)
        turn_TX = number_T[:, None] % self.count_LE[expert]
        return jnp.where(expert_TX < 0, -1, self.slot_LP[self.first_LE[expert] + turn_TX])


def move_slots(
    mesh: Mesh,
    specs: tuple[PartitionSpec, ...],
    arrays: tuple[jax.Array, ...],
    offer_M: jax.Array,
    take_P: jax.Array,
    num_rounds: jax.Array,
) -> tuple[jax.Array, ...]:
    """Carry out `placement.Moves` on the weights [P, ...] of one layer, sharded as `specs` say.

    `offer_M` is its `offer_RD`, round after round.
    Donated, they change in place: beside them a device needs MOVE_BYTES. Only rounds that there are
    cost anything.
    """
    axes = specs[0][0]
    assert all(spec[0] == axes for spec in specs), f"slots are sharded in different ways: {specs}"
    num_devices = math.prod(mesh.shape[axis] for axis in axes)

    def on_device(arrays, offer_M, take_P, num_rounds):
        me = lax.axis_index(axes)
        num_local = arrays[0].shape[0]
        take_s = lax.dynamic_slice_in_dim(take_P, me * num_local, num_local)

        def move(x: jax.Array) -> jax.Array:
            size = _piece(x, num_local, num_devices)

            def move_piece(piece: jax.Array, x: jax.Array) -> jax.Array:
                before = lax.dynamic_slice_in_dim(x, piece * size, size, axis=1)

                def one_round(number: jax.Array, after: jax.Array) -> jax.Array:
                    mine = lax.dynamic_index_in_dim(
                        before, jnp.maximum(offer_M[number * num_devices + me], 0)
                    )
                    shown = _as_bits(lax.all_gather(_as_bits(mine), axes, tiled=True), x.dtype)
                    takes_s = (take_s >= 0) & (take_s // num_devices == number)
                    takes_s = takes_s.reshape(-1, *(1,) * (x.ndim - 1))
                    return jnp.where(takes_s, shown[take_s % num_devices], after)

                after = lax.fori_loop(0, num_rounds, one_round, before)
                return lax.dynamic_update_slice_in_dim(x, after, piece * size, axis=1)

            return lax.fori_loop(0, x.shape[1] // size, move_piece, x)

        return tuple(move(x) for x in arrays)

    whole = PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, whole, whole, whole),
        out_specs=specs,
        check_vma=False,  # an all_gather's output carries no replication types
    )(arrays, offer_M, take_P, num_rounds)


def _piece(x: jax.Array, num_local: int, num_devices: int) -> int:
    """Rows of dimension 1 that move at a time, a divisor: before, after and taken, and what is shown."""
    row_bytes = math.prod(x.shape[2:]) * x.dtype.itemsize * (3 * num_local + num_devices)
    rows = x.shape[1]
    return next(n for n in range(rows, 0, -1) if rows % n == 0 and (n * row_bytes <= MOVE_BYTES or n == 1))


def _as_bits(x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Integers of the same width, since not every collective knows float8; or back to `dtype`."""
    integer = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return lax.bitcast_convert_type(x, dtype or integer)
