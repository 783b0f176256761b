"""The wire between the HTTP process and the engine: ZeroMQ and msgpack, or a queue in one process.

`Connection` is the client's end (`jaxserve.messages.EngineClient`), whatever carries its messages;
`ZmqEndpoint` and `QueueEndpoint` are the engine's. No jax here.
"""

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from jaxserve.messages import (
    Abort,
    CacheEvent,
    CacheEvents,
    Call,
    EngineDeadError,
    EngineRefusal,
    Fatal,
    FromEngine,
    Generate,
    Info,
    Output,
    Outputs,
    Progress,
    RankLoad,
    Reply,
    ToEngine,
)

_encode = msgspec.msgpack.Encoder().encode
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
_decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode

MESSAGES_A_TURN = 32  # of a backlog, before others run; more than one, so that late readers see it and join


# ---- the engine's end ----


class ZmqEndpoint:
    """The engine process's end of a socket that the HTTP process has bound."""

    def __init__(self, address: str):
        self._socket = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)  # bounded by the requests that may run, not by dropping messages
        self._socket.connect(address)

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        messages = []
        if self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            while True:
                try:
                    messages.append(_decode_to_engine(self._socket.recv(zmq.NOBLOCK)))
                except zmq.Again:
                    break
        return messages

    def send(self, message: FromEngine) -> None:
        self._socket.send(_encode(message))

    def close(self) -> None:
        """Deliver what was sent, up to a second."""
        self._socket.close(linger=1000)


class QueueEndpoint:
    """The engine's end when it runs in a thread; `deliver` is called with every message it sends."""

    def __init__(self, deliver: Callable[[FromEngine], None]):
        self._queue: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._deliver = deliver

    def put(self, message: ToEngine) -> None:
        self._queue.put(message)

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        messages = []
        try:
            messages.append(
                self._queue.get(timeout=timeout_s) if timeout_s != 0 else self._queue.get_nowait()
            )
            while True:
                messages.append(self._queue.get_nowait())
        except queue.Empty:
            return messages

    def send(self, message: FromEngine) -> None:
        self._deliver(message)


# ---- the client's end ----


