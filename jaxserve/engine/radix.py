"""The prefix tree of one data-parallel rank: which sequences of full pages are already in the pool.

An edge holds whole pages only: `page_size` tokens a page, one page id each. A node that a running
request reads is locked, with all its ancestors; unlocked leaves are evicted least recently used
first. Sequences with different salts never share.

A tree that is watched tells its watcher of every page that comes and goes, by hash (page_hash.py);
one that is not computes no hashes.
"""

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

from jaxserve.engine.page_hash import chain_hashes, root_hash
from jaxserve.engine.pages import PagePool

Chunk = tuple[int, ...]  # the tokens of one page


class Watcher(Protocol):
    """Is told of a tree's changes as they happen: pages come below their parents and go before them."""

    def stored(self, parent: int | None, hashes: list[int]) -> None:
        """A chain below `parent` (None: it starts a sequence) is found by the next match."""
        ...

    def removed(self, hashes: list[int]) -> None:
        """The end of an edge is gone; `hashes` in the order of its tokens."""
        ...

    def cleared(self) -> None:
        """Nothing is left."""
        ...


class Node:
    """An edge of the tree: `chunks[i]` are the tokens of `pages[i]`. The root of a salt has none.

    In a watched tree `hashes[i]` is the hash of `pages[i]`; otherwise there are none. `state` is the row
    of the checkpoint at the edge's end; -1: there is none (see states.py).
    """

    __slots__ = ("children", "chunks", "hashes", "in_heap", "last_use", "locks", "pages", "parent", "state")

    def __init__(self, parent: "Node | None", chunks: list[Chunk], pages: list[int]):
        self.parent = parent
        self.chunks = chunks
        self.pages = pages
        self.hashes: list[int] = []
        self.children: dict[Chunk, Node] = {}
        self.locks = 0
        self.last_use = 0
        self.in_heap = False
        self.state = -1


