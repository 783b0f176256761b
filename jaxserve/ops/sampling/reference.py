"""Sampling by a full sort and one cumulative sum: short enough to be checked by eye."""

import jax.numpy as jnp

from jaxserve.ops.sampling.rows import greedy, is_greedy, scaled


def kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R):
    """Which tokens may be drawn, [R, V] bool; the rules are in `sampling.sample`."""
    V = logits_RV.shape[1]
    logits_RV = scaled(logits_RV, temperature_R)
    sorted_RV = -jnp.sort(-logits_RV, axis=1)
    weight_RV = jnp.exp(sorted_RV - sorted_RV[:, :1])

    k_R = jnp.where(top_k_R <= 0, V, jnp.minimum(top_k_R, V))
    kth_R1 = jnp.take_along_axis(sorted_RV, k_R[:, None] - 1, axis=1)
    weight_RV = jnp.where(sorted_RV >= kth_R1, weight_RV, 0)

    mass_RV = jnp.cumsum(weight_RV, axis=1)
    enough_RV = mass_RV >= top_p_R[:, None] * mass_RV[:, -1:]
    last_R1 = jnp.argmax(enough_RV, axis=1, keepdims=True)  # the first prefix that reaches top_p
    nucleus_R1 = jnp.take_along_axis(sorted_RV, last_R1, axis=1)
    nucleus_R1 = jnp.where(top_p_R[:, None] >= 1, -jnp.inf, nucleus_R1)

    likely_RV = jnp.exp(logits_RV - sorted_RV[:, :1]) >= min_p_R[:, None]
    return (logits_RV >= kth_R1) & (logits_RV >= nucleus_R1) & likely_RV


def sample(logits_RV, uniform_R, temperature_R, top_k_R, top_p_R, min_p_R):
    """See `sampling.sample`."""
    kept_RV = kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    drawn_R = _draw(jnp.where(kept_RV, scaled(logits_RV, temperature_R), -jnp.inf), uniform_R)
    return jnp.where(is_greedy(temperature_R) | (top_k_R == 1), greedy(logits_RV), drawn_R)


def sample_temperature(logits_RV, uniform_R, temperature_R):
    """See `sampling.sample_temperature`."""
    drawn_R = _draw(scaled(logits_RV, temperature_R), uniform_R)
    return jnp.where(is_greedy(temperature_R), greedy(logits_RV), drawn_R)


def _draw(logits_RV, uniform_R):
    """The first token, in id order, whose cumulative probability exceeds `uniform`."""
    weight_RV = jnp.exp(logits_RV - logits_RV.max(axis=1, keepdims=True))
    mass_RV = jnp.cumsum(weight_RV, axis=1)
    passed_R = jnp.sum(mass_RV <= (uniform_R * mass_RV[:, -1])[:, None], axis=1)
    last_R = logits_RV.shape[1] - 1 - jnp.argmax(weight_RV[:, ::-1] > 0, axis=1)
    return jnp.minimum(passed_R, last_R).astype(jnp.int32)  # rounding must not pass the last token
