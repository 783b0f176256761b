"""Several gateway processes on one port: one registry, shared prefixes and loads, one life."""

import asyncio
import os
import signal
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager

import httpx
import pytest
from gateway_harness import asynchronous, until
from kv_worker import KvWorker, write_tokenizer
from test_router_edges import certificate
from test_router_launch import alive, launch, listening, wait_for

import router.cluster
from router.bench.worker import CHARS_PER_TOKEN
from router.cluster import ClusterFailed, Process
from router.config import RouterConfig

CHAT = {"model": "bench", "messages": [{"role": "user", "content": "hello"}]}


class Cluster:
    def __init__(self, process, trust: ssl.SSLContext | None = None) -> None:
        self.lines: list[str] = []
        self.port = listening(process, self.lines)
        self.url = f"{'https' if trust else 'http'}://127.0.0.1:{self.port}"
        self.trust = trust or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # made once: 20 ms
        self.process = process

    def children(self) -> list[int]:
        pid = self.process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]

    def everyone(self, path: str, tries: int = 24) -> list[httpx.Response]:
        """Answers over as many connections: the kernel spreads them over the processes."""
        answers = []
        for _ in range(tries):
            with httpx.Client(verify=self.trust) as client:
                answers.append(client.get(self.url + path, timeout=10))
        return answers

    def metric(self, text: str) -> float:
        lines = httpx.get(self.url + "/metrics", verify=self.trust).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(text))

    def total(self) -> int:
        """Requests sent to workers, as far as the supervisor knows."""
        workers = httpx.get(self.url + "/workers", verify=self.trust).json()["workers"]
        return sum(w["requests_total"] for w in workers)

    def listening(self) -> int:
        """How many processes listen on the port: rows of the kernel's table with state 0A."""
        with open("/proc/net/tcp") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        return sum(row[1].endswith(f":{self.port:04X}") and row[3] == "0A" for row in rows)

    def ready(self, workers: int) -> bool:
        return all(a.json()["healthy_workers"] == workers for a in self.everyone("/readiness", 12))


@contextmanager
def workers(count: int, *flags: str):
    started = [launch("router.bench.worker", "--port", "0", *flags) for _ in range(count)]
    try:
        yield [f"http://127.0.0.1:{listening(process)}" for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


@contextmanager
def cluster(*flags: str, processes: int = 2, program: str | None = None, trust=None):
    """`program`: what starts it instead of the launcher."""
    process = launch(
        program or "router.launch_router", "--host", "127.0.0.1", "--port", "0",
        "--workers-processes", str(processes), "--shutdown-grace-period-secs", "5", *flags,
        start="-c" if program else "-m",
    )  # fmt: skip
    made = Cluster(process, trust)
    try:
        wait_for(lambda: made.listening() == processes, 30)
        yield made
    finally:
        pids = made.children() if process.poll() is None else []
        process.kill()
        process.wait()
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def running_beside(c: AbstractContextManager[Cluster]):
    """The cluster as a context of a test whose event loop its workers need."""
    made = await asyncio.to_thread(c.__enter__)
    try:
        yield made
    finally:
        await asyncio.to_thread(c.__exit__, None, None, None)


def generate(c: Cluster, text: str | None, **more) -> httpx.Response:
    """Over a connection of its own."""
    with httpx.Client(verify=c.trust) as client:
        body = {"text": text, "sampling_params": {"max_new_tokens": 2}, **more}
        return client.post(c.url + "/generate", json=body, timeout=20)


def test_registry_change_is_seen_by_every_process_and_metrics_are_added_up():
    with workers(2) as urls, cluster() as c:
        for url in urls:
            assert httpx.post(c.url + "/workers", json={"url": url}).status_code == 202
        wait_for(lambda: c.ready(2))
        views = [a.json()["workers"] for a in c.everyone("/workers")]
        assert {tuple(sorted((w["id"], w["url"], w["status"]) for w in v)) for v in views} == {
            tuple(sorted((w["id"], w["url"], "ready") for w in views[0]))
        }
        assert all(generate(c, "x").status_code == 200 for _ in range(40))
        assert c.metric("smg_worker_requests_total{") == 40
        wait_for(lambda: c.total() == 40)
        gone = views[0][0]
        assert httpx.delete(f"{c.url}/workers/{gone['id']}").status_code == 202
        wait_for(lambda: c.ready(1))
        answers = [generate(c, "x") for _ in range(20)]
        assert all(a.headers["x-smg-routed-worker-id"] != gone["url"] for a in answers)
        flushed = httpx.post(c.url + "/flush_cache").json()
        assert flushed["total_http_workers"] == 1


@pytest.mark.parametrize("policy", ["cache_aware", "cache_aware_threshold"])
def test_prefix_learned_in_one_process_is_followed_by_the_other(policy):
    flags = ("--cache-blocks", "4096")
    with workers(4, *flags) as urls, cluster("--policy", policy, "--worker-urls", *urls, processes=3) as c:
        wait_for(lambda: c.ready(4))
        for family in range(6):
            prefix = f"{family} " * 1000
            homes = {generate(c, prefix + "0").headers["x-smg-routed-worker-id"]}
            # What the supervisor counts it has passed on to the others before.
            wait_for(lambda sent=12 * family + 1: c.total() == sent)
            homes |= {generate(c, prefix + str(i)).headers["x-smg-routed-worker-id"] for i in range(1, 12)}
            assert len(homes) == 1
            wait_for(lambda sent=12 * family + 12: c.total() == sent)
        stats = [httpx.get(u + "/bench/stats").json() for u in urls]
        prompt, cached = (sum(s[k] for s in stats) for k in ("prompt_tokens", "cached_tokens"))
        missed = 6 * 2000 // CHARS_PER_TOKEN  # one first request of each family, and the odd ends
        assert prompt - cached < missed + 72 * 20


def test_load_of_one_process_is_weighed_by_the_other():
    flags = ("--prefill-us", "100000")  # none of the requests ends while the test runs
    with (
        ThreadPoolExecutor(12) as pool,
        workers(2, *flags) as urls,
        cluster("--policy", "least_load", "--worker-urls", *urls) as c,
    ):

        def loads() -> list[int]:
            return [w["load"] for w in httpx.get(c.url + "/workers").json()["workers"]]

        wait_for(lambda: c.ready(2))
        for i in range(12):  # each on a connection of its own, so at either process
            pool.submit(generate, c, "x" * 1000)
            wait_for(lambda i=i: sum(loads()) == i + 1)
            time.sleep(0.02)  # the supervisor told the other process before it told us
        assert loads() == [6, 6]


def test_removed_worker_is_kept_until_what_runs_on_any_process_has_ended():
    flags = ("--prefill-us", "4000")
    with workers(1, *flags) as urls, cluster("--worker-urls", *urls) as c:
        wait_for(lambda: c.ready(1))
        worker = httpx.get(c.url + "/workers").json()["workers"][0]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(generate, c, "x" * 1000)  # 1 s
            wait_for(lambda: httpx.get(c.url + "/workers").json()["workers"][0]["load"] == 1)
            httpx.delete(f"{c.url}/workers/{worker['id']}")
            listed = httpx.get(c.url + "/workers").json()["workers"]
            assert [w["status"] for w in listed] == ["draining"] and not answer.done()
            assert answer.result().status_code == 200
        wait_for(lambda: httpx.get(c.url + "/workers").json()["total"] == 0)


def test_killed_process_is_started_again_with_the_registry_and_counts_stay():
    with workers(1) as urls, cluster("--worker-urls", *urls) as c:
        wait_for(lambda: c.ready(1))
        assert all(generate(c, "x").status_code == 200 for _ in range(20))
        assert c.metric("smg_worker_requests_total{") == 20
        before = c.children()
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: len(set(c.children()) - set(before)) == 1)
        wait_for(lambda: c.ready(1))
        assert all(generate(c, "x").status_code == 200 for _ in range(20))
        assert c.metric("smg_worker_requests_total{") == 40


