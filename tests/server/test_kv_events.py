"""/kv_events and what data answers tell a gateway, over HTTP and a scripted engine."""

import asyncio
import json
import random
import struct
import threading
from contextlib import contextmanager

import httpx
import pytest
from fake_engine import INFO, FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Running, make_app

from jaxserve.messages import CacheEvent
from jaxserve.replicas import Replicas
from jaxserve.server import kv_events
from jaxserve.server.kv_events import KvFeed


def stored(rank, parent, *pages):
    return CacheEvent("stored", rank, parent, struct.pack(f">{len(pages)}Q", *pages))


def removed(rank, *pages):
    return CacheEvent("removed", rank, None, struct.pack(f">{len(pages)}Q", *pages))


def cleared(rank):
    return CacheEvent("cleared", rank, None, b"")


class Reader:
    """Follows a feed as PROTOCOL.md has a gateway do it."""

    def __init__(self):
        self.hello, self.next, self.ranks = {}, None, {}
        self.kinds = []

    def take(self, raw: bytes):
        for event in raw.decode().split("\n\n")[:-1]:
            if event.startswith(":"):
                continue
            kind, data = event.split("\n")
            kind, data = kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))
            self.kinds.append(kind)
            getattr(self, "take_" + kind)(data)

    def take_hello(self, data):
        self.hello = data

    def take_snapshot(self, data):
        if self.kinds.count("snapshot") == 1:
            self.ranks = {}
        self._add(data)
        self.next = data["seq"] + 1

    def take_stored(self, data):
        self._in_step(data)
        self._add(data)

    def take_removed(self, data):
        self._in_step(data)
        for page in data["pages"]:
            del self.ranks[data["rank"]][page]

    def take_cleared(self, data):
        self._in_step(data)
        self.ranks[data["rank"]] = {}

    def _add(self, data):
        pages, above = self.ranks.setdefault(data["rank"], {}), data["parent"]
        assert above is None or above in pages, "a chain without its parent"
        for page in data["pages"]:
            pages[page], above = above, page

    def _in_step(self, data):
        assert data["seq"] == self.next
        self.next += 1

    def held(self):
        return {rank: pages for rank, pages in self.ranks.items() if pages}


async def read(feed, start=None, instance=None, reader=None, limit=10_000):
    """What a reader hears until nothing more is due."""
    reader = reader or Reader()
    reader.kinds = []
    parts = feed.read(start, instance)
    for _ in range(limit):
        try:
            reader.take(await asyncio.wait_for(anext(parts), 0.005))
        except TimeoutError:
            break
        except StopAsyncIteration:
            reader.kinds.append("end")
            break
    await parts.aclose()
    return reader


def act(draw: random.Random, tree: dict[int, int | None], rank: int) -> CacheEvent:
    """A random change of a rank's pages, as a prefix tree reports them."""
    leaves = [page for page in tree if page not in tree.values()]
    match draw.randrange(6):
        case 0:
            tree.clear()
            return cleared(rank)
        case 1 | 2 if leaves:
            leaf = draw.choice(leaves)
            del tree[leaf]
            return removed(rank, leaf)
        case _:
            parent = draw.choice([None, *tree])
            pages = [draw.getrandbits(64) for _ in range(draw.randint(1, 3))]
            tree.update(zip(pages, [parent, *pages]))
            return stored(rank, parent, *pages)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40))
def test_replay_and_snapshot_tell_the_same(seed, before, after):
    async def main():
        draw, feed = random.Random(seed), KvFeed(FakeEngine(lambda request: []))
        trees = [{}, {}]
        for _ in range(before):
            rank = draw.randrange(2)
            feed.take([act(draw, trees[rank], rank)])
        early = await read(feed)
        for _ in range(after):
            rank = draw.randrange(2)
            feed.take([act(draw, trees[rank], rank)])
        late = await read(feed)
        await read(feed, early.next, INFO.instance_id, early)
        assert "snapshot" not in early.kinds
        want = {
            rank: {f"{page:016x}": parent and f"{parent:016x}" for page, parent in tree.items()}
            for rank, tree in enumerate(trees)
            if tree
        }
        assert early.held() == late.held() == want
        assert early.next == late.next == before + after + 1

    asyncio.run(main())


