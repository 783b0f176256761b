"""A server process under test: how it is started, asked and waited for."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[2]
PATIENCE_S = 180.0  # nothing here is timed; this only ends a test that would hang


class Server:
    """`python -m jaxserve.launch_server` with its output in a file."""

    def __init__(self, log: Path, flags: list[str], port: int):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxserve.launch_server", "--port", str(port), *flags],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        self._engine: psutil.Process | None = None

    def health(self) -> int | None:
        """The status of /health; None while the port is closed."""
        try:
            return self.http.get("/health").status_code
        except httpx.TransportError:
            return None

    def until_ready(self) -> "Server":
        until(lambda: self.process.poll() is not None or self.health() == 200)
        assert self.process.poll() is None, self.output()
        return self

    def until_logged(self, text: str) -> None:
        until(lambda: self.process.poll() is not None or text in self.output())
        assert text in self.output()

    @property
    def engine(self) -> psutil.Process:
        """The engine's process, as long as it lives and after."""
        if self._engine is None:
            children = psutil.Process(self.process.pid).children
            until(lambda: bool(children()))
            [self._engine] = children()
        return self._engine

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(PATIENCE_S)

    def loads(self) -> dict:
        [row] = self.http.get("/v1/loads").json()["loads"]
        return row

    def until_idle(self) -> None:
        """Until no request is left and no page is held by one."""
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        until(lambda: [self.loads()[name] for name in names] == [0, 0, 0])

    def generate(self, prompt: list[int], new: int, **fields) -> dict:
        response = self.http.post("/generate", json=body(prompt, new, **fields))
        assert response.status_code == 200, response.text
        return response.json()

    def close(self) -> None:
        """End what is left, whatever happened."""
        self.http.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.wait()


def body(prompt: list[int], new: int, **fields) -> dict:
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    return {
        "input_ids": prompt,
        "sampling_params": {**sampling, **fields.pop("sampling_params", {})},
        **fields,
    }


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
