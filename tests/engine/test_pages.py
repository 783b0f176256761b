"""The page pool against a set of free pages; what its audit says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.pages import PagePool

SIZE = 8


@given(st.lists(st.tuples(st.booleans(), st.integers(0, SIZE)), max_size=40))
def test_pages_are_owned_once_whatever_the_order_of_taking_and_giving_back(actions):
    pool, held = PagePool(SIZE), []
    for take, count in actions:
        if take:
            count = min(count, pool.num_free)
            got = pool.allocate(count)
            assert len(got) == count
            assert not set(got) & set(held)
            held += got
        else:
            given_back, held = held[:count], held[count:]
            pool.free(given_back)
        assert pool.num_free == SIZE - len(held)
        pool.check(held)
    pool.free(held)
    pool.check([])


def test_page_freed_last_is_handed_out_first():
    pool = PagePool(4)
    assert pool.allocate(3) == [2, 1, 0]
    pool.free([1])
    assert pool.allocate(1) == [1]


def test_taking_nothing_takes_nothing():
    pool = PagePool(2)
    assert pool.allocate(0) == []
    assert pool.num_free == 2


def test_taking_more_than_there_is_fails_and_says_both_numbers():
    with pytest.raises(AssertionError, match="asked for 3 pages, 2 are free"):
        PagePool(2).allocate(3)


def test_audit_names_lost_pages():
    pool = PagePool(5)
    pool.allocate(3)
    with pytest.raises(AssertionError, match=r"pages owned twice: \[\], pages lost: \[0, 2\] of 5"):
        pool.check([1])


def test_audit_names_pages_with_two_owners():
    pool = PagePool(5)
    taken = pool.allocate(2)
    pool.free(taken[:1])
    with pytest.raises(AssertionError, match=r"pages owned twice: \[1\], pages lost: \[\] of 5"):
        pool.check(taken)


def test_audit_names_a_page_that_two_requests_hold():
    pool = PagePool(3)
    pool.allocate(3)
    with pytest.raises(AssertionError, match=r"pages owned twice: \[2\], pages lost: \[\] of 3"):
        pool.check([0, 1, 2, 2])


def test_audit_names_a_page_that_the_pool_does_not_have():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match=r"pages that are none: \[7\]"):
        pool.check([7])
