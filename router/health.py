"""Which workers live: adaptive probes, fast ejection, fast return, and the breakers' probes.

A worker is ejected at once when it refuses connections, after `health_failure_threshold` bad probes
when it says it is unwell, and when it is frozen: probes time out while none of its answers moves. An
ejected worker is probed four times a second. A worker whose breaker is open is asked one small request
like those that failed, so that no client's stream is the experiment.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from router.breaker import PROBE
from router.call import ROUTES
from router.config import RouterConfig
from router.metrics import Metrics
from router.policies import Policy
from router.proxy import BACKPRESSURE
from router.upstream import UpstreamError
from router.workers import Registry, Worker

log = logging.getLogger("router")

TICK_S = 1.0
EJECTED_PROBE_S = 0.25
IDLE_INTERVAL_S = 5.0
BUSY_INTERVAL_S = 1.0
SILENCE_S = 2.0  # answers are due but no byte has come: look now, whatever the interval


class Monitor:
    """One watching task per registered worker."""

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        policy: Policy,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.registry = registry
        self.policy = policy
        self.metrics = metrics
        self.relearn: Callable[[Worker], Awaitable[None]] | None = None  # one that came back
        self.on_ejected: Callable[[Worker], None] | None = None
        self.tasks: dict[Worker, asyncio.Task] = {}
        registry.on_removed.append(self._unwatch)

    def watch(self, worker: Worker) -> None:
        """Start watching a ready worker."""
        worker.suspected = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._watch(worker))
        self.tasks[worker] = task

    def suspect(self, worker: Worker, error: UpstreamError) -> None:
        """A request to `worker` failed: refused connections eject it now, anything else probes it now."""
        if error.kind == "connect" and worker.status == "ready":
            self.eject(worker, str(error), dead=True)
        if worker.suspected is not None:
            worker.suspected.set()

    def eject(self, worker: Worker, why: str, *, dead: bool) -> None:
        """Choose it no more. `dead`: what runs on it will not end, so let go of it and try elsewhere."""
        log.warning("worker %s is ejected: %s", worker.url, why)
        self.registry.set_status(worker, "unhealthy")
        worker.pool.drop_idle()
        if self.on_ejected is not None:
            self.on_ejected(worker)
        if dead:
            worker.pool.fail_active(UpstreamError(f"the worker was ejected: {why}", kind="ejected"))
        if self.config.remove_unhealthy_workers:
            self.metrics.deregistrations.of(worker.source, "unhealthy").add()
            self.registry.remove(worker)

    async def probe(self, worker: Worker) -> UpstreamError | None:
        """Ask the health endpoint once; None when it is well. 4xx counts as well: it lives."""
        path, timeout_s = self.config.health_check_endpoint, self.config.health_check_timeout_secs
        try:
            status, _ = await worker.pool.fetch(
                "GET", path, headers=worker.auth_headers(), timeout_s=timeout_s
            )
            error = UpstreamError(f"{path} answered {status}", kind="status") if status >= 500 else None
        except UpstreamError as failure:
            error = failure
        self.metrics.health_checks.of("regular", "failure" if error else "success").add()
        return error

    async def close(self) -> None:
        tasks = list(self.tasks.values())
        self.tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _unwatch(self, worker: Worker) -> None:
        task = self.tasks.pop(worker, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    # ---- one worker's life ----

    async def _watch(self, worker: Worker) -> None:
        while worker.id in self.registry.workers:
            try:
                if worker.status == "unhealthy":
                    await self._until_well(worker)
                else:
                    await self._while_well(worker)
            except asyncio.CancelledError:
                raise
            except Exception:  # a bug must not end the watch
                log.exception("watching worker %s", worker.url)
                await asyncio.sleep(TICK_S)

    async def _while_well(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        failures, first_failure_s, probed_s = 0, 0.0, loop.time()
        assert worker.suspected is not None
        while worker.status in ("ready", "draining") and worker.id in self.registry.workers:
            suspected = await self._tick(worker, failures)
            worker.doubt(loop.time())
            if worker.status not in ("ready", "draining"):
                return
            worker.pool.fail_older(self.config.request_timeout_secs)
            if worker.status == "ready" and worker.breaker.probe_due():
                await self._breaker_probe(worker)
            now_s = loop.time()
            if not (suspected or failures) and not self._probe_due(worker, now_s, probed_s):
                continue
            started_s = probed_s = now_s
            error = await self.probe(worker)
            if error is None or (worker.pool.last_byte_s > started_s and error.kind == "timeout"):
                failures = 0  # slow to say so, but its answers move
                continue
            if error.kind == "timeout" and not failures:
                first_failure_s = started_s
            failures += 1
            if error.kind != "connect" and failures < self.config.health_failure_threshold:
                continue
            frozen = error.kind == "timeout" and worker.pool.last_byte_s < first_failure_s
            dead = error.kind == "connect" or frozen
            if worker.status == "ready":
                self.eject(worker, str(error), dead=dead)
            elif dead:  # draining: what runs on it will not end by itself
                worker.pool.fail_active(UpstreamError(f"the worker is gone: {error}", kind="ejected"))

    async def _tick(self, worker: Worker, failures: int) -> bool:
        """Wait for the next look; whether a failed request asked for it."""
        assert worker.suspected is not None
        pause_s = EJECTED_PROBE_S if failures or not worker.breaker.closed else TICK_S
        try:
            async with asyncio.timeout(pause_s):
                await worker.suspected.wait()
        except TimeoutError:
            return False
        worker.suspected.clear()
        return True

    def _probe_due(self, worker: Worker, now_s: float, probed_s: float) -> bool:
        if self.config.disable_health_check:
            return False
        since_s = now_s - probed_s
        # Passive: requests run, and nothing has been heard for a while.
        if worker.in_flight and now_s - worker.pool.last_byte_s > SILENCE_S and since_s >= BUSY_INTERVAL_S:
            return True
        interval_s = self.config.health_check_interval_secs
        if interval_s is None:
            interval_s = BUSY_INTERVAL_S if worker.in_flight else IDLE_INTERVAL_S
        return since_s >= interval_s

    async def _until_well(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        successes = silent = 0
        silent_since_s = 0.0
        was_dead, before = False, worker.instance_id
        while worker.status == "unhealthy" and worker.id in self.registry.workers:
            await asyncio.sleep(EJECTED_PROBE_S)
            worker.pool.fail_older(self.config.request_timeout_secs)
            started_s = loop.time()
            error = await self.probe(worker)
            if error is not None:
                successes = 0
                was_dead = was_dead or error.kind == "connect"
                # It was only unwell, so what ran on it was left there; it may have died or frozen since.
                silent = silent + 1 if error.kind == "timeout" else 0
                silent_since_s = started_s if silent <= 1 else silent_since_s
                frozen = (
                    silent >= self.config.health_failure_threshold
                    and worker.pool.last_byte_s < silent_since_s
                )
                if error.kind == "connect" or frozen:
                    worker.pool.fail_active(UpstreamError(f"the worker is gone: {error}", kind="ejected"))
                continue
            successes += 1
            silent = 0
            if successes >= self.config.health_success_threshold:
                if self.relearn is not None:
                    await self.relearn(worker)
                if was_dead or worker.instance_id != before:
                    self.policy.cleared(worker)  # a new process: an empty cache
                    if not worker.breaker.closed:
                        self.metrics.readmissions.of(worker.url).add()
                    worker.breaker.reset()
                worker.load = None
                worker.foreign_requests = worker.foreign_tokens = 0
                if worker.suspected is not None:
                    worker.suspected.clear()
                if worker.status == "unhealthy":
                    self.registry.set_status(worker, "ready")
                    log.info("worker %s is back", worker.url)

    async def _breaker_probe(self, worker: Worker) -> None:
        """Send the one request that half_open admits, and tell the breaker."""
        admission = worker.breaker.admit()
        if admission != PROBE:
            return
        try:
            well = await self._imitate(worker)
        except asyncio.CancelledError:
            worker.breaker.forget(admission)
            raise
        if well is None:
            worker.breaker.forget(admission)
        elif well:
            worker.breaker.success(admission)
        else:
            worker.breaker.failure(admission)

    async def _imitate(self, worker: Worker) -> bool | None:
        """Whether a small request like those that failed succeeds; a stream must end properly.

        None: the worker is too busy to show it, which is no fault."""
        path = (worker.failed_path or b"").decode()
        model = worker.failed_model or (worker.models[0] if worker.models else "default")
        body = probe_body(path, model, worker.failed_stream, worker.dp_rank)
        if body is None:
            return await self.probe(worker) is None
        timeout_s = max(10.0, self.config.health_check_timeout_secs)
        headers = (("x-request-id", "HEALTH_CHECK_breaker"), *worker.auth_headers())
        try:
            status, answer = await worker.pool.fetch(
                "POST", path, body=msgspec.json.encode(body), headers=headers, timeout_s=timeout_s
            )
        except UpstreamError as error:
            log.info("worker %s: breaker probe of %s failed: %s", worker.url, path, error)
            return False
        if status in BACKPRESSURE:
            return None
        return status < 500 and b'data: {"error"' not in answer


def probe_body(path: str, model: str, stream: bool, dp_rank: int | None) -> dict | None:
    """The smallest request of a route that runs the model for a few tokens; None for other routes.

    `dp_rank`: that must run it; None: any."""
    messages = [{"role": "user", "content": "ping"}]
    bodies = {
        "/generate": {"text": "ping", "sampling_params": {"max_new_tokens": 8, "temperature": 0}},
        "/v1/completions": {"model": model, "prompt": "ping", "max_tokens": 8},
        "/v1/chat/completions": {"model": model, "messages": messages, "max_tokens": 8},
        "/v1/messages": {"model": model, "messages": messages, "max_tokens": 8},
        "/v1/embeddings": {"model": model, "input": "ping"},
    }
    body = bodies.get(path)
    if body is not None and stream:
        body["stream"] = True
    if body is not None and dp_rank is not None and ROUTES[path].ranked:
        body["routed_dp_rank"] = dp_rank
    return body
