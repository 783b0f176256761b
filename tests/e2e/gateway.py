"""A gateway process under test in front of real servers, and clients that check every answer."""

import itertools
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.e2e.process import PATIENCE_S, ROOT, Server, body, free_port, until

Launch = Callable[..., Server]
NEW = 4  # tokens of every answer of a Load


class Gateway:
    """`python -m router.MODULE` with its output in a file."""

    def __init__(self, log: Path, module: str, flags: list[str], port: int | None = None):
        self.port, self.log = port or free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(self.port), *flags],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def num_healthy(self) -> int:
        try:
            return self.http.get("/readiness").json()["healthy_workers"]
        except httpx.TransportError:
            return 0

    def until_healthy(self, count: int) -> "Gateway":
        until(lambda: self.process.poll() is not None or self.num_healthy() == count)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(\{{.*\}})? (\S+)", line)
            if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
                total += float(found[2])
        return total

    def post(self, path: str, **fields) -> httpx.Response:
        answer = self.http.post(path, json=fields)
        assert answer.status_code == 200, answer.text
        return answer

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()


@contextmanager
def serving(log: Path, module: str, *flags: str, port: int | None = None) -> Iterator[Gateway]:
    """`log`: a directory for it, or a file."""
    log = log / "gateway.log" if log.is_dir() else log
    gateway = Gateway(log, module, list(flags), port)
    try:
        yield gateway
    finally:
        gateway.close()


@contextmanager
def pair(launch: Launch, log: Path) -> Iterator[tuple[Gateway, list[Server]]]:
    """Two replicas and a gateway that follows the events of both."""
    servers = [launch(), launch()]
    urls = [server.url for server in servers]
    flags = ("--worker-urls", *urls, "--policy", "cache_aware", "--health-check-interval-secs", "1")
    try:
        for server in servers:
            server.until_ready()
        with serving(log, "router.launch_router", *flags) as gateway:
            gateway.until_healthy(2)
            until(lambda: gateway.http.get("/metrics").text.count("router_kv_pages{") == 2)
            yield gateway, servers
    finally:
        for server in servers:
            server.close()


class Load:
    """Clients that ask one request after the other, and check that each answer is the one that must come.

    A refused connection is tried again, and so is a 503 that says when: neither is a lost request.
    """

    def __init__(self, url: str, answers: dict[tuple[int, ...], list[int]], clients: int = 4):
        self.url, self.answers = url, answers
        self.right, self.refused, self.later = 0, 0, 0
        self.wrong: list[str] = []
        self.by_worker: Counter[str] = Counter()
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(i,)) for i in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        told = f"{self.right} right, {self.refused} refused and {self.later} told to come later"
        print(f"{told}; {len(self.wrong)} lost or wrong; {dict(self.by_worker)}")
        if kind is None:
            assert self.wrong == []

    def more(self, count: int) -> None:
        """Wait for as many more right answers."""
        wanted = self.right + count
        until(lambda: self.right >= wanted or bool(self.wrong))
        assert self.wrong == []

    def _client(self, seed: int) -> None:
        prompts = list(self.answers)
        random.Random(seed).shuffle(prompts)
        with httpx.Client(timeout=PATIENCE_S) as http:
            for prompt in itertools.cycle(prompts):
                if self.stopping.is_set():
                    return
                try:
                    answer = http.post(self.url + "/generate", json=body(list(prompt), NEW))
                except httpx.ConnectError:
                    self.refused += 1
                    self.stopping.wait(0.02)
                    continue
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                if answer.status_code == 503 and "retry-after" in answer.headers:
                    self.later += 1
                    self.stopping.wait(0.02)
                elif answer.status_code != 200 or answer.json()["output_ids"] != self.answers[prompt]:
                    self.wrong.append(f"{answer.status_code} {answer.text}")
                else:
                    self.right += 1
                    self.by_worker[answer.headers["x-smg-routed-worker-id"]] += 1


def right_answers(http: httpx.Client) -> dict[tuple[int, ...], list[int]]:
    """Prompts of different lengths, and what greedy sampling makes of each."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 100) for _ in range(length)] for length in range(8, 56, 4)]
    return {tuple(p): http.post("/generate", json=body(p, NEW)).json()["output_ids"] for p in prompts}
