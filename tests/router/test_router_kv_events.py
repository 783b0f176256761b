"""Exact KV events: the protocol's fixtures, a subscription through breaks, and routing by it."""

import json
import random
import threading
from pathlib import Path

import pytest
from gateway_harness import asynchronous, running, until
from hypothesis import given
from hypothesis import strategies as st
from kv_worker import PAGE, KvWorker, write_tokenizer

from router import prompt_tokens
from router.call import ROUTES, Call
from router.kv_events import KvImage, OutOfStep
from router.page_hash import page_hashes, root_hash

FIXTURES = json.loads((Path(__file__).parent / "fixtures" / "protocol.json").read_text("utf-8"))


@pytest.mark.parametrize("case", FIXTURES["page_hashes"], ids=range(len(FIXTURES["page_hashes"])))
def test_page_hashes_are_those_of_the_protocol(case):
    root = root_hash(case["adapter"], case["cache_salt"])
    assert f"{root:016x}" == case["root"]
    pages = page_hashes(case["token_ids"], case["page_size"], root)
    assert [f"{h:016x}" for h in pages] == case["pages"]


@pytest.mark.parametrize("case", FIXTURES["kv_event_streams"], ids=lambda c: c["name"])
def test_image_follows_recorded_streams(case):
    image = KvImage()
    try:
        for event in case["events"]:
            image.apply(event["event"], event["data"])
    except OutOfStep:
        assert not case["live"]
    assert image.live == case["live"]
    if case["live"]:
        held = {str(rank): sorted(f"{p:016x}" for p in pages) for rank, pages in image.ranks.items()}
        wanted = {rank: sorted(pages) for rank, pages in case["held"].items() if pages or rank in held}
        assert held == wanted and image.next_seq == case["next_seq"]


@given(
    st.sampled_from(["hello", "snapshot", "stored", "removed", "cleared", "other", ""]),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=4),
        lambda x: (
            st.lists(x, max_size=2)
            | st.dictionaries(st.sampled_from(["seq", "rank", "pages", "instance", "page_size", "next"]), x)
        ),
        max_leaves=6,
    ),
)
def test_nonsense_events_put_the_image_out_of_step_and_raise_nothing_else(kind, data):
    image = KvImage()
    try:
        image.apply(kind, data)
    except OutOfStep:
        assert not image.live


def test_hit_is_the_longest_held_prefix_of_whole_pages():
    image = KvImage()
    pages = page_hashes(list(range(100)), PAGE, root_hash())
    assert len(pages) == 6
    image.ranks = {0: set(pages[:4]), 1: set(pages[:2])}
    assert image.hit_pages(pages, None) == 4
    assert image.hit_pages(pages, 1) == 2 and image.hit_pages(pages, 7) == 0


def kv_of(r, worker):
    return r.registered(worker).kv


async def two(tmp_path, **settings):
    folder = write_tokenizer(tmp_path)
    return [await KvWorker(folder, name=f"w{i}", **settings).start() for i in range(2)]