def test_frozen_process_is_ended_and_started_again():
    quick = "import router.cluster as c, router.launch_router as l; c.PING_S = 0.1; l.main()"
    with workers(1) as urls, cluster("--worker-urls", *urls, program=quick) as c:
        wait_for(lambda: c.ready(1))
        before = c.children()
        os.kill(before[0], signal.SIGSTOP)
        wait_for(lambda: len(c.children()) == 2 and before[0] not in c.children())
        assert before[1] in c.children()
        wait_for(lambda: c.ready(1))
        assert all(generate(c, "x").status_code == 200 for _ in range(20))
        assert any("process 0 is frozen" in line for line in c.lines)


@asynchronous
async def test_process_that_freezes_before_it_is_ready_is_ended(monkeypatch, caplog):
    monkeypatch.setattr(router.cluster, "PING_S", 0.001)
    supervisor, member = router.cluster.Cluster(RouterConfig(workers_processes=2)), Process(1)
    process = await asyncio.create_subprocess_exec("sleep", "60")
    assert await supervisor._ended(member, process) == -signal.SIGKILL
    assert "process 1 is frozen" in caplog.text


@asynchronous
async def test_process_that_ends_just_before_it_is_killed_has_ended(monkeypatch):
    class Gone:
        def __init__(self) -> None:
            self.tried = asyncio.Event()

        async def wait(self) -> int:
            await self.tried.wait()
            return -signal.SIGTERM

        def kill(self) -> None:
            self.tried.set()
            raise ProcessLookupError

    monkeypatch.setattr(router.cluster, "PING_S", 0.001)
    supervisor, member = router.cluster.Cluster(RouterConfig(workers_processes=2)), Process(1)
    assert await supervisor._ended(member, Gone()) == -signal.SIGTERM


def failing(monkeypatch, pauses_s: tuple[float, float]):
    """A supervisor of two whose processes cannot be started; the list grows with every try."""
    tries: list[Process] = []

    async def run(self, member: Process) -> int:
        tries.append(member)
        raise OSError("no more processes")

    monkeypatch.setattr(router.cluster.Cluster, "_run", run)
    monkeypatch.setattr(router.cluster, "RESTART_PAUSE_S", pauses_s)
    supervisor = router.cluster.Cluster(RouterConfig(workers_processes=2))
    supervisor.failed = asyncio.get_running_loop().create_future()
    return supervisor, tries


