"""The workers: what each one is, what it is doing, and which may be chosen now.

Pure state on one event loop, no I/O: `jobs` registers and drains, `health` ejects and returns.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from router.breaker import PROBE, STATE_NUMBER, Admission, Breaker
from router.upstream import KEY_PATTERN, Pool

if TYPE_CHECKING:
    from router.kv_events import KvImage

ANY_MODEL = ("", "default")  # names by which clients ask for whatever is served, where none is called so
REPORT_HOLDS_S = 5.0  # what others have at a worker is believed for so long after its last report

Status = Literal["pending", "ready", "unhealthy", "draining", "failed"]
# Bounded, because processes tell each other of it in MessagePack, which has no integers beyond 64 bits.
Priority = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
ApiKey = Annotated[str, msgspec.Meta(pattern=KEY_PATTERN)]


class WorkerSpec(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What `POST /workers` takes; unknown fields are ignored, as the Rust gateway does.

    `priority`, `cost` and `labels` are the operator's notes: listed, and read by no policy.
    """

    url: str
    model_id: str | None = None
    worker_type: Literal["regular"] = "regular"
    runtime: str | None = None
    priority: Priority = 50
    cost: float = 1.0
    labels: dict[str, str] = {}
    api_key: ApiKey | None = None


class Load(msgspec.Struct):
    """What a worker last said of itself. `at_s` is the loop time it was heard."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0  # prompt tokens not yet computed
    kv_usage: float = 0.0  # share of KV pages in use by running requests
    at_s: float = 0.0


class Share(msgspec.Struct, array_like=True):
    """What another gateway process has at a worker, and what it thinks of it."""

    in_flight: int = 0
    pending_tokens: int = 0
    sent_tokens: int = 0
    total: int = 0
    breaker: Literal["closed", "open", "half_open"] = "closed"


class Worker:
    """One worker, or one data-parallel rank of it. Mutated only on the event loop."""

    def __init__(self, spec: WorkerSpec, breaker: Breaker, pool: Pool, *, dp_rank: int | None = None) -> None:
        self.id = uuid7()
        self.spec = spec
        self.dp_rank = dp_rank
        self.url = spec.url if dp_rank is None else f"{spec.url}@{dp_rank}"
        self.pool = pool
        self.breaker = breaker
        self.status: Status = "pending"
        self.models: tuple[str, ...] = (spec.model_id,) if spec.model_id else ()
        self.source = "api"  # who registered it: flags, api, file, kubernetes
        self.avoid_until_s = 0.0  # loop time until which it asked for a pause (429, 503); 0: it did not
        self.pauses = 0  # in a row
        self.relearned_s = -math.inf  # loop time
        self.suspected: asyncio.Event | None = None  # set: probe it now
        self.idle_waiter: asyncio.Future | None = None  # done when in_flight reaches 0
        self.in_flight = 0
        self.total = 0  # requests ever sent
        self.pending_tokens = 0  # prompt tokens sent whose first output token has not come
        self.sent_tokens = 0  # those of them that belong to streams, and were sent
        self.load: Load | None = None
        self.foreign_requests = 0  # requests of other gateways, by its last load report
        self.foreign_tokens = 0
        self.shares: dict[int, Share] = {}  # of the other gateway processes, by their number
        self.sibling_requests = self.sibling_tokens = self.sibling_sent_tokens = 0  # their sums
        self.on_load: Callable[[Worker], None] | None = None  # our share has changed
        self.kv: KvImage | None = None  # exact knowledge of its cache, when it publishes it
        self.capacity_tokens: int | None = None
        self.page_size: int | None = None
        self.dp_size = 1
        self.instance_id: str | None = None
        self.info: dict[str, Any] = {}
        self.resumes = False  # it can go on with another worker's stream
        self.takes_ids = False  # prompts may be sent as token ids
        self.failed_path: bytes | None = None  # route of the failure that opened the breaker
        self.failed_model: str | None = None
        self.failed_stream = False
        self.path_prefix = pool.address.path.encode()
        self.respec(spec)

    def respec(self, spec: WorkerSpec) -> None:
        """Take new labels, priority, cost or key; the URL stays."""
        assert spec.url == self.spec.url, (spec.url, self.spec.url)
        head = f"host: {self.pool.address.authority}\r\n"
        if spec.api_key:
            head += f"authorization: Bearer {spec.api_key}\r\n"
        self.request_head = head.encode("ascii")  # before anything changes: it raises for what is no header
        self.spec = spec

    def auth_headers(self) -> tuple[tuple[str, str], ...]:
        """For the gateway's own requests to the worker."""
        return (("authorization", f"Bearer {self.spec.api_key}"),) if self.spec.api_key else ()

    async def wait_idle(self) -> None:
        """Until no request of ours runs on it."""
        while self.in_flight:
            self.idle_waiter = asyncio.get_running_loop().create_future()
            await self.idle_waiter

    @property
    def requests(self) -> int:
        """In-flight requests, those of other processes and gateways included."""
        return self.in_flight + self.sibling_requests + self.foreign_requests

    def serves(self, model: str) -> bool:
        """Whether `model` names what it serves: as it lists it, or by the path that was loaded."""
        if model in self.models:
            return True
        return bool(self.models) and not self.spec.model_id and self.info.get("model_path") == model

    @property
    def healthy(self) -> bool:
        return self.status == "ready" and self.breaker.closed

    def report(self, load: Load) -> None:
        """Take a load report: what exceeds our own share is the work of other gateways."""
        self.load = load
        ours = self.in_flight + self.sibling_requests
        self.foreign_requests = max(0, load.running + load.waiting - ours)
        self.foreign_tokens = max(0, load.queued_tokens - self.pending_tokens - self.sibling_tokens)

    def doubt(self, now_s: float) -> None:
        """An old report says nothing of what other gateways have here now."""
        if self.load is not None and now_s - self.load.at_s > REPORT_HOLDS_S:
            self.foreign_requests = self.foreign_tokens = 0

    def share(self) -> Share:
        return Share(self.in_flight, self.pending_tokens, self.sent_tokens, self.total, self.breaker.state)

    def set_share(self, index: int, share: Share | None) -> None:
        """Take what process `index` has here; None: it is gone."""
        if share is None:
            self.shares.pop(index, None)
        else:
            self.shares[index] = share
        shares = self.shares.values()
        self.sibling_requests = sum(s.in_flight for s in shares)
        self.sibling_tokens = sum(s.pending_tokens for s in shares)
        self.sibling_sent_tokens = sum(s.sent_tokens for s in shares)

    def describe(self) -> dict[str, Any]:
        """The public view in `GET /workers`."""
        return {
            "id": self.id,
            "url": self.url,
            "model_id": self.models[0] if self.models else "unknown",
            "models": list(self.models),
            "worker_type": self.spec.worker_type,
            "connection_mode": "http",
            "runtime_type": self.spec.runtime or self.info.get("runtime", "unknown"),
            "labels": self.spec.labels,
            "priority": self.spec.priority,
            "cost": self.spec.cost,
            "status": self.status,
            "is_healthy": self.healthy and not any(s.breaker != "closed" for s in self.shares.values()),
            "circuit_breaker": max(
                (self.breaker.state, *(s.breaker for s in self.shares.values())),
                key=("closed", "half_open", "open").index,
            ),
            "load": self.in_flight + self.sibling_requests,
            "requests_total": self.total + sum(s.total for s in self.shares.values()),
            "pending_tokens": self.pending_tokens + self.sibling_tokens,
            "dp_rank": self.dp_rank,
            "instance_id": self.instance_id,
            "capacity_tokens": self.capacity_tokens,
            "source": self.source,
        }


