"""Rows of `tools.bench_ops` for sums over GPUs: the kernel of `jaxserve.ops.peer_exchange` and XLA's.

The floor is what a device sends of a sum that is made in parts, (N - 1) / N of it twice, at the rate of
one direction of its links, measured first. Times are of a sum and of the addition behind it, one after
the other in a program without loops, which would start each from the host.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.engine.compiler import compiler_options
from jaxserve.mesh import AXES, GROUP, Layout, make_mesh
from jaxserve.parallel.links import LinkArrays, LinkPlan, Links
from tools.bench_timing import Row

ROWS, WIDTH = (1, 8, 32, 64, 128, 256), 4096  # of bfloat16
LINK_BYTES = 1 << 28


def exchange_rows(
    rows: Sequence[int] = ROWS, width: int = WIDTH, iterations: int = 32, link_bytes: int = LINK_BYTES
) -> list[Row]:
    """Over as many of this machine's GPUs as the largest power of two; none where they reach nobody."""
    num = 1 << (len(jax.devices()).bit_length() - 1)
    mesh = make_mesh(Layout(num), jax.devices())
    plan = LinkPlan.of(mesh)
    if plan is None:
        return []
    arrays, mailboxes = plan.make(mesh)
    bytes_per_s = link_bytes_per_s(mesh, link_bytes)
    made = []
    for count in rows:
        size = count * width * 2
        floor_us = 2 * (num - 1) / num * size / bytes_per_s * 1e6
        for name in ("kernel", "XLA"):
            call = chain(mesh, plan, arrays, (count, width), iterations, by_xla=name == "XLA")
            s, arrays = best_of(call, arrays, iterations)
            shape = f"{count} rows of {width} over {num}, {name}"
            made.append(Row("exchange", shape, s * 1e6, floor_us, f"{size / s / 1e9:.0f} GB/s"))
    del mailboxes
    return made


def chain(
    mesh: Mesh,
    plan: LinkPlan,
    arrays: LinkArrays,
    shape: tuple[int, int],
    iterations: int,
    by_xla: bool,
) -> Callable[[LinkArrays], tuple[jax.Array, LinkArrays]]:
    """Sums, compiled: from links' arrays to something to wait for and the arrays of the next call."""
    num, wanted = plan.size(GROUP), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    counts = 0 if by_xla else Links(plan, arrays).count(wanted, GROUP)

    def on_device(arrays: LinkArrays) -> tuple[jax.Array, LinkArrays]:
        x = jnp.full(shape, 1 + lax.axis_index(GROUP), jnp.bfloat16)
        for i in range(iterations):
            if by_xla:
                total = lax.psum(x, GROUP)
            else:
                total = Links(plan, arrays, x, {GROUP: i * counts}).sum(x, GROUP)
                assert total is not None
            x = (total * (0.5 / num) + x * 0.5).astype(x.dtype)
        numbers = tuple(number + iterations * counts for number in arrays.number)
        return x[:1, :1], arrays._replace(number=numbers)

    specs = PartitionSpec(AXES), PartitionSpec()
    function = jax.shard_map(on_device, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs, check_vma=False)
    return jax.jit(function, compiler_options=compiler_options(None)).lower(arrays).compile()


def best_of(call: Callable[[Any], tuple[jax.Array, Any]], state: Any, iterations: int) -> tuple[float, Any]:
    """Seconds of an iteration, the best of three calls, and the state after them."""
    best, (made, state) = float("inf"), call(state)
    made.block_until_ready()
    for _ in range(3):
        start = time.perf_counter()
        made, state = call(state)
        made.block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best / iterations, state


def link_bytes_per_s(mesh: Mesh, size: int, iterations: int = 4) -> float:
    """What a device sends to its neighbour while all do."""
    num = mesh.size
    ring = [(i, (i + 1) % num) for i in range(num)]

    def on_device(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(iterations):
            x = lax.ppermute(x, AXES, ring)
        return x[:1], x

    spec = PartitionSpec(AXES)
    call = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.jit(lambda: jnp.zeros((num * size,), jnp.int8), out_shardings=jax.NamedSharding(mesh, spec))()
    s, _ = best_of(call, x, iterations)
    return size / s
