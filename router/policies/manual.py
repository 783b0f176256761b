"""manual: a routing key stays where it was first put, until it is idle for `max_idle_secs`.

When its worker is not usable the key moves to a second one and goes home when the first is back.
"""

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from router.call import Call
from router.config import RouterConfig
from router.policies import Policy, least_loaded
from router.workers import Worker

MAX_CANDIDATES = 2
MAX_KEYS = 1_000_000  # about 300 MB of keys: clients choose them, so there must be a bound


class Assignment:
    """The workers of one key, home first, and when the key was last seen (seconds)."""

    __slots__ = ("seen_s", "workers")

    def __init__(self, seen_s: float) -> None:
        self.workers: list[Worker] = []
        self.seen_s = seen_s


class Manual(Policy):
    def __init__(
        self, config: RouterConfig, rng: random.Random, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(config, rng)
        self.clock = clock
        self.keys: OrderedDict[str, Assignment] = OrderedDict()  # least recently seen first
        self.groups: dict[Worker, int] = {}  # keys at home on each worker

    def choose(self, call: Call, workers: Sequence[Worker]) -> Worker:
        key = call.routing_key
        if not key:
            call.decision = "random"
            return workers[int(self.rng.random() * len(workers))]
        now = self.clock()
        self._expire(now)
        entry = self.keys.get(key)
        if entry is None:
            entry = self.keys[key] = Assignment(now)
            if len(self.keys) > MAX_KEYS:
                self._drop(next(iter(self.keys)))
        entry.seen_s = now
        self.keys.move_to_end(key)
        for worker in entry.workers:
            if worker in workers:
                call.decision = "sticky"
                return worker
        call.decision = "new_key" if not entry.workers else "moved"
        worker = self._assign(workers)
        if len(entry.workers) == MAX_CANDIDATES:
            entry.workers.pop()
        entry.workers.append(worker)
        if len(entry.workers) == 1:
            self.groups[worker] = self.groups.get(worker, 0) + 1
        return worker

    def _assign(self, workers: Sequence[Worker]) -> Worker:
        mode = self.config.assignment_mode
        if mode == "min_load":
            return least_loaded(workers)
        if mode == "min_group":
            return min(workers, key=lambda w: (self.groups.get(w, 0), w.requests, w.total))
        return workers[int(self.rng.random() * len(workers))]

    def _expire(self, now_s: float) -> None:
        horizon = now_s - self.config.max_idle_secs
        while self.keys:
            key, entry = next(iter(self.keys.items()))
            if entry.seen_s >= horizon:
                return
            self._drop(key)

    def _drop(self, key: str) -> None:
        entry = self.keys.pop(key)
        if entry.workers and entry.workers[0] in self.groups:
            self.groups[entry.workers[0]] -= 1

    def news(self, call: Call, worker: Worker) -> Any:
        entry = self.keys.get(call.routing_key or "")
        return call.routing_key if entry is not None and entry.workers[0] is worker else None

    def heard(self, worker: Worker, news: Any) -> None:
        """Two processes that met a new key at once agree on the worker with the lower id."""
        now_s = self.clock()
        entry = self.keys.get(news)
        if entry is None:
            entry = self.keys[news] = Assignment(now_s)
            if len(self.keys) > MAX_KEYS:
                self._drop(next(iter(self.keys)))
        entry.seen_s = now_s
        self.keys.move_to_end(news)
        home = entry.workers[0] if entry.workers else None
        if home is worker or (home is not None and home.id < worker.id):
            return
        if home is not None and home in self.groups:
            self.groups[home] -= 1
        entry.workers = [worker, *(w for w in entry.workers if w is not worker)][:MAX_CANDIDATES]
        self.groups[worker] = self.groups.get(worker, 0) + 1

    def cleared(self, worker: Worker) -> None:
        """A flushed cache moves no keys."""

    def forget(self, worker: Worker) -> None:
        self.groups.pop(worker, None)
        for key in [k for k, entry in self.keys.items() if worker in entry.workers]:
            entry = self.keys[key]
            at_home = entry.workers[0] is worker
            entry.workers.remove(worker)
            if not entry.workers:
                del self.keys[key]
            elif at_home:
                home = entry.workers[0]
                self.groups[home] = self.groups.get(home, 0) + 1

    def stats(self) -> dict[str, float]:
        return {"manual_keys": len(self.keys)}
