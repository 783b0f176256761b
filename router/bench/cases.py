"""What is measured of a gateway: each case starts fresh workers and a fresh gateway, and fills one row."""

import asyncio
import json
import random
import string
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from router.bench.blast import blast
from router.bench.kv import write_tokenizer
from router.bench.load import Client, Result, closed_loop, control, percentile, request
from router.bench.setup import Setup, setup

ALPHABET = string.ascii_letters + string.digits + " "


def text_of(seed: str, length: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET, k=length))


def generate(text: str, tokens: int = 8, stream: bool = False) -> bytes:
    body = {"text": text, "sampling_params": {"max_new_tokens": tokens}, "stream": stream}
    return request("/generate", body)


Row = dict[str, float]
Run = Callable[[str, float, str], Awaitable[Row]]  # of a command, the share of requests, a policy


# ---- overhead: two workers that answer at once ----


async def overhead(command: str, scale: float, policy: str, *worker_flags: str) -> Row:
    row: Row = {}
    async with setup(command, policy, 2, *(worker_flags or ("--instant",))) as s:
        small, large = generate("x" * 200), generate(text_of("large", 8192))
        alone = await closed_loop(s.worker_ports[0], lambda i: small, int(1000 * scale), 1)
        through = await closed_loop(s.port, lambda i: small, int(1000 * scale), 1)
        p50 = [percentile([r.latency_s for r in results], 0.5) for results in (alone, through)]
        row["added p50 us, c1"] = (p50[1] - p50[0]) * 1e6
        for name, raw in (("200 ch", small), ("8k ch", large)):
            await blast(s.port, raw, 500, 32)
            cpu_s = s.cpu_s()
            made = await blast(s.port, raw, int(10_000 * scale), 32)
            row[f"CPU us/req, {name}"] = (s.cpu_s() - cpu_s) / made.answered * 1e6
            row[f"req/s c32, {name}"] = made.answered / made.took_s
            row["failed"] = row.get("failed", 0) + made.failed
        cpu_s = s.cpu_s()
        results = await closed_loop(s.port, lambda i: generate("x" * 200, 200, True), int(200 * scale), 8)
        row["CPU us/SSE event"] = (s.cpu_s() - cpu_s) / max(1, sum(r.events for r in results)) * 1e6
    return row


async def exact_overhead(command: str, scale: float, policy: str) -> Row:
    """Prompts are tokenized in the gateway, one token a byte: four times the ids of a usual tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder))
        return await overhead(command, scale / 5, policy, "--instant", "--tokenizer", tokenizer)


# ---- routing quality ----


async def families(command: str, scale: float, policy: str, *more_flags: str) -> Row:
    """64 shared prefixes of 4,096 characters, 32 requests each with 512 more, shuffled."""
    prefixes = [text_of(f"family {i}", 4096) for i in range(64)]
    order = [(f, k) for f in range(64) for k in range(int(32 * scale) or 1)]
    random.Random(1).shuffle(order)
    raws = [generate(prefixes[f] + text_of(f"{f} {k}", 512), 8, True) for f, k in order]
    flags = ("--cache-blocks", "1536", "--prefill-us", "20", "--decode-us", "1000", *more_flags)
    async with setup(command, policy, 4, *flags) as s:
        started = time.perf_counter()
        results = await closed_loop(s.port, lambda i: raws[i], len(raws), 32)
        return await _quality(s, results, time.perf_counter() - started)


async def exact_families(command: str, scale: float, policy: str) -> Row:
    """`families` by workers that publish what they hold."""
    with tempfile.TemporaryDirectory() as folder:
        return await families(command, scale, policy, "--tokenizer", write_tokenizer(Path(folder)))


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


CASES: dict[str, Run] = {
    "overhead": overhead,
    "exact_overhead": exact_overhead,
    "families": families,
    "exact_families": exact_families,
    "multiturn": multiturn,
    "multiturn128": lambda command, scale, policy: multiturn(command, scale, policy, 128),
    "killed": killed,
    "slow": faulty({"delay_s": 0.2}),
    "errors500": faulty({"status": 500}),
    "errors503": faulty({"status": 503}),
    "drops": faulty({"drop": True}),
    "aborts": faulty({"abort_after": 3}, stream=True),
    "memory": memory,
}
