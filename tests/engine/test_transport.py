"""The wire between the processes: nothing is lost, nobody sleeps through a message, death is told."""

import asyncio
import threading
import time

import pytest

from jaxserve.messages import (
    Abort,
    Call,
    EngineDeadError,
    Fatal,
    Finish,
    Generate,
    Output,
    Outputs,
    Progress,
    Reply,
    Sampling,
)
from jaxserve.transport import MESSAGES_A_TURN, ZmqCarrier, ZmqEndpoint
from tests.engine.asking import Followed

PATIENCE_S = 30


def request(rid: str) -> Generate:
    return Generate(rid=rid, input_ids=[1], sampling=Sampling())


def answer(rid: str, *tokens: int) -> Outputs:
    return Outputs([Output(rid, list(tokens), Finish("length", length=len(tokens)))])


@pytest.fixture
def address(tmp_path):
    return f"ipc://{tmp_path}/engine"


def run(work, address):
    """Run `work(carrier, endpoint)` with both ends of one wire."""

    async def main():
        connected = asyncio.Event()
        carrier = ZmqCarrier(address, on_progress=lambda _: connected.set())
        endpoint = ZmqEndpoint(address)
        endpoint.send(Progress("connecting", 1, 1))
        try:
            await asyncio.wait_for(connected.wait(), PATIENCE_S)
            await asyncio.wait_for(work(carrier, endpoint), PATIENCE_S)
        finally:
            await carrier.close()
            endpoint.close()

    asyncio.run(main())


def test_what_fails_to_take_its_outputs_ends_alone(address):
    """The wire goes on for the others, and the engine is told to stop the one."""

    def take(output: Output) -> bool:
        raise ValueError("cannot be shown")

    async def work(carrier, endpoint):
        connection = carrier.connection
        bad, good = connection.generate(request("bad"), take), Followed(connection, request("good"))
        sent = []
        while len(sent) < 2:
            sent += endpoint.receive(PATIENCE_S)
        endpoint.send(Outputs([], {"bad": [5], "good": [6]}))
        with pytest.raises(ValueError, match="cannot be shown"):
            await anext(bad)
        with pytest.raises(StopAsyncIteration):
            await anext(bad)
        await bad.aclose()
        assert await asyncio.to_thread(endpoint.receive, PATIENCE_S) == [Abort(["bad"])]
        assert await anext(good) == Output("good", [6])

    run(work, address)


def test_what_came_before_the_engine_died_is_looked_at_first(address):
    async def work(carrier, endpoint):
        stream = Followed(carrier.connection, request("a"))
        endpoint.send(Outputs([], {"a": [5]}))
        endpoint.send(Fatal("internal", "out of memory"))
        with pytest.raises(EngineDeadError):
            await carrier.connection.ready()
        assert await anext(stream) == Output("a", [5])
        with pytest.raises(EngineDeadError, match="out of memory"):
            await anext(stream)

    run(work, address)


def test_reader_is_woken_for_what_is_due_and_for_the_end(address):
    taken: list[int] = []
    second = asyncio.Event()

    def take(output: Output) -> bool:
        taken.extend(output.token_ids)
        if len(taken) == 2:
            second.set()
        return len(taken) == 3

    async def work(carrier, endpoint):
        stream = carrier.connection.generate(request("a"), take)
        reader = asyncio.ensure_future(anext(stream))
        for token in (1, 2):
            endpoint.send(Outputs([], {"a": [token]}))
        await second.wait()
        await asyncio.sleep(0)  # a reader that was woken would run now
        assert not reader.done()
        endpoint.send(Outputs([], {"a": [3]}))
        await reader
        endpoint.send(answer("a", 4))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert taken == [1, 2, 3, 4]

    run(work, address)


