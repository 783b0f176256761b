"""Measures gateways side by side on this machine and prints one table.

    python -m tools.bench_router                                  # ours, every case
    python -m tools.bench_router --cases overhead families \\
        --peer 'smg=smg launch --host 127.0.0.1 --port {port} --prometheus-port {metrics_port}
                --policy {policy} --worker-urls {urls}'

A peer is any command that serves on {port} in front of the {urls} with {policy}. Workers are simulated
(`router.bench.worker`). Every case starts fresh workers and a fresh gateway; numbers of one run can be
compared, numbers of two runs cannot: the machine is not the same twice.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from router.bench.load import Client, Result, closed_loop, control, percentile, request

OURS = (
    f"{shlex.quote(sys.executable)} -m router.launch_router --host 127.0.0.1 --port {{port}} "
    "--policy {policy} --log-level error --worker-urls {urls}"
)
BASE_PORT = 18300
ALPHABET = string.ascii_letters + string.digits + " "


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
    made.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220 (between measurements, nothing else runs)
    try:
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
        made.process.send_signal(signal.SIGKILL)
        for worker in made.workers:
            worker.kill()
        made.process.wait()
        for worker in made.workers:
            worker.wait()


def _tree(pid: int) -> list[int]:
    """`pid` and its descendants."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:
        return []
    return [pid, *(p for child in children for p in _tree(child))]


def text_of(seed: str, length: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET, k=length))


def generate(text: str, tokens: int = 8, stream: bool = False) -> bytes:
    body = {"text": text, "sampling_params": {"max_new_tokens": tokens}, "stream": stream}
    return request("/generate", body)


Row = dict[str, float]


# ---- overhead ----


async def overhead(command: str, scale: float, policy: str) -> Row:
    row: Row = {}
    async with setup(command, policy, 2) as s:
        small, large = generate("x" * 200), generate(text_of("large", 8192))
        alone = await closed_loop(s.worker_ports[0], lambda i: small, int(1000 * scale), 1)
        through = await closed_loop(s.port, lambda i: small, int(1000 * scale), 1)
        p50 = [percentile([r.latency_s for r in results], 0.5) for results in (alone, through)]
        row["added p50 us, c1"] = (p50[1] - p50[0]) * 1e6
        for name, raw in (("200 ch", small), ("8k ch", large)):
            await closed_loop(s.port, lambda i, raw=raw: raw, 500, 32)
            cpu_s, started = s.cpu_s(), time.perf_counter()
            results = await closed_loop(s.port, lambda i, raw=raw: raw, int(10_000 * scale), 32)
            took_s = time.perf_counter() - started
            row[f"CPU us/req, {name}"] = (s.cpu_s() - cpu_s) / len(results) * 1e6
            row[f"req/s c32, {name}"] = len(results) / took_s
            row["failed"] = row.get("failed", 0) + sum(not r.ok for r in results)
        cpu_s = s.cpu_s()
        results = await closed_loop(s.port, lambda i: generate("x" * 200, 200, True), int(200 * scale), 8)
        row["CPU us/SSE event"] = (s.cpu_s() - cpu_s) / max(1, sum(r.events for r in results)) * 1e6
    return row


# ---- routing quality ----


async def families(command: str, scale: float, policy: str) -> Row:
    """64 shared prefixes of 4,096 characters, 32 requests each with 512 more, shuffled."""
    prefixes = [text_of(f"family {i}", 4096) for i in range(64)]
    order = [(f, k) for f in range(64) for k in range(int(32 * scale) or 1)]
    random.Random(1).shuffle(order)
    raws = [generate(prefixes[f] + text_of(f"{f} {k}", 512), 8, True) for f, k in order]
    flags = ("--cache-blocks", "1536", "--prefill-us", "20", "--decode-us", "1000")
    async with setup(command, policy, 4, *flags) as s:
        started = time.perf_counter()
        results = await closed_loop(s.port, lambda i: raws[i], len(raws), 32)
        return await _quality(s, results, time.perf_counter() - started)


async def multiturn(command: str, scale: float, policy: str, concurrency: int = 32) -> Row:
    """80 growing chats of 12 turns under one system prompt; a chat waits for a free client, no more."""
    flags = ("--cache-blocks", "1626", "--prefill-us", "20", "--decode-us", "1000")
    turns = int(12 * scale) or 1
    async with setup(command, policy, 4, *flags) as s:
        waiting: asyncio.Queue = asyncio.Queue()
        system = {"role": "system", "content": text_of("system", 2048)}
        for chat in random.Random(2).sample(range(80), 80):
            waiting.put_nowait((chat, 0, [system]))
        left, results = 80 * turns, []

        async def slot() -> None:
            nonlocal left
            client = Client(s.port)
            while (item := await waiting.get()) is not None:
                chat, turn, messages = item
                messages.append({"role": "user", "content": text_of(f"chat {chat} {turn}", 512)})
                body = {"model": "bench", "messages": messages, "max_tokens": 16, "stream": True}
                result = await client.ask(request("/v1/chat/completions", body))
                results.append(result)
                if result.ok:
                    events = [json.loads(e[6:]) for e in result.body.split(b"\n\n")[:-2]]
                    reply = "".join(e["choices"][0]["delta"]["content"] for e in events)
                    messages.append({"role": "assistant", "content": reply})
                left -= 1
                if turn + 1 < turns:
                    waiting.put_nowait((chat, turn + 1, messages))
                if not left:
                    for _ in range(concurrency):
                        waiting.put_nowait(None)
            client.close()

        started = time.perf_counter()
        await asyncio.gather(*(slot() for _ in range(concurrency)))
        return await _quality(s, results, time.perf_counter() - started)


