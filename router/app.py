"""The gateway as an ASGI application: data routes go straight to the proxy, the rest to starlette."""

import asyncio
import logging
import random
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from router.breaker import Breaker
from router.call import ROUTES
from router.certificates import workers_tls
from router.config import RouterConfig
from router.control import Control
from router.discovery import FileSource, KubernetesSource, Reconciler
from router.errors import RequestError, send_error
from router.exact import Exact
from router.health import Monitor
from router.jobs import Jobs
from router.limits import Keys
from router.metrics import Metrics, Snapshot
from router.policies import make_policy
from router.policies.manual import Manual
from router.proxy import Proxy
from router.short_way import ShortWay
from router.tracing import Tracer
from router.upstream import AGES_S, Address, Pool, UpstreamError
from router.worker_api import WorkerApi
from router.workers import Registry, Worker, WorkerSpec, breaker_numbers

log = logging.getLogger("router")

ADMIN_PATHS = frozenset(("/workers", "/flush_cache"))
LOCAL_PATHS = frozenset(("/health", "/liveness", "/readiness"))  # each process answers for itself


class Gateway:
    """One ASGI application and everything it owns. Built before the loop, started by its lifespan."""

    def __init__(
        self, config: RouterConfig, rng: random.Random | None = None, *, owner: bool = False
    ) -> None:
        """`owner`: the supervisor of several processes, which routes nothing itself."""
        self.config = config
        # Set by the processes of one gateway:
        self.ask: Callable[..., Awaitable[None]] | None = None  # answers control requests elsewhere
        self.ask_counts: Callable[[], Awaitable[list[Snapshot]]] | None = None
        self.num_connections: Callable[[], int] = lambda: 0  # of clients; set by the server
        self.on_started: Callable[[], None] | None = None
        self.hit_tokens: Callable[[], tuple[int, dict[str, int]]] = self._own_hit_tokens
        self.metrics = Metrics()
        self.registry = Registry(self._make_worker)
        self.policy = make_policy(config.effective_policy, config, rng)
        self.registry.on_removed.append(self.policy.forget)
        self.keys = Keys(config.api_key, config.api_keys, config.control_plane_api_keys)
        self.monitor = Monitor(config, self.registry, self.policy, self.metrics)
        self.jobs = Jobs(config, self.registry, self.monitor, self.metrics)
        self.monitor.relearn = self.jobs.relearn
        self.exact: Exact | None = None
        if config.effective_policy == "cache_aware" and not owner:
            self.exact = self.jobs.exact = Exact(self.registry, self.metrics, config.tokenizer_path)
        self.tracer = Tracer(config.otlp_traces_endpoint) if config.enable_trace else None
        self.control = Control(self.registry, self.policy, lambda: self.draining, self.metrics_text)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.proxy: Proxy | None = None
        self.draining = False
        self._tls: ssl.SSLContext | None = None
        api = WorkerApi(self.registry, self.jobs)
        guarded = [*self.control.guarded_routes(), *api.routes()]
        self.guarded_paths = {route.path.partition("/{")[0] for route in guarded}
        self.app = Starlette(
            routes=[*self.control.public_routes(), *guarded],
            lifespan=self._lifespan,
            exception_handlers={
                HTTPException: _http_error,
                RequestError: _request_error,
                Exception: _our_bug,
            },
        )
        self._watch_state()

    def __call__(self, scope, receive, send) -> Awaitable[None]:
        """The ASGI application: data routes go to the proxy without another coroutine in between."""
        if scope["type"] == "http":
            route = ROUTES.get(scope["path"])
            if route is not None and scope["method"] == "POST":
                assert self.proxy is not None
                return self.proxy.serve(route, scope, receive, send)
        return self._serve_control(scope, receive, send)

    def short_way(self, request) -> bool:
        """Whether a data request that came whole (`http_server.Request`) is under way; else call the app."""
        return request.head.method == "POST" and self.proxy is not None and ShortWay.take(self.proxy, request)

    async def _serve_control(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path in ROUTES:
                await send_error(send, _method_not_allowed(scope["method"], path, (("allow", "POST"),)))
                return
            root = "/" + path.removeprefix("/").partition("/")[0]  # the path may be "*"
            if self.keys.tokens and (path in self.guarded_paths or root in self.guarded_paths):
                headers = dict(scope["headers"])
                check = self.keys.check_admin if root in ADMIN_PATHS else self.keys.check
                try:
                    check(headers.get(b"authorization"), headers.get(b"x-api-key"))
                except RequestError as error:
                    await send_error(send, error)
                    return
            if self.ask is not None and path not in LOCAL_PATHS:
                await self.ask(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def wait_idle(self) -> None:
        """Until no data request is in flight."""
        if self.proxy is not None:
            await self.proxy.concurrency.wait_idle()

    def cut_off(self) -> None:
        """Out of grace: end what runs at workers and begin nothing elsewhere, so that clients are told."""
        for worker in self.registry:
            self.registry.set_status(worker, "draining")
        for worker in self.registry:
            worker.pool.fail_active(UpstreamError("the gateway is shutting down", kind="ejected"))

    async def metrics_text(self) -> bytes:
        """The metrics of all processes of this gateway."""
        return self.metrics.text(await self.ask_counts() if self.ask_counts is not None else ())

    def running(self) -> AbstractAsyncContextManager[None]:
        """The gateway's life without a server around it."""
        return self._lifespan(self.app)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette):
        self.loop = asyncio.get_running_loop()
        self.proxy = Proxy(
            self.config,
            self.registry,
            self.policy,
            self.metrics,
            self.keys,
            exact=self.exact,
            tracer=self.tracer,
            suspect=self.monitor.suspect,
        )
        self.proxy.on_replaced = self.jobs.replaced
        if self.on_started is not None:
            self.on_started()
        if self.config.effective_policy != self.config.policy:
            log.info(
                "policy %s: cache_threshold, balance_abs_threshold or balance_rel_threshold is given",
                self.config.effective_policy,
            )
        for url in self.config.worker_urls:
            self.jobs.add(WorkerSpec(url=url), source="flags")
        background = [asyncio.create_task(self._sweep())]
        if self.tracer is not None:
            background.append(asyncio.create_task(self.tracer.run()))
        for source in self._sources():
            background.append(asyncio.create_task(source.run()))
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            if self.tracer is not None:
                await self.tracer.flush()
            await self.jobs.close()
            await self.monitor.close()
            if self.exact is not None:
                await self.exact.close()
            for worker in self.registry:
                worker.pool.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.config.eviction_interval_secs)
            self.policy.sweep(asyncio.get_running_loop().time())

    def _sources(self) -> list[FileSource | KubernetesSource]:
        c, out = self.config, []
        if c.discovery_file:
            reconciler = Reconciler("file", self.registry, self.jobs, self.metrics)
            out.append(FileSource(c.discovery_file, reconciler))
        if c.service_discovery:
            reconciler = Reconciler("kubernetes", self.registry, self.jobs, self.metrics)
            out.append(KubernetesSource(c, reconciler))
        return out

    def _make_worker(self, spec: WorkerSpec, dp_rank: int | None) -> Worker:
        """Raises ValueError for a bad URL."""
        c = self.config
        address = Address.parse(spec.url)
        breaker = Breaker(
            lambda: asyncio.get_running_loop().time(),
            failure_threshold=c.cb_failure_threshold,
            success_threshold=c.cb_success_threshold,
            timeout_s=c.cb_timeout_duration_secs,
            timeout_max_s=c.cb_timeout_max_secs,
            enabled=not c.disable_circuit_breaker,
        )
        tls = self._worker_tls() if address.scheme == "https" else None
        worker = Worker(spec, breaker, Pool(address, tls=tls), dp_rank=dp_rank)

        def changed(old: str, new: str) -> None:
            self.metrics.cb_transitions.of(worker.url, old, new).add()
            self.registry.changed()
            log.warning("worker %s: circuit breaker %s -> %s", worker.url, old, new)

        breaker.on_change = changed
        return worker

    def _worker_tls(self) -> ssl.SSLContext:
        """Made once: reading the system's certificates takes 10 ms."""
        if self._tls is None:
            c = self.config
            self._tls = workers_tls(c.ca_cert_paths, c.client_cert_path, c.client_key_path)
        return self._tls

    def _watch_state(self) -> None:
        registry, watch = self.registry, self.metrics.watch
        by_worker = ("worker",)
        kind = ("regular", "http")

        def each(value):
            return lambda: {(w.url,): float(value(w)) for w in registry}

        def pool_sizes() -> dict[tuple[str, ...], float]:
            sizes: dict[tuple[str, ...], float] = {}
            for w in registry:
                label = (*kind, w.models[0] if w.models else "unknown")
                sizes[label] = sizes.get(label, 0) + 1
            return sizes

        watch("smg_worker_pool_size", "workers", ("worker_type", "connection_mode", "model"), pool_sizes)
        watch(
            "smg_worker_connections_active",
            "connections in use",
            ("worker_type", "connection_mode"),
            lambda: {kind: float(sum(len(w.pool.active) for w in registry))},
            "sum",
        )
        watch(
            "smg_worker_requests_active", "requests in flight", by_worker, each(lambda w: w.in_flight),
            "sum",
        )  # fmt: skip
        watch("smg_worker_health", "1: may be chosen", by_worker, each(lambda w: w.healthy))
        watch(
            "smg_worker_cb_state",
            "0 closed, 1 open, 2 half open",
            by_worker,
            lambda: breaker_numbers(registry),
            "max",
        )
        watch(
            "smg_worker_cb_consecutive_failures", "failures in a row", by_worker,
            each(lambda w: w.breaker.failures), "max",
        )  # fmt: skip
        watch(
            "smg_worker_cb_consecutive_successes", "good probes in a row", by_worker,
            each(lambda w: w.breaker.successes), "max",
        )  # fmt: skip
        watch(
            "router_worker_pending_tokens", "prompt tokens sent and not yet computed", by_worker,
            each(lambda w: w.pending_tokens), "sum",
        )  # fmt: skip
        watch(
            "smg_engine_running_requests", "running, as the worker reports it", by_worker,
            lambda: {(w.url,): float(w.load.running) for w in registry if w.load},
            "max",
        )  # fmt: skip
        watch(
            "smg_engine_waiting_requests", "waiting, as the worker reports it", by_worker,
            lambda: {(w.url,): float(w.load.waiting) for w in registry if w.load},
            "max",
        )  # fmt: skip
        watch(
            "smg_engine_token_usage", "share of KV in use, as the worker reports it", by_worker,
            lambda: {(w.url,): w.load.kv_usage for w in registry if w.load},
            "max",
        )  # fmt: skip
        watch(
            "smg_discovery_workers_discovered", "workers by who registered them", ("source",),
            lambda: _counted(w.source for w in registry),
        )  # fmt: skip
        watch(
            "sglang_cache_hit_rate", "cached share of prompt tokens, by cache tier", ("source",),
            self._hit_rate,
        )  # fmt: skip
        watch(
            "smg_http_connections_active", "connections of clients", (),
            lambda: {(): float(self.num_connections())}, "sum",
        )  # fmt: skip
        if isinstance(self.policy, Manual):
            manual = self.policy
            watch(
                "smg_manual_policy_cache_entries", "routing keys that have a place", (),
                lambda: {(): float(len(manual.keys))}, "max",
            )  # fmt: skip
            watch(
                "smg_worker_routing_keys_active", "routing keys at home there", by_worker,
                each(lambda w: manual.groups.get(w, 0)), "max",
            )  # fmt: skip
        watch(
            "smg_http_inflight_request_age_count", "requests at workers, by seconds since they were sent",
            ("gt", "le"), self._ages, "sum",
        )  # fmt: skip
        watch("smg_admission_inflight", "requests in flight", (), lambda: {(): float(self._running())}, "sum")
        watch(
            "router_admission_queue_depth", "requests waiting for a place", (),
            lambda: {(): float(len(self.proxy.concurrency.queue) if self.proxy else 0)},
            "sum",
        )  # fmt: skip
        if self.config.effective_policy == "cache_aware":
            watch(
                "router_kv_event_lag_seconds", "since the last KV event or keep-alive", by_worker,
                lambda: self.exact.lag_s() if self.exact is not None else {}, "max",
            )  # fmt: skip
            watch(
                "router_kv_pages", "pages known to be cached", by_worker,
                lambda: self.exact.pages() if self.exact is not None else {}, "max",
            )  # fmt: skip
        watch(
            "router_dispatch_waiting", "streams held back until a worker has room", (),
            lambda: {(): float(self.proxy.dispatch.num_waiting() if self.proxy else 0)},
            "sum",
        )  # fmt: skip
        watch(
            "router_policy_state", "sizes of the policy's memory", ("what",),
            lambda: {(name,): value for name, value in self.policy.stats().items()},
            "sum",
        )  # fmt: skip

    def _hit_rate(self) -> dict[tuple[str, ...], float]:
        prompt_tokens, by_tier = self.hit_tokens()
        return {(tier,): tokens / prompt_tokens for tier, tokens in by_tier.items()} if prompt_tokens else {}

    def _own_hit_tokens(self) -> tuple[int, dict[str, int]]:
        seen = self.proxy.recorder if self.proxy else None
        return (seen.prompt_tokens, seen.cached_tokens) if seen is not None else (0, {})

    def _ages(self) -> dict[tuple[str, ...], float]:
        counts = [0] * (len(AGES_S) + 1)
        for worker in self.registry:
            worker.pool.ages(counts)
        bounds = ("0", *map(str, AGES_S), "+Inf")
        return {(bounds[i], bounds[i + 1]): float(count) for i, count in enumerate(counts)}

    def _running(self) -> int:
        return self.proxy.concurrency.running if self.proxy else 0


