"""What the prefix trees of all ranks report, gathered into messages."""

import struct
from collections.abc import Sequence

from jaxserve.engine.radix import RadixTree
from jaxserve.messages import CacheEvent


class CacheWatch:
    """Watches every rank's tree from `start` on; `take` hands out what has happened since."""

    def __init__(self, trees: Sequence[RadixTree]):
        self._trees = trees
        self._events: list[CacheEvent] = []
        self._started = False

    def start(self) -> None:
        """What is cached now is reported first. Idempotent."""
        if self._started:
            return
        self._started = True
        for rank, tree in enumerate(self._trees):
            tree.watch(_RankWatcher(rank, self._events))

    def take(self) -> list[CacheEvent]:
        events = self._events[:]
        self._events.clear()
        return events


class _RankWatcher:
    """Turns one tree's calls into events."""

    def __init__(self, rank: int, events: list[CacheEvent]):
        self._rank = rank
        self._events = events

    def stored(self, parent: int | None, hashes: list[int]) -> None:
        self._events.append(CacheEvent("stored", self._rank, parent, _packed(hashes)))

    def removed(self, hashes: list[int]) -> None:
        self._events.append(CacheEvent("removed", self._rank, None, _packed(hashes)))

    def cleared(self) -> None:
        self._events.append(CacheEvent("cleared", self._rank, None, b""))


def _packed(hashes: list[int]) -> bytes:
    return struct.pack(f">{len(hashes)}Q", *hashes)
