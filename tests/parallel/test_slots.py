"""Physical slots on the devices: copies take turns, and moved weights arrive bit for bit, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.mesh import Layout, make_mesh
from jaxserve.parallel import slots
from jaxserve.parallel.dispatch import EXPERT_AXES
from jaxserve.parallel.placement import Placement, plan_moves
from jaxserve.parallel.slots import SlotTable, move_slots

E, F, D = 8, 6, 4


def table_of(logical_P):
    placement = Placement(np.array([logical_P]), 1)
    return SlotTable(*map(jnp.asarray, placement.table(max(logical_P) + 1))).layer(0)


def test_copies_of_an_expert_take_tokens_in_turn():
    table = table_of([0, 1, 0, 2, 0])
    found = table.find(jnp.array([[0, 1], [0, 2], [1, 0], [-1, -1], [2, 0]]), jnp.int32(1))
    assert found.tolist() == [[2, 1], [4, 3], [1, 0], [-1, -1], [3, 4]]


@pytest.mark.parametrize("layout", [Layout(8, dp=8, ep=8), Layout(8, dp=2, ep=4), Layout(2, ep=2)], ids=str)
@pytest.mark.parametrize("move_bytes", [1, slots.MOVE_BYTES], ids=["row by row", "at once"])
def test_moved_weights_of_every_type_and_rank_are_those_of_their_experts(layout, move_bytes, monkeypatch):
    monkeypatch.setattr(slots, "MOVE_BYTES", move_bytes)
    mesh, rng = make_mesh(layout, jax.devices()), np.random.default_rng(0)
    before = Placement.trivial(1, E, 16, layout.ep).logical_LP[0]
    specs = (
        PartitionSpec(EXPERT_AXES, "tp"),
        PartitionSpec(EXPERT_AXES, None, "tp"),
        PartitionSpec(EXPERT_AXES),
    )
    experts = (
        rng.normal(size=(E, F, D)).astype(jnp.bfloat16),
        rng.normal(size=(E, D, F)).astype(jnp.float8_e4m3fn),
        rng.normal(size=(E, D)).astype(np.float32),
    )
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    arrays = jax.device_put(tuple(x[before] for x in experts), shardings)
    move = jax.jit(
        lambda arrays, *moves: move_slots(mesh, specs, arrays, *moves),
        donate_argnums=0,
        out_shardings=shardings,
    )
    for _ in range(3):
        after = rng.permutation([*range(E), *rng.integers(0, E, 8)])
        moves = plan_moves(before, after, layout.ep)
        arrays = move(arrays, moves.offer_RD.reshape(-1), moves.take_P, np.int32(moves.num_rounds))
        for array, expert in zip(arrays, experts):
            np.testing.assert_array_equal(np.asarray(array), expert[after])
        before = after


def test_moving_needs_little_memory_beside_the_weights(monkeypatch):
    monkeypatch.setattr(slots, "MOVE_BYTES", 1 << 16)
    layout = Layout(8, dp=8, ep=8)
    mesh, spec = make_mesh(layout, jax.devices()), PartitionSpec(EXPERT_AXES)
    shape = jax.ShapeDtypeStruct((16, 1024, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    moves = [jax.ShapeDtypeStruct(size, np.int32) for size in ((16,), (16,), ())]
    compiled = (
        jax.jit(lambda *a: move_slots(mesh, (spec,), a[0], *a[1:]), donate_argnums=0).lower((shape,), *moves)
    ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * 1024 * 64 * 4  # a device's two slots
    assert memory.temp_size_in_bytes < 2 * slots.MOVE_BYTES
