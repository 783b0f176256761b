"""One process of a gateway that has several: serves data routes, and keeps step with the others.

Started by `router.cluster` with one end of a socket pair. Workers come from the supervisor, which also
answers the control routes; health, breakers, KV events and connections are this process's own. It tells
the others its load at each worker, what it placed there and what it charged to whom, once a millisecond.
"""

import asyncio
import contextlib
import dataclasses
import gc
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from router import link as frames
from router.app import Gateway, build_app
from router.call import Call
from router.config import RouterConfig
from router.control_body import control_body
from router.errors import RequestError, send_error
from router.http_server import GatewayServer
from router.jobs import learn
from router.launch_router import loop_factory, set_up_logging, uvicorn_config
from router.link import Link
from router.listen import resolve
from router.workers import Share, Worker, WorkerSpec

FLUSH_S = 0.001
CONTROL_TIMEOUT_S = 40.0  # above the time a cache flush may take


class WorkerState(msgspec.Struct):
    """A worker as the supervisor registered it."""

    id: str
    spec: WorkerSpec
    dp_rank: int | None
    status: str
    models: tuple[str, ...]
    info: dict[str, Any]
    source: str
    takes_ids: bool
    resumes: bool
    capacity_tokens: int | None
    page_size: int | None
    dp_size: int
    instance_id: str | None


class State(msgspec.Struct):
    """All workers; `version` grows with every message."""

    version: int
    workers: list[WorkerState]


class Loads(msgspec.Struct):
    """What one process has at the workers (by id); those left out have not changed."""

    index: int
    seen: int  # version of the last State it has taken in
    shares: dict[str, Share]
    suspects: list[str]  # workers that should be probed now
    replaced: dict[str, str | None]  # workers that may be other engines now, and the instance last seen
    prompt_tokens: int
    cached_tokens: dict[str, int]


class News(msgspec.Struct):
    """Requests placed, as policies tell of them, and tokens charged to callers."""

    placed: list[tuple[str, Any]]
    charges: list[tuple[str, int]]


class Ask(msgspec.Struct):
    """A control request for the supervisor."""

    id: int
    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Answer(msgspec.Struct):
    id: int
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


_loads = msgspec.msgpack.Decoder(Loads).decode
_news = msgspec.msgpack.Decoder(News).decode