@pytest.mark.parametrize(
    "start, instance", [(None, None), (1, "another"), (2, INFO.instance_id), (9, INFO.instance_id)]
)
def test_reader_without_a_place_in_the_buffer_gets_a_snapshot(start, instance):
    async def main():
        feed = KvFeed(FakeEngine(lambda request: []), buffer_events=2)
        feed.take([stored(1, None, 1, 2), stored(1, 2, 3), removed(1, 3), stored(0, None, 4)])
        reader = await read(feed, start, instance)
        assert reader.kinds == ["hello", "snapshot", "snapshot"]
        assert reader.hello == {"instance": "instance-1", "page_size": 16, "dp_size": 2, "next": 5}
        assert reader.held() == {0: {f"{4:016x}": None}, 1: {f"{1:016x}": None, f"{2:016x}": f"{1:016x}"}}
        assert reader.next == 5

    asyncio.run(main())


@pytest.mark.parametrize("start, kinds", [(3, ["removed", "stored"]), (5, [])])
def test_reader_with_a_place_in_the_buffer_goes_on_from_it(start, kinds):
    async def main():
        feed = KvFeed(FakeEngine(lambda request: []), buffer_events=2)
        feed.take([stored(1, None, 1), stored(1, 1, 2), removed(1, 2), stored(1, None, 4)])
        reader = Reader()
        reader.next, reader.ranks = start, {1: {f"{1:016x}": None, f"{2:016x}": f"{1:016x}"}}
        await read(feed, start, INFO.instance_id, reader)
        assert reader.kinds == ["hello", *kinds]

    asyncio.run(main())


def test_empty_cache_is_a_snapshot_without_pages():
    async def main():
        parts = KvFeed(FakeEngine(lambda request: [])).read(None, None)
        await anext(parts)
        data = {"seq": 0, "rank": 0, "parent": None, "pages": [], "last": True}
        assert (
            await anext(parts)
            == b"event: snapshot\ndata: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
        )
        await parts.aclose()

    asyncio.run(main())


def test_long_chain_is_cut_and_only_its_last_part_says_so():
    async def main():
        feed = KvFeed(FakeEngine(lambda request: []))
        feed.take([stored(0, None, *range(1, 5001))])
        parts = feed.read(None, None)
        await anext(parts)
        events = [json.loads((await anext(parts)).split(b"data: ")[1]) for _ in range(3)]
        assert [len(e["pages"]) for e in events] == [2048, 2048, 904]
        assert [e["last"] for e in events] == [False, False, True]
        assert [e["parent"] for e in events] == [None, f"{2048:016x}", f"{4096:016x}"]
        await parts.aclose()

    asyncio.run(main())


def test_reader_that_falls_behind_the_buffer_is_let_go():
    async def main():
        feed = KvFeed(FakeEngine(lambda request: []), buffer_events=4)
        parts = feed.read(None, None)
        await anext(parts), await anext(parts)
        for page in range(1, 6):
            feed.take([stored(0, None, page)])
        with pytest.raises(StopAsyncIteration):
            await anext(parts)

    asyncio.run(main())


def test_silence_is_broken_by_comments(monkeypatch):
    monkeypatch.setattr(kv_events, "HEARTBEAT_S", 0.001)

    async def main():
        parts = KvFeed(FakeEngine(lambda request: [])).read(None, None)
        await anext(parts), await anext(parts)
        assert await anext(parts) == b":\n\n"
        await parts.aclose()

    asyncio.run(main())


