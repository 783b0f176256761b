"""HTTP in and out on the hot path: bodies, JSON and event-stream answers, clients that leave.

A client that leaves cancels the work for it; closing the engine's iterators on the way aborts the
requests.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.messages import EngineDeadError, EngineRefusal
from jaxserve.server.errors import RequestError, error_body

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 64 << 20
BODY_TIMEOUT_S = 60.0
STALLED_S = 120.0  # for so long a stream's reader may take nothing; it holds a place in the queue
MAX_DEPTH_MESSAGE = "the body is nested too deeply"
BODY_BYTES = "jaxserve.body_bytes"  # where `read_json_body` leaves the body's length in a request's scope
GONE = 499  # the status of a request whose client left, as nginx has it
DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
Handler = Callable[[Request], Awaitable[Response]]
encode_json = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """The client left before its answer was complete; nobody reads what follows."""


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(content), status, headers, media_type="application/json")


def error_response(error: RequestError) -> Response:
    return json_response(error.body(), error.status, error.headers)


def endpoint(handler: Handler) -> Handler:
    """A route whose errors become OpenAI error bodies; what is our own fault is logged and says nothing."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGone:
            return Response(status_code=GONE)
        except Exception as error:
            return error_response(as_request_error(error))

    return guarded


def as_request_error(error: BaseException) -> RequestError:
    """The client's view of any exception."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDeadError):
        log.error("engine: %s", error)
        return RequestError(f"the engine is gone: {error}", status=503, headers={"retry-after": "5"})
    if isinstance(error, EngineRefusal):
        return RequestError(str(error))
    log.error("unexpected error while answering a request", exc_info=error)
    return RequestError("internal error; the server's log has the details", status=500)


# ---- in ----


async def read_json_body(request: Request) -> Any:
    """The decoded body.

    Raises RequestError: 408 when it comes too slowly, 413 when too large, 415 by content type or encoding,
    400 when not JSON; ClientGone.
    """
    limit = MAX_BODY_BYTES
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if (
        kind
        and kind != "application/json"
        and not (kind.startswith("application/") and kind.endswith("+json"))
    ):
        raise RequestError(f"content-type must be application/json, got {kind[:60]}", status=415)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(f"content-encoding {encoding[:60]} is not supported; send plain JSON", status=415)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise _too_large(limit)
                if not message.get("more_body"):
                    break
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT_S} s"
        raise RequestError(message, status=408, headers={"connection": "close"}) from None
    request.scope[BODY_BYTES] = len(body)
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise RequestError(MAX_DEPTH_MESSAGE) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None


def _too_large(limit: int) -> RequestError:
    # The rest of the body is not read, so the connection cannot be used again.
    return RequestError(f"the body exceeds {limit} bytes", status=413, headers={"connection": "close"})


async def unless_gone[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _stop(task, gone)


# ---- out ----


class EventStream(Response):
    """Server-sent events from an iterator of encoded events ("data: ...", blank line included).

    The status line waits for the first event, so an error before it is a plain error answer; a later
    one is an error event. Both end the stream; `[DONE]` closes it, unless the last event brought it along.
    A reader that takes nothing for STALLED_S, or twice that, is cut off.
    """

    def __init__(self, events: AsyncGenerator[bytes], resumable: bool = False):
        """`resumable`: a gateway will go on with the stream elsewhere if it breaks here; so when the engine
        is gone or ends, the connection is cut, without an error event that the client would see."""
        self.events = events
        self.resumable = resumable
        self._going_out: bytes | None = None  # the event that the reader has not taken yet
        self._seen_going_out: bytes | None = None
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send_all(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            while not (task.done() or gone.done() or self._is_stalled()):
                await asyncio.wait((task, gone), timeout=STALLED_S, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await _stop(task, gone)

    def _is_stalled(self) -> bool:
        """Whether the reader has taken nothing since this was asked last."""
        before, self._seen_going_out = self._seen_going_out, self._going_out
        return before is not None and before is self._going_out

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, end = False, DONE
        async with contextlib.aclosing(self.events) as events:
            try:
                async for event in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
                        started = True
                    self._going_out = event
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    self._going_out = None
                    end = b"" if event.endswith(DONE) else DONE
            except Exception as error:
                failure = as_request_error(error)
                if not started:
                    await error_response(failure)(scope, receive, send)
                    return
                if self.resumable and failure.status == 503:
                    return
                body = error_body(failure.message, failure.status, failure.param, failure.code)
                await send({"type": "http.response.body", "body": sse(body), "more_body": True})
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            await send({"type": "http.response.body", "body": end, "more_body": False})


def sse(content: Any) -> bytes:
    """One event."""
    return b"data: %b\n\n" % encode_json(content)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs and wait for it, so that iterators are closed when this returns."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
