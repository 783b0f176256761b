"""From logits [R, V] float32 to tokens and log probabilities, per row, on the device.

A row's result depends on that row's arguments alone. Nothing here assumes that V is local: the
functions stay correct when the partitioner shards the vocabulary, but `sample` and `top_logprobs`
on a GPU run kernels, for which such logits are gathered first.

`fast` runs on every backend (8 rows of 49k logits with all filters on a 2-core CPU: 4 ms, against
33 ms with the sort); `reference` is its clear twin for tests.
"""

from jaxserve.ops.sampling import fast
from jaxserve.ops.sampling.fast import Group
from jaxserve.ops.sampling.rows import greedy, penalize, uniform

__all__ = [
    "Group",
    "greedy",
    "penalize",
    "sample",
    "sample_temperature",
    "sample_temperature_split",
    "top_logprobs",
    "uniform",
]


def sample(logits_RV, uniform_R, temperature_R, top_k_R=None, top_p_R=None, min_p_R=None):
    """One token a row from the filtered distribution; [R] int32.

    Filters act on softmax(logits / temperature), each on what the one before left, renormalised:
    top_k, top_p, min_p. Equal logits are kept or dropped together:
    - top_k keeps logits >= the k-th largest (so more than k where it is tied); <= 0 keeps all.
    - top_p keeps logits >= t, t the largest logit such that those hold at least top_p of the mass;
      1 keeps all.
    - min_p keeps probabilities >= min_p times the largest; 0 keeps all.
    None instead of an array leaves a filter out of the program; top_k and top_p are the costly ones.
    Rows with temperature below 1e-6 or top_k 1 take the largest logit, the lowest id among equals.
    The draw inverts the cumulative distribution in id order at `uniform_R`, in [0, 1).
    """
    return fast.sample(logits_RV, uniform_R, temperature_R, top_k_R, top_p_R, min_p_R)


def sample_temperature(logits_RV, uniform_R, temperature_R):
    """`sample` without filters, for steps in which no row has any."""
    return fast.sample_temperature(logits_RV, uniform_R, temperature_R)


def sample_temperature_split(logits_RU, uniform_R, temperature_R, group: Group):
    """`sample_temperature` on devices that have U of the logits each: whole rows are nowhere.

    The same token on all, and the one that whole rows give, but where rounding decides between two.
    """
    return fast.sample_temperature_split(logits_RU, uniform_R, temperature_R, group)


def top_logprobs(logits_RV, k: int):
    """The k most likely tokens a row, most likely first, the lower id first among equals.

    Returns natural-log probabilities [R, k] float32 and ids [R, k] int32.
    """
    return fast.top_logprobs(logits_RV, k)
