"""The kernel that GPUs of one process exchange arrays by, against XLA's collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.mesh import AXES, Layout, make_mesh
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
