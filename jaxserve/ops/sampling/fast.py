"""Sampling without a sort: exact thresholds by radix search, the draw in two levels.

Plain jax.numpy, for any backend: every pass is a masked sum over the vocabulary, which XLA fuses
into one read of the logits and, when the vocabulary is sharded, one small all-reduce. On a GPU the
thresholds of top_k and top_p come from the kernels of `candidates` instead.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops import backend
from jaxserve.ops.sampling import candidates
from jaxserve.ops.sampling.rows import divisor, is_greedy, ordered, weights


def sample(logits_RV, uniform_R, temperature_R, top_k_R=None, top_p_R=None, min_p_R=None):
    """See `sampling.sample`."""
    least_R = _least_kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    only_R = is_greedy(temperature_R) if top_k_R is None else is_greedy(temperature_R) | (top_k_R == 1)
    return _draw(logits_RV, uniform_R, temperature_R, least_R, only_R)


def sample_temperature(logits_RV, uniform_R, temperature_R):
    """See `sampling.sample_temperature`."""
    return sample(logits_RV, uniform_R, temperature_R)


def top_logprobs(logits_RV, k: int):
    """See `sampling.top_logprobs`."""
    chosen = backend.chosen()
    if chosen == "reference" or k > candidates.NUM_CHUNKS:
        value_Rk, id_Rk = lax.top_k(logits_RV, k)
    else:
        value_Rk, id_Rk = candidates.top_k(logits_RV, k, interpret=chosen == "interpret")
    return value_Rk - jax.nn.logsumexp(logits_RV, axis=1, keepdims=True), id_Rk.astype(jnp.int32)


def kept(logits_RV, temperature_R, top_k_R=None, top_p_R=None, min_p_R=None, *, bits: int | None = None):
    """Which tokens may be drawn, [R, V] bool; equal to `reference.kept` up to the rounding of sums."""
    least_R = _least_kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, bits=bits)
    return ordered(logits_RV) >= least_R[:, None]


# ---- thresholds ----


def _least_kept(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, *, bits=None):
    """The smallest logit that every filter keeps, as `ordered`; [R] uint32. None is no filter."""
    largest_R, divisor_R = logits_RV.max(axis=1), divisor(temperature_R)
    least_R = jnp.zeros(largest_R.shape, jnp.uint32)
    if top_k_R is not None or top_p_R is not None:
        arguments = (logits_RV, largest_R, divisor_R, top_k_R, top_p_R)
        chosen = backend.chosen()
        if chosen == "reference" or bits:
            least_R = _search_vocabulary(*arguments, bits=bits)
        else:
            least_R = candidates.least_kept(*arguments, interpret=chosen == "interpret")
    if min_p_R is not None:
        likely_R = largest_R + divisor_R * jnp.log(min_p_R)
        least_R = jnp.maximum(least_R, ordered(likely_R))
    return least_R


def _search_vocabulary(logits_RV, largest_R, divisor_R, top_k_R, top_p_R, *, bits=None):
    """`candidates.least_kept` by passes over the whole vocabulary.

    bits: of the threshold a pass settles. A GPU makes 2**bits - 1 sums in one read: 32 rows of
    128k take 0.44, 0.41 and 0.74 ms with 1, 2 and 4 on an H100. A CPU makes one read a sum: 1.
    """
    V = logits_RV.shape[1]
    bits = bits or (2 if jax.default_backend() == "gpu" else 1)
    order_RV = ordered(logits_RV)
    weight_RV = weights(logits_RV, largest_R[:, None], divisor_R[:, None])
    least_R = jnp.zeros(largest_R.shape, jnp.uint32)
    if top_k_R is not None:
        k_R = jnp.where(top_k_R <= 0, V, jnp.minimum(top_k_R, V)).astype(jnp.float32)
        least_R = _threshold(order_RV, jnp.ones_like(logits_RV), k_R, bits)
        weight_RV = jnp.where(order_RV >= least_R[:, None], weight_RV, 0)
    if top_p_R is not None:
        nucleus_R = _threshold(order_RV, weight_RV, top_p_R * weight_RV.sum(axis=1), bits)
        least_R = jnp.where(top_p_R >= 1, least_R, jnp.maximum(least_R, nucleus_R))
    return least_R


def _threshold(order_RV, weight_RV, target_R, bits):
    """The largest t such that the weight of `order >= t` is at least `target`, digit by digit; [R]."""

    def settle_digit(i, threshold_R):
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * jnp.asarray(i, jnp.uint32)
        reached_R = jnp.zeros(threshold_R.shape, jnp.uint32)
        for digit in range(1, 1 << bits):  # sums fall as the digit grows, so counting finds it
            at_least_R = threshold_R | (jnp.uint32(digit) << shift)
            sum_R = jnp.sum(jnp.where(order_RV >= at_least_R[:, None], weight_RV, 0), axis=1)
            reached_R += (sum_R >= target_R).astype(jnp.uint32)
        return threshold_R | (reached_R << shift)

    start_R = jnp.zeros(order_RV.shape[:1], jnp.uint32)
    # Unrolled on a GPU, where a loop's own kernels cost as much as a pass; not on a CPU, which
    # would compile every pass.
    unroll = jax.default_backend() == "gpu"
    return lax.fori_loop(0, 32 // bits, settle_digit, start_R, unroll=unroll)


# ---- the draw ----


class Group(NamedTuple):
    """Devices that have a run of the vocabulary each, all as long, in the order of their numbers.

    `gather` takes one number a row, [R], and gives those of all devices, [N, R], in the same order.
    """

    number: jax.Array
    gather: Callable[[jax.Array], jax.Array]


def sample_temperature_split(logits_RU, uniform_R, temperature_R, group: Group):
    """`sample_temperature` where a device has U of the vocabulary's logits a row.

    Three numbers of a row go through the group: a device's largest logit, its weight, and the token.
    """
    largest_R = group.gather(logits_RU.max(axis=1)).max(axis=0)
    only_R = is_greedy(temperature_R)
    least_R = jnp.where(only_R, ordered(largest_R), jnp.uint32(0))
    part = _Weighed.of(logits_RU, largest_R, temperature_R, least_R)
    mass_RN = group.gather(part.mass_Rn.sum(axis=1)).T
    uniform_R = jnp.where(only_R, 0, uniform_R)
    owner_R, target_R = _find(mass_RN, uniform_R * mass_RN.sum(axis=1))
    # Whoever does not have the token looks for one in vain.
    token_R = group.number * logits_RU.shape[1] + part.draw(target_R)
    return group.gather(jnp.where(owner_R == group.number, token_R, 0)).sum(axis=0)


def _draw(logits_RV, uniform_R, temperature_R, least_R, only_R):
    """The first token, in id order, whose cumulative probability exceeds `uniform`.

    Tokens below `least` have none; rows `only` take the largest logit, the first among equals.
    """
    largest_R = logits_RV.max(axis=1)
    least_R = jnp.where(only_R, ordered(largest_R), least_R)
    part = _Weighed.of(logits_RV, largest_R, temperature_R, least_R)
    return part.draw(jnp.where(only_R, 0, uniform_R) * jnp.cumsum(part.mass_Rn, axis=1)[:, -1])


class _Weighed(NamedTuple):
    """Logits in chunks, and what they weigh.

    Sums of chunks first, then the cumulative sum of one chunk: a cumulative sum over the whole
    vocabulary would be many passes.
    """

    chunks_RnC: jax.Array
    mass_Rn: jax.Array
    weigh: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(cls, logits_RV, largest_R, temperature_R, least_R):
        """Relative to `largest`; logits below `least`, as `ordered`, weigh nothing."""
        R, V = logits_RV.shape
        C, divisor_R = _chunk_len(V), divisor(temperature_R)

        def weigh(logits_RnC):
            weight_RnC = weights(logits_RnC, largest_R[:, None, None], divisor_R[:, None, None])
            return jnp.where(ordered(logits_RnC) >= least_R[:, None, None], weight_RnC, 0)

        padded_RV = jnp.pad(logits_RV, ((0, 0), (0, -V % C)), constant_values=-jnp.inf)
        chunks_RnC = padded_RV.reshape(R, -1, C)
        return cls(chunks_RnC, weigh(chunks_RnC).sum(axis=2), weigh)

    def draw(self, target_R):
        """The first token up to which all weigh more than `target`."""
        chunk_R, target_R = _find(self.mass_Rn, target_R)
        chosen_R1C = jnp.take_along_axis(self.chunks_RnC, chunk_R[:, None, None], axis=1)
        place_R, _ = _find(self.weigh(chosen_R1C)[:, 0], target_R)
        return chunk_R * self.chunks_RnC.shape[2] + place_R


def _find(weight, target_R):
    """(index of the first weight with which their sum is above target, what is left of target before it).

    It is the index of a positive weight, if there is one, whatever the rounding.
    """
    cumulative = jnp.cumsum(weight, axis=1)
    passed_R = jnp.sum(cumulative <= target_R[:, None], axis=1)
    last_R = weight.shape[1] - 1 - jnp.argmax(weight[:, ::-1] > 0, axis=1)
    index_R = jnp.minimum(passed_R, last_R).astype(jnp.int32)
    before_R = jnp.take_along_axis(cumulative, jnp.maximum(index_R - 1, 0)[:, None], axis=1)[:, 0]
    return index_R, target_R - jnp.where(index_R > 0, before_R, 0)


def _chunk_len(V):
    """A power of two up to 512 that divides V, so that no padded copy is made, or 512."""
    return next((c for c in (512, 256, 128, 64) if V % c == 0), 512)
