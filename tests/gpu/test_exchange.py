"""The kernel that GPUs of one process exchange arrays by, against XLA's collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.mesh import AXES, GROUP, Layout, make_mesh
from jaxserve.parallel.links import LinkPlan, Links

pytestmark = pytest.mark.gpu

ROUNDS = 50  # of one program; mailboxes are used in turn, and by messages of all sizes


def layouts():
    for count in (2, 4, 8):
        yield Layout(count)
        yield Layout(count, dp=count)
        if count > 2:
            yield Layout(count, dp=2)


@pytest.mark.parametrize("layout", list(layouts()), ids=lambda layout: f"{layout.num_devices}-dp{layout.dp}")
def test_exchanges_are_those_of_xla(layout):
    if len(jax.devices()) < layout.num_devices:
        pytest.skip(f"needs {layout.num_devices} GPUs")
    mesh = make_mesh(layout, jax.devices())
    plan = LinkPlan.of(mesh)
    assert plan is not None, "GPUs of one host that cannot reach each other"
    arrays, mailboxes = plan.make(mesh)
    n = layout.num_devices

    def on_device(x_RD, whole_RD, ids_tX, arrays):
        """Every kind of exchange, and how far it is from XLA's."""
        links, errors = Links(plan, arrays, jnp.zeros(1)), []
        for axes in plan.groups:
            num = plan.size(axes)
            for rows in (1, 8, 64, x_RD.shape[0]):
                x = x_RD[:rows]
                errors.append(far(links.sum(x, axes), jax.lax.psum(x, axes)))
                errors.append(far(links.gather(x, axes), jax.lax.all_gather(x, axes, tiled=True)))
                if rows % num == 0:
                    wanted = jax.lax.psum_scatter(x, axes, tiled=True)
                    errors.append(far(links.scatter_sum(x, axes), wanted))
            small = whole_RD[:3]
            errors.append(far(links.sum(small, axes), jax.lax.psum(small, axes)))
            wanted = jax.lax.all_gather(ids_tX, axes, tiled=True)
            errors.append(far(links.gather(ids_tX, axes), wanted))
        return jnp.stack(errors)[None], links.after()

    by_device = functools.partial(jax.device_put, device=NamedSharding(mesh, P(AXES)))
    keys = jax.random.split(jax.random.key(0), 2)
    x = by_device(jax.random.normal(keys[0], (n * 128, 2048), jnp.bfloat16))
    wide = by_device(jax.random.normal(keys[1], (n * 8, 1024)))
    ids = by_device(jnp.arange(n * 5 * 6, dtype=jnp.int32).reshape(n * 5, 6))
    program = jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(P(AXES), P(AXES), P(AXES), P()),
            out_specs=(P(AXES), P()),
            check_vma=False,
        )
    )
    for _ in range(ROUNDS):
        errors, arrays = program(x, wide, ids, arrays)
        # bfloat16 sums of up to eight normal numbers: XLA rounds after each addition.
        assert np.asarray(errors).max() <= 0.125, np.asarray(errors)
    del mailboxes


def far(got, wanted):
    assert got is not None and got.shape == wanted.shape and got.dtype == wanted.dtype
    return jnp.abs(got.astype(jnp.float32) - wanted.astype(jnp.float32)).max()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_member_that_is_late_still_finds_what_was_sent_to_it(count):
    """Exchanges of both parities and of two sizes, before each of which another member is late."""
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} GPUs")
    mesh = make_mesh(Layout(count), jax.devices())
    plan = LinkPlan.of(mesh)
    assert plan is not None
    arrays, mailboxes = plan.make(mesh)

    def on_device(x_M, arrays):
        links, me, errors = Links(plan, arrays, jnp.zeros(1)), jax.lax.axis_index(GROUP), []
        for turn in range(16):
            size = 1024 if turn % 3 else x_M.size
            loops = jnp.where(me == turn % count, 100_000, 0)
            got = links.sum(after_a_while(x_M[:size] + turn, loops), GROUP)
            errors.append(far(got, sum_of_all(size, turn)))
        return jnp.stack(errors)[None], links.after()

    def sum_of_all(size, turn):
        return jnp.full((size,), count * (count - 1) / 2 + count * turn, jnp.float32)

    program = jax.jit(
        jax.shard_map(
            on_device, mesh=mesh, in_specs=(P(AXES), P()), out_specs=(P(AXES), P()), check_vma=False
        )
    )
    x_M = jnp.repeat(jnp.arange(count, dtype=jnp.float32), 1 << 16)
    x_M = jax.device_put(x_M, NamedSharding(mesh, P(AXES)))
    for _ in range(ROUNDS):
        errors, arrays = program(x_M, arrays)
        np.testing.assert_array_equal(errors, 0)
    del mailboxes


def after_a_while(x_M, loops):
    """`x_M`, once some program has gone round so many times."""

    def kernel(x_ref, loops_ref, out_ref):
        much = jax.lax.fori_loop(0, loops_ref[0], lambda i, value: value * 0.5 + 1.0, jnp.float32(0))
        out_ref[...] = x_ref[...] + (much > 2.0).astype(x_M.dtype)  # never; a compiler does not know

    block = pl.BlockSpec((1024,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        grid=(x_M.size // 1024,),
        in_specs=[block, pl.BlockSpec((1,), lambda i: (0,))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x_M.shape, x_M.dtype),
    )(x_M, loops.reshape(1))
