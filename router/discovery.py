"""Workers that come and go by themselves: a file that is reread on change, or Kubernetes pods by label.

Each source says which URLs should be registered; `Reconciler` adds what is missing and drains what is
gone. It touches only workers of its own source.
"""

import asyncio
import logging
import os
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import yaml

from router.config import RouterConfig
from router.jobs import Jobs, Refused
from router.metrics import Metrics
from router.upstream import Address, Pool, UpstreamError
from router.workers import Registry, Worker, WorkerSpec

log = logging.getLogger("router")

FILE_CHECK_S = 1.0
RETRY_S = (0.5, 10.0)
WATCH_S = 290  # the API server is asked to end a watch after this long
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Reconciler:
    """Makes the workers of one source equal to what the source says."""

    def __init__(self, source: str, registry: Registry, jobs: Jobs, metrics: Metrics) -> None:
        self.source = source
        self.registry = registry
        self.jobs = jobs
        self.sync_s = metrics.discovery_sync
        self.wanted: dict[str, WorkerSpec] = {}  # by the last sync
        self.draining: set[str] = set()  # those of them that can be added only once they are gone
        registry.on_removed.append(self._removed)

    def sync(self, wanted: dict[str, WorkerSpec]) -> None:
        """`wanted` by URL. Workers registered by someone else stay as they are."""
        started = time.perf_counter()
        self.wanted = wanted
        self.draining.clear()
        present = {w.spec.url for w in self.registry if w.status != "draining"}
        for url, spec in wanted.items():
            if url.rstrip("/") not in present:
                try:
                    self.jobs.add(spec, source=self.source)
                except Refused as error:
                    if error.status == 409:
                        self.draining.add(url.rstrip("/"))
                    else:
                        log.error("%s: %s", self.source, error)
        kept = {url.rstrip("/") for url in wanted}
        for worker in self.registry:
            gone = worker.spec.url not in kept
            if worker.source == self.source and gone and worker.status != "draining":
                self.jobs.remove(worker, reason="gone")
        self.sync_s.of(self.source).observe(time.perf_counter() - started)

    def _removed(self, worker: Worker) -> None:
        if worker.spec.url in self.draining:  # the source may have nothing new to say for minutes
            asyncio.get_running_loop().call_soon(lambda: self.sync(self.wanted))


class FileSource:
    """A YAML or JSON file: a list of URLs or of what `POST /workers` takes, maybe under `workers:`.

    A file that cannot be read changes nothing: the workers stay, and the log says why.
    """

    def __init__(self, path: str, reconciler: Reconciler) -> None:
        self.path = Path(path)
        self.reconciler = reconciler
        self.wanted: dict[str, WorkerSpec] = {}
        self._seen: tuple[int, int] | None = None  # (mtime in ns, size) of what `wanted` was read from

    async def run(self) -> None:
        while True:
            try:
                stat = self.path.stat()
                now = (stat.st_mtime_ns, stat.st_size)
                if now != self._seen:
                    self.wanted = read_manifest(self.path)
                    self._seen = now
                    log.info("%s names %d workers", self.path, len(self.wanted))
                self.reconciler.sync(self.wanted)
            except (OSError, ValueError) as error:
                log.error("discovery_file=%s: %s; the workers stay as they are", self.path, error)
            await asyncio.sleep(FILE_CHECK_S)


def read_manifest(path: Path) -> dict[str, WorkerSpec]:
    """Worker specifications by URL. Raises OSError, or ValueError that says what is wrong."""
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not YAML or JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("workers")
    if not isinstance(value, list):
        raise ValueError("expected a list of workers, or `workers:` with one")
    wanted = {}
    for item in value:
        try:
            spec = msgspec.convert({"url": item} if isinstance(item, str) else item, WorkerSpec)
            Address.parse(spec.url)
            msgspec.msgpack.encode(spec)  # YAML has half characters, which processes cannot tell each other
        except (msgspec.ValidationError, ValueError) as error:
            named = item.get("url") if isinstance(item, dict) else item  # the rest may hold a key
            raise ValueError(f"worker {named!r}: {error}") from error
        wanted[spec.url] = spec
    return wanted


