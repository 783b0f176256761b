"""A closed-loop HTTP/1.1 load generator on asyncio Protocols, for JSON and event streams.

Bounded by construction: every entry point takes a request count and a deadline.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httptools


@dataclass(slots=True)
class Result:
    """One request. Times are `time.perf_counter` seconds; `status` 0: no answer came."""

    status: int = 0
    started_s: float = 0.0
    first_s: float = 0.0  # first body byte
    ended_s: float = 0.0
    events: int = 0
    body: bytes = b""
    error: str = ""
    broken: bool = False  # the stream ended with an error event or without its end

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error and not self.broken

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.started_s


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.done: asyncio.Future | None = None
        self.closed = False
        self.transport: asyncio.Transport = None  # type: ignore[assignment]

    def connection_made(self, transport) -> None:  # type: ignore[override]
        self.transport = transport  # type: ignore[assignment]

    def start(self, raw: bytes) -> asyncio.Future:
        self.parser = httptools.HttpResponseParser(self)
        self.parts: list[bytes] = []
        self.stream = False
        self.first_s = 0.0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(raw)
        return self.done

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._end("connection closed")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type" and value.startswith(b"text/event-stream"):
            self.stream = True

    def on_body(self, body: bytes) -> None:
        if not self.parts:
            self.first_s = time.perf_counter()
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self._end("")

    def _end(self, error: str) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(error)


class Client:
    """One connection that is made again when it is gone."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection: _Connection | None = None

    async def ask(self, raw: bytes, timeout_s: float = 30.0) -> Result:
        result = Result(started_s=time.perf_counter())
        try:
            async with asyncio.timeout(timeout_s):
                connection = self.connection
                if connection is None or connection.closed:
                    loop = asyncio.get_running_loop()
                    _, connection = await loop.create_connection(_Connection, "127.0.0.1", self.port)
                    self.connection = connection
                result.error = await connection.start(raw)
                result.status = connection.parser.get_status_code() or 0
                result.first_s = connection.first_s
                result.body = b"".join(connection.parts)
                if connection.stream:
                    result.events = result.body.count(b"\n\n")
                    end = result.body[-16:]
                    result.broken = b"[DONE]" not in end or b'data: {"error"' in result.body
        except (OSError, TimeoutError) as error:
            result.error = type(error).__name__
            self.close()
        result.ended_s = time.perf_counter()
        return result

    def close(self) -> None:
        if self.connection is not None:
            self.connection.transport.abort()
            self.connection = None


def request(path: str, value: Any = None, method: str = "POST") -> bytes:
    """The bytes of one request."""
    body = b"" if value is None else json.dumps(value).encode()
    return (
        f"{method} {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def control(port: int, path: str, value: Any = None, method: str = "POST") -> Any:
    """One control request; the decoded JSON, or the text. Raises OSError when there is no answer."""
    client = Client(port)
    try:
        result = await client.ask(request(path, value, method), 10)
    finally:
        client.close()
    if not result.status:
        raise OSError(result.error)
    try:
        return json.loads(result.body)
    except ValueError:
        return result.body.decode("utf-8", "replace")


async def closed_loop(
    port: int,
    make: Callable[[int], bytes],
    count: int,
    concurrency: int,
    *,
    duration_s: float = 60.0,
    at: tuple[float, Callable[[], Awaitable[None]]] | None = None,
) -> list[Result]:
    """`count` requests, `concurrency` at a time, for at most `duration_s`. `at`: what to do when."""
    results: list[Result] = []
    numbers = iter(range(count))
    stop_s = time.perf_counter() + duration_s

    async def slot() -> None:
        client = Client(port)
        for i in numbers:
            if time.perf_counter() > stop_s:
                break
            results.append(await client.ask(make(i)))
            if results[-1].error:
                await asyncio.sleep(0.002)
        client.close()

    async def act() -> None:
        if at is not None:
            await asyncio.sleep(at[0])
            await at[1]()

    await asyncio.gather(act(), *(slot() for _ in range(concurrency)))
    return results


def percentile(values: list[float], share: float) -> float:
    """By linear interpolation; nan of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    at = (len(ordered) - 1) * share
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
