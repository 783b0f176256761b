"""One streaming `/generate` request at a time over HTTP/1.1, with the moment of every token.

asyncio Protocols parsed by httptools: a client that costs little beside the server it measures.
Connections are kept and used again.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools


@dataclass(slots=True)
class Timing:
    """A request as its client saw it; `time.perf_counter` seconds.

    Args:
        due_s: when it should have been sent; what a user waits from.
        tokens: (moment, tokens so far) of each event that brought any.
    """

    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: int = 0  # 0: no answer came
    error: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: list[tuple[float, int]] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.status == 200 and not self.error and bool(self.tokens)

    @property
    def num_tokens(self) -> int:
        return self.tokens[-1][1] if self.tokens else 0

    @property
    def ttft_s(self) -> float:
        return self.tokens[0][0] - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first event's; None when nothing came after it."""
        (begin, first), (end, last) = self.tokens[0], self.tokens[-1]
        return (end - begin) / (last - first) if last > first else None

    @property
    def itl_s(self) -> list[float]:
        """Between events, which bring one token unless the server or speculation bundles them."""
        moments = [moment for moment, _ in self.tokens]
        return [after - before for before, after in itertools.pairwise(moments)]


class Client:
    """Sends requests to one server. `clock` is injected in tests."""

    def __init__(self, url: str, api_key: str | None = None, clock: Callable[[], float] = time.perf_counter):
        parts = urlsplit(url)
        assert parts.hostname, f"url={url!r} has no host"
        self._host, self._port = parts.hostname, parts.port or 80
        self._path = f"{parts.path.rstrip('/')}/generate"
        self._api_key, self._clock = api_key, clock
        self._idle: list[_Connection] = []

    async def generate(self, body: dict[str, Any], due_s: float | None = None) -> Timing:
        """Never raises for what the server does: the timing says it."""
        timing = Timing(self._clock() if due_s is None else due_s)
        try:
            connection = await self._connect()
        except OSError as error:
            timing.ended_s, timing.error = self._clock(), f"cannot connect: {error}"
            return timing
        timing.sent_s = self._clock()
        keep = await connection.exchange(self._request(body), timing)
        timing.ended_s = self._clock()
        if keep:
            self._idle.append(connection)
        else:
            connection.close()
        return timing

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self._clock), self._host, self._port)
        return connection

    def _request(self, body: dict[str, Any]) -> bytes:
        data = json.dumps({**body, "stream": True}).encode()
        head = [
            f"POST {self._path} HTTP/1.1",
            f"host: {self._host}:{self._port}",
            "content-type: application/json",
            f"content-length: {len(data)}",
        ]
        if self._api_key:
            head.append(f"authorization: Bearer {self._api_key}")
        return "\r\n".join([*head, "", ""]).encode() + data


class _Connection(asyncio.Protocol):
    """httptools calls `on_*` while it is fed."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[bool] | None = None
        self.is_closed = False

    def exchange(self, request: bytes, timing: Timing) -> "asyncio.Future[bool]":
        """Resolves when the answer has ended: whether the connection may be used again."""
        assert self._transport is not None
        self._timing, self._left, self._ended = timing, b"", False
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._finish(False, "the connection was closed")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(False, f"not HTTP: {error}")

    # ---- httptools ----

    def on_body(self, body: bytes) -> None:
        self._left += body
        if self._timing.status == 0:
            self._timing.status = self._parser.get_status_code()
        if self._timing.status != 200:
            return
        *events, self._left = self._left.split(b"\n\n")
        for event in events:
            self._take(event.strip().removeprefix(b"data:").strip())

    def on_message_complete(self) -> None:
        self._timing.status = self._parser.get_status_code()
        error = "" if self._ended else "the stream ended without its end"
        if self._timing.status != 200:
            error = self._left.decode("utf-8", "replace")[:200] or f"status {self._timing.status}"
        self._finish(self._parser.should_keep_alive(), error)

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._ended = True
        elif data:
            reply = json.loads(data)
            if "error" in reply:
                self._timing.error = str(reply["error"])[:200]
                return
            meta = reply["meta_info"]
            self._timing.prompt_tokens = meta["prompt_tokens"]
            self._timing.cached_tokens = meta.get("cached_tokens", 0)
            if meta["completion_tokens"] > self._timing.num_tokens:
                self._timing.tokens.append((self._clock(), meta["completion_tokens"]))

    def _finish(self, keep: bool, error: str) -> None:
        if self._done is not None and not self._done.done():
            self._timing.error = self._timing.error or error
            self._done.set_result(keep)
