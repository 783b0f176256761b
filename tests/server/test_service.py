"""The part that `jaxserve.Engine` uses too: bodies in, reply dictionaries out, no HTTP."""

import asyncio
import subprocess
import sys
from contextlib import aclosing

import pytest
from fake_engine import FakeEngine

from jaxserve.config import ServerConfig
from jaxserve.messages import EngineDeadError, Finish, Output
from jaxserve.server import generate
from jaxserve.server import service as service_module
from jaxserve.server.errors import RequestError
from jaxserve.server.generate import reply, stream
from jaxserve.server.metrics import Metrics
from jaxserve.server.schema import GenerateBody, parse
from jaxserve.server.service import MOST_BEHIND, Service


def body(**fields):
    return parse(GenerateBody, fields)


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(lambda request: tokenizer.encode("hello world"))


def run(engine, tokenizer, work):
    """The result of `work(service)` in a loop of its own; nothing may be left running."""

    async def main():
        service = Service(engine, ServerConfig(model_path="m"), tokenizer)
        try:
            return await work(service)
        finally:
            assert service.num_running == 0
            await asyncio.wait_for(service.wait_idle(), 1)

    result = asyncio.run(main())
    assert not engine.running
    return result


def test_reply_is_what_generate_answers(engine, tokenizer):
    answer = run(engine, tokenizer, lambda service: reply(service, body(text="x")))
    assert answer["text"] == "hello world"
    batch = run(engine, tokenizer, lambda service: reply(service, body(text=["x", "y"])))
    assert [r["text"] for r in batch] == ["hello world", "hello world"]


def test_stream_dicts_are_snapshots(engine, tokenizer):
    async def work(service):
        return [event async for event in stream(service, body(text="x", return_logprob=True))]

    events = run(engine, tokenizer, work)
    assert [len(e["output_ids"]) for e in events] == [1, 2, 3, 4]
    assert [len(e["meta_info"]["output_token_logprobs"]) for e in events] == [1, 2, 3, 4]


def test_closing_a_stream_aborts_every_sequence(engine, tokenizer):
    async def work(service):
        sampling = {"n": 3, "ignore_eos": True, "stop_token_ids": [319]}
        async with aclosing(stream(service, body(text="x", rid="r", sampling_params=sampling))) as events:
            await anext(events)

    run(engine, tokenizer, work)
    assert sorted(engine.aborted) == ["r_0", "r_1", "r_2"]


def test_cancelling_a_reply_aborts_every_sequence(engine, tokenizer):
    engine.hang = True

    async def work(service):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reply(service, body(text=["x", "y"], rid="r")), 0.05)

    run(engine, tokenizer, work)
    assert sorted(engine.aborted) == ["r_0", "r_1"]


BATCH = {"text": ["x", "y"], "rid": "r"}


@pytest.mark.parametrize("rid, abort_all", [("r", False), (None, True)])
@pytest.mark.parametrize("is_stream", [False, True])
def test_abort_is_not_lost_that_comes_before_a_batch_is_sent(engine, tokenizer, is_stream, rid, abort_all):
    async def work(service):
        async def last_events():
            events = [event async for event in stream(service, body(**BATCH, stream=True))]
            return [event for event in events if event["meta_info"]["finish_reason"]]

        answer = asyncio.create_task(last_events() if is_stream else reply(service, body(**BATCH)))
        await asyncio.sleep(0)
        assert service.num_running == 2 and not engine.requests
        await service.abort(rid, abort_all)
        return [r["meta_info"]["finish_reason"] for r in await answer]

    assert run(engine, tokenizer, work) == [{"type": "abort", "message": "aborted by the client"}] * 2
    assert not engine.requests


@pytest.mark.parametrize(
    "rid, abort_all, ends", [("r", False, "aa"), ("r_1", False, "sa"), (None, True, "aa"), ("x", False, "ss")]
)
def test_abort_is_not_lost_that_comes_while_a_prompt_is_tokenized(
    engine, tokenizer, monkeypatch, rid, abort_all, ends
):
    monkeypatch.setattr(generate, "THREAD_CHARS", 0)

    async def work(service):
        answer = asyncio.create_task(reply(service, body(**BATCH)))
        await asyncio.sleep(0)
        assert service.num_running == 0
        await service.abort(rid, abort_all)
        return [r["meta_info"]["finish_reason"]["type"][0] for r in await answer]

    assert "".join(run(engine, tokenizer, work)) == ends


def test_abort_does_not_end_a_later_request_of_the_same_id(engine, tokenizer):
    async def work(service):
        await service.abort("r", abort_all=True)
        return await reply(service, body(text="x", rid="r"))

    assert run(engine, tokenizer, work)["text"] == "hello world"


def test_few_of_many_aborts_are_remembered(engine, tokenizer, monkeypatch):
    monkeypatch.setattr(service_module, "MAX_ABORTS", 2)

    async def work(service):
        for rid in ("a", "b", "a", "c", "x" * 1000):
            await service.abort(rid)
        return list(service._aborted_s)

    assert run(engine, tokenizer, work) == ["a", "c"]


