"""Expert placement: every expert somewhere, hot ones often, devices even, little moved."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.parallel.placement import Placement, check_sizes, copy_counts, rebalance


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