class Member:
    """The gateway of this process and its link to the others."""

    def __init__(self, index: int, config: RouterConfig) -> None:
        self.index = index
        config = part_of(config, index)
        self.gateway, self.app = build_app(config)
        self.gateway.ask = self.ask
        self.link: Link = None  # type: ignore[assignment]  # set before anything runs
        self.version = 0
        self.asked: dict[int, asyncio.Future[Answer]] = {}
        self.next_ask = 0
        self.dirty: set[str] = set()
        self.suspects: set[str] = set()
        self.replaced: dict[str, str | None] = {}
        self.placed: list[tuple[str, Any]] = []
        self.charges: list[tuple[str, int]] = []
        self.flushing = False
        self.tasks: set[asyncio.Task] = set()
        gateway = self.gateway
        gateway.registry.on_changed.append(self._changed)
        gateway.registry.on_removed.append(lambda worker: self.dirty.discard(worker.id))
        gateway.monitor.on_ejected = self._ejected
        gateway.monitor.relearn = self._relearn
        gateway.on_started = self._started

    def _started(self) -> None:
        proxy = self.gateway.proxy
        assert proxy is not None
        proxy.on_placed = self._placed
        proxy.on_replaced = self._replaced
        proxy.token_rate.on_charged = self._charged

    # ---- from the others ----

    def take(self, kind: int, payload: bytes) -> None:
        gateway = self.gateway
        workers = gateway.registry.workers
        if kind == frames.NEWS:
            news = _news(payload)
            for worker_id, told in news.placed:
                worker = workers.get(worker_id)
                if worker is not None:
                    gateway.policy.heard(worker, told)
            if news.charges and gateway.proxy is not None:
                for caller, tokens in news.charges:
                    gateway.proxy.token_rate.heard(caller, tokens)
        elif kind == frames.LOADS:
            loads = _loads(payload)
            for worker_id, share in loads.shares.items():
                worker = workers.get(worker_id)
                if worker is not None:
                    worker.set_share(loads.index, share)
                    self._freed(worker)
            for worker_id in loads.suspects:
                worker = workers.get(worker_id)
                if worker is not None and worker.suspected is not None:
                    worker.suspected.set()
        elif kind == frames.STATE:
            self._synchronize(msgspec.msgpack.decode(payload, type=State))
        elif kind == frames.CLEARED:
            worker = workers.get(msgspec.msgpack.decode(payload))
            if worker is not None:
                gateway.policy.cleared(worker)
        elif kind == frames.GONE:
            index = msgspec.msgpack.decode(payload)
            for worker in gateway.registry:
                worker.set_share(index, None)
                self._freed(worker)
        elif kind == frames.COUNT:
            self.link.send(frames.COUNTED, (msgspec.msgpack.decode(payload), gateway.metrics.snapshot()))
        elif kind == frames.PING:
            self.link.send(frames.PONG, None)
        elif kind == frames.ANSWER:
            answer = msgspec.msgpack.decode(payload, type=Answer)
            waiting = self.asked.get(answer.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    def _freed(self, worker: Worker) -> None:
        proxy = self.gateway.proxy
        if proxy is not None and proxy.dispatch.waiting.get(worker):
            proxy.dispatch.freed(worker)

    def _synchronize(self, state: State) -> None:
        """Make the registry that of the supervisor, but for what is judged here: health and breakers."""
        registry = self.gateway.registry
        listed = {s.id for s in state.workers}
        for worker in registry:
            if worker.id not in listed:
                registry.remove(worker)
        news: set[str] = set()  # URLs of processes that are new or not as they were
        for told in state.workers:
            if told.status == "pending" or told.status == "failed":
                continue
            worker = registry.workers.get(told.id)
            if worker is None:
                worker = registry.make_worker(told.spec, told.dp_rank)
                worker.id = told.id
                worker.on_load = self._loaded
                self._learn(worker, told)
                registry.add(worker)
                registry.set_status(worker, "draining" if told.status == "draining" else "ready")
                self.gateway.monitor.watch(worker)
                news.add(worker.spec.url)
            else:
                if worker.spec != told.spec:
                    worker.respec(told.spec)
                if (worker.info, worker.models) != (told.info, told.models):
                    news.add(worker.spec.url)
                self._learn(worker, told)
                if told.status == "draining":
                    registry.set_status(worker, "draining")
        registry.changed()
        self.version = state.version
        if news and self.gateway.exact is not None:
            self._spawn(self._follow(news))
        self._flush_soon()

    def _learn(self, worker: Worker, told: WorkerState) -> None:
        worker.models, worker.info, worker.source = told.models, told.info, told.source
        worker.takes_ids, worker.resumes = told.takes_ids, told.resumes
        worker.capacity_tokens, worker.page_size = told.capacity_tokens, told.page_size
        worker.dp_size = told.dp_size
        if worker.instance_id is None:
            worker.instance_id = told.instance_id

    async def _follow(self, urls: set[str]) -> None:
        assert self.gateway.exact is not None
        for url in urls:
            ranks = [w for w in self.gateway.registry.of_process(url) if w.status != "draining"]
            if ranks:
                await self.gateway.exact.follow(ranks)

    def _spawn(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # ---- to the others ----

    def _loaded(self, worker: Worker) -> None:
        self.dirty.add(worker.id)
        if not self.flushing:
            self._flush_soon()

    def _placed(self, call: Call, worker: Worker) -> None:
        news = self.gateway.policy.news(call, worker)
        if news is not None:
            self.placed.append((worker.id, news))
        self._loaded(worker)

    def _charged(self, caller: str, tokens: int) -> None:
        self.charges.append((caller, tokens))
        self._flush_soon()

    def _changed(self) -> None:
        """A breaker or a status: the supervisor shows it."""
        if self.link is not None:
            self.dirty.update(self.gateway.registry.workers)
            self._flush_soon()

    def _ejected(self, worker: Worker) -> None:
        self.suspects.add(worker.id)
        self._flush_soon()

    def _replaced(self, worker: Worker) -> None:
        self.replaced[worker.id] = worker.instance_id
        self._flush_soon()

    async def _relearn(self, worker: Worker) -> None:
        """A worker is back. What it is now is for the supervisor to find out; the instance is for us."""
        await learn(worker)
        if self.gateway.exact is not None:
            others = [w for w in self.gateway.registry.of_process(worker.spec.url) if w is not worker]
            await self.gateway.exact.follow([worker, *(w for w in others if w.status != "draining")])
        self._replaced(worker)

    def _flush_soon(self) -> None:
        if not self.flushing:
            self.flushing = True
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        self.flushing = False
        gateway = self.gateway
        workers = gateway.registry.workers
        shares = {i: workers[i].share() for i in self.dirty if i in workers}
        seen = gateway.proxy.recorder if gateway.proxy is not None else None
        loads = Loads(
            self.index,
            self.version,
            shares,
            list(self.suspects),
            self.replaced,
            seen.prompt_tokens if seen else 0,
            seen.cached_tokens if seen else {},
        )
        if self.placed or self.charges:
            self.link.send(frames.NEWS, News(self.placed, self.charges))
            self.placed, self.charges = [], []
        self.link.send(frames.LOADS, loads)
        self.dirty.clear()
        self.suspects.clear()
        self.replaced = {}

    async def ask(self, scope, receive, send) -> None:
        """Have the supervisor answer a control request; an ASGI application."""
        try:
            body = await control_body(receive)
        except RequestError as error:
            await send_error(send, error)
            return
        self.next_ask += 1
        ask = Ask(
            self.next_ask, scope["method"], scope["path"], scope.get("raw_path") or b"",
            scope["query_string"], [(bytes(k), bytes(v)) for k, v in scope["headers"]], body,
        )  # fmt: skip
        waiting = self.asked[ask.id] = asyncio.get_running_loop().create_future()
        try:
            self.link.send(frames.ASK, ask)
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                answer = await waiting
        except TimeoutError:
            error = RequestError(504, "control_timeout", "the gateway's supervisor did not answer")
            await send_error(send, error)
            return
        finally:
            del self.asked[ask.id]
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})


