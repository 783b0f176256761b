"""The worker API, status by status, and draining."""

import asyncio
import uuid

import msgspec
import pytest
from gateway_harness import CHAT, asynchronous, running, until
from mock_worker import MockWorker

from router.breaker import Breaker
from router.config import ConfigError, RouterConfig
from router.jobs import learn
from router.upstream import Address, Pool, UpstreamError
from router.workers import Worker, WorkerSpec


@asynchronous
async def test_added_worker_is_accepted_then_ready():
    async with running(0) as r:
        worker = await MockWorker().start()
        r.workers.append(worker)
        response = await r.client.post("/workers", json={"url": worker.url, "labels": {"zone": "a"}})
        body = response.json()
        assert response.status_code == 202 and body["status"] == "accepted"
        assert response.headers["location"] == body["location"] == f"/workers/{body['worker_id']}"
        assert uuid.UUID(body["worker_id"]).version == 7
        await until(lambda: r.gateway.registry.usable("mock"))
        listed = (await r.client.get("/workers")).json()
        assert listed["total"] == 1 and listed["stats"]["regular_count"] == 1
        assert listed["workers"][0]["labels"] == {"zone": "a"}
        assert listed["workers"][0]["models"] == ["mock"] and listed["workers"][0]["is_healthy"]
        assert (await r.client.get("/workers?model=other")).json()["total"] == 0
        assert (await r.chat()).status_code == 200


@asynchronous
async def test_url_that_is_known_is_refused_409():
    async with running(1) as r:
        response = await r.client.post("/workers", json={"url": r.workers[0].url + "/"})
        assert response.status_code == 409
        assert response.json()["code"] == "WORKER_ALREADY_EXISTS"


@asynchronous
async def test_bad_requests_are_400():
    async with running(0) as r:
        bad = [b"{", b"[]", b'{"url": 5}', b'{"url": "worker:80"}', b'{"url": "ftp://x"}', b"{}", b"\xff\xfe"]
        bad += [b'{"url": "http://%s"}' % host for host in (b"a..b:8000", b"a" * 64, b"a b", b"a\\r\\nx: y")]
        bad += [b'{"url": "http://x/\xc3\xa9"}', b'{"url": "http://x", "priority": 1%s}' % (b"0" * 29)]
        for body in bad:
            response = await r.client.post("/workers", content=body)
            assert (response.status_code, response.json()["code"]) == (400, "BAD_REQUEST"), body
        response = await r.client.get("/workers/not-an-id")
        assert (response.status_code, response.json()["code"]) == (400, "BAD_REQUEST")


@asynchronous
async def test_unknown_id_is_404():
    async with running(0) as r:
        unknown = f"/workers/{uuid.uuid4()}"
        for method in ("GET", "DELETE"):
            response = await r.client.request(method, unknown)
            assert (response.status_code, response.json()["code"]) == (404, "WORKER_NOT_FOUND")
        response = await r.client.put(unknown, json={"url": "http://x"})
        assert response.status_code == 404


@asynchronous
async def test_worker_that_is_not_up_yet_shows_its_job_and_serves_once_it_is():
    async with running(0) as r:
        worker = await MockWorker().start()
        await worker.kill()
        r.workers.append(worker)
        made = (await r.client.post("/workers", json={"url": worker.url})).json()
        view = (await r.client.get(made["location"])).json()
        assert view["status"] == "pending"
        assert view["job_status"]["job_type"] == "AddWorker"
        assert view["job_status"]["status"] in ("pending", "processing")
        assert (await r.client.get("/readiness")).status_code == 503
        assert (await r.chat()).status_code == 503
        await worker.start()
        await until(lambda: r.gateway.registry.usable(None))
        view = (await r.client.get(made["location"])).json()
        assert view["status"] == "ready" and "job_status" not in view


@asynchronous
async def test_worker_that_never_comes_up_fails_and_can_still_be_looked_up():
    async with running(0, worker_startup_timeout_secs=0.3) as r:
        made = (await r.client.post("/workers", json={"url": "http://127.0.0.1:9"})).json()
        await until(lambda: not len(r.gateway.registry))
        view = (await r.client.get(made["location"])).json()
        assert view["job_status"]["status"] == "failed"
        assert "cannot connect" in view["job_status"]["message"]


