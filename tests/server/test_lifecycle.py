"""Clients that leave, aborts, limits, health, draining, death."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
from fake_engine import INFO, FakeEngine
from live_server import Running, make_app, serving

from jaxserve import transport
from jaxserve.messages import Finish, Reply
from jaxserve.server import app as app_module
from jaxserve.server import openai, service, stream
from jaxserve.server.address import listen

SLOW = {"text": "x", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True, "stop_token_ids": [319]}}


def wait_for(condition, timeout_s=20.0):
    """Until the server's thread has done what the condition tells of."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def ask_and_leave(server, body, sequences):
    """Send a request, and close the connection when the engine has it."""
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as connection:
        connection.sendall(head.encode() + content)
        wait_for(lambda: len(server.engine.requests) == sequences)


def slow(server):
    server.engine.delay_s = 0.02
    server.engine.script = lambda request: [5] * 400


# ---- clients that leave ----


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_leaving_a_stream_aborts_the_request(server, path):
    slow(server)
    body = {
        "/generate": SLOW,
        "/v1/completions": {"prompt": "x", "max_tokens": 400},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    }[path]
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        next(response.iter_lines())
    wait_for(lambda: server.engine.aborted == [server.engine.requests[0].rid])
    wait_for(lambda: server.app.state.service.num_running == 0)


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_plain_request_aborts_all_its_sequences(server, n):
    slow(server)
    body = {**SLOW, "sampling_params": {**SLOW["sampling_params"], "n": n}}
    ask_and_leave(server, body, n)
    wait_for(lambda: len(server.engine.aborted) == n)
    wait_for(lambda: server.app.state.service.num_running == 0)


def test_leaving_before_the_first_token_aborts(server):
    server.engine.hang = True
    ask_and_leave(server, {**SLOW, "stream": True}, 1)
    wait_for(lambda: len(server.engine.aborted) == 1)
    wait_for(lambda: server.app.state.service.num_running == 0)


@pytest.mark.parametrize("reads", [True, False])
def test_stream_is_cut_when_its_reader_takes_nothing_not_when_there_is_nothing(monkeypatch, reads):
    monkeypatch.setattr(stream, "STALLED_S", 0.01)
    sent = []

    async def events():
        for _ in range(2):
            yield b"data: x\n\n"
            await asyncio.sleep(0.05)
        sent.append("all")

    async def send(message):
        if message["type"] == "http.response.body" and not reads:
            await asyncio.Event().wait()

    answer = stream.EventStream(events())
    asyncio.run(asyncio.wait_for(answer({}, asyncio.Event().wait, send), 20))
    assert sent == ["all"] * reads


def test_one_bad_sequence_of_a_batch_ends_the_others(server):
    slow(server)
    server.engine.script = lambda r: 1 / 0 if r.input_ids == [6] else [5] * 400
    body = {"input_ids": [[5], [6], [7]], "sampling_params": SLOW["sampling_params"]}
    assert server.generate(**body).status_code == 500
    wait_for(lambda: not server.engine.running)


# ---- aborts ----


def test_abort_request_by_rid_ends_the_stream_with_an_abort(server):
    slow(server)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.generate(**SLOW, rid="mine")))
    thread.start()
    wait_for(lambda: "mine" in server.engine.running)
    assert server.http.post("/abort_request", json={"rid": "mine"}).status_code == 200
    thread.join(5)
    assert answers[0].status_code == 200
    finish = answers[0].json()["meta_info"]["finish_reason"]
    assert finish == {"type": "abort", "message": "aborted by request"}


def test_abort_request_by_rid_ends_all_samples_but_no_other(server):
    slow(server)
    sampling = {**SLOW["sampling_params"], "n": 3}
    threads = [
        threading.Thread(target=lambda: server.generate(text="x", rid="a", sampling_params=sampling)),
        threading.Thread(target=lambda: server.generate(**SLOW, rid="a1")),
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(server.engine.running) == 4)
    server.http.post("/abort_request", json={"rid": "a"})
    threads[0].join(5)
    assert list(server.engine.running) == ["a1"]
    server.http.post("/abort_request", json={"abort_all": True})
    threads[1].join(5)


def test_abort_of_an_unknown_rid_is_no_error(server):
    assert server.http.post("/abort_request", json={"rid": "nobody"}).status_code == 200


def test_abort_request_names_what_is_missing(server):
    error = server.http.post("/abort_request", json={}).json()["error"]
    assert error["param"] == "rid"


