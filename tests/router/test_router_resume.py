"""Streams that break and go on elsewhere, and those that must not."""

import asyncio
import json

import pytest
from gateway_harness import CHAT, asynchronous, running, until
from hypothesis import given
from hypothesis import strategies as st
from mock_worker import HANG_UP, MockWorker

from router import upstream
from router.call import ROUTES, Call
from router.resume import Tracker, make_tracker

GREEDY = {**CHAT, "stream": True, "temperature": 0, "max_tokens": 8}


async def able(n: int) -> list[MockWorker]:
    return [await MockWorker(name=f"w{i}", info={"protocol": ["resume/1"]}).start() for i in range(n)]


def events_of(text: str) -> list[str]:
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def words(text: str) -> str:
    """The text of a streamed chat answer, which must be whole."""
    *data, done = events_of(text)
    assert done == "data: [DONE]" and all(e.startswith("data: {") for e in data)
    return "".join(json.loads(e[6:])["choices"][0]["delta"]["content"] for e in data)


@asynchronous
async def test_greedy_stream_goes_on_elsewhere_and_the_client_sees_no_seam():
    workers = await able(2)
    async with running(workers=workers) as r:
        workers[0].faults.abort_after = 3
        responses = [await r.client.post("/v1/chat/completions", json=GREEDY) for _ in range(2)]
        for response in responses:
            assert words(response.text) == "".join(f"tok{i} " for i in range(8))
            assert ": tokens" not in response.text
            assert len({json.loads(e[6:])["id"] for e in events_of(response.text)[:-1]}) == 1
        resumed = [s.json["resume"] for s in workers[1].seen if "resume" in s.json]
        assert resumed[0] == {"token_ids": [100, 101, 102], "id": "w0", "created": 7}
        assert r.metric('router_stream_breaks_total{worker="' + workers[1].url) == len(resumed)


@asynchronous
async def test_half_an_event_before_the_break_is_not_shown():
    workers = await able(2)
    async with running(workers=workers) as r:
        workers[0].faults.abort_after = 2
        workers[0].faults.half_event = True
        for _ in range(2):
            response = await r.client.post("/v1/chat/completions", json=GREEDY)
            assert words(response.text) == "".join(f"tok{i} " for i in range(8))


@asynchronous
async def test_stream_survives_two_breaks_when_a_third_worker_is_there():
    workers = await able(3)
    async with running(workers=workers, cb_failure_threshold=100) as r:
        workers[0].faults.abort_after = 2
        workers[1].faults.abort_after = 5
        response = await r.client.post("/v1/chat/completions", json=GREEDY)
        assert words(response.text) == "".join(f"tok{i} " for i in range(8))


@asynchronous
async def test_stream_that_has_ended_on_the_second_worker_does_not_end_again():
    """Only the end of the second worker's connection is missing."""
    workers = await able(3)
    async with running(workers=workers, policy="round_robin", cb_failure_threshold=100) as r:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        first = next(w for w in workers if w.url == r.gateway.registry.usable(None)[0].url)
        for worker in workers:
            worker.faults.script = (head + b"e\r\ndata: [DONE]\n\n\r\n", HANG_UP)
        first.faults.script, first.faults.abort_after = (), 2
        response = await r.client.post("/v1/chat/completions", json=GREEDY)
        assert words(response.text) == "tok0 tok1 "
        assert len(first.seen) == 1 and sum(r.split()) == 2


@asynchronous
async def test_stream_that_nobody_can_go_on_with_ends_with_an_error_event():
    workers = await able(1)
    async with running(workers=workers) as r:
        workers[0].faults.abort_after = 3
        response = await r.client.post("/v1/chat/completions", json=GREEDY)
        last = events_of(response.text)[-1]
        assert json.loads(last[6:])["error"]["code"] == "stream_error" and "[DONE]" not in response.text


@asynchronous
async def test_sampled_stream_without_a_seed_is_not_resumed():
    workers = await able(2)
    async with running(workers=workers) as r:
        workers[0].faults.abort_after = 3
        texts = [await r.stream(max_tokens=8) for _ in range(2)]
        assert sum("stream_error" in t for t in texts) == 1
        assert not any("resume" in s.json for w in workers for s in w.seen)
        assert not any("x-resume" in s.headers for w in workers for s in w.seen)


@pytest.mark.parametrize("fields", [GREEDY, {**CHAT, "stream": True}], ids=["resumable", "sampled"])
@asynchronous
async def test_stream_that_flows_until_its_limit_ends_there_and_is_nobodys_fault(fields):
    workers = await able(3)
    async with running(workers=workers, request_timeout_secs=0.3, cb_failure_threshold=3) as r:
        for worker in workers:
            worker.faults.token_s = 0.02
        body = {**fields, "max_tokens": 1000}
        asking = [r.client.post("/v1/chat/completions", json=body) for _ in range(6)]
        for response in await asyncio.gather(*asking):
            error = json.loads(events_of(response.text)[-1][6:])["error"]
            assert error["message"] == "the stream took too long: no end within 0.3 s"
        assert r.split() == [2, 2, 2], "and none goes on elsewhere"
        assert all(r.registered(w).breaker.failures == 0 for w in workers)
        assert r.metric("router_stream_breaks_total") == 0


