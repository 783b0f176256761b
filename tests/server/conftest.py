"""One real server over a fake engine, in a thread, shared by the tests of this folder."""

import asyncio
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))

import tiny_tokenizer
from fake_engine import INFO, FakeEngine
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
        assert self._ready.wait(10)

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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(tiny_tokenizer.write(tmp_path_factory.mktemp("tokenizer")))


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
        health_timeout_s=0.2,
    )


@pytest.fixture(scope="session")
def shared_server(tokenizer: Tokenizer) -> Iterator[Server]:
    engine = FakeEngine(lambda request: [], INFO)
    app = make_app(engine, tokenizer)
    running = Running(app)
    url = f"http://127.0.0.1:{running.port}"
    with httpx.Client(base_url=url, timeout=10) as http:
        yield Server(engine, app, url, http, tokenizer)
    running.stop()
    running.thread.join(10)


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared server, its engine as new. No test may leave a request running."""
    shared_server.engine.__init__(lambda request: [], INFO)
    shared_server.say("hello world")
    yield shared_server
    assert not shared_server.engine.running
    assert shared_server.app.state.service.num_running == 0
    shared_server.app.state.service._dead = None
    shared_server.app.state.draining = False
    shared_server.app.state.ready = True
