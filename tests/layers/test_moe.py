"""Routing: which experts a token gets, and with what weight."""

import jax.numpy as jnp
import numpy as np

from jaxserve.layers.moe import Routing

# Probabilities 0.1, 0.2, 0.3, 0.4 as logits.
LOGITS = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))


def choose(routing, logits=LOGITS, bias=None):
    expert, weight = routing.choose(logits, bias)
    return expert[0].tolist(), np.round(np.asarray(weight[0], np.float64), 5).tolist()


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
    routing = Routing(8, 2, score="sigmoid", num_groups=2, top_groups=1, group_by="best_two")
    assert sorted(choose(routing, jnp.zeros((1, 8)), bias)[0]) == [4, 5]
