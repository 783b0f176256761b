"""Routing: which experts a token gets, and with what weight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import backend, routing
from jaxserve.ops.routing import Routing
from tests.ops.cases import H100

# Probabilities 0.1, 0.2, 0.3, 0.4 as logits.
LOGITS = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))


def choose(rule, logits=LOGITS, bias=None):
    """The same from both implementations: experts, and weights to five digits."""
    answers = []
    for where in ("reference", "interpret"):
        with backend.use(where):
            expert, weight = routing.choose(rule, logits, bias)
        answers.append((expert[0].tolist(), np.round(np.asarray(weight[0], np.float64), 5).tolist()))
    assert answers[0] == answers[1]
    return answers[0]


def test_softmax_weights_are_the_probabilities_of_all_experts():
    assert choose(Routing(4, 2)) == ([3, 2], [0.4, 0.3])


def test_renormalized_weights_sum_to_one():
    assert choose(Routing(4, 2, renormalize=True)) == ([3, 2], [0.57143, 0.42857])


def test_softmax_of_chosen_equals_renormalized_softmax():
    assert choose(Routing(4, 2, score="softmax_of_chosen")) == choose(Routing(4, 2, renormalize=True))


def test_scale_comes_after_renormalizing():
    assert choose(Routing(4, 2, renormalize=True, scale=2.0))[1] == [1.14286, 0.85714]


def test_bias_moves_the_choice_and_not_the_weight():
    logits = jnp.zeros((1, 4))
    bias = jnp.array([0.0, 0.3, 0.1, 0.2])
    assert choose(Routing(4, 2, score="sigmoid"), logits, bias) == ([1, 3], [0.5, 0.5])


def test_best_groups_are_those_of_the_best_expert():
    """Groups (0, 1), (2, 3), (4, 5): the third has the best expert, the first the best two."""
    logits = jnp.log(jnp.array([[0.2, 0.2, 0.1, 0.1, 0.35, 0.05]]))
    by_best = Routing(6, 2, num_groups=3, top_groups=1, group_by="best")
    by_two = Routing(6, 2, num_groups=3, top_groups=1, group_by="best_two", score="sigmoid")
    assert sorted(choose(by_best, logits)[0]) == [4, 5]
    assert sorted(choose(by_two, logits)[0]) == [0, 1]


def test_expert_of_a_group_left_out_is_not_chosen_however_good():
    bias = jnp.array([9.0, -9.0, -9.0, -9.0, 1.0, 1.0, 1.0, 1.0])
    rule = Routing(8, 2, score="sigmoid", num_groups=2, top_groups=1, group_by="best_two")
    assert sorted(choose(rule, jnp.zeros((1, 8)), bias)[0]) == [4, 5]


@pytest.mark.parametrize("rule", [Routing(8, 1), Routing(16, 8, "softmax_of_chosen")], ids=str)
@pytest.mark.parametrize("slots", [[3, -1, 0, -1], [-1] * 4, [0] * 4], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_padding_is_given_no_expert_and_changes_no_other_token(rule, slots, implementation):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, rule.num_experts)), jnp.float32)
    with backend.use(implementation):
        want_expert, want_weight = routing.choose(rule, logits)
        expert, weight = routing.choose(rule, logits, slot_T=jnp.asarray(slots, jnp.int32))
    for token, slot in enumerate(slots):
        assert expert[token].tolist() == ([-1] * rule.top_k if slot < 0 else want_expert[token].tolist())
        if slot >= 0:
            np.testing.assert_array_equal(weight[token], want_weight[token])


RULES = (
    Routing(8, 2, renormalize=True),
    Routing(60, 4),  # no power of two
    Routing(128, 8, renormalize=True, scale=2.5),
    Routing(32, 4, score="softmax_of_chosen"),
    Routing(256, 8, "sigmoid", True, 2.5, num_groups=8, top_groups=4, group_by="best_two"),
    Routing(160, 6, scale=16.0, num_groups=8, top_groups=3),
)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_kernel_chooses_as_the_reference_does(rule):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(9, rule.num_experts)).round(1), jnp.float32)  # with ties
    bias = jnp.asarray(rng.normal(size=rule.num_experts), jnp.float32) if rule.score == "sigmoid" else None
    expert, weight = routing.fast.choose(rule, logits, bias, interpret=True)
    want_expert, want_weight = routing.reference.choose(rule, logits, bias)
    np.testing.assert_array_equal(expert, want_expert)
    np.testing.assert_allclose(weight, want_weight, rtol=2e-6)  # order of the sums


def test_kernel_lowers_to_cuda_without_a_gpu():
    for rule in RULES:
        logits, bias = jnp.zeros((9, rule.num_experts)), jnp.zeros(rule.num_experts)
        with backend.use("fast"), jax.sharding.use_abstract_mesh(H100):
            traced = jax.jit(partial(routing.choose, rule)).trace(logits, bias)
            assert traced.lower(lowering_platforms=("cuda",)).as_text().count("xla.gpu.triton") == 1
