"""Adding, changing and draining workers, each as a job that a caller can look up for five minutes."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from router.config import RouterConfig
from router.exact import Exact
from router.health import Monitor
from router.metrics import Metrics
from router.upstream import Pool, UpstreamError, json_of
from router.workers import Registry, Worker, WorkerSpec

log = logging.getLogger("router")

JOB_KEPT_S = 300.0
FIRST_PROBE_PAUSE_S = 0.1
LONGEST_PROBE_PAUSE_S = 1.0
MAX_RANKS = 1024  # of one worker: each is a worker of its own here
RELEARN_PAUSE_S = 1.0  # no engine is replaced as often; a URL with several behind it answers for each in turn


class Refused(Exception):
    """A worker operation that cannot be done: HTTP `status`, `code` of the worker API, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass
class Job:
    job_type: str  # AddWorker, UpdateWorker, RemoveWorker
    worker: Worker
    status: str = "pending"  # pending, processing, failed, done
    message: str | None = None
    timestamp: float = field(default_factory=time.time)
    task: asyncio.Task | None = None  # that does it

    def describe(self) -> dict[str, Any]:
        return {
            "job_type": self.job_type,
            "worker_url": self.worker.url,
            "status": self.status,
            "message": self.message,
            "timestamp": int(self.timestamp),
        }

    def go(self, status: str, message: str | None = None) -> None:
        self.status, self.message, self.timestamp = status, message, time.time()


