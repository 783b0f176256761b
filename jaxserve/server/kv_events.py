"""GET /kv_events: which pages are cached where, as it changes (PROTOCOL.md, section 3).

`KvFeed` keeps the last events for replay and an image of every rank's pages for snapshots; it asks
the engine to report only once somebody reads. A reader that falls behind is disconnected.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.messages import CacheEvent, EngineClient
from jaxserve.server.errors import RequestError
from jaxserve.server.schema import show
from jaxserve.server.stream import SSE_HEADERS, ClientGone, encode_json, unless_gone

BUFFER_EVENTS = 16384  # the protocol asks for 10,000 at least
HEARTBEAT_S = 4.0  # the protocol asks for a sign of life every 5
SLOW_S = 10.0  # for so long a reader may take nothing
CHAIN_PAGES = 2048  # of one snapshot event
BATCH_BYTES = 1 << 16  # written at once
HASH_BYTES = 8


class KvFeed:
    """Events in, readers out; owned by the event loop."""

    def __init__(self, client: EngineClient, buffer_events: int = BUFFER_EVENTS):
        self.closed = False
        self._client = client
        self._buffer: deque[CacheEvent] = deque(maxlen=buffer_events)
        self._next = 1  # sequence number of the next event
        # Page -> the page above it, parents first, since they are stored first and removed last.
        self._held: list[dict[bytes, bytes | None]] = [{} for _ in range(client.info.dp_size)]
        self._changed = asyncio.Event()
        self._watching: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Have the engine report, if it does not yet. Raises EngineDeadError."""
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._client.watch_cache(self.take))
        await asyncio.shield(self._watching)

    def take(self, events: list[CacheEvent]) -> None:
        """The next events, in order."""
        for event in events:
            held, pages = self._held[event.rank], _split(event.pages)
            if event.kind == "stored":
                above = _hash_bytes(event.parent)
                for page in pages:
                    held[page] = above
                    above = page
            elif event.kind == "removed":
                for page in pages:
                    del held[page]
            else:
                held.clear()
        self._buffer.extend(events)
        self._next += len(events)
        self._wake()

    def close(self) -> None:
        """End every reader's stream."""
        self.closed = True
        self._wake()

    async def read(self, start: int | None, instance: str | None) -> AsyncGenerator[bytes]:
        """The stream for a reader whose next event is `start` of `instance`; ends when it is too slow."""
        info = self._client.info
        hello = {"instance": info.instance_id, "page_size": info.page_size, "dp_size": info.dp_size}
        yield _sse("hello", {**hello, "next": self._next})
        at = self._next
        if start is not None and instance == info.instance_id and self._oldest <= start <= self._next:
            at = start
        else:
            held = [list(pages.items()) for pages in self._held]  # as of now, however long it takes
            for part in self._snapshot(at - 1, held):
                yield part
        while not self.closed:
            changed = self._changed
            if at < self._oldest:
                return
            if at < self._next:
                part = bytearray()
                while at < self._next and len(part) < BATCH_BYTES:
                    part += self._encoded(at)
                    at += 1
                yield bytes(part)
                continue
            try:
                await asyncio.wait_for(changed.wait(), HEARTBEAT_S)
            except TimeoutError:
                yield b":\n\n"

    @property
    def _oldest(self) -> int:
        """Sequence number of the first event that can be replayed."""
        return self._next - len(self._buffer)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _encoded(self, seq: int) -> bytes:
        event = self._buffer[seq - self._oldest]
        data: dict[str, Any] = {"seq": seq, "rank": event.rank}
        if event.kind == "stored":
            data["parent"] = _hex(_hash_bytes(event.parent))
        if event.kind != "cleared":
            data["pages"] = _split(event.pages.hex(), 2 * HASH_BYTES)
        return _sse(event.kind, data)

    def _snapshot(self, seq: int, held: list[list[tuple[bytes, bytes | None]]]) -> Iterator[bytes]:
        chains = [(rank, *chain) for rank, pages in enumerate(held) for chain in _chains(pages)]
        for i, (rank, parent, pages) in enumerate(chains or [(0, None, [])]):
            data = {"seq": seq, "rank": rank, "parent": _hex(parent), "pages": pages}
            yield _sse("snapshot", {**data, "last": i >= len(chains) - 1})


async def kv_events(request: Request) -> Response:
    """GET /kv_events?from=SEQ&instance=ID."""
    query = request.query_params
    start = query.get("from")
    if start is not None and not (start.isascii() and start.isdigit() and len(start) < 20):
        raise RequestError(f"from must be a sequence number, got {show(start)}", param="from")
    feed: KvFeed = request.app.state.kv_feed
    await feed.start()
    return _FeedResponse(feed.read(None if start is None else int(start), query.get("instance")))


class _FeedResponse(Response):
    """Sends a feed's stream until it ends, the reader leaves, or takes nothing for SLOW_S."""

    def __init__(self, parts: AsyncGenerator[bytes]):
        self.parts = parts
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone, TimeoutError):
            await unless_gone(Request(scope, receive), self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        async with contextlib.aclosing(self.parts) as parts:
            async for part in parts:
                async with asyncio.timeout(SLOW_S):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        async with asyncio.timeout(1):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _sse(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json(data))


def _chains(pages: list[tuple[bytes, bytes | None]]) -> Iterator[tuple[bytes | None, list[str]]]:
    """(page above, hashes): consecutive pages that continue each other, in parts."""
    above: bytes | None = None
    last: bytes | None = None
    chain: list[str] = []
    for page, parent in pages:
        if chain and (parent != last or len(chain) == CHAIN_PAGES):
            yield above, chain
            chain = []
        if not chain:
            above = parent
        chain.append(page.hex())
        last = page
    if chain:
        yield above, chain


def _split[T: (bytes, str)](packed: T, size: int = HASH_BYTES) -> list[T]:
    return [packed[at : at + size] for at in range(0, len(packed), size)]


def _hash_bytes(value: int | None) -> bytes | None:
    return None if value is None else value.to_bytes(HASH_BYTES, "big")


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()
