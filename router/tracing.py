"""OpenTelemetry spans of data requests, exported as OTLP over HTTP in JSON.

One span a request, child of the client's `traceparent` and parent of the worker's. Spans wait in a
bounded list and are sent once a second; a collector that is away costs spans, never requests.
"""

import asyncio
import logging
import os
import random
import re
import time
from typing import Any

import msgspec

from router.call import Call
from router.headers import ClientHeaders
from router.upstream import Address, Pool, UpstreamError

log = logging.getLogger("router")

EXPORT_S = 1.0
MAX_WAITING = 4096
SERVER_KIND = 2
ERROR_STATUS = 2
_parse = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})\Z").match


class Span:
    """One request. Times in nanoseconds since the epoch."""

    __slots__ = ("name", "parent_id", "span_id", "started_ns", "trace_id")

    def __init__(self, name: str, trace_id: str, parent_id: str, span_id: str) -> None:
        self.name, self.trace_id, self.parent_id, self.span_id = name, trace_id, parent_id, span_id
        self.started_ns = time.time_ns()


class Tracer:
    """Raises ValueError for an endpoint that is not http(s)://host[:port]."""

    def __init__(self, endpoint: str) -> None:
        url = endpoint if "://" in endpoint else f"http://{endpoint}"
        self.pool = Pool(Address.parse(url))
        self.path = "" if self.pool.address.path else "/v1/traces"
        self.waiting: list[dict[str, Any]] = []
        self.dropped = 0
        self._random = random.Random(int.from_bytes(os.urandom(16), "big"))

    def start(self, client: ClientHeaders, path: str) -> Span | None:
        """A span for this request, put into the headers that go to the worker; None: not sampled."""
        given = _parse(client.traceparent) if client.traceparent else None
        trace_id = given[1].decode() if given else f"{self._random.getrandbits(128) or 1:032x}"
        if given and not int(given[3], 16) & 1:
            return None  # the client decided against it; its header goes on as it came
        span_id = f"{self._random.getrandbits(64) or 1:016x}"
        parent_id = given[2].decode() if given else ""
        if client.traceparent is not None:
            old = b"traceparent: " + client.traceparent + b"\r\n"
            client.forward = client.forward.replace(old, b"")
        client.forward += f"traceparent: 00-{trace_id}-{span_id}-01\r\n".encode()
        return Span(f"POST {path}", trace_id, parent_id, span_id)

    def end(self, span: Span, call: Call | None, request_id: bytes, status: int) -> None:
        """`status` 0: the client left before an answer."""
        if len(self.waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        attributes: dict[str, Any] = {
            "http.request.method": "POST",
            "http.response.status_code": status,
            "request.id": request_id.decode("latin-1"),
        }
        if call is not None:
            attributes["url.path"] = call.path
            attributes["gen_ai.request.model"] = call.model
            attributes["router.decision"] = call.decision
            attributes["router.attempts"] = call.attempts
            attributes["server.address"] = call.worker_url
            if call.predicted_tokens >= 0:
                attributes["router.predicted_cached_tokens"] = call.predicted_tokens
        entry: dict[str, Any] = {
            "traceId": span.trace_id,
            "spanId": span.span_id,
            "name": span.name,
            "kind": SERVER_KIND,
            "startTimeUnixNano": str(span.started_ns),
            "endTimeUnixNano": str(time.time_ns()),
            "attributes": [_attribute(k, v) for k, v in attributes.items() if v not in (None, "")],
            "status": {"code": ERROR_STATUS} if status >= 500 else {},
        }
        if span.parent_id:
            entry["parentSpanId"] = span.parent_id
        self.waiting.append(entry)

    async def run(self) -> None:
        """Export until cancelled."""
        while True:
            await asyncio.sleep(EXPORT_S)
            await self.flush()

    async def flush(self) -> None:
        """Send what waits; it is dropped when the collector does not take it."""
        spans, self.waiting = self.waiting, []
        if not spans:
            return
        resource = {"attributes": [_attribute("service.name", "router")]}
        scope = [{"scope": {"name": "router"}, "spans": spans}]
        body = msgspec.json.encode({"resourceSpans": [{"resource": resource, "scopeSpans": scope}]})
        try:
            status, _ = await self.pool.fetch("POST", self.path, body=body, timeout_s=5)
            if status < 300:
                return
            reason = f"answered {status}"
        except UpstreamError as error:
            reason = str(error)
        self.dropped += len(spans)
        log.warning("%d spans are lost: the trace collector %s", len(spans), reason)


def _attribute(key: str, value: Any) -> dict[str, Any]:
    kind = {"intValue": str(value)} if isinstance(value, int) else {"stringValue": str(value)}
    return {"key": key, "value": kind}
