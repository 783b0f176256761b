"""Pooled HTTP/1.1 connections to one worker: asyncio Protocols parsed by httptools (llhttp).

Owns sockets, response parsing and read backpressure. Knows nothing of policies, retries or clients.
One `Connection` carries one exchange at a time:

    connection = pool.reuse() or await pool.connect()
    connection.send(head, body)
    await connection.head()                    # .status, .headers
    while data := await connection.read(): ...
    connection.release()                       # back to the pool, or closed if it cannot be reused
"""

import asyncio
import socket
import ssl
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

# A connection is not read while this many body bytes wait for the client. 256 KiB is a few thousand
# events, far more than a client that keeps up ever has outstanding.
HIGH_WATER_BYTES = 256 * 1024
# uvicorn closes a connection after 5 idle seconds; reusing it just then costs a failed attempt.
IDLE_LIMIT_S = 4.0
MAX_IDLE = 1024
# Of a worker's key. It goes into a header as it is: a line break in it would begin another header.
KEY_PATTERN = r"\A[!-~]*\Z"
MOVING_S = 2.0  # an answer of which nothing came for longer has stopped


AGES_S = (30, 60, 180, 300, 600, 1200, 3600)  # bounds of what `Pool.ages` counts


class UpstreamError(Exception):
    """The worker did not deliver a whole answer."""

    def __init__(self, reason: str, *, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind  # connect, closed, protocol, timeout, ejected, status


@dataclass(frozen=True)
class Address:
    """Where a worker listens, from its URL. Raises ValueError for anything but http(s)://host[:port]."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"worker URL {url!r} must be http://host[:port] or https://host[:port]")
        if parts.query or parts.fragment or parts.username:
            raise ValueError(f"worker URL {url!r} must have no query, fragment or user")
        if not url.isprintable() or " " in url or not parts.path.isascii():  # it goes into heads as it is
            raise ValueError(f"worker URL {url!r} must have no spaces or line breaks, and an ASCII path")
        try:
            host = parts.hostname.encode("idna").decode()  # as it is looked up
        except UnicodeError as error:
            raise ValueError(f"worker URL {url!r} must have a host name: {error}") from error
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, host, port, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Connection(asyncio.Protocol):
    """One connection to a worker. All methods run on the event loop's thread.

    `listener`, if there is one, is called instead of waking a waiter when something has come.
    """

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made
        self.parser = httptools.HttpResponseParser(self)
        self.waiter: asyncio.Future | None = None
        self.listener: Callable[[], None] | None = None
        self.paused = False
        self.closed = False
        self.busy = False
        self.idle_since = 0.0
        self.endless = False  # it may run for longer than a request
        self.sent_s = 0.0  # loop time of the running request
        self.since_s = 0.0  # when what it belongs to began, which earlier attempts may be part of
        self.last_byte_s = 0.0  # of its answer
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.reusable = False
        self.until_close = False
        self.headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []
        self.buffered_bytes = 0
        self.complete = False
        self.got_bytes = False
        self.error: UpstreamError | None = None

    # ---- one exchange ----

    def send(self, head: bytes, body: bytes | bytearray, since_s: float | None = None) -> None:
        """Write one request. `head` ends with an empty line and states the length of `body`.

        `since_s`: its age counts from then on, else from now."""
        self._begin()
        self.busy = True
        self.sent_s = self.pool.loop.time()
        self.since_s = self.sent_s if since_s is None else since_s
        if len(body) < 65536:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    async def head(self) -> int:
        """Wait for status and headers; returns the status. Raises UpstreamError."""
        while not self.status:
            if self.error is not None:
                raise self.error
            await self._news()
        return self.status

    async def read(self) -> bytes:
        """The body bytes that have come, at least one; b"" at the end. Raises UpstreamError on a break."""
        while True:
            parts = self.parts
            if parts:
                data = parts[0] if len(parts) == 1 else b"".join(parts)
                self.parts = []
                self.buffered_bytes = 0
                if self.paused:
                    self.paused = False
                    self.transport.resume_reading()
                return data
            if self.complete:
                return b""
            if self.error is not None:
                raise self.error
            await self._news()

    async def body(self) -> bytes:
        """The whole body. Raises UpstreamError when it does not come whole."""
        while not self.complete:
            if self.error is not None:
                raise self.error
            if self.paused:
                self.paused = False
                self.transport.resume_reading()
            await self._news()
        return self.take()

    def take(self) -> bytes:
        """The whole body, once `complete`."""
        parts, self.parts = self.parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def moving(self) -> bool:
        """Whether the answer has just been coming or asked for, or would come if the client took it."""
        return self.paused or self.pool.loop.time() - max(self.sent_s, self.last_byte_s) < MOVING_S

    def _news(self) -> asyncio.Future[None]:
        """Done when something has come: bytes, the end or an error."""
        waiter = self.waiter = self.pool.loop.create_future()
        return waiter

    def _wake(self) -> None:
        if self.listener is not None:
            self.listener()
            return
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: UpstreamError) -> None:
        """End the exchange: whoever waits gets `error`, and the connection is dropped at once."""
        if self.error is None and not self.complete:
            self.error = error
        self.closed = True
        self.transport.abort()
        self._wake()

    def release(self) -> None:
        """The exchange is over: keep the connection if the answer was read whole, else drop it at once."""
        if not self.busy:
            return
        self.busy = False
        self.listener = None
        self.pool.active.discard(self)
        if self.complete and not self.closed and self.reusable and len(self.pool.idle) < MAX_IDLE:
            self.idle_since = time.monotonic()
            self.pool.idle.append(self)
        else:
            self.closed = True
            self.transport.abort()

    # ---- asyncio.Protocol ----

    def connection_made(self, transport) -> None:  # type: ignore[override]
        self.transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if not self.busy:  # a worker that speaks without being asked
            self.closed = True
            self.transport.abort()
            return
        self.got_bytes = True
        self.last_byte_s = self.pool.last_byte_s = self.pool.loop.time()
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.fail(UpstreamError(f"the worker's answer is not HTTP: {error}", kind="protocol"))
            return
        if not self.status:
            self.buffered_bytes += len(data)
            if self.buffered_bytes > HIGH_WATER_BYTES:
                text = f"the head of the worker's answer exceeds {HIGH_WATER_BYTES} bytes"
                self.fail(UpstreamError(text, kind="protocol"))
                return
        if self.buffered_bytes > HIGH_WATER_BYTES and not self.paused and not self.complete:
            self.paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        return None  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if not self.busy:
            return
        if self.status and not self.complete and exc is None and self.until_close:
            self.complete = True
        elif not self.complete and self.error is None:
            self.error = UpstreamError(
                f"the worker closed the connection{f' ({exc})' if exc else ''}", kind="closed"
            )
        self._wake()

    # ---- httptools callbacks ----

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else a trailer
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status < 200:
            self.headers.clear()
            return
        if status > 599:
            raise ValueError(f"status {status}")
        self.reusable = self.parser.should_keep_alive()
        # Without a length or chunks the body ends with the connection.
        self.until_close = not self.reusable and not any(
            name == b"content-length" or name == b"transfer-encoding" for name, _ in self.headers
        )
        self.status = status
        self.buffered_bytes = 0  # of the body, from here on

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)
        self.buffered_bytes += len(body)

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True


class Pool:
    """The connections of one worker: `idle` (last in, first out) and `active`."""

    def __init__(
        self,
        address: Address,
        *,
        connect_timeout_s: float = 2.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address = address
        self.connect_timeout_s = connect_timeout_s
        self.tls = tls if tls is not None or address.scheme == "http" else ssl.create_default_context()
        self.idle: list[Connection] = []
        self.active: set[Connection] = set()
        self.last_byte_s = 0.0  # loop time of the last byte of any answer
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set on first use

    def reuse(self) -> Connection | None:
        """The connection that was used last, if it may still be open."""
        if not self.idle:
            return None
        oldest = time.monotonic() - IDLE_LIMIT_S
        while self.idle:
            connection = self.idle.pop()
            if connection.closed:
                continue
            if connection.idle_since < oldest:
                self.drop_idle()  # those below are older still
                connection.transport.abort()
                break
            self.active.add(connection)
            return connection
        return None

    async def connect(self) -> Connection:
        """A new connection. Raises UpstreamError of kind connect."""
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        address = self.address
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self),
                    address.host,
                    address.port,
                    ssl=self.tls,
                    server_hostname=address.host if self.tls else None,
                )
        except TimeoutError as error:
            text = f"no connection to {address.authority} within {self.connect_timeout_s:g} s"
            raise UpstreamError(text, kind="connect") from error
        except socket.gaierror as error:
            text = f"cannot connect to {address.authority}: its host does not resolve: {error.strerror}"
            raise UpstreamError(text, kind="connect") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: of a host name that cannot be looked up
            text = f"cannot connect to {address.authority}: {error}"
            raise UpstreamError(text, kind="connect") from error
        self.active.add(connection)
        return connection

    def fail_active(self, error: UpstreamError) -> None:
        """End every running exchange with `error`."""
        for connection in list(self.active):
            connection.fail(error)

    def fail_older(self, limit_s: float) -> None:
        """End the exchanges whose requests are older than `limit_s`."""
        horizon_s = self.loop.time() - limit_s if self.loop is not None else 0.0
        for connection in list(self.active):
            if connection.busy and not connection.endless and connection.since_s < horizon_s:
                connection.fail(UpstreamError(f"no end within {limit_s:g} s", kind="timeout"))

    def ages(self, counts: list[int]) -> None:
        """Add the running exchanges to `counts`, one for each interval between AGES_S."""
        for connection in self.active:
            if connection.busy and not connection.endless:
                counts[bisect_left(AGES_S, self.loop.time() - connection.sent_s)] += 1

    def drop_idle(self) -> None:
        for connection in self.idle:
            connection.closed = True
            connection.transport.abort()
        self.idle.clear()

    def close(self) -> None:
        """Drop everything: the worker is no longer registered."""
        self.drop_idle()
        self.fail_active(UpstreamError("the worker was removed", kind="ejected"))

    async def fetch(
        self,
        method: str,
        target: str,
        *,
        body: bytes = b"",
        headers: tuple[tuple[str, str], ...] = (),
        timeout_s: float = 5.0,
        max_bytes: int = 16 << 20,
    ) -> tuple[int, bytes]:
        """One control exchange, on a connection of its own choice: (status, body). Raises UpstreamError."""
        lines = [f"{method} {self.address.path}{target} HTTP/1.1", f"host: {self.address.authority}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body:
            lines.append("content-type: application/json")
        lines.append(f"content-length: {len(body)}\r\n\r\n")
        head = "\r\n".join(lines).encode("latin-1")
        try:
            async with asyncio.timeout(timeout_s):
                for attempt in (0, 1):
                    used = self.reuse() if attempt == 0 else None
                    connection = used or await self.connect()
                    try:
                        connection.send(head, body)
                        status = await connection.head()
                        parts, size = [], 0
                        while data := await connection.read():
                            size += len(data)
                            if size > max_bytes:
                                raise UpstreamError(
                                    f"{target} answered more than {max_bytes} bytes", kind="protocol"
                                )
                            parts.append(data)
                        return status, b"".join(parts)
                    except UpstreamError as error:
                        if used is None or error.kind != "closed":
                            raise
                    finally:
                        connection.release()
        except TimeoutError as error:
            raise UpstreamError(
                f"{method} {target}: no answer within {timeout_s:g} s", kind="timeout"
            ) from error
        raise AssertionError("unreachable")


def json_of(body: bytes) -> Any:
    """A worker's JSON, decoded; None when it is none, or holds what cannot be counted with or sent on."""
    try:
        value = msgspec.json.decode(body)
        msgspec.msgpack.encode(value)  # refuses integers beyond 64 bits; processes tell each other so
    except (ValueError, RecursionError, OverflowError):  # DecodeError is a ValueError
        return None
    return value
