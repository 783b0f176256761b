"""What the prefix tree tells its watcher, against what it holds: pages by hash, in an order to rely on."""

import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from jaxserve.engine.cache_watch import CacheWatch
from jaxserve.engine.page_hash import chain_hashes, root_hash
from jaxserve.engine.pages import PagePool
from jaxserve.engine.radix import RadixTree
from jaxserve.engine.rank import Limits
from jaxserve.engine.scheduler import Scheduler
from jaxserve.messages import Generate, Sampling

PAGE = 2
NUM_PAGES = 10
FIXTURES = json.loads((Path(__file__).parents[1] / "router/fixtures/protocol.json").read_text())


class Index:
    """What a reader of the events knows: page hash -> hash of the page above (None: a sequence starts)."""

    def __init__(self):
        self.pages: dict[int, int | None] = {}

    def stored(self, parent, hashes):
        assert hashes, "an event that says nothing"
        for page in hashes:
            assert page not in self.pages, "a page is stored twice"
            assert parent is None or parent in self.pages, "a page without the one above it"
            self.pages[page] = parent
            parent = page

    def removed(self, hashes):
        assert hashes, "an event that says nothing"
        for page in reversed(hashes):
            del self.pages[page]
            assert page not in self.pages.values(), "a page is gone before the ones below it"

    def cleared(self):
        self.pages.clear()


def hashes_of(tokens, salt=""):
    """The definition, page by page."""
    above, found = xxh3_64_intdigest(b"\0" + salt.encode()), []
    for at in range(0, len(tokens) - PAGE + 1, PAGE):
        above = xxh3_64_intdigest(struct.pack("<QII", above, *tokens[at : at + PAGE]))
        found.append(above)
    return found


def held(tree: RadixTree) -> dict[int, int | None]:
    """Every page in a tree and the one above it, from the tokens alone."""
    found: dict[int, int | None] = {}
    stack = [(salt, [], root) for salt, root in tree._roots.items()]
    while stack:
        salt, before, node = stack.pop()
        tokens = before + [token for chunk in node.chunks for token in chunk]
        hashes = hashes_of(tokens, salt)
        found.update(zip(hashes, [None, *hashes[:-1]]))
        stack += [(salt, tokens, child) for child in node.children.values()]
    return found


def insert(tree: RadixTree, tokens, salt=""):
    """Publish tokens as a request does, making room first; returns the node, or None without room."""
    node, pages = tree.match(tokens, salt)
    tree.lock(node)
    needed = len(tokens) // PAGE - len(pages)
    tree.evict(needed - tree.pool.num_free)
    if needed <= tree.pool.num_free:
        end, _, spare = tree.insert(tokens, pages + tree.pool.allocate(needed), salt)
        assert not spare
    else:
        end = None
    tree.unlock(node)
    return end


def random_tokens(draw: random.Random) -> list[int]:
    """Prompts are few and alike, so that they meet, split and push each other out."""
    return [token for _ in range(draw.randint(0, 5)) for token in (0, draw.randrange(2))]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(1, 80))
def test_index_fed_by_the_events_holds_what_the_tree_holds(seed, num_before, num_actions):
    """Watched from the start or from later on, through inserts, splits, locks, evictions and clears."""
    draw, tree, index = random.Random(seed), RadixTree(PAGE, PagePool(NUM_PAGES)), Index()
    locked = []
    for i in range(num_before + num_actions):
        if i == num_before:
            tree.watch(index)
        salt = draw.choice(["", "a"])
        match draw.randrange(8):
            case 0:
                tree.evict(draw.randint(1, 4))
            case 1:
                tree.match(random_tokens(draw), salt)
            case 2:
                node, _ = tree.match(random_tokens(draw), salt)
                tree.lock(node)
                locked.append(node)
            case 3 if locked:
                tree.unlock(locked.pop(draw.randrange(len(locked))))
            case 4 if draw.random() < 0.3:
                tree.clear()
            case _:
                insert(tree, random_tokens(draw), salt)
        tree.check()
        if i >= num_before:
            assert index.pages == held(tree)
    for node in locked:
        tree.unlock(node)
    tree.clear()
    assert index.pages == held(tree) == {}


def test_clear_of_an_idle_tree_is_one_word():
    tree, heard = RadixTree(PAGE, PagePool(8)), []
    watch = CacheWatch([tree])
    watch.start()
    insert(tree, [1, 1, 2, 2])
    insert(tree, [1, 1, 3, 3])
    heard += watch.take()
    tree.clear()
    heard += watch.take()
    assert [event.kind for event in heard] == ["stored", "stored", "cleared"]
    assert heard[1].parent == hashes_of([1, 1])[0]
    tree.clear()
    assert watch.take() == []


def test_locked_pages_outlive_a_clear_and_the_events_say_so():
    tree, index = RadixTree(PAGE, PagePool(8)), Index()
    tree.watch(index)
    tree.lock(insert(tree, [1, 1]))
    insert(tree, [1, 1, 2, 2])
    assert tree.clear() == 1
    assert list(index.pages) == hashes_of([1, 1])


def test_unwatched_tree_computes_no_hashes():
    tree = RadixTree(PAGE, PagePool(8))
    insert(tree, [1, 1, 2, 2])
    assert [node.hashes for node in tree.nodes()] == [[], []]


def test_watch_started_twice_reports_once():
    tree = RadixTree(PAGE, PagePool(8))
    insert(tree, [1, 1])
    watch = CacheWatch([tree])
    watch.start()
    watch.start()
    assert len(watch.take()) == 1


@pytest.mark.parametrize("case", FIXTURES["page_hashes"])
def test_page_hashes_are_those_of_the_protocol(case):
    size, tokens = case["page_size"], case["token_ids"]
    root = root_hash(case["adapter"], case["cache_salt"])
    chunks = [tuple(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]
    assert f"{root:016x}" == case["root"]
    assert [f"{h:016x}" for h in chain_hashes(root, chunks)] == case["pages"]


def test_page_of_a_prompt_is_stored_before_its_first_token_is_out_and_under_its_own_rank():
    limits = Limits(16, PAGE, 4, step_tokens=16, prefill_tokens=8, prefill_chunks=4)
    scheduler = Scheduler(limits, 2)
    watch = CacheWatch([rank.tree for rank in scheduler.ranks])
    watch.start()
    for rank in (0, 1):
        spec = Generate(
            rid=str(rank), input_ids=[rank] * 5, sampling=Sampling(max_new_tokens=2), dp_rank=rank
        )
        scheduler.submit(spec)
    scheduler.plan()
    stored = {event.rank: event.pages for event in watch.take()}
    assert stored == {rank: struct.pack(">2Q", *hashes_of([rank] * 5)) for rank in (0, 1)}