class Registry:
    """All workers by id, and cached answers to "who may serve this model now"."""

    def __init__(self, make_worker: Callable[[WorkerSpec, int | None], Worker]) -> None:
        self.make_worker = make_worker
        self.workers: dict[str, Worker] = {}
        self.by_url: dict[str, Worker] = {}
        self.on_removed: list[Callable[[Worker], None]] = []
        self.on_changed: list[Callable[[], None]] = []
        self.version = 0  # grows with every change of who may be chosen
        self._usable: dict[str | None, tuple[Worker, ...]] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self.workers.values()))

    def __len__(self) -> int:
        return len(self.workers)

    def of_process(self, url: str) -> list[Worker]:
        """Every rank registered under one process's URL."""
        return [w for w in self if w.spec.url == url]

    def named(self, target: str) -> Worker | None:
        """The worker with this id, this URL, or this index in the order of registration."""
        worker = self.workers.get(target) or self.by_url.get(target)
        if worker is None and target.isdecimal() and len(target) < 10:  # more digits may be too many to read
            worker = next(islice(self.workers.values(), int(target), None), None)
        return worker

    def add(self, worker: Worker) -> None:
        assert worker.url not in self.by_url, worker.url
        self.workers[worker.id] = worker
        self.by_url[worker.url] = worker
        self.changed()

    def remove(self, worker: Worker) -> None:
        """Forget a worker and drop its connections. Removing twice is harmless."""
        if self.workers.pop(worker.id, None) is None:
            return
        if self.by_url.get(worker.url) is worker:
            del self.by_url[worker.url]
        worker.pool.close()
        self.changed()
        for listener in self.on_removed:
            listener(worker)

    def set_status(self, worker: Worker, status: Status) -> None:
        if worker.status != status:
            worker.status = status
            self.changed()

    def changed(self) -> None:
        """Call after anything that `usable` depends on."""
        self.version += 1
        self._usable.clear()
        for listener in self.on_changed:
            listener()

    def pause(self, worker: Worker, loop: asyncio.AbstractEventLoop, pause_s: float) -> None:
        """Choose `worker` for nothing else during the next `pause_s`; a longer pause already set stays."""
        until_s = loop.time() + pause_s
        if until_s <= worker.avoid_until_s:
            return
        worker.avoid_until_s = until_s
        self.changed()

        def resume() -> None:
            if worker.avoid_until_s == until_s:
                worker.avoid_until_s = 0.0
                self.changed()

        loop.call_at(until_s, resume)

    def usable(self, model: str | None) -> tuple[Worker, ...]:
        """Workers that are ready, closed, not asking for a pause, and serve `model` (None: any).

        A worker whose models are unknown serves every model. `name:adapter` is served by `name`.
        """
        found = self._usable.get(model)
        if found is None:
            found = tuple(w for w in self.serving(model) if w.healthy and not w.avoid_until_s)
            if len(self._usable) > 256:  # model names come from clients
                self._usable.clear()
            self._usable[model] = found
        return found

    def serving(self, model: str | None) -> list[Worker]:
        """Every worker that serves `model`, whatever its state."""
        if model is None:
            return list(self.workers.values())
        known = [w for w in self.workers.values() if w.serves(model)]
        if not known and model in ANY_MODEL:
            return list(self.workers.values())
        if not known and ":" in model:
            base = model.partition(":")[0]
            known = [w for w in self.workers.values() if w.serves(base)]
        return known + [w for w in self.workers.values() if not w.models]

    def probe_candidate(self, workers: Iterable[Worker]) -> tuple[Worker, Admission] | None:
        """A ready worker whose breaker admits its one probe now."""
        for worker in workers:
            if worker.status == "ready" and not worker.breaker.closed:
                admission = worker.breaker.admit()
                if admission == PROBE:
                    return worker, admission
        return None


def uuid7() -> str:
    """A time-ordered UUID (RFC 9562, version 7)."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | secrets.randbits(80)
    value = value & ~(0xF << 76) | (7 << 76)
    value = value & ~(0x3 << 62) | (2 << 62)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def breaker_numbers(registry: Registry) -> dict[tuple[str, ...], float]:
    """Breaker state by worker URL: 0 closed, 1 open, 2 half open."""
    return {(w.url,): STATE_NUMBER[w.breaker.state] for w in registry}
