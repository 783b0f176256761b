"""Faults under load, in front of real engines: no JSON request is lost, every answer is the right one."""

import asyncio
import http.server
import os
import random
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from router.replicas import free_ports
from tests.e2e.gateway import Gateway, Launch, Load, right_answers, serving
from tests.e2e.process import Server, until
from tests.router.broken_requests import broken, send

# A frozen worker is noticed within two seconds; a busy machine is not taken for one.
QUICK = ("--policy", "cache_aware", "--health-check-interval-secs", "0.5", "--health-check-timeout-secs", "1")


@pytest.fixture(scope="module")
def replicas(launch: Launch):
    """Two; whatever the second one logs meets a full disk."""
    servers = [launch(), launch(log=Path("/dev/full"))]
    for server in servers:
        server.until_ready()
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def answers(replicas) -> dict[tuple[int, ...], list[int]]:
    return right_answers(replicas[0].http)


@pytest.fixture(scope="module")
def gateway(replicas, tmp_path_factory: pytest.TempPathFactory):
    urls = [server.url for server in replicas]
    log = tmp_path_factory.mktemp("gateway")
    with serving(log, "router.launch_router", *QUICK, "--worker-urls", *urls) as gateway:
        yield gateway.until_healthy(2)


def num_sent(gateway: Gateway, server: Server) -> float:
    return gateway.metric("smg_worker_requests_total", worker=server.url)


def test_frozen_worker_loses_no_request_and_is_used_again_when_it_goes_on(gateway, replicas, answers):
    with Load(gateway.url, answers) as load:
        load.more(20)
        replicas[0].process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: gateway.num_healthy() == 1)
            load.more(20)
        finally:
            replicas[0].process.send_signal(signal.SIGCONT)
        gateway.until_healthy(2)
        before = num_sent(gateway, replicas[0])
        until(lambda: num_sent(gateway, replicas[0]) > before)
    replicas[0].until_idle()


@contextmanager
def slowed(process, stopped_s: float = 0.12, running_s: float = 0.03):
    """A process that runs a fifth of the time."""
    ended = threading.Event()

    def act() -> None:
        while not ended.is_set():
            process.send_signal(signal.SIGSTOP)
            ended.wait(stopped_s)
            process.send_signal(signal.SIGCONT)
            ended.wait(running_s)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_slow_worker_gets_less_and_loses_nothing(gateway, replicas, answers):
    with slowed(replicas[0].engine), Load(gateway.url, answers) as load:
        load.more(100)
    assert load.by_worker[replicas[1].url] > load.by_worker[replicas[0].url]


BAD_ANSWERS = [
    b"",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 999 ?\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{} ",
    b"HTTP/1.1 200 OK\r\nx-cached-tokens: " + b"9" * 5000,
]


class Liar(http.server.BaseHTTPRequestHandler):
    """A worker that is well, and answers nonsense."""

    told: ClassVar[Counter[int]] = Counter()

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        kind = self.told.total() % len(BAD_ANSWERS)
        self.told[kind] += 1
        self.wfile.write(BAD_ANSWERS[kind])
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@contextmanager
def liars(count: int):
    """The URLs of workers that lie; a breaker ejects each after a few answers."""
    Liar.told.clear()
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar) for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield [f"http://127.0.0.1:{server.server_address[1]}" for server in servers]
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def test_malformed_answers_of_a_worker_reach_no_client(gateway, answers):
    with liars(2) as urls:
        with Load(gateway.url, answers) as load:
            added = [gateway.http.post("/workers", json={"url": u}).headers["location"] for u in urls]
            until(lambda: len(Liar.told) == len(BAD_ANSWERS))
            load.more(20)
            for worker in added:
                assert gateway.http.delete(worker).status_code == 202
                until(lambda worker=worker: gateway.http.get(worker).status_code == 404)
        assert not set(urls) & set(load.by_worker)


def test_worker_removed_and_added_again_under_load_loses_nothing(gateway, replicas, answers):
    with Load(gateway.url, answers) as load:
        load.more(20)
        listed = gateway.http.get("/workers").json()["workers"]
        worker = next(w["id"] for w in listed if w["url"] == replicas[0].url)
        assert gateway.http.delete(f"/workers/{worker}").status_code == 202
        until(lambda: gateway.http.get(f"/workers/{worker}").status_code == 404)
        assert replicas[0].loads()["num_running_reqs"] == 0
        before = num_sent(gateway, replicas[0])
        load.more(20)
        assert num_sent(gateway, replicas[0]) == before
        assert gateway.http.post("/workers", json={"url": replicas[0].url}).status_code == 202
        until(lambda: num_sent(gateway, replicas[0]) > before)


def test_gateway_restarted_under_load_loses_nothing(replicas, answers, tmp_path):
    port = free_ports(1, random.randrange(20_000, 30_000))[0]  # below those that clients' sockets take
    flags = [*QUICK, "--worker-urls", *(server.url for server in replicas)]
    gateways = [Gateway(tmp_path / "first.log", "router.launch_router", flags, port)]
    try:
        with Load(gateways[0].url, answers) as load:
            load.more(20)
            assert gateways[0].end() == 0
            gateways.append(Gateway(tmp_path / "second.log", "router.launch_router", flags, port))
            load.more(20)
    finally:
        for gateway in gateways:
            gateway.close()


def test_full_disk_of_logs_stops_nobody(replicas, answers):
    """Every line that the gateway and one of the workers write is refused."""
    urls = [server.url for server in replicas]
    flags = (*QUICK, "--log-level", "debug", "--worker-urls", *urls)
    with serving(Path("/dev/full"), "router.launch_router", *flags) as gateway, liars(1) as bad:
        gateway.until_healthy(2)
        with Load(gateway.url, answers) as load:
            gateway.http.post("/workers", json={"url": bad[0]})
            until(lambda: gateway.metric("smg_worker_cb_state", worker=bad[0]) > 0)  # which it logs
            until(lambda: set(load.by_worker) == set(urls))
        assert gateway.end() == 0


def test_ten_thousand_broken_requests_cause_no_500_and_leave_nothing_behind(gateway, replicas, answers):
    rng = random.Random(11)
    statuses: Counter[int] = Counter()
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}

    async def all_of_them() -> None:
        for _ in range(50):
            await asyncio.gather(*(send(gateway.port, broken(rng, chat), statuses, 0.1) for _ in range(200)))

    asyncio.run(all_of_them())
    print(dict(statuses))
    assert statuses.total() == 10_000 and statuses[400] > 2_500
    assert not [status for status in statuses if status >= 500], statuses
    for server in replicas:
        server.until_idle()
    with Load(gateway.url, answers) as load:
        load.more(20)
    assert os.path.exists(f"/proc/{gateway.process.pid}")