class Jobs:
    """Runs one task per job; `close` ends them."""

    def __init__(self, config: RouterConfig, registry: Registry, monitor: Monitor, metrics: Metrics) -> None:
        self.config = config
        self.registry = registry
        self.monitor = monitor
        self.metrics = metrics
        self.exact: Exact | None = None
        self.wait_elsewhere: Callable[[Worker], Awaitable[None]] | None = None  # idle in other processes
        self.jobs: dict[str, Job] = {}  # by worker id
        self.tasks: set[asyncio.Task] = set()
        self.relearning: dict[str, asyncio.Task] = {}  # by process URL
        self.outdated: set[str] = set()  # of those, the ones that were replaced meanwhile

    def add(self, spec: WorkerSpec, source: str = "api") -> Worker:
        """Accept a worker; it serves once it answers. Raises Refused for a bad or known URL."""
        spec = self._keyed(msgspec.structs.replace(spec, url=spec.url.rstrip("/")))
        if self.registry.of_process(spec.url):
            raise Refused(409, "WORKER_ALREADY_EXISTS", f"Worker already exists at URL {spec.url}")
        try:
            worker = self.registry.make_worker(spec, None)
        except ValueError as error:
            raise Refused(400, "BAD_REQUEST", str(error)) from error
        worker.source = source
        self.registry.add(worker)
        self._start(Job("AddWorker", worker), self._register)
        return worker

    def update(self, worker: Worker, spec: WorkerSpec) -> None:
        """Replace what is known of a worker. Raises Refused: another URL, a draining or dp-rank worker."""
        if spec.url.rstrip("/") != worker.spec.url:
            raise Refused(400, "BAD_REQUEST", f"the URL of a worker cannot change ({worker.spec.url})")
        if worker.status == "draining":
            raise Refused(409, "WORKER_DRAINING", "the worker is being removed")
        if worker.dp_rank is not None:
            raise Refused(400, "BAD_REQUEST", "a data-parallel rank cannot be changed by itself")
        job = self.jobs.get(worker.id)
        worker.respec(self._keyed(msgspec.structs.replace(spec, url=worker.spec.url)))
        if spec.model_id:
            worker.models = (spec.model_id,)
        self.registry.changed()
        if job is None or job.status in ("done", "failed"):
            job = self._remember(Job("UpdateWorker", worker))
            job.go("done")

    def remove(self, worker: Worker, reason: str = "api") -> None:
        """Take nothing new, let what runs finish, then forget it (all dp ranks of its process)."""
        for rank in self.registry.of_process(worker.spec.url):
            if rank.status == "draining":
                continue
            running = self.jobs.get(rank.id)
            if running is not None and running.status in ("pending", "processing"):
                running.go("failed", "removed before it was ready")
                if rank.status == "pending" and running.task is not None:
                    running.task.cancel()  # or it would be probed until worker_startup_timeout_secs
            self._retire(rank, reason)

    def replaced(self, worker: Worker) -> None:
        """Another engine answers at the worker's URL: learn it, beside what runs."""
        if worker.spec.url in self.relearning:  # which may have asked the one before
            self.outdated.add(worker.spec.url)
        since_s = asyncio.get_running_loop().time() - worker.relearned_s
        self._relearn_soon(worker, max(0.0, RELEARN_PAUSE_S - since_s))

    async def relearn(self, worker: Worker) -> None:
        """Register the process behind `worker` anew: what it says of itself, and its ranks."""
        await asyncio.shield(self._relearn_soon(worker))  # who asks may be a rank that it ends

    def find(self, worker_id: str) -> tuple[Worker, Job | None] | None:
        """A worker, registered or remembered by a failed job, with its last job; None when unknown."""
        self._expire()
        worker, job = self.registry.workers.get(worker_id), self.jobs.get(worker_id)
        if worker is None and job is not None and job.job_type == "AddWorker":
            worker = job.worker
        return None if worker is None else (worker, job)

    async def close(self) -> None:
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # ---- the jobs ----

    async def _register(self, job: Job) -> None:
        worker = job.worker
        job.go("processing", "waiting for the worker to become healthy")
        try:
            async with asyncio.timeout(self.config.worker_startup_timeout_secs):
                await self._wait_healthy(worker, job)
                await learn(worker)
        except TimeoutError:
            seconds = self.config.worker_startup_timeout_secs
            job.go("failed", f"not ready within {seconds:g} s: {job.message}")
            log.error("worker %s: %s", worker.url, job.message)
            self.metrics.registrations.of(worker.source, "failed").add()
            worker.status = "failed"
            self.registry.remove(worker)
            return
        if worker.status != "pending":  # removed meanwhile
            return
        ranks = self._ranks_of(worker)
        if ranks == [None]:
            self._ready(worker)
        else:  # one process becomes one worker per data-parallel rank; the first keeps the job's id
            self.registry.remove(worker)
            job.worker, *_ = [self._add_rank(worker, r, None if r else worker.id) for r in ranks]
        if self.exact is not None:
            await self.exact.follow(self.registry.of_process(worker.spec.url))
        job.go("done")
        self.metrics.registrations.of(worker.source, "success").add()
        log.info("worker %s is ready (models: %s)", worker.url, ", ".join(worker.models) or "any")

    def _ready(self, worker: Worker) -> None:
        self.registry.set_status(worker, "ready")
        self.registry.changed()
        self.monitor.watch(worker)

    def _ranks_of(self, worker: Worker) -> list[int | None]:
        """The data-parallel ranks that its process is to be routed to by; [None]: it is one worker."""
        split = self.config.dp_aware and worker.dp_size > 1
        return list(range(worker.dp_size)) if split else [None]

    def _add_rank(self, like: Worker, rank: int | None, worker_id: str | None = None) -> Worker:
        """A ready worker for one rank of the process behind `like`; `rank` None: for all of it."""
        part = self.registry.make_worker(like.spec, rank)
        part.id = worker_id or part.id
        part.source, part.models, part.instance_id = like.source, like.models, like.instance_id
        _take_info(part, like.info)
        drained = self.registry.by_url.get(part.url)
        if drained is not None:  # of a process that is gone
            self.registry.remove(drained)
        self.registry.add(part)
        self._ready(part)
        return part

    def _relearn_soon(self, worker: Worker, pause_s: float = 0.0) -> asyncio.Task:
        url = worker.spec.url
        task = self.relearning.get(url)
        if task is None:
            task = self.relearning[url] = asyncio.create_task(self._relearn(url, pause_s))
            self.tasks.add(task)
            task.add_done_callback(self._ended)
            task.add_done_callback(lambda task: self.relearning.pop(url))
        return task

    async def _relearn(self, url: str, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        await self._relearn_once(url)
        while url in self.outdated:
            await asyncio.sleep(RELEARN_PAUSE_S)
            await self._relearn_once(url)

    async def _relearn_once(self, url: str) -> None:
        self.outdated.discard(url)
        workers = self._in_use(url)
        if not workers:
            return
        before = {w: w.instance_id for w in workers}
        await learn(*workers)
        workers = [w for w in self._in_use(url) if w in before]
        if not workers:  # removed meanwhile
            return
        for worker in workers:
            worker.relearned_s = asyncio.get_running_loop().time()
            if worker.instance_id != before[worker]:  # another rank's answer has told
                self.monitor.policy.cleared(worker)
        wanted = self._ranks_of(workers[0])
        known = {w.dp_rank: w for w in workers}
        for rank in wanted:
            if rank not in known:
                self._add_rank(workers[0], rank)
        for rank, worker in known.items():
            if rank not in wanted:
                self._retire(worker, "replaced")
        self.registry.changed()
        if self.exact is not None:
            await self.exact.follow(self._in_use(url))
        log.info("worker %s is learned anew (models: %s)", url, ", ".join(workers[0].models) or "any")

    def _in_use(self, url: str) -> list[Worker]:
        return [w for w in self.registry.of_process(url) if w.status in ("ready", "unhealthy")]

    def _retire(self, worker: Worker, reason: str) -> None:
        self.registry.set_status(worker, "draining")
        self._start(Job("RemoveWorker", worker), self._drain, reason)

    def _keyed(self, spec: WorkerSpec) -> WorkerSpec:
        """With the gateway's key for workers, unless it has one of its own."""
        if spec.api_key is not None:
            return spec
        return msgspec.structs.replace(spec, api_key=self.config.worker_api_key)

    async def _wait_healthy(self, worker: Worker, job: Job) -> None:
        pause_s = FIRST_PROBE_PAUSE_S
        while True:
            error = await self.monitor.probe(worker)
            if error is None:
                return
            job.message = str(error)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LONGEST_PROBE_PAUSE_S)

    async def _drain(self, job: Job, reason: str) -> None:
        worker = job.worker
        job.go("processing", "waiting for running requests")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.request_timeout_secs):
                await worker.wait_idle()
                if self.wait_elsewhere is not None:
                    await self.wait_elsewhere(worker)
        self.registry.remove(worker)
        job.go("done")
        self.metrics.deregistrations.of(worker.source, reason).add()
        log.info("worker %s is removed", worker.url)

    def _start(self, job: Job, work, *args) -> None:
        self._remember(job)
        task = job.task = asyncio.get_running_loop().create_task(work(job, *args))
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a worker job failed", exc_info=task.exception())

    def _remember(self, job: Job) -> Job:
        self._expire()
        self.jobs[job.worker.id] = job
        return job

    def _expire(self) -> None:
        horizon = time.time() - JOB_KEPT_S
        for worker_id in [
            k for k, j in self.jobs.items() if j.timestamp < horizon and j.status in ("done", "failed")
        ]:
            del self.jobs[worker_id]


