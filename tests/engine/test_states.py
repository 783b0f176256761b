"""Kept states: the longest cached prefix that has one is found, and no row is lost or told too early."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.pages import PagePool
from jaxserve.engine.radix import RadixTree
from jaxserve.engine.states import Checkpoints

PAGE, NUM_PAGES, FIRST_ROW = 2, 12, 4

Prefix = tuple[str, tuple[int, ...]]


class Both:
    """Tree and checkpoints, beside a dictionary from each prefix with a kept state to its row."""

    def __init__(self, num_rows: int):
        self.pool = PagePool(NUM_PAGES)
        self.checkpoints = Checkpoints(FIRST_ROW, num_rows)
        self.tree = RadixTree(PAGE, self.pool, drop_state=self.checkpoints.forget)
        self.num_rows = num_rows
        self.kept: dict[Prefix, int] = {}  # least recently used first
        self.held: list = []

    def put(self, salt, tokens, keep: bool):
        """As a request whose prompt is computed: its pages are cached, and perhaps the state at their end."""
        tokens = tokens[: len(tokens) // PAGE * PAGE]
        node, pages = self.tree.match(tokens, salt)
        self.tree.lock(node)
        needed = len(tokens) // PAGE - len(pages)
        if needed > self.pool.num_free:
            self.tree.evict(needed - self.pool.num_free)
            self.drop_evicted()
        if needed <= self.pool.num_free:
            end, _, _ = self.tree.insert(tokens, pages + self.pool.allocate(needed), salt)
            if keep and tokens:
                self.tree.lock(end)
                self.keep(end, (salt, tuple(tokens)))
                self.tree.unlock(end)
        self.tree.unlock(node)

    def keep(self, node, prefix):
        row = self.checkpoints.plan(node)
        if prefix in self.kept or not self.num_rows:
            assert row == -1
        else:
            if len(self.kept) == self.num_rows:
                assert row == self.kept.pop(next(iter(self.kept)))
            assert row not in self.kept.values() and row in self.checkpoints.rows
            assert self.find(*prefix)[2] != row, "found before it is there"
            self.kept[prefix] = row
        self.checkpoints.settle()

    def find(self, salt, tokens):
        foreseen = self.tree.num_matched(tokens, salt, to_state=True)
        node, pages, num_here = self.tree.match_state(tokens, salt)
        assert foreseen == len(pages)
        return len(pages), num_here, node.state, node

    def use(self, salt, tokens):
        whole = len(self.tree.match(tokens, salt)[1])
        num_pages, num_here, row, node = self.find(salt, tokens)
        usable = [prefix for prefix in self.kept if prefix[0] == salt and starts(tokens, prefix[1])]
        longest = max(usable, key=lambda prefix: len(prefix[1]), default=None)
        assert num_here == whole
        if longest is None:
            assert (num_pages, row) == (0, -1)
        else:
            assert (num_pages * PAGE, row) == (len(longest[1]), self.kept[longest])
            self.checkpoints.touch(node)
            self.kept[longest] = self.kept.pop(longest)

    def lock(self, salt, tokens):
        self.held.append(self.tree.match(tokens, salt)[0])
        self.tree.lock(self.held[-1])

    def unlock(self, index):
        if self.held:
            self.tree.unlock(self.held.pop(index % len(self.held)))

    def evict(self, count):
        self.tree.evict(count)
        self.drop_evicted()

    def drop_evicted(self):
        """A state goes with the last page of its prefix."""
        self.kept = {
            (salt, tokens): row
            for (salt, tokens), row in self.kept.items()
            if len(self.tree.match(tokens, salt)[1]) * PAGE == len(tokens)
        }

    def check(self):
        self.tree.check()
        self.checkpoints.check(self.tree.nodes())
        assert self.checkpoints.num_held == len(self.kept)


def starts(tokens, prefix) -> bool:
    return tuple(tokens[: len(prefix)]) == tuple(prefix)


sequences = st.tuples(st.sampled_from(["", "a"]), st.lists(st.integers(0, 1), max_size=10))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("put"), sequences, st.booleans()),
        st.tuples(st.just("use"), sequences),
        st.tuples(st.just("lock"), sequences),
        st.tuples(st.just("unlock"), st.integers(0, 9)),
        st.tuples(st.just("evict"), st.integers(1, 4)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(actions, st.integers(0, 4))
def test_longest_prefix_with_a_state_is_found_whatever_happened_before(actions, num_rows):
    both = Both(num_rows)
    for name, *arguments in actions:
        flat = [x for a in arguments for x in (a if isinstance(a, tuple) else (a,))]
        getattr(both, name)(*flat)
        both.check()
    while both.held:
        both.unlock(0)
    both.tree.clear()
    both.drop_evicted()
    both.check()
    assert both.kept == {}


def make(num_rows=2) -> Both:
    return Both(num_rows)


def test_prefix_without_a_state_on_its_way_is_not_matched():
    both = make()
    both.put("", [0, 0, 1, 1], keep=False)
    assert both.find("", [0, 0, 1, 1])[:3] == (0, 2, -1)


def test_match_goes_back_to_the_state_and_says_how_much_more_is_here():
    both = make()
    both.put("", [0, 0], keep=True)
    both.put("", [0, 0, 1, 1, 0, 0], keep=False)
    assert both.find("", [0, 0, 1, 1, 1, 1])[:3] == (1, 2, both.kept["", (0, 0)])


def test_state_stays_with_the_end_of_an_edge_that_is_split():
    both = make()
    both.put("", [0, 0, 1, 1], keep=True)
    both.put("", [0, 0, 0, 0], keep=False)
    assert both.find("", [0, 0, 0, 0])[:3] == (0, 2, -1)
    assert both.find("", [0, 0, 1, 1])[:3] == (2, 2, both.kept["", (0, 0, 1, 1)])


def test_state_goes_with_the_last_page_of_its_prefix():
    both = make()
    both.put("", [0, 0, 1, 1], keep=True)
    both.evict(1)
    both.check()
    assert both.kept == {}
    assert both.find("", [0, 0, 1, 1])[:3] == (0, 1, -1)


def test_audit_finds_a_row_that_was_lost():
    both = make()
    both.put("", [0, 0], keep=True)
    both.tree.nodes()[-1].state = -1
    with pytest.raises(AssertionError, match="unknown, or not in the tree"):
        both.check()


def test_audit_finds_a_row_that_is_planned_and_never_settled():
    both = make()
    both.put("", [0, 0], keep=False)
    both.checkpoints.plan(both.tree.match([0, 0])[0])
    with pytest.raises(AssertionError, match="planned and not settled"):
        both.check()
