"""Expert dispatch over virtual devices: every backend on every layout equals the layer on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxserve.mesh import Layout, make_mesh
from jaxserve.ops import backend as kernels
from jaxserve.ops.grouped_gemm import ExpertWeights, feed_forward
from jaxserve.parallel.dispatch import AXES, EXPERT_AXES, Dispatch, Exchange, _weight_specs
from jaxserve.parallel.placement import Placement
from jaxserve.parallel.slots import SlotTable
from tests.ops.cases import H100

E, D, F, X = 16, 16, 24, 3
# Sums of some hundred terms of size 1 in float32, in another order.
TOLERANCE = 1e-5

LAYOUTS = [
    Layout(1),
    Layout(2),
    Layout(8),
    Layout(4, dp=2),
    Layout(8, dp=8),
    Layout(2, ep=2),
    Layout(4, ep=2),
    Layout(8, ep=8),
    Layout(4, dp=2, ep=2),
    Layout(4, dp=2, ep=4),
    Layout(8, dp=2, ep=4),
    Layout(8, dp=4, ep=4),
    Layout(8, dp=8, ep=8),
    Layout(8, dp=2, ep=8),
]
CELLS = [
    (layout, backend)
    for layout in LAYOUTS
    for backend in (("none",) if layout.ep == 1 else ("allgather", "all_to_all", "ragged", "auto"))
]


def name(cell):
    layout, backend = cell
    return f"{'x'.join(map(str, layout.shape))}-ep{layout.ep}-{backend}"


def silu(gate, up):
    return jax.nn.silu(gate) * up


def arrays(T, seed=0, biases=True, skew=False):
    """Tokens with random experts; a fifth is padding. `skew`: every token wants the same ones."""
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), jnp.float32)

    expert = np.stack([np.arange(X) if skew else rng.permutation(E)[:X] for _ in range(T)]).astype(np.int32)
    expert[rng.random(T) < 0.2] = -1
    weights = ExpertWeights(normal(E, F, D, fan_in=D), normal(E, F, D, fan_in=D), normal(E, D, F, fan_in=F))
    if biases:
        weights = weights._replace(
            gate_bias_EF=normal(E, F), up_bias_EF=normal(E, F), down_bias_ED=normal(E, D)
        )
    return normal(T, D), jnp.asarray(expert), jnp.asarray(rng.random((T, X)), jnp.float32), weights


@functools.cache
def on_one_device(T, seed):
    """The layer's arguments and its result."""
    inputs = arrays(T, seed)
    return inputs, np.asarray(feed_forward(*inputs, silu))


def dispatched(layout, backend, inputs, slots=None):
    """The layer over a mesh, with every array placed as the engine places it."""
    mesh = make_mesh(layout, jax.devices())
    hidden, expert, weight, weights = inputs
    rank = NamedSharding(mesh, PartitionSpec("dp"))
    axes = ((), AXES) if backend == "none" else (EXPERT_AXES, ("tp",))
    specs = _weight_specs(*axes)
    weights = ExpertWeights(
        *(x if x is None else jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(weights, specs))
    )
    hidden, expert, weight = (jax.device_put(x, rank) for x in (hidden, expert, weight))
    dispatch = Dispatch(mesh, backend)
    compiled = jax.jit(lambda *a: dispatch(*a, silu, slots)).lower(hidden, expert, weight, weights).compile()
    return np.asarray(compiled(hidden, expert, weight, weights)), compiled.as_text()


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_every_backend_equals_one_device(cell):
    layout, backend = cell
    for T_rank, seed in ((1, 0), (5, 1), (32, 2)):
        inputs, want = on_one_device(T_rank * layout.dp, seed)
        got, _ = dispatched(layout, backend, inputs)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["none", "allgather", "all_to_all"])
