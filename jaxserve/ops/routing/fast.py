"""Routing for CUDA: one token a program of one warp, its experts in the warp's registers.

XLA makes a softmax, a sort of all experts, a gather and a selection of it: four kernels or more in
every layer that has experts, where there is hardly anything to compute.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

NEVER = -1e30  # the choice's value of what cannot be chosen (again)


@functools.partial(jax.jit, static_argnames=("routing", "interpret"))
def choose(routing, logits_TE, bias_E=None, slot_T=None, *, interpret: bool = False):
    """See `routing.choose`. Traced and lowered once for all layers, as a kernel takes milliseconds."""
    T, E = logits_TE.shape
    X = routing.top_k
    bias_E = jnp.zeros((E,), jnp.float32) if bias_E is None else bias_E.astype(jnp.float32)
    slot_T = jnp.zeros((T,), jnp.int32) if slot_T is None else slot_T
    return pl.pallas_call(
        functools.partial(_kernel, routing=routing),
        grid=(T,),
        out_shape=(jax.ShapeDtypeStruct((T, X), jnp.int32), jax.ShapeDtypeStruct((T, X), jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=1 if E <= 256 else 2, num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(logits_TE.astype(jnp.float32), bias_E, slot_T)


def _kernel(logits_ref, bias_ref, slot_ref, expert_ref, weight_ref, *, routing):
    t, E, X = pl.program_id(0), logits_ref.shape[1], routing.top_k
    lane = jnp.arange(pl.next_power_of_2(E))
    is_expert = lane < E
    logit = plt.load(logits_ref.at[t, lane], mask=is_expert, other=jnp.float32(NEVER))
    bias = plt.load(bias_ref.at[lane], mask=is_expert, other=jnp.float32(0))
    match routing.score:
        case "softmax":
            power = jnp.exp(logit - logit.max(axis=0))
            score = power / power.sum(axis=0)
        case "sigmoid":
            score = 1 / (1 + jnp.exp(-logit))
        case "softmax_of_chosen":
            score = logit
    choice = jnp.where(is_expert, score + bias, jnp.float32(NEVER))
    if routing.top_groups < routing.num_groups:
        choice = jnp.where(_in_best_groups(choice, lane, routing), choice, jnp.float32(NEVER))

    place = jnp.arange(pl.next_power_of_2(X))
    expert, weight = jnp.zeros(place.shape, jnp.int32), jnp.zeros(place.shape, jnp.float32)
    for x in range(X):
        best = _first_of_best(choice, lane)
        own = jnp.where(lane == best, score, jnp.float32(0)).sum(axis=0)
        expert, weight = jnp.where(place == x, best, expert), jnp.where(place == x, own, weight)
        choice = jnp.where(lane == best, jnp.float32(2 * NEVER), choice)
    is_place = place < X
    if routing.score == "softmax_of_chosen":
        weight = jnp.where(is_place, weight, jnp.float32(NEVER))
        power = jnp.exp(weight - weight.max(axis=0))
        weight = power / power.sum(axis=0)
    elif routing.renormalize:
        weight = weight / (weight.sum(axis=0) + 1e-20)
    expert = jnp.where(slot_ref[t] < 0, -1, expert)
    plt.store(expert_ref.at[t, place], expert, mask=is_place)
    plt.store(weight_ref.at[t, place], weight * routing.scale, mask=is_place)


def _in_best_groups(choice, lane, routing):
    """Whether each lane's expert is in one of the best groups."""
    group = lane // (routing.num_experts // routing.num_groups)
    worth = jnp.full(choice.shape, NEVER, jnp.float32)  # of each lane's group
    for g in range(routing.num_groups):
        member = jnp.where(group == g, choice, jnp.float32(2 * NEVER))
        best = _first_of_best(member, lane)
        total = member.max(axis=0)
        if routing.group_by == "best_two":
            total += jnp.where(lane == best, jnp.float32(2 * NEVER), member).max(axis=0)
        worth = jnp.where(group == g, total, worth)
    kept = jnp.zeros(choice.shape, jnp.bool_)
    for _ in range(routing.top_groups):
        chosen = jnp.where(worth == worth.max(axis=0), group, routing.num_groups).min(axis=0)
        kept |= group == chosen
        worth = jnp.where(group == chosen, jnp.float32(4 * NEVER), worth)
    return kept


def _first_of_best(choice, lane):
    return jnp.where(choice == choice.max(axis=0), lane, lane.shape[0]).min(axis=0)
