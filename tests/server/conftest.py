"""One real server over a fake engine, in a thread, shared by the tests of this folder."""

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))

import tiny_tokenizer
from fake_engine import INFO, FakeEngine
from live_server import Running, Server, make_app

from jaxserve.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(tiny_tokenizer.write(tmp_path_factory.mktemp("tokenizer")))


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