@asynchronous
async def test_put_and_patch_change_everything_but_the_url():
    async with running(1) as r:
        worker = r.registered(r.workers[0])
        path = f"/workers/{worker.id}"
        response = await r.client.put(path, json={"url": worker.url, "priority": 7, "api_key": "secret"})
        assert response.status_code == 202 and worker.spec.priority == 7
        await r.chat()
        assert r.workers[0].seen[-1].headers["authorization"] == "Bearer secret"
        response = await r.client.patch(path, json={"labels": {"a": "b"}})
        assert response.status_code == 202
        assert worker.spec.labels == {"a": "b"} and worker.spec.priority == 7
        response = await r.client.put(path, json={"url": "http://elsewhere:80"})
        assert response.status_code == 400


@asynchronous
async def test_worker_that_is_added_or_replaced_without_a_key_gets_the_gateways():
    async with running(0, worker_api_key="secret") as r:
        worker = await MockWorker().start()
        r.workers.append(worker)
        made = (await r.client.post("/workers", json={"url": worker.url})).json()
        await until(lambda: r.gateway.registry.usable(None))
        sent = []
        for key in (None, "its-own", None, ""):
            spec = {"url": worker.url} if key is None else {"url": worker.url, "api_key": key}
            assert (await r.client.put(made["location"], json=spec)).status_code == 202
            await r.chat()
            sent.append(worker.seen[-1].headers.get("authorization"))
        assert sent == ["Bearer secret", "Bearer its-own", "Bearer secret", None]


@asynchronous
async def test_worker_key_that_is_no_header_is_refused_and_the_old_one_stays():
    async with running(1, worker_api_key="old") as r:
        worker = r.registered(r.workers[0])
        path = f"/workers/{worker.id}"
        for key in ("ключ", "a\r\nx-evil: 1", "a b", "a\n"):
            added = await r.client.post("/workers", json={"url": "http://127.0.0.1:9", "api_key": key})
            put = await r.client.put(path, json={"url": worker.url, "api_key": key})
            patched = await r.client.patch(path, json={"api_key": key})
            for response in (added, put, patched):
                assert response.status_code == 400 and "api_key" in response.json()["error"]
            assert worker.spec.api_key == "old"
        await r.chat()
        assert r.workers[0].seen[-1].headers["authorization"] == "Bearer old"
        assert (await r.client.patch(path, json={"api_key": "sk-new/+="})).status_code == 202
        assert (await r.client.patch(path, json={"priority": 1 << 31})).status_code == 400


def test_worker_head_that_cannot_be_written_changes_nothing():
    worker = Worker(WorkerSpec(url="http://a:1"), Breaker(lambda: 0.0), Pool(Address.parse("http://a:1")))
    with pytest.raises(UnicodeEncodeError):
        worker.respec(WorkerSpec(url="http://a:1", api_key="ключ"))
    assert worker.spec.api_key is None


def test_host_of_a_worker_is_the_name_that_is_looked_up():
    assert Address.parse("http://bücher.example:8000").authority == "xn--bcher-kva.example:8000"
    assert Address.parse("https://[::1]:8000/v/").authority == "[::1]:8000"


@asynchronous
async def test_host_name_that_cannot_be_looked_up_is_a_failed_connection():
    with pytest.raises(UpstreamError) as caught:
        await Pool(Address("http", "a..b", 80, "")).connect()
    assert caught.value.kind == "connect"


@pytest.mark.parametrize(
    "worker_urls, message",
    [(["http://a:1", "http://a:1/"], "given twice"), (["http://a..b:1"], "a host name"), (["a:1"], "http")],
)
def test_worker_urls_that_cannot_be_used_are_a_configuration_error(worker_urls, message):
    with pytest.raises(ConfigError, match=f"worker_urls.*{message}"):
        RouterConfig.from_keywords(worker_urls=worker_urls)