def build_app(config: RouterConfig, rng: random.Random | None = None):
    """(the gateway, the ASGI application to serve): the gateway itself, inside CORS when asked for."""
    gateway = Gateway(config, rng)
    if not config.cors_allowed_origins:
        return gateway, gateway
    return gateway, CORSMiddleware(
        gateway,
        allow_origins=config.cors_allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "x-smg-routed-worker-id"],
    )


def _counted(items) -> dict[tuple[str, ...], float]:
    counts: dict[tuple[str, ...], float] = {}
    for item in items:
        counts[(item,)] = counts.get((item,), 0) + 1
    return counts


def _method_not_allowed(method: str, path: str, headers=()) -> RequestError:
    encoded = tuple((name.encode(), value.encode()) for name, value in headers)
    return RequestError(405, "method_not_allowed", f"{method} is not allowed on {path}", headers=encoded)


def _respond(error: RequestError) -> Response:
    response = Response(error.body(), error.status)
    response.raw_headers.extend(error.response_headers())
    return response


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _respond(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return _respond(RequestError(404, "unknown_url", f"there is nothing at {request.method} {path}"))
    if error.status_code == 405:
        return _respond(_method_not_allowed(request.method, path, tuple((error.headers or {}).items())))
    return _respond(RequestError(error.status_code, "http_error", str(error.detail)))


async def _our_bug(request: Request, error: Exception) -> Response:
    return _respond(RequestError(500, "internal_error", "the gateway failed; its log says why"))
