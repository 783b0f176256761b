"""The HTTP surface: errors, limits, keys, health, models, loads, metrics; and input that means harm."""

import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest
import yaml
from gateway_harness import CHAT, RawClient, asynchronous, running, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_worker import KvWorker, write_tokenizer
from mock_worker import MockWorker
from prometheus_client.parser import text_string_to_metric_families

from router.config import ConfigError, RouterConfig
from router.control_body import MAX_CONTROL_BYTES
from router.launch_router import start_metrics_server
from router.launch_server import make_parser, make_plan
from router.metrics import Metrics, joined
from router.workers import Load


def error_of(response: httpx.Response) -> dict:
    """The OpenAI error object, checked for its four fields."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"} and error["message"]
    return error


# ---- errors ----


@asynchronous
async def test_unknown_path_is_404_with_an_openai_error():
    async with running(0) as r:
        response = await r.client.get("/add_worker")
        assert response.status_code == 404 and error_of(response)["code"] == "unknown_url"


@asynchronous
async def test_wrong_method_is_405_and_names_the_right_one():
    async with running(0) as r:
        for path in ("/v1/chat/completions", "/workers/x/y", "/readiness"):
            response = await r.client.put(path)
            if path == "/workers/x/y":
                assert response.status_code == 404
                continue
            assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"
            assert "allow" in response.headers


@asynchronous
async def test_malformed_json_is_400_and_reaches_no_worker():
    async with running(1) as r:
        for body in (b"", b"{", b"nul", b"\xff\xfe{}", b"[]", b'"x"', b"[" * 5000, b'{"a":' * 3000):
            response = await r.client.post("/generate", content=body)
            assert response.status_code == 400, body[:20]
            assert error_of(response)["code"] == "invalid_json"
        assert r.split() == [0]


@asynchronous
async def test_wrong_content_type_is_415():
    async with running(1) as r:
        response = await r.client.post("/generate", content=b"{}", headers={"content-type": "text/plain"})
        assert response.status_code == 415 and error_of(response)["code"] == "unsupported_media_type"


@asynchronous
async def test_multipart_upload_passes_through():
    async with running(1) as r:
        files = {"file": ("a.wav", b"RIFF", "audio/wav")}
        response = await r.client.post("/v1/audio/transcriptions", files=files, data={"model": "mock"})
        assert response.status_code == 200
        assert b"RIFF" in r.workers[0].seen[0].body


@asynchronous
async def test_body_over_the_limit_is_413_and_at_the_limit_passes():
    async with running(1, max_payload_size=200) as r:
        body = json.dumps({"text": "x"}).encode()
        exactly = body + b" " * (200 - len(body))
        assert (await r.client.post("/generate", content=exactly)).status_code == 200
        response = await r.client.post("/generate", content=exactly + b" ")
        assert response.status_code == 413 and error_of(response)["code"] == "payload_too_large"

        async def chunks():
            for _ in range(30):
                yield b" " * 10

        assert (await r.client.post("/generate", content=chunks())).status_code == 413


@asynchronous
@pytest.mark.parametrize("path", ["/abort_request", "/workers"])
async def test_body_of_a_control_request_is_bounded(path, caplog):
    async with running(1) as r:
        response = await r.client.post(path, content=b"[" + b" " * MAX_CONTROL_BYTES)
        assert response.status_code == 413 and error_of(response)["code"] == "payload_too_large"
        leaving = await RawClient.connect(r.port)
        leaving.writer.write(f"POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-length: 9\r\n\r\n[".encode())
        await until(lambda: r.gateway.num_connections() == 2)
        leaving.leave()
        await until(lambda: r.gateway.num_connections() == 1)
        assert (await r.client.get("/health")).status_code == 200
    assert "Traceback" not in caplog.text


@asynchronous
async def test_control_request_that_every_worker_finds_wrong_is_answered_with_a_workers_words():
    async with running(2) as r:
        for worker in r.workers:
            worker.faults.status = 400
        response = await r.client.post("/abort_request", json={"rid": 5})
        assert response.status_code == 400 and response.json()["error"]["message"] == "injected"
        r.workers[0].faults.status = 503
        assert (await r.client.post("/abort_request", json={"rid": 5})).status_code == 400
        r.workers[1].faults.status = 503
        response = await r.client.post("/abort_request", json={"rid": 5})
        assert response.status_code == 502 and error_of(response)["code"] == "upstream_error"
        assert f"worker {r.workers[0].url}: answered 503" in error_of(response)["message"]
        r.workers[1].faults.status = 200
        assert (await r.client.post("/abort_request", json={"rid": "x"})).status_code == 200


@asynchronous
async def test_request_for_no_resource_is_404():
    async with running(0) as r:
        client = await RawClient.connect(r.port)
        client.writer.write(b"OPTIONS * HTTP/1.1\r\nhost: gateway\r\n\r\n")
        assert (await client.read_until(b"\r\n")).startswith(b"HTTP/1.1 404 ")
        client.leave()


@asynchronous
async def test_unknown_model_is_404_and_adapter_names_reach_their_base():
    async with running(1) as r:
        response = await r.client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-9"})
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found" and error_of(response)["param"] == "model"
        response = await r.client.post("/v1/chat/completions", json={**CHAT, "model": "mock:adapter"})
        assert response.status_code == 200


@asynchronous
async def test_names_that_engines_take_for_what_they_serve_are_found():
    workers = [await MockWorker(model=m, info={"model_path": f"/m/{m}"}).start() for m in ("a", "b")]
    async with running(workers=workers) as r:
        for model, expected in (("", {0, 1}), ("default", {0, 1}), ("/m/b", {1}), ("/m/a:lora", {0})):
            answers = [await r.chat(model=model) for _ in range(4)]
            assert {a.status_code for a in answers} == {200}, model
            urls = {a.headers["x-smg-routed-worker-id"] for a in answers}
            assert urls == {workers[i].url for i in expected}, model
        assert workers[1].seen[-1].json["model"] == "/m/b"  # as the client wrote it
        assert (await r.chat(model="/m/c")).status_code == 404
        cards = (await r.client.get("/v1/models")).json()["data"]
        assert sorted(card["id"] for card in cards) == ["a", "b"]


@asynchronous
async def test_model_that_is_called_default_is_asked_for_by_that_name():
    workers = [await MockWorker(model=m).start() for m in ("default", "b")]
    async with running(workers=workers) as r:
        answers = [await r.chat(model="default") for _ in range(4)]
        assert {a.headers["x-smg-routed-worker-id"] for a in answers} == {workers[0].url}


@asynchronous
async def test_worker_with_a_name_of_the_operators_answers_to_that_alone():
    async with running(0) as r:
        worker = await MockWorker(info={"model_path": "/m"}).start()
        r.workers.append(worker)
        await r.client.post("/workers", json={"url": worker.url, "model_id": "mine"})
        await until(lambda: r.gateway.registry.usable(None))
        assert [(await r.chat(model=m)).status_code for m in ("mine", "/m", "mock")] == [200, 404, 404]


@asynchronous
async def test_no_worker_is_503_with_retry_after():
    async with running(0) as r:
        response = await r.chat()
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert error_of(response)["code"] == "no_available_workers"


@asynchronous
async def test_dead_workers_are_502_then_503_and_never_500():
    async with running(2) as r:
        for worker in r.workers:
            await worker.kill()
        statuses = [(await r.chat()).status_code for _ in range(5)]
        assert set(statuses) <= {502, 503}


@asynchronous
async def test_request_that_is_not_http_gets_a_json_400():
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        client.writer.write(b"NONSENSE\r\n\r\n")
        answer = await client.reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "bad_request"
        assert (await r.chat()).status_code == 200


# ---- limits ----


@asynchronous
async def test_requests_over_the_limit_wait_then_429_with_retry_after():
    async with running(1, max_concurrent_requests=2, queue_size=1) as r:
        r.workers[0].faults.delay_s = 0.3
        tasks = [asyncio.create_task(r.chat()) for _ in range(6)]
        responses = await asyncio.gather(*tasks)
        statuses = sorted(x.status_code for x in responses)
        assert statuses == [200, 200, 200, 429, 429, 429]
        refused = next(x for x in responses if x.status_code == 429)
        assert error_of(refused)["code"] == "admission_queue_full" and refused.headers["retry-after"]
        assert error_of(refused)["type"] == "rate_limit_error"
        assert r.gateway.proxy.concurrency.running == 0


@asynchronous
async def test_wait_longer_than_the_queue_timeout_is_408():
    async with running(1, max_concurrent_requests=1, queue_timeout_secs=0.1) as r:
        r.workers[0].faults.delay_s = 0.5
        first = asyncio.create_task(r.chat())
        await until(lambda: r.workers[0].running)
        response = await r.chat()
        assert response.status_code == 408 and error_of(response)["code"] == "admission_queue_timeout"
        assert "retry-after" in response.headers
        assert (await first).status_code == 200


@asynchronous
async def test_client_that_leaves_the_queue_takes_no_place():
    async with running(1, max_concurrent_requests=1) as r:
        r.workers[0].faults.delay_s = 0.4
        first = asyncio.create_task(r.chat())
        await until(lambda: r.workers[0].running)
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", CHAT)
        await until(lambda: len(r.gateway.proxy.concurrency.queue) == 1)
        client.leave()
        await until(lambda: not r.gateway.proxy.concurrency.queue)
        await first
        assert r.gateway.proxy.concurrency.running == 0
        assert r.split() == [1]


@asynchronous
async def test_place_is_given_back_when_a_streaming_client_leaves():
    async with running(1, max_concurrent_requests=1) as r:
        r.workers[0].faults.token_s = 0.01
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 1000})
        await client.read_until(b"tok1")
        client.leave()
        await until(lambda: r.gateway.proxy.concurrency.running == 0)
        r.workers[0].faults.token_s = 0
        assert (await r.chat()).status_code == 200


@asynchronous
async def test_token_rate_is_kept_for_each_key():
    async with running(1, api_keys=["a:key-a", "b:key-b"], rate_limit_tokens_per_second=10) as r:

        async def ask(key: str) -> httpx.Response:
            body = {**CHAT, "messages": [{"role": "user", "content": "x" * 1000}]}
            headers = {"authorization": f"Bearer {key}"}
            return await r.client.post("/v1/chat/completions", json=body, headers=headers)

        assert (await ask("key-a")).status_code == 200  # 250 tokens: into debt, once
        refused = await ask("key-a")
        assert refused.status_code == 429 and error_of(refused)["code"] == "token_rate_exceeded"
        assert 10 <= int(refused.headers["retry-after"]) <= 20
        assert (await ask("key-b")).status_code == 200


@asynchronous
async def test_request_that_is_not_let_in_costs_its_caller_no_tokens():
    rate = {"rate_limit_tokens_per_second": 10}
    async with running(1, max_concurrent_requests=1, queue_size=1, **rate) as r:
        proxy = r.gateway.proxy
        proxy.token_rate.clock = lambda: 0.0
        left = lambda: proxy.token_rate.buckets["anonymous"][0]  # noqa: E731
        r.workers[0].faults.delay_s = 5
        clients = []
        for inside, waiting in ((1, 0), (1, 1)):
            client = await RawClient.connect(r.port)
            client.post("/v1/chat/completions", CHAT)
            clients.append(client)
            await until(
                lambda n=(inside, waiting): n == (proxy.concurrency.running, len(proxy.concurrency.queue))
            )
        paid = left()
        assert error_of(await r.chat("x" * 1000))["code"] == "admission_queue_full"
        assert left() == paid
        clients[1].leave()
        await until(lambda: not proxy.concurrency.queue)
        assert left() == paid + (100 - paid) / 2
        clients[0].leave()


@asynchronous
async def test_request_that_nobody_computed_costs_its_caller_no_tokens():
    async with running(1, rate_limit_tokens_per_second=10, retry_max_retries=2) as r:
        rate, faults = r.gateway.proxy.token_rate, r.workers[0].faults
        rate.clock = lambda: 0.0

        async def cost(status: int, **body) -> float:
            rate.buckets.clear()
            assert (await r.chat("x" * 80, **body)).status_code == status
            return 100 - rate.buckets["anonymous"][0]

        faults.status = 400
        assert await cost(400) == 0
        faults.status = None
        assert await cost(404, model="other") == 0
        assert await cost(200, max_tokens=4) > 20
        faults.delay_s = 5
        client = await RawClient.connect(r.port)
        rate.buckets.clear()
        client.post("/v1/chat/completions", CHAT)
        await until(lambda: r.workers[0].running)
        client.leave()  # the worker was at it
        await until(lambda: r.gateway.proxy.concurrency.running == 0)
        assert rate.buckets["anonymous"][0] < 100
        faults.drop, faults.delay_s = True, 0
        assert await cost(502) == 0
        await r.workers[0].kill()
        assert await cost(502) == 0
        assert await cost(503) == 0


@asynchronous
async def test_request_whose_time_is_over_was_computed_and_is_charged():
    async with running(1, rate_limit_tokens_per_second=10, request_timeout_secs=0.2) as r:
        r.gateway.proxy.token_rate.clock = lambda: 0.0
        r.workers[0].faults.delay_s = 30
        assert (await r.chat()).status_code == 504
        assert r.gateway.proxy.token_rate.buckets["anonymous"][0] < 100


@asynchronous
async def test_api_key_guards_data_and_admin_but_not_health():
    async with running(1, api_key="secret") as r:
        for method, path in (("POST", "/generate"), ("GET", "/workers"), ("POST", "/flush_cache"),
                             ("GET", "/get_loads"), ("GET", "/v1/loads"), ("GET", "/workers/x"),
                             ("GET", "/server_info"), ("GET", "/get_server_info"), ("GET", "/get_load"),
                             ("POST", "/start_expert_distribution_record")):  # fmt: skip
            response = await r.client.request(method, path, json={})
            assert response.status_code == 401, path
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"].startswith("Bearer")
        for path in ("/health", "/liveness", "/readiness", "/v1/models"):
            assert (await r.client.get(path)).status_code == 200, path
        for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            response = await r.client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == 200
        for wrong in ("Bearer nope", "Basic secret", "secret", "Bearer"):
            response = await r.client.post("/generate", json={}, headers={"authorization": wrong})
            assert response.status_code == 401


@asynchronous
async def test_only_operators_of_role_admin_change_workers_once_there_are_roles():
    keys = ["1:ops:admin:boss", "2:app:user:guest:with:colons"]
    async with running(1, control_plane_api_keys=keys, api_keys=["team:client"]) as r:
        asked = {}
        for token in ("boss", "guest:with:colons", "client", "nobody"):
            headers = {"authorization": f"Bearer {token}"}
            chat = await r.client.post("/v1/chat/completions", json=CHAT, headers=headers)
            loads = await r.client.get("/get_loads", headers=headers)
            workers = await r.client.get("/workers", headers=headers)
            flush = await r.client.post("/flush_cache", headers=headers)
            asked[token] = [a.status_code for a in (chat, loads, workers, flush)]
        assert asked == {
            "boss": [200, 200, 200, 200],
            "guest:with:colons": [200, 200, 403, 403],
            "client": [200, 200, 403, 403],
            "nobody": [401, 401, 401, 401],
        }
    async with running(1, control_plane_api_keys=keys) as r:  # and clients without keys
        assert (await r.chat()).status_code == 200
        assert (await r.client.get("/workers")).status_code == 401


@pytest.mark.parametrize("name", ["jwt-issuer", "tenant-api-key", "prefill", "enable-igw"])
def test_key_of_the_rust_gateway_that_is_not_supported_says_what_to_do(name, capsys):
    with pytest.raises(SystemExit):
        RouterConfig.from_command_line([f"--{name}", "x"])
    assert f"--{name} is not supported: " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is not supported"):
        RouterConfig.from_keywords(**{name.replace("-", "_"): "x"})
    with pytest.raises(SystemExit):
        make_plan(make_parser(), ["--model-path", "m", f"--router-{name}", "x"])
    assert f"--router-{name} is not supported: " in capsys.readouterr().err


def test_router_flag_that_the_gateway_does_not_know_is_not_handed_to_engines():
    with pytest.raises(ConfigError, match="--router-log-dir is no flag of the gateway"):
        make_plan(make_parser(), ["--model-path", "m", "--router-log-dir", "x"])


@pytest.mark.parametrize("keys", ["a:b:c", "1:ops:owner:k", "1:ops:admin:"])
def test_operator_key_without_a_known_role_is_refused(keys):
    with pytest.raises(ConfigError, match="id:name:role:key"):
        RouterConfig.from_keywords(control_plane_api_keys=[keys])


# ---- control ----


@asynchronous
async def test_health_is_ok_and_readiness_counts_usable_workers():
    async with running(2) as r:
        for path in ("/health", "/liveness"):
            response = await r.client.get(path)
            assert (response.status_code, response.text) == (200, "OK")
        response = await r.client.get("/readiness")
        assert response.json() == {"status": "ready", "healthy_workers": 2, "total_workers": 2}
        for worker in r.workers:
            await worker.kill()
        await r.chat()
        response = await r.client.get("/readiness")
        assert response.status_code == 503
        assert response.json()["reason"] == "insufficient healthy workers"


@asynchronous
async def test_draining_gateway_is_not_ready_but_still_serves():
    async with running(1) as r:
        r.gateway.draining = True
        response = await r.client.get("/readiness")
        assert response.status_code == 503 and response.json()["reason"] == "draining"
        assert (await r.client.get("/health")).status_code == 200
        assert (await r.chat()).status_code == 200


@asynchronous
async def test_models_are_merged_once_each():
    workers = [await MockWorker(model=m).start() for m in ("a", "b", "a")]
    async with running(workers=workers) as r:
        listed = (await r.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert sorted(card["id"] for card in listed["data"]) == ["a", "b"]
        assert (await r.client.get("/v1/models/b")).json()["id"] == "b"
        assert (await r.client.get("/v1/models/org/c")).status_code == 404
        response = await r.client.post("/v1/chat/completions", json={**CHAT, "model": "b"})
        assert response.headers["x-smg-routed-worker-id"] == workers[1].url


@asynchronous
async def test_loads_name_every_worker():
    async with running(2) as r:
        body = (await r.client.get("/get_loads")).json()
        assert {entry["worker"] for entry in body["loads"]} == {w.url for w in r.workers}
        assert body["loads"][0]["token_usage"] == 0.25
        assert body["aggregate"]["total_reqs"] == 0 and body["dp_rank_count"] == 2


@asynchronous
async def test_loads_of_a_worker_that_knows_only_the_older_route():
    class Older(MockWorker):
        def _control(self, path):
            if path == "/get_load":
                return 200, [{"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 100}]
            return (404, {}) if path == "/v1/loads" else super()._control(path)

    worker = await Older().start()
    async with running(workers=[worker]) as r:
        entry = (await r.client.get("/get_loads")).json()["loads"][0]
        assert (entry["num_running_reqs"], entry["num_waiting_reqs"]) == (3, 2)
        assert r.registered(worker).requests == 5  # other gateways' work counts


@asynchronous
async def test_load_of_each_rank_is_its_own_workers():
    class Ranks(MockWorker):
        def _control(self, path):
            if path != "/v1/loads":
                return super()._control(path)
            return 200, {"loads": [{"dp_rank": i, "num_running_reqs": n} for i, n in ((1, 5), (0, 2))]}

    worker = await Ranks(info={"dp_size": 2}).start()
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: len(r.gateway.registry.usable(None)) == 2)
        body = (await r.client.get("/v1/loads")).json()
        first, second = f"{worker.url}@0", f"{worker.url}@1"
        assert [(e["worker"], e["num_running_reqs"]) for e in body["loads"]] == [(first, 2), (second, 5)]
        by_url = r.gateway.registry.by_url
        assert (by_url[first].requests, by_url[second].requests) == (2, 5)


@asynchronous
async def test_older_form_of_the_loads_is_every_workers_in_one_list():
    class Older(MockWorker):
        def _control(self, path):
            known = path == "/get_load"
            return (200, [{"dp_rank": 0, "num_reqs": 5}]) if known else super()._control(path)

    workers = [await Older().start(), await Older().start(), await MockWorker().start()]
    workers[2].faults.status = 404  # one that knows no such route
    async with running(workers=workers) as r:
        answer = await r.client.get("/get_load")
        assert answer.json() == [{"worker": w.url, "dp_rank": 0, "num_reqs": 5} for w in workers[:2]]


@asynchronous
async def test_workers_answer_that_is_no_json_is_not_called_so():
    class Plain(MockWorker):
        def _control(self, path):
            return (200, b"OK") if path == "/health_generate" else super()._control(path)

    async with running(workers=[await Plain().start()]) as r:
        answer = await r.client.get("/health_generate")
        assert (answer.text, answer.headers["content-type"]) == ("OK", "text/plain; charset=utf-8")
        assert (await r.client.get("/model_info")).headers["content-type"] == "application/json"


@asynchronous
async def test_work_of_other_gateways_is_forgotten_when_nothing_more_is_heard_of_it():
    async with running(1) as r:
        worker, now_s = r.registered(r.workers[0]), asyncio.get_running_loop().time()
        worker.report(Load(running=9, queued_tokens=900, at_s=now_s - 1))
        worker.doubt(now_s)
        assert worker.requests == 9 and worker.foreign_tokens == 900
        worker.load.at_s = now_s - 6
        worker.suspected.set()  # the monitor looks at it now
        await until(lambda: worker.requests == 0)
        assert worker.foreign_tokens == 0


@asynchronous
async def test_requests_at_workers_are_counted_by_their_age():
    async with running(1) as r:
        r.workers[0].faults.delay_s = 30
        asking = [asyncio.create_task(r.chat()) for _ in range(3)]
        pool = r.registered(r.workers[0]).pool
        await until(lambda: len(r.workers[0].seen) == 3)
        for connection, age_s in zip(sorted(pool.active, key=id), (1, 100, 5000), strict=True):
            connection.sent_s -= age_s
        counts = {}
        for gt, le in (("0", "30"), ("60", "180"), ("180", "300"), ("3600", "+Inf")):
            counts[le] = r.metric(f'smg_http_inflight_request_age_count{{gt="{gt}",le="{le}"}}')
        assert counts == {"30": 1, "180": 1, "300": 0, "+Inf": 1}
        for task in asking:
            task.cancel()


@asynchronous
async def test_worker_that_wants_a_key_is_named_once(caplog):
    class Locked(MockWorker):
        def _control(self, path):
            return (401, {}) if path != "/health" else super()._control(path)

    worker = await Locked().start()
    async with running(workers=[worker]):
        lines = [message for message in caplog.messages if "--worker-api-key" in message]
        assert lines == [
            f"worker {worker.url} tells nothing of itself (401): it wants a key, see --worker-api-key"
        ]


@asynchronous
async def test_flush_reaches_every_worker_and_partial_success_is_206():
    async with running(2) as r:
        response = await r.client.post("/flush_cache")
        body = response.json()
        assert response.status_code == 200 and body["status"] == "success"
        assert (body["workers_flushed"], body["total_http_workers"]) == (2, 2)
        assert [w.flushes for w in r.workers] == [1, 1]
        r.workers[1].faults.status = 500
        response = await r.client.post("/flush_cache")
        assert response.status_code == 206 and response.json()["workers_flushed"] == 1


@asynchronous
async def test_command_to_all_workers_is_503_when_there_is_none():
    async with running(1) as r:
        await r.workers[0].kill()
        await r.chat()  # which ejects it
        for path in ("/flush_cache", "/abort_request", "/start_expert_distribution_record"):
            response = await r.client.post(path, json={})
            assert response.status_code == 503 and error_of(response)["code"] == "no_available_workers", path
            assert response.headers["retry-after"] == "1"


@asynchronous
async def test_flush_of_a_process_clears_what_is_known_of_all_its_ranks():
    worker = await MockWorker(info={"dp_size": 2}).start()
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: len(r.gateway.registry.usable(None)) == 2)
        cleared = []
        r.gateway.control.on_flushed = lambda rank: cleared.append(rank.dp_rank)
        response = await r.client.post("/flush_cache")
        assert response.status_code == 200 and sorted(cleared) == [0, 1]
        assert worker.flushes == 1


ONE = """# HELP up Whether it is.
# TYPE up gauge
up 1
# HELP seconds How long.
# TYPE seconds histogram
seconds_bucket{le="0.5",model="a b"} 3
seconds_bucket{le="+Inf",model="a b"} 4
seconds_count{model="a b"} 4
"""


def test_metrics_of_workers_are_joined_with_a_label_and_each_family_once():
    text = joined([("http://a:1", ONE), ("http://b:2", ONE.replace("up 1", "up 0") + "# EOF\nmore{} 7\n")])
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert text.count("# TYPE up gauge") == text.count("# HELP seconds") == 1
    assert {s.labels["worker"]: s.value for s in families["up"].samples} == {"http://a:1": 1, "http://b:2": 0}
    counts = [
        s for s in families["seconds"].samples if s.name == "seconds_bucket" and s.labels["le"] == "+Inf"
    ]
    assert [(s.labels["worker"], s.labels["model"], s.value) for s in counts] == [
        ("http://a:1", "a b", 4), ("http://b:2", "a b", 4)
    ]  # fmt: skip
    assert 'more{worker="http://b:2"} 7\n' in text


@asynchronous
async def test_engine_metrics_tell_the_workers_apart():
    async with running(2) as r:
        response = await r.client.get("/engine_metrics")
        workers = {
            sample.labels["worker"]
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        assert response.status_code == 200 and workers == {w.url for w in r.workers}


@asynchronous
async def test_metrics_count_what_happened():
    async with running(2, policy="cache_aware") as r:
        for _ in range(3):
            await r.chat("shared prefix " * 100)
        for worker in r.workers:
            worker.faults.token_s = 0.02  # so that tokens come one by one
        await r.stream()
        assert r.metric('smg_router_requests_total{router_type="regular",backend_type="regular",'
                        'connection_mode="http",model="mock",endpoint="/v1/chat/completions",'
                        'streaming="false"}') == 3  # fmt: skip
        for name in ("ttft_seconds", "tpot_seconds", "generation_duration_seconds"):
            assert r.metric(f"smg_router_{name}_count") == 1
        assert r.metric("smg_http_connections_active") == 1
        assert r.metric('router_policy_state{what="tree_nodes"}') > 0
        assert r.metric('sglang_cache_hit_rate{source="device"}') > 0.5
        home = max(r.workers, key=lambda w: len(w.seen))
        assert r.metric(f'router_actual_cached_tokens_total{{worker="{home.url}"}}') > 300
        assert r.metric(f'smg_worker_requests_active{{worker="{home.url}"}}') == 0
        text = (await r.client.get("/metrics")).text
        names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
        assert len(names) >= 40 and len([n for n in names if n.startswith("smg_")]) >= 30


def test_samples_are_told_with_every_digit():
    metrics = Metrics()
    metrics.counter("tokens", "", "of").of("a").add(12_345_678)
    metrics.watch("size", "", (), lambda: {(): 2**53 + 2.0})
    seconds = metrics.histogram("seconds", "").of()
    seconds.observe(1234567.125)
    seconds.observe(0.1)
    lines = metrics.text().decode().splitlines()
    assert 'tokens{of="a"} 12345678' in lines
    assert "size 9007199254740994.0" in lines
    assert "seconds_sum 1234567.225" in lines and "seconds_count 2" in lines


@asynchronous
async def test_routing_keys_and_the_branches_of_their_policy_are_counted():
    async with running(2, policy="manual") as r:
        for key in ("a", "b", "a"):
            await r.chat(routing_key=key)
        assert r.metric('smg_manual_policy_branch_total{branch="new_key"}') == 2
        assert r.metric('smg_manual_policy_branch_total{branch="sticky"}') == 1
        assert r.metric("smg_manual_policy_cache_entries") == 2
        at_home = [r.metric(f'smg_worker_routing_keys_active{{worker="{w.url}"}}') for w in r.workers]
        assert sum(at_home) == 2


@asynchronous
async def test_hit_rate_is_told_by_the_tier_that_the_worker_names():
    tiers = {"device": 30, "host": 10, "storage": 5, "storage_backend": "file"}
    meta = {"prompt_tokens": 100, "completion_tokens": 1, "cached_tokens": 45, "cached_tokens_details": tiers}
    async with running(1) as r:
        r.workers[0].faults.body = json.dumps({"text": "x", "meta_info": meta}).encode()
        await r.client.post("/generate", json={"text": "hello"})
        rates = [r.metric(f'sglang_cache_hit_rate{{source="{t}"}}') for t in ("device", "host", "storage")]
        assert rates == [0.3, 0.1, 0.05]


@asynchronous
async def test_metrics_port_serves_the_same_text():
    metrics = Metrics()

    async def text() -> bytes:
        return metrics.text()

    server = await start_metrics_server(text, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with httpx.AsyncClient() as client:
        response = await client.get(f"http://127.0.0.1:{port}/metrics")
    server.close()
    assert response.text == metrics.text().decode()


@asynchronous
async def test_cors_answers_the_allowed_origin_only():
    async with running(1, cors_allowed_origins=["https://app.example"]) as r:
        headers = {"origin": "https://app.example"}
        response = await r.client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        response = await r.client.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://e"})
        assert "access-control-allow-origin" not in response.headers


@asynchronous
async def test_worker_without_info_routes_serves_any_model():
    class Bare(MockWorker):
        def _control(self, path):
            return None if path.startswith("/v1/chat") else (404, {"detail": "Not Found"})

    worker = await Bare().start()
    async with running(workers=[worker]) as r:
        assert r.registered(worker).models == ()
        response = await r.client.post("/v1/chat/completions", json={**CHAT, "model": "whatever"})
        assert response.status_code == 200
        assert (await r.client.get("/get_loads")).json()["loads"][0]["worker"] == worker.url


# ---- configuration ----


def test_guide_command_parses_with_its_values():
    command = """--worker-urls http://worker1:8000 http://worker2:8000 --policy cache_aware
        --cache-threshold 0.5 --balance-abs-threshold 32 --balance-rel-threshold 1.5
        --eviction-interval-secs 120 --max-tree-size 67108864"""
    config = RouterConfig.from_command_line(command.split())
    assert config.worker_urls == ("http://worker1:8000", "http://worker2:8000")
    assert config.effective_policy == "cache_aware_threshold"
    assert (config.eviction_interval_secs, config.max_tree_size) == (120, 67108864)


def test_policy_defaults_to_round_robin():
    assert RouterConfig().policy == "round_robin" and RouterConfig().health_check_interval_secs is None


# ---- harm ----

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "stream", "messages", "text", "prompt", "input_ids", "cache_salt", "routing_key",
     "routed_dp_rank", "system", "lora_path", "extra_key", "sampling_params", "temperature", "n", "resume",
     "chat_template_kwargs"]
)  # fmt: skip
PATHS = ["/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/embeddings",
         "/workers", "/workers/0", "/flush_cache", "/v1/models", "/nowhere", "/%2e%2e",
         "/a?b=%zz"]  # fmt: skip


@given(
    bodies=st.lists(
        st.binary(max_size=60)
        | st.dictionaries(FIELDS, JSON_VALUES, max_size=5).map(lambda d: json.dumps(d).encode()),
        min_size=30,
        max_size=60,
    ),
    seed=st.randoms(use_true_random=False),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_input_causes_a_500(bodies, seed, tmp_path_factory):
    """In front of workers that are told nothing more than the bytes, or of those that know the protocol."""

    @asynchronous
    async def scenario():
        policy = seed.choice(["cache_aware", "cache_aware", "cache_aware_threshold", "manual"])
        workers = None
        if policy == "cache_aware":
            tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
            workers = [await KvWorker(tokenizer).start()]
            workers[0].info["protocol"] = ["kv_events/1", "input_ids/1", "resume/1"]
        async with running(2, workers=workers, policy=policy) as r:
            for worker in r.workers:
                worker.faults.body = b"{}"  # whatever it is asked
            if workers:
                await until(lambda: r.registered(workers[0]).kv and r.registered(workers[0]).kv.live)
            for body in bodies:
                method = seed.choice(["POST", "POST", "POST", "GET", "PUT", "DELETE", "PATCH"])
                path = seed.choice(PATHS)
                response = await r.client.request(method, path, content=body)
                assert response.status_code not in (500, 502), (method, path, body, response.text)

    scenario()


BAD_DEEP_INSIDE = [
    b'{"text": "a", "x": "\xff"}',  # what routing does not read is not decoded for it
    b'{"text": "a", "lora_path": "\xff"}',
    b'{"text": "\xff"}',
    b'{"text": "a", "x": 1e999}',
    b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}",
    b'{"text": "a", "stream": true, "temperature": 0, "messages": 5}',
    b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 5}',
    b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
]


def test_what_only_a_full_decoding_finds_wrong_is_left_to_the_worker(tmp_path):
    @asynchronous
    async def scenario():
        worker = await KvWorker(write_tokenizer(tmp_path)).start()
        worker.info["protocol"] = ["kv_events/1", "input_ids/1", "resume/1"]
        worker.faults.body = b"{}"
        async with running(workers=[worker], policy="cache_aware") as r:
            await until(lambda: r.registered(worker).kv and r.registered(worker).kv.live)
            for body in BAD_DEEP_INSIDE:
                for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
                    response = await r.client.post(path, content=body)
                    assert response.status_code in (200, 400), (path, body, response.text)

    scenario()


def test_example_configuration_is_valid_and_shows_the_real_defaults():
    file = Path(__file__).parent.parent.parent / "configs" / "router.yaml"
    config = RouterConfig.from_keywords(**yaml.safe_load(file.read_text()))
    assert config.policy == "cache_aware"
    effective = {"cache_threshold": 0.5, "balance_abs_threshold": 32, "balance_rel_threshold": 1.5}
    shown = re.findall(r"^# (\w+): (\S+)", file.read_text(), re.MULTILINE)
    assert len(shown) > 25
    for name, text in shown:
        default = effective.get(name, getattr(RouterConfig(), name))
        assert yaml.safe_load(text) == (list(default) if isinstance(default, tuple) else default), name
