"""A client's connection: uvicorn's, with a bound on heads, and deaf to offers of other protocols."""

import asyncio
from http import HTTPStatus
from types import SimpleNamespace

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxserve.server.errors import error_body
from jaxserve.server.stream import encode_json

MAX_HEAD_BYTES = 1 << 19  # of a head that comes in pieces
HEAD_TIMEOUT_S = 60.0


class Connection(HttpToolsProtocol):
    """Heads that do not end, by size or by time, are refused: 431, 408. What cannot be read is a 400 in
    JSON. Who offers another protocol is answered in HTTP/1.1 (RFC 9110, 7.8): Java's client offers h2c with
    its first request."""

    _in_head = True  # nothing of a request, or a part of its head has come
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer means nothing (RFC 9110, 6.5.1), and there may be no end of them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else the body is still to come
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as end:
                self._ignore_upgrade(data[end.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "the request is not valid HTTP/1.1")
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's head exceeds {MAX_HEAD_BYTES} bytes")
        elif self._head_timer is None:
            self._time_head()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """The parser takes what follows such a head for the other protocol; another one reads the body."""
        self.cycle.keep_alive = False
        self.parser = httptools.HttpRequestParser(
            SimpleNamespace(on_body=self.on_body, on_message_complete=self.on_message_complete)
        )
        framing = (b"content-length", b"transfer-encoding")
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] in framing]
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(lines))
        self.parser.feed_data(rest)

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _end_head(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._time_head()  # it is behind a request that is being answered, and may not have been read
        else:
            self._refuse(408, f"the request's head did not arrive within {HEAD_TIMEOUT_S} s")

    def _refuse(self, status: int, message: str) -> None:
        """Close, with an error for an answer unless another request's, or a part of one, is to come first."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (self._in_head or cycle.response_started):
            body = encode_json(error_body(message, status))
            self.transport.write(
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n" % (status, HTTPStatus(status).phrase.encode(), len(body)) + body
            )
        self.transport.close()
