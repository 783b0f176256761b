"""One data request from client to worker and back: all of it that `short_way` leaves to a task.

Plain ASGI. Bytes pass through; a stream flows as it comes, and is read no faster than the client takes
it. Another worker is tried only before the first byte has gone out. A client that leaves cancels the
task, which drops the worker's connection at once. Every request ends in an answer, an error event in
the client's protocol, or a cut connection when neither can be expressed.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from router.body import next_part
from router.breaker import NORMAL, Admission
from router.call import Call, Route, new_request_id
from router.config import RouterConfig
from router.dispatch import Dispatch
from router.errors import RequestError, send_error, stream_error_event
from router.exact import Exact
from router.exchange import Client, Exchange, reason_of
from router.headers import ClientHeaders, read_headers
from router.limits import Concurrency, Keys, TokenRate
from router.metrics import Metrics
from router.policies import Policy
from router.recorder import Recorder
from router.tracing import Tracer
from router.upstream import UpstreamError
from router.workers import Registry, Worker

if TYPE_CHECKING:
    from router.http_server import Request

UNCHARGED = contextlib.nullcontext()
RETRYABLE = frozenset((408, 429, 500, 502, 503, 504))
BACKPRESSURE = frozenset((408, 429, 503))  # the worker is busy, not broken


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
        tracer: Tracer | None = None,
        suspect: Callable[[Worker, UpstreamError], None],
        sleep=asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.registry = registry
        self.policy = policy
        self.keys = keys
        self.exact = exact
        self.tracer = tracer
        self.suspect = suspect
        self.sleep = sleep
        self.rng = rng or random.Random()
        self.loop = asyncio.get_running_loop()
        self.concurrency = Concurrency(
            config.max_concurrent_requests, config.queue_size, config.queue_timeout_secs
        )
        self.dispatch = Dispatch(
            registry, policy, config.prefill_window_tokens, self.loop.time, config.workers_processes
        )
        self.token_rate = TokenRate(config.rate_limit_tokens_per_second, self.loop.time)
        self.recorder = Recorder(metrics, config.effective_policy)
        self.on_placed: Callable[[Call, Worker], None] | None = None  # for other processes to hear of
        self.on_replaced: Callable[[Worker], None] = lambda worker: None  # another engine answers there
        self.direct = not config.cors_allowed_origins  # nothing wraps `send`
        unlimited = config.rate_limit_tokens_per_second is None and self.concurrency.limit < 0
        self.short = unlimited and tracer is None  # nothing to wait for or to tell: `ShortWay` may be tried
        self.id_ranks = {name.lower().encode(): i for i, name in enumerate(config.request_id_headers)}
        self.attempts = 1 if config.disable_retries else config.retry_max_retries
        self.stream_break_weight = config.cb_failure_threshold // 2 + 1  # two in a row open the breaker

    async def serve(self, route: Route, scope, receive, send) -> None:
        """One request as an ASGI call. Returns when its last byte is out or its client has left."""
        task = asyncio.current_task()
        assert task is not None
        request: Request | None = scope.pop("router.request", None)  # which has the scope: not both ways
        connection = begun = call = exchange = None
        if request is not None:
            connection, begun, request.begun = request.connection, request.begun, None
            connection.on_lost = task.cancel
            if connection.lost:
                task.cancel()
        watcher = None
        recorder = self.recorder
        if begun is not None:
            started_s, client, call, exchange = begun.started_s, begun.client, begun.call, begun.exchange
            request_id = call.request_id
        else:
            started_s = self.loop.time()
            client = read_headers(scope["headers"], self.id_ranks)
            request_id = client.request_id or new_request_id(route.id_prefix)
        status = 0
        tracer = self.tracer
        span = tracer.start(client, route.path) if tracer is not None else None
        try:
            try:
                caller = self.keys.check(client.authorization, client.x_api_key)
                if call is None:
                    body = request.whole_body() if request is not None else None
                    if body is None:
                        body = await self._read_body(client, receive)
                    call = self.read(route, client, request_id, body)
                if connection is None:
                    watcher = self.loop.create_task(_watch(receive, task))
                with self._charged(caller, call) if self.token_rate.is_limited else UNCHARGED:
                    if exchange is not None:
                        pass  # it is in already
                    elif self.concurrency.limit >= 0:
                        await self._enter(call)
                    else:
                        self.concurrency.running += 1
                    try:
                        if exchange is None and self.exact is not None and self.exact.subscriptions:
                            await self.exact.prepare(call)
                        target = scope.get("raw_path") or scope["path"].encode()
                        if scope["query_string"]:
                            target += b"?" + scope["query_string"]
                        tokens = await self._forward(
                            call,
                            scope["method"],
                            target,
                            client,
                            Client(send, request if self.direct else None),
                            started_s,
                            exchange,
                        )
                        if tokens:
                            self.token_rate.charge(caller, tokens)
                    finally:
                        self.concurrency.leave()
            except RequestError as error:
                status = error.status
                recorder.refused(route.path, call, error, self.loop.time() - started_s)
                await send_error(send, error, request_id)
            except CutOff:
                if request is None:
                    raise
                request.cut()
        except asyncio.CancelledError:
            lost = connection.lost if connection is not None else watcher is not None and watcher.done()
            if not lost:
                raise
            task.uncancel()
            recorder.client_left(route.path)
        finally:
            if span is not None and tracer is not None:
                tracer.end(span, call, request_id, status or (call.status if call is not None else 0))
            if connection is not None:
                connection.on_lost = None
            if watcher is not None:
                watcher.cancel()

    # ---- before a worker is chosen ----

    async def _read_body(self, client: ClientHeaders, receive) -> bytes:
        limit = self.config.max_payload_size
        if client.content_length > limit:
            raise _too_large(limit)
        since_s = self.loop.time()
        message = await next_part(receive, 0, since_s)
        body = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [body], len(body)
            while message.get("more_body"):
                message = await next_part(receive, size, since_s)
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
            body = b"".join(parts)
        if message["type"] == "http.disconnect":
            raise RequestError(400, "client_closed", "the client closed the connection mid-request")
        return body

    def read(self, route: Route, client: ClientHeaders, request_id: bytes, body: bytes) -> Call:
        """The request that has this body. Raises RequestError(400, 413, 415)."""
        if len(body) > self.config.max_payload_size:
            raise _too_large(self.config.max_payload_size)
        call, kind = Call(route, body), client.content_type
        call.request_id = request_id
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
        if client.target_worker is not None:
            call.target_worker = self.registry.named(client.target_worker)
        return call

    @contextlib.contextmanager
    def _charged(self, caller: str, call: Call) -> Iterator[None]:
        """Charge the prompt, and give it back when nobody computed it. Raises RequestError(429).

        Computed is what was answered without an error, or at a worker when the client left or its time was
        over."""
        prompt_tokens = max(1, call.prompt_tokens or len(call.body) // 4)
        self.token_rate.admit(caller, prompt_tokens)
        computed = False
        try:
            yield
            computed = call.status < 400
        except RequestError as error:
            computed = error.status == 504
            raise
        except BaseException:
            computed = call.attempts > 0
            raise
        finally:
            if not computed:
                self.token_rate.charge(caller, -prompt_tokens)

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

    def select(self, call: Call, tried: list[Worker]) -> tuple[Worker, Admission]:
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
        to: Client,
        started_s: float,
        begun: Exchange | None,
    ) -> int:
        """Try workers until one answers, relay the answer; returns completion tokens if reported.

        `begun`: the first attempt, already under way."""
        tried: list[Worker] = []
        last: RequestError | None = None
        path = call.path
        with self._settled(call) as blamed:
            for attempt in range(self.attempts):
                exchange, begun = begun, None
                if exchange is None:
                    try:
                        worker, admission = self.select(call, tried)
                    except RequestError as error:
                        # What a worker said explains more than that there is no other one.
                        raise last or error from None
                    if worker in tried:
                        pause_s = self._backoff_s(attempt)
                        self.recorder.pause(attempt, pause_s)
                        await self.sleep(pause_s)
                        if worker.status != "ready" or not worker.breaker.closed:
                            continue
                    if self.dispatch.enabled and call.stream and admission == NORMAL:
                        worker, admission = await self._turn(call, worker, tried)
                    exchange = Exchange(self, call, worker, admission, started_s)
                worker, admission = exchange.worker, exchange.admission
                final = attempt == self.attempts - 1
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
                        others = any(
                            w is not worker and w not in tried for w in self.registry.usable(call.model)
                        )
                        # Broken workers are not asked twice; busy ones are, after a pause.
                        if not final and (others or status in BACKPRESSURE):
                            tried.append(worker)
                            self.recorder.retried(path)
                            continue
                        if len(blamed) > 1 and all(w in tried or w is worker for w, _ in blamed):
                            self._forgive(blamed)  # all say 500: it is the request
                    return await exchange.relay(to)
                except UpstreamError as error:
                    exchange.failed(error)
                    if exchange.started:  # bytes are out
                        if exchange.tracked and call.tracker is not None:
                            tried.append(worker)
                            return await self._resume(
                                call, method, target, client, to, started_s, tried, error
                            )
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
                    if blamed and (
                        exchange.started or (exchange.status and exchange.status not in RETRYABLE)
                    ):
                        self._blame(blamed, call)
            self.recorder.exhausted(path)
            raise last or RequestError(502, "upstream_error", "no attempt at the request succeeded")

    async def _turn(self, call: Call, worker: Worker, tried: list[Worker]) -> tuple[Worker, Admission]:
        """Wait until `worker`, or a better one by then, has room for a stream. Raises like `select`."""
        admission: Admission = NORMAL
        started_s = self.loop.time()
        waited = False
        while admission == NORMAL and worker.healthy and not self.dispatch.has_room(worker):
            waited = True
            chosen = await self.dispatch.turn(call, worker, tried)
            if chosen is not None:
                worker = chosen
                break
            worker, admission = self.select(call, tried)  # its worker went away: that is no attempt
        if waited:
            self.recorder.held(self.loop.time() - started_s)
        return worker, admission

    async def _resume(
        self,
        call: Call,
        method: str,
        target: bytes,
        client: ClientHeaders,
        to: Client,
        started_s: float,
        tried: list[Worker],
        error: UpstreamError,
    ) -> int:
        """Go on with a broken stream on workers that can; ends it with an error event when none does."""
        tracker = call.tracker
        assert tracker is not None
        tracker.broke()
        for _ in range(self.attempts):
            if tracker.done or error.kind == "timeout":
                break
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
            except UpstreamError as later:
                error = later
                exchange.failed(error)
                tracker.broke()
            finally:
                exchange.close()
        tokens = len(tracker.token_ids)
        if tracker.done:  # only the connection's own end was missing
            await to.send({"type": "http.response.body", "body": b""})
            self.recorder.finished(call, 200, started_s, self.loop.time(), completion_tokens=tokens)
            return tokens
        event = stream_error_event(call.path, reason_of(error))
        await to.send({"type": "http.response.body", "body": event})
        self.recorder.finished(call, 200, started_s, self.loop.time(), error="stream_error")
        return tokens

    def _blame(self, blamed: list[tuple[Worker, Admission]], call: Call) -> None:
        for worker, admission in blamed:
            self.count_failure(worker, admission, call)
        blamed.clear()

    @contextlib.contextmanager
    def _settled(self, call: Call) -> Iterator[list[tuple[Worker, Admission]]]:
        """For workers that said 500 and may yet be innocent: whose fault it was is settled in any case."""
        blamed: list[tuple[Worker, Admission]] = []
        try:
            yield blamed
        except asyncio.CancelledError:
            self._forgive(blamed)  # its client left before another worker could say
            raise
        finally:
            self._blame(blamed, call)

    def _forgive(self, blamed: list[tuple[Worker, Admission]]) -> None:
        for worker, admission in blamed:
            worker.breaker.forget(admission)
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
