"""Usual requests go without a task, and heads that come again without the parser: nobody can tell."""

import asyncio
import gc
import json
import logging

import pytest
from gateway_harness import CHAT, RawClient, asynchronous, running, until

from router.app import Gateway
from router.exchange import Exchange
from router.http_server import ClientConnection, Request
from router.known_head import MAX_MISSES, KnownHead
from router.policies.round_robin import RoundRobin
from router.proxy import Proxy
from router.short_way import ShortWay


def message(body: bytes, length: bytes | None = None, more: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nContent-Length: %b\r\n%b\r\n%b" % (length or b"%d" % len(body), more, body)


def known(data: bytes) -> KnownHead:
    head = KnownHead()
    head.keep(data, "first")
    assert head.meaning is None  # it may be the only one of its connection
    head.keep(data, "second")
    return head


def test_head_is_known_whatever_the_length_of_the_body():
    head = known(message(b"12345"))
    assert head.meaning == "second"
    for body in (b"", b"1", b"a" * 5, b"b" * 12, b"\r\n\r\n", b"c" * 100_000):
        assert head.body_of(message(body)) == body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST / HTTP/1.1\r\n",
        message(b"12345")[:-1],
        message(b"12345") + b"G",
        message(b"12345") + message(b"12345"),
        message(b"12345", more=b"x: y\r\n"),
        message(b"12345", b"+5"),
        message(b"12345", b" 5"),
        message(b"12345", b"5 "),
        message(b"12345", b"0_5"),
        message(b"12345", b"5\n"),
        message(b"", b"\r"),
        message(b"12345", b"5" * 11),
        message(b"12345").replace(b"POST", b"post"),
    ],
)
def test_anything_else_is_for_the_parser(data):
    assert known(message(b"12345")).body_of(data) is None


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nx: y\r\n\r\n\r\ncontent-length: 0\r\n\r\n",
        message(b"12345") + message(b"12345"),
        message(b"12345")[:-1],
        message(b"12345", more=b"x: %b\r\n" % (b"y" * 4096)),
    ],
)
def test_head_without_a_length_or_too_long_or_of_a_part_is_not_kept(data):
    assert known(data).meaning is None


def test_heads_that_never_come_again_are_soon_kept_no_more():
    head = KnownHead()
    for i in range(2 * MAX_MISSES):
        head.keep(message(b"1", more=b"x-request-id: %d\r\n" % i), i)
    assert head.meaning == MAX_MISSES - 1
    assert head.body_of(message(b"12", more=b"x-request-id: %d\r\n" % (MAX_MISSES - 1))) == b"12"
    head.keep(message(b"1"), "new")  # one was recognised: worth it again
    assert head.meaning == "new"


def generate(text: str, **more) -> bytes:
    return json.dumps({"text": text, **more}).encode()


