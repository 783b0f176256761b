"""The real launcher in a process of its own, on a free port, over a tiny checkpoint with a tokenizer."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.process import ROOT, Server, free_port
from tests.text import tiny_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded tiny Llama with a long context, a byte tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("checkpoint")
    source = ROOT / "tests" / "golden" / "llama"
    shutil.copy(source / "model.safetensors", directory)
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    tiny_tokenizer.write(directory)
    (directory / "chat_template.jinja").write_text(tiny_tokenizer.CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def flags(checkpoint: Path, compile_cache: str) -> list[str]:
    """A small server of the tiny checkpoint."""
    return [
        *("--model-path", str(checkpoint), "--compile-cache-dir", compile_cache),
        *("--max-running-requests", "8", "--chunked-prefill-size", "64", "--max-total-tokens", "4096"),
    ]


Launch = Callable[..., Server]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Iterator[Launch]:
    """`launch(*more_flags)`: a server that has just been started; all are ended with the session."""
    servers: list[Server] = []

    def start(
        *more: str, base: list[str] | None = None, port: int | None = None, log: Path | None = None
    ) -> Server:
        log = log or tmp_path_factory.mktemp("server") / "log"
        server = Server(log, [*(flags if base is None else base), *more], port or free_port())
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def server(launch: Launch) -> Iterator[Server]:
    """One server for a file of tests; its end is part of the proof."""
    server = launch().until_ready()
    yield server
    assert server.process.poll() is None, server.output()
    server.until_idle()
    engine = server.engine
    server.process.terminate()
    assert server.wait() == 0, server.output()
    assert not engine.is_running()