@asynchronous
async def test_request_goes_to_the_worker_whose_events_say_it_holds_the_prompt(tmp_path):
    workers = await two(tmp_path)
    async with running(workers=workers, policy="cache_aware") as r:
        await until(lambda: all(kv_of(r, w) and kv_of(r, w).live for w in workers))
        text = "The gateway never saw this prompt before. " * 8
        exact = r.gateway.exact
        ids = [i for i in exact.tokens._encode(text, True)]
        workers[1].store(ids)  # another gateway's work
        await until(lambda: kv_of(r, workers[1]).num_pages() == len(ids) // PAGE)
        response = await r.client.post("/generate", json={"text": text + "And now?"})
        assert response.headers["x-smg-routed-worker-id"] == workers[1].url
        sent = workers[1].seen[-1].json
        assert sent["input_ids"][: len(ids)] == ids and "text" not in sent  # tokenized once
        predicted = r.metric(f'router_predicted_cached_tokens_total{{worker="{workers[1].url}"}}')
        assert predicted == len(ids) // PAGE * PAGE


@pytest.mark.parametrize(
    "fields, salt, adapter",
    [
        ({"cache_salt": "a"}, "a", ""),
        ({"extra_key": "b"}, "b", ""),
        ({"cache_salt": "a", "extra_key": "b"}, "a\0b", ""),
        ({"model": "org/m:8b"}, "", ""),
        ({"model": "org/m:8b:sql"}, "", "8b:sql"),
    ],
)
def test_hit_is_predicted_under_the_same_salt_and_adapter_alone(tmp_path, fields, salt, adapter):
    """A colon in the name of a model that is served does not name an adapter."""
    ids = list(range(64))

    @asynchronous
    async def scenario():
        worker = await KvWorker(write_tokenizer(tmp_path), model="org/m:8b").start()
        worker.store(ids[:32], salt, adapter)
        worker.store(ids, "other")
        async with running(workers=[worker], policy="cache_aware") as r:
            await until(lambda: kv_of(r, worker) and kv_of(r, worker).live)
            call = Call(ROUTES["/generate"], json.dumps({"input_ids": ids, **fields}).encode())
            call.parse(True)
            await r.gateway.exact.prepare(call)
            r.gateway.policy.choose(call, [r.registered(worker)])
            assert call.predicted_tokens == 32

    scenario()


@asynchronous
async def test_chats_are_rendered_as_the_worker_renders_them(tmp_path):
    workers = await two(tmp_path)
    async with running(workers=workers, policy="cache_aware") as r:
        await until(lambda: all(kv_of(r, w) and kv_of(r, w).live for w in workers))
        await r.chat("hello there")
        seen = next(w for w in workers if w.seen).seen[0].json
        text = "<|user|>hello there<|assistant|>"
        assert seen["input_ids"] == r.gateway.exact.tokens._encode(text, False)
        messages = [{"role": "assistant", "content": "no calls", "tool_calls": None}]
        await r.chat(messages=messages)
        (seen,) = [s.json for w in workers for s in w.seen if s.json.get("messages") == messages]
        assert seen["input_ids"] == r.gateway.exact.tokens._encode(
            "<|assistant|>no calls<|assistant|>", False
        )
        await r.chat("in json", response_format={"type": "json_object"})
        (seen,) = [s.json for w in workers for s in w.seen if "response_format" in s.json]
        assert seen["input_ids"] == r.gateway.exact.tokens._encode("<|user|>in json<|assistant|>", False)
        await r.chat("with tools", tools=[{"type": "function", "function": {"name": "f"}}])
        assert all(
            "input_ids" not in w.seen[-1].json for w in workers if w.seen[-1:] and "tools" in w.seen[-1].json
        )


@asynchronous
async def test_text_longer_than_any_context_is_not_tokenized(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_tokens, "MOST_BYTES", 20)
    tokens = prompt_tokens.PromptTokens(write_tokenizer(tmp_path))
    found = []
    for text in ("hello", "hello there"):
        call = Call(ROUTES["/generate"], json.dumps({"text": text}).encode())
        call.parse(True)
        found.append(await tokens.ids(call))
    assert found == [tokens._encode("hello", True), None]


@asynchronous
async def test_chats_are_rendered_on_the_loop_only_while_they_are_short(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_tokens, "INLINE_BYTES", 100)
    monkeypatch.setattr(prompt_tokens, "MOST_BYTES", 1000)
    tokens = prompt_tokens.PromptTokens(write_tokenizer(tmp_path))
    template, threads = tokens.template, []

    class Watched:
        def render(self, **variables):
            threads.append(threading.current_thread().name)
            return template.render(**variables)

    tokens.template = Watched()
    for length, known in ((1, True), (500, True), (2000, False)):
        messages = [{"role": "user", "content": "a" * length}]
        call = Call(ROUTES["/v1/chat/completions"], json.dumps({"messages": messages}).encode())
        call.parse(True)
        assert (await tokens.ids(call) is not None) == known
    assert threads == [threading.current_thread().name, "tokenize_0"]


@asynchronous
async def test_removed_and_cleared_pages_are_forgotten(tmp_path):
    workers = await two(tmp_path)
    async with running(workers=workers, policy="cache_aware") as r:
        image = lambda: kv_of(r, workers[0])  # noqa: E731
        await until(lambda: image() and image().live)
        workers[0].store(list(range(160)))
        await until(lambda: image().num_pages() == 10)
        workers[0].evict(3)
        await until(lambda: image().num_pages() == 7)
        workers[0].clear()
        await until(lambda: image().num_pages() == 0)
        assert image().live


@asynchronous
async def test_broken_event_stream_is_replayed_from_where_it_broke(tmp_path):
    workers = await two(tmp_path)
    async with running(workers=workers, policy="cache_aware") as r:
        await until(lambda: kv_of(r, workers[0]) and kv_of(r, workers[0]).live)
        workers[0].store(list(range(64)))
        await until(lambda: kv_of(r, workers[0]).num_pages() == 4)
        await workers[0].drop_streams()
        workers[0].store(list(range(1000, 1032)))  # while nobody listens
        await until(lambda: len(workers[0].connects) == 2 and kv_of(r, workers[0]).live)
        assert workers[0].connects[1] == f"from=2&instance={workers[0].instance}"
        assert kv_of(r, workers[0]).num_pages() == 6


@asynchronous
async def test_gap_too_large_to_replay_ends_in_a_snapshot(tmp_path):
    workers = await two(tmp_path, buffer_len=2)
    async with running(workers=workers, policy="cache_aware") as r:
        await until(lambda: kv_of(r, workers[0]) and kv_of(r, workers[0]).live)
        await workers[0].drop_streams()
        for i in range(8):
            workers[0].store(list(range(i * 100, i * 100 + 16)))
        await until(lambda: kv_of(r, workers[0]).live and kv_of(r, workers[0]).num_pages() == 8)


@asynchronous
async def test_lost_event_is_noticed_and_mended_by_a_snapshot(tmp_path):
    workers = await two(tmp_path)
    async with running(workers=workers, policy="cache_aware") as r:
        await until(lambda: kv_of(r, workers[0]) and kv_of(r, workers[0]).live)
        workers[0].mute = True
        workers[0].store(list(range(32)))
        workers[0].mute = False
        workers[0].store(list(range(500, 532)))
        await until(lambda: kv_of(r, workers[0]).live and kv_of(r, workers[0]).num_pages() == 4)
        assert r.metric("smg_kv_event_subscription_failures_total") == 1


@asynchronous
async def test_restarted_worker_starts_with_an_empty_image(tmp_path):
    workers = await two(tmp_path)
    async with running(workers=workers, policy="cache_aware") as r:
        await until(lambda: kv_of(r, workers[0]) and kv_of(r, workers[0]).live)
        workers[0].store(list(range(64)))
        await until(lambda: kv_of(r, workers[0]).num_pages() == 4)
        await workers[0].kill()
        workers[0].new_instance()
        await workers[0].start()
        await until(
            lambda: kv_of(r, workers[0]).live and kv_of(r, workers[0]).instance == workers[0].instance
        )
        assert kv_of(r, workers[0]).num_pages() == 0


@asynchronous
async def test_requests_out_of_step_are_routed_by_the_approximate_image(tmp_path):
    workers = await two(tmp_path)
    async with running(workers=workers, policy="cache_aware") as r:
        await until(lambda: all(kv_of(r, w) and kv_of(r, w).live for w in workers))
        text = "approximate " * 60
        first = await r.client.post("/generate", json={"text": text})
        for worker in workers:
            kv_of(r, worker).live = False
        for _ in range(3):
            again = await r.client.post("/generate", json={"text": text})
            header = "x-smg-routed-worker-id"
            assert again.headers[header] == first.headers[header]


def test_burst_of_one_prefix_stays_together_before_its_pages_are_stored(tmp_path):
    """Pages that are being computed count as held."""

    @asynchronous
    async def scenario():
        workers = await two(tmp_path)
        async with running(workers=workers, policy="cache_aware") as r:
            await until(lambda: all(kv_of(r, w) and kv_of(r, w).live for w in workers))
            for worker in workers:
                worker.faults.delay_s = 0.3
                worker.store = lambda ids: None
            import asyncio

            prefix = "p" * 3000
            bodies = [{"text": prefix + str(random.Random(i).random())} for i in range(3)]
            await asyncio.gather(*(r.client.post("/generate", json=b) for b in bodies))
            assert sorted(len(w.seen) for w in workers) == [0, 3]
            assert all(not pages for pages in r.gateway.policy.coming.values())

    scenario()
