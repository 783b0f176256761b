"""The feed-forward of experts: each token goes through the experts it names, and only those.

An expert is down(act(gate(x), up(x))); all weights are stacked over experts and keep the
checkpoint's [out, in] layout. An expert id of -1 names none and costs nothing: padding, or an
expert that lives on another device.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxserve.ops import backend, four_bits
from jaxserve.ops.grouped_gemm import fast, hopper, reference
from jaxserve.ops.hopper import is_supported

logger = logging.getLogger(__name__)

Activation = Callable[[jax.Array, jax.Array], jax.Array]
"""(gate, up) -> inner, elementwise, in float32; written in jax.numpy so that a kernel can fuse it."""


class ExpertWeights(NamedTuple):
    """What `feed_forward` multiplies with. Biases and scales are None where a model has none.

    A scale belongs to weights in float8: one float32 for each block of a weight matrix, so
    `gate_scale` is [E, F / block, D / block] and the block sizes follow from the shapes.

    Weights of four bits are uint8, as `ops.four_bits` packs them: gate and up joined, [E, F / 32, D / 2, 64],
    up itself None; down [E, D / 64, F / 2, 64]. Scales are [E, F / 32, D / group, 64] and [E, D / 64,
    F / group, 64]: the exponents of MXFP4, uint8; or those of integers, which have zeros beside them.
    """

    gate_EFD: jax.Array
    up_EFD: jax.Array | None
    down_EDF: jax.Array
    gate_bias_EF: jax.Array | None = None
    up_bias_EF: jax.Array | None = None
    down_bias_ED: jax.Array | None = None
    gate_scale: jax.Array | None = None
    up_scale: jax.Array | None = None
    down_scale: jax.Array | None = None
    gate_zero: jax.Array | None = None
    down_zero: jax.Array | None = None


def feed_forward(
    hidden_TD: jax.Array,
    expert_TX: jax.Array,
    weight_TX: jax.Array,
    weights: ExpertWeights,
    activation: Activation,
    rows_per_expert: float | None = None,
) -> jax.Array:
    """Sum over a token's experts of weight times the expert's output; float32 [T, D].

    Args:
        expert_TX: int32 ids in [0, E), or -1; a token names an expert once at most.
        weight_TX: float32; what stands beside an id of -1 is not used.
        rows_per_expert: how many tokens name an expert, were they spread evenly; settles speed alone.
            T * X / E unless given, which is too many where most ids are -1.
    """
    if rows_per_expert is None:
        rows_per_expert = expert_TX.size / weights.gate_EFD.shape[0]
    if (chosen := backend.chosen()) == "reference":
        return reference.feed_forward(hidden_TD, expert_TX, weight_TX, weights, activation)
    arrays = hidden_TD, expert_TX, weight_TX, weights
    if chosen == "fast" and is_supported() and hopper.fits(hidden_TD, weights, rows_per_expert):
        return hopper.feed_forward(*arrays, activation, hopper.choose_tiles(rows_per_expert, weights))
    if four_bits.is_packed(weights.gate_EFD):
        _warn_of_widening()
        arrays = *arrays[:3], reference.widened(weights, hidden_TD.dtype)
    tile = fast.choose_tile(rows_per_expert, hidden_TD.dtype.itemsize)
    return fast.feed_forward(*arrays, activation, tile, interpret=chosen == "interpret")


@functools.cache
def _warn_of_widening() -> None:
    """Once a process."""
    logger.warning(
        "no kernel here takes experts of four bits: each layer's are widened in every step, which is slow; "
        "--dequantize-weights widens them when they are loaded"
    )
