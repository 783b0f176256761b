"""What both samplers share, and what is done to logits before and after: all a row at a time."""

import jax
import jax.numpy as jnp
from jax import lax

_GREEDY_BELOW = 1e-6  # a lower temperature means argmax


def is_greedy(temperature_R):
    return temperature_R < _GREEDY_BELOW


def divisor(temperature_R):
    """The temperature, 1 for greedy rows, whose draw is thrown away."""
    return jnp.where(is_greedy(temperature_R), 1, temperature_R)


def weights(logits, largest, divisor):
    """Probabilities up to a factor a row."""
    return jnp.exp((logits - largest) / divisor)


def ordered(value):
    """float32 as uint32 of the same order; -0 equals 0."""
    word = lax.bitcast_convert_type(jnp.where(value == 0, jnp.float32(0), value), jnp.uint32)
    return jnp.where(word >> 31 == 1, ~word, word | jnp.uint32(1 << 31))


def greedy(logits_RV):
    """The token of the largest logit, the lowest id among equals; [R] int32."""
    return jnp.argmax(logits_RV, axis=1).astype(jnp.int32)


def uniform(seed_R, position_R):
    """One number in [0, 1) a row: a function of (seed, position) and nothing else; [R] float32.

    `seed_R`: int32 or uint32, all 32 bits count. `position_R`: absolute position of the token to
    draw in its sequence. Threefry, so the same on every device, row, batch and layout.
    """

    def one(seed, position):
        key = jax.random.wrap_key_data(jnp.stack([jnp.uint32(0), seed]), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

    return jax.vmap(one)(seed_R.astype(jnp.uint32), position_R.astype(jnp.uint32))


def penalize(logits_RV, output_count_RV, in_prompt_RV, frequency_R, presence_R, repetition_R):
    """Logits with the repetition penalty, then the frequency and presence penalties applied.

    Args:
        output_count_RV: how often each token stands in the row's output so far.
        in_prompt_RV: bool; whether it stands in the row's prompt. Only repetition looks at it.
        frequency_R: subtracted once an occurrence. presence_R: subtracted once. 0 does nothing.
        repetition_R: divides positive and multiplies other logits of tokens seen; 1 does nothing.
    """
    present_RV = output_count_RV > 0
    repetition_RV = jnp.where(present_RV | in_prompt_RV, repetition_R[:, None], 1)
    logits_RV = jnp.where(logits_RV > 0, logits_RV / repetition_RV, logits_RV * repetition_RV)
    logits_RV -= frequency_R[:, None] * output_count_RV.astype(jnp.float32)
    return logits_RV - jnp.where(present_RV, presence_R[:, None], 0)
