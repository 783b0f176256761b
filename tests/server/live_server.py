"""A real server over a fake engine, on a free port in a thread."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import tiny_tokenizer
from fake_engine import FakeEngine
from starlette.applications import Starlette

from jaxserve.config import ServerConfig
from jaxserve.server.app import create_app, serve
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer


@dataclass
class Server:
    engine: FakeEngine
    app: Starlette
    url: str
    http: httpx.Client
    tokenizer: Tokenizer

    def say(self, text: str) -> None:
        """From now on the model answers every prompt with this text, then ends."""
        ids = self.tokenizer.encode(text)
        self.engine.script = lambda request: list(ids)

    def generate(self, **body: object) -> httpx.Response:
        return self.http.post("/generate", json=body)


class Running:
    """A server on a free port in a thread of its own."""

    def __init__(self, app: Starlette, grace_s: float = 5.0):
        self._app, self._grace_s = app, grace_s
        self._ready = threading.Event()
        self.port = 0
        self.thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.thread.start()
        assert self._ready.wait(30)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(
            self._app,
            "127.0.0.1",
            0,
            stop=self._stop,
            grace_s=self._grace_s,
            log_level="warning",
            started=self._started,
        )

    def _started(self, port: int) -> None:
        self.port = port
        self._ready.set()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)


def make_app(
    engine: FakeEngine, tokenizer: Tokenizer | None, limit: int = 2000, **config: object
) -> Starlette:
    """`limit` is max_queued_requests."""
    return create_app(
        engine,
        ServerConfig(model_path="tiny/model", max_queued_requests=limit, **config),  # type: ignore[arg-type]
        tokenizer,
        chat_template=ChatTemplate(tiny_tokenizer.CHAT_TEMPLATE),
        generation_config={"temperature": 0.6, "top_p": 0.9, "top_k": 0, "bos_token_id": 0},
        health_timeout_s=1.0,
    )


@contextlib.contextmanager
def serving(tokenizer: Tokenizer, **config: object) -> Iterator[Server]:
    """A server with its own configuration."""
    engine = FakeEngine(lambda request: [])
    app = make_app(engine, tokenizer, **config)
    running = Running(app)
    url = f"http://127.0.0.1:{running.port}"
    try:
        with httpx.Client(base_url=url, timeout=10) as http:
            yield Server(engine, app, url, http, tokenizer)
    finally:
        running.stop()
        running.thread.join(10)