def test_message_that_has_come_before_a_send_is_not_slept_through(address):
    """A send may take the wake-up of a message that is already there: ZeroMQ signals an edge once."""

    async def work(carrier, endpoint):
        first, second = (Followed(carrier.connection, request(rid)) for rid in "ab")
        assert [m.rid for m in await asyncio.to_thread(receive, endpoint, 2)] == ["a", "b"]
        for i in range(20):
            endpoint.send(Outputs([Output("a", [i])]))
            time.sleep(0.01)  # noqa: ASYNC251 (the loop must not run while the message comes)
            carrier.connection.send(Abort(["nobody"]))
            assert (await anext(first)).token_ids == [i]
        endpoint.send(answer("b", 7))
        assert (await anext(second)).token_ids == [7]

    run(work, address)


def test_others_have_their_turns_while_a_backlog_is_read(address):
    """An abort waits in the same loop as the outputs of a crowd."""
    taken: list[Output] = []
    count = 20 * MESSAGES_A_TURN

    def take(output: Output) -> bool:
        taken.append(output)
        return False

    async def work(carrier, endpoint):
        stream = carrier.connection.generate(request("a"), take)
        for token in range(count):
            endpoint.send(Outputs([], {"a": [token]}))
        time.sleep(0.1)  # noqa: ASYNC251 (the loop must not run while the messages come)
        while (before := len(taken)) < count:
            await asyncio.sleep(0)
            assert len(taken) - before <= MESSAGES_A_TURN
        await stream.aclose()

    run(work, address)


def receive(endpoint, count: int) -> list:
    messages = []
    while len(messages) < count:
        messages += endpoint.receive(PATIENCE_S)
    return messages


def test_every_answer_comes_while_both_ends_talk_at_once(address):
    """Three hundred requests and calls against an engine that answers from a thread of its own."""
    count = 300

    def serve(endpoint):
        for message in receive_each(endpoint, 2 * count):
            match message:
                case Generate(rid=rid):
                    for token in range(5):
                        endpoint.send(Outputs([Output(rid, [token])]))
                    endpoint.send(answer(rid, 5))
                case Call(call_id):
                    endpoint.send(Reply(call_id, True, call_id))

    async def ask(connection, i):
        tokens = [t async for output in Followed(connection, request(str(i))) for t in output.token_ids]
        assert tokens == [0, 1, 2, 3, 4, 5]

    async def work(carrier, endpoint):
        thread = threading.Thread(target=serve, args=(endpoint,))
        thread.start()
        async with asyncio.TaskGroup() as group:
            for i in range(count):
                group.create_task(ask(carrier.connection, i))
                group.create_task(carrier.connection.call("loads"))
                if i % 7 == 0:
                    await asyncio.sleep(0)
        await asyncio.to_thread(thread.join)

    run(work, address)


def receive_each(endpoint, count: int):
    seen = 0
    while seen < count:
        for message in endpoint.receive(PATIENCE_S):
            seen += 1
            yield message


def test_sending_to_an_engine_that_is_gone_raises_engine_dead(address):
    async def work(carrier, endpoint):
        connection = carrier.connection
        connection.send(Abort(["hello"]))
        receive(endpoint, 1)
        endpoint.close()
        stream = call = None
        while not connection.closed:  # ZeroMQ sees the other end go a moment later
            stream = Followed(connection, request(f"r{time.monotonic_ns()}"))
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDeadError, match="the engine process is gone"):
            await anext(stream)
        with pytest.raises(EngineDeadError):
            call = await connection.call("loads")
        with pytest.raises(EngineDeadError):
            Followed(connection, request("late"))
        assert call is None

    run(work, address)


@pytest.mark.parametrize("kind, refused", [("config", True), ("internal", False)])
def test_fatal_message_says_whose_fault_it_is(address, kind, refused):
    async def work(carrier, endpoint):
        endpoint.send(Fatal(kind, "no such thing"))
        with pytest.raises(EngineDeadError, match="no such thing"):
            await carrier.connection.ready()
        assert carrier.connection.refused is refused

    run(work, address)
