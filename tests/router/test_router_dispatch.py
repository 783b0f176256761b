"""Streams that wait for room at a worker: who goes first, and that nobody is forgotten."""

import asyncio
import json

from gateway_harness import RawClient, asynchronous, running, until
from mock_worker import MockWorker

SETTINGS = {"policy": "cache_aware", "prefill_window_tokens": 100}


def body(text: str, stream: bool = True) -> dict:
    messages = [{"role": "user", "content": text}]
    return {"model": "mock", "messages": messages, "stream": stream, "max_tokens": 2}


async def ask(r, text: str, stream: bool = True):
    return await r.client.post("/v1/chat/completions", json=body(text, stream))


def first_words(worker: MockWorker) -> list[str]:
    return [json.loads(s.body)["messages"][0]["content"][:4] for s in worker.seen]


@asynchronous
async def test_waiting_stream_with_a_cached_prefix_goes_before_an_older_one_without():
    async with running(1, **SETTINGS) as r:
        worker = r.workers[0]
        await ask(r, "warm" + "w" * 4000)
        worker.faults.frozen = True
        tasks = []
        for text in ("busy" + "b" * 4000, "cold" + "c" * 4000, "warm" + "w" * 4000 + "and more"):
            tasks.append(asyncio.create_task(ask(r, text)))
            await until(lambda: r.registered(worker).in_flight == len(tasks))
        assert r.gateway.proxy.dispatch.num_waiting() == 2
        worker.thaw()
        assert {t.status_code for t in await asyncio.gather(*tasks)} == {200}
        assert first_words(worker) == ["warm", "busy", "warm", "cold"]
        assert r.metric('smg_router_stage_duration_seconds_count{router_type="regular"') == 2


@asynchronous
async def test_held_stream_counts_as_load_of_its_worker_until_it_is_gone():
    async with running(1, **SETTINGS) as r:
        r.workers[0].faults.delay_s = 0.1
        worker = r.registered(r.workers[0])
        tasks = [asyncio.create_task(ask(r, f"{i}" * 4000)) for i in range(5)]
        await until(lambda: worker.in_flight == 5)
        assert r.workers[0].running <= 1 and worker.pending_tokens > 4000
        await asyncio.gather(*tasks)
        assert (worker.in_flight, worker.pending_tokens, worker.sent_tokens) == (0, 0, 0)
        assert r.gateway.proxy.dispatch.waiting == {}


@asynchronous
async def test_client_that_leaves_while_it_waits_is_never_sent():
    async with running(1, **SETTINGS) as r:
        r.workers[0].faults.delay_s = 0.2
        busy = asyncio.create_task(ask(r, "busy" * 1000))
        await until(lambda: r.workers[0].running == 1)
        client = await RawClient.connect(r.port)
        client.post("/v1/chat/completions", body("gone" * 1000))
        await until(lambda: r.gateway.proxy.dispatch.num_waiting() == 1)
        client.leave()
        await until(lambda: r.gateway.proxy.dispatch.num_waiting() == 0)
        await busy
        assert first_words(r.workers[0]) == ["busy"]
        worker = r.registered(r.workers[0])
        assert (worker.in_flight, worker.pending_tokens, worker.sent_tokens) == (0, 0, 0)


@asynchronous
async def test_streams_that_wait_at_a_dying_worker_go_to_another():
    async with running(2, **SETTINGS) as r:
        for worker in r.workers:
            worker.faults.delay_s = 0.3
        tasks = [asyncio.create_task(ask(r, f"{i}" * 4000)) for i in range(8)]
        await until(lambda: r.gateway.proxy.dispatch.num_waiting() >= 5)
        for worker in r.workers:
            worker.faults.delay_s = 0.01
        await r.workers[0].kill()
        responses = await asyncio.gather(*tasks)
        assert {x.status_code for x in responses} == {200}
        assert all("stream_error" not in x.text for x in responses)
        assert r.gateway.proxy.dispatch.waiting == {}
        assert all(w.in_flight == w.sent_tokens == w.pending_tokens == 0 for w in r.gateway.registry)


@asynchronous
async def test_drained_workers_waiting_streams_go_elsewhere_and_the_drain_ends():
    async with running(2, **SETTINGS) as r:
        for worker in r.workers:
            worker.faults.delay_s = 0.1
        tasks = [asyncio.create_task(ask(r, f"{i}" * 4000)) for i in range(6)]
        await until(lambda: r.gateway.proxy.dispatch.num_waiting() >= 3)
        await r.client.delete(f"/workers/{r.registered(r.workers[0]).id}")
        assert {t.status_code for t in await asyncio.gather(*tasks)} == {200}
        await until(lambda: len(r.gateway.registry) == 1)


@asynchronous
async def test_json_requests_and_a_window_of_zero_never_wait():
    async with running(1, **SETTINGS) as r:
        r.workers[0].faults.delay_s = 0.2
        tasks = [asyncio.create_task(ask(r, f"{i}" * 4000, stream=False)) for i in range(4)]
        await until(lambda: r.workers[0].running == 4)
        await asyncio.gather(*tasks)
    async with running(1, policy="cache_aware", prefill_window_tokens=0) as r:
        r.workers[0].faults.delay_s = 0.2
        tasks = [asyncio.create_task(ask(r, f"{i}" * 4000)) for i in range(4)]
        await until(lambda: r.workers[0].running == 4)
        await asyncio.gather(*tasks)


@asynchronous
async def test_stream_is_sent_after_the_longest_wait_although_the_window_is_full():
    from router import dispatch

    before, dispatch.MAX_HOLD_S = dispatch.MAX_HOLD_S, 0.1
    try:
        async with running(1, **SETTINGS) as r:
            r.workers[0].faults.delay_s = 1.0
            tasks = [asyncio.create_task(ask(r, f"{i}" * 4000)) for i in range(3)]
            took_s = await until(lambda: r.workers[0].running == 3)
            assert took_s < 0.9
            await asyncio.gather(*tasks)
    finally:
        dispatch.MAX_HOLD_S = before


@asynchronous
async def test_window_is_two_chunks_of_the_worker_when_it_tells_them():
    workers = [await MockWorker(info={"chunked_prefill_size": 8192, "dp_size": 2}).start()]
    async with running(workers=workers, policy="cache_aware") as r:
        assert r.gateway.proxy.dispatch.window(r.registered(workers[0])) == 2 * 8192 * 2


@asynchronous
async def test_many_streams_that_come_and_leave_at_random_leave_nothing_behind():
    import random

    rng = random.Random(5)
    async with running(2, **SETTINGS) as r:
        for worker in r.workers:
            worker.faults.delay_s = 0.005

        async def one(i: int) -> None:
            if i % 3:
                response = await ask(r, f"{i % 7}" * 3000)
                assert response.status_code == 200
                return
            client = await RawClient.connect(r.port)
            client.post("/v1/chat/completions", body(f"{i % 7}" * 3000))
            await asyncio.sleep(rng.random() * 0.1)
            client.leave()

        await asyncio.gather(*(one(i) for i in range(120)))
        await until(lambda: all(w.in_flight == 0 for w in r.gateway.registry))
        assert all(w.sent_tokens == w.pending_tokens == 0 for w in r.gateway.registry)
        assert r.gateway.proxy.dispatch.waiting == {} and r.gateway.proxy.concurrency.running == 0
