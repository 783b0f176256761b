"""A consistent-hash ring: a key keeps its worker while workers come and go."""

from bisect import bisect_left
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from router.workers import Worker

POINTS = 128  # a worker's points on the ring: shares within about 10 % of each other


class Ring:
    """Workers by hash. Rebuilt when the set of workers changes, which is rare."""

    def __init__(self) -> None:
        self._workers: tuple[Worker, ...] = ()
        self._hashes: list[int] = []
        self._owners: list[Worker] = []

    def find(self, key: bytes, workers: Sequence[Worker]) -> Worker:
        """The owner of `key` among `workers` (not empty)."""
        if tuple(workers) != self._workers:
            self._build(tuple(workers))
        i = bisect_left(self._hashes, xxh3_64_intdigest(key))
        return self._owners[i if i < len(self._owners) else 0]

    def _build(self, workers: tuple[Worker, ...]) -> None:
        points = sorted(
            ((xxh3_64_intdigest(f"{w.url}#{i}".encode()), w) for w in workers for i in range(POINTS)),
            key=lambda point: point[0],
        )
        self._hashes = [h for h, _ in points]
        self._owners = [w for _, w in points]
        self._workers = workers