def test_rid_in_use_is_refused(server):
    slow(server)
    thread = threading.Thread(target=lambda: server.generate(**SLOW, rid="mine"))
    thread.start()
    wait_for(lambda: "mine" in server.engine.running)
    refused = server.generate(text="x", rid="mine")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rid")
    server.http.post("/abort_request", json={"rid": "mine"})
    thread.join(5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, body",
    [
        ("/generate", {"text": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_status_of_an_engines_abort_is_the_answers(server, path, body, stream):
    server.engine.fail = Finish(type="abort", message="no room for it", status_code=503)
    response = server.http.post(path, json={**body, "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no room for it"
    assert response.headers["retry-after"] == "1"


# ---- limits ----


def test_full_queue_is_503_with_retry_after(tokenizer):
    engine = FakeEngine(lambda request: [5] * 400)
    engine.delay_s = 0.02
    app = make_app(engine, tokenizer, limit=2)
    running = Running(app)
    url = f"http://127.0.0.1:{running.port}"
    with httpx.Client(base_url=url, timeout=10) as http:
        body = {"input_ids": [[5]] * 10, "sampling_params": SLOW["sampling_params"]}
        thread = threading.Thread(target=lambda: http.post("/generate", json=body))
        thread.start()
        wait_for(lambda: len(engine.running) == 10)  # max_running_requests=8 and 2 waiting
        refused = http.post("/generate", json={"text": "x"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        http.post("/abort_request", json={"abort_all": True})
        thread.join(5)
    running.stop()
    running.thread.join(5)


@pytest.mark.parametrize("is_stream", [False, True])
def test_batch_that_never_fits_the_queue_is_400(tokenizer, is_stream):
    """Trying again later would not help."""
    engine = FakeEngine(lambda request: [])
    running = Running(make_app(engine, tokenizer, limit=2))
    url = f"http://127.0.0.1:{running.port}/generate"
    refused = httpx.post(url, json={"input_ids": [[5]] * 11, "stream": is_stream})
    assert refused.status_code == 400 and "retry-after" not in refused.headers
    assert refused.json()["error"]["message"] == (
        "11 sequences in one request are more than max_running_requests + max_queued_requests = 10; "
        "split the batch"
    )
    assert not engine.requests
    running.stop()
    running.thread.join(5)


@pytest.mark.parametrize("num_messages, beside", [(1, False), (1000, True)])
@pytest.mark.parametrize("field", [{}, {"input_ids": [5]}])
def test_many_messages_are_checked_and_rendered_beside_the_event_loop(
    server, monkeypatch, field, num_messages, beside
):
    threads = {}

    def noting(name, work):
        def noted(*args, **fields):
            threads[name] = threading.current_thread()
            return work(*args, **fields)

        return noted

    template = server.app.state.service.chat_template
    monkeypatch.setattr(template, "render", noting("render", template.render))
    monkeypatch.setattr(openai, "check_messages", noting("check", openai.check_messages))
    monkeypatch.setattr(openai, "check_model", noting("loop", openai.check_model))
    messages = [{"role": "user", "content": "x"}] * num_messages
    server.http.post("/v1/chat/completions", json={"messages": messages, **field})
    loop = threads.pop("loop")
    assert list(threads) == (["check"] if field else ["check", "render"])
    assert [thread is not loop for thread in threads.values()] == [beside] * len(threads)


@pytest.mark.parametrize("count, beside", [(1, False), (1024, True)])
def test_many_prompts_are_worked_on_beside_the_event_loop(server, monkeypatch, count, beside):
    """However short they are."""
    asked = []

    async def to_thread(work, *args):
        asked.append(work.__name__)
        return work(*args)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    tokens = server.http.post("/tokenize", json={"prompt": ["a"] * count}).json()["tokens"]
    texts = server.http.post("/detokenize", json={"tokens": tokens}).json()["text"]
    assert texts == ["a"] * count
    assert asked == ["encode_batch", "decode_batch"] * beside


# ---- health, draining, death ----


def test_health_follows_readiness_and_draining(server):
    assert server.http.get("/health").text == "OK"
    for name, value in (("ready", False), ("draining", True)):
        before = getattr(server.app.state, name)
        setattr(server.app.state, name, value)
        for path in ("/health", "/health_generate", "/ping"):
            assert server.http.get(path).status_code == 503
        assert server.generate(text="x").status_code == 503
        setattr(server.app.state, name, before)
    assert server.http.get("/health").status_code == 200
    ping = server.http.get("/ping")
    assert (ping.status_code, ping.content) == (200, b"")


def test_health_generate_makes_one_token(server):
    assert server.http.get("/health_generate").status_code == 200
    probe = server.engine.requests[0]
    assert probe.rid.startswith("HEALTH_CHECK_")
    assert (probe.input_ids, probe.sampling.max_new_tokens, probe.sampling.temperature) == ([0], 1, 0.0)


def test_health_generate_does_not_wait_for_ever(server):
    server.engine.hang = True
    assert server.http.get("/health_generate").status_code == 503
    assert len(server.engine.aborted) == 1


def test_health_generate_is_content_with_tokens_of_others(server):
    slow(server)
    thread = threading.Thread(target=lambda: server.generate(**SLOW, rid="mine"))
    thread.start()
    wait_for(lambda: server.engine.running)
    server.engine.delay_s = 0.02
    server.engine.hang_prefix = "HEALTH_CHECK"
    assert server.http.get("/health_generate").status_code == 200
    server.http.post("/abort_request", json={"rid": "mine"})
    thread.join(5)


def test_dead_engine_is_503_everywhere(server):
    server.engine.dead = True
    for path, body in (("/generate", {"text": "x"}), ("/v1/completions", {"prompt": "x"})):
        response = server.http.post(path, json=body)
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "service_unavailable_error"
    for path in ("/health", "/health_generate", "/v1/loads", "/server_info", "/flush_cache"):
        assert server.http.get(path).status_code == 503, path
    assert server.http.get("/metrics").status_code == 200


def test_questions_to_an_engine_that_does_not_answer_are_503_in_time(server, monkeypatch):
    monkeypatch.setattr(service, "ANSWER_S", 0.05)
    server.engine.mute = True
    for path in ("/v1/loads", "/get_load", "/server_info", "/flush_cache"):
        response = server.http.get(path)
        assert response.status_code == 503, path
        assert response.json()["error"]["message"] == "the engine did not answer within 0.05 s"
        assert response.headers["retry-after"] == "1"
    waited = server.http.post("/flush_cache?timeout=0.1").json()["error"]["message"]
    assert float(waited.split()[-2]) == pytest.approx(0.1, abs=0.04)
    metrics = server.http.get("/metrics")
    assert metrics.status_code == 200
    assert "sglang:num_requests_total{" in metrics.text and "num_running_reqs{" not in metrics.text


def test_engine_owes_the_answer_to_a_question_that_nobody_waits_for_any_more():
    """By that the watchdog finds an engine frozen."""

    async def owes() -> list[bool]:
        connection, sent = transport.Connection(lambda message: sent.append(message)), []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.call("loads"), 0.01)
        before = connection.waits
        connection.deliver(Reply(sent[0].call_id, True))
        return [before, connection.waits]

    assert asyncio.run(owes()) == [True, False]


def test_stop_lets_running_requests_finish(tokenizer):
    engine = FakeEngine(lambda request: tokenizer.encode("abcdefghij"))
    engine.delay_s = 0.03
    running = Running(make_app(engine, tokenizer))
    url = f"http://127.0.0.1:{running.port}"
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/generate", json={"text": "x"}))
    )
    with httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        thread.start()
        wait_for(lambda: engine.running)
        running.stop()
        wait_for(lambda: http.get("/health").status_code == 503)
        assert http.post("/generate", json={"text": "x"}).status_code == 503
    thread.join(5)
    assert answers[0].json()["text"] == "abcdefghij"
    running.thread.join(5)
    assert not running.thread.is_alive()


def test_stop_aborts_what_outlasts_the_grace_period(tokenizer):
    engine = FakeEngine(lambda request: [])
    engine.hang = True
    running = Running(make_app(engine, tokenizer), grace_s=0.1)
    url = f"http://127.0.0.1:{running.port}"
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/generate", json={"text": "x"}))
    )
    thread.start()
    wait_for(lambda: engine.running)
    running.stop()
    thread.join(5)
    assert answers[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
    running.thread.join(5)
    assert not running.thread.is_alive()


def test_stop_does_not_wait_for_questions_that_the_engine_does_not_answer(tokenizer, monkeypatch):
    monkeypatch.setattr(app_module, "END_S", 0.05)
    monkeypatch.setattr(service, "ANSWER_S", 60.0)
    engine = FakeEngine(lambda request: [])
    engine.mute = True
    running = Running(make_app(engine, tokenizer), grace_s=60)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.get(f"http://127.0.0.1:{running.port}/server_info", timeout=60))
    )
    thread.start()
    wait_for(lambda: engine.calls)
    running.stop()
    running.thread.join(10)
    assert not running.thread.is_alive()
    thread.join(10)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["message"] == "the server is shutting down"


@pytest.mark.parametrize("hangs, grace_s", [(True, 0.1), (False, 60.0)])
def test_serve_returns_what_is_left_of_the_grace(tokenizer, hangs, grace_s):
    """For the engine to drain in: both together have it once."""
    engine = FakeEngine(lambda request: [])
    engine.hang = True
    app = make_app(engine, tokenizer)

    async def serve_until_stopped() -> float:
        stop, asked = asyncio.Event(), []

        def started(port: int) -> None:
            if hangs:
                asked.append(asyncio.create_task(ask(port)))
            else:
                stop.set()

        async def ask(port: int) -> None:
            async with httpx.AsyncClient(timeout=60) as http:
                await http.post(f"http://127.0.0.1:{port}/generate", json={"text": "x"})

        generate = engine.generate
        engine.generate = lambda *given: stop.set() or generate(*given)  # type: ignore[method-assign]
        return await app_module.serve(app, "127.0.0.1", 0, stop=stop, grace_s=grace_s, started=started)

    left_s = asyncio.run(serve_until_stopped())
    assert left_s == 0.0 if hangs else 0.0 < left_s <= grace_s


def begin(running, body=b'{"text": "x"}'):
    """A connection on which all but the body's last byte was sent, and that byte."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[:-1])
    return connection, body[-1:]


def test_stop_lets_a_request_finish_whose_body_is_still_to_come(tokenizer, monkeypatch):
    monkeypatch.setattr(app_module, "END_S", 0.05)
    app = make_app(FakeEngine(lambda request: tokenizer.encode("hello")), tokenizer)
    running = Running(app, grace_s=20)
    connection, rest = begin(running)
    with connection:
        wait_for(lambda: app.state.in_flight)
        running.stop()
        running.thread.join(0.5)  # ten times as long as what is not waited for has
        connection.sendall(rest)
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 200 ") and '"text":"hello"' in answer
    running.thread.join(5)
    assert not running.thread.is_alive()


def test_stop_answers_503_to_what_is_not_admitted_when_the_grace_period_ends(tokenizer, monkeypatch):
    monkeypatch.setattr(app_module, "END_S", 0.05)
    app = make_app(FakeEngine(lambda request: []), tokenizer)
    running = Running(app, grace_s=0.1)
    connection, _ = begin(running)
    with connection:
        wait_for(lambda: app.state.in_flight)
        running.stop()
        head, content = connection.makefile("rb").read().split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in head
    assert json.loads(content)["error"]["message"] == "the server is shutting down"
    running.thread.join(5)
    assert not running.thread.is_alive()


def test_stop_does_not_wait_for_idle_connections_and_readers_of_cache_events(tokenizer):
    app = make_app(FakeEngine(lambda request: []), tokenizer)
    running = Running(app, grace_s=60)
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as http,
        http.stream("GET", "/kv_events") as events,
        socket.create_connection(("127.0.0.1", running.port)),
    ):
        lines = events.iter_lines()  # held: httpx closes the stream of a generator that is dropped
        next(lines)
        running.stop()
        running.thread.join(10)
        assert not running.thread.is_alive()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_send_a_small_part_of_an_answer_at_once(host):
    """And do not wait until the client has acknowledged the part before, up to 40 ms later."""
    with listen(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_api_key_guards_all_but_health_and_metrics(tokenizer):
    running = Running(make_app(FakeEngine(lambda request: [5], INFO), tokenizer, api_key="secret"))
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as http:
        for path in ("/health", "/metrics", "/ping"):
            assert http.get(path).status_code == 200
        assert http.get("/healthy").status_code == http.get("/metrics/x").status_code == 401
        for given in (None, "Bearer wrong", "secret", "Basic secret", "Bearer", "Bearersecret"):
            headers = {"authorization": given} if given else {}
            refused = http.post("/generate", json={"text": "x"}, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        for scheme in ("bearer", "BEARER ", "Bearer"):  # its case means nothing (RFC 9110, 11.1)
            key = {"authorization": f"{scheme} secret"}
            assert http.post("/generate", json={"text": "x"}, headers=key).status_code == 200
        info = http.get("/server_info", headers=key)
        assert info.json()["api_key"] == "***"
    running.stop()
    running.thread.join(5)


def test_cors_lets_the_allowed_origin_ask_and_no_other(tokenizer):
    app, other = {"origin": "https://app.example"}, {"origin": "https://other.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with serving(tokenizer, cors_allowed_origins=("https://app.example",), api_key="k") as server:
        before = server.http.options("/v1/chat/completions", headers={**app, **asks})  # browsers send no key
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://app.example"
        assert before.headers["access-control-allow-headers"] == "authorization"
        for key, status in (("k", 200), ("wrong", 401)):  # browsers hide an error, too, without the header
            headers = {**app, "authorization": f"Bearer {key}"}
            response = server.http.post("/generate", json={"text": "x"}, headers=headers)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert server.http.options("/generate", headers={**other, **asks}).status_code == 400
        assert "access-control-allow-origin" not in server.http.get("/health", headers=other).headers


def test_without_allowed_origins_there_is_no_cors(server):
    assert "access-control-allow-origin" not in server.http.get("/health", headers={"origin": "x"}).headers
