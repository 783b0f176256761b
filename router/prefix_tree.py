"""A radix tree over prompt text: which worker was last sent which prefix, within a bound.

Edges are strings, so a fork never falls inside a UTF-8 character. A node records, for each worker that
was sent text through it, the last visit. What is counted and bounded is text held for workers: a node's
edge length, and what the node itself takes beside it, times the workers on it.

Visits form a ring by age. One passes through all nodes from the root to its end, and later ones of the
same worker take over the upper ones, so what is still its own is the lower part of its path: the oldest
visit's end is the leaf used longest ago, and is found without a search.
"""

from collections.abc import Collection, Hashable, Iterator
from itertools import count

MAX_DROPPED = 1000  # leaves at a time, about 2 ms: the event loop waits for it
NODE_CHARS = 400  # a node takes about as many bytes: short texts that share nothing would pass any bound


class Node:
    __slots__ = ("children", "edge", "holders", "parent")

    def __init__(self, edge: str, parent: "Node | None") -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[str, Node] = {}  # by the first character of their edge
        self.holders: dict[Hashable, Visit] = {}  # worker -> its last visit


class Visit:
    """One insertion, while there are nodes that its worker was not sent text through again."""

    __slots__ = ("holder", "newer", "node", "older", "tick")

    def __init__(self, holder: Hashable, tick: int, node: Node) -> None:
        self.holder = holder
        self.tick = tick
        self.node = node  # the deepest of its nodes
        self.older = self.newer = self


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
        self._ring = Visit(None, 0, self.root)  # no visit: its `newer` is the oldest, its `older` the newest

    def match(self, text: str, among: Collection[Hashable] | None = None) -> tuple[int, Hashable | None]:
        """(characters matched, the holder seen last at the deepest match); (0, None) without one.

        With `among`, only these holders count: each node's nearest holder of them decides how deep.
        """
        node, at, deepest = self.root, 0, {}
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                break
            holders = child.holders
            if among is not None:
                holders = {h: v for h, v in holders.items() if h in among}
            if not holders:
                break
            deepest = holders
            common = common_prefix_len(child.edge, text, at)
            at += common
            if common < len(child.edge):
                break
            node = child
        return at, max(deepest, key=lambda h: deepest[h].tick, default=None)

    def insert(self, text: str, holder: Hashable) -> None:
        """Record that `holder` was sent `text`; evicts when the bound is passed."""
        visit = Visit(holder, next(self._ticks), self.root)
        at = 0
        while at < len(text):
            node = visit.node
            child = node.children.get(text[at])
            if child is None:
                child = node.children[text[at]] = Node(text[at:], node)
                self.num_nodes += 1
            common = common_prefix_len(child.edge, text, at)
            if common < len(child.edge):
                child = self._split(child, common)
            self._touch(child, visit)
            at += common
        if text:
            visit.older, visit.newer = self._ring.older, self._ring
            visit.older.newer = visit.newer.older = visit
        self.evict(self.max_chars)

    def evict(self, max_chars: int) -> None:
        """Drop what was used longest ago, leaves first, until at most `max_chars` are held.

        At most MAX_DROPPED at once: a long text that takes the place of many short ones leaves the rest of
        them to the next calls, as long as what is held exceeds `max_chars` by an eighth at most. What is
        beyond that eighth (8 million characters by default) makes room at once, however many it takes.
        """
        num_dropped = 0
        while self.total_chars > max_chars:
            if num_dropped >= MAX_DROPPED and self.total_chars <= max_chars + max_chars // 8:
                break
            self._drop_end(self._ring.newer)
            num_dropped += 1

    def remove(self, holder: Hashable) -> None:
        """Forget everything of one holder."""
        for visit in [v for v in self._visits() if v.holder == holder]:
            while visit.node.holders.get(holder) is visit:
                self._drop_end(visit)
        self.chars.pop(holder, None)

    def check(self) -> None:
        """Assert every invariant; for tests."""
        chars: dict[Hashable, int] = {}
        stack, nodes, held = [self.root], 0, set()
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
            held.update((node, visit) for visit in node.holders.values())
        assert nodes == self.num_nodes, (nodes, self.num_nodes)
        assert chars == {h: n for h, n in self.chars.items() if n}, (chars, self.chars)
        assert sum(chars.values()) == self.total_chars, (chars, self.total_chars)
        most = self.max_chars + self.max_chars // 8
        assert self.total_chars <= most, (self.total_chars, self.max_chars)
        tick = 0
        for visit in self._visits():
            assert visit.tick > tick and visit.newer.older is visit, (visit.tick, tick)
            tick, node = visit.tick, visit.node
            assert node.holders[visit.holder] is visit, "a visit without a node of its own is in the ring"
            while node is not None and node.holders.get(visit.holder) is visit:
                held.remove((node, visit))
                node = node.parent
        assert not held, f"{len(held)} nodes would never be evicted"

    def _visits(self) -> Iterator[Visit]:
        """From the oldest on."""
        visit = self._ring.newer
        while visit is not self._ring:
            yield visit
            visit = visit.newer

    def _touch(self, node: Node, visit: Visit) -> None:
        last = node.holders.get(visit.holder)
        if last is None:
            self._count(visit.holder, len(node.edge) + self.node_chars)
        elif last.node is node:
            _unlink(last)
        node.holders[visit.holder] = visit
        visit.node = node

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

    def _drop_end(self, visit: Visit) -> None:
        """Take `visit`'s holder from the deepest node of that visit, and the node away from the last one."""
        node, holder = visit.node, visit.holder
        parent = node.parent
        assert parent is not None, "the root is held by nobody"
        del node.holders[holder]
        self._count(holder, -len(node.edge) - self.node_chars)
        if parent.holders.get(holder) is visit:
            visit.node = parent
        else:
            _unlink(visit)
        if not node.holders:
            assert not node.children
            del parent.children[node.edge[0]]
            self.num_nodes -= 1


def _unlink(visit: Visit) -> None:
    visit.older.newer, visit.newer.older = visit.newer, visit.older


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
