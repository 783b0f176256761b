"""The hot path: one data request from client to worker and back.

Plain ASGI. Bytes pass through; a stream flows as it comes, and is read no faster than the client takes
it. Another worker is tried only before the first byte has gone out. A client that leaves cancels the
task, which drops the worker's connection at once. Every request ends in an answer, an error event in
the client's protocol, or a cut connection when neither can be expressed.
"""

import asyncio
import random
from collections.abc import Callable

from router.breaker import NORMAL, Admission
from router.call import Call, Route, new_request_id
from router.config import RouterConfig
from router.errors import RequestError, send_error, stream_error_event
from router.exact import Exact, body_with_ids
from router.exchange import (
    Answer,
    ClientHeaders,
    number_after,
    read_answer,
    read_headers,
    request_head,
    with_dp_rank,
)
from router.limits import Concurrency, Keys, TokenRate
from router.metrics import Metrics
from router.policies import Policy
from router.recorder import Recorder
from router.resume import HEADER, Tracker, make_tracker
from router.upstream import Connection, UpstreamError
from router.workers import Registry, Worker

RETRYABLE = frozenset((408, 429, 500, 502, 503, 504))
BACKPRESSURE = frozenset((408, 429, 503))  # the worker is busy, not broken
WHOLE_ANSWER_BYTES = 1 << 20  # answers up to here are read whole before the first byte goes out


class CutOff(Exception):
    """A body that is not an event stream broke midway: only cutting the connection says so."""


