"""Requests through the gateway to mock workers: what comes back, and what the workers see."""

import asyncio
import json

from gateway_harness import CHAT, RawClient, asynchronous, running, until

TEXT = {"text": "x"}


@asynchronous
async def test_json_answer_passes_through_unchanged():
    async with running(1) as r:
        response = await r.chat("hi")
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == "tok0 tok1 tok2 tok3 "
        assert response.headers["x-smg-routed-worker-id"] == r.workers[0].url


@asynchronous
async def test_round_robin_alternates_between_two_workers():
    async with running(2) as r:
        for _ in range(10):
            await r.chat()
        assert r.split() == [5, 5]


@asynchronous
async def test_stream_arrives_event_by_event_and_ends_with_done():
    async with running(1) as r:
        r.workers[0].faults.token_s = 0.03
        body = {**CHAT, "stream": True, "max_tokens": 5}
        times = []
        async with r.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"] == "text/event-stream"
            text = ""
            async for part in response.aiter_text():
                times.append(asyncio.get_running_loop().time())
                text += part
        assert text.count("data: ") == 6 and text.endswith("data: [DONE]\n\n")
        assert len(times) >= 5


@asynchronous
async def test_worker_sees_the_client_leave_a_stream_within_50_ms():
    async with running(1) as r:
        r.workers[0].faults.token_s = 0.005
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 4000})
        await client.read_until(b"tok3")
        left_s = asyncio.get_running_loop().time()
        client.leave()
        await until(lambda: r.workers[0].disconnects or not r.workers[0].running)
        assert asyncio.get_running_loop().time() - left_s < 0.5  # 50 ms is the benchmark's to assert
        await until(lambda: r.registered(r.workers[0]).in_flight == 0)


@asynchronous
async def test_worker_sees_the_client_leave_before_a_json_answer():
    async with running(1) as r:
        r.workers[0].faults.delay_s = 10
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", CHAT)
        await until(lambda: r.workers[0].running == 1)
        client.leave()
        await until(lambda: r.workers[0].disconnects, timeout_s=1)
        await until(lambda: r.registered(r.workers[0]).in_flight == 0)
        assert r.registered(r.workers[0]).breaker.failures == 0


@asynchronous
async def test_killed_worker_loses_no_json_request_and_is_used_again_when_back():
    async with running(2) as r:
        stop = False
        statuses = []

        async def load():
            while not stop:
                statuses.append((await r.chat()).status_code)

        tasks = [asyncio.create_task(load()) for _ in range(4)]
        await asyncio.sleep(0.2)
        await r.workers[0].kill()
        await asyncio.sleep(0.5)
        seen = len(r.workers[0].seen)
        await r.workers[0].start()
        took_s = await until(lambda: len(r.workers[0].seen) > seen, timeout_s=3)
        stop = True
        await asyncio.gather(*tasks)
        assert set(statuses) == {200} and len(statuses) > 20
        assert took_s < 1.0


@asynchronous
async def test_worker_that_answers_500_is_avoided_and_clients_see_none():
    async with running(2) as r:
        r.workers[0].faults.status = 500
        statuses = [(await r.chat()).status_code for _ in range(40)]
        assert statuses == [200] * 40
        assert not r.registered(r.workers[0]).breaker.closed
        assert len(r.workers[0].seen) <= 12


@asynchronous
async def test_500_from_every_worker_is_the_requests_fault_and_opens_no_breaker():
    async with running(2) as r:
        for worker in r.workers:
            worker.faults.status = 500
        for _ in range(10):
            response = await r.chat()
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "injected"
        assert all(r.registered(w).breaker.closed for w in r.workers)


@asynchronous
async def test_busy_worker_is_paused_but_its_breaker_stays_closed():
    async with running(2) as r:
        r.workers[0].faults.status = 503
        statuses = [(await r.chat()).status_code for _ in range(20)]
        assert statuses == [200] * 20
        assert r.registered(r.workers[0]).breaker.closed
        assert len(r.workers[0].seen) <= 3


@asynchronous
async def test_retry_after_of_a_busy_lone_worker_reaches_the_client():
    async with running(1, retry_max_retries=2, retry_initial_backoff_ms=1) as r:
        r.workers[0].faults.status = 429
        r.workers[0].faults.retry_after = "7"
        response = await r.chat()
        assert response.status_code == 429
        assert response.headers["retry-after"] == "7"
        assert len(r.workers[0].seen) == 2


@asynchronous
async def test_dropped_connections_are_retried_elsewhere():
    async with running(2) as r:
        r.workers[0].faults.drop = True
        statuses = [(await r.chat()).status_code for _ in range(30)]
        assert statuses == [200] * 30


@asynchronous
async def test_answer_that_is_not_http_is_retried_elsewhere():
    async with running(2) as r:
        r.workers[0].faults.garbage = True
        assert [(await r.chat()).status_code for _ in range(6)] == [200] * 6


@asynchronous
async def test_small_answer_cut_in_its_body_is_retried_elsewhere():
    async with running(2) as r:
        r.workers[0].faults.cut_body = True
        assert [(await r.chat()).status_code for _ in range(6)] == [200] * 6


@asynchronous
async def test_retries_disabled_means_one_attempt():
    async with running(2, disable_retries=True, disable_circuit_breaker=True) as r:
        r.workers[0].faults.status = 500
        statuses = sorted([(await r.chat()).status_code for _ in range(10)])
        assert statuses == [200] * 5 + [500] * 5


