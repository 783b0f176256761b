"""Routing in jax.numpy: the truth for the kernel and the path on a CPU."""

import jax
import jax.numpy as jnp
from jax import lax


def choose(routing, logits_TE, bias_E=None, slot_T=None):
    """See `routing.choose`."""
    expert_TX, weight_TX = _best(routing, logits_TE, bias_E)
    if slot_T is not None:
        expert_TX = jnp.where((slot_T >= 0)[:, None], expert_TX, -1)
    return expert_TX, weight_TX


def _best(routing, logits_TE, bias_E):
    logits_TE = logits_TE.astype(jnp.float32)
    if routing.score == "softmax_of_chosen":
        top_TX, expert_TX = lax.top_k(logits_TE, routing.top_k)
        return expert_TX, jax.nn.softmax(top_TX, axis=-1) * routing.scale
    score_TE = jax.nn.softmax(logits_TE) if routing.score == "softmax" else jax.nn.sigmoid(logits_TE)
    choice_TE = score_TE if bias_E is None else score_TE + bias_E.astype(jnp.float32)
    if routing.top_groups < routing.num_groups:
        choice_TE = jnp.where(_in_best_groups(routing, choice_TE), choice_TE, -jnp.inf)
    _, expert_TX = lax.top_k(choice_TE, routing.top_k)
    weight_TX = jnp.take_along_axis(score_TE, expert_TX, axis=1)
    if routing.renormalize:
        weight_TX = weight_TX / (weight_TX.sum(axis=-1, keepdims=True) + 1e-20)
    return expert_TX, weight_TX * routing.scale


def _in_best_groups(routing, choice_TE):
    size = routing.num_experts // routing.num_groups
    by_group = choice_TE.reshape(-1, routing.num_groups, size)
    best = lax.top_k(by_group, 1 if routing.group_by == "best" else 2)[0].sum(axis=-1)
    _, group = lax.top_k(best, routing.top_groups)
    kept = jax.nn.one_hot(group, routing.num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.repeat(kept, size, axis=1)
