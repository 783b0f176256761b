"""A consistent-hash ring: a key keeps its worker while workers come and go."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from router.workers import Worker

POINTS = 128  # a worker's points on the ring: shares within about 10 % of each other
MAX_RINGS = 32  # kept, least recently used last: building one takes 50 us a worker


class Ring:
    """Workers by hash. A ring is kept for each of the sets of workers asked about: models have their own."""

    def __init__(self) -> None:
        self._rings: OrderedDict[tuple[Worker, ...], tuple[list[int], list[Worker]]] = OrderedDict()

    def find(self, key: bytes, workers: Sequence[Worker]) -> Worker:
        """The owner of `key` among `workers` (not empty)."""
        among = tuple(workers)
        ring = self._rings.get(among)
        if ring is None:
            ring = self._rings[among] = _build(among)
            if len(self._rings) > MAX_RINGS:
                self._rings.popitem(last=False)
        else:
            self._rings.move_to_end(among)
        hashes, owners = ring
        i = bisect_left(hashes, xxh3_64_intdigest(key))
        return owners[i if i < len(owners) else 0]


def _build(workers: tuple[Worker, ...]) -> tuple[list[int], list[Worker]]:
    points = sorted(
        ((xxh3_64_intdigest(f"{w.url}#{i}".encode()), w) for w in workers for i in range(POINTS)),
        key=lambda point: point[0],
    )
    return [h for h, _ in points], [w for _, w in points]
