"""uvicorn with what the gateway needs of it: a short way for data requests, the client's departure as a
call, JSON errors, a drain.

Watching for a client's departure through ASGI `receive` costs a task a request (12 us); the protocol
knows it anyway.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.call import ROUTES
from router.errors import error_body
from router.headers import ClientHeaders
from router.known_head import KnownHead

if TYPE_CHECKING:
    from router.short_way import ShortWay

MAX_HEAD_BYTES = 1 << 19  # of a request that comes in pieces; more than is read at once
MAX_PIPELINED = 8  # requests that wait for the one before; while so many do, nothing is read
LAST_REQUEST_S = 2.0  # at most, for the requests of clients that connected just before the port closed
LAST_WORDS_S = 1  # for clients to take the end of what the gateway cut off, out of grace
STALLED_S = 60.0  # for so long a client may take nothing of its answer; half of what a worker allows
DATA_TARGETS = {path.encode(): path for path in ROUTES}


class Head(msgspec.Struct):
    """What the head of a data request says. Later requests of the connection may share it (`KnownHead`)."""

    method: str
    path: str
    target: bytes  # path and query
    headers: list[tuple[bytes, bytes]]  # names in lower case
    client: ClientHeaders | None = None  # what the proxy read of them; `content_length` is the first one's


class Request(RequestResponseCycle):
    """A data request on its connection, in the scope as "router.request". Others may have come behind it.

    uvicorn's cycle of request and answer: what few requests change is kept in the class, and the scope is
    made when it is asked for.
    """

    logger = logging.getLogger("uvicorn.error")
    access_log = disconnected = waiting_for_100_continue = response_started = response_complete = False
    keep_alive = more_body = True
    chunked_encoding = None
    expected_content_length = 0
    default_headers: ClassVar[list[tuple[bytes, bytes]]] = []
    body: bytes | bytearray  # type: ignore[assignment]  # bytes when it came at once
    length: int | None = None  # of the body, when the head was recognised: it has another one's
    begun: "ShortWay | None" = None  # what was done for it before the application was asked

    def __init__(self, connection: "ClientConnection", head: Head) -> None:
        self.connection = connection
        self.head = head
        self.transport = connection.transport
        self.flow = connection.flow
        self.on_response = connection.on_response_complete

    @cached_property
    def message_event(self) -> asyncio.Event:  # type: ignore[override]
        event = asyncio.Event()  # for `receive`
        if not self.more_body:
            event.set()
        return event

    @cached_property
    def scope(self) -> Any:  # type: ignore[override]
        head, headers = self.head, self.head.headers
        path, _, query = head.target.partition(b"?")
        if self.length is not None:
            length = b"%d" % self.length
            headers = [(n, length if n == b"content-length" else value) for n, value in headers]
        return {
            "type": "http", "method": head.method, "path": head.path, "raw_path": path,
            "query_string": query, "headers": headers, "router.request": self,
        }  # fmt: skip

    def whole_body(self) -> bytes | None:
        """The body if all of it has come, once; None: ask `receive`."""
        if self.more_body or self.disconnected:
            return None
        self.flow.resume_reading()
        body, self.body = self.body, b""
        return bytes(body)

    def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write a whole answer at once; False when this is not possible and `send` must be used.

        uvloop writes at once what it is given, so head and body through `send` are two system calls
        (7 us). `headers` come parsed from a worker, content-length among them and right.
        """
        if self.response_started or self.flow.write_paused or self.disconnected:
            return False
        parts = [STATUS_LINE[status]]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n", body)
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join(parts))
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True

    def cut(self) -> None:
        """Break the connection off: the answer cannot be finished."""
        self.disconnected = True
        self.transport.abort()

    def ask_application(self) -> None:
        self.connection._start_asgi_task(self, self.connection.app)  # type: ignore[arg-type]

    def fail(self, error: Exception) -> None:
        """Our bug: have it logged, and the client told, as the application's."""

        async def raise_error(scope, receive, send) -> None:
            raise error

        self.connection._start_asgi_task(self, raise_error)