class Connection:
    """An EngineClient over any carrier: `send` takes messages away, `deliver` brings answers.

    Belongs to one asyncio loop. `closed` says why the engine is gone, once it is; `refused` whether it
    was for what the operator configured.
    """

    def __init__(
        self, send: Callable[[ToEngine], None], on_progress: Callable[[Progress], None] | None = None
    ):
        self.send = send
        self._on_progress = on_progress
        self._ready: asyncio.Future[Info] = asyncio.get_running_loop().create_future()
        self._streams: dict[str, OutputStream] = {}
        self._left: dict[str, int] = {}  # rid -> how many streams were left whose finish is still to come
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_call = 0
        self._take_cache_events: Callable[[list[CacheEvent]], None] | None = None
        self._loads: list[RankLoad] = []
        self.closed: EngineDeadError | None = None
        self.refused = False
        self.last_heard_s = time.monotonic()

    async def ready(self) -> Info:
        """What the engine says of itself once it can serve. Raises EngineDeadError."""
        return await asyncio.shield(self._ready)

    @property
    def info(self) -> Info:
        return self._ready.result()

    @property
    def loads(self) -> list[RankLoad]:
        return self._loads or [RankLoad(0, 0, 0, 0.0)] * self.info.dp_size

    @property
    def waits(self) -> bool:
        """Whether the engine owes an answer, if only to a question that nobody waits for any more."""
        return bool(self._streams or self._calls)

    def generate(self, request: Generate, take: Callable[[Output], bool]) -> AsyncIterator[None]:
        if self.closed:
            raise self.closed
        if request.rid in self._streams:
            raise EngineRefusal(f"rid {request.rid!r} is in use by a running request")
        stream = self._streams[request.rid] = OutputStream(self, request.rid, take)
        self.send(request)
        return stream

    async def abort(self, rids: list[str], all: bool = False) -> None:
        if not self.closed:
            self.send(Abort(rids, all))

    async def call(self, method: Any) -> Any:
        if self.closed:
            raise self.closed
        self._next_call += 1
        call_id = self._next_call
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self.send(Call(call_id, method))
        return await answer

    async def watch_cache(self, take: Callable[[list[CacheEvent]], None]) -> None:
        self._take_cache_events = take
        await self.call("watch_cache")

    def deliver(self, message: FromEngine) -> None:
        """Take one message from the engine; call it in the connection's loop."""
        self.last_heard_s = time.monotonic()
        match message:
            case Outputs(items, tokens, loads):
                if loads:
                    self._loads = loads
                for output in items:
                    self._deliver_output(output)
                for rid, token_ids in tokens.items():
                    self._deliver_output(Output(rid, token_ids))
            case CacheEvents(changes):
                if self._take_cache_events:
                    self._take_cache_events(changes)
            case Reply(call_id, ok, value, text):
                future = self._calls.pop(call_id, None)
                if future and not future.done():
                    future.set_result(value) if ok else future.set_exception(EngineRefusal(text))
            case Info():
                self._ready.set_result(message)
            case Progress():
                if self._on_progress:
                    self._on_progress(message)
            case Fatal(kind, text):
                self.refused = kind == "config"
                self.fail(text)

    def _deliver_output(self, output: Output) -> None:
        """Every request gets one finish, in order: a left one's comes before its rid's next user's."""
        rid = output.rid
        if left := self._left.get(rid, 0):
            if output.finish is not None and left > 1:
                self._left[rid] = left - 1
            elif output.finish is not None:
                del self._left[rid]
        elif stream := self._streams.get(rid):
            if output.finish is not None:
                del self._streams[rid]
            stream.put(output)

    def fail(self, reason: str) -> None:
        """The engine is gone: everyone who waits is told, and whoever comes later."""
        if self.closed:
            return
        self.closed = EngineDeadError(reason)
        futures = [self._ready, *self._calls.values()]
        for future in futures:
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        self._ready.exception()  # seen: nobody may be waiting for it
        for stream in self._streams.values():
            stream.fail(EngineDeadError(reason))
        self._streams.clear()
        self._calls.clear()

    def forget(self, stream: "OutputStream") -> None:
        """A stream was left: stop its request, unless that has ended already."""
        rid = stream.rid
        if self._streams.get(rid) is stream and not self.closed:
            del self._streams[rid]
            self._left[rid] = self._left.get(rid, 0) + 1
            self.send(Abort([rid]))


class OutputStream(AsyncIterator[None]):
    """The outputs of one request on their way to `take`; see `EngineClient.generate`."""

    def __init__(self, connection: Connection, rid: str, take: Callable[[Output], bool]):
        self._connection = connection
        self.rid = rid
        self._take = take
        self._due = False  # somebody should look
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        if self._error is not None:
            return
        try:
            due = self._take(output)
        except Exception as error:  # of this request alone
            return self.fail(error)
        if output.finish is not None:
            self._ended = True
        if due or self._ended:
            self._due = self._due or due
            self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> None:
        while not self._due:  # what came before an error is looked at first
            if self._ended:
                raise StopAsyncIteration
            if self._error is not None:
                self._ended = True
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._due = False

    async def aclose(self) -> None:
        self._ended = True
        self._connection.forget(self)


class ZmqCarrier:
    """The HTTP process's socket: bound to `address`, read by a task that feeds a Connection."""

    def __init__(self, address: str, on_progress: Callable[[Progress], None] | None = None):
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self.connection = Connection(self._send, on_progress)
        self._task = asyncio.create_task(self._read())

    def _send(self, message: ToEngine) -> None:
        # Done at once, without a task. Not through a plain socket beside the asyncio one: a send takes the
        # wake-up of a message that has just come, and only this one then looks for it.
        sent: Any = self._socket.send(_encode(message), zmq.NOBLOCK)  # a future that is done
        if isinstance(sent.exception(), zmq.Again):  # nothing is ever full here: the other end has gone
            self.connection.fail("the engine process is gone")

    async def _read(self) -> None:
        while True:
            for _ in range(MESSAGES_A_TURN):
                self.connection.deliver(_decode_from_engine(await self._socket.recv()))
            await asyncio.sleep(0)  # a receive that finds a message does not let others run

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=0)
