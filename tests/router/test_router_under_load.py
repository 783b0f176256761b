"""Changes while requests run: workers come and go, the gateway is restarted; no JSON request is lost."""

import asyncio
import signal

import httpx
from gateway_harness import CHAT, asynchronous, running, until
from mock_worker import MockWorker
from test_router_launch import launch, some_ports, wait_for
from test_router_processes import workers


@asynchronous
async def test_workers_added_drained_and_removed_under_load_lose_nothing():
    async with running(2, policy="cache_aware") as r:
        third = await MockWorker(name="w2").start()
        for worker in (*r.workers, third):
            worker.faults.delay_s = 0.005
        statuses: list[int] = []
        stop = False

        async def client() -> None:
            while not stop:
                statuses.append((await r.chat("x" * (len(statuses) % 7))).status_code)

        clients = [asyncio.create_task(client()) for _ in range(8)]
        try:
            await until(lambda: len(statuses) > 50)
            added = await r.client.post("/workers", json={"url": third.url})
            await until(lambda: len(third.seen) > 10)
            first = r.registered(r.workers[0])
            assert (await r.client.delete(f"/workers/{first.id}")).status_code == 202
            await until(lambda: first.id not in r.gateway.registry.workers)
            seen = len(r.workers[0].seen)
            before = len(statuses)
            await until(lambda: len(statuses) > before + 50)
            assert len(r.workers[0].seen) == seen  # nothing new after it was removed
            assert (await r.client.delete(added.headers["location"])).status_code == 202
            await until(lambda: len(r.gateway.registry) == 1)
            await third.kill()
            before = len(statuses)
            await until(lambda: len(statuses) > before + 50)
        finally:
            stop = True
            await asyncio.gather(*clients)
        assert set(statuses) == {200}
        assert sum(len(w.seen) for w in (*r.workers, third)) == len(statuses)


def restart_under_load(*flags: str) -> tuple[int, int, int]:
    """(requests answered 200, others, refused connections that were tried again)."""
    with workers(2, "--prefill-us", "50") as urls:
        port = some_ports(1)[0]
        command = (
            "router.launch_router", "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware",
            "--shutdown-grace-period-secs", "10", "--log-level", "error", "--worker-urls", *urls, *flags,
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        good, bad, refused = 0, 0, 0
        stop = False

        def ready() -> bool:
            return httpx.get(url + "/readiness").json()["healthy_workers"] == 2

        async def client() -> None:
            nonlocal good, bad, refused
            while not stop:
                async with httpx.AsyncClient(timeout=20) as http:
                    try:
                        response = await http.post(
                            url + "/v1/chat/completions", json=CHAT | {"model": "bench"}
                        )
                    except httpx.ConnectError:
                        refused += 1
                        await asyncio.sleep(0.02)
                        continue
                    except httpx.HTTPError:
                        bad += 1
                        continue
                good += response.status_code == 200
                bad += response.status_code not in (200, 503)  # 503 with Retry-After: no worker known yet
                if response.status_code == 503:
                    assert response.headers["retry-after"]
                    await asyncio.sleep(0.02)

        async def scenario(first) -> object:
            nonlocal stop
            clients = [asyncio.create_task(client()) for _ in range(4)]
            await until(lambda: good > 40, 15)
            first.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(first.wait, 20) == 0
            second = launch(*command)
            before = good
            await until(lambda: good > before + 40, 20)
            stop = True
            await asyncio.gather(*clients)
            return second

        first = launch(*command)
        try:
            wait_for(ready)
            second = asyncio.run(scenario(first))
            second.kill()
            second.communicate()
        finally:
            first.kill()
            first.communicate()
        return good, bad, refused


def test_gateway_of_two_processes_restarted_under_load_loses_nothing_of_clients_that_retry():
    """One process, in front of real engines: `tests/e2e/test_gateway_faults.py`."""
    good, bad, refused = restart_under_load("--workers-processes", "2")
    assert good > 80 and bad == 0 and refused > 0, (good, bad, refused)