async def _quality(s: Setup, results: list[Result], took_s: float) -> Row:
    stats = await s.worker_stats()
    busy = [w["busy_s"] for w in stats]
    return {
        "req/s": len(results) / took_s,
        "hit": sum(w["cached_tokens"] for w in stats) / max(1, sum(w["prompt_tokens"] for w in stats)),
        "work max/mean": max(busy) / (sum(busy) / len(busy) or 1),
        "TTFT p99 ms": percentile([r.first_s - r.started_s for r in results if r.first_s], 0.99) * 1e3,
        "failed": sum(not r.ok for r in results),
    }


# ---- faults: three workers, 16 clients ----


async def killed(command: str, scale: float, policy: str) -> Row:
    """SIGKILL after 1 s, back after 2 s: requests lost, and seconds until it is used again."""
    raw = generate("x" * 200)
    async with setup(command, policy, 3, "--prefill-us", "20") as s:
        started_s = 0.0

        async def act() -> None:
            nonlocal started_s
            s.workers[0].kill()
            s.workers[0].wait()
            await asyncio.sleep(2)
            s.start_worker(0)
            while True:
                try:
                    await control(s.worker_ports[0], "/health", method="GET")
                    break
                except OSError:
                    await asyncio.sleep(0.01)
            started_s = time.perf_counter()

        back_s = float("inf")

        async def watch() -> None:
            nonlocal back_s
            while time.perf_counter() < stop_s:
                await asyncio.sleep(0.02)
                if not started_s:
                    continue
                stats = await control(s.worker_ports[0], "/bench/stats", method="GET")
                if stats["requests"]:
                    back_s = time.perf_counter() - started_s
                    return

        stop_s = time.perf_counter() + 8
        results, _ = await asyncio.gather(
            closed_loop(s.port, lambda i: raw, 10**9, 16, duration_s=7, at=(1.0, act)), watch()
        )
        return {"lost": sum(not r.ok for r in results), "used again after s": back_s}


def faulty(fault: dict, stream: bool = False):
    async def case(command: str, scale: float, policy: str) -> Row:
        raw = generate("x" * 200, 8, stream)
        async with setup(command, policy, 3) as s:
            await control(s.worker_ports[0], "/bench/config", fault)
            results = await closed_loop(s.port, lambda i: raw, 10**9, 16, duration_s=5 * scale)
            late = results[len(results) // 2 :]
            return {
                "requests": len(results),
                "lost": sum(not r.ok for r in results),
                "lost, 2nd half": sum(not r.ok for r in late),
                "p99 ms": percentile([r.latency_s for r in results], 0.99) * 1e3,
            }

    return case


async def memory(command: str, scale: float, policy: str) -> Row:
    """Growth over 20,000 different prompts of 4 KB."""
    async with setup(command, policy, 2) as s:
        await closed_loop(s.port, lambda i: generate("warm"), 500, 16)
        before = s.rss_mib()
        await closed_loop(s.port, lambda i: generate(text_of(str(i), 4096)), int(20_000 * scale), 16)
        return {"growth MiB": s.rss_mib() - before}


@dataclass
class Case:
    run: Callable[[str, float, str], Awaitable[Row]]
    policies: tuple[str, ...] = ("cache_aware",)
    rows: dict[str, Row] = field(default_factory=dict)


CASES = {
    "overhead": Case(overhead, ("round_robin", "cache_aware")),
    "families": Case(families, ("cache_aware", "round_robin")),
    "multiturn": Case(multiturn, ("cache_aware", "round_robin")),
    "multiturn128": Case(lambda c, s, p: multiturn(c, s, p, 128)),
    "killed": Case(killed),
    "slow": Case(faulty({"delay_s": 0.2})),
    "errors500": Case(faulty({"status": 500})),
    "errors503": Case(faulty({"status": 503})),
    "drops": Case(faulty({"drop": True})),
    "aborts": Case(faulty({"abort_after": 3}, stream=True)),
    "memory": Case(memory),
}


async def run(gateways: dict[str, str], cases: list[str], scale: float) -> None:
    print("| case | policy | gateway | " + "numbers |\n|---|---|---|---|", flush=True)
    for name in cases:
        for policy in CASES[name].policies:
            for gateway, command in gateways.items():
                try:
                    row = await CASES[name].run(command, scale, policy)
                    text = "; ".join(f"{key} {value:.4g}" for key, value in row.items())
                except (TimeoutError, OSError) as error:
                    text = f"failed: {error}"
                print(f"| {name} | {policy} | {gateway} | {text} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--without-ours", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each case's requests or time")
    given = parser.parse_args()
    gateways = {} if given.without_ours else {"ours": OURS}
    for peer in given.peer:
        name, _, command = peer.partition("=")
        gateways[name] = command
    try:
        import uvloop
    except ImportError:
        asyncio.run(run(gateways, given.cases, given.scale))
    else:
        uvloop.run(run(gateways, given.cases, given.scale))


if __name__ == "__main__":
    main()
