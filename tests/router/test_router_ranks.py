"""Data-parallel ranks routed to by themselves, and workers that are replaced by others at their URL."""

import asyncio
import contextlib
import functools
import json
import threading
from types import SimpleNamespace

import pytest
from gateway_harness import asynchronous, running, until
from kv_worker import KvWorker, write_tokenizer
from mock_worker import MockWorker
from test_router_launch import wait_for
from test_router_processes import cluster, generate, running_beside

from router import exact, jobs
from router.config import RouterConfig
from router.member import Member
from router.workers import WorkerSpec


class SickRank(MockWorker):
    """One of whose ranks answers 500."""

    sick: int | None = 1

    async def _generate(self, path, headers, body, gone, writer) -> bool:
        if json.loads(body).get("routed_dp_rank") == self.sick:
            await self._send(writer, 500, b"{}")
            return True
        return await super()._generate(path, headers, body, gone, writer)

    def breaker_probes(self) -> list[int | None]:
        """The rank that each of them was sent to."""
        probes = [s for s in self.seen if s.headers["x-request-id"] == "HEALTH_CHECK_breaker"]
        return [s.json.get("routed_dp_rank") for s in probes]


def replace(worker: MockWorker, instance: str, **info) -> None:
    """From now on another engine answers, and nobody saw the one before end."""
    worker.info = {"instance_id": instance, **info}
    worker.response_headers = {"x-worker-instance": instance}


async def engine(instance: str = "a", **info) -> MockWorker:
    worker = MockWorker()
    replace(worker, instance, **info)
    return await worker.start()


def ranks(r) -> list[int | None]:
    """Those that may be chosen."""
    return sorted(w.dp_rank for w in r.gateway.registry.usable(None))


# ---- ranks in bodies ----


@asynchronous
async def test_rank_goes_into_the_bodies_of_routes_that_know_it_and_no_others():
    worker = await engine(dp_size=2)
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: ranks(r) == [0, 1])
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            await r.client.post(path, json={"prompt": "a"})
            assert worker.seen[-1].json["routed_dp_rank"] in (0, 1), path
        for path in ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", "/v1/embeddings"):
            await r.client.post(path, json={"prompt": "a"})
            assert worker.seen[-1].json == {"prompt": "a"}, path


@asynchronous
async def test_breaker_of_a_sick_rank_is_closed_by_no_other_rank():
    worker = await SickRank(info={"dp_size": 2}).start()
    quick = {"cb_failure_threshold": 1, "cb_timeout_duration_secs": 0, "cb_timeout_max_secs": 0}
    async with running(workers=[worker], dp_aware=True, disable_retries=True, **quick) as r:
        await until(lambda: ranks(r) == [0, 1])
        breaker = r.gateway.registry.by_url[f"{worker.url}@1"].breaker
        assert (await r.chat(routed_dp_rank=1)).status_code == 500
        await until(lambda: len(worker.breaker_probes()) >= 2)
        assert not breaker.closed
        worker.sick = None
        await until(lambda: breaker.closed)
        assert set(worker.breaker_probes()) == {1}


# ---- replaced workers ----


@asynchronous
async def test_worker_that_is_replaced_between_two_probes_is_learned_anew():
    worker = await engine("a", max_total_num_tokens=1000)
    async with running(workers=[worker], disable_health_check=True) as r:
        known = r.registered(worker)
        assert (known.capacity_tokens, known.resumes, known.takes_ids) == (1000, False, False)
        worker.model = "newer"
        replace(worker, "b", max_total_num_tokens=600, protocol=["resume/1", "input_ids/1"])
        assert (await r.chat()).status_code == 200
        await until(lambda: known.models == ("newer",))
        assert (known.capacity_tokens, known.resumes, known.takes_ids) == (600, True, True)
        assert (await r.chat(model="newer")).status_code == 200
        assert (await r.chat()).status_code == 404