class Proxy:
    """Forwards data routes. `suspect(worker, error)` is told of transport failures (the health monitor).

    `sleep` and `rng` are injected for tests.
    """

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        policy: Policy,
        metrics: Metrics,
        keys: Keys,
        *,
        exact: Exact | None = None,
        suspect: Callable[[Worker, UpstreamError], None],
        sleep=asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.registry = registry
        self.policy = policy
        self.keys = keys
        self.exact = exact
        self.suspect = suspect
        self.sleep = sleep
        self.rng = rng or random.Random()
        self.loop = asyncio.get_running_loop()
        self.concurrency = Concurrency(
            config.max_concurrent_requests, config.queue_size, config.queue_timeout_secs
        )
        self.token_rate = TokenRate(config.rate_limit_tokens_per_second, self.loop.time)
        self.recorder = Recorder(metrics, config.effective_policy)
        self.direct = not config.cors_allowed_origins  # nothing wraps `send`
        self.id_ranks = {name.lower().encode(): i for i, name in enumerate(config.request_id_headers)}
        self.attempts = 1 if config.disable_retries else config.retry_max_retries
        self.stream_break_weight = config.cb_failure_threshold // 2 + 1  # two in a row open the breaker

    async def serve(self, route: Route, scope, receive, send) -> None:
        """One request as an ASGI call. Returns when its last byte is out or its client has left."""
        task = asyncio.current_task()
        assert task is not None
        connection = scope.get("router.connection")
        if connection is not None:
            connection.on_lost = task.cancel
        watcher = None
        recorder = self.recorder
        started_s = self.loop.time()
        client = read_headers(scope["headers"], self.id_ranks)
        request_id = client.request_id or new_request_id(route.id_prefix)
        call = None
        try:
            try:
                caller = self.keys.check(client.authorization, client.x_api_key)
                body = await self._read_body(client, receive)
                call = Call(route, body)
                call.request_id = request_id
                self._parse(call, client)
                if connection is None:
                    watcher = self.loop.create_task(_watch(receive, task))
                if self.token_rate.tokens_per_s is not None:
                    self.token_rate.admit(caller, max(1, call.prompt_tokens or len(body) // 4))
                if self.concurrency.limit >= 0:
                    await self._enter(call)
                else:
                    self.concurrency.running += 1
                try:
                    if self.exact is not None and self.exact.subscriptions:
                        await self.exact.prepare(call)
                    target = scope.get("raw_path") or scope["path"].encode()
                    if scope["query_string"]:
                        target += b"?" + scope["query_string"]
                    tokens = await self._forward(
                        call,
                        scope["method"],
                        target,
                        client,
                        Client(send, connection if self.direct else None),
                        started_s,
                    )
                    if tokens and self.token_rate.tokens_per_s is not None:
                        self.token_rate.charge(caller, tokens)
                finally:
                    self.concurrency.leave()
            except RequestError as error:
                recorder.refused(route.path, call, error, self.loop.time() - started_s)
                await send_error(send, error, request_id)
            except CutOff:
                if connection is None:
                    raise
                connection.cut()
        except asyncio.CancelledError:
            lost = connection.lost if connection is not None else watcher is not None and watcher.done()
            if not lost:
                raise
            task.uncancel()
            recorder.client_left(route.path)
        finally:
            if connection is not None:
                connection.on_lost = None
            if watcher is not None:
                watcher.cancel()

    # ---- before a worker is chosen ----

    async def _read_body(self, client: ClientHeaders, receive) -> bytes:
        limit = self.config.max_payload_size
        if client.content_length > limit:
            raise _too_large(limit)
        message = await receive()
        body = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [body], len(body)
            while message.get("more_body"):
                message = await receive()
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
            body = b"".join(parts)
        if message["type"] == "http.disconnect":
            raise RequestError(400, "client_closed", "the client closed the connection mid-request")
        if len(body) > limit:
            raise _too_large(limit)
        return body

    def _parse(self, call: Call, client: ClientHeaders) -> None:
        kind = client.content_type
        if not call.route.multipart and kind and b"json" not in kind.lower():
            raise RequestError(
                415,
                "unsupported_media_type",
                f"content-type {kind.decode('latin-1')!r} is not supported here; use application/json",
            )
        call.parse(self.policy.reads_prompt)
        call.routing_key = client.routing_key
        if call.routing_key is None and call.fields is not None:
            call.routing_key = call.fields.routing_key
        call.target_worker = client.target_worker

    async def _enter(self, call: Call) -> None:
        if self.concurrency.running < self.concurrency.limit:
            await self.concurrency.enter()
            self.recorder.admitted("allowed")
            return
        try:
            await self.concurrency.enter()
        except RequestError:
            self.recorder.admitted("rejected")
            raise
        self.recorder.admitted("queued")

    # ---- choosing and trying ----

    def _select(self, call: Call, tried: list[Worker]) -> tuple[Worker, Admission]:
        """A worker and what its breaker admitted the request as. Raises RequestError(404, 503)."""
        usable = self.registry.usable(call.model)
        if tried:
            usable = tuple(w for w in usable if w not in tried) or usable
        fields = call.fields
        if fields is not None and self.config.dp_aware:
            rank = fields.routed_dp_rank if fields.routed_dp_rank is not None else fields.data_parallel_rank
            if rank is not None:
                usable = tuple(w for w in usable if w.dp_rank == rank) or usable
        if usable:
            call.predicted_tokens = -1
            return self.policy.choose(call, usable), NORMAL
        serving = self.registry.serving(call.model)
        probe = self.registry.probe_candidate(w for w in serving if w not in tried)
        if probe is not None:
            call.decision = "breaker_probe"
            return probe
        paused = [w for w in serving if w.healthy]
        if paused:  # it asked for a pause, but there is nobody else
            call.decision = "paused"
            return min(paused, key=lambda w: w.avoid_until_s), NORMAL
        ready = any(w.status == "ready" for w in self.registry)
        if not serving and ready:
            raise RequestError(
                404, "model_not_found", f"No worker available for model {call.model!r}", param="model"
            )
        raise RequestError(
            503,
            "no_available_workers",
            "no worker can take the request now",
            type="service_unavailable",
            retry_after_s=1,
        )

    async def _forward(
        self,
        call: Call,
        method: str,
        target: bytes,
        client: ClientHeaders,
        to: "Client",
        started_s: float,
    ) -> int:
        """Try workers until one answers, relay the answer; returns completion tokens if reported."""
        tried: list[Worker] = []
        blamed: list[tuple[Worker, Admission]] = []  # said 500, and may yet be innocent
        last: RequestError | None = None
        path = call.path
        for attempt in range(self.attempts):
            try:
                worker, admission = self._select(call, tried)
            except RequestError as error:
                # What a worker said explains more than that there is no other one.
                raise last or error from None
            if worker in tried:
                pause_s = self._backoff_s(attempt)
                self.recorder.pause(attempt, pause_s)
                await self.sleep(pause_s)
                if worker.status != "ready" or not worker.breaker.closed:
                    continue
            final = attempt == self.attempts - 1
            exchange = Exchange(self, call, worker, admission, started_s)
            try:
                await exchange.start(method, target, client)
                status = exchange.status
                if status in RETRYABLE:
                    last = RequestError(502, "upstream_error", f"worker {worker.url} answered {status}")
                    if status in BACKPRESSURE:
                        exchange.backpressure()
                    else:
                        blamed.append((worker, admission))
                        exchange.settled = True
                    others = any(w is not worker and w not in tried for w in self.registry.usable(call.model))
                    # Broken workers are not asked twice; busy ones are, after a pause.
                    if not final and (others or status in BACKPRESSURE):
                        tried.append(worker)
                        self.recorder.retried(path)
                        continue
                    if len(blamed) > 1 and all(w in tried or w is worker for w, _ in blamed):
                        for other, other_admission in blamed:  # all say 500: it is the request
                            other.breaker.forget(other_admission)
                        blamed.clear()
                return await exchange.relay(to)
            except UpstreamError as error:
                exchange.failed(error)
                if exchange.started:  # bytes are out
                    if exchange.tracked and call.tracker is not None:
                        tried.append(worker)
                        return await self._resume(call, method, target, client, to, started_s, tried)
                    if not exchange.told:
                        raise CutOff from error
                    return 0
                last = _upstream_error(worker, error)
                if error.kind == "timeout":
                    raise last from error
                tried.append(worker)
                if not final:
                    self.recorder.retried(path)
            finally:
                exchange.close()
                if (exchange.status and exchange.status not in RETRYABLE) or exchange.started:
                    self._blame(blamed, call)
        self._blame(blamed, call)
        self.recorder.exhausted(path)
        raise last or RequestError(502, "upstream_error", "no attempt at the request succeeded")

    async def _resume(
        self,
        call: Call,
        method: str,
        target: bytes,
        client: ClientHeaders,
        to: "Client",
        started_s: float,
        tried: list[Worker],
    ) -> int:
        """Go on with a broken stream on workers that can; ends it with an error event when none does."""
        tracker = call.tracker
        assert tracker is not None
        tracker.broke()
        if tracker.done:  # only the connection's own end was missing
            await to.send({"type": "http.response.body", "body": b""})
            return len(tracker.token_ids)
        for _ in range(self.attempts):
            able = tuple(w for w in self.registry.usable(call.model) if w.resumes and w not in tried)
            if not able:
                break
            worker = self.policy.choose(call, able)
            tried.append(worker)
            exchange = Exchange(self, call, worker, NORMAL, started_s)
            try:
                await exchange.start(method, target, client, tracker.request())
                if exchange.status == 200 and exchange.answer.event_stream:
                    self.recorder.stream_broke(worker, "resumed")
                    return await exchange.relay_rest(to)
                if exchange.status in BACKPRESSURE:
                    exchange.backpressure()
            except UpstreamError as error:
                exchange.failed(error)
                tracker.broke()
            finally:
                exchange.close()
        event = stream_error_event(call.path, "the worker broke the stream, and no other could go on")
        await to.send({"type": "http.response.body", "body": event})
        self.recorder.finished(call, 200, started_s, self.loop.time(), error="stream_error")
        return len(tracker.token_ids)

    def _blame(self, blamed: list[tuple[Worker, Admission]], call: Call) -> None:
        for worker, admission in blamed:
            self.count_failure(worker, admission, call)
        blamed.clear()

    def count_failure(self, worker: Worker, admission: Admission, call: Call, weight: int = 1) -> None:
        """Tell the breaker, and note what kind of request a probe should imitate."""
        self.recorder.outcome(worker, "failure")
        worker.failed_path = call.path.encode()
        worker.failed_model = call.model
        worker.failed_stream = call.stream
        worker.breaker.failure(admission, weight)

    def _backoff_s(self, attempt: int) -> float:
        c = self.config
        pause_ms = c.retry_initial_backoff_ms * c.retry_backoff_multiplier ** (attempt - 1)
        jitter = 1 + c.retry_jitter_factor * (2 * self.rng.random() - 1)
        return min(pause_ms, c.retry_max_backoff_ms) * jitter / 1000


class Exchange:
    """One attempt at one worker: the load it is charged with, and what its outcome teaches."""

    __slots__ = (
        "admission", "answer", "body", "call", "computed", "connection", "prompt_tokens", "proxy", "settled",
        "started", "started_s", "status", "todo_tokens", "told", "tracked", "worker",
    )  # fmt: skip

    def __init__(
        self, proxy: Proxy, call: Call, worker: Worker, admission: Admission, started_s: float
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
        self.prompt_tokens = 0  # as the worker counted them
        self.tracked = False  # the stream can be resumed elsewhere
        self.computed = False  # the prompt: the policy knows
        self.told = False  # the client has been told that the stream broke
        self.settled = False  # the breaker knows
        self.todo_tokens = max(0, call.prompt_tokens - max(0, call.predicted_tokens))
        worker.in_flight += 1
        worker.total += 1
        worker.pending_tokens += self.todo_tokens
        proxy.policy.placed(call, worker)
        proxy.recorder.placed(call, worker)

    async def start(
        self, method: str, target: bytes, client: ClientHeaders, resumed: bytes | None = None
    ) -> None:
        """Send the request and read the head of the answer, or all of a small one. Raises UpstreamError.

        `resumed`: another body, that goes on with a stream."""
        worker, call = self.worker, self.call
        more = b""
        if worker.resumes and call.stream:
            if call.tracker is None:
                call.tracker = make_tracker(call)
            self.tracked = call.tracker is not None
            more = HEADER if self.tracked else b""
        body = call.body if resumed is None else resumed
        if resumed is None and call.token_ids is not None and worker.takes_ids:
            body = body_with_ids(call)
        if worker.dp_rank is not None:
            body = with_dp_rank(call, worker, body)
        head = request_head(method, target, worker, client, call.request_id, len(body), more)
        connection, used = await worker.pool.connect()
        self.connection = connection
        try:
            connection.send(head, body)
            self.status = await connection.head()
        except UpstreamError as error:
            # The worker closed an idle connection just as it was reused: not its fault, once.
            if not used or error.kind != "closed" or connection.got_bytes:
                raise
            connection.release()
            connection, _ = await worker.pool.connect(fresh=True)
            self.connection = connection
            connection.send(head, body)
            self.status = await connection.head()
        answer = self.answer = read_answer(connection.headers)
        if answer.load is not None:
            answer.load.at_s = self.proxy.loop.time()
            worker.report(answer.load)
        if answer.instance is not None and answer.instance != worker.instance_id:
            if worker.instance_id is not None:
                self.proxy.policy.cleared(worker)
            worker.instance_id = answer.instance
        if answer.length is not None and answer.length <= WHOLE_ANSWER_BYTES and not answer.event_stream:
            self.body = await connection.body()

    async def relay(self, to: "Client") -> int:
        """Pass the answer on; returns completion tokens if reported, else 0.

        A stream that breaks ends with an error event and then raises UpstreamError; so does a plain
        body, whose client then sees a cut connection.
        """
        call, recorder, answer = self.call, self.proxy.recorder, self.answer
        headers = answer.headers
        headers.append((b"x-request-id", call.request_id))
        headers.append((b"x-smg-routed-worker-id", self.worker.url.encode()))
        body = self.body
        if body is None:
            start = {"type": "http.response.start", "status": self.status, "headers": headers}
            return await self._relay_stream(start, to.send)
        self._first_token(body)
        self._succeeded()
        self.started = True
        if to.connection is None or not to.connection.answer(self.status, headers, body):
            await to.send({"type": "http.response.start", "status": self.status, "headers": headers})
            await to.send({"type": "http.response.body", "body": body})
        tokens = number_after(body, b'"completion_tokens"') or 0
        recorder.finished(
            call, self.status, self.started_s, self.proxy.loop.time(), self.prompt_tokens, tokens
        )
        return tokens

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
        last_s = time()
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
                event = stream_error_event(call.path, f"the worker broke the stream: {error}")
                await send({"type": "http.response.body", "body": end + event})
                self.told = True
            recorder.finished(call, self.status, self.started_s, time(), error="stream_error")
            raise
        await send({"type": "http.response.body", "body": data})
        self._succeeded()
        tokens = number_after(data, b'"completion_tokens"') or events
        recorder.finished(call, self.status, self.started_s, last_s, self.prompt_tokens, tokens)
        return tokens

    async def relay_rest(self, to: "Client") -> int:
        """Pass on a stream that goes on with one whose head has gone out. Raises UpstreamError."""
        return await self._relay_stream(None, to.send)

    async def _relay_tracked(self, tracker: Tracker, data: bytes, send, last_s: float, cells) -> int:
        """Like the loop of `_relay_stream`, event by whole event, and silent about a break."""
        connection, time = self.connection, self.proxy.loop.time
        assert connection is not None
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
        self.proxy.recorder.finished(
            self.call, self.status, self.started_s, last_s, self.prompt_tokens, tokens
        )
        return tokens

    def _first_token(self, data: bytes) -> None:
        """The prompt has been computed: its tokens no longer queue, and the hit is known."""
        self.worker.pending_tokens -= self.todo_tokens
        self.todo_tokens = 0
        self._prefilled()
        if self.status != 200:
            return
        cached = self.answer.cached_tokens
        if cached is None:
            cached = number_after(data, b'"cached_tokens"')
        if cached is not None:
            prompt_tokens = self.prompt_tokens = number_after(data, b'"prompt_tokens"') or 0
            self.proxy.recorder.cached(self.call, self.worker, prompt_tokens, cached)
            self.proxy.policy.learned(self.call, self.worker, prompt_tokens, cached)

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
        self.proxy.recorder.stream_broke(self.worker)
        self.proxy.count_failure(self.worker, self.admission, self.call, self.proxy.stream_break_weight)
        self.proxy.suspect(self.worker, error)

    def failed(self, error: UpstreamError) -> None:
        """A transport failure."""
        self.proxy.recorder.transport_error(error.kind)
        if self.settled:
            return
        self.settled = True
        if error.kind == "ejected":
            self.worker.breaker.forget(self.admission)
            return
        self.proxy.count_failure(self.worker, self.admission, self.call)
        self.proxy.suspect(self.worker, error)

    def close(self) -> None:
        """Give back connection and load, whatever happened."""
        worker = self.worker
        worker.in_flight -= 1
        worker.pending_tokens -= self.todo_tokens
        self.todo_tokens = 0
        self._prefilled()
        if not self.settled:  # cancelled: says nothing of the worker
            worker.breaker.forget(self.admission)
        if self.connection is not None:
            self.connection.release()
        if worker.in_flight == 0 and worker.idle_waiter is not None and not worker.idle_waiter.done():
            worker.idle_waiter.set_result(None)


class Client:
    """The way back: ASGI `send`, and our own server's connection when it is ours."""

    __slots__ = ("connection", "send")

    def __init__(self, send, connection) -> None:
        self.send = send
        self.connection = connection


async def _watch(receive, task: asyncio.Task) -> None:
    """Cancel `task` when the client leaves; for ASGI servers without our connection hook."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            asyncio.get_running_loop().call_soon(task.cancel)
            return


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "payload_too_large", f"the request body exceeds {limit} bytes")


def _upstream_error(worker: Worker, error: UpstreamError) -> RequestError:
    status, code = 502, "upstream_error"
    if error.kind == "timeout":
        status, code = 504, "upstream_timeout"
    elif error.kind == "connect":
        code = "upstream_unreachable"
    return RequestError(status, code, f"worker {worker.url}: {error}")