def raw(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /generate HTTP/1.1", b"host: g", b"content-type: application/json"]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), *headers, b"", body])


async def answer(client: RawClient) -> tuple[bytes, bytes]:
    head = (await client.read_until(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head, await client.reader.readexactly(length)


@asynchronous
async def test_every_request_reaches_the_worker_as_it_was_sent_known_or_not():
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        bodies = [generate("x" * n) for n in (1, 2, 1, 80, 81, 8, 900, 70_000, 1)]
        for i, body in enumerate(bodies):
            headers = [b"x-kind: %d" % (i // 5)]
            client.writer.write(raw(body, *headers))
            head, data = await answer(client)
            assert head.startswith(b"http/1.1 200") and json.loads(data)["worker"] == "w0"
        for part in (raw(bodies[0], b"x-kind: 1")[:-3], bodies[0][-3:]):  # known, but not whole
            client.writer.write(part)
            await asyncio.sleep(0.02)
        await answer(client)
        client.writer.write(raw(bodies[0], b"x-kind: 1") + raw(bodies[1], b"x-kind: 1"))
        await answer(client)
        await answer(client)
        client.writer.write(raw(bodies[2], b"x-kind: 1", b"connection: close"))
        head, _ = await answer(client)
        assert b"connection: close" in head and await client.reader.read() == b""
        sent = [*bodies, bodies[0], *bodies[:3]]
        assert [s.body for s in r.workers[0].seen] == sent
        assert [int(s.headers["content-length"]) for s in r.workers[0].seen] == [len(b) for b in sent]


@asynchronous
async def test_recognised_request_is_plain_asgi_to_an_application_that_wants_it_so(monkeypatch):
    seen = []

    async def echo(self, route, scope, receive, send) -> None:
        body = (await receive())["body"]
        seen.append(
            (scope["raw_path"], scope["query_string"], dict(scope["headers"])[b"content-length"], body)
        )
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with running(1) as r:
        monkeypatch.setattr(Gateway, "short_way", lambda self, request: False)
        monkeypatch.setattr(Proxy, "serve", echo)
        client = await RawClient.connect(r.port)
        for body in (b"1", b"12", b"123", b"1234567890"):
            client.writer.write(raw(body).replace(b"/generate", b"/generate?a=b"))
            await answer(client)
        assert seen == [
            (b"/generate", b"a=b", b"1", b"1"),
            (b"/generate", b"a=b", b"2", b"12"),
            (b"/generate", b"a=b", b"3", b"123"),
            (b"/generate", b"a=b", b"10", b"1234567890"),
        ]


@pytest.fixture
def tasks(monkeypatch) -> list[str]:
    """The paths of the requests that were given to the application."""
    paths = []
    start = ClientConnection._start_asgi_task

    def counting(self, cycle, app):
        paths.append(cycle.scope["path"])
        length = dict(cycle.scope["headers"]).get(b"content-length")
        assert length is None or cycle.more_body or not cycle.body or int(length) == len(cycle.body)
        start(self, cycle, app)

    monkeypatch.setattr(ClientConnection, "_start_asgi_task", counting)
    return paths


@asynchronous
async def test_usual_request_makes_no_task(tasks):
    async with running(1) as r:
        for i in range(5):  # its connection to the worker was made by the health check
            response = await r.chat("x" * i)
            assert response.json()["worker"] == "w0"
            assert response.headers["x-smg-routed-worker-id"] == r.workers[0].url
        assert tasks == []
        await r.stream()
        assert tasks == ["/v1/chat/completions"]
        assert (await r.client.post("/generate", content=b"{")).status_code == 400
        r.registered(r.workers[0]).pool.drop_idle()
        await r.chat()
        assert tasks == ["/v1/chat/completions", "/generate", "/v1/chat/completions"]
        assert r.metric('smg_worker_requests_total{worker="' + r.workers[0].url) == 7


@asynchronous
async def test_answer_that_is_to_be_retried_goes_on_as_a_task(tasks):
    async with running(2, policy="round_robin") as r:
        for _ in range(4):
            await r.chat()
        tasks.clear()
        r.workers[0].faults.status = 503
        for _ in range(2):
            assert (await r.chat()).json()["worker"] == "w1"
        assert len(tasks) == 1
        assert r.metric("smg_worker_retries_total") == 1


@asynchronous
async def test_answer_may_come_in_pieces(tasks):
    async with running(1) as r:
        await r.chat()
        tasks.clear()
        r.workers[0].faults.body_after_s = 0.02
        response = await r.chat()
        assert response.json()["worker"] == "w0" and tasks == []
        r.workers[0].faults.body = b" " * (1 << 20) + b"{}"  # too long to be read whole first
        assert (await r.chat()).json() == {} and len(tasks) == 1


async def idle(r) -> None:
    """Until nothing is charged for any more."""
    workers = list(r.gateway.registry)
    await until(lambda: not any(w.in_flight or w.pool.active for w in workers))
    assert r.gateway.proxy.concurrency.running == 0


@asynchronous
async def test_client_that_leaves_the_short_way_takes_its_exchange_along(tasks):
    async with running(1) as r:
        await r.chat()
        tasks.clear()
        r.workers[0].faults.delay_s = 10.0
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", CHAT)
        await until(lambda: r.workers[0].running == 1)
        client.leave()
        await until(lambda: r.workers[0].disconnects)
        await idle(r)
        assert tasks == []
        assert r.metric("router_client_disconnects_total") == 1


@asynchronous
async def test_client_may_leave_while_its_request_changes_over(monkeypatch):
    ask = Request.ask_application

    def then_leave(self) -> None:
        ask(self)
        self.connection.connection_lost(ConnectionResetError())

    async with running(1) as r:
        await r.chat()
        monkeypatch.setattr(Request, "ask_application", then_leave)
        r.workers[0].faults.status = 503
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", CHAT)
        await until(lambda: r.metric("router_client_disconnects_total") == 1)
        await idle(r)
        client.leave()


@asynchronous
async def test_worker_that_breaks_on_the_short_way_is_told_of_as_ever():
    async with running(1, disable_retries=True) as r:
        await r.chat()
        r.workers[0].faults.cut_body = True
        response = await r.chat()
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_error"
        await idle(r)


@pytest.mark.parametrize(
    ("owner", "name"), [(RoundRobin, "choose"), (Exchange, "_message"), (Exchange, "answer_whole")]
)
@asynchronous
async def test_our_bug_on_the_short_way_is_a_500_and_leaves_nothing_behind(owner, name, monkeypatch, caplog):
    async with running(1, policy="round_robin") as r:
        await r.chat()

        def bug(*args):
            raise ZeroDivisionError("ours")

        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(owner, name, bug)
            assert (await r.chat()).status_code == 500
        assert "ZeroDivisionError: ours" in caplog.text
        await idle(r)
        assert (await r.chat()).status_code == 200


@asynchronous
async def test_requests_leave_nothing_to_the_garbage_collector():
    gc.collect()  # before there are connections, which are not kept through seconds of it
    gc.disable()
    try:
        async with running(2) as r:
            for _ in range(10):
                await r.chat()
                await r.stream()
            await idle(r)
            made = gc.get_objects(generation=0)  # since then
            alive = [o for o in made if isinstance(o, (ShortWay, Exchange, Request))]
    finally:
        gc.enable()
    assert len(alive) <= 1, alive  # the last request of the one connection