@asynchronous
async def test_broken_stream_ends_with_an_error_event_and_no_done():
    async with running(1) as r:
        r.workers[0].faults.abort_after = 2
        text = await r.stream(max_tokens=6)
        last = text.strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "stream_error" and "[DONE]" not in text


@asynchronous
async def test_broken_anthropic_stream_ends_with_its_own_error_event():
    async with running(1) as r:
        r.workers[0].faults.abort_after = 1
        response = await r.client.post("/v1/messages", json={**CHAT, "stream": True})
        last = response.text.strip().split("\n\n")[-1]
        event, _, data = last.partition("\n")
        assert event == "event: error"
        assert json.loads(data.removeprefix("data: "))["type"] == "error"


@asynchronous
async def test_worker_that_breaks_every_stream_stops_getting_them():
    async with running(2, cb_timeout_duration_secs=0.1) as r:
        r.workers[0].faults.abort_after = 2
        broken = 0
        for _ in range(40):
            broken += "stream_error" in await r.stream(max_tokens=6)
            await asyncio.sleep(0.01)
        assert broken <= 6  # the breaker's own probes meet the fault, not clients
        r.workers[0].faults.abort_after = None
        await until(lambda: r.registered(r.workers[0]).breaker.closed)
        assert "stream_error" not in await r.stream() + await r.stream()


@asynchronous
async def test_frozen_worker_is_ejected_and_its_json_requests_are_answered_by_another():
    async with running(2, health_check_timeout_secs=0.2, health_check_interval_secs=0.1) as r:
        r.workers[0].faults.frozen = True
        responses = await asyncio.gather(*(r.chat() for _ in range(6)))
        assert [x.status_code for x in responses] == [200] * 6
        assert r.registered(r.workers[0]).status == "unhealthy"
        r.workers[0].thaw()
        await until(lambda: r.registered(r.workers[0]).status == "ready")


@asynchronous
async def test_request_that_takes_too_long_is_answered_504():
    async with running(1, request_timeout_secs=0.3) as r:
        r.workers[0].faults.delay_s = 5
        response = await r.chat()
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "upstream_timeout"


@asynchronous
async def test_slow_client_pauses_the_worker_instead_of_filling_memory():
    async with running(1) as r:
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 100_000})
        await client.read_until(b"tok3")
        pool = r.registered(r.workers[0]).pool
        await until(lambda: any(c.paused for c in pool.active))
        buffered = sum(c.buffered_bytes for c in pool.active)
        assert buffered < 1 << 20
        client.leave()


@asynchronous
async def test_request_id_of_the_client_is_kept_and_forwarded():
    async with running(1) as r:
        response = await r.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc"})
        assert response.headers["x-request-id"] == "abc"
        assert r.workers[0].seen[0].headers["x-request-id"] == "abc"


@asynchronous
async def test_request_id_headers_are_taken_in_order():
    async with running(1) as r:
        headers = {"request-id": "last", "x-correlation-id": "second"}
        response = await r.client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.headers["x-request-id"] == "second"


@asynchronous
async def test_missing_request_id_is_made_with_the_routes_prefix():
    async with running(1) as r:
        made = (await r.chat()).headers["x-request-id"]
        assert made.startswith("chatcmpl-") and len(made) == 9 + 24
        made = (await r.client.post("/generate", json={"text": "x"})).headers["x-request-id"]
        assert made.startswith("gnt-") and len(made) == 4 + 24


@asynchronous
async def test_trace_header_is_passed_on():
    async with running(1) as r:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await r.client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": trace})
        assert r.workers[0].seen[0].headers["traceparent"] == trace


@asynchronous
async def test_stale_pooled_connection_is_no_failure():
    async with running(1) as r:
        await r.chat()
        worker = r.registered(r.workers[0])
        for writer in list(r.workers[0].writers):
            writer.transport.abort()
        assert (await r.chat()).status_code == 200
        assert worker.breaker.failures == 0


@asynchronous
async def test_load_header_of_a_worker_counts_the_work_of_other_gateways():
    async with running(1) as r:
        load = "running=5, waiting=2, queued_tokens=900, kv_usage=0.5"
        r.workers[0].response_headers["x-worker-load"] = load
        response = await r.chat()
        worker = r.registered(r.workers[0])
        assert worker.load.waiting == 2 and worker.foreign_requests == 6  # 7 less the one of ours
        assert "x-worker-load" not in response.headers


@asynchronous
async def test_target_worker_is_counted_in_the_order_of_registration_whoever_is_down():
    async with running(3, policy="consistent_hashing") as r:

        async def target(name: str) -> str:
            answer = await r.client.post("/generate", json=TEXT, headers={"x-smg-target-worker": name})
            return answer.json()["worker"]

        urls = [w.url for w in r.gateway.registry]
        assert urls == [w.url for w in r.workers]
        r.gateway.monitor.tasks.pop(r.registered(r.workers[0])).cancel()
        r.gateway.registry.set_status(r.registered(r.workers[0]), "unhealthy")
        names = ["1", "2", r.workers[2].url, r.registered(r.workers[1]).id]
        assert [await target(name) for name in names] == ["w1", "w2", "w2", "w1"]
        for name in ("0", "3", "-1", "9" * 5000, "x"):  # a worker that is down, and none
            assert await target(name) in ("w1", "w2")


@asynchronous
async def test_upstream_4xx_is_passed_through_and_not_retried():
    async with running(2) as r:
        for worker in r.workers:
            worker.faults.status = 422
        response = await r.chat()
        assert response.status_code == 422 and sum(r.split()) == 1