def test_kernels_are_told_how_many_rows_an_expert_has_on_all_devices(backend, monkeypatch):
    """By its own ids alone a device would take those of other devices' experts for rows."""
    told = set()

    def feed(hidden, *others, rows_per_expert):
        told.add(rows_per_expert)
        return feed_forward(hidden, *others)

    monkeypatch.setattr("jaxserve.parallel.dispatch.feed_forward", feed)
    layout = Layout(4, dp=2) if backend == "none" else Layout(4, dp=2, ep=4)
    inputs, want = on_one_device(64, 0)
    got, _ = dispatched(layout, backend, inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    assert told == {64 * X / E}


def test_sum_of_experts_is_rounded_only_where_devices_send_it():
    hidden, expert, weight, weights = arrays(4)
    inputs = hidden.astype(jnp.bfloat16), expert, weight, weights
    for mesh, dtype in ((None, jnp.float32), (make_mesh(Layout(2), jax.devices()), jnp.bfloat16)):
        dispatch = Dispatch(mesh)
        assert jax.eval_shape(lambda *inputs, d=dispatch: d(*inputs, silu), *inputs).dtype == dtype


@pytest.mark.parametrize("cell", [(lay, b) for lay, b in CELLS if lay.ep in (4, 8)][::2], ids=name)
def test_copied_and_shuffled_experts_give_the_same(cell):
    layout, backend = cell
    logical = np.random.default_rng(3).permutation([*range(E), *range(5), 0, 0, 1])
    placement = Placement(logical[None], layout.ep)
    slots = SlotTable(*map(jnp.asarray, placement.table(E))).layer(0)
    hidden, expert, weight, weights = arrays(12 * layout.dp)
    want = np.asarray(feed_forward(hidden, expert, weight, weights, silu))
    placed = ExpertWeights(*(None if x is None else x[logical] for x in weights))
    got, _ = dispatched(layout, backend, (hidden, expert, weight, placed), slots)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", [Layout(8, dp=8, ep=8), Layout(8, dp=2, ep=4)], ids=str)
def test_all_to_all_falls_back_when_every_token_wants_one_device_and_drops_none(layout):
    T = 160 * layout.dp
    plan = Exchange.plan(160, X, {"dp": layout.shape[0], "ep": layout.shape[1]})
    assert plan.capacity < plan.share  # or there would be nothing to fall back from
    inputs = arrays(T, skew=True)
    got, text = dispatched(layout, "all_to_all", inputs)
    assert "all-to-all" in text and "conditional" in text
    np.testing.assert_allclose(got, np.asarray(feed_forward(*inputs, silu)), rtol=0, atol=TOLERANCE)


def test_one_overfull_rank_takes_all_ranks_to_the_fallback():
    """Rank 0 alone is skewed: were the others to exchange all the same, the collectives would not meet."""
    layout = Layout(8, dp=8, ep=8)
    hidden, expert, weight, weights = arrays(64 * 8)
    expert = expert.at[:64].set(jnp.arange(X))
    inputs = (hidden, expert, weight, weights)
    got, _ = dispatched(layout, "all_to_all", inputs)
    np.testing.assert_allclose(got, np.asarray(feed_forward(*inputs, silu)), rtol=0, atol=TOLERANCE)


def test_ragged_has_room_for_all_and_never_falls_back():
    inputs = arrays(160 * 8, skew=True)
    got, text = dispatched(Layout(8, dp=8, ep=8), "ragged", inputs)
    assert "all-to-all" in text and "conditional" not in text
    np.testing.assert_allclose(got, np.asarray(feed_forward(*inputs, silu)), rtol=0, atol=TOLERANCE)


def test_ragged_lowers_to_ragged_collectives_for_cuda():
    """Without a GPU: tokens, their routing and the results; how many come is a plain one."""
    mesh = AbstractMesh((4, 2, 1), AXES, (AxisType.Auto,) * 3, abstract_device=H100.abstract_device)
    stack = jax.ShapeDtypeStruct((E, 64, 64), jnp.float32)
    hidden, weight = (jax.ShapeDtypeStruct((64, width), jnp.float32) for width in (64, X))
    expert = jax.ShapeDtypeStruct((64, X), jnp.int32)
    with kernels.use("fast"), jax.sharding.use_abstract_mesh(mesh):
        layer = jax.jit(lambda *arrays: Dispatch(mesh, "ragged")(*arrays, silu))
        traced = layer.trace(hidden, expert, weight, ExpertWeights(stack, stack, stack))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all") == 3
    assert text.count("stablehlo.all_to_all") == 1


def test_auto_gathers_small_steps_and_exchanges_large_ones():
    """8 ranks, 2 experts a token: a token needs 1.9 of 8 devices, so at 64 tokens exchange moves less."""
    layout = Layout(8, dp=8, ep=8)
    for tokens, exchanges in ((4, False), (64, True)):
        hidden, expert, weight, weights = arrays(tokens * 8)
        _, text = dispatched(layout, "auto", (hidden, expert[:, :2], weight[:, :2], weights))
        assert ("all-to-all" in text) is exchanges


def test_room_is_planned_for_a_token_travelling_once_to_each_device():
    plan = Exchange.plan(100, 8, {"dp": 8, "ep": 1})
    # 1 - (7/8) ** 8 = 0.656 of the tokens reach a given device; not 8 of 8.
    assert plan.capacity == 91  # ceil(1.25 * 65.64) + 8