class RadixTree:
    """Owns the pages of cached prefixes; takes them from requests and gives them back to `pool`.

    Args:
        drop_state: is told of a node whose end is evicted while it has a checkpoint.
    """

    def __init__(
        self,
        page_size: int,
        pool: PagePool,
        enabled: bool = True,
        drop_state: Callable[[Node], None] | None = None,
    ):
        self.page_size = page_size
        self.pool = pool
        self.enabled = enabled
        self.drop_state = drop_state
        self.num_pages = 0  # in the tree, locked or not
        self.num_evictable = 0  # in nodes without a lock
        self._watcher: Watcher | None = None
        self._roots: dict[str, Node] = {}
        self._clock = count(1)
        # Leaves that may be evicted, by last use. An entry may be out of date: `evict` looks again.
        self._heap: list[tuple[int, int, Node]] = []
        self._serial = count()

    def match(self, tokens: Sequence[int], salt: str = "") -> tuple[Node, list[int]]:
        """The deepest node whose path is a prefix of `tokens`, and the pages along that path.

        A match that ends inside an edge splits it, so that the node can be locked.
        """
        node = self._root(salt)
        pages: list[int] = []
        if not self.enabled:
            return node, pages
        now = next(self._clock)
        chunks = self._chunks(tokens, len(tokens) // self.page_size)
        at = 0
        while at < len(chunks):
            child = node.children.get(chunks[at])
            if child is None:
                break
            same = _common(child.chunks, chunks, at)
            if same < len(child.chunks):
                child = self._split(child, same)
            child.last_use = now
            pages += child.pages
            node = child
            at += same
        return node, pages

    def match_state(self, tokens: Sequence[int], salt: str = "") -> tuple[Node, list[int], int]:
        """As `match`, but to the last node on the way that has a checkpoint; the root is one of nothing.

        Returns also how many pages of `tokens` are here, past that node too.
        """
        node, pages = self.match(tokens, salt)
        num_here = len(pages)
        while node.parent is not None and node.state < 0:
            del pages[len(pages) - len(node.pages) :]
            node = node.parent
        return node, pages, num_here

    def num_matched(self, tokens: Sequence[int], salt: str = "", to_state: bool = False) -> int:
        """Pages that `match` would find, or `match_state`; nothing is split, and nothing counts as used."""
        if not self.enabled:
            return 0
        node, chunks, at, found = self._root(salt), self._chunks(tokens, len(tokens) // self.page_size), 0, 0
        while at < len(chunks) and (child := node.children.get(chunks[at])) is not None:
            same = _common(child.chunks, chunks, at)
            at += same
            if not to_state or (same == len(child.chunks) and child.state >= 0):
                found = at
            if same < len(child.chunks):
                break
            node = child
        return found

    def insert(
        self, tokens: Sequence[int], pages: list[int], salt: str = ""
    ) -> tuple[Node, list[int], list[int]]:
        """Give the tree the pages of a sequence: `pages[i]` holds the i-th full page of `tokens`.

        Returns the node at the end of the sequence, the pages on its path, and those given pages that
        the tree did not take because it has the same tokens elsewhere: they are the caller's to free.
        """
        assert self.enabled, "a disabled tree takes no pages"
        chunks = self._chunks(tokens, len(pages))
        node, held = self.match(tokens[: len(pages) * self.page_size], salt)
        have = len(held)
        spare = [given for given, kept in zip(pages, held) if given != kept]
        if have < len(chunks):
            leaf = Node(node, chunks[have:], pages[have:])
            leaf.last_use = next(self._clock)
            node.children[chunks[have]] = leaf
            if node.parent is None:
                self._roots[salt] = node
            self.num_pages += len(leaf.pages)
            self.num_evictable += len(leaf.pages)
            self._offer(leaf)
            if self._watcher is not None:
                self._tell_stored(leaf, salt)
            node = leaf
        return node, held + pages[have:], spare

    def lock(self, node: Node) -> None:
        """Keep the path to `node` from eviction."""
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self.num_evictable -= len(at.pages)
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            assert at.locks > 0, "unlocked more often than locked"
            at.locks -= 1
            if at.locks == 0:
                self.num_evictable += len(at.pages)
                self._offer(at)
            at = at.parent

    def evict(self, num_pages: int) -> int:
        """Free at least `num_pages` pages if that many are evictable; returns how many were freed.

        Only as many pages of a leaf go as are needed, from its end.
        """
        freed = 0
        while freed < num_pages and self._heap:
            last_use, _, leaf = heapq.heappop(self._heap)
            leaf.in_heap = False
            if last_use < leaf.last_use:
                self._offer(leaf)
                continue
            if leaf.locks or leaf.children:
                continue  # unlocking it, or evicting its last child, offers it again
            take = min(len(leaf.pages), num_pages - freed)
            if leaf.state >= 0 and self.drop_state is not None:
                self.drop_state(leaf)
            self.pool.free(leaf.pages[-take:])
            freed += take
            self.num_pages -= take
            self.num_evictable -= take
            if self._watcher is not None:
                self._watcher.removed(leaf.hashes[-take:])
            if take < len(leaf.pages):
                del leaf.pages[-take:], leaf.chunks[-take:], leaf.hashes[-take:]
                self._offer(leaf)
                break
            parent = leaf.parent
            assert parent is not None
            del parent.children[leaf.chunks[0]]
            self._offer(parent)
        self._roots = {salt: root for salt, root in self._roots.items() if root.children}
        return freed

    def _offer(self, node: Node) -> None:
        """Let `evict` consider a node, once, if it is a leaf with pages and without locks."""
        if node.parent is not None and not node.children and node.locks == 0 and not node.in_heap:
            node.in_heap = True
            heapq.heappush(self._heap, (node.last_use, next(self._serial), node))

    def clear(self) -> int:
        """Forget every unlocked prefix; returns the pages freed."""
        watcher = self._watcher
        if watcher is None or self.num_evictable < self.num_pages:
            return self.evict(self.num_evictable)
        self._watcher = None  # one word for all
        freed = self.evict(self.num_evictable)
        self._watcher = watcher
        if freed:
            watcher.cleared()
        return freed

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` what is here, then of every change. About a microsecond a page that is here."""
        assert self._watcher is None, "a tree has one watcher"
        self._watcher = watcher
        stack = [(salt, child) for salt, root in self._roots.items() for child in root.children.values()]
        while stack:
            salt, node = stack.pop()
            self._tell_stored(node, salt)
            stack.extend((salt, child) for child in node.children.values())

    def _tell_stored(self, node: Node, salt: str) -> None:
        """Hash a new edge, whose parent is hashed, and tell of it."""
        assert self._watcher is not None and node.parent is not None
        above = node.parent.hashes
        node.hashes = chain_hashes(above[-1] if above else root_hash("", salt), node.chunks)
        self._watcher.stored(above[-1] if above else None, node.hashes)

    def pages(self) -> list[int]:
        """Every page in the tree, for the pool's audit."""
        return [page for node in self.nodes() for page in node.pages]

    def check(self) -> None:
        """Audit of the counters and of the lock order. Raises AssertionError."""
        nodes = self.nodes()
        assert self.num_pages == sum(len(n.pages) for n in nodes)
        assert self.num_evictable == sum(len(n.pages) for n in nodes if n.locks == 0)
        for node in nodes:
            assert len(node.chunks) == len(node.pages) and (node.pages or node.parent is None)
            assert len(node.hashes) == (len(node.pages) if self._watcher is not None else 0)
            assert node.children or node.locks or node.parent is None or node.in_heap, "never evicted"
            for first, child in node.children.items():
                assert child.parent is node and child.chunks[0] == first and child.locks <= node.locks

    def _root(self, salt: str) -> Node:
        """The root of a salt; it is kept from its first page on, so that salts alone cost nothing."""
        return self._roots.get(salt) or Node(None, [], [])

    def _chunks(self, tokens: Sequence[int], num: int) -> list[Chunk]:
        s = self.page_size
        return [tuple(tokens[i * s : (i + 1) * s]) for i in range(num)]

    def _split(self, node: Node, at: int) -> Node:
        """Cut an edge after `at` pages; the upper half takes the locks of the lower, which keeps the end."""
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.chunks[:at], node.pages[:at])
        upper.locks, upper.last_use = node.locks, node.last_use
        upper.children[node.chunks[at]] = node
        parent.children[upper.chunks[0]] = upper
        upper.hashes, node.hashes = node.hashes[:at], node.hashes[at:]
        node.parent, node.chunks, node.pages = upper, node.chunks[at:], node.pages[at:]
        return upper

    def nodes(self) -> list[Node]:
        found, stack = [], list(self._roots.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found


def _common(edge: list[Chunk], chunks: list[Chunk], at: int) -> int:
    """How many pages of `edge` equal `chunks` from `at` on."""
    most = min(len(edge), len(chunks) - at)
    return next((i for i in range(most) if edge[i] != chunks[at + i]), most)
