"""The prefix tree against a plain dictionary: what it holds, what it may forget, and in which order."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.pages import PagePool
from jaxserve.engine.radix import RadixTree

PAGE = 2
NUM_PAGES = 12

Prefix = tuple[str, tuple[int, ...]]  # salt, tokens of whole pages


@dataclass
class Plain:
    """A tree as a dictionary from each cached prefix to the page of its last tokens."""

    page: dict[Prefix, int] = field(default_factory=dict)
    used: dict[Prefix, int] = field(default_factory=dict)  # when a match or insert last passed
    locks: dict[Prefix, int] = field(default_factory=dict)
    now: int = 0

    def path(self, salt, tokens) -> list[Prefix]:
        """The cached prefixes of some tokens, shortest first."""
        lengths = range(PAGE, len(tokens) + 1, PAGE)
        found = []
        for length in lengths:
            prefix = (salt, tuple(tokens[:length]))
            if prefix not in self.page:
                break
            found.append(prefix)
        return found

    def touch(self, prefixes) -> None:
        self.now += 1
        for prefix in prefixes:
            self.used[prefix] = self.now

    def lock(self, prefixes, change: int) -> None:
        for prefix in prefixes:
            self.locks[prefix] = self.locks.get(prefix, 0) + change

    def evictable(self) -> list[Prefix]:
        return [prefix for prefix in self.page if not self.locks.get(prefix)]

    def evict(self, count: int) -> list[int]:
        """Page by page: of the unlocked prefixes that nothing continues, the least recently used one."""
        pages = []
        for _ in range(min(count, len(self.evictable()))):
            parents = {(salt, tokens[:-PAGE]) for salt, tokens in self.page}
            ends = [prefix for prefix in self.evictable() if prefix not in parents]
            oldest = min(ends, key=self.used.__getitem__)
            pages.append(self.page.pop(oldest))
            del self.used[oldest]
        return pages


class Both:
    """The tree and its model, driven together and compared after every action."""

    def __init__(self):
        self.pool = PagePool(NUM_PAGES)
        self.tree = RadixTree(PAGE, self.pool)
        self.plain = Plain()
        self.held: list[tuple[object, list[Prefix]]] = []

    def match(self, salt, tokens):
        foreseen = self.tree.num_matched(tokens, salt)
        self.tree.check()
        node, pages = self.tree.match(tokens, salt)
        assert foreseen == len(pages)
        path = self.plain.path(salt, tokens)
        self.plain.touch(path)
        assert pages == [self.plain.page[prefix] for prefix in path]
        return node, path

    def insert(self, salt, tokens):
        """As a request does: find what is there, compute the rest into new pages, publish all."""
        tokens = tokens[: len(tokens) // PAGE * PAGE]
        node, path = self.match(salt, tokens)
        self.tree.lock(node)
        self.plain.lock(path, 1)
        needed = len(tokens) // PAGE - len(path)
        short = needed - self.pool.num_free
        if short > 0:
            self.evict(short)
        if needed <= self.pool.num_free:
            given = [self.plain.page[prefix] for prefix in path] + self.pool.allocate(needed)
            _, pages, spare = self.tree.insert(tokens, given, salt)
            assert (pages, spare) == (given, [])
            self.plain.touch(path)
            self.plain.touch([])
            for i, page in enumerate(given):
                prefix = (salt, tuple(tokens[: (i + 1) * PAGE]))
                if prefix not in self.plain.page:
                    self.plain.page[prefix], self.plain.used[prefix] = page, self.plain.now
        self.tree.unlock(node)
        self.plain.lock(path, -1)

    def insert_again(self, salt, tokens):
        """As a request that has computed what another one published meanwhile."""
        path = self.plain.path(salt, tokens)
        if not path or len(path) > self.pool.num_free:
            return
        own = self.pool.allocate(len(path))
        kept = [self.plain.page[prefix] for prefix in path]
        _, pages, spare = self.tree.insert(tokens[: len(path) * PAGE], own, salt)
        assert (pages, spare) == (kept, own)
        self.pool.free(spare)
        self.plain.touch(path)

    def lock(self, salt, tokens):
        node, path = self.match(salt, tokens)
        self.tree.lock(node)
        self.plain.lock(path, 1)
        self.held.append((node, path))

    def unlock(self, index):
        if self.held:
            node, path = self.held.pop(index % len(self.held))
            self.tree.unlock(node)
            self.plain.lock(path, -1)

    def evict(self, count):
        free = set(self.pool._free)
        freed = self.tree.evict(count)
        want = self.plain.evict(count)
        assert freed == len(want)
        assert set(self.pool._free) - free == set(want)

    def check(self):
        self.tree.check()
        assert sorted(self.tree.pages()) == sorted(self.plain.page.values())
        assert self.tree.num_pages == len(self.plain.page)
        assert self.tree.num_evictable == len(self.plain.evictable())
        self.pool.check(self.tree.pages())


SALTS = ("", "a")
NAMES = ("match", "insert", "insert", "insert", "insert_again", "lock", "unlock", "evict")


def act(both: Both, draw: random.Random) -> None:
    """One random action. Prompts are few and alike, so that they meet, split and push each other out."""
    name = draw.choice(NAMES)
    if name == "unlock":
        both.unlock(draw.randrange(4))
    elif name == "evict":
        both.evict(draw.randint(1, 4))
    else:
        chunks = [(0, draw.randrange(2)) for _ in range(draw.randint(0, 4))]
        tail = [0] * draw.randrange(PAGE)
        getattr(both, name)(draw.choice(SALTS), [token for chunk in chunks for token in chunk] + tail)
    both.check()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 80))
def test_tree_holds_and_forgets_what_a_dictionary_does(seed, num_actions):
    both, draw = Both(), random.Random(seed)
    for _ in range(num_actions):
        act(both, draw)
    for node, path in both.held:
        both.tree.unlock(node)
        both.plain.lock(path, -1)
        both.check()
    assert both.tree.clear() == len(both.plain.page)
    both.pool.check([])


def make(num_pages=8) -> tuple[RadixTree, PagePool]:
    pool = PagePool(num_pages)
    return RadixTree(PAGE, pool), pool


def put(tree: RadixTree, tokens: list[int], salt: str = ""):
    """Insert tokens whose pages are all new; returns the node and its path."""
    pages = tree.pool.allocate(len(tokens) // PAGE)
    node, path, spare = tree.insert(tokens, pages, salt)
    tree.pool.free(spare)
    return node, path


def test_match_ends_at_the_last_whole_page_in_common():
    tree, _ = make()
    _, path = put(tree, [1, 2, 3, 4, 5, 6])
    assert tree.match([1, 2, 3, 4, 5])[1] == path[:2]
    assert tree.match([1, 2, 3, 9])[1] == path[:1]
    assert tree.match([1, 9, 3, 4])[1] == []


def test_match_inside_an_edge_splits_it_and_loses_nothing():
    tree, pool = make()
    _, path = put(tree, [1, 2, 3, 4, 5, 6])
    node, pages = tree.match([1, 2, 3, 4, 9, 9])
    assert (node.pages, pages) == (path[:2], path[:2])
    tree.check()
    pool.check(tree.pages())
    assert tree.match([1, 2, 3, 4, 5, 6])[1] == path


def test_split_of_a_locked_edge_keeps_both_halves_locked():
    tree, _ = make()
    node, _ = put(tree, [1, 2, 3, 4])
    tree.lock(node)
    upper, _ = tree.match([1, 2])
    assert (upper.locks, node.locks) == (1, 1)
    assert tree.evict(8) == 0
    tree.unlock(node)
    assert (upper.locks, tree.num_evictable) == (0, 2)


def test_lock_keeps_the_way_to_the_root_and_nothing_else():
    tree, _ = make()
    _, first = put(tree, [1, 1, 2, 2])
    put(tree, [1, 1, 3, 3])
    node, _ = tree.match([1, 1, 2, 2])
    tree.lock(node)
    assert tree.evict(8) == 1
    assert tree.match([1, 1, 2, 2])[1] == first
    assert tree.match([1, 1, 3, 3])[1] == first[:1]


def test_least_recently_used_leaf_goes_first_and_from_its_end():
    tree, pool = make()
    _, old = put(tree, [1, 1, 2, 2])
    _, young = put(tree, [3, 3, 4, 4])
    tree.match([1, 1, 2, 2])
    assert tree.evict(1) == 1
    assert pool.allocate(1) == young[1:]
    assert tree.match([3, 3, 4, 4])[1] == young[:1]
    assert tree.match([1, 1, 2, 2])[1] == old


def test_parent_goes_after_its_last_child():
    tree, _ = make()
    put(tree, [1, 1, 2, 2])
    put(tree, [1, 1, 3, 3])
    assert tree.evict(3) == 3
    assert tree.num_pages == 0
    assert tree.match([1, 1])[1] == []


def test_pages_that_the_tree_has_already_come_back_as_spare():
    tree, pool = make()
    _, first = put(tree, [1, 1, 2, 2])
    own = pool.allocate(3)
    _, path, spare = tree.insert([1, 1, 2, 2, 3, 3], own)
    assert path == [*first, own[2]]
    assert spare == own[:2]


def test_salts_share_nothing():
    tree, _ = make()
    _, path = put(tree, [1, 1], "a")
    assert tree.match([1, 1], "b")[1] == []
    assert tree.match([1, 1])[1] == []
    assert tree.match([1, 1], "a")[1] == path


@pytest.mark.parametrize("enabled", [True, False])
def test_salts_without_pages_leave_nothing_behind(enabled):
    """A client can send as many salts as it likes."""
    tree = RadixTree(PAGE, PagePool(4), enabled)
    for i in range(100):
        node, _ = tree.match([1, 1, 2], f"salt {i}")
        tree.lock(node)
        tree.unlock(node)
    assert not tree._roots


def test_salt_is_forgotten_with_its_last_page_while_a_request_stays_locked():
    tree, _ = make()
    root, _ = tree.match([1, 1], "a")
    tree.lock(root)
    node, _ = put(tree, [1, 1], "a")
    tree.lock(node)
    tree.unlock(root)
    tree.check()
    tree.unlock(node)
    assert tree.clear() == 1
    assert not tree._roots


def test_clear_spares_what_is_locked():
    tree, _ = make()
    node, path = put(tree, [1, 1])
    put(tree, [2, 2])
    tree.lock(node)
    assert tree.clear() == 1
    assert tree.match([1, 1])[1] == path


def test_disabled_tree_finds_nothing_and_takes_no_pages():
    tree = RadixTree(PAGE, PagePool(4), enabled=False)
    node, pages = tree.match([1, 1])
    tree.lock(node)
    tree.unlock(node)
    assert pages == []
    with pytest.raises(AssertionError, match="a disabled tree takes no pages"):
        tree.insert([1, 1], [0])


def test_unlocking_too_often_is_a_bug_that_shows():
    tree, _ = make()
    node, _ = put(tree, [1, 1])
    with pytest.raises(AssertionError, match="unlocked more often than locked"):
        tree.unlock(node)


def test_audit_finds_a_wrong_count():
    tree, _ = make()
    put(tree, [1, 1])
    tree.num_evictable = 0
    with pytest.raises(AssertionError):
        tree.check()
