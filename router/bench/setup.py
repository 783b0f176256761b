"""One gateway, ours or a peer, in front of simulated workers: started, looked at, ended."""

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass

from router.bench.load import Client, control, request

OURS = (
    f"{shlex.quote(sys.executable)} -m router.launch_router --host 127.0.0.1 --port {{port}} "
    "--policy {policy} --log-level error --worker-urls {urls}"
)
# Of gateways that are installed in a virtual environment of their own, {venv}.
PEERS = {
    "smg": "{venv}/bin/smg launch --host 127.0.0.1 --port {port} --prometheus-port {metrics_port} "
    "--policy {policy} --worker-urls {urls}",
    "sglang-router": "{venv}/bin/sglang-router launch --host 127.0.0.1 --port {port} "
    "--prometheus-port {metrics_port} --policy {policy} --worker-urls {urls}",
    "vllm-router": "{venv}/bin/vllm-router --host 127.0.0.1 --port {port} --prometheus-port {metrics_port} "
    "--policy {policy} --worker-urls {urls}",
}
BASE_PORT = 18300


def command_of(name: str, how: str) -> str:
    """A peer's command line: `how` is one already, or the virtual environment of a peer that is known.

    Raises ValueError for an environment of an unknown peer.
    """
    if "{port}" in how:
        return how
    if name not in PEERS:
        raise ValueError(f"--peer {name}={how} must be a command with {{port}}; known: {', '.join(PEERS)}")
    return PEERS[name].replace("{venv}", shlex.quote(how.rstrip("/")))


@dataclass
class Setup:
    """One gateway in front of its workers."""

    port: int
    process: subprocess.Popen
    worker_ports: list[int]
    workers: list[subprocess.Popen]
    worker_flags: list[str]

    def cpu_s(self) -> float:
        """CPU seconds of the gateway and its children so far."""
        total = 0
        for pid in _tree(self.process.pid):
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        total = 0
        for pid in _tree(self.process.pid):
            with open(f"/proc/{pid}/statm") as file:
                total += int(file.read().split()[1])
        return total * os.sysconf("SC_PAGE_SIZE") / 2**20

    def start_worker(self, i: int) -> None:
        command = [sys.executable, "-m", "router.bench.worker", "--port", str(self.worker_ports[i])]
        self.workers[i] = subprocess.Popen([*command, *self.worker_flags])

    async def worker_stats(self) -> list[dict]:
        return [await control(port, "/bench/stats", method="GET") for port in self.worker_ports]


@asynccontextmanager
async def setup(command: str, policy: str, count: int, *worker_flags: str):
    """Fresh workers and the gateway `command` in front of them, once an answer comes through."""
    port, worker_ports = BASE_PORT, [BASE_PORT + 10 + i for i in range(count)]
    made = Setup(port, None, worker_ports, [None] * count, list(worker_flags))  # type: ignore[arg-type, list-item]
    for i in range(count):
        made.start_worker(i)
    urls = " ".join(f"http://127.0.0.1:{p}" for p in worker_ports)
    words = shlex.split(
        command.format(port=port, urls=urls, policy=policy, metrics_port=BASE_PORT + 9), posix=True
    )
    try:
        for worker_port in worker_ports:  # gateways differ in how long they leave one alone that is not up
            await _up(worker_port)
        made.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220 (between measurements, nothing else runs)
        probe = request("/generate", {"text": "warm", "sampling_params": {"max_new_tokens": 1}})
        deadline = time.monotonic() + 60
        seen = 0
        while seen < count:  # until every worker has been reached, or nothing changes any more
            await asyncio.sleep(0.1)
            client = Client(port)
            for _ in range(4 * count):
                await client.ask(probe, 2)
            client.close()
            try:
                seen = sum(s["requests"] > 0 for s in await made.worker_stats())
            except OSError:
                seen = 0
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer through {words[0]}")
            if policy not in ("round_robin", "random") and seen:
                break
        await asyncio.sleep(1.0)
        for worker_port in worker_ports:
            await control(worker_port, "/bench/reset", {})
        yield made
    finally:
        for pid in _tree(made.process.pid) if made.process is not None else ():
            os.kill(pid, signal.SIGKILL)
        for worker in made.workers:
            worker.kill()
        if made.process is not None:
            made.process.wait()
        for worker in made.workers:
            worker.wait()


async def _up(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await control(port, "/health", method="GET")
                return
            except OSError:
                await asyncio.sleep(0.02)


def _tree(pid: int) -> list[int]:
    """`pid` and its descendants."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:
        return []
    return [pid, *(p for child in children for p in _tree(child))]
