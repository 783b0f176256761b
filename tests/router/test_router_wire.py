"""What peers may put on the wire: answers and requests that are odd, late, malformed or hostile."""

import asyncio
from unittest.mock import Mock

import gateway_harness
import pytest
from gateway_harness import RawClient, asynchronous, running, until
from mock_worker import HANG_UP, MockWorker

from router import http_server
from router.body import next_part
from router.breaker import PROBE
from router.errors import RequestError
from router.http_server import MAX_HEAD_BYTES, ClientConnection
from router.upstream import HIGH_WATER_BYTES, json_of

TEXT = b'{"text":"x"}'
OK = b"HTTP/1.1 200 OK\r\n"


def whole(body: bytes) -> bytes:
    return OK + b"content-length: %d\r\n\r\n%b" % (len(body), body)


EMPTY = whole(b"{}")


def post(body: bytes, *headers: bytes, length: bytes | None = None) -> bytes:
    lines = [b"POST /generate HTTP/1.1", b"host: g", b"content-length: %b" % (length or b"%d" % len(body))]
    return b"\r\n".join([*lines, *headers, b"", body])


async def status(client: RawClient, data: bytes = b"") -> int:
    """Send `data`, read one answer with a length, return its status."""
    client.writer.write(data)
    head = (await client.read_until(b"\r\n\r\n")).lower()
    await client.reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    return int(head.split()[1])


async def idle(r) -> None:
    """Until nothing runs and nothing is charged for any more."""
    workers = list(r.gateway.registry)
    await until(lambda: not any(w.in_flight or w.pool.active for w in workers))  # or is being probed
    assert not any(w.pending_tokens or w.sent_tokens for w in workers)
    assert r.gateway.proxy.concurrency.running == 0


# ---- workers ----

ANSWERS = {
    "in single bytes": tuple(EMPTY[i : i + 1] for i in range(len(EMPTY))),
    "chunked": (OK + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx-trailer: 1\r\n\r\n",),
    "HTTP/1.0, until the connection's end": (b"HTTP/1.0 200 OK\r\n\r\n{}", 0.01, HANG_UP),
    "without a length": (OK + b"\r\n{}", 0.01, HANG_UP),
    "after informational ones": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n", 0.01, EMPTY,
    ),
    "with a head of 64 KB": (OK + b"x-a: " + b"y" * 65536 + b"\r\n", 0.01, b"content-length: 2\r\n\r\n{}"),
    "with bytes behind": (EMPTY + b"more",),
    "with bytes behind, late": (EMPTY, 0.01, b"more"),
    "with zeros before its length": (OK + b"content-length: " + b"0" * 5000 + b"2\r\n\r\n{}",),
    "with a load beyond numbers": (
        OK + b"x-worker-load: queued_tokens=" + b"9" * 4000 + b"\r\ncontent-length: 2\r\n\r\n{}",
    ),
    "with counts beyond numbers": (
        whole(b'{"usage": {"cached_tokens": 1, "prompt_tokens": ' + b"9" * 400 + b"}}"),
    ),
    "with negative counts": (whole(b'{"meta_info":{"prompt_tokens":-4,"cached_tokens":-9}}'),),
}  # fmt: skip


@pytest.mark.parametrize("script", ANSWERS.values(), ids=ANSWERS.keys())
@asynchronous
async def test_odd_answer_is_an_answer(script):
    async with running(1, policy="cache_aware") as r:
        r.workers[0].faults.script = script
        client = await RawClient.connect(r.port)
        for _ in range(4):
            client.writer.write(post(TEXT))
            data = b""
            while b"}" not in data:
                more = await client.reader.read(1 << 20)
                assert more, data
                data += more
            assert data.startswith(b"HTTP/1.1 200 OK\r\n")
            await asyncio.sleep(0.02)  # chunks, and what comes late
            client.leave()
            client = await RawClient.connect(r.port)
        await idle(r)
        r.workers[0].faults.script = ()
        assert (await r.chat()).status_code == 200
        assert "smg_worker_requests_total" in (await r.client.get("/metrics")).text
        assert r.registered(r.workers[0]).breaker.closed
        recorder = r.gateway.proxy.recorder
        assert all(0 <= n < 10**16 for n in (recorder.prompt_tokens, *recorder.cached_tokens.values()))


