"""What an operator may get wrong: one line that names the key and the value, and no traceback."""

import json
import signal
import socket
import subprocess
import time

import httpx
import pytest
from gateway_harness import asynchronous
from test_router_edges import certificate
from test_router_launch import launch, listening, some_ports, wait_for
from test_router_processes import cluster

from router import listen
from router.config import ConfigError, RouterConfig
from router.launch_server import make_parser, make_plan
from router.listen import check_address
from router.upstream import Address, Pool, UpstreamError

LOCAL = ("--host", "127.0.0.1", "--port")
START = {
    "one process": ("router.launch_router",),
    "several processes": ("router.launch_router", "--workers-processes", "2"),
    "co-launcher": ("router.launch_server", "--engine-module", "fake_engine"),
}


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and what it wrote."""
    try:
        _, text = process.communicate(timeout=40)
    finally:
        process.kill()
    return process.returncode, text


@pytest.fixture
def taken():
    """A port that someone listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# ---- certificates ----


@pytest.fixture
def files(tmp_path):
    """Paths by what is in them."""
    cert, key = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "text.pem").write_text("no certificate\n")
    return {
        "cert": cert, "key": key, "other key": certificate(tmp_path / "other")[1],
        "text": str(tmp_path / "text.pem"), "missing": str(tmp_path / "missing.pem"), "folder": str(tmp_path),
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"ca_cert_paths": ["cert", "missing"]},
            "ca_cert_paths='.*missing.pem' cannot be read: No ",
        ),
        ({"ca_cert_paths": ["folder"]}, "ca_cert_paths='.*' cannot be read: Is a directory"),
        ({"ca_cert_paths": ["text"]}, "ca_cert_paths='.*text.pem' holds no PEM certificate"),
        ({"client_cert_path": "missing", "client_key_path": "key"}, "client_cert_path='.*missing.pem'"),
        ({"client_cert_path": "cert", "client_key_path": "missing"}, "client_key_path='.*missing.pem'"),
        ({"client_cert_path": "cert", "client_key_path": "other key"}, "client_key_path='.*MISMATCH"),
        ({"tls_cert_path": "missing", "tls_key_path": "key"}, "tls_cert_path='.*missing.pem'"),
        ({"tls_cert_path": "text", "tls_key_path": "key"}, "tls_cert_path='.*text.pem' and tls_key_path="),
    ],
)
def test_certificate_that_cannot_be_used_is_named_at_start(given, message, files):
    paths = {
        name: [files[v] for v in value] if isinstance(value, list) else files[value]
        for name, value in given.items()
    }
    with pytest.raises(ConfigError, match=message):
        RouterConfig.from_keywords(**paths)  # no https worker is there yet
    flags = []
    for name, value in paths.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--router-{name.replace('_', '-')}", *values]
    with pytest.raises(ConfigError, match=message):
        make_plan(make_parser(), ["--model-path", "m", *flags])


def test_certificates_that_can_be_used_are_taken(files):
    cert, key = files["cert"], files["key"]
    pairs = {f"{side}_cert_path": cert for side in ("client", "tls")}
    pairs |= {f"{side}_key_path": key for side in ("client", "tls")}
    assert RouterConfig.from_keywords(ca_cert_paths=[cert], **pairs).ca_cert_paths == (cert,)


# ---- addresses ----


@pytest.mark.parametrize("start", START)
def test_port_that_is_taken_is_named_in_one_line(start, taken, tmp_path):
    flags = ("--note", str(tmp_path)) if start == "co-launcher" else ()
    code, text = ended(launch(*START[start], *LOCAL, str(taken), *flags))
    assert code == 1 and "Traceback" not in text
    assert f"port={taken} cannot be listened on at 127.0.0.1: Address already in use" in text
    assert not list(tmp_path.iterdir())  # no engine was started


@pytest.mark.parametrize("start", START)
def test_port_of_the_metrics_that_is_taken_is_named_in_one_line(start, taken, tmp_path):
    prefix = "--router-" if start == "co-launcher" else "--"
    flags = ("--note", str(tmp_path)) if start == "co-launcher" else ()
    flags = (*flags, f"{prefix}prometheus-port", str(taken), f"{prefix}prometheus-host", "127.0.0.1")
    code, text = ended(launch(*START[start], *LOCAL, "0", *flags))
    assert code == 1 and "Traceback" not in text
    assert f"prometheus_port={taken} cannot be listened on at 127.0.0.1: Address already in use" in text


@pytest.mark.parametrize("start", ["one process", "several processes"])
def test_host_that_does_not_resolve_is_named_in_one_line(start):
    code, text = ended(launch(*START[start], "--host", "nowhere.invalid", "--port", "0"))
    assert code == 1 and "Traceback" not in text
    assert "host='nowhere.invalid' does not resolve: " in text


def test_host_that_is_not_ours_or_no_name_is_told():
    for host, message in (("192.0.2.1", "is no address to listen on"), ("a" * 64, "does not resolve")):
        with pytest.raises(ConfigError, match=f"^host='{host}' {message}: "):
            check_address("host", host, "port", 0)


def test_address_that_one_of_a_hosts_names_stands_for_is_enough(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (ip, 0)) for ip in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(listen.socket, "getaddrinfo", lambda *how, **more: found)
    check_address("host", "both", "port", 0)


@asynchronous
async def test_worker_whose_host_does_not_resolve_is_told_so(monkeypatch):
    def unknown(*how, **more):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UpstreamError, match=r"nowhere\.invalid:80: its host does not resolve: ") as caught:
        await Pool(Address.parse("http://nowhere.invalid")).connect()
    assert caught.value.kind == "connect"


def test_second_gateway_of_several_processes_does_not_share_the_firsts_port():
    with cluster() as c:
        code, text = ended(launch("router.launch_router", *LOCAL, str(c.port), "--workers-processes", "2"))
        assert code == 1 and f"port={c.port} cannot be listened on" in text
        assert c.listening() == 2


def test_gateway_of_several_processes_starts_where_connections_have_just_ended():
    """Those wait out their time on the port, which keeps nobody from listening."""
    port = some_ports(1)[0]
    url = f"http://127.0.0.1:{port}/health"
    flags = (*LOCAL, str(port), "--workers-processes", "2", "--shutdown-grace-period-secs", "1")
    for _ in range(2):
        process = launch("router.launch_router", *flags)
        try:
            assert listening(process) == port
            # Whoever ends a connection keeps its port.
            wait_for(lambda: httpx.get(url, headers={"connection": "close"}).status_code == 200)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


# ---- a second signal ----


@pytest.mark.parametrize("processes", ["1", "2"])
def test_second_signal_ends_a_request_under_way_without_a_traceback(processes):
    process = launch("router.launch_router", *LOCAL, "0", "--workers-processes", processes, "--log-json")
    lines: list[str] = []
    try:
        port = listening(process, lines)
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200)
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            client.sendall(b'POST /generate HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n{"text')
            time.sleep(0.3)  # until it is read
            process.send_signal(signal.SIGTERM)
            wait_for(
                lambda: httpx.get(f"http://127.0.0.1:{port}/readiness").json().get("reason") == "draining"
            )
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        process.kill()
    wait_for(lambda: any("Finished server process" in line for line in lines))
    errors = [line for line in lines if json.loads(line)["level"] == "error"]
    assert not errors
