"""Expert placement: every expert somewhere, hot ones often, devices even, little moved."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.parallel.placement import Placement, check_sizes, copy_counts, plan_moves, rebalance


@st.composite
def loads(draw):
    devices = draw(st.integers(1, 8))
    experts = draw(st.integers(1, 24))
    slots = -(-(experts + draw(st.integers(0, 8))) // devices) * devices
    load = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return devices, slots, np.array([load, load[::-1]])


@given(loads())
def test_every_expert_is_placed_and_every_slot_holds_one(case):
    devices, slots, load = case
    after = rebalance(load, Placement.trivial(2, load.shape[1], slots, devices))
    for layer in range(2):
        copies = after.copies(layer, load.shape[1])
        assert all(copies) and sorted(s for held in copies for s in held) == list(range(slots))


@given(loads())
def test_copies_of_an_expert_share_no_device_while_there_are_enough(case):
    devices, slots, load = case
    counts = copy_counts(load[0].astype(float), slots)
    after = rebalance(load, Placement.trivial(2, load.shape[1], slots, devices)).logical_LP[0]
    held = [set(row.tolist()) for row in after.reshape(devices, -1)]
    if slots // devices == 1:
        for expert, count in enumerate(counts):
            assert sum(expert in h for h in held) == count


@given(loads())
def test_placing_again_for_the_same_load_moves_nothing(case):
    devices, slots, load = case
    once = rebalance(load, Placement.trivial(2, load.shape[1], slots, devices))
    np.testing.assert_array_equal(rebalance(load, once).logical_LP, once.logical_LP)


@given(loads())
def test_moves_bring_every_slot_its_expert_and_touch_no_other(case):
    devices, slots, load = case
    before = Placement.trivial(2, load.shape[1], slots, devices)
    after = rebalance(load, before)
    for before_P, after_P in zip(before.logical_LP, after.logical_LP):
        moves = plan_moves(before_P, after_P, devices)
        held_DS = before_P.reshape(devices, -1)
        shown = {
            (number, device): held_DS[device, slot]
            for (number, device), slot in np.ndenumerate(moves.offer_RD)
            if slot >= 0
        }
        assert all(number < moves.num_rounds for number, _ in shown)
        got = [e if t < 0 else shown[divmod(t, devices)] for e, t in zip(before_P, moves.take_P)]
        np.testing.assert_array_equal(got, after_P)
        assert moves.count == (before_P != after_P).sum()


def test_expert_that_several_slots_want_is_shown_once():
    moves = plan_moves(np.array([0, 1, 2, 3, 4, 5]), np.array([0, 1, 2, 0, 4, 0]), num_devices=3)
    assert moves.offer_RD.tolist() == [[0, -1, -1], [-1, -1, -1]]
    assert (moves.take_P.tolist(), moves.num_rounds) == ([-1, -1, -1, 0, -1, 0], 1)


def test_hot_expert_gets_the_redundant_slots():
    load = np.array([[90.0, 10, 10, 10]])
    after = rebalance(load, Placement.trivial(1, 4, 6, 2))
    assert [len(slots) for slots in after.copies(0, 4)] == [3, 1, 1, 1]


def test_skewed_load_becomes_nearly_even():
    load = 1.0 / np.arange(1, 65)[None]
    before = Placement.trivial(1, 64, 72, 8)
    after = rebalance(load, before)
    assert before.balance(load)[0] < 0.45
    assert after.balance(load)[0] > 0.95


def test_load_of_a_device_is_the_sum_of_its_shares():
    placement = Placement(np.array([[0, 1, 0, 2]]), num_devices=2)
    load = np.array([[6, 1, 2]])
    assert placement.device_load(load).tolist() == [[4, 5]]
    assert placement.balance(load).tolist() == [0.9]
    assert placement.balance(load * 0).tolist() == [1]


@pytest.mark.parametrize(
    ("experts", "slots", "devices", "message"),
    [
        (8, 7, 1, "7 physical experts cannot hold 8 experts"),
        (8, 10, 4, "use 2 redundant experts more or 2 fewer"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(experts, slots, devices, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(experts, slots, devices)
