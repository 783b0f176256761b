"""The two launchers as processes: flags, supervision, signals."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import httpx
import pytest
from gateway_harness import asynchronous, until
from mock_worker import MockWorker

from router.app import build_app
from router.config import ConfigError, RouterConfig
from router.http_server import GatewayServer
from router.launch_router import uvicorn_config
from router.launch_server import make_parser, make_plan
from router.replicas import Replicas, ReplicasFailed, ReplicaSpec, free_ports

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def plan_of(command: str):
    return make_plan(make_parser(), command.split())


def flag(replica, name: str) -> str:
    return replica.command[replica.command.index(name) + 1]


def test_dp_size_without_dp_attention_is_that_many_replicas_on_disjoint_devices():
    plan = plan_of("--model-path m --tp 4 --dp-size 2 --host 0.0.0.0 --port 30000")
    assert [flag(r, "--base-gpu-id") for r in plan.replicas] == ["0", "4"]
    assert [flag(r, "--tp") for r in plan.replicas] == ["4", "4"]
    assert [flag(r, "--dp-size") for r in plan.replicas] == ["1", "1"]
    assert len({r.port for r in plan.replicas}) == 2
    assert plan.config.worker_urls == tuple(r.url for r in plan.replicas)
    assert (plan.config.host, plan.config.port, plan.config.policy) == ("0.0.0.0", 30000, "round_robin")


def test_dp_attention_is_one_instance_that_is_routed_to_by_rank():
    plan = plan_of("--model-path m --tp 8 --dp-size 8 --ep 8 --enable-dp-attention --moe-a2a-backend deepep")
    (replica,) = plan.replicas
    assert flag(replica, "--dp-size") == "8" and "--enable-dp-attention" in replica.command
    assert flag(replica, "--moe-a2a-backend") == "deepep" and flag(replica, "--ep") == "8"
    assert plan.config.dp_aware


def test_router_flags_reach_the_gateway_and_all_others_the_engines():
    plan = plan_of(
        "--model-path m --tp 4 --dp-size 4 --router-policy cache_aware --router-prometheus-port 10001 "
        "--router-health-check-interval-secs 30 --enable-two-batch-overlap"
    )
    config = plan.config
    assert (config.policy, config.prometheus_port) == ("cache_aware", 10001)
    assert config.health_check_interval_secs == 30
    assert all("--enable-two-batch-overlap" in r.command for r in plan.replicas)
    assert not any("--router" in part for r in plan.replicas for part in r.command)


def test_engine_yaml_decides_the_number_of_replicas(tmp_path):
    file = tmp_path / "engine.yaml"
    file.write_text("model_path: m\ntensor-parallel-size: 2\ndp: 3\n")
    plan = plan_of(f"--config {file} --base-gpu-id 2")
    assert [flag(r, "--base-gpu-id") for r in plan.replicas] == ["2", "4", "6"]


def test_key_of_the_engines_guards_the_gateway_too():
    config = plan_of("--model-path m --api-key k").config
    assert config.api_key == config.worker_api_key == "k"


def test_flags_win_over_the_gateways_file_and_that_over_the_engines(tmp_path):
    engine, gateway = tmp_path / "engine.yaml", tmp_path / "router.yaml"
    engine.write_text("model_path: m\nhost: 10.0.0.1\nport: 1\napi_key: e\n")
    gateway.write_text("port: 2\napi-key: g\ncache-threshold: 0.3\nworker-urls: [http://a:1]\n")
    files = f"--config {engine} --router-config {gateway}"
    config = plan_of(files).config
    assert (config.host, config.port, config.api_key, config.cache_threshold) == ("10.0.0.1", 2, "g", 0.3)
    assert len(config.worker_urls) == 2 and config.worker_urls[0] == "http://a:1"
    config = plan_of(f"{files} --port 3 --host h --api-key f --router-cache-threshold 0.4").config
    assert (config.host, config.port, config.api_key, config.cache_threshold) == ("h", 3, "f", 0.4)
    assert plan_of(f"{files} --port 3 --router-port 4").config.port == 4


def test_several_hosts_are_refused_with_the_way_to_do_it():
    with pytest.raises(ConfigError, match=r"nnodes=2.*router.launch_router"):
        plan_of("--model-path m --nnodes 2")


def test_free_ports_skip_the_taken_ones():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port not in free_ports(2, port)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_gateway_at_once(first):
    config = RouterConfig(port=0)
    gateway, app = build_app(config)
    server = GatewayServer(uvicorn_config(config, app), gateway, 60)
    server.handle_exit(first, None)
    assert not server.force_exit
    server.handle_exit(first, None)
    assert server.should_exit and server.force_exit


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"}


def launch(*flags: str, start: str = "-m") -> subprocess.Popen:
    """A module (or with "-c" a program) and its flags as a process."""
    return subprocess.Popen(
        [sys.executable, start, *flags], env=environment(), stderr=subprocess.PIPE, text=True
    )


def listening(process: subprocess.Popen, lines: list[str] | None = None) -> int:
    """The port that a process started with `--port 0` says it listens on: none is guessed, none taken twice.

    What it writes is collected in `lines`.
    """
    assert process.stderr is not None
    lines = [] if lines is None else lines
    for line in process.stderr:
        lines.append(line)
        found = re.search(r"(?:running|processes) on https?://127\.0\.0\.1:(\d+)", line)
        if found:
            threading.Thread(target=_collect, args=(process.stderr, lines), daemon=True).start()
            return int(found[1])
    raise AssertionError(f"it ended with {process.wait()}: {lines}")


def _collect(stream: IO[str], lines: list[str]) -> None:
    with stream:
        lines.extend(stream)


def some_ports(count: int) -> list[int]:
    """Where something may be started again: below the ports that outgoing connections take."""
    return free_ports(count, random.randrange(20_000, 30_000))


def wait_for(condition, timeout_s: float = 60):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            value = condition()
            if value:
                return value
        except (httpx.HTTPError, OSError, ValueError):
            pass
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_replicas_are_started_restarted_when_killed_and_ended_on_sigterm(tmp_path):
    process = launch(
        "router.launch_server", "--engine-module", "fake_engine", "--note", str(tmp_path), "--dp-size", "2",
        "--host", "127.0.0.1", "--port", "0", "--router-dp-worker-base-port", str(some_ports(1)[0]),
        "--router-shutdown-grace-period-secs", "3",
    )  # fmt: skip
    lines: list[str] = []
    url = f"http://127.0.0.1:{listening(process, lines)}"

    def ready(count: int) -> bool:
        return httpx.get(url + "/readiness").json()["healthy_workers"] == count

    try:
        wait_for(lambda: ready(2))
        wait_for(lambda: any("all 2 ready after" in line for line in lines))
        assert any(re.search(r"[01] of 2 ready after \d+ s", line) for line in lines)
        notes = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
        assert sorted(n["gpu"] for n in notes.values()) == [0, 1]
        name, victim = next(iter(notes.items()))
        os.kill(victim["pid"], signal.SIGKILL)
        body = {"model": "mock", "messages": [{"role": "user", "content": "x"}]}
        for _ in range(20):
            assert httpx.post(url + "/v1/chat/completions", json=body).status_code == 200
        wait_for(lambda: json.loads((tmp_path / name).read_text())["pid"] != victim["pid"] and ready(2))
        pids = [json.loads(file.read_text())["pid"] for file in tmp_path.glob("*.json")]
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert not any(alive(pid) for pid in pids)
    finally:
        process.kill()
        process.wait()


@asynchronous
async def test_replica_that_keeps_dying_is_restarted_less_and_less_often(monkeypatch):
    pauses_s, pause = [], Replicas._pause

    async def noted(self, seconds: float) -> None:
        pauses_s.append(seconds)
        await pause(self, 0 if len(pauses_s) < 8 else 3600)  # which its end does not wait for

    async def died(self, spec) -> int:
        return 3

    monkeypatch.setattr(Replicas, "_pause", noted)
    monkeypatch.setattr(Replicas, "_run", died)
    spec = ReplicaSpec("replica 0", (), 1)
    replicas = Replicas([spec], lambda spec: True, 3600)
    replicas.start()
    try:
        await until(lambda: len(pauses_s) == 8)
        assert pauses_s == [1, 2, 4, 8, 16, 30, 30, 30]
        assert replicas.restarts["replica 0"] == 7 and not replicas.failed.done()
    finally:
        await replicas.end()


@asynchronous
async def test_replica_that_cannot_be_started_is_tried_again_and_then_told_of(monkeypatch, caplog):
    async def refuse(*command, **how):
        raise BlockingIOError(11, "no more processes")

    async def unpaused(self, seconds: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    monkeypatch.setattr(Replicas, "_pause", unpaused)
    served = True
    replicas = Replicas([ReplicaSpec("replica 0", ("engine",), 1)], lambda spec: served, 1)
    replicas.start()
    try:
        await until(lambda: replicas.restarts["replica 0"] > 5)
        assert not replicas.failed.done() and "no more processes" in caplog.text
        served = False  # one that never served gives up, aloud
        with pytest.raises(ReplicasFailed, match=r"replica 0 .*no more processes.* before it was ready"):
            await replicas.failed
    finally:
        await replicas.end()


def test_engine_that_refuses_its_flags_ends_the_launcher(tmp_path):
    process = launch(
        "router.launch_server", "--engine-module", "fake_engine", "--note", str(tmp_path), "--refuse",
        "--host", "127.0.0.1", "--port", "0", "--router-shutdown-grace-period-secs", "1",
    )  # fmt: skip
    _, text = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "unknown flag --refuse" in text and "before it was ready" in text


def test_router_drains_on_sigterm_and_ends_with_zero(tmp_path):
    port = some_ports(1)[0]
    process = launch("router.launch_router", "--host", "127.0.0.1", "--port", str(port), "--log-json")
    try:
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/readiness").json().get("reason") == "draining")
        answer = httpx.get(f"http://127.0.0.1:{port}/health")
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert process.wait(10) == 0
        _, text = process.communicate()
        assert all(json.loads(line)["level"] for line in text.splitlines())
    finally:
        process.kill()


def test_client_that_connected_before_the_port_closed_may_ask_after_it():
    process = launch("router.launch_router", "--host", "127.0.0.1", "--port", "0")
    try:
        address = "127.0.0.1", listening(process)
        with socket.create_connection(address, 20) as client:
            process.send_signal(signal.SIGINT)
            wait_for(lambda: refuses(address))
            time.sleep(0.5)  # as one on a slow host, or far away
            client.sendall(b"GET /health HTTP/1.1\r\nhost: gateway\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert process.wait(10) == 0
    finally:
        process.kill()


PATIENT = "import sys; from router import http_server, launch_router; http_server.LAST_REQUEST_S = 60.0; "
PATIENT += "sys.exit(launch_router.main(sys.argv[1:]))"


@pytest.mark.parametrize("grace_s, signals", [("0", 1), ("30", 2)])
def test_client_that_never_asks_is_not_waited_for_out_of_grace_or_at_a_second_signal(grace_s, signals):
    """Else it would be for a minute."""
    flags = "--host", "127.0.0.1", "--port", "0", "--shutdown-grace-period-secs", grace_s
    process = launch(PATIENT, *flags, start="-c")
    try:
        address = "127.0.0.1", listening(process)
        with socket.create_connection(address, 20):
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
                wait_for(lambda: refuses(address))
            process.wait(20)
    finally:
        process.kill()


def refuses(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except ConnectionRefusedError:
        return True
    return False


@asynchronous
async def test_stream_that_outlives_the_one_grace_period_ends_with_an_error_event(monkeypatch):
    """Out of grace 1 s after SIGTERM, wherever the server then is; the answer not begun yet is a 502."""
    worker = await MockWorker().start()
    worker.faults.token_s = 0.2
    config = RouterConfig(port=0, host="127.0.0.1", worker_urls=(worker.url,))
    gateway, app = build_app(config)
    server = GatewayServer(uvicorn_config(config, app), gateway, 1.0)
    monkeypatch.setattr(server, "capture_signals", contextlib.nullcontext)  # they are the test runner's
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started and gateway.registry.usable(None))
    port = server.servers[0].sockets[0].getsockname()[1]
    body = {"model": "mock", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1000}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        stream = asyncio.create_task(client.post("/v1/chat/completions", json={**body, "stream": True}))
        await until(lambda: worker.running == 1)
        worker.faults.delay_s = 60
        whole = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: len(worker.seen) == 2)
        cut_s, cut_off = [], gateway.cut_off
        loop = asyncio.get_running_loop()
        gateway.cut_off = lambda: (cut_s.append(loop.time()), cut_off())  # type: ignore[method-assign]
        server.handle_exit(signal.SIGTERM, None)
        *_, last = (await stream).text.removesuffix("\n\n").split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "stream_error" and "the gateway is shutting down" in error["message"]
        assert (await whole).status_code == 502
    await serving
    assert len(cut_s) == 1 and server.config.timeout_graceful_shutdown == 1  # all of the 1 s was the drain's
    await worker.kill()


def test_wrong_flag_ends_with_usage_and_says_what_is_valid():
    process = launch("router.launch_router", "--policy", "fastest")
    _, text = process.communicate(timeout=20)
    assert process.returncode == 2 and "cache_aware" in text
