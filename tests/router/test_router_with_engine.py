"""Two real engine replicas of a tiny model on CPU behind the co-launcher (run with --slow, 40 s)."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from test_router_launch import alive, wait_for

from router.replicas import free_ports

MODEL = Path(__file__).parent.parent / "golden" / "llama"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("jaxserve.launch_server") is None, reason="no engine here"),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no tiny model here"),
]


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def port_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[words.index(b"--port") + 1].decode()


@pytest.fixture(scope="module")
def gateway():
    port = free_ports(1, 42300)[0]
    command = f"""-m router.launch_server --model-path {MODEL} --device cpu --load-format dummy
        --skip-tokenizer-init --dp-size 2 --max-total-tokens 2048 --max-running-requests 2
        --chunked-prefill-size 64 --context-length 512 --host 127.0.0.1 --port {port}
        --router-dp-worker-base-port 43300 --router-policy cache_aware
        --router-shutdown-grace-period-secs 5"""
    process = subprocess.Popen([sys.executable, *command.split()])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: httpx.get(url + "/readiness").json()["healthy_workers"] == 2, 180)
        yield url, process
    finally:
        process.terminate()
        process.wait(20)


def generate(url: str, ids: list[int], **more):
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 3, "temperature": 0}, **more}
    return httpx.post(url + "/generate", json=body, timeout=60)


def test_shared_prefixes_land_together_and_the_engine_confirms_it(gateway):
    url, _ = gateway
    answers = [generate(url, [*range(1, 129), 200 + i]) for i in range(4)]
    assert len({a.headers["x-smg-routed-worker-id"] for a in answers}) == 1
    assert [a.json()["meta_info"]["cached_tokens"] for a in answers] == [0, 128, 128, 128]


def test_stream_of_the_engine_passes_through_whole(gateway):
    url, _ = gateway
    text = generate(url, [5, 6, 7], stream=True).text
    assert text.count("data: {") >= 1 and text.endswith("data: [DONE]\n\n")


def test_killed_engine_loses_no_request_and_serves_again(gateway):
    url, process = gateway
    statuses, stop = [], threading.Event()

    def load() -> None:
        while not stop.is_set():
            statuses.append(generate(url, [9, 8, 7]).status_code)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    victim = children(process.pid)[0]
    dead = f"http://127.0.0.1:{port_of(victim)}"
    os.killpg(victim, signal.SIGKILL)
    wait_for(lambda: not alive(victim))
    wait_for(lambda: httpx.get(url + "/readiness").json()["healthy_workers"] == 1)
    wait_for(lambda: httpx.get(url + "/readiness").json()["healthy_workers"] == 2, 120)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200} and len(statuses) > 20
    workers = httpx.get(url + "/workers").json()["workers"]
    assert next(w for w in workers if w["url"] == dead)["is_healthy"]


def test_sigterm_ends_gateway_and_engines(gateway):
    _, process = gateway
    engines = children(process.pid)
    assert len(engines) == 2
    process.terminate()
    assert process.wait(20) == 0
    assert not any(alive(pid) for pid in engines)