@asynchronous
async def test_worker_that_is_replaced_is_split_into_the_ranks_it_has_now():
    worker = await engine("a", dp_size=2, max_total_num_tokens=800)
    async with running(workers=[worker], dp_aware=True) as r:
        for instance, dp_size, expected in (
            ("a", 2, [0, 1]),
            ("b", 4, [0, 1, 2, 3]),
            ("c", 1, [None]),
            ("d", 2, [0, 1]),
        ):
            replace(worker, instance, dp_size=dp_size, max_total_num_tokens=800)
            assert (await r.chat()).status_code == 200
            await until(lambda expected=expected: ranks(r) == expected)
            await until(lambda n=dp_size: len(r.gateway.registry) == n)  # the others have drained
            assert {w.capacity_tokens for w in r.gateway.registry} == {800 // dp_size}


@asynchronous
async def test_stream_that_shows_the_new_worker_outlives_the_rank_it_was_sent_to():
    worker = await engine("a", dp_size=2)
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: ranks(r) == [0, 1])
        replace(worker, "b", dp_size=1)
        worker.faults.token_s = 0.05
        stream = asyncio.create_task(r.stream(max_tokens=20))
        await until(lambda: ranks(r) == [None])
        assert not stream.done()
        assert (await stream).endswith("data: [DONE]\n\n")
        await until(lambda: len(r.gateway.registry) == 1)


@asynchronous
async def test_worker_that_returns_after_its_ejection_is_split_again():
    worker = await engine("a", dp_size=2)
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: ranks(r) == [0, 1])
        await worker.kill()
        assert (await r.chat()).status_code in (502, 503)
        await until(lambda: ranks(r) == [])
        replace(worker, "b", dp_size=3)
        await worker.start()
        await until(lambda: ranks(r) == [0, 1, 2])


@asynchronous
async def test_what_one_rank_tells_empties_the_images_of_the_others_once(monkeypatch):
    worker = await engine("a", dp_size=2)
    async with running(workers=[worker], dp_aware=True) as r:
        await until(lambda: ranks(r) == [0, 1])
        cleared = []
        monkeypatch.setattr(r.gateway.policy, "cleared", lambda rank: cleared.append(rank.dp_rank))
        replace(worker, "b", dp_size=2)
        await r.chat(routed_dp_rank=1)
        await until(lambda: len(cleared) == 2)
        for rank in (0, 1):
            await r.chat(routed_dp_rank=rank)
        assert cleared == [1, 0]


@asynchronous
async def test_url_with_several_engines_behind_it_is_not_learned_with_every_answer(monkeypatch):
    monkeypatch.setattr(jobs, "RELEARN_PAUSE_S", 3600.0)
    learned = []

    class Balanced(MockWorker):
        def _control(self, path):
            learned.extend([path] if path == "/server_info" else [])
            return super()._control(path)

    worker = await Balanced(info={"instance_id": "0"}).start()
    async with running(workers=[worker]) as r:
        for i in range(8):
            worker.response_headers = {"x-worker-instance": str(i % 2)}
            await r.chat()
            await until(lambda: len(learned) == min(2, i + 1))  # noqa: B023


@asynchronous
async def test_relearning_waits_out_its_pause_and_misses_nothing(monkeypatch):
    monkeypatch.setattr(jobs, "RELEARN_PAUSE_S", 0.3)
    worker = await engine("a", max_total_num_tokens=100)
    async with running(workers=[worker]) as r:
        for instance, tokens in (("b", 200), ("c", 300)):
            replace(worker, instance, max_total_num_tokens=tokens)
            await r.chat()
            await until(lambda tokens=tokens: r.registered(worker).capacity_tokens == tokens)


@contextlib.asynccontextmanager
async def followed(tmp_path):
    """(worker, gateway, the worker there): its events are followed, and its instance is known."""
    worker = await KvWorker(write_tokenizer(tmp_path)).start()
    worker.response_headers = {"x-worker-instance": "a"}
    async with running(workers=[worker], policy="cache_aware") as r:
        known = r.registered(worker)
        await until(lambda: known.kv is not None and known.kv.live)
        await r.chat("hello")
        yield worker, r, known


