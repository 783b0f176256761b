"""One attempt at one worker: the load it is charged with, its answer's way to the client, its lesson.

Owned by one task. Whoever makes an Exchange must `close` it.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from router.breaker import NORMAL, Admission
from router.call import Call
from router.errors import stream_error_event
from router.exact import body_with_ids
from router.headers import (
    Answer,
    ClientHeaders,
    Usage,
    read_answer,
    request_head,
    tiers_in,
    usage_in,
    usage_of,
    with_dp_rank,
)
from router.resume import HEADER, Tracker, make_tracker
from router.upstream import Connection, UpstreamError
from router.workers import Worker

if TYPE_CHECKING:
    from router.http_server import Request
    from router.proxy import Proxy

WHOLE_ANSWER_BYTES = 1 << 20  # answers up to here are read whole before the first byte goes out


class Client(msgspec.Struct):
    """The way back: ASGI `send`, and the request as our own server knows it when it is ours."""

    send: Any
    request: "Request | None"


class Exchange:
    """One attempt at one worker: the load it is charged with, and what its outcome teaches."""

    __slots__ = (
        "admission", "answer", "body", "call", "completion_tokens", "computed", "connection",
        "prompt_tokens", "proxy", "sent_tokens", "settled",
        "started", "started_s", "status", "todo_tokens", "told", "tracked", "worker",
    )  # fmt: skip

    def __init__(
        self, proxy: "Proxy", call: Call, worker: Worker, admission: Admission, started_s: float
    ) -> None:
        self.proxy = proxy
        self.call = call
        self.worker = worker
        self.admission = admission
        self.started_s = started_s
        self.connection: Connection | None = None
        self.status = 0
        self.answer: Answer = None  # type: ignore[assignment]  # set with status
        self.body: bytes | None = None  # the whole answer, when it was read before relaying
        self.started = False  # bytes have gone to the client
        self.prompt_tokens = self.completion_tokens = 0  # as the worker counted them
        self.tracked = False  # the stream can be resumed elsewhere
        self.computed = False  # the prompt: the policy knows
        self.told = False  # the client has been told that the stream broke
        self.settled = False  # the breaker knows
        self.todo_tokens = max(0, call.prompt_tokens - max(0, call.predicted_tokens))
        call.attempts += 1
        call.worker_url = worker.url
        worker.in_flight += 1
        worker.total += 1
        worker.pending_tokens += self.todo_tokens
        self.sent_tokens = 0
        if call.stream:
            self.sent_tokens = self.todo_tokens
            worker.sent_tokens += self.todo_tokens
        proxy.policy.placed(call, worker)
        proxy.recorder.placed(call, worker)
        if proxy.on_placed is not None:
            proxy.on_placed(call, worker)

    def send(self, method: str, target: bytes, client: ClientHeaders, resumed: bytes | None = None) -> bool:
        """Send the request on an idle connection, if there is one. `resumed`: as in `start`."""
        message = self._message(method, target, client, resumed)
        self.connection = connection = self.worker.pool.reuse()
        if connection is None:
            return False
        connection.send(*message, self.started_s)
        return True

    def _message(
        self, method: str, target: bytes, client: ClientHeaders, resumed: bytes | None
    ) -> tuple[bytes, bytes | bytearray]:
        worker, call = self.worker, self.call
        more = b""
        if worker.resumes and call.stream:
            if call.tracker is None:
                call.tracker = make_tracker(call)
            self.tracked = call.tracker is not None
            more = HEADER if self.tracked else b""
        body = call.body if resumed is None else resumed
        if resumed is None and call.token_ids is not None and worker.takes_ids and worker.kv is not None:
            body = body_with_ids(call)
        if worker.dp_rank is not None:
            body = with_dp_rank(call, worker, body)
        return request_head(method, target, worker, client, call.request_id, len(body), more), body

    async def start(
        self, method: str, target: bytes, client: ClientHeaders, resumed: bytes | None = None
    ) -> None:
        """Send the request, unless it was, and read the head of the answer, or all of a small one.

        `resumed`: another body, that goes on with a stream. Raises UpstreamError."""
        connection = self.connection
        if connection is not None or self.send(method, target, client, resumed):
            connection = self.connection
            assert connection is not None
            try:
                await connection.head()
            except UpstreamError as error:
                # The worker closed an idle connection just as it was reused: not its fault, once.
                if error.kind != "closed" or connection.got_bytes:
                    raise
                connection.release()
                connection = None
        if connection is None:
            connection = self.connection = await self.worker.pool.connect()
            connection.send(*self._message(method, target, client, resumed), self.started_s)
            await connection.head()
        if self.whole() and self.body is None:
            self.body = connection.take() if connection.complete else await connection.body()

    def whole(self) -> bool:
        """Whether the answer, whose head has come, is to be read whole before it goes on."""
        if self.answer is None:
            self._read_head()
        answer = self.answer
        return answer.length is not None and answer.length <= WHOLE_ANSWER_BYTES and not answer.event_stream

    def _read_head(self) -> None:
        worker, connection = self.worker, self.connection
        assert connection is not None
        self.status = connection.status
        answer = self.answer = read_answer(connection.headers)
        if answer.load is not None:
            answer.load.at_s = self.proxy.loop.time()
            worker.report(answer.load)
        if answer.instance is not None and answer.instance != worker.instance_id:
            before, worker.instance_id = worker.instance_id, answer.instance
            if before is not None:
                self.proxy.policy.cleared(worker)
                self.proxy.on_replaced(worker)
        answer.headers.append((b"x-request-id", self.call.request_id))
        answer.headers.append((b"x-smg-routed-worker-id", worker.url.encode()))

    async def relay(self, to: Client) -> int:
        """Pass the answer on; returns completion tokens if reported, else 0.

        A stream that breaks ends with an error event and then raises UpstreamError; so does a plain
        body, whose client then sees a cut connection.
        """
        body = self.body
        if body is not None and to.request is not None and self.answer_whole(to.request):
            return self.completion_tokens
        self.call.status = self.status
        start = {"type": "http.response.start", "status": self.status, "headers": self.answer.headers}
        if body is None:
            return await self._relay_stream(start, to.send)
        await to.send(start)
        await to.send({"type": "http.response.body", "body": body})
        self._answered(body)
        return self.completion_tokens

    def answer_whole(self, request: "Request") -> bool:
        """Pass `body`, the whole answer, on at once, if the client can take it."""
        body = self.body
        assert body is not None
        if not request.answer(self.status, self.answer.headers, body):
            return False
        self._answered(body)
        return True

    def _answered(self, body: bytes) -> None:
        """`body` has gone out whole."""
        call, proxy = self.call, self.proxy
        self.started = True
        self._first_token(body)
        self._succeeded()
        call.status, tokens = self.status, self.completion_tokens
        proxy.recorder.finished(
            call, self.status, self.started_s, proxy.loop.time(), self.prompt_tokens, tokens
        )

    async def _relay_stream(self, start, send) -> int:
        call, recorder, connection = self.call, self.proxy.recorder, self.connection
        assert connection is not None
        time = self.proxy.loop.time
        events = 0
        data = b""
        tracker = call.tracker if self.tracked else None
        data = await connection.read()  # breaks before the first byte are still retried
        self._first_token(data)
        if tracker is not None:
            data = tracker.feed(data)
        cells = recorder.stream_cells(call)
        first_s = last_s = time()
        observe = cells.itl.observe
        self.started = True
        if start is not None:
            cells.ttft.observe(last_s - self.started_s)
            await send(start)
        if tracker is not None:
            return await self._relay_tracked(tracker, data, send, last_s, cells)
        message = {"type": "http.response.body", "body": data, "more_body": True}
        try:
            while data:
                events += 1
                message["body"] = data
                if connection.complete and not connection.parts:
                    break
                await send(message)
                data = await connection.read()
                now_s = time()
                observe(now_s - last_s)
                last_s = now_s
        except UpstreamError as error:
            self._broke(error)
            if self.answer.event_stream and self.answer.length is None:
                end = b"" if message["body"].endswith(b"\n\n") else b"\n\n"
                event = stream_error_event(call.path, reason_of(error))
                await send({"type": "http.response.body", "body": end + event})
                self.told = True
            recorder.finished(call, self.status, self.started_s, time(), error="stream_error")
            raise
        await send({"type": "http.response.body", "body": data})
        self._succeeded()
        tokens = usage_in(data)[1] or events
        cells.ended(self.started_s, first_s, last_s, tokens)
        recorder.finished(call, self.status, self.started_s, last_s, self.prompt_tokens, tokens)
        return tokens

    async def relay_rest(self, to: Client) -> int:
        """Pass on a stream that goes on with one whose head has gone out. Raises UpstreamError."""
        return await self._relay_stream(None, to.send)

    async def _relay_tracked(self, tracker: Tracker, data: bytes, send, last_s: float, cells) -> int:
        """Like the loop of `_relay_stream`, event by whole event, and silent about a break."""
        connection, time = self.connection, self.proxy.loop.time
        assert connection is not None
        first_s = last_s
        while True:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            try:
                read = await connection.read()
                if tracker.overfull:
                    raise UpstreamError("an event of more than 1 MiB", kind="protocol")
            except UpstreamError as error:
                self._broke(error)
                raise
            if not read:
                break
            now_s = time()
            cells.itl.observe(now_s - last_s)
            last_s = now_s
            data = tracker.feed(read)
        await send({"type": "http.response.body", "body": b""})
        self._succeeded()
        tokens = len(tracker.token_ids)
        cells.ended(self.started_s, first_s, last_s, tokens)
        self.proxy.recorder.finished(
            self.call, self.status, self.started_s, last_s, self.prompt_tokens, tokens
        )
        return tokens

    def _first_token(self, data: bytes) -> None:
        """The prompt has been computed: its tokens no longer queue, and the hit is known."""
        self.worker.pending_tokens -= self.todo_tokens
        self.todo_tokens = 0
        self._prefilled()
        self._arrived()
        if self.worker.on_load is not None:
            self.worker.on_load(self.worker)
        if self.status != 200:
            return
        if self.body is not None:
            usage = usage_of(data)
        else:
            usage = Usage(*usage_in(data), tiers_in(data))
        self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        cached = usage.cached_tokens if self.answer.cached_tokens is None else self.answer.cached_tokens
        if cached is not None:
            tiers = usage.cached_tokens_details
            self.proxy.recorder.cached(self.call, self.worker, self.prompt_tokens, cached, tiers)
            self.proxy.policy.learned(self.call, self.worker, self.prompt_tokens, cached)

    def _arrived(self) -> None:
        """The stream is no longer on the way to its first token: another may be sent."""
        if self.sent_tokens:
            self.worker.sent_tokens -= self.sent_tokens
            self.sent_tokens = 0
            if self.proxy.dispatch.waiting:
                self.proxy.dispatch.freed(self.worker)

    def _prefilled(self) -> None:
        if self.call.pages and not self.computed:
            self.computed = True
            self.proxy.policy.prefilled(self.call, self.worker)

    def _succeeded(self) -> None:
        if self.settled:
            return
        self.settled = True
        worker = self.worker
        worker.breaker.success(self.admission)
        if worker.pauses:
            worker.pauses = 0

    def backpressure(self) -> None:
        """The worker said it is busy (408, 429, 503): leave it alone for as long as it asks."""
        self.settled = True
        worker, proxy = self.worker, self.proxy
        worker.breaker.forget(self.admission)
        proxy.recorder.outcome(worker, "backpressure")
        worker.pauses += 1
        pause_s = self.answer.retry_after_s
        if pause_s is None:
            pause_s = 0.25 * 2 ** min(worker.pauses - 1, 4)
        pause_s = min(pause_s, 10.0)
        proxy.registry.pause(worker, proxy.loop, pause_s)

    def _broke(self, error: UpstreamError) -> None:
        self.settled = True
        if error.kind == "ejected" and self.admission == NORMAL:
            return  # the monitor knows
        if self._out_of_time(error):
            self.worker.breaker.forget(self.admission)
            return
        self.proxy.recorder.stream_broke(self.worker)
        self.proxy.count_failure(self.worker, self.admission, self.call, self.proxy.stream_break_weight)
        self.proxy.suspect(self.worker, error)

    def failed(self, error: UpstreamError) -> None:
        """A transport failure."""
        self.proxy.recorder.transport_error(error.kind)
        if self.settled:
            return
        self.settled = True
        if error.kind == "ejected" or self._out_of_time(error):
            self.worker.breaker.forget(self.admission)
            return
        self.proxy.count_failure(self.worker, self.admission, self.call)
        self.proxy.suspect(self.worker, error)

    def _out_of_time(self, error: UpstreamError) -> bool:
        """It was long, and came until our own limit ended it: no fault of the worker's."""
        return error.kind == "timeout" and self.connection is not None and self.connection.moving

    def close(self) -> None:
        """Give back connection and load, whatever happened."""
        worker = self.worker
        worker.in_flight -= 1
        worker.pending_tokens -= self.todo_tokens
        self.todo_tokens = 0
        self._prefilled()
        self._arrived()
        if not self.settled:  # cancelled: says nothing of the worker
            worker.breaker.forget(self.admission)
        if self.connection is not None:
            self.connection.release()
        if worker.on_load is not None:
            worker.on_load(worker)
        if worker.in_flight == 0 and worker.idle_waiter is not None and not worker.idle_waiter.done():
            worker.idle_waiter.set_result(None)


def reason_of(error: UpstreamError) -> str:
    """Why a stream ends without its end, for the client."""
    if error.kind == "timeout":
        return f"the stream took too long: {error}"
    return f"the worker broke the stream: {error}"