@asynchronous
async def test_stream_that_stops_counts_against_its_worker_when_its_limit_has_come(monkeypatch):
    monkeypatch.setattr(upstream, "MOVING_S", 0.1)
    async with running(1, request_timeout_secs=0.3, cb_failure_threshold=100) as r:
        r.workers[0].faults.token_s = 30
        assert "stream_error" in await r.stream()
        assert r.registered(r.workers[0]).breaker.failures > 1


@asynchronous
async def test_limit_of_a_request_counts_from_its_start_however_many_attempts_it_takes():
    workers = await able(2)
    async with running(workers=workers, policy="round_robin") as r:
        workers[0].faults.script = (0.2, HANG_UP)
        workers[1].faults.script = (30.0, HANG_UP)
        asking = [
            asyncio.create_task(r.chat()) for _ in range(2)
        ]  # one of them goes to the first worker first
        await until(lambda: len(workers[1].seen) == 2)
        ages_s = [c.sent_s - c.since_s for c in r.registered(workers[1]).pool.active]
        assert max(ages_s) >= 0.2
        for task in asking:
            task.cancel()


@asynchronous
async def test_killed_worker_breaks_no_resumable_stream():
    workers = await able(2)
    async with running(workers=workers) as r:
        for worker in workers:
            worker.faults.token_s = 0.02
        body = {**GREEDY, "max_tokens": 20}
        tasks = [asyncio.create_task(r.client.post("/v1/chat/completions", json=body)) for _ in range(8)]
        await until(lambda: all(w.running == 4 for w in workers))
        await asyncio.sleep(0.1)
        await workers[0].kill()
        for response in await asyncio.gather(*tasks):
            assert words(response.text) == "".join(f"tok{i} " for i in range(20))


@asynchronous
async def test_generate_streams_are_resumed_too():
    workers = await able(2)
    async with running(workers=workers) as r:
        workers[0].faults.abort_after = 1
        body = {"text": "x", "stream": True, "sampling_params": {"sampling_seed": 3, "max_new_tokens": 4}}
        for _ in range(2):
            response = await r.client.post("/generate", json=body)
            texts = [json.loads(e[6:])["text"] for e in events_of(response.text)[:-1]]
            assert texts == ["tok0 ", "tok1 ", "tok2 ", "tok3 "]


@asynchronous
async def test_header_of_a_client_cannot_ask_for_token_comments():
    workers = await able(1)
    async with running(workers=workers) as r:
        body = {**CHAT, "stream": True}
        response = await r.client.post("/v1/chat/completions", json=body, headers={"x-resume": "track"})
        assert ": tokens" not in response.text


ELIGIBLE = {"stream": True, "temperature": 0, "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("change", "eligible"),
    [
        ({}, True),
        ({"temperature": 1, "seed": 5}, True),
        ({"temperature": 1}, False),
        ({"stream": False}, False),
        ({"n": 2}, False),
        ({"best_of": 3}, False),
        ({"logprobs": True}, False),
        ({"tools": [{"type": "function"}]}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"regex": "[a-z]+"}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
        ({"messages": "nonsense"}, False),
    ],
)
def test_only_single_greedy_or_seeded_plain_streams_can_be_resumed(change, eligible):
    call = Call(ROUTES["/v1/chat/completions"], json.dumps({**ELIGIBLE, **change}).encode())
    call.parse(False)
    assert (make_tracker(call) is not None) == eligible


@given(
    st.lists(st.lists(st.integers(0, 1 << 20), max_size=4), max_size=8),
    st.lists(st.integers(1, 40), max_size=40),
)
def test_tracker_passes_events_whole_however_the_bytes_are_cut(steps, cuts):
    plain = [b'data: {"id": "a", "i": %d}' % i for i in range(len(steps))]
    source = b"".join(
        (b": tokens " + b",".join(b"%d" % t for t in ids) + b"\n" if ids else b"") + event + b"\n\n"
        for ids, event in zip(steps, plain, strict=True)
    )
    tracker, out, at = Tracker({}), [], 0
    for cut in [*cuts, len(source)]:
        part = tracker.feed(source[at : at + cut])
        assert part == b"" or part.endswith(b"\n\n")
        out.append(part)
        at += cut
    assert b"".join(out) == b"".join(event + b"\n\n" for event in plain)
    assert tracker.token_ids == [t for ids in steps for t in ids]
