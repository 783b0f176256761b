"""Zeros that results are written to live no longer than their layer."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops.output import with_zeros

ROWS, COLUMNS, PARTS = 128, 1024, 8
BUFFER = ROWS * COLUMNS * 4


def temp_bytes(num_layers, make):
    """Of a compiled stack of layers that write their results in parts."""

    def layers(x):
        for _ in range(num_layers):
            x, zeros = make(x)

            def add_part(i, out, x=x):
                rows = lax.dynamic_slice_in_dim(x, i * (ROWS // PARTS), ROWS // PARTS)
                return lax.dynamic_update_slice_in_dim(out, jnp.sin(rows @ rows.T @ rows), i * len(rows), 0)

            x = lax.fori_loop(0, PARTS, add_part, zeros)
        return x

    compiled = jax.jit(layers).lower(jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_more_layers_take_no_more_zeros():
    assert temp_bytes(9, with_zeros) < temp_bytes(3, with_zeros) + 2 * BUFFER
    # What it is for; if this fails, XLA has learnt it and `with_zeros` can go.
    assert temp_bytes(9, lambda x: (x, jnp.zeros_like(x))) > temp_bytes(3, with_zeros) + 4 * BUFFER


def test_input_stays_and_zeros_have_its_type_or_the_one_given():
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    for dtype in (None, jnp.float32):
        same, zeros = with_zeros(x, dtype)
        assert (same == x).all() and not zeros.any()
        assert (zeros.shape, zeros.dtype) == (x.shape, dtype or x.dtype)