def test_latency_counts_from_the_requests_arrival(engine, tokenizer, monkeypatch):
    """And not from its submission to the engine."""
    now_s = [100.0]
    encode = tokenizer.encode

    def slow_encode(*args):
        now_s[0] += 7
        return encode(*args)

    monkeypatch.setattr(tokenizer, "encode", slow_encode)
    engine.script = lambda request: [5]

    async def main():
        info, config = engine.info, ServerConfig(model_path="m")
        metrics = Metrics("m", info)
        service = Service(engine, config, tokenizer, metrics=metrics, clock=lambda: now_s[0])
        answer = await reply(service, body(text="x"))
        return answer["meta_info"]["e2e_latency"], metrics.render([], {}).decode()

    latency_s, text = asyncio.run(main())
    assert latency_s == 7
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert f'sglang:{name}_seconds_sum{{dp_rank="0",model_name="m"}} 7.0\n' in text


def test_each_sequence_finishes_once_when_its_stream_closes_slowly(engine, tokenizer):
    engine.close_delay_s = 0.05  # the reader takes earlier events when the stop string is already found

    async def work(service):
        events = []
        sampling = {"n": 3, "stop": "wor"}
        async for event in stream(service, body(text="x", sampling_params=sampling)):
            events.append(event)
            await asyncio.sleep(0.005)
        return events

    events = run(engine, tokenizer, work)
    finished = [e for e in events if e["meta_info"]["finish_reason"]]
    assert sorted(e["index"] for e in finished) == [0, 1, 2]
    assert all(e["text"] == "hello " for e in finished)
    assert all(e["meta_info"]["e2e_latency"] >= 0.04 for e in finished)


def test_slow_reader_gets_fewer_and_larger_events(engine, tokenizer):
    engine.script = lambda request: [5] * 50

    async def work(service):
        lengths = []
        async with aclosing(stream(service, body(text="x", sampling_params={"n": 2}))) as events:
            async for event in events:
                await asyncio.sleep(0.01)
                lengths.append((event["index"], len(event["output_ids"])))
        return lengths

    lengths = run(engine, tokenizer, work)
    assert len(lengths) < 40
    assert (0, 51) in lengths and (1, 51) in lengths


def test_first_error_of_a_batch_is_raised_as_itself(engine, tokenizer):
    engine.dead = True
    with pytest.raises(EngineDeadError):
        run(engine, tokenizer, lambda service: reply(service, body(text=["x", "y"])))


def test_stream_that_ends_without_a_finish_is_an_engine_error(engine, tokenizer):
    async def cut(request, take):
        if take(Output(rid=request.rid, token_ids=[5])):
            yield

    engine.generate = cut
    with pytest.raises(EngineDeadError, match="without a finish"):
        run(engine, tokenizer, lambda service: reply(service, body(text="x")))


def test_refused_body_submits_nothing(engine, tokenizer):
    for fields in ({"text": ["x", ""]}, {"text": "x", "sampling_params": {"top_p": 2}}):
        with pytest.raises(RequestError):
            run(engine, tokenizer, lambda service, fields=fields: reply(service, body(**fields)))
    assert not engine.requests


def test_this_layer_imports_neither_http_nor_jax():
    code = "import jaxserve.server.generate, sys; print({'starlette', 'uvicorn', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def came_at_once(count):
    """A stand-in for an engine's `generate` whose outputs came while nobody read."""

    async def generate(request, take):
        for token in range(count):
            finish = Finish("length", length=count) if token == count - 1 else None
            take(Output(rid=request.rid, token_ids=[5 + token % 9], finish=finish))
        yield

    return generate


def streamed(service):
    return stream(service, body(text="x", stream=True, sampling_params={"max_new_tokens": 100}))


def test_reader_that_is_late_gets_every_event_until_it_is_far_behind(engine, tokenizer):
    """Outputs that came while nobody read are events of their own; of many the first ones are joined."""

    async def lengths(service):
        return [len(event["output_ids"]) async for event in streamed(service)]

    engine.generate = came_at_once(MOST_BEHIND)
    assert run(engine, tokenizer, lengths) == list(range(1, MOST_BEHIND + 1))
    engine.generate = came_at_once(100)
    assert run(engine, tokenizer, lengths) == list(range(100 - MOST_BEHIND + 1, 101))


def test_reader_that_is_late_lets_others_run_between_two_events(engine, tokenizer):
    engine.generate = came_at_once(MOST_BEHIND)

    async def work(service):
        told, seen = [], []

        async def look():
            while len(told) < MOST_BEHIND:
                seen.append(len(told))
                await asyncio.sleep(0)

        looking = asyncio.create_task(look())
        async for event in streamed(service):
            told.append(event)
        await looking
        return seen

    assert run(engine, tokenizer, work) == list(range(1, MOST_BEHIND))
