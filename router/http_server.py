"""uvicorn with what the gateway needs of it: a short way for data requests, the client's departure as a
call, JSON errors, a drain.

Watching for a client's departure through ASGI `receive` costs a task a request (12 us); the protocol
knows it anyway.
"""

import asyncio
import contextlib
import os
import signal
import socket
from typing import Any

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.call import ROUTES
from router.errors import error_body

LAST_REQUEST_S = 0.25  # for the request of a client that connected just before the port closed
DATA_TARGETS = {path.encode(): path for path in ROUTES}
UNUSUAL = frozenset((b"connection", b"expect", b"upgrade"))  # headers that uvicorn has to look at


class Running(msgspec.Struct):
    """The scope's "router.request": one request on its connection. Others may have come behind it."""

    connection: "ClientConnection"
    cycle: RequestResponseCycle

    def body(self) -> bytes | None:
        """The body if all of it has come, once; None: ask `receive`."""
        cycle = self.cycle
        if cycle.more_body or cycle.disconnected:
            return None
        self.connection.flow.resume_reading()
        body, cycle.body = cycle.body, bytearray()
        return bytes(body)

    def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write a whole answer at once; False when this is not possible and `send` must be used.

        uvloop writes at once what it is given, so head and body through `send` are two system calls
        (7 us). `headers` come parsed from a worker, content-length among them and right.
        """
        cycle = self.cycle
        if cycle.response_started or not cycle.keep_alive or cycle.flow.write_paused or cycle.disconnected:
            return False
        parts = [STATUS_LINE[status]]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", body)
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(b"".join(parts))
        cycle.message_event.set()
        cycle.on_response()
        return True

    def cut(self) -> None:
        """Break the connection off: the answer cannot be finished."""
        self.cycle.disconnected = True
        self.cycle.transport.abort()


class ClientConnection(HttpToolsProtocol):
    """`on_lost` is called once when the client leaves."""

    on_lost = None
    lost = False
    head_timer: asyncio.TimerHandle | None = None  # runs while a request's head is on its way
    idle_since_s: float | None = None  # loop time; None while a request runs
    in_head = plain = False

    def on_message_begin(self) -> None:
        self.in_head = True
        self.plain = True
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self.headers.append((name, value))
        if name in UNUSUAL:
            self.plain = False
            self.expect_100_continue |= name == b"expect" and value.lower() == b"100-continue"

    def connection_made(self, transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.in_head = True
        self._time_head()

    def data_received(self, data: bytes) -> None:
        self.idle_since_s = None
        try:
            self.parser.feed_data(data)  # type: ignore[union-attr]  # None only after the connection's end
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        # A head nearly always comes in one piece: only one that does not is worth a timer.
        if self.in_head and self.head_timer is None and not self.transport.is_closing():
            self._time_head()

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
        path, parser = DATA_TARGETS.get(self.url), self.parser
        assert parser is not None
        # Without a connection header, what is kept alive is HTTP/1.1.
        if path is not None and self.plain and parser.should_keep_alive():
            self._begin_data_request(path, parser.get_method().decode())
        else:
            url, headers, expect = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expect
            self.scope["headers"] = self.headers = headers
            super().on_headers_complete()
            self.cycle.scope["router.request"] = Running(self, self.cycle)  # type: ignore[typeddict-unknown-key]
        if self.server_state.draining:  # type: ignore[attr-defined]
            self.cycle.keep_alive = (
                False  # its next request goes elsewhere, and not into a closing connection
            )

    def _begin_data_request(self, path: str, method: str) -> None:
        """What uvicorn does when a head is complete, for the commonest of heads."""
        scope: Any = {
            "type": "http", "method": method, "path": path, "raw_path": self.url,
            "query_string": b"", "headers": self.headers,
        }  # fmt: skip
        before = self.cycle
        idle = before is None or before.response_complete
        if before is not None and idle:
            event = before.message_event  # nobody waits for it after the end
            event.clear()
        else:
            event = asyncio.Event()
        cycle = self.cycle = RequestResponseCycle(
            scope, self.transport, self.flow, self.logger, self.access_logger, self.access_log,
            self.server_state.default_headers, event, False, True, self.on_response_complete,
        )  # fmt: skip
        scope["router.request"] = Running(self, cycle)
        app: Any = self.app
        if idle:
            self._start_asgi_task(cycle, app)  # it runs once all that came has been parsed
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))

    def _time_head(self) -> None:
        timeout_s = self.config.client_header_timeout_s  # type: ignore[attr-defined]
        self.head_timer = self.loop.call_later(timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self.head_timer = None
        if not self.in_head or self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete:  # else the answer before is still going out
            body = error_body("the request's head took too long", "invalid_request_error", "header_timeout")
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n" % len(body) + body
            )
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.head_timer is not None:
            self.head_timer.cancel()
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self.on_lost is not None:
            self.on_lost()

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
        if self.idle_since_s is None:
            return  # the running request's end sets a new one
        left_s = self.idle_since_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._look_later(left_s)
        elif not self.transport.is_closing():
            self.transport.close()

    def _look_later(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        body = error_body(msg, "invalid_request_error", "bad_request")
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        self.transport.close()


class GatewayServer(uvicorn.Server):
    """On SIGTERM it goes on serving while `gateway.draining`, and ends when idle or out of grace.

    SIGINT closes the port at once and lets running requests end. A second signal ends everything.
    """

    def __init__(self, config: uvicorn.Config, gateway, grace_s: float) -> None:
        super().__init__(config)
        self.gateway = gateway
        self.grace_s = grace_s
        gateway.num_connections = lambda: len(self.server_state.connections)
        self.server_state.draining = False  # type: ignore[attr-defined]  # its connections look at it
        self._drain: asyncio.Task | None = None

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
        if not self.force_exit:
            for server in self.servers:
                await self._accept_last(server)
            if any(getattr(c, "cycle", None) is None for c in self.server_state.connections):
                await asyncio.sleep(LAST_REQUEST_S)
        await super().shutdown(sockets)

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

    def _start_drain(self) -> None:
        self.server_state.draining = True  # type: ignore[attr-defined]
        self._drain = asyncio.ensure_future(self._wait_idle())

    async def _wait_idle(self) -> None:
        # One second at least: load balancers see /readiness fail before the port closes.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace_s):
                await asyncio.sleep(min(1.0, self.grace_s))
                await self.gateway.wait_idle()
        self.should_exit = True