def part_of(config: RouterConfig, index: int) -> RouterConfig:
    """The configuration of process `index`: its part of the limits, and no sources of workers."""

    def part(whole: int) -> int:
        return whole // config.workers_processes + (index < whole % config.workers_processes)

    limit = config.max_concurrent_requests
    return dataclasses.replace(
        config,
        worker_urls=(),
        discovery_file=None,
        service_discovery=False,
        remove_unhealthy_workers=False,
        max_concurrent_requests=part(limit) if limit >= 0 else limit,
        queue_size=part(config.queue_size),
    )


def shared_port(host: str, port: int) -> socket.socket:
    """A bound socket of a port that several processes listen on. Raises OSError when it is taken."""
    family, _, _, _, address = resolve(host, port)[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


class MemberServer(GatewayServer):
    """Calls `on_serving` once it listens: what fails before is a failed start."""

    on_serving: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_serving()


async def serve(fd: int) -> None:
    waiting: list[tuple[int, bytes]] = []
    configured: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    member: Member | None = None
    server: MemberServer | None = None

    def on_frame(kind: int, payload: bytes) -> None:
        if kind == frames.CONFIG:
            configured.set_result(payload)
        elif member is None or member.gateway.proxy is None:
            waiting.append((kind, payload))
        else:
            member.take(kind, payload)

    def on_lost() -> None:
        """The supervisor is gone: finish what runs, and end."""
        if not configured.done():
            configured.cancel()
        elif server is not None and not server.gateway.draining:
            server.handle_exit(signal.SIGTERM, None)

    link = await Link.open(socket.socket(fileno=fd), on_frame, on_lost)
    index, port, values = msgspec.msgpack.decode(await configured)
    config = RouterConfig.from_keywords(**values)
    set_up_logging(config)
    member = Member(index, config)
    member.link = link
    gateway: Gateway = member.gateway
    server = MemberServer(uvicorn_config(config, member.app), gateway, config.shutdown_grace_period_secs)
    server.on_serving = lambda: link.send(frames.READY, index)
    started = gateway.on_started

    def ready() -> None:
        assert member is not None and started is not None
        started()
        for kind, payload in waiting:
            member.take(kind, payload)
        waiting.clear()

    gateway.on_started = ready
    # It listens once the workers are known, so that a restarted process refuses nobody.
    await server.serve(sockets=[shared_port(config.host, port)])
    link.close()


def main() -> int:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    with (
        asyncio.Runner(loop_factory=loop_factory()) as runner,
        contextlib.suppress(asyncio.CancelledError),
    ):
        runner.run(serve(int(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
