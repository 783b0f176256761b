"""Workers from a file and from a pretended Kubernetes API server."""

import asyncio
import json
import os
from contextlib import asynccontextmanager

import pytest
from gateway_harness import asynchronous, running, until
from mock_worker import MockWorker, _chunk

from router import discovery
from router.config import ConfigError, RouterConfig
from router.discovery import read_manifest


def registered(r) -> set[str]:
    return {w.url for w in r.gateway.registry if w.status == "ready"}


def write(path, text: str) -> None:
    """As configuration tools do: a new file in the old one's place."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(discovery, "FILE_CHECK_S", 0.02)
    monkeypatch.setattr(discovery, "RETRY_S", (0.05, 0.1))


@asynchronous
async def test_file_is_followed_as_it_changes(tmp_path):
    a, b = await MockWorker().start(), await MockWorker().start()
    file = tmp_path / "workers.yaml"
    write(file, f"workers:\n- {a.url}\n")
    async with running(0, discovery_file=str(file)) as r:
        r.workers += [a, b]
        await until(lambda: registered(r) == {a.url})
        write(file, json.dumps([{"url": a.url}, {"url": b.url, "labels": {"zone": "x"}}]))
        await until(lambda: registered(r) == {a.url, b.url})
        assert r.registered(b).spec.labels == {"zone": "x"}
        write(file, f"- {b.url}\n")
        await until(lambda: registered(r) == {b.url} and len(r.gateway.registry) == 1)


@asynchronous
async def test_found_workers_get_the_gateways_key_for_workers_unless_they_have_their_own(tmp_path):
    pod, plain, own = [await MockWorker().start() for _ in range(3)]
    api = FakeApiServer()
    api.put("a", "127.0.0.1")
    file = tmp_path / "workers.yaml"
    write(file, json.dumps([plain.url, {"url": own.url, "api_key": "its-own"}]))
    async with discovering(pod, api, discovery_file=str(file), worker_api_key="secret") as r:
        r.workers += [plain, own]
        await until(lambda: registered(r) == {w.url for w in r.workers})
        for _ in r.workers:  # in turn
            await r.chat()
        keys = [worker.seen[0].headers["authorization"] for worker in r.workers]
        assert keys == ["Bearer secret", "Bearer secret", "Bearer its-own"]


@asynchronous
async def test_broken_file_changes_nothing(tmp_path):
    a = await MockWorker().start()
    file = tmp_path / "workers.yaml"
    write(file, f"- {a.url}\n")
    async with running(0, discovery_file=str(file)) as r:
        r.workers.append(a)
        await until(lambda: registered(r) == {a.url})
        for text in ("{", "workers: 5", "- ftp://x", "- {labels: {}}"):
            write(file, text)
            await asyncio.sleep(0.1)
            assert registered(r) == {a.url}, text
        file.unlink()
        await asyncio.sleep(0.1)
        assert registered(r) == {a.url}


@asynchronous
async def test_workers_added_by_hand_are_not_the_files_to_remove(tmp_path):
    a, b = await MockWorker().start(), await MockWorker().start()
    file = tmp_path / "workers.yaml"
    write(file, f"- {a.url}\n")
    async with running(workers=[b], discovery_file=str(file)) as r:
        r.workers.append(a)
        await until(lambda: registered(r) == {a.url, b.url})
        write(file, "[]")
        await until(lambda: registered(r) == {b.url})


def test_bad_manifest_says_what_is_wrong(tmp_path):
    file = tmp_path / "w.yaml"
    file.write_text("- url: 5\n")
    with pytest.raises(ValueError, match="Expected `str`"):
        read_manifest(file)
    file.write_text('- {url: "http://a:1", api_key: "secret\\n"}\n')
    with pytest.raises(ValueError, match=r"http://a:1.*api_key") as caught:
        read_manifest(file)
    assert "secret" not in str(caught.value)
    file.write_text('- {url: "http://a:1", labels: {a: "\\ud800"}}\n')
    with pytest.raises(ValueError, match="surrogates"):
        read_manifest(file)
    file.write_text("- http://a..b:8000\n")
    with pytest.raises(ValueError, match="must have a host name"):
        read_manifest(file)


class FakeApiServer:
    """`GET /api/v1/namespaces/NS/pods`, listed and watched."""

    def __init__(self) -> None:
        self.pods: dict[str, dict] = {}
        self.version = 1
        self.targets: list[str] = []
        self.watchers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    def put(self, name: str, ip: str, *, ready: bool = True) -> None:
        condition = {"type": "Ready", "status": "True" if ready else "False"}
        pod = {"metadata": {"name": name}, "status": {"podIP": ip, "conditions": [condition]}}
        kind = "MODIFIED" if name in self.pods else "ADDED"
        self.pods[name] = pod
        self._tell(kind, pod)

    def delete(self, name: str) -> None:
        self._tell("DELETED", self.pods.pop(name))

    def _tell(self, kind: str, pod: dict) -> None:
        self.version += 1
        for writer in self.watchers:
            _chunk(writer, json.dumps({"type": kind, "object": pod}).encode() + b"\n")

    async def _serve(self, reader, writer) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                target = head.split(b" ")[1].decode()
                self.targets.append(target)
                if "watch=1" in target:
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    self.watchers.append(writer)
                    continue
                body = json.dumps(
                    {"metadata": {"resourceVersion": str(self.version)}, "items": list(self.pods.values())}
                ).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@asynccontextmanager
async def discovering(worker: MockWorker, api: FakeApiServer, **options):
    """A gateway that finds the worker where the API server says that pods are."""
    options = {"selector": ["app=llm"], "kubernetes_api_url": await api.start(), **options}
    async with running(0, service_discovery=True, service_discovery_port=worker.port, **options) as r:
        r.workers.append(worker)
        yield r
        api.server.close()


@asynchronous
async def test_ready_pods_are_registered_and_gone_ones_drained():
    worker = await MockWorker().start()
    api = FakeApiServer()
    api.put("a", "127.0.0.1")
    api.put("starting", "127.0.0.2", ready=False)
    options = {"selector": ["app=llm", "tier=gpu"], "service_discovery_namespace": "prod"}
    async with discovering(worker, api, **options) as r:
        await until(lambda: registered(r) == {worker.url})
        assert api.targets[0] == "/api/v1/namespaces/prod/pods?labelSelector=app=llm,tier=gpu"
        await until(lambda: api.watchers)
        assert "resourceVersion=3" in api.targets[1]
        api.put("a", "127.0.0.1", ready=False)
        await until(lambda: not len(r.gateway.registry))
        api.put("a", "127.0.0.1")
        await until(lambda: registered(r) == {worker.url})
        api.delete("a")
        await until(lambda: not len(r.gateway.registry))
        for writer in api.watchers:  # a broken watch is listed again
            writer.transport.abort()
        api.watchers.clear()
        api.put("b", "127.0.0.1")
        await until(lambda: registered(r) == {worker.url})
        assert r.registered(worker).spec.labels == {"pod": "b"}


@asynchronous
async def test_pod_that_is_ready_again_while_it_drains_is_added_as_soon_as_it_has():
    worker = await MockWorker().start()
    api = FakeApiServer()
    api.put("a", "127.0.0.1")
    async with discovering(worker, api) as r:
        await until(lambda: registered(r) == {worker.url} and api.watchers)
        before = r.registered(worker)
        worker.faults.delay_s = 0.5
        slow = asyncio.create_task(r.chat())
        await until(lambda: worker.running == 1)
        api.put("a", "127.0.0.1", ready=False)
        await until(lambda: before.status == "draining")
        api.put("a", "127.0.0.1")
        assert (await slow).status_code == 200
        await until(lambda: registered(r) == {worker.url})
        assert r.registered(worker) is not before


@asynchronous
async def test_answers_that_are_no_pods_do_not_end_the_discovery(caplog):
    worker = await MockWorker().start()
    api = FakeApiServer()
    api.pods["odd"] = {"metadata": {"name": "odd"}, "status": "none"}
    async with discovering(worker, api) as r:
        await until(lambda: "AttributeError" in caplog.text)
        del api.pods["odd"]
        api.put("a", "127.0.0.1")
        await until(lambda: registered(r) == {worker.url})


def test_service_discovery_needs_a_selector():
    with pytest.raises(ConfigError, match="selector is missing"):
        RouterConfig.from_keywords(service_discovery=True)
    with pytest.raises(ConfigError, match="key=value"):
        RouterConfig.from_keywords(service_discovery=True, selector=["app"])
