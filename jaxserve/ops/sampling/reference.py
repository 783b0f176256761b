"""Sampling by a full sort and one cumulative sum: short enough to be checked by eye."""

import jax
import jax.numpy as jnp

from jaxserve.ops.sampling.rows import divisor, greedy, is_greedy


def kept(logits_RV, temperature_R, top_k_R=None, top_p_R=None, min_p_R=None):
    """Which tokens may be drawn, [R, V] bool; the rules are in `sampling.sample`."""
    V = logits_RV.shape[1]
    temperature_R1 = divisor(temperature_R)[:, None]
    sorted_RV = -jnp.sort(-logits_RV, axis=1)
    weight_RV = jnp.exp((sorted_RV - sorted_RV[:, :1]) / temperature_R1)
    least_R1 = jnp.full(temperature_R1.shape, -jnp.inf)

    if top_k_R is not None:
        k_R = jnp.where(top_k_R <= 0, V, jnp.minimum(top_k_R, V))
        least_R1 = jnp.take_along_axis(sorted_RV, k_R[:, None] - 1, axis=1)
        weight_RV = jnp.where(sorted_RV >= least_R1, weight_RV, 0)
    if top_p_R is not None:
        mass_RV = jnp.cumsum(weight_RV, axis=1)
        enough_RV = mass_RV >= top_p_R[:, None] * mass_RV[:, -1:]
        last_R1 = jnp.argmax(enough_RV, axis=1, keepdims=True)  # ends the first prefix that reaches top_p
        nucleus_R1 = jnp.take_along_axis(sorted_RV, last_R1, axis=1)
        least_R1 = jnp.where(top_p_R[:, None] >= 1, least_R1, jnp.maximum(least_R1, nucleus_R1))
    if min_p_R is not None:
        likely_R1 = sorted_RV[:, :1] + temperature_R1 * jnp.log(min_p_R[:, None])
        least_R1 = jnp.maximum(least_R1, likely_R1)
    return logits_RV >= least_R1


def sample(logits_RV, uniform_R, temperature_R, top_k_R=None, top_p_R=None, min_p_R=None):
    """See `sampling.sample`."""
    kept_RV = kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    token_R = _draw(jnp.where(kept_RV, logits_RV, -jnp.inf), uniform_R, temperature_R)
    only_R = is_greedy(temperature_R) if top_k_R is None else is_greedy(temperature_R) | (top_k_R == 1)
    return jnp.where(only_R, greedy(logits_RV), token_R)


def sample_temperature(logits_RV, uniform_R, temperature_R):
    """See `sampling.sample_temperature`."""
    return sample(logits_RV, uniform_R, temperature_R)


def top_logprobs(logits_RV, k: int):
    """See `sampling.top_logprobs`."""
    value_Rk, id_Rk = jax.lax.top_k(logits_RV, k)
    return value_Rk - jax.nn.logsumexp(logits_RV, axis=1, keepdims=True), id_Rk.astype(jnp.int32)


def _draw(logits_RV, uniform_R, temperature_R):
    """The first token, in id order, whose cumulative probability exceeds `uniform`."""
    above_RV = logits_RV - logits_RV.max(axis=1, keepdims=True)
    weight_RV = jnp.exp(above_RV / divisor(temperature_R)[:, None])
    mass_RV = jnp.cumsum(weight_RV, axis=1)
    passed_R = jnp.sum(mass_RV <= (uniform_R * mass_RV[:, -1])[:, None], axis=1)
    last_R = logits_RV.shape[1] - 1 - jnp.argmax(weight_RV[:, ::-1] > 0, axis=1)
    return jnp.minimum(passed_R, last_R).astype(jnp.int32)  # rounding must not pass the last token