@pytest.mark.parametrize("key", ["a\nb", "a\n", "a b", "\u00e9", "\x7f"])
def test_worker_key_that_is_no_header_is_refused_wherever_it_enters(key):
    with pytest.raises(ConfigError, match="worker_api_key"):
        RouterConfig.from_keywords(worker_api_key=key)
    with pytest.raises(msgspec.ValidationError, match="api_key"):
        msgspec.convert({"url": "http://a:1", "api_key": key}, WorkerSpec)


@asynchronous
async def test_deleted_worker_finishes_what_runs_and_gets_nothing_new():
    async with running(2) as r:
        r.workers[0].faults.delay_s = 0.5
        slow = asyncio.create_task(r.chat())
        await until(lambda: r.workers[0].running == 1)
        worker = r.registered(r.workers[0])
        path = f"/workers/{worker.id}"
        assert (await r.client.delete(path)).status_code == 202
        assert (await r.client.get(path)).json()["status"] == "draining"
        for _ in range(6):
            assert (await r.chat()).headers["x-smg-routed-worker-id"] == r.workers[1].url
        response = await r.client.put(path, json={"url": worker.url})
        assert response.status_code == 409  # a late change must not bring it back
        assert (await slow).status_code == 200
        await until(lambda: worker.id not in r.gateway.registry.workers)
        assert (await r.client.get(path)).status_code == 404
        assert (await r.client.delete(path)).status_code == 404


@asynchronous
async def test_workers_come_and_go_under_load_without_a_lost_request():
    async with running(2) as r:
        stop = False
        statuses: list[int] = []

        async def load():
            while not stop:
                statuses.append((await r.chat()).status_code)

        tasks = [asyncio.create_task(load()) for _ in range(4)]
        for _ in range(5):
            worker = r.registered(r.workers[0])
            await r.client.delete(f"/workers/{worker.id}")
            await until(lambda w=worker: w.id not in r.gateway.registry.workers)
            await r.client.post("/workers", json={"url": r.workers[0].url})
            await until(lambda: len(r.gateway.registry.usable(None)) == 2)
        stop = True
        await asyncio.gather(*tasks)
        assert set(statuses) == {200}


@asynchronous
async def test_worker_removed_before_it_is_ready_is_probed_no_more():
    async with running(0) as r:
        worker = await MockWorker().start()
        worker.faults.health = 503
        r.workers.append(worker)
        made = (await r.client.post("/workers", json={"url": worker.url})).json()
        await until(lambda: worker.probes)
        assert (await r.client.delete(made["location"])).status_code == 202
        await until(lambda: not len(r.gateway.registry) and not r.gateway.jobs.tasks)


@asynchronous
async def test_worker_that_comes_back_is_learned_anew_and_what_it_does_not_say_stays():
    info = {"dp_size": 2, "max_total_num_tokens": 1000, "protocol": ["resume/1", "input_ids/1"]}
    worker = await MockWorker(info=info).start()
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: len(r.gateway.registry.usable(None)) == 2)
        for told, expected in ((dict(info), 500), ({**info, "max_total_num_tokens": 600}, 300)):
            worker.info = told
            for rank in r.gateway.registry:
                await learn(rank)
                assert (rank.capacity_tokens, rank.dp_size) == (expected, 2)
        await worker.kill()
        for rank in r.gateway.registry:
            await learn(rank)
            assert (rank.capacity_tokens, rank.resumes, rank.takes_ids) == (300, True, True)
            assert rank.info["max_total_num_tokens"] == 600


@asynchronous
async def test_dp_aware_worker_is_one_worker_a_rank_and_the_rank_is_injected():
    worker = await MockWorker(info={"dp_size": 2}).start()
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: len(r.gateway.registry.usable(None)) == 2)
        for _ in range(4):
            await r.chat()
        ranks = [seen.json["routed_dp_rank"] for seen in worker.seen]
        assert sorted(ranks) == [0, 0, 1, 1]
        await r.client.post("/v1/chat/completions", json={**CHAT, "routed_dp_rank": 1})
        assert worker.seen[-1].json["routed_dp_rank"] == 1
        rank = r.gateway.registry.by_url[f"{worker.url}@0"]
        response = await r.client.put(f"/workers/{rank.id}", json={"url": worker.url})
        assert response.status_code == 400
        await r.client.delete(f"/workers/{rank.id}")
        await until(lambda: not len(r.gateway.registry))
