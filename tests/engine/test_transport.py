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
from jaxserve.transport import ZmqCarrier, ZmqEndpoint

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


def test_message_that_has_come_before_a_send_is_not_slept_through(address):
    """A send may take the wake-up of a message that is already there: ZeroMQ signals an edge once."""

    async def work(carrier, endpoint):
        first, second = carrier.connection.generate(request("a")), carrier.connection.generate(request("b"))
        assert [m.rid for m in await asyncio.to_thread(receive, endpoint, 2)] == ["a", "b"]
        for i in range(20):
            endpoint.send(Outputs([Output("a", [i])]))
            time.sleep(0.01)  # noqa: ASYNC251 (the loop must not run while the message comes)
            carrier.connection.send(Abort(["nobody"]))
            assert (await anext(first)).token_ids == [i]
        endpoint.send(answer("b", 7))
        assert (await anext(second)).token_ids == [7]

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
        tokens = [t async for output in connection.generate(request(str(i))) for t in output.token_ids]
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
            stream = connection.generate(request(f"r{time.monotonic_ns()}"))
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDeadError, match="the engine process is gone"):
            await anext(stream)
        with pytest.raises(EngineDeadError):
            call = await connection.call("loads")
        with pytest.raises(EngineDeadError):
            connection.generate(request("late"))
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