@asynchronous
async def test_process_that_cannot_be_started_is_tried_again_while_another_serves(monkeypatch):
    supervisor, tries = failing(monkeypatch, (0.0, 0.0))
    supervisor.members[0].ready = True
    supervising = asyncio.create_task(supervisor._supervise(supervisor.members[1]))
    await until(lambda: len(tries) > 5)
    assert not supervisor.failed.done()
    supervisor.members[0].ready = False
    await until(lambda: supervisor.failed.done())
    with pytest.raises(ClusterFailed, match="no more processes"):
        supervisor.failed.result()
    await supervising


@asynchronous
async def test_end_does_not_wait_for_a_pause_between_two_starts(monkeypatch):
    supervisor, tries = failing(monkeypatch, (3600.0, 3600.0))
    supervising = asyncio.create_task(supervisor._supervise(supervisor.members[1]))
    await until(lambda: tries)
    supervisor.end()
    await supervising
    assert len(tries) == 1


@asynchronous
async def test_process_whose_configuration_cannot_be_sent_is_not_left_behind(monkeypatch):
    def refuse(self, kind: int, value) -> None:
        raise OverflowError("Integer value out of range")

    monkeypatch.setattr(router.cluster.Link, "send", refuse)
    supervisor = router.cluster.Cluster(RouterConfig(workers_processes=2))
    member = supervisor.members[0]
    with pytest.raises(OverflowError):
        await supervisor._run(member)
    assert member.link is None and member.process is not None
    assert await member.process.wait() == -signal.SIGKILL


def test_start_that_fails_in_every_process_ends_the_gateway(tmp_path):
    cert, key = certificate(tmp_path)
    process = launch(
        "import os, router.cluster as c, router.launch_router as l; make = c.Cluster.__init__\n"
        f"c.Cluster.__init__ = lambda self, config: (make(self, config), os.truncate({cert!r}, 0))[0]\n"
        "l.main()",
        "--host", "127.0.0.1", "--port", "0", "--workers-processes", "2",
        "--tls-cert-path", cert, "--tls-key-path", key, start="-c",
    )  # fmt: skip
    try:
        _, text = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 1 and "before it was ready" in text


def test_every_process_follows_the_events_of_every_worker(tmp_path):
    """A prompt that no process has seen goes, through whichever, where it is held; as token ids."""

    @asynchronous
    async def scenario():
        folder = write_tokenizer(tmp_path)
        held = [await KvWorker(folder, name=f"w{i}").start() for i in range(2)]
        flags = ("--policy", "cache_aware", "--worker-urls", *(w.url for w in held))
        async with running_beside(cluster(*flags)) as c:
            await until(lambda: all(len(w.streams) == 2 for w in held), 15)  # one of each process
            await asyncio.to_thread(wait_for, lambda: c.ready(2))
            for family, home in enumerate((held[1], held[0], held[1])):
                ids = list(range(100 * family, 100 * family + 64))
                home.store(ids)
                told = 4 * (family + 1)
                await asyncio.to_thread(wait_for, lambda told=told: c.metric("router_kv_pages{") == told)
                answers = [
                    await asyncio.to_thread(generate, c, None, input_ids=[*ids, 255]) for _ in range(8)
                ]
                assert {a.headers["x-smg-routed-worker-id"] for a in answers} == {home.url}
                assert {a.json()["meta_info"]["completion_tokens"] for a in answers} == {2}

    scenario()


def test_https_is_served_by_every_process(tmp_path):
    cert, key = certificate(tmp_path)
    flags = ("--tls-cert-path", cert, "--tls-key-path", key)
    trust = ssl.create_default_context(cafile=cert)
    with workers(1) as urls, cluster("--worker-urls", *urls, *flags, trust=trust) as c:
        wait_for(lambda: c.ready(1))
        assert all(generate(c, "x").status_code == 200 for _ in range(12))
        assert c.metric("smg_worker_requests_total{") == 12
        assert "data: [DONE]" in generate(c, "x", stream=True).text


def test_sigterm_drains_every_process_and_ends_all_with_zero():
    with workers(1, "--prefill-us", "6000") as urls, cluster("--worker-urls", *urls) as c:
        wait_for(lambda: c.ready(1))
        pids = c.children()
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(generate, c, "x" * 600) for _ in range(2)]  # 0.9 s each, serial
            wait_for(lambda: httpx.get(c.url + "/workers").json()["workers"][0]["load"] == 2)
            c.process.send_signal(signal.SIGTERM)
            assert [r.result().status_code for r in running] == [200, 200]
        assert c.process.wait(15) == 0
        assert len(pids) == 2 and not any(alive(pid) for pid in pids)


def test_members_end_when_their_supervisor_is_killed():
    with cluster() as c:
        pids = c.children()
        c.process.kill()
        c.process.wait()
        wait_for(lambda: not any(alive(pid) for pid in pids))
