"""Kept states of one data-parallel rank: for which cached prefixes there is one, and in which row.

A model with recurrent layers sums a sequence up in one state, which cannot be cut back to a shorter
prefix. Pages of a cached prefix are therefore of use only up to where a copy of the state was kept: a
checkpoint, at the end of a node of the prefix tree. The device's state pool has a row for each running
slot, then the rows that this owns. Checkpoints are far larger than pages, so they are few, and the
least recently used one gives its row to the next.

A checkpoint is made only by a prompt chunk, of tokens that are known when its step is planned; decode
steps, which may run ahead of a stop, make none. A row may be given away while launched steps still
read or write it: steps run in launch order, and one step reads states before it writes any.
"""

from collections.abc import Iterable

from jaxserve.engine.radix import Node


class Checkpoints:
    """Rows [first_row, first_row + num_rows). A row is free, planned for a node, or held by one."""

    def __init__(self, first_row: int, num_rows: int):
        self.rows = range(first_row, first_row + num_rows)
        self._free = list(reversed(self.rows))
        self._held: dict[Node, None] = {}  # least recently used first
        self._planned: dict[Node, int] = {}

    def plan(self, node: Node) -> int:
        """A row for the state at the end of `node`, which is locked, or -1 when it has or gets one.

        Matches see it only after `settle`: the step being planned cannot read what it writes.
        """
        if node.state >= 0 or node in self._planned or not (self._free or self._held):
            return -1
        if not self._free:
            self.forget(next(iter(self._held)))
        row = self._planned[node] = self._free.pop()
        return row

    def settle(self) -> None:
        """The step is planned: later ones may read what it keeps."""
        for node, row in self._planned.items():
            node.state = row
            self._held[node] = None
        self._planned.clear()

    def touch(self, node: Node) -> None:
        """The node's checkpoint has been used."""
        del self._held[node]
        self._held[node] = None

    def forget(self, node: Node) -> None:
        """The node loses its checkpoint, if it has one."""
        if node.state >= 0:
            del self._held[node]
            self._free.append(node.state)
            node.state = -1

    @property
    def num_held(self) -> int:
        return len(self._held)

    def check(self, nodes: Iterable[Node]) -> None:
        """Audit, between plans: each row is free or held by one node of the tree. Raises AssertionError."""
        holders = {node for node in nodes if node.state >= 0}
        assert holders == self._held.keys(), "a node with a checkpoint is unknown, or not in the tree"
        assert not self._planned, f"rows {list(self._planned.values())} are planned and not settled"
        rows = sorted([*self._free, *(node.state for node in holders)])
        assert rows == list(self.rows), f"rows lost or held twice: {rows} of {self.rows}"