def test_replicas_are_ranks_of_one_numbered_stream():
    async def main():
        engines = [FakeEngine(lambda request: []), FakeEngine(lambda request: [])]
        replicas = Replicas(engines)
        feed = KvFeed(replicas)
        await feed.start()
        engines[0].take_cache_events([stored(0, None, 1)])
        engines[1].take_cache_events([stored(0, None, 2)])
        engines[0].take_cache_events([removed(0, 1)])
        reader = await read(feed)
        assert reader.held() == {1: {f"{2:016x}": None}}
        assert reader.next == 4

    asyncio.run(main())


# ---- over HTTP ----


@contextmanager
def serving(engine, tokenizer):
    running = Running(make_app(engine, tokenizer))
    try:
        yield running, f"http://127.0.0.1:{running.port}"
    finally:
        running.stop()
        running.thread.join(10)
        assert not running.thread.is_alive(), "an endless stream keeps the server from ending"


def test_stream_carries_events_as_they_come_and_ends_with_the_server(tokenizer):
    engine, reader = FakeEngine(lambda request: []), Reader()
    with serving(engine, tokenizer) as (running, url), httpx.stream("GET", url + "/kv_events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = answer.iter_bytes()
        while reader.next is None:
            reader.take(next(parts))
        running._loop.call_soon_threadsafe(engine.take_cache_events, [stored(1, None, 5)])
        while reader.next < 2:
            reader.take(next(parts))
        assert reader.held() == {1: {f"{5:016x}": None}}
        running.stop()
        assert b"".join(parts) == b""


def test_reader_that_takes_nothing_is_disconnected(tokenizer, monkeypatch):
    """It is told nothing more, and the server neither waits for it nor keeps what it missed."""
    monkeypatch.setattr(kv_events, "SLOW_S", 0.2)
    engine = FakeEngine(lambda request: [])
    ended, read_all = threading.Event(), kv_events.KvFeed.read

    async def read_and_tell(self, start, instance):
        try:
            async for part in read_all(self, start, instance):
                yield part
        finally:
            ended.set()

    monkeypatch.setattr(kv_events.KvFeed, "read", read_and_tell)
    with serving(engine, tokenizer) as (running, url), httpx.stream("GET", url + "/kv_events") as answer:
        next(answer.iter_raw())
        events = [stored(0, None, *range(at, at + 4096)) for at in range(1, 1 << 20, 4096)]
        running._loop.call_soon_threadsafe(engine.take_cache_events, events)
        assert ended.wait(10)


def test_from_must_be_a_number(server):
    reply = server.http.get("/kv_events", params={"from": "x"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "from")


def test_server_info_says_what_is_implemented_and_where_the_tokenizer_is(server):
    info = server.http.get("/server_info").json()
    assert info["protocol"] == ["kv_events/1", "resume/1", "input_ids/1"]
    wanted = {"instance_id": "instance-1", "page_size": 16, "dp_size": 2}
    wanted |= {"max_total_num_tokens": 4096, "chunked_prefill_size": 256}
    assert {name: info[name] for name in wanted} == wanted
    assert info["tokenizer_path"] == "tiny/model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, body",
    [
        ("/generate", {"text": ["a", "b"]}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
    ],
)
def test_data_answers_name_instance_load_and_cached_tokens(server, path, body, stream):
    headers = server.http.post(path, json={**body, "stream": stream}).headers
    assert headers["x-worker-instance"] == "instance-1"
    assert headers["x-worker-load"] == "running=4, waiting=2, queued_tokens=7, kv_usage=0.375"
    prompts = 1 if "messages" in body else 2
    seen = int(headers["x-cached-tokens"])
    assert seen == 2 * prompts if not stream else 0 < seen <= 2 * prompts  # what is known at the first event


def test_load_is_that_of_the_rank_that_was_asked_for(server):
    headers = server.generate(text="a", routed_dp_rank=1).headers
    assert headers["x-worker-load"] == "running=3, waiting=0, queued_tokens=0, kv_usage=0.5"


def test_refusals_name_the_load_and_other_routes_do_not(server):
    refused = server.generate(text="a", routed_dp_rank=7).headers
    assert "x-worker-load" in refused and "x-cached-tokens" not in refused
    assert "x-worker-load" not in server.http.get("/health").headers