class ClientConnection(HttpToolsProtocol):
    """`on_lost` is called once when the client leaves.

    A data request whose body is there is first offered to the application's `short_way`, if it has one.
    """

    on_lost: Callable[[], Any] | None = None
    lost = False
    head_timer: asyncio.TimerHandle | None = None  # runs while a request's head is on its way
    stall_timer: asyncio.TimerHandle | None = None  # runs while the client takes less than it is sent
    idle_since_s: float | None = None  # loop time; None while a request runs or since bytes have come
    in_head = in_message = upgrade = False
    head_bytes = 0  # of a head that did not come at once
    starting: Request | None = None  # once all that came has been parsed

    def on_message_begin(self) -> None:
        self.in_head = self.in_message = True
        self.upgrade = False
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head:  # a trailer: means nothing (RFC 9110, 6.5.1)
            return
        name = name.lower()
        self.headers.append((name, value))
        if name == b"upgrade":
            self.upgrade = True
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():  # type: ignore[union-attr]
            return  # the body comes: `_ignore_upgrade`
        self.in_message = False
        super().on_message_complete()

    def connection_made(self, transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.short_way = getattr(self.app, "short_way", None)
        self.known = KnownHead()
        self.in_head = True
        self._time_head()

    def data_received(self, data: bytes) -> None:
        self.idle_since_s = None
        between = not self.in_message and (self.cycle is None or self.cycle.response_complete)
        body = self.known.body_of(data) if between else None
        if body is not None:
            request = self.starting = self.cycle = Request(self, self.known.meaning)
            request.body, request.length = body, len(body)
            request.more_body = False
            request.keep_alive = not self.server_state.draining  # type: ignore[attr-defined]
        else:
            self._parse(data, between)
        request, self.starting = self.starting, None
        if request is not None:
            try:
                if request.more_body or self.short_way is None or not self.short_way(request):
                    request.ask_application()
            except Exception as error:
                request.fail(error)

    def _parse(self, data: bytes, between: bool) -> None:
        in_head = self.in_head
        try:
            try:
                self.parser.feed_data(data)  # type: ignore[union-attr]  # None only after the connection's end
            except httptools.HttpParserUpgrade as end:
                self._ignore_upgrade(data[end.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        # A head nearly always comes in one piece: only one that does not is worth a timer.
        if self.in_head and not self.transport.is_closing():
            if in_head:
                self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD_BYTES:
                limit = f"the request's head exceeds {MAX_HEAD_BYTES} bytes"
                self._refuse_head(b"431 Request Header Fields Too Large", limit, "header_too_large")
            elif self.head_timer is None:
                self._time_head()
        request = self.starting
        if between and request is not None and request.keep_alive and not request.waiting_for_100_continue:
            self.known.keep(data, request.head)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer in HTTP/1.1 who offers another protocol (RFC 9110, 7.8), as Java's client does with h2c.

        The parser takes what follows such a head for the other protocol. Another one reads it as the body.
        """
        self.cycle.keep_alive = False
        self.parser = httptools.HttpRequestParser(
            SimpleNamespace(on_body=self.on_body, on_message_complete=self.on_message_complete)
        )
        framing = (b"content-length", b"transfer-encoding")
        lines = [b"%b: %b\r\n" % item for item in self.headers if item[0] in framing]
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(lines))
        self.parser.feed_data(rest)

    def on_headers_complete(self) -> None:
        self.in_head = False
        self.head_bytes = 0
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
        path, _, query = self.url.partition(b"?")
        data_path = DATA_TARGETS.get(path)
        if data_path is not None and not self.upgrade and b"#" not in query:
            self._begin_data_request(data_path)
        else:
            url, headers, expect = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expect
            self.scope["headers"] = self.headers = headers
            super().on_headers_complete()
        if self.server_state.draining:  # type: ignore[attr-defined]
            self.cycle.keep_alive = (
                False  # its next request goes elsewhere, and not into a closing connection
            )

    def _begin_data_request(self, path: str) -> None:
        """What uvicorn does when a head is complete."""
        parser, before = self.parser, self.cycle
        assert parser is not None
        head = Head(parser.get_method().decode(), path, self.url, self.headers)
        request = self.cycle = Request(self, head)
        request.body = bytearray()
        request.waiting_for_100_continue = self.expect_100_continue
        request.keep_alive = parser.should_keep_alive() and parser.get_http_version() != "1.0"
        if before is None or before.response_complete:
            self.starting = request
        else:
            self.pipeline.appendleft((request, self.app))  # type: ignore[arg-type]
            if len(self.pipeline) >= MAX_PIPELINED:  # else go on: a client that leaves is to be noticed
                self.flow.pause_reading()

    def _time_head(self) -> None:
        timeout_s = self.config.client_header_timeout_s  # type: ignore[attr-defined]
        self.head_timer = self.loop.call_later(timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self.head_timer = None
        if self.in_head and not self.transport.is_closing():
            self._refuse_head(b"408 Request Timeout", "the request's head took too long", "header_timeout")

    def _refuse_head(self, status: bytes, message: str, code: str) -> None:
        cycle = self.cycle
        if cycle is None or cycle.response_complete:  # else the answer before is still going out
            self._write_error(status, message, code)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        for timer in (self.head_timer, self.stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self.on_lost is not None:
            self.on_lost()

    # A client that takes nothing keeps its place at a worker, and after a while the worker cuts its stream,
    # which must not begin again elsewhere.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_for_stall(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall_timer is not None:
            self.stall_timer.cancel()

    def _look_for_stall(self, waiting_bytes: int) -> None:
        now_waiting_bytes = self.transport.get_write_buffer_size()
        if now_waiting_bytes < waiting_bytes:
            self.stall_timer = self.loop.call_later(STALLED_S, self._look_for_stall, now_waiting_bytes)
        else:
            self.transport.abort()

    # One keep-alive timer a connection that looks how long it has been idle, instead of one armed and
    # cancelled for every request (1.5 us).

    def _unset_keepalive_if_required(self) -> None:
        self.idle_since_s = None

    def on_response_complete(self) -> None:
        if self.pipeline:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self.idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_later(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # the running request's end sets a new one
        now_s = self.loop.time()
        if self.idle_since_s is None:  # no request has come of what came: it may be a body that was refused
            self.idle_since_s = now_s
        left_s = self.idle_since_s + self.timeout_keep_alive - now_s
        if left_s > 0:
            self._look_later(left_s)
        elif not self.transport.is_closing():
            self.transport.close()

    def _look_later(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            self._write_error(b"400 Bad Request", msg, "bad_request")
        self.transport.close()

    def _write_error(self, status: bytes, message: str, code: str) -> None:
        body = error_body(message, "invalid_request_error", code)
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % (status, len(body)) + body
        )


class GatewayServer(uvicorn.Server):
    """On SIGTERM it goes on serving while `gateway.draining`, and ends when idle or out of grace.

    What still runs when the grace period is over is ended by the gateway, which tells the clients.
    SIGINT closes the port at once and lets running requests end. A second signal ends everything.
    """

    def __init__(self, config: uvicorn.Config, gateway, grace_s: float) -> None:
        super().__init__(config)
        self.gateway = gateway
        self.grace_s = grace_s
        gateway.num_connections = lambda: len(self.server_state.connections)
        self.server_state.draining = False  # type: ignore[attr-defined]  # its connections look at it
        self._drain: asyncio.Task | None = None
        self._deadline_s: float | None = None  # loop time at which the grace period ends

    def handle_exit(self, sig: int, frame) -> None:
        if self.gateway.draining or self.should_exit:
            self.should_exit = self.force_exit = True
            return
        if sig == signal.SIGINT:
            self.should_exit = True
            return
        self.gateway.draining = True
        loop = self.gateway.loop
        if loop is None:
            self.should_exit = True
        else:
            loop.call_soon_threadsafe(self._start_drain)

    def stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections, but answer those who have connected already and not asked yet.

        Closing at once would reset what waits to be accepted, and clients that connect for one request.
        """
        loop = asyncio.get_running_loop()
        deadline_s = self._deadline_s if self._deadline_s is not None else loop.time() + self.grace_s
        if not self.force_exit:
            for server in self.servers:
                await self._accept_last(server)
            await self._await_first_requests(deadline_s)
        left_s = max(0.0, deadline_s - loop.time())
        self.config.timeout_graceful_shutdown = math.ceil(left_s) + LAST_WORDS_S
        cut_off = loop.call_later(left_s, self.gateway.cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            cut_off.cancel()
        if self.force_exit:
            await self._abandon()

    async def _abandon(self) -> None:
        """End what a second signal has left as its clients' departure would, and the lifespan.

        Whatever the loop's own end cancels is logged as a failure.
        """
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=LAST_WORDS_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self.lifespan.shutdown()

    async def _accept_last(self, server: asyncio.Server) -> None:
        loop, config = asyncio.get_running_loop(), self.config

        def protocol() -> asyncio.Protocol:
            return ClientConnection(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )

        # Duplicates listen on until they are closed too.
        listeners = [socket.socket(fileno=os.dup(s.fileno())) for s in server.sockets]
        server.close()
        waiting = []
        for listener in listeners:
            listener.setblocking(False)
            with listener, contextlib.suppress(OSError):  # BlockingIOError: no more
                while True:
                    waiting.append(listener.accept()[0])
        for client in waiting:
            client.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(protocol, client, ssl=config.ssl)

    async def _await_first_requests(self, deadline_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = min(deadline_s, loop.time() + LAST_REQUEST_S)
        while loop.time() < deadline_s and not self.force_exit:
            if all(getattr(c, "cycle", None) is not None for c in self.server_state.connections):
                break
            await asyncio.sleep(0.01)

    def _start_drain(self) -> None:
        self.server_state.draining = True  # type: ignore[attr-defined]
        self._deadline_s = asyncio.get_running_loop().time() + self.grace_s
        self._drain = asyncio.ensure_future(self._wait_idle())

    async def _wait_idle(self) -> None:
        # One second at least: load balancers see /readiness fail before the port closes.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline_s):
                await asyncio.sleep(min(1.0, self.grace_s))
                await self.gateway.wait_idle()
        self.should_exit = True
