"""The edges: spans as a collector receives them, TLS on both sides, the official client."""

import asyncio
import json
import re
import ssl
import subprocess

import httpx
import openai
import pytest
from gateway_harness import CHAT, RawClient, asynchronous, running, until
from mock_worker import MockWorker

from router import launch_router, tracing
from router.headers import usage_of


class Collector:
    def __init__(self) -> None:
        self.spans: list[dict] = []

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader, writer) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert head.startswith("post /v1/traces ")
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                for resource in body["resourceSpans"]:
                    for scope in resource["scopeSpans"]:
                        self.spans += scope["spans"]
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        except asyncio.IncompleteReadError:
            writer.close()


def attributes(span: dict) -> dict:
    return {a["key"]: next(iter(a["value"].values())) for a in span["attributes"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tracing, "EXPORT_S", 0.05)


@asynchronous
async def test_request_is_a_span_between_the_clients_and_the_workers():
    collector = Collector()
    async with running(1, enable_trace=True, otlp_traces_endpoint=await collector.start()) as r:
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "abc"}
        await r.client.post("/v1/chat/completions", json=CHAT, headers=headers)
        await until(lambda: collector.spans)
        (span,) = collector.spans
        assert (span["traceId"], span["parentSpanId"]) == (trace, parent)
        sent = r.workers[0].seen[0].headers["traceparent"]
        assert sent == f"00-{trace}-{span['spanId']}-01"
        found = attributes(span)
        assert found["http.response.status_code"] == "200" and found["request.id"] == "abc"
        assert found["server.address"] == r.workers[0].url and found["router.attempts"] == "1"
        assert int(span["endTimeUnixNano"]) > int(span["startTimeUnixNano"])
        collector.server.close()


@asynchronous
async def test_errors_are_spans_too_and_unsampled_requests_are_not():
    collector = Collector()
    async with running(0, enable_trace=True, otlp_traces_endpoint=await collector.start()) as r:
        off = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
        await r.client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": off})
        await r.client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": "nonsense"})
        await until(lambda: collector.spans)
        (span,) = collector.spans
        assert attributes(span)["http.response.status_code"] == "503" and span["status"]["code"] == 2
        assert "parentSpanId" not in span
        collector.server.close()


@asynchronous
async def test_absent_collector_costs_spans_and_no_requests():
    async with running(1, enable_trace=True, otlp_traces_endpoint="127.0.0.1:9") as r:
        assert (await r.chat()).status_code == 200
        await until(lambda: r.gateway.tracer.dropped == 1)
        assert (await r.chat()).status_code == 200


def certificate(folder) -> tuple[str, str]:
    """(certificate, key) of 127.0.0.1, signed by itself."""
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run([*command, "-days", "1", "-keyout", key, "-out", cert, *subject], check=True)
    return cert, key


@asynchronous
async def test_https_is_served_with_the_configured_certificate(tmp_path):
    cert, key = certificate(tmp_path)
    async with running(1, tls_cert_path=cert, tls_key_path=key) as r:
        trust = ssl.create_default_context(cafile=cert)
        async with httpx.AsyncClient(verify=trust, base_url=f"https://127.0.0.1:{r.port}") as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
            assert response.status_code == 200
            response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
            assert response.text.endswith("data: [DONE]\n\n")


@asynchronous
async def test_https_worker_is_trusted_by_the_configured_authority_only(tmp_path):
    cert, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    tls.verify_mode = ssl.CERT_REQUIRED  # and the gateway must show a certificate
    tls.load_verify_locations(cert)
    worker = await MockWorker().start(tls)
    settings = {"ca_cert_paths": [cert], "client_cert_path": cert, "client_key_path": key}
    async with running(workers=[worker], **settings) as r:
        assert (await r.chat()).status_code == 200
        assert "data: [DONE]" in await r.stream()
    worker = await MockWorker().start(tls)
    async with running(workers=[worker], wait=False) as r:
        await asyncio.sleep(0.3)
        assert (await r.client.get("/readiness")).status_code == 503


