"""Sampling without a sort: exact thresholds by radix search, the draw in two levels.

Plain jax.numpy: every pass is a masked sum over the vocabulary, which XLA fuses into one read of
the logits and, when the vocabulary is sharded, one small all-reduce. Works on any backend.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops.sampling.rows import greedy, is_greedy, scaled


def sample(logits_RV, uniform_R, temperature_R, top_k_R, top_p_R, min_p_R):
    """See `sampling.sample`."""
    kept_RV = kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    drawn_R = _draw(jnp.where(kept_RV, scaled(logits_RV, temperature_R), -jnp.inf), uniform_R)
    return jnp.where(is_greedy(temperature_R) | (top_k_R == 1), greedy(logits_RV), drawn_R)


def sample_temperature(logits_RV, uniform_R, temperature_R):
    """See `sampling.sample_temperature`."""
    drawn_R = _draw(scaled(logits_RV, temperature_R), uniform_R)
    return jnp.where(is_greedy(temperature_R), greedy(logits_RV), drawn_R)


def kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, *, bits: int | None = None):
    """Which tokens may be drawn, [R, V] bool; equal to `reference.kept` up to the rounding of sums.

    bits: of the threshold a pass settles. A pass makes 2**bits - 1 sums in one read on a GPU; the
    CPU makes one read a sum, so there 1 is the cheapest.
    """
    V = logits_RV.shape[1]
    bits = bits or (4 if jax.default_backend() == "gpu" else 1)
    logits_RV = scaled(logits_RV, temperature_R)
    order_RV = _ordered(logits_RV)
    weight_RV = jnp.exp(logits_RV - logits_RV.max(axis=1, keepdims=True))

    k_R = jnp.where(top_k_R <= 0, V, jnp.minimum(top_k_R, V))
    kth_R = _threshold(order_RV, jnp.ones_like(logits_RV), k_R.astype(jnp.float32), bits)
    weight_RV = jnp.where(order_RV >= kth_R[:, None], weight_RV, 0)

    nucleus_R = _threshold(order_RV, weight_RV, top_p_R * weight_RV.sum(axis=1), bits)
    nucleus_R = jnp.where(top_p_R >= 1, 0, nucleus_R)
    return (order_RV >= jnp.maximum(kth_R, nucleus_R)[:, None]) & (weight_RV >= min_p_R[:, None])


def _ordered(value):
    """float32 as uint32 of the same order; -0 equals 0."""
    word = lax.bitcast_convert_type(jnp.where(value == 0, jnp.float32(0), value), jnp.uint32)
    return jnp.where(word >> 31 == 1, ~word, word | jnp.uint32(1 << 31))


def _threshold(order_RV, weight_RV, target_R, bits):
    """The largest t such that the weight of `order >= t` is at least `target`, digit by digit; [R]."""
    gpu = jax.default_backend() == "gpu"

    def settle_digit(i, threshold_R):
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * i.astype(jnp.uint32)
        reached_R = jnp.zeros(threshold_R.shape, jnp.uint32)
        for digit in range(1, 1 << bits):  # weights fall with the digit, so counting finds it
            at_least_R1 = (threshold_R | (jnp.uint32(digit) << shift))[:, None]
            sum_R = jnp.sum(jnp.where(order_RV >= at_least_R1, weight_RV, 0), axis=1)
            reached_R += (sum_R >= target_R).astype(jnp.uint32)
        return threshold_R | (reached_R << shift)

    start_R = jnp.zeros(order_RV.shape[:1], jnp.uint32)
    return lax.fori_loop(0, 32 // bits, settle_digit, start_R, unroll=gpu)


def _draw(logits_RV, uniform_R):
    """The first token, in id order, whose cumulative probability exceeds `uniform`.

    Sums of chunks first, then the cumulative sum of one chunk: a cumulative sum over the whole
    vocabulary would be many passes.
    """
    R, V = logits_RV.shape
    C = _chunk_len(V)
    padded_RV = jnp.pad(logits_RV, ((0, 0), (0, -V % C)), constant_values=-jnp.inf)
    chunks_RnC = padded_RV.reshape(R, -1, C)
    largest_R = logits_RV.max(axis=1)
    chunk_mass_Rn = jnp.exp(chunks_RnC - largest_R[:, None, None]).sum(axis=2)
    cumulative_Rn = jnp.cumsum(chunk_mass_Rn, axis=1)
    target_R = uniform_R * cumulative_Rn[:, -1]
    chunk_R = _first_above(cumulative_Rn, chunk_mass_Rn, target_R)
    before_R = jnp.take_along_axis(cumulative_Rn, jnp.maximum(chunk_R - 1, 0)[:, None], axis=1)[:, 0]
    target_R -= jnp.where(chunk_R > 0, before_R, 0)

    logits_RC = jnp.take_along_axis(chunks_RnC, chunk_R[:, None, None], axis=1)[:, 0]
    weight_RC = jnp.exp(logits_RC - largest_R[:, None])
    return chunk_R * C + _first_above(jnp.cumsum(weight_RC, axis=1), weight_RC, target_R)


def _first_above(cumulative, weight, target_R):
    """Index of the first cumulative sum above target, and of a positive weight whatever the rounding."""
    passed_R = jnp.sum(cumulative <= target_R[:, None], axis=1)
    last_R = weight.shape[1] - 1 - jnp.argmax(weight[:, ::-1] > 0, axis=1)
    return jnp.minimum(passed_R, last_R).astype(jnp.int32)


def _chunk_len(V):
    """A power of two up to 512 that divides V, so that no padded copy is made, or 512."""
    return next((c for c in (512, 256, 128, 64) if V % c == 0), 512)
