"""Requests that are left, aborted or share a name: the in-process engine from its client's end."""

from itertools import pairwise, takewhile

import pytest

from jaxserve.messages import EngineRefusal, Generate, Sampling
from tests.engine.asking import Followed, raw

LONG = Sampling(max_new_tokens=480, temperature=0.0)


def request(rid: str, sampling: Sampling = LONG, **fields) -> Generate:
    return Generate(rid=rid, input_ids=[5, 6, 7], sampling=sampling, **fields)


async def tokens_of(stream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def idle(connection) -> None:
    """Until the engine has nothing to do; its answers come between two steps."""
    while any(row["num_used_tokens"] or row["num_waiting_reqs"] for row in await connection.call("loads")):
        pass


def test_rid_can_be_used_again_right_after_its_stream_was_left(engine):
    """The engine's last words to the first stream must not reach the second."""
    connection = engine()._connection
    short = Sampling(max_new_tokens=5, temperature=0.0)

    async def main():
        want = await tokens_of(Followed(connection, request("once", short)))
        for _ in range(20):
            first = Followed(connection, request("name"))
            await anext(first)
            await first.aclose()
            again = [output async for output in Followed(connection, request("name", short))]
            assert [output.finish.type for output in again if output.finish] == ["length"]
            assert [t for output in again for t in output.token_ids] == want
        await idle(connection)

    engine()._run(main())


def test_rid_in_use_is_refused_and_the_running_request_is_not_disturbed(engine):
    connection = engine()._connection

    async def main():
        stream = Followed(connection, request("twin"))
        with pytest.raises(EngineRefusal, match="rid 'twin' is in use by a running request"):
            Followed(connection, request("twin"))
        assert len(await tokens_of(stream)) == 480

    engine()._run(main())


def test_engine_gives_signs_of_life_while_it_computes_a_long_prompt(engine, monkeypatch):
    """Who owes an answer and says nothing is taken for frozen, however long the prompt."""
    loop = engine(chunked_prefill_size=16)._engine
    heard = []
    monkeypatch.setattr("jaxserve.engine.loop.LOAD_INTERVAL_S", 0.0)
    monkeypatch.setattr(
        loop._endpoint, "send", lambda m, send=loop._endpoint.send: (heard.append(m), send(m))
    )
    prompt = Generate(rid="long", input_ids=[5, 6, 7] * 40, sampling=Sampling(max_new_tokens=1))
    raw(engine(chunked_prefill_size=16), prompt)
    before = list(takewhile(lambda m: not (m.items or m.tokens), heard))
    assert len(before) == 7  # of eight chunks of 16 tokens the last one gives the output
    assert all(m.loads for m in before)


def test_abort_ends_running_and_waiting_requests_with_a_finish(engine):
    connection = engine()._connection

    async def main():
        streams = [Followed(connection, request(f"r{i}")) for i in range(8)]  # four of them wait
        await anext(streams[0])
        await connection.abort(["r0", "r7", "nobody"])
        for i in (0, 7):
            last = [output async for output in streams[i]][-1]
            assert (last.finish.type, last.finish.message) == ("abort", "aborted by the client")
        await connection.abort([], all=True)
        lasts = [[output async for output in streams[i]][-1] for i in range(1, 7)]
        assert [last.finish.type for last in lasts] == ["abort"] * 6
        await idle(connection)

    engine()._run(main())


def test_cache_is_not_flushed_while_requests_run(engine):
    connection = engine()._connection

    async def main():
        stream = Followed(connection, request("busy"))
        await anext(stream)
        with pytest.raises(EngineRefusal, match="not flushed: 1 requests are pending"):
            await connection.call("flush_cache")
        await stream.aclose()
        await idle(connection)

    engine()._run(main())


def test_streamed_reply_grows_and_ends_as_the_whole_one(engine):
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    events = list(engine().generate(input_ids=[5, 6, 7], sampling_params=params, stream=True))
    whole = engine().generate(input_ids=[5, 6, 7], sampling_params=params)
    ids = [event["output_ids"] for event in events]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(ids))
    assert ids[-1] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]


def test_leaving_an_iterator_frees_the_pages(engine):
    events = engine().generate(
        input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 480, "ignore_eos": True}, stream=True
    )
    next(events)
    events.close()
    engine()._run(idle(engine()._connection))
    assert engine().loads()[0]["num_running_reqs"] == 0


def test_prompt_under_another_salt_is_not_shared(engine):
    small, prompt = engine(), [9] * 40
    params = {"max_new_tokens": 1, "temperature": 0}
    small.flush_cache()
    cached = [
        small.generate(input_ids=prompt, sampling_params=params, cache_salt=salt)["meta_info"][
            "cached_tokens"
        ]
        for salt in ("a", "a", "b")
    ]
    assert cached == [0, 32, 0]


def test_cache_is_flushed_right_after_an_answer_though_a_step_ran_ahead(engine):
    small = engine()
    for _ in range(20):
        small.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 2, "ignore_eos": True})
        small.flush_cache()
