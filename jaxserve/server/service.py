"""What all routes share: the engine, the text layer, who runs, who may start.

`Service` is the one mutable object of the HTTP process. `jaxserve.Engine` makes one too, so nothing
here or in `generate` knows of HTTP.
"""

import asyncio
import contextlib
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any

from jaxserve.config import ServerConfig
from jaxserve.messages import EngineClient, EngineDeadError, Finish, Generate, Output
from jaxserve.server.errors import RequestError, unavailable
from jaxserve.server.metrics import Metrics
from jaxserve.server.schema import MAX_RID_CHARS
from jaxserve.server.sequence import Sequence
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

MOST_GRAMMARS = 2  # that are checked at a time; one takes up to half a second
MAX_ABORTS = 4096  # whose ids are remembered, for requests that are on their way to the engine
ANSWER_S = 5.0  # for the engine to answer a question: a step and a few others' questions may come first
MOST_BEHIND = 16  # outputs by which a stream's reader may be late before its events are joined


class Service:
    """The engine behind its limits. All methods run on one event loop."""

    def __init__(
        self,
        client: EngineClient,
        config: ServerConfig,
        tokenizer: Tokenizer | None = None,
        *,
        chat_template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`generation_config`: the checkpoint's; its sampling values become the OpenAI routes' defaults
        under `--sampling-defaults model`. `metrics`: None counts nothing (in-process use)."""
        self.client = client
        self.config = config
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.generation_config = dict(generation_config or {})
        self.metrics = metrics
        self.clock = clock
        self.turn_of_grammars = asyncio.Semaphore(MOST_GRAMMARS)
        self.num_outputs = 0  # outputs the engine has sent, a sign of life
        self._dead: str | None = None
        self._running: dict[str, Sequence] = {}
        self._aborted_s: dict[str, float] = {}  # id -> when its last abort came; the oldest is first
        self._all_aborted_s = -math.inf
        self.stopping = False  # the grace period is over: what is aborted now may go on elsewhere
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model_name(self) -> str:
        return self.config.served_model_name or self.client.info.model_path

    @property
    def eos_token_ids(self) -> frozenset[int]:
        ids = frozenset(self.client.info.eos_token_ids)
        return ids | self.tokenizer.eos_token_ids if self.tokenizer else ids

    @property
    def num_running(self) -> int:
        """Sequences submitted and not finished, waiting ones included."""
        return len(self._running)

    @property
    def dead(self) -> str | None:
        """Why the engine is gone, once it is."""
        closed = getattr(self.client, "closed", None)  # a connection knows before anybody asks it
        return self._dead or (str(closed) if closed else None)

    async def wait_idle(self) -> None:
        await self._idle.wait()

    @contextlib.contextmanager
    def admitted(self, sequences: list[Sequence], limited: bool = True) -> Iterator[None]:
        """Holds a place for each.

        Raises RequestError: 503 when the queue is full or the grace period over, 400 for a rid in use and for
        more than the queue ever holds.
        """
        if self.stopping:
            raise unavailable("the server is shutting down")
        limit = self.client.info.max_running_requests + self.config.max_queued_requests
        if limited and len(sequences) > limit:
            raise RequestError(
                f"{len(sequences)} sequences in one request are more than max_running_requests + "
                f"max_queued_requests = {limit}; split the batch"
            )
        if limited and self.num_running + len(sequences) > limit:
            raise unavailable(
                f"{self.num_running} requests run or wait and {len(sequences)} more would pass "
                f"max_running_requests + max_queued_requests = {limit}; try again later"
            )
        added: list[str] = []
        try:
            for sequence in sequences:
                rid = sequence.request.rid
                if rid in self._running:
                    raise RequestError(f"rid {rid!r} is in use by a running request", param="rid")
                self._running[rid] = sequence
                added.append(rid)
            self._idle.clear()
            yield
        finally:
            for rid in added:
                self._running.pop(rid, None)
            if not self._running:
                self._idle.set()

    async def abort(self, rid: str | None, abort_all: bool = False) -> None:
        """End requests by the id their client gave or by their own; their streams get an abort finish.

        Those that have arrived and are not sent yet are ended when they would be.
        """
        if abort_all:
            self._all_aborted_s = self.clock()
        if rid is not None and len(rid) <= 2 * MAX_RID_CHARS:  # no request has a longer one
            self._aborted_s.pop(rid, None)
            self._aborted_s[rid] = self.clock()
            if len(self._aborted_s) > MAX_ABORTS:
                del self._aborted_s[next(iter(self._aborted_s))]
        rids = [r for r, s in self._running.items() if rid is not None and rid in (r, s.public_rid)]
        if rids or abort_all:
            with self.engine_errors():
                await self.client.abort(rids, abort_all)

    def _was_aborted(self, sequence: Sequence) -> bool:
        """Whether an abort came after it arrived."""
        rids = (sequence.request.rid, sequence.public_rid)
        last_s = max(self._all_aborted_s, *(self._aborted_s.get(rid, -math.inf) for rid in rids))
        return last_s > sequence.arrived_s

    async def call(self, method: str, least_s: float = 0.0) -> Any:
        """Raises EngineRefusal, EngineDeadError, and RequestError 503 when no answer comes in time.

        `least_s`: the seconds that who asks is ready to wait, where that is longer than is usual.
        """
        within_s = max(ANSWER_S, least_s)
        try:
            with self.engine_errors():
                return await asyncio.wait_for(self.client.call(method), within_s)
        except TimeoutError:
            raise unavailable(f"the engine did not answer within {within_s:g} s") from None

    @contextlib.contextmanager
    def engine_errors(self) -> Iterator[None]:
        """Remembers the engine's death, for the health routes."""
        try:
            yield
        except EngineDeadError as error:
            self._dead = str(error) or "the engine is gone"
            raise

    async def run(self, sequence: Sequence, every_event: bool = True) -> AsyncGenerator[Sequence]:
        """Submit and follow one admitted sequence; yields it when an event is due, at last when finished.

        Closing the iterator aborts it in the engine. A sequence that came here complete yields nothing.
        Raises RequestError with the engine's status when the engine refused it, EngineDeadError.
        """
        if sequence.finish is not None:
            sequence.closed = True
            return
        clock, metrics = self.clock, self.metrics if sequence.log_metrics else None
        interval = sequence.rules.stream_interval
        last_s = clock()
        told = len(sequence.token_ids)  # at the last event

        arrived: deque[tuple[Output, float]] = deque()

        def take(output: Output) -> bool:
            """A stream's outputs wait for its reader; others are fed at once, and wake it at the end."""
            self.num_outputs += 1
            arrived.append((output, clock()))
            return every_event or feed()

        def feed() -> bool:
            """Feed the sequence the next output; whether an event is due."""
            nonlocal last_s, told
            output, now_s = arrived.popleft()
            if sequence.finish is not None:  # by a stop string; the engine is about to hear of it
                return False
            before = len(sequence.token_ids)
            sequence.feed(output)
            count = len(sequence.token_ids)
            if sequence.first_token_s is None and count > before:
                sequence.first_token_s = now_s - sequence.arrived_s
            if metrics is not None:
                since_s = now_s - sequence.arrived_s, now_s - last_s
                metrics.output(sequence.dp_rank, output, before, count, *since_s)
                last_s = now_s
            if sequence.finish is not None:
                return True
            due = every_event and count > before and (told == 0 or count - told >= interval)
            if due:
                told = count
            return due

        try:
            with self.engine_errors():
                generate = _aborted if self._was_aborted(sequence) else self.client.generate
                stream = generate(sequence.request, take)
                async with contextlib.aclosing(stream):  # type: ignore[type-var]
                    async for _ in stream:
                        while arrived and sequence.finish is None:
                            if feed() and sequence.finish is None and len(arrived) < MOST_BEHIND:
                                yield sequence
                                if arrived:  # one event a turn: whoever aborts is not kept until the last
                                    await asyncio.sleep(0)
                        if sequence.finish is not None:
                            break
                    else:
                        raise EngineDeadError("the engine ended a stream without a finish")
        finally:
            sequence.closed = True
            sequence.e2e_latency_s = clock() - sequence.arrived_s
            if metrics is not None:
                metrics.finished(sequence)
        if self.stopping and sequence.tracked and sequence.finish["type"] == "abort":
            raise unavailable("the server is shutting down")
        status = sequence.finish.get("status_code")
        if status is not None and status >= 400:
            headers = {"retry-after": "1"} if status == 503 else None
            raise RequestError(sequence.finish["message"], status=status, headers=headers)
        if not sequence.came_complete:
            yield sequence

    async def complete(self, sequences: list[Sequence]) -> None:
        """Admit all and follow them to their end."""
        with self.admitted(sequences):
            await self.run_all(sequences)

    async def run_all(self, sequences: list[Sequence]) -> None:
        """Follow all to their end. The first error ends the others and is raised."""
        if len(sequences) == 1:
            await self._finish(sequences[0])
            return
        try:
            async with asyncio.TaskGroup() as group:
                for sequence in sequences:
                    group.create_task(self._finish(sequence))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def follow(self, sequences: list[Sequence]) -> AsyncGenerator[Sequence]:
        """Events of all sequences as they come. A reader slower than the engine gets fewer, larger events."""
        if len(sequences) == 1:
            async with contextlib.aclosing(self.run(sequences[0])) as events:
                async for sequence in events:
                    yield sequence
            return
        due: asyncio.Queue[Sequence | BaseException] = asyncio.Queue()  # at most one entry a sequence

        async def watch(sequence: Sequence) -> None:
            try:
                async with contextlib.aclosing(self.run(sequence)) as events:
                    async for _ in events:
                        if not sequence.pending:
                            sequence.pending = True
                            due.put_nowait(sequence)
            except Exception as error:
                due.put_nowait(error)

        tasks = [asyncio.create_task(watch(s)) for s in sequences]
        left = len(sequences)
        try:
            while left:
                event = await due.get()
                if isinstance(event, BaseException):
                    raise event
                event.pending = False
                if event.finish is not None:
                    if not event.closed:  # it is about to be queued once more, complete
                        continue
                    left -= 1
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _finish(self, sequence: Sequence) -> None:
        async with contextlib.aclosing(self.run(sequence, every_event=False)) as events:
            async for _ in events:
                pass


async def _aborted(request: Generate, take: Callable[[Output], bool]) -> AsyncGenerator[None]:
    """The stream of a request that is not sent: its abort came first, when the engine knew no such rid."""
    finish = Finish("abort", message="aborted by the client")
    if take(Output(request.rid, finish=finish)):
        yield


def new_rid() -> str:
    return uuid.uuid4().hex