@asynchronous
async def test_worker_that_is_replaced_by_another_model_is_sent_no_ids_of_the_old_ones(tmp_path):
    async with followed(tmp_path) as (worker, r, known):
        assert worker.seen[-1].json["input_ids"]
        worker.model = "mock-2"
        worker.info = {**worker.info, "protocol": ["input_ids/1"]}
        worker.response_headers = {"x-worker-instance": "b"}
        await r.chat("hello")
        await until(lambda: known.models == ("mock-2",) and known.kv is None)
        await r.chat("hello", model="mock-2")
        assert "input_ids" not in worker.seen[-1].json
        worker.info = {**worker.info, "protocol": ["kv_events/1", "input_ids/1"]}
        worker.response_headers = {"x-worker-instance": "c"}
        await r.chat("hello", model="mock-2")
        await until(lambda: known.kv is not None and known.kv.live)  # alone, it may bring its tokenizer


def held_back(monkeypatch) -> tuple[threading.Event, threading.Event]:
    """(set when a tokenizer is to be read; set to let it be)."""
    asked, go, real = threading.Event(), threading.Event(), exact.PromptTokens

    def read(*given):
        asked.set()
        assert go.wait(20)
        return real(*given)

    monkeypatch.setattr(exact, "PromptTokens", read)
    return asked, go


@asynchronous
async def test_worker_that_is_replaced_while_it_is_learned_is_learned_once_more(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RELEARN_PAUSE_S", 0.05)
    async with followed(tmp_path) as (worker, r, known):
        asked, go = held_back(monkeypatch)
        for instance in ("b", "c"):
            worker.model = f"model-{instance}"
            worker.info = {**worker.info, "instance_id": instance}
            worker.response_headers = {"x-worker-instance": instance}
            await r.chat(model=known.models[0])
            await until(lambda: known.models == ("model-b",) and asked.is_set())
        go.set()
        await until(lambda: known.models == ("model-c",))


@asynchronous
async def test_worker_that_is_removed_while_its_tokenizer_is_read_is_not_followed(tmp_path, monkeypatch):
    async with followed(tmp_path) as (worker, r, known):
        asked, go = held_back(monkeypatch)
        worker.model = "another"
        worker.response_headers = {"x-worker-instance": "b"}
        await r.chat()
        await until(asked.is_set)
        relearning = [*r.gateway.jobs.relearning.values()]
        r.gateway.jobs.remove(known)
        await until(lambda: len(r.gateway.registry) == 0)
        go.set()
        await asyncio.gather(*relearning)
        assert r.gateway.exact.subscriptions == {}


@asynchronous
async def test_process_that_sees_a_worker_return_follows_its_events_no_longer_if_it_has_none(tmp_path):
    engine = await KvWorker(write_tokenizer(tmp_path)).start()
    sent = []
    member = Member(0, RouterConfig(policy="cache_aware", workers_processes=2))
    member.link = SimpleNamespace(send=lambda kind, value: sent.append(value))  # type: ignore[assignment]
    gateway = member.gateway
    assert gateway.exact is not None
    worker = gateway.registry.make_worker(WorkerSpec(url=engine.url), None)
    gateway.registry.add(worker)
    await member._relearn(worker)
    assert worker.kv is not None
    engine.info = {"instance_id": "b"}
    await member._relearn(worker)
    assert worker.kv is None and not gateway.exact.subscriptions
    await until(lambda: any(loads.replaced == {worker.id: "b"} for loads in sent))
    await engine.kill()


@pytest.mark.parametrize("restart", [False, True])
def test_replaced_worker_is_learned_anew_by_every_process(restart):
    @asynchronous
    async def scenario():
        worker = await engine("a", dp_size=2)
        loop = asyncio.get_running_loop()
        flags = ("--dp-aware", "--health-check-interval-secs", "3600", "--worker-urls", worker.url)
        async with running_beside(cluster(*flags)) as c:
            here = functools.partial(loop.run_in_executor, None)
            await here(wait_for, lambda: c.ready(2))
            if restart:
                await worker.kill()
            worker.model = "newer"
            replace(worker, "b", dp_size=3)
            if restart:
                await here(generate, c, "x")  # which ejects it
                await worker.start()
            else:
                assert (await here(generate, c, "x")).status_code == 200
            await here(wait_for, lambda: c.ready(3))
            answers = [await here(functools.partial(generate, c, "x", model="newer")) for _ in range(16)]
            assert {a.status_code for a in answers} == {200}
            assert {s.json["routed_dp_rank"] for s in worker.seen[-16:]} == {0, 1, 2}

    scenario()
