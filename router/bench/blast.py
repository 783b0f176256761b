"""Requests a second, at little cost to the machine that is shared: one constant request, answers counted.

`load.closed_loop` looks into every answer and costs 60 us a request, more than a fast gateway does; this
costs 10 us. It knows JSON answers with a content-length alone.
"""

import asyncio
import time
from dataclasses import dataclass


@dataclass
class Blast:
    """What came back. `failed`: connections that broke or answers other than 200."""

    answered: int = 0
    failed: int = 0
    took_s: float = 0.0


class _Connection(asyncio.Protocol):
    def __init__(self, raw: bytes, blast: Blast, left: list[int], ended: asyncio.Future) -> None:
        self.raw, self.blast, self.left, self.ended = raw, blast, left, ended
        self.data = b""
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made

    def connection_made(self, transport) -> None:  # type: ignore[override]
        self.transport = transport  # type: ignore[assignment]
        self._next()

    def _next(self) -> None:
        if self.left[0] <= 0:
            self.transport.close()
            return
        self.left[0] -= 1
        self.transport.write(self.raw)

    def data_received(self, data: bytes) -> None:
        data = self.data + data if self.data else data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + _content_length(data[:end]):
            self.data = data
            return
        self.data = b""
        if data.startswith(b"HTTP/1.1 200"):
            self.blast.answered += 1
        else:
            self.blast.failed += 1
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self.blast.failed += self.left[0] > 0  # it broke: nothing was left to do otherwise
        if not self.ended.done():
            self.ended.set_result(None)


def _content_length(head: bytes) -> int:
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def blast(port: int, raw: bytes, count: int, concurrency: int) -> Blast:
    """Send `raw` `count` times over `concurrency` connections, each waiting for its answer."""
    loop = asyncio.get_running_loop()
    made, left = Blast(), [count]
    ends = [loop.create_future() for _ in range(concurrency)]
    started_s = time.perf_counter()
    for ended in ends:
        await loop.create_connection(
            lambda ended=ended: _Connection(raw, made, left, ended), "127.0.0.1", port
        )
    async with asyncio.timeout(120):
        await asyncio.gather(*ends)
    made.took_s = time.perf_counter() - started_s
    return made