async def learn(worker: Worker, *ranks: Worker) -> None:
    """Ask a worker what it serves and how large its cache is; what it does not tell stays as it was.

    `ranks`: the others of the same process, which its answers hold for too.
    """
    models, info, card = await asyncio.gather(
        _json(worker, "/v1/models"),
        _json(worker, "/server_info", "/get_server_info"),
        _json(worker, "/model_info", "/get_model_info"),
    )
    for each in (worker, *ranks):
        _take_models(each, models, card)
        if isinstance(info, dict):
            _take_info(each, info)


def _take_models(worker: Worker, models: Any, card: Any) -> None:
    if worker.spec.model_id:
        worker.models = (worker.spec.model_id,)
    elif isinstance(models, dict) and isinstance(models.get("data"), list):
        names = [m["id"] for m in models["data"] if isinstance(m, dict) and isinstance(m.get("id"), str)]
        worker.models = tuple(names)
    elif isinstance(card, dict) and isinstance(card.get("model_path"), str):
        worker.models = (card["model_path"],)


def _take_info(worker: Worker, info: dict[str, Any]) -> None:
    worker.info = info
    worker.page_size = _positive(info.get("page_size"))
    offered = info.get("protocol")
    worker.takes_ids = isinstance(offered, list) and "input_ids/1" in offered
    worker.resumes = isinstance(offered, list) and "resume/1" in offered
    worker.dp_size = min(_positive(info.get("dp_size")) or 1, MAX_RANKS)
    worker.capacity_tokens = _positive(info.get("max_total_num_tokens"))
    if worker.capacity_tokens is not None and worker.dp_rank is not None:
        worker.capacity_tokens //= worker.dp_size  # it is told of all ranks
    if isinstance(info.get("instance_id"), str):
        worker.instance_id = info["instance_id"]


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53 else None


async def _json(worker: Worker, *targets: str) -> Any:
    """The first of `targets` that answers 200 with JSON, decoded; None when none does."""
    pool: Pool = worker.pool
    for target in targets:
        try:
            status, body = await pool.fetch("GET", target, headers=worker.auth_headers())
        except UpstreamError:
            continue
        if status in (401, 403) and target == "/v1/models":  # one line of those that are asked
            log.warning(
                "worker %s tells nothing of itself (%d): it wants a key, see --worker-api-key",
                worker.url,
                status,
            )
        value = json_of(body) if status == 200 else None
        if value is not None:
            return value
    return None