@asynchronous
async def test_official_client_chats_streams_lists_models_and_reads_errors():
    async with running(2, api_key="secret", policy="cache_aware") as r:
        client = openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="secret", max_retries=0)
        messages = [{"role": "user", "content": "hello"}]
        answer = await client.chat.completions.create(model="mock", messages=messages)
        assert answer.choices[0].message.content == "tok0 tok1 tok2 tok3 "
        stream = await client.chat.completions.create(model="mock", messages=messages, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert text == "tok0 tok1 tok2 tok3 "
        assert [m.id async for m in client.models.list()] == ["mock"]
        with pytest.raises(openai.NotFoundError, match="No worker available"):
            await client.chat.completions.create(model="other", messages=messages)
        wrong = openai.AsyncOpenAI(base_url=f"{r.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            await wrong.chat.completions.create(model="mock", messages=messages)
        await client.close()
        await wrong.close()


@asynchronous
async def test_idle_connection_is_closed_after_its_keep_alive_and_a_used_one_is_not(monkeypatch):
    monkeypatch.setattr(launch_router, "KEEP_ALIVE_S", 1)
    async with running(1) as r:
        idle, used = await RawClient.connect(r.port), await RawClient.connect(r.port)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        for client in (idle, used):
            client.post("/v1/chat/completions", CHAT)
            await client.read_until(b"}")
        closed = asyncio.create_task(idle.reader.read())
        while loop.time() - started_s < 1.6:
            used.post("/v1/chat/completions", CHAT)
            await used.read_until(b"HTTP/1.1 200")
            await asyncio.sleep(0.2)
        assert closed.done() and not used.reader.at_eof()
        used.leave()


@asynchronous
async def test_head_that_does_not_end_is_408_however_it_drips_and_a_quick_client_is_served_on():
    async with running(1, client_header_timeout_secs=0.3) as r:
        quick, silent, slow = [await RawClient.connect(r.port) for _ in range(3)]
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        slow.writer.write(b"POST /generate HTTP/1.1\r\nhost: g\r\n")
        answers = [asyncio.create_task(c.reader.read()) for c in (silent, slow)]
        while not all(a.done() for a in answers):
            slow.writer.write(b"x-a: b\r\n")
            quick.post("/v1/chat/completions", CHAT)
            await quick.read_until(b"HTTP/1.1 200")
            await asyncio.sleep(0.05)
        assert 0.25 < loop.time() - started_s < 2
        for answer in answers:
            head, _, body = answer.result().partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408") and b"header_timeout" in body
        await asyncio.sleep(0.4)  # idle between requests is no slow head
        quick.post("/v1/chat/completions", CHAT)
        await quick.read_until(b"HTTP/1.1 200")
        slow_second = b"POST /generate HTTP/1.1\r\nhost: g\r\n"  # the second request of a connection
        quick.writer.write(slow_second)
        assert b"HTTP/1.1 408" in await quick.reader.read()


@asynchronous
async def test_slow_body_and_slow_answer_are_no_slow_head():
    async with running(1, client_header_timeout_secs=0.2) as r:
        r.workers[0].faults.delay_s = 0.3
        client = await RawClient.connect(r.port)
        client.writer.write(b"POST /generate HTTP/1.1\r\nhost: g\r\ncontent-length: 11\r\n\r\n")
        await asyncio.sleep(0.3)
        client.writer.write(b'{"text":"x"}'[:11])
        client.leave()
        client = await RawClient.connect(r.port)
        client.writer.write(b"POST /generate HTTP/1.1\r\nhost: g\r\ncontent-length: 12\r\n\r\n")
        await asyncio.sleep(0.3)
        client.writer.write(b'{"text":"x"}')
        await client.read_until(b"HTTP/1.1 200")


def raw_post(path: str, body: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = [b"POST %b HTTP/%b" % (path.encode(), version), b"host: g", b"content-length: %d" % len(body)]
    return b"\r\n".join([*lines, *headers, b"", body])


@asynchronous
async def test_requests_that_come_in_one_piece_are_answered_in_order():
    """Data routes, which take the short way, beside control routes with a body, which do not."""
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        chat = json.dumps(CHAT).encode()
        many = 500  # more than the interpreter could nest
        client.writer.write(
            raw_post("/v1/chat/completions", chat)
            + raw_post("/workers", b'{"url": 7}')
            + raw_post("/generate", b"{")
            + raw_post("/v1/chat/completions", chat)
            + b"GET /generate HTTP/1.1\r\nhost: g\r\n\r\n"
            + raw_post("/generate", b"no") * many
            + raw_post("/v1/chat/completions", chat, b"connection: close")
        )
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", await client.reader.read())
        assert statuses == [b"200", b"400", b"400", b"200", b"405", *[b"400"] * many, b"200"]


@asynchronous
async def test_old_and_unusual_heads_go_the_long_way():
    async with running(1) as r:
        chat = json.dumps(CHAT).encode()
        for version, headers, kept in (
            (b"1.0", (), False),
            (b"1.0", (b"connection: keep-alive",), False),
            (b"1.1", (b"connection: close",), False),
            (b"1.1", (b"connection: keep-alive",), True),
        ):
            client = await RawClient.connect(r.port)
            client.writer.write(raw_post("/v1/chat/completions", chat, *headers, version=version))
            head = await client.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert (b"connection: close" not in head) == kept
            client.leave()
        client = await RawClient.connect(r.port)
        whole = raw_post("/v1/chat/completions", chat, b"expect: 100-continue")
        client.writer.write(whole[: -len(chat)])
        assert (await client.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        client.writer.write(chat)
        assert (await client.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        client.leave()


@asynchronous
async def test_bytes_that_are_no_request_behind_one_end_the_connection_with_400():
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        client.writer.write(
            raw_post("/v1/chat/completions", json.dumps(CHAT).encode()) + b"\0\0 nonsense\r\n\r\n"
        )
        answer = await client.reader.read()
        assert answer.count(b"HTTP/1.1") == 1 and answer.startswith(b"HTTP/1.1 400")
        assert b"bad_request" in answer
        assert r.gateway.proxy.concurrency.running == 0


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        (b'{"meta_info": {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 4}}', (5, 2, 4)),
        (b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2}}', (5, 2, None)),
        (
            b'{"text": "\\"cached_tokens\\": 9", "usage": {"prompt_tokens": 5, "completion_tokens": 2,'
            b' "prompt_tokens_details": {"cached_tokens": 3}}}',
            (5, 2, 3),
        ),
        (b'[{"meta_info": {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 1}}]', (5, 2, 1)),
        (b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": "x"}}', (5, 2, None)),
        (b'{"object": "list"}', (0, 0, None)),
        (b'"cached_tokens": 3 and no JSON', (0, 0, 3)),
    ],
)
def test_token_counts_of_a_whole_answer(body, counts):
    usage = usage_of(body)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == counts


def test_tiers_of_a_whole_answer():
    tiers = b'{"meta_info": {"prompt_tokens": 5, "cached_tokens": 4, "cached_tokens_details": {"host": 4}}}'
    assert usage_of(tiers).cached_tokens_details == {"host": 4}
