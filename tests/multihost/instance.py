"""One instance over several launchers here, each with an engine process and its own virtual devices."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.engine.asking import Row

READY_S = 240.0  # compiling on a busy machine
ENDED_S = 20.0  # the promise: so long after a failure no process is left


class Instance:
    """Launchers of hosts 0..n-1; logs are kept, since they are part of what is promised."""

    def __init__(self, directory: Path, model: Path | str, num_hosts: int, **options: Any):
        self.directory = directory
        self.http_port, self.health_port, dist_port = free_port(), free_port(), free_port(2)
        self.options = {
            "model_path": model,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "device": "cpu",
            "max_running_requests": 4,
            "chunked_prefill_size": 32,
            "max_total_tokens": 512,
            "host": "127.0.0.1",
            "port": self.http_port,
            "nnodes": num_hosts,
            "dist_init_addr": f"127.0.0.1:{dist_port}",
            "dist_timeout": 60,
            **options,
        }
        self.launchers: dict[int, psutil.Popen] = {}
        self.seen: dict[int, psutil.Process] = {}

    def start(self, rank: int, own: dict[str, Any] | None = None, through: tuple[str, ...] = ()) -> None:
        """Host `rank`, with options of its own over the instance's, by a command that becomes it."""
        path = self.directory / f"host{rank}.log"
        with path.open("w") as log:
            process = psutil.Popen(
                [
                    *through,
                    sys.executable,
                    "-m",
                    "jaxserve.launch_server",
                    *flags(**{**self.options, "node_rank": rank, **(own or {})}),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.launchers[rank] = process

    def wait_ready(self) -> None:
        until_s = time.monotonic() + READY_S
        with httpx.Client() as http:  # one, since each reads the certificates of the machine: 25 ms
            while time.monotonic() < until_s:
                with contextlib.suppress(httpx.HTTPError):
                    if http.get(f"{self.url}/health").status_code == 200:
                        return
                assert all(p.poll() is None for p in self.launchers.values()), self.logs()
                time.sleep(0.1)
        raise AssertionError(f"not ready after {READY_S} s\n{self.logs()}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def engine(self, rank: int) -> psutil.Process:
        [child] = self.launchers[rank].children()
        return child

    def processes(self) -> list[psutil.Process]:
        """Every process there ever was."""
        for launcher in self.launchers.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                self.seen |= {p.pid: p for p in (launcher, *launcher.children(recursive=True))}
        return list(self.seen.values())

    def ask(self, rows: list[Row]) -> list[dict[str, Any]]:
        body = {"input_ids": [r.prompt for r in rows], "sampling_params": [r.params for r in rows]}
        return httpx.post(f"{self.url}/generate", json=body, timeout=120).raise_for_status().json()

    def log(self, rank: int) -> str:
        return (self.directory / f"host{rank}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"--- host {rank}\n{self.log(rank)}" for rank in self.launchers)

    def wait_ended(self, within_s: float = ENDED_S) -> list[int]:
        """Exit statuses of the launchers once no process is left; fails when one outlasts the time."""
        launchers = list(self.launchers.values())
        engines = [p for p in self.processes() if p not in launchers]
        _, left = psutil.wait_procs([*launchers, *engines], timeout=within_s)
        assert not left, f"still there after {within_s} s: {left}\n{self.logs()}"
        return [p.wait(1) for p in launchers]


@contextlib.contextmanager
def instance(directory: Path, model: Path | str, num_hosts: int, **options: Any) -> Iterator[Instance]:
    """All hosts started and ready; whatever is left at the end is killed."""
    with unstarted(directory, model, num_hosts, **options) as made:
        for rank in range(num_hosts):
            made.start(rank)
        made.wait_ready()
        yield made


@contextlib.contextmanager
def unstarted(directory: Path, model: Path | str, num_hosts: int, **options: Any) -> Iterator[Instance]:
    made = Instance(directory, model, num_hosts, **options)
    try:
        yield made
    finally:
        for process in made.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Client:
    """A request that runs while something happens: its answer, or how it failed."""

    def __init__(self, made: Instance, row: Row):
        self.tokens: list[int] = []
        self.most_at_once = 0  # tokens of one event
        self.error: str | None = None
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(made.url, row), daemon=True)
        self._thread.start()
        assert self._first.wait(60), made.logs()

    def _run(self, url: str, row: Row) -> None:
        body = {"input_ids": row.prompt, "sampling_params": row.params, "stream": True}
        try:
            with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    self._take(line)
        except httpx.HTTPError as error:
            self.error = self.error or repr(error)
        self._first.set()

    def _take(self, line: str) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = event["error"]["message"]
        else:
            self.most_at_once = max(self.most_at_once, len(event["output_ids"]) - len(self.tokens))
            self.tokens = event["output_ids"]
            self._first.set()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the client still waits"


def flags(**options: Any) -> list[str]:
    out = []
    for name, value in options.items():
        word = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{word}" if value else f"--no-{word}")
        else:
            out += [f"--{word}", str(value)]
    return out


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            for number in range(port + 1, port + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port
