"""A radix tree over prompt text: which worker was last sent which prefix, within a bound.

Edges are strings, so a fork never falls inside a UTF-8 character. A node records, for each worker that
was sent text through it, when that last happened. What is counted and bounded is text held for workers:
a node's edge length, and what the node itself takes beside it, times the workers on it.
"""

import heapq
from collections.abc import Collection, Hashable
from itertools import count

NODE_CHARS = 400  # a node takes about as many bytes: short texts that share nothing would pass any bound


class Node:
    __slots__ = ("children", "edge", "holders", "parent")

    def __init__(self, edge: str, parent: "Node | None") -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[str, Node] = {}  # by the first character of their edge
        self.holders: dict[Hashable, int] = {}  # worker -> tick of its last visit


class PrefixTree:
    """Holders are any hashable, workers in practice."""

    def __init__(self, max_chars: int, node_chars: int = NODE_CHARS) -> None:
        self.max_chars = max_chars
        self.node_chars = node_chars
        self.root = Node("", None)
        self.chars: dict[Hashable, int] = {}  # held for each worker, `node_chars` of each node included
        self.total_chars = 0
        self.num_nodes = 1
        self._ticks = count(1)

    def match(self, text: str, among: Collection[Hashable] | None = None) -> tuple[int, Hashable | None]:
        """(characters matched, the holder seen last at the deepest match); (0, None) without one.

        With `among`, only these holders count: each node's nearest holder of them decides how deep.
        """
        node, at, best, best_chars = self.root, 0, None, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                break
            common = common_prefix_len(child.edge, text, at)
            holders = child.holders
            if among is not None:
                holders = {h: t for h, t in holders.items() if h in among}
            if not holders:
                break
            best = max(holders, key=holders.__getitem__)
            best_chars = at + common
            at += common
            if common < len(child.edge):
                break
            node = child
        return best_chars, best

    def insert(self, text: str, holder: Hashable) -> None:
        """Record that `holder` was sent `text`; evicts at once when the bound is passed."""
        tick = next(self._ticks)
        node, at = self.root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                child = Node(text[at:], node)
                node.children[text[at]] = child
                self.num_nodes += 1
                self._touch(child, holder, tick)
                break
            common = common_prefix_len(child.edge, text, at)
            if common < len(child.edge):
                child = self._split(child, common)
            self._touch(child, holder, tick)
            at += common
            node = child
        if self.total_chars > self.max_chars:
            # 10 % at a time, so that a full tree does not walk itself on every insertion
            self.evict(self.max_chars - self.max_chars // 10)

    def evict(self, max_chars: int) -> None:
        """Drop what was used longest ago, leaves first, until at most `max_chars` are held."""
        heap: list[tuple[int, int, Node, Hashable]] = []
        order = count()  # nodes and holders have no order of their own
        stack = [self.root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            for holder, tick in node.holders.items():
                if not _deeper(node, holder):
                    heap.append((tick, next(order), node, holder))
        heapq.heapify(heap)
        while self.total_chars > max_chars and heap:
            _, _, node, holder = heapq.heappop(heap)
            parent = node.parent
            self._drop(node, holder)
            if parent is not None and holder in parent.holders and not _deeper(parent, holder):
                heapq.heappush(heap, (parent.holders[holder], next(order), parent, holder))

    def remove(self, holder: Hashable) -> None:
        """Forget everything of one holder."""
        nodes, stack = [], [self.root]
        while stack:
            node = stack.pop()
            nodes.append(node)
            stack.extend(node.children.values())
        for node in reversed(nodes):  # children before parents
            if holder in node.holders:
                self._drop(node, holder)
        self.chars.pop(holder, None)

    def check(self) -> None:
        """Assert every invariant; for tests."""
        chars: dict[Hashable, int] = {}
        stack, nodes = [self.root], 0
        while stack:
            node = stack.pop()
            nodes += 1
            for first, child in node.children.items():
                assert child.parent is node and child.edge and child.edge[0] == first
                assert child.holders, f"{child.edge!r} is held by nobody"
                if node is not self.root:
                    assert child.holders.keys() <= node.holders.keys()
                stack.append(child)
            for holder in node.holders:
                chars[holder] = chars.get(holder, 0) + len(node.edge) + self.node_chars
        assert nodes == self.num_nodes, (nodes, self.num_nodes)
        assert chars == {h: n for h, n in self.chars.items() if n}, (chars, self.chars)
        assert sum(chars.values()) == self.total_chars, (chars, self.total_chars)
        assert self.total_chars <= self.max_chars, (self.total_chars, self.max_chars)

    def _touch(self, node: Node, holder: Hashable, tick: int) -> None:
        if holder not in node.holders:
            self._count(holder, len(node.edge) + self.node_chars)
        node.holders[holder] = tick

    def _count(self, holder: Hashable, chars: int) -> None:
        self.chars[holder] = self.chars.get(holder, 0) + chars
        self.total_chars += chars

    def _split(self, child: Node, at: int) -> Node:
        """Cut `child`'s edge after `at` characters; returns the new upper node."""
        parent = child.parent
        assert parent is not None and 0 < at < len(child.edge)
        upper = Node(child.edge[:at], parent)
        upper.holders = dict(child.holders)
        parent.children[upper.edge[0]] = upper
        child.edge = child.edge[at:]
        child.parent = upper
        upper.children[child.edge[0]] = child
        self.num_nodes += 1
        for holder in upper.holders:
            self._count(holder, self.node_chars)
        return upper

    def _drop(self, node: Node, holder: Hashable) -> None:
        del node.holders[holder]
        self._count(holder, -len(node.edge) - self.node_chars)
        if not node.holders and node.parent is not None:
            assert not node.children
            del node.parent.children[node.edge[0]]
            self.num_nodes -= 1


def _deeper(node: Node, holder: Hashable) -> bool:
    return any(holder in child.holders for child in node.children.values())


def common_prefix_len(edge: str, text: str, at: int) -> int:
    """Length of the common prefix of `edge` and `text[at:]`, by bisection over memcmp."""
    if text.startswith(edge, at):
        return len(edge)
    low, high = 0, min(len(edge), len(text) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(edge[:middle], at):
            low = middle
        else:
            high = middle - 1
    return low
