"""A gateway and mock workers in the test's event loop, and a client that speaks HTTP by hand."""

import asyncio
import functools
import inspect
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from mock_worker import MockWorker

from router.app import Gateway, build_app
from router.config import RouterConfig
from router.http_server import GatewayServer
from router.launch_router import uvicorn_config

DEADLINE_S = 60.0


def asynchronous(test):
    """Run an `async def` test on a loop of its own, for at most DEADLINE_S."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def bounded():
            async with asyncio.timeout(DEADLINE_S):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


async def until(condition, timeout_s: float = 20.0) -> float:
    """Wait for `condition()`; returns the seconds it took. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return loop.time() - started


class QuietServer(GatewayServer):
    """Without signal handlers: they belong to the test runner."""

    def handle_exit(self, sig: int, frame) -> None:
        raise AssertionError("no signals in tests")


@dataclass
class Running:
    gateway: Gateway
    port: int
    workers: list[MockWorker]
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metric(self, text: str) -> float:
        """The value of the sample that starts with `text`; 0 without one."""
        for line in self.gateway.metrics.text().decode().splitlines():
            if line.startswith(text):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def registered(self, worker: MockWorker):
        return self.gateway.registry.by_url[worker.url]

    async def chat(self, text: str = "hello", **more: Any) -> httpx.Response:
        body = {"model": "mock", "messages": [{"role": "user", "content": text}], **more}
        return await self.client.post("/v1/chat/completions", json=body)

    async def stream(self, text: str = "hello", **more: Any) -> str:
        """The whole text of a streamed chat answer."""
        response = await self.chat(text, stream=True, **more)
        return response.text

    def split(self) -> list[int]:
        """Data requests seen by each worker."""
        return [len(w.seen) for w in self.workers]


@asynccontextmanager
async def running(num_workers: int = 2, *, wait: bool = True, workers=None, **settings: Any):
    """A gateway in front of mock workers, all ready."""
    if workers is None:
        workers = [await MockWorker(name=f"w{i}").start() for i in range(num_workers)]
    config = RouterConfig.from_keywords(
        host="127.0.0.1", port=0, worker_urls=[w.url for w in workers], **settings
    )
    gateway, app = build_app(config)
    server = QuietServer(uvicorn_config(config, app), gateway, 1.0)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    if wait:
        await until(lambda: len(gateway.registry.usable(None)) >= len(workers))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        try:
            yield Running(gateway, port, workers, client)
        finally:
            server.should_exit = True
            server.force_exit = True
            await task
            for worker in workers:
                worker.thaw()
                await worker.kill()


class RawClient:
    """One connection, bytes in and out: for half-sent requests and sudden departures."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> "RawClient":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def post(self, path: str, value: Any, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
        head += "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        self.writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)

    async def read_until(self, marker: bytes) -> bytes:
        return await self.reader.readuntil(marker)

    def leave(self) -> None:
        self.writer.transport.abort()


CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hello"}]}