def test_json_that_cannot_be_told_to_another_process_is_none():
    assert json_of(b'{"a": [1, 1.5, null]}') == {"a": [1, 1.5, None]}
    for body in (b"", b"{", b'{"a": 1' + b"0" * 30 + b"}", b"[" * 5000 + b"]" * 5000, b'"\xff"', b"1e999"):
        assert json_of(body) is None


NO_ANSWERS = {
    "cut after its head": (OK + b"content-length: 2\r\n\r\n", 0.01, HANG_UP),
    "of two framings": (OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",),
    "of two lengths": (OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",),
    "of a negative length": (OK + b"content-length: -2\r\n\r\n{}",),
    "in another protocol": (
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nabc",
    ),
    "of no known status": (b"HTTP/1.1 999 X\r\ncontent-length: 2\r\n\r\n{}",),
    "of garbage": (b"\0\1\2garbage\r\n\r\n",),
    "that is all head": (OK + b"x-a: " + b"y" * HIGH_WATER_BYTES, 0.01, b"y" * HIGH_WATER_BYTES),
}  # fmt: skip


@pytest.mark.parametrize("script", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
@asynchronous
async def test_what_is_no_answer_is_retried_elsewhere(script, caplog):
    async with running(2, policy="round_robin") as r:
        r.workers[0].faults.script = script
        for _ in range(4):
            assert (await r.chat()).json()["worker"] == "w1"
        await idle(r)
        assert r.metric("smg_worker_retries_total") >= 1
        assert "Fatal error" not in caplog.text  # the event loop's word for an exception it got


@asynchronous
async def test_503_then_200_from_another_worker_on_the_same_request():
    async with running(2, policy="round_robin") as r:
        for worker in r.workers:
            worker.faults.script = (b"HTTP/1.1 503 Busy\r\nretry-after: 0\r\ncontent-length: 0\r\n\r\n",)
        asking = asyncio.create_task(r.chat())
        await until(lambda: sum(r.split()) >= 2)
        for worker in r.workers:
            worker.faults.script = ()
        assert (await asking).status_code == 200
        await idle(r)


@asynchronous
async def test_request_whose_worker_is_removed_is_answered_by_another_one():
    """`--remove-unhealthy-workers` drops what is unwell, with all that runs on it."""
    async with running(2, policy="round_robin", remove_unhealthy_workers=True) as r:
        await r.chat()
        await r.chat()
        first = r.workers[0]
        first.faults.script = (30.0,)
        asking = [asyncio.create_task(r.chat()) for _ in range(2)]
        await until(lambda: len(first.seen) == 2)
        worker = r.registered(first)
        r.gateway.monitor.eject(worker, "unwell", dead=False)
        for answer in await asyncio.gather(*asking):
            assert answer.json()["worker"] == "w1"
        assert len(first.seen) == 2 and not worker.pool.active


@pytest.mark.parametrize("then", ["frozen", "late"])
@asynchronous
async def test_what_runs_on_an_unwell_worker_does_not_wait_for_ever(then):
    """Its health check says 503, which leaves running requests alone; then it freezes, or takes long."""
    limit_s = 600.0 if then == "frozen" else 0.5
    async with running(1, health_check_timeout_secs=0.1, request_timeout_secs=limit_s) as r:
        await r.chat()
        mock, worker = r.workers[0], r.registered(r.workers[0])
        mock.faults.script = (60.0,)
        asking = asyncio.create_task(r.chat())
        await until(lambda: worker.in_flight == 1)
        mock.faults.health = 503
        worker.suspected.set()
        await until(lambda: worker.status == "unhealthy")
        mock.faults.frozen = then == "frozen"
        answer = await asking
        assert answer.status_code == (502 if then == "frozen" else 504), answer.text


async def with_a_probe_due(r):
    """The only worker, its breaker open for so long that the next request probes it."""
    await r.chat()
    return open_with_a_probe_due(r, r.registered(r.workers[0]))


def open_with_a_probe_due(r, worker):
    r.gateway.monitor.tasks.pop(worker).cancel()  # which would send the probe
    for _ in range(5):
        worker.breaker.failure(1)
    assert worker.breaker.state == "open"
    worker.breaker.opened_at -= 100
    return worker


@asynchronous
async def test_half_open_probe_that_takes_the_short_way_closes_the_breaker():
    async with running(1) as r:
        worker = await with_a_probe_due(r)
        client = await RawClient.connect(r.port)
        r.workers[0].faults.delay_s = 0.05
        asking = asyncio.create_task(r.chat())
        await until(lambda: worker.in_flight == 1)
        assert worker.breaker.state == "half_open" and worker.breaker.admit() != PROBE
        assert (await asking).status_code == 200
        assert worker.breaker.state == "closed"
        client.leave()


@pytest.mark.parametrize(
    "answer, state, timeout_s", [(429, "half_open", 1), (503, "half_open", 1), (500, "open", 2)]
)
@asynchronous
async def test_probe_of_a_breaker_that_finds_the_worker_busy_decides_nothing(answer, state, timeout_s):
    async with running(1, cb_timeout_duration_secs=1.0) as r:
        worker = await with_a_probe_due(r)
        worker.failed_path = b"/generate"
        r.workers[0].faults.status = answer
        await r.gateway.monitor._breaker_probe(worker)
        assert len(r.workers[0].seen) == 2
        assert (worker.breaker.state, worker.breaker.timeout_s) == (state, timeout_s)
        assert not worker.breaker.probing


@asynchronous
async def test_client_that_leaves_during_a_probe_on_the_short_way_leaves_room_for_another():
    async with running(1) as r:
        worker = await with_a_probe_due(r)
        r.workers[0].faults.delay_s = 10
        client = await RawClient.connect(r.port)
        client.writer.write(post(TEXT))
        await until(lambda: worker.in_flight == 1)
        client.leave()
        await until(lambda: not worker.in_flight)
        assert worker.breaker.state == "half_open" and not worker.breaker.probing


@asynchronous
async def test_probe_that_says_500_is_settled_when_its_client_leaves_during_the_next_attempt():
    workers = [await MockWorker(name=f"w{i}").start() for i in range(2)]
    async with running(workers=workers, policy="round_robin") as r:
        probed, other = (r.registered(w) for w in workers)
        open_with_a_probe_due(r, probed)
        r.gateway.monitor.tasks.pop(other).cancel()
        r.gateway.registry.set_status(other, "unhealthy")
        workers[0].faults.delay_s, workers[0].faults.status = 0.1, 500
        workers[1].faults.delay_s = 10
        client = await RawClient.connect(r.port)
        client.writer.write(post(TEXT))
        await until(lambda: workers[0].running)
        assert probed.breaker.probing
        r.gateway.registry.set_status(other, "ready")
        await until(lambda: workers[1].running)
        client.leave()
        await until(lambda: not other.in_flight)
        assert probed.breaker.state == "half_open" and not probed.breaker.probing


NUMBERS = [
    b"1" + b"0" * 30,
    b"2" + b"0" * 400,
    b"1" + b"0" * 5000,
    b"-7",
    b"1e300",
    b'"9"',
    b"null",
    b"[" * 5000 + b"]" * 5000,
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n[:9].decode())
@pytest.mark.parametrize("policy", ["cache_aware", "least_load"])
@asynchronous
async def test_nonsense_on_the_control_routes_of_a_worker_hurts_nobody(policy, number):
    class Odd(MockWorker):
        def _control(self, path):
            if path == "/v1/loads":
                names = (
                    b"num_running_reqs",
                    b"num_waiting_reqs",
                    b"num_waiting_uncached_tokens",
                    b"token_usage",
                )
            elif path == "/server_info":
                names = (b"max_total_num_tokens", b"page_size", b"dp_size", b"chunked_prefill_size")
            else:
                return super()._control(path)
            fields = b",".join(b'"%b":%b' % (name, number) for name in names)
            return 200, b'{"loads":[{%b}],%b}' % (fields, fields)

    workers = [await Odd(name="w0").start(), await MockWorker(name="w1").start()]
    async with running(workers=workers, policy=policy) as r:
        loads = (await r.client.get("/get_loads")).json()["loads"]
        assert {entry["worker"] for entry in loads} == {w.url for w in workers}
        for i in range(4):
            assert (await r.chat(str(i))).status_code == 200
            assert "[DONE]" in await r.stream(str(i))
        assert (await r.client.get("/metrics")).status_code == 200
        assert len((await r.client.get("/workers")).json()["workers"]) == 2


@asynchronous
async def test_frozen_worker_is_noticed_although_health_checks_are_far_apart():
    """At `--health-check-interval-secs 30` by its silence."""
    async with running(2, health_check_interval_secs=30, health_check_timeout_secs=0.2) as r:
        await r.chat()
        await r.chat()
        r.workers[0].faults.frozen = True
        answers = await asyncio.gather(*(r.chat() for _ in range(4)))
        assert [a.json()["worker"] for a in answers] == ["w1"] * 4
        assert r.registered(r.workers[0]).status == "unhealthy"
        r.workers[0].thaw()
        await until(lambda: r.registered(r.workers[0]).status == "ready", timeout_s=10)


@asynchronous
async def test_pause_before_a_retry_grows_to_its_bound_with_jitter():
    async with running(1, retry_max_backoff_ms=200) as r:
        proxy = r.gateway.proxy
        for value, factor in ((0.0, 0.8), (0.5, 1.0), (1.0, 1.2)):
            proxy.rng = type("Fixed", (), {"random": lambda self, value=value: value})()
            pauses_ms = [round(1000 * proxy._backoff_s(n), 1) for n in (1, 2, 3, 5, 9)]
            assert pauses_ms == [round(factor * ms, 1) for ms in (50, 75, 112.5, 200, 200)]


# ---- clients ----


@asynchronous
async def test_zeros_in_front_of_a_length_mean_nothing():
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        for zeros in (1, 1, 1, 25, 5000, 1):
            assert await status(client, post(TEXT, length=b"0" * zeros + b"12")) == 200


@pytest.mark.parametrize("cut", [0, 1, 12])
@asynchronous
async def test_offer_of_another_protocol_is_ignored_and_its_body_is_read(cut):
    """Java's HTTP client and `curl --http2` offer h2c with every first request."""
    offer = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAoAAA")
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        data = post(TEXT, *offer)
        client.writer.write(data[: len(data) - cut])
        if cut:
            await asyncio.sleep(0.02)
            client.writer.write(data[-cut:])
        assert await status(client) == 200
        assert r.workers[0].seen[-1].body == TEXT
        client = await RawClient.connect(r.port)
        chunks = b"c\r\n" + TEXT + b"\r\n0\r\n\r\n"
        head = b"POST /generate HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n%b\r\n\r\n"
        assert await status(client, head % b"\r\n".join(offer) + chunks) == 200
        assert r.workers[0].seen[-1].body == TEXT
        client = await RawClient.connect(r.port)
        assert (
            await status(client, b"GET /health HTTP/1.1\r\nhost: g\r\n%b\r\n\r\n" % b"\r\n".join(offer))
            == 200
        )
        assert await status(await RawClient.connect(r.port), data.replace(b"12\r\n", b"1x\r\n")) == 400


@asynchronous
async def test_trailers_are_no_headers():
    async with running(1, api_key="k") as r:
        chunks = b"c\r\n" + TEXT + b"\r\n0\r\n%b\r\nx-late: 1\r\n\r\n"
        head = b"POST /generate HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n%b\r\n"
        key = b"authorization: Bearer k"
        client = await RawClient.connect(r.port)
        assert await status(client, head % b"" + chunks % key) == 401
        assert await status(client, head % (key + b"\r\n") + chunks % b"x-other: 1") == 200
        assert not {"x-late", "x-other"} & set(r.workers[0].seen[-1].headers)


@asynchronous
async def test_client_that_leaves_with_a_second_request_sent_is_noticed():
    async with running(1) as r:
        await r.chat()
        r.workers[0].faults.delay_s = 30
        client = await RawClient.connect(r.port)
        client.writer.write(post(TEXT))
        await until(lambda: r.workers[0].running == 1)
        client.writer.write(post(TEXT))
        await asyncio.sleep(0.05)
        client.leave()
        await until(lambda: r.workers[0].disconnects)
        await idle(r)


@asynchronous
async def test_garbage_behind_a_request_ends_its_answer_and_puts_nothing_into_it():
    async with running(1) as r:
        r.workers[0].faults.token_s = 0.05
        client = await RawClient.connect(r.port)
        client.writer.write(post(b'{"text":"x","stream":true,"max_tokens":100}'))
        data = await client.read_until(b"tok1")
        client.writer.write(b"\0\1 no request\r\n\r\n")
        data += await client.reader.read()
        assert data.count(b"HTTP/1.1") == 1 and b"bad_request" not in data and b"[DONE]" not in data
        await idle(r)


@asynchronous
async def test_client_that_takes_nothing_of_its_stream_loses_its_connection_and_its_place(monkeypatch):
    monkeypatch.setattr(http_server, "STALLED_S", 0.2)
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        client.writer.transport.pause_reading()
        client.writer.write(post(b'{"text":"x","stream":true,"max_tokens":10000000}'))
        await until(lambda: r.workers[0].running == 1)
        await until(lambda: r.workers[0].running == 0, timeout_s=40)
        await idle(r)
        assert len(r.workers[0].seen) == 1, "and it does not begin again"


@pytest.mark.parametrize("takes, is_cut", [(0, True), (1, False)])
@asynchronous
async def test_client_that_takes_a_little_of_its_answer_keeps_its_connection(monkeypatch, takes, is_cut):
    monkeypatch.setattr(http_server, "STALLED_S", 0.01)
    connection = ClientConnection.__new__(ClientConnection)
    connection.loop, connection.flow = asyncio.get_running_loop(), Mock()
    transport = connection.transport = SlowTransport(takes)
    connection.pause_writing()
    await until(lambda: transport.looks > 4 or transport.aborted)
    connection.resume_writing()
    looks = transport.looks
    await asyncio.sleep(0.05)
    assert transport.aborted == is_cut and transport.looks == looks


class SlowTransport:
    """One whose buffer empties by `takes` bytes between two looks."""

    def __init__(self, takes):
        self.takes, self.looks, self.aborted = takes, 0, False

    def get_write_buffer_size(self):
        self.looks += 1
        return 100_000 - self.takes * self.looks

    def abort(self):
        self.aborted = True


@asynchronous
async def test_head_without_an_end_is_431():
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        reading = asyncio.create_task(client.reader.readline())
        client.writer.write(b"POST /generate HTTP/1.1\r\nx: ")
        sent = 0
        while not reading.done():
            client.writer.write(b"y" * 16384)
            sent += 16384
            await asyncio.sleep(0.002)
        assert await reading == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
        assert MAX_HEAD_BYTES <= sent < 2 * MAX_HEAD_BYTES
        await idle(r)
        client = await RawClient.connect(r.port)  # a large one has an end
        assert await status(client, post(TEXT, *(b"x-%d: " % i + b"y" * 500 for i in range(100)))) == 200


@pytest.mark.parametrize("rest", [b"\r\n", b"{"])
@asynchronous
async def test_bytes_that_become_no_request_keep_no_connection_open(rest, monkeypatch):
    made = gateway_harness.uvicorn_config

    def impatient(config, app):
        uvicorn_config = made(config, app)
        uvicorn_config.timeout_keep_alive = 0.1
        return uvicorn_config

    monkeypatch.setattr(gateway_harness, "uvicorn_config", impatient)
    async with running(1, api_key="k") as r:
        client = await RawClient.connect(r.port)
        data = post(TEXT)
        assert await status(client, data[: -len(TEXT)] if rest == b"{" else data) == 401
        client.writer.write(rest)
        assert await client.reader.read() == b""


@asynchronous
async def test_key_is_checked_for_every_request_of_a_connection():
    async with running(1, api_key="k", control_plane_api_keys=["1:op:admin:root"]) as r:
        client = await RawClient.connect(r.port)
        control = (
            b"POST /flush_cache HTTP/1.1\r\nhost: g\r\ncontent-length: 0\r\nauthorization: Bearer %b\r\n\r\n"
        )
        for key, expected in (
            (b"k", 200), (b"k", 200), (b"k", 200), (b"j", 401), (b"k", 200), (b"K", 401), (b"k", 200),
            (b"", 401), (b"k ", 200), (b"k", 200),
        ):  # fmt: skip
            assert await status(client, post(TEXT, b"authorization: Bearer " + key)) == expected, key
        assert await status(client, post(TEXT)) == 401
        assert await status(client, control % b"k") == 403
        assert await status(client, control % b"root") == 200
        assert await status(client, control % b"k") == 403
        assert await status(client, post(TEXT, b"authorization: Bearer k")) == 200
        await idle(r)


@pytest.mark.parametrize("worker_key", [None, "theirs"])
@asynchronous
async def test_keys_of_clients_reach_only_workers_without_a_key_of_their_own(worker_key):
    async with running(1, api_key="k", worker_api_key=worker_key) as r:
        for name, value in (("authorization", "Bearer k"), ("x-api-key", "k")):
            response = await r.client.post("/generate", content=TEXT, headers={name: value})
            assert response.status_code == 200
            sent = r.workers[0].seen[-1].headers
            got = {key: sent[key] for key in ("authorization", "x-api-key") if key in sent}
            assert got == ({"authorization": "Bearer theirs"} if worker_key else {name: value})


@asynchronous
async def test_body_over_the_limit_is_413_however_well_its_head_is_known():
    async with running(1, max_payload_size=1000) as r:
        client = await RawClient.connect(r.port)
        for size, expected in (
            (10, 200),
            (10, 200),
            (10, 200),
            (1000, 200),
            (1001, 413),
            (9000, 413),
            (10, 200),
        ):
            body = b'{"a":1}'.ljust(size)
            assert await status(client, post(body)) == expected, size
        await idle(r)


@pytest.mark.parametrize("path", ["/generate", "/workers"])
@asynchronous
async def test_body_of_which_nothing_more_comes_is_408_and_a_slow_one_is_read(monkeypatch, path):
    monkeypatch.setattr("router.body.SILENT_S", 0.6)
    monkeypatch.setattr("router.body.LEAST_BYTES_S", 1)
    async with running(1) as r:
        head = b"POST %b HTTP/1.1\r\nhost: g\r\ncontent-length: 400000000\r\n\r\n" % path.encode()
        client = await RawClient.connect(r.port)
        client.writer.write(head)
        reading = asyncio.create_task(client.reader.read())
        for _ in range(3):  # what comes in time sets the clock anew
            client.writer.write(b"{")
            await asyncio.sleep(0.25)
            assert not reading.done()
        answer = await reading
        assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer
        assert r.gateway.proxy.concurrency.running == 0 and not r.workers[0].seen


@pytest.mark.parametrize("path", ["/generate", "/workers"])
@asynchronous
async def test_body_that_drips_is_408_though_it_never_stands_still(monkeypatch, path):
    monkeypatch.setattr("router.body.SILENT_S", 1.0)
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        head = b"POST %b HTTP/1.1\r\nhost: g\r\ncontent-length: 400000000\r\n\r\n" % path.encode()
        client.writer.write(head)
        reading = asyncio.create_task(client.read_until(b"\r\n\r\n"))  # a drip behind it meets a closed door

        async def drip() -> None:
            while not reading.done():
                client.writer.write(b"{")
                await asyncio.sleep(0.1)

        await asyncio.wait_for(drip(), 20)
        answer = await reading
        assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer
        assert r.gateway.proxy.concurrency.running == 0 and not r.workers[0].seen


@asynchronous
async def test_large_body_over_a_slow_link_has_time():
    async def receive():
        return await asyncio.sleep(0.05, {"type": "http.request"})

    now_s = asyncio.get_running_loop().time()
    for link_bytes_s in (1_000_000, 10_000, 1_000):
        assert await next_part(receive, 3600 * link_bytes_s, now_s - 3600)  # the body of an hour
    with pytest.raises(RequestError, match="1000 bytes a second") as caught:
        await next_part(receive, 3600 * 900, now_s - 3600)
    assert caught.value.status == 408