class KubernetesSource:
    """Ready pods that carry all labels of `selector`, listed once and then watched."""

    def __init__(self, config: RouterConfig, reconciler: Reconciler) -> None:
        self.port = config.service_discovery_port
        self.reconciler = reconciler
        namespace = config.service_discovery_namespace or _own_namespace()
        labels = quote(",".join(config.selector), safe="=,")
        self.target = f"/api/v1/namespaces/{namespace}/pods?labelSelector={labels}"
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        url = config.kubernetes_api_url or f"https://{host}:{port}"
        tls = None
        if url.startswith("https"):
            authority = ACCOUNT / "ca.crt"
            tls = ssl.create_default_context(cafile=str(authority) if authority.is_file() else None)
        self.pool = Pool(Address.parse(url), tls=tls)
        self.pods: dict[str, WorkerSpec] = {}  # by pod name, ready ones only

    async def run(self) -> None:
        pause_s, longest_s = RETRY_S
        while True:
            try:
                version = await self._list()
                pause_s = RETRY_S[0]
                await self._watch(version)
            except Exception as error:  # whatever it answers must not end the discovery
                log.error("Kubernetes discovery: %r; the workers stay as they are", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)

    async def _list(self) -> str:
        status, body = await self.pool.fetch("GET", self.target, headers=self._headers(), timeout_s=30)
        if status != 200:
            raise UpstreamError(f"listing pods answered {status}", kind="status")
        listed = msgspec.json.decode(body)
        self.pods = {}
        for pod in listed["items"]:
            self._take(pod)
        self._sync()
        return listed["metadata"]["resourceVersion"]

    async def _watch(self, version: str) -> None:
        target = f"{self.target}&watch=1&resourceVersion={version}&timeoutSeconds={WATCH_S}"
        lines = [f"GET {target} HTTP/1.1", f"host: {self.pool.address.authority}"]
        lines += [f"{name}: {value}" for name, value in self._headers()]
        connection = await self.pool.connect()
        try:
            connection.send("\r\n".join([*lines, "content-length: 0", "", ""]).encode(), b"")
            waiting = b""
            async with asyncio.timeout(WATCH_S + 30):
                if await connection.head() != 200:
                    raise UpstreamError(f"watching pods answered {connection.status}", kind="status")
                while data := await connection.read():
                    *events, waiting = (waiting + data).split(b"\n")
                    for line in events:
                        if not line.strip():
                            continue
                        event = msgspec.json.decode(line)
                        if event["type"] == "ERROR":  # 410: the version is too old; list again
                            return
                        if event["type"] == "DELETED":
                            self.pods.pop(event["object"]["metadata"]["name"], None)
                        elif event["type"] != "BOOKMARK":
                            self._take(event["object"])
                    self._sync()
        finally:
            connection.release()

    def _take(self, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        status = pod.get("status") or {}
        address = status.get("podIP")
        conditions = status.get("conditions") or []
        ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
        if not address or not ready or pod["metadata"].get("deletionTimestamp"):
            self.pods.pop(name, None)
            return
        host = f"[{address}]" if ":" in address else address
        labels = {"pod": name}
        self.pods[name] = WorkerSpec(url=f"http://{host}:{self.port}", labels=labels)

    def _sync(self) -> None:
        self.reconciler.sync({spec.url: spec for spec in self.pods.values()})

    def _headers(self) -> tuple[tuple[str, str], ...]:
        token = ACCOUNT / "token"  # read anew: it is rotated
        if not token.is_file():
            return ()
        return (("authorization", f"Bearer {token.read_text().strip()}"),)


def _own_namespace() -> str:
    file = ACCOUNT / "namespace"
    return file.read_text().strip() if file.is_file() else "default"
