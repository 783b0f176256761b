"""What each worker's cache holds, exactly, from its own events (PROTOCOL.md, section 3).

`KvImage` is the knowledge about one worker; `Subscription` keeps it in step over one long HTTP answer.
Out of step (a gap, a break, nonsense) the image says nothing until a replay or snapshot mends it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from router.upstream import UpstreamError
from router.workers import Worker

log = logging.getLogger("router")

FEATURE = "kv_events/1"
SILENCE_S = 15.0
RECONNECT_S = (0.1, 5.0)  # first and longest pause
MAX_EVENT_BYTES = 64 << 20
MAX_PAGE_SIZE = 65536


class OutOfStep(Exception):
    """The events do not follow from what is known: a gap in sequence, or not to be understood."""


class KvImage:
    """Pages held by each rank of one worker. `live`: in step, to be believed."""

    def __init__(self) -> None:
        self.live = False
        self.instance = ""
        self.page_size = 0
        self.next_seq = 0  # the sequence number that must come next
        self.ranks: dict[int, set[int]] = {}
        self._until = 0  # replayed up to here it is in step
        self._snapshot: dict[int, set[int]] | None = None  # being received

    def hit_pages(self, hashes: list[int], rank: int | None) -> int:
        """How many leading pages are held: by `rank`, or (None) by whichever rank holds most.

        What is held of a sequence is a prefix of it (promise 2), so bisection finds the end.
        """
        if rank is None:
            return max((_held(pages, hashes) for pages in self.ranks.values()), default=0)
        return _held(self.ranks.get(rank, set()), hashes)

    def num_pages(self) -> int:
        return sum(len(pages) for pages in self.ranks.values())

    def apply(self, kind: str, data: Any) -> None:
        """One event. Raises OutOfStep; the image is then not live."""
        try:
            self._apply(kind, data)
        except OutOfStep:
            self.live = False
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.live = False
            raise OutOfStep(f"{kind} event is not understood: {error!r}") from error

    def _apply(self, kind: str, data: Any) -> None:
        if kind == "hello":
            self._snapshot = None
            self._until = int(data["next"])
            self.page_size = int(data["page_size"])
            if not 0 < self.page_size <= MAX_PAGE_SIZE:
                raise ValueError(f"page_size {self.page_size}")
            if data["instance"] != self.instance:
                self.instance = str(data["instance"])
                self.ranks = {}
                self.next_seq = 0  # only a snapshot can help
            self.live = self.next_seq > 0 and self.next_seq == self._until  # nothing happened meanwhile
            return
        seq = int(data["seq"])
        if kind == "snapshot":
            if self._snapshot is None:
                self._snapshot = {}
                self.live = False
            self._snapshot.setdefault(int(data["rank"]), set()).update(_numbers(data["pages"]))
            if data["last"]:
                self.ranks, self._snapshot = self._snapshot, None
                self.next_seq = seq + 1
                self.live = True
            return
        if self._snapshot is not None or seq != self.next_seq:
            raise OutOfStep(f"expected event {self.next_seq}, got {seq}")
        pages = self.ranks.setdefault(int(data["rank"]), set())
        if kind == "stored":
            pages.update(_numbers(data["pages"]))
        elif kind == "removed":
            pages.difference_update(_numbers(data["pages"]))
        elif kind == "cleared":
            pages.clear()
        else:
            raise OutOfStep(f"unknown event {kind!r}")
        self.next_seq = seq + 1
        self.live = self.next_seq >= self._until


class Subscription:
    """A task that follows one worker process; its ranks share it. `on_failure(worker, reason)` is told of
    every end of its stream."""

    def __init__(
        self, worker: Worker, image: KvImage, on_failure: Callable[[Worker, str], None] | None = None
    ) -> None:
        self.worker = worker
        self.image = image
        self.on_failure = on_failure or (lambda worker, reason: None)
        self.events = 0
        self.last_event_s = 0.0  # loop time; comments count
        self.task: asyncio.Task | None = None

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        self.image.live = False
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    async def _follow(self) -> None:
        pause_s, longest_s = RECONNECT_S
        while True:
            before = self.events
            try:
                await self._once()
                reason = "closed"
            except OutOfStep as error:
                reason = "out_of_step"
                self.image.next_seq = 0
                log.warning("KV events of %s: %s; asking for a snapshot", self.worker.url, error)
            except UpstreamError as error:
                reason = error.kind
            except TimeoutError:
                reason = "silence"
            self.image.live = False
            self.on_failure(self.worker, reason)
            pause_s = RECONNECT_S[0] if self.events > before else min(pause_s * 2, longest_s)
            await asyncio.sleep(pause_s)

    async def _once(self) -> None:
        worker, image = self.worker, self.image
        address = worker.pool.address
        query = f"?from={image.next_seq}&instance={image.instance}" if image.next_seq else ""
        lines = [f"GET {address.path}/kv_events{query} HTTP/1.1", f"host: {address.authority}"]
        lines += [f"{name}: {value}" for name, value in worker.auth_headers()]
        head = "\r\n".join([*lines, "content-length: 0", "", ""]).encode("latin-1")
        connection = await worker.pool.connect()
        connection.endless = True
        try:
            connection.send(head, b"")
            async with asyncio.timeout(SILENCE_S):
                status = await connection.head()
            if status != 200:
                raise UpstreamError(f"/kv_events answered {status}", kind="status")
            loop = asyncio.get_running_loop()
            waiting = b""
            while True:
                async with asyncio.timeout(SILENCE_S):
                    data = await connection.read()
                if not data:
                    return
                self.last_event_s = loop.time()
                waiting += data
                if len(waiting) > MAX_EVENT_BYTES:
                    raise OutOfStep(f"an event of more than {MAX_EVENT_BYTES} bytes")
                *events, waiting = waiting.split(b"\n\n")
                for event in events:
                    self._take(event)
        finally:
            connection.release()

    def _take(self, event: bytes) -> None:
        kind, data = "", []
        for line in event.split(b"\n"):
            name, _, value = line.partition(b":")
            if name == b"event":
                kind = value.strip().decode("latin-1")
            elif name == b"data":
                data.append(value.strip())
        if not data:
            return  # a comment
        try:
            decoded = msgspec.json.decode(b"\n".join(data))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.image.live = False
            raise OutOfStep(f"{kind} event is not JSON: {error}") from error
        self.events += 1
        self.image.apply(kind, decoded)


def _held(pages: set[int], hashes: list[int]) -> int:
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if hashes[middle - 1] in pages:
            low = middle
        else:
            high = middle - 1
    return low


def _numbers(pages: Any) -> list[int]:
    return [int(page, 16) for page in pages]
