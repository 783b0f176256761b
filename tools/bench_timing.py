"""What kernel benchmarks share: a row of a table, what the card does at best, and timing in a loop."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Row:
    name: str
    shape: str
    us: float
    floor_us: float
    rate: str


@dataclass(frozen=True)
class Card:
    """What this card does at best, measured."""

    name: str
    bytes_per_s: float
    flops_per_s: float  # of bfloat16 products
    fp8_flops_per_s: float

    def floor_s(self, num_bytes: float, flops: float = 0, fp8: bool = False) -> float:
        """The time that bytes or operations take, whichever is longer."""
        return max(num_bytes / self.bytes_per_s, flops / (self.fp8_flops_per_s if fp8 else self.flops_per_s))


def measure_card() -> Card:
    """A 2 GB copy, read plus written, and an 8192^3 product, of bfloat16 and of float8."""
    x = jnp.zeros((1 << 30,), jnp.bfloat16)
    copy_s = seconds(lambda x, i: x + 1, x, iterations=10, carry=True)
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product_s = seconds(lambda a, i: (a @ a).astype(a.dtype), a, iterations=10, carry=True)
    b = a.astype(jnp.float8_e4m3fn)
    fp8_s = seconds(lambda x, i, b: in_float8(x, b), b, b, iterations=10, carry=True)
    flops = 2 * 8192**3
    return Card(
        jax.devices()[0].device_kind, 2 * x.nbytes / copy_s, flops / product_s, flops / min(fp8_s, product_s)
    )


def in_float8(x: jax.Array, b: jax.Array) -> jax.Array:
    y = lax.dot_general(x, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
    return (y / 8192).astype(x.dtype)


def seconds(
    function: Callable,
    x: jax.Array,
    *arguments: Any,
    iterations: int,
    carry: bool = False,
    options: dict[str, Any] | None = None,
) -> float:
    """Seconds of one `function(x, i, *arguments)`, i counting: the best of three loops of `iterations`.

    Without `carry`, each call's x depends on the result before it by one number, so that no call
    can be moved out of the loop or run beside another. `options` are the compiler's.
    """

    def step(arguments, i, x):
        out = lax.optimization_barrier(function(x, i, *arguments))
        if carry:
            return out
        return (x + out.ravel()[0].astype(x.dtype) * jnp.asarray(1e-6, x.dtype)).astype(x.dtype)

    def run(x, arguments):
        return lax.fori_loop(0, iterations, functools.partial(step, arguments), x)

    loop = jax.jit(run, compiler_options=options).lower(x, arguments).compile()
    loop(x, arguments).block_until_ready()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        loop(x, arguments).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best / iterations
