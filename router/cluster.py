"""Several gateway processes on one port (`--workers-processes N`), and what they share.

The supervisor owns the registry: it registers, drains, discovers and probes workers, answers control
routes, adds up metrics, and passes each member's loads and placements on to the others. It carries no
data requests. Members share the port by SO_REUSEPORT; one that dies or is frozen is started again.
"""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from router import link as frames
from router.app import Gateway
from router.config import RouterConfig
from router.link import Link
from router.member import Answer, Ask, Loads, State, WorkerState, shared_port
from router.metrics import Snapshot
from router.workers import Worker

log = logging.getLogger("router")

RESTART_PAUSE_S = (0.1, 10.0)  # first and longest; a member that lived for STABLE_S starts over
STABLE_S = 10.0
MAX_EARLY_DEATHS = 3
COUNT_TIMEOUT_S = 2.0
END_GRACE_S = 5.0  # beyond the members' own
PING_S = 1.0
MAX_UNANSWERED = 5  # pings in a row; its event loop never stands still for that long
MAX_STARTING = 60  # pings until a member is ready, most of them spent on imports


class ClusterFailed(RuntimeError):
    """The members cannot be started; the message says how one ended."""


class Process:
    """One member as the supervisor sees it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: asyncio.subprocess.Process | None = None
        self.link: Link | None = None
        self.ready = False
        self.unanswered = 0  # pings since it was last heard
        self.seen = 0  # version of the State it has taken in
        self.prompt_tokens = 0  # of its answers
        self.cached_tokens: dict[str, int] = {}  # by tier
        self.counted: Snapshot = {}  # as last asked


class Cluster:
    """Owns the members. `gateway` has the registry and is never served data requests."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.gateway = Gateway(config, owner=True)
        self.gateway.ask_counts = self.counts
        self.members = [Process(i) for i in range(config.workers_processes)]
        self.version = 0
        self.last_state = b""
        self.announcing = False
        self.ending = asyncio.Event()
        self.departed: Snapshot = {}  # counts of members that died
        self.departed_prompt_tokens = 0
        self.departed_cached_tokens: dict[str, int] = {}
        self.counting: dict[int, tuple[set[int], asyncio.Future[None]]] = {}
        self.failed: asyncio.Future[None] | None = None
        self.port = config.port
        self._news: asyncio.Event = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()
        gateway = self.gateway
        gateway.registry.on_changed.append(self._announce_soon)
        gateway.control.on_flushed = lambda w: self._tell(frames.CLEARED, w.id)
        gateway.jobs.wait_elsewhere = self._idle_elsewhere
        gateway.hit_tokens = self._hit_tokens

    async def serve(self, on_started: Callable[[], None] | None = None) -> None:
        """Until told to end. Raises OSError when the port is taken, ClusterFailed when members die early."""
        loop = asyncio.get_running_loop()
        reserved = shared_port(self.config.host, self.config.port)  # bound, not listening: gets nothing
        self.port = reserved.getsockname()[1]
        self.failed = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end, number)
        try:
            async with self.gateway.running():
                running = [asyncio.create_task(self._supervise(m)) for m in self.members]
                log.info("%d processes on http://%s:%d", len(self.members), self.config.host, self.port)
                if on_started is not None:
                    on_started()
                everyone = asyncio.gather(*running)
                await asyncio.wait((everyone, self.failed), return_when=asyncio.FIRST_COMPLETED)
                if self.failed.done():
                    self.end(signal.SIGTERM)
                    await everyone
                    self.failed.result()
                await everyone
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            reserved.close()

    def end(self, number: int = signal.SIGTERM) -> None:
        """Tell every member; a second signal ends them at once, as it does a gateway of one process."""
        self.ending.set()
        self.gateway.draining = True
        for member in self.members:
            if member.process is not None and member.process.returncode is None:
                member.process.send_signal(number)

    def stop(self) -> None:
        self.end(signal.SIGTERM)

    # ---- the members' lives ----

    async def _supervise(self, member: Process) -> None:
        pause_s, early_deaths = RESTART_PAUSE_S[0], 0
        while not self.ending.is_set():
            started_s = time.monotonic()
            try:
                end = str(await self._run(member))
            except Exception as error:  # no process could be started, or our bug: the others serve on
                log.exception("process %d", member.index)
                end = repr(error)
            if self.ending.is_set():
                return
            lived_s = time.monotonic() - started_s
            early_deaths = 0 if member.ready else early_deaths + 1
            # While another one serves, this one is tried again: what keeps it from starting may pass.
            if early_deaths >= MAX_EARLY_DEATHS and not any(m.ready for m in self.members):
                assert self.failed is not None
                if not self.failed.done():
                    message = f"gateway process {member.index} ended with {end} before it was ready"
                    self.failed.set_exception(ClusterFailed(message))
                return
            pause_s = RESTART_PAUSE_S[0] if lived_s > STABLE_S else min(pause_s * 2, RESTART_PAUSE_S[1])
            log.error("process %d ended with %s; restarting in %.1f s", member.index, end, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self.ending.wait()

    async def _run(self, member: Process) -> int:
        """One life of a member; returns its exit code, negative for a signal."""
        member.ready, member.seen, member.unanswered = False, 0, 0
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "router.member", str(theirs.fileno()),
                pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        member.process = process
        try:
            member.link = await Link.open(
                ours, lambda kind, payload: self._take(member, kind, payload), lambda: None
            )
            values = dataclasses.asdict(self.config)
            member.link.send(frames.CONFIG, (member.index, self.port, values))
            self._send_state(member)
            if self.ending.is_set():
                process.send_signal(signal.SIGTERM)
            return await self._ended(member, process)
        except Exception:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        finally:
            if member.link is not None:
                member.link.close()
                member.link = None
            self._forget(member)

    async def _ended(self, member: Process, process: asyncio.subprocess.Process) -> int:
        """Wait for the end of the process; bring it about when it is frozen or out of grace."""
        waiting = asyncio.ensure_future(process.wait())
        left_s = self.config.shutdown_grace_period_secs + END_GRACE_S
        while True:
            await asyncio.wait((waiting,), timeout=PING_S)
            if waiting.done():
                return waiting.result()
            left_s -= PING_S if self.ending.is_set() else 0.0
            # Pings are counted, not timed: a supervisor that was stopped itself blames nobody.
            member.unanswered += 1
            if member.ready and member.link is not None:
                member.link.send(frames.PING, None)
            frozen = member.unanswered > (MAX_UNANSWERED if member.ready else MAX_STARTING)
            if frozen:
                log.error("process %d is frozen and is ended", member.index)
            if frozen or left_s <= 0:
                with contextlib.suppress(ProcessLookupError):  # it has just ended; `waiting` will be told
                    process.kill()

    def _forget(self, member: Process) -> None:
        """It died: its requests are no load any more, and its counts stay counted."""
        for worker in self.gateway.registry:
            worker.set_share(member.index, None)
        self._tell(frames.GONE, member.index)
        add_counts(self.departed, member.counted)
        member.counted = {}
        self.departed_prompt_tokens += member.prompt_tokens
        self.departed_cached_tokens = _added(self.departed_cached_tokens, member.cached_tokens)
        member.prompt_tokens, member.cached_tokens = 0, {}
        for left, done in self.counting.values():
            left.discard(member.index)
            if not left and not done.done():
                done.set_result(None)
        self._wake()

    # ---- frames ----

    def _take(self, member: Process, kind: int, payload: bytes) -> None:
        member.unanswered = 0
        if kind in (frames.NEWS, frames.LOADS):
            for other in self.members:
                if other is not member and other.link is not None:
                    other.link.send_raw(kind, payload)
        if kind == frames.LOADS:
            self._take_loads(member, msgspec.msgpack.decode(payload, type=Loads))
        elif kind == frames.ASK:
            task = asyncio.ensure_future(self._answer(member, msgspec.msgpack.decode(payload, type=Ask)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == frames.READY:
            member.ready = True
        elif kind == frames.COUNTED:
            number, encoded = msgspec.msgpack.decode(payload, type=tuple[int, Snapshot])
            member.counted = encoded
            if number in self.counting:
                left, done = self.counting[number]
                left.discard(member.index)
                if not left and not done.done():
                    done.set_result(None)

    def _take_loads(self, member: Process, loads: Loads) -> None:
        workers = self.gateway.registry.workers
        for worker_id, share in loads.shares.items():
            worker = workers.get(worker_id)
            if worker is not None:
                worker.set_share(member.index, share)
        for worker_id in loads.suspects:
            worker = workers.get(worker_id)
            if worker is not None and worker.suspected is not None:
                worker.suspected.set()
        for worker_id, instance in loads.replaced.items():
            worker = workers.get(worker_id)
            if worker is not None and (instance is None or worker.instance_id != instance):
                self.gateway.jobs.replaced(worker)
        member.seen = loads.seen
        member.prompt_tokens, member.cached_tokens = loads.prompt_tokens, loads.cached_tokens
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _tell(self, kind: int, value) -> None:
        for member in self.members:
            if member.link is not None:
                member.link.send(kind, value)

    def _announce_soon(self) -> None:
        if not self.announcing:
            self.announcing = True
            asyncio.get_running_loop().call_soon(self._announce)

    def _announce(self) -> None:
        """Send the registry to all, when it is not as last sent."""
        self.announcing = False
        workers = [_state_of(w) for w in self.gateway.registry]
        encoded = msgspec.msgpack.encode(workers)
        if encoded != self.last_state:
            self.last_state = encoded
            self.version += 1
            for member in self.members:
                self._send_state(member)

    def _send_state(self, member: Process) -> None:
        if member.link is not None:
            workers = [_state_of(w) for w in self.gateway.registry]
            member.link.send(frames.STATE, State(self.version, workers))

    async def _idle_elsewhere(self, worker: Worker) -> None:
        """Until every member knows that `worker` takes nothing new, and has nothing there."""
        self._announce()
        version = self.version
        while worker.sibling_requests or any(m.link is not None and m.seen < version for m in self.members):
            await self._news.wait()

    async def _answer(self, member: Process, ask: Ask) -> None:
        """Run one control request through this process's application."""
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": ask.method,
            "scheme": "http", "path": ask.path, "raw_path": ask.raw_path, "query_string": ask.query,
            "root_path": "", "headers": ask.headers, "server": ("gateway", self.port), "client": None,
        }  # fmt: skip
        parts: list[bytes] = []
        status, headers = 500, []

        async def receive():
            return {"type": "http.request", "body": ask.body, "more_body": False}

        async def send(message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message.get("headers", ()))
            else:
                parts.append(message.get("body", b""))

        try:
            await self.gateway(scope, receive, send)
        except Exception:  # starlette has answered 500, and raises for the log
            log.exception("%s %s", ask.method, ask.path)
        if member.link is not None:
            member.link.send(frames.ANSWER, Answer(ask.id, status, headers, b"".join(parts)))

    # ---- metrics ----

    async def counts(self) -> list[Snapshot]:
        """The counts of all members, those that died included; a member that does not answer: its last."""
        number = time.monotonic_ns()
        left = {m.index for m in self.members if m.link is not None and m.ready}
        done = asyncio.get_running_loop().create_future()
        self.counting[number] = (left, done)
        self._tell(frames.COUNT, number)
        try:
            if left:
                async with asyncio.timeout(COUNT_TIMEOUT_S):
                    await done
        except TimeoutError:
            log.warning("processes %s did not tell their metrics", sorted(left))
        finally:
            del self.counting[number]
        return [self.departed, *(m.counted for m in self.members)]

    def _hit_tokens(self) -> tuple[int, dict[str, int]]:
        prompt_tokens = self.departed_prompt_tokens + sum(m.prompt_tokens for m in self.members)
        return prompt_tokens, _added(self.departed_cached_tokens, *(m.cached_tokens for m in self.members))


def _added(*counts: dict[str, int]) -> dict[str, int]:
    return {name: sum(c.get(name, 0) for c in counts) for c in counts for name in c}


def _state_of(w: Worker) -> WorkerState:
    return WorkerState(
        w.id, w.spec, w.dp_rank, w.status, w.models, w.info, w.source, w.takes_ids, w.resumes,
        w.capacity_tokens, w.page_size, w.dp_size, w.instance_id,
    )  # fmt: skip


def add_counts(total: Snapshot, more: Snapshot) -> None:
    """Add the counters and histograms of `more` to `total`; gauges are of the living only."""
    for name, (kind, samples) in more.items():
        if kind == "gauge":
            continue
        _, into = total.setdefault(name, (kind, []))
        known = {tuple(labels): i for i, (labels, _) in enumerate(into)}
        for labels, values in samples:
            at = known.get(tuple(labels))
            if at is None:
                into.append((labels, list(values)))
            else:
                before = into[at][1]
                into[at] = (into[at][0], [a + b for a, b in zip(before, values, strict=True)])
