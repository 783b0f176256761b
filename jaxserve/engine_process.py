"""The engine in a process of its own: its birth, the connection to it, and how its end is noticed."""

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Awaitable, Callable

from jaxserve.config import ServerConfig
from jaxserve.lifeline import Lifeline
from jaxserve.messages import Drain
from jaxserve.progress import ProgressLines
from jaxserve.transport import Connection, ZmqCarrier

WATCHDOG_S = 300.0  # an engine that owes an answer and says nothing for so long is frozen
NUM_LOOKS = 10  # by which that time is counted
# Of several hosts, an engine without a sign of life for so long is killed: a little later than the other
# hosts miss it (`multihost.SILENCE_S`), so that they can still say that it was silent.
FROZEN_S = 13.0


class EngineProcess:
    """Watches its process three ways: its exit, the signs of life on its lifeline, and what it owes.

    Signs of life count only where several hosts would wait for this one. A person may stop a single
    server and let it go on.

    Attributes:
        dead: set when the process has ended; `connection.closed` then says why.
        asks_stop: called with a reason when the engine wants the whole server to stop.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, carrier: ZmqCarrier, lifeline: Lifeline, watched: bool
    ):
        self._process = process
        self._carrier = carrier
        self._lifeline = lifeline
        self._last_words: str | None = None
        self._hung_up = asyncio.Event()
        self.connection: Connection = carrier.connection
        self.dead = asyncio.Event()
        self.asks_stop: Callable[[str], None] = lambda reason: None
        self._tasks = [asyncio.create_task(self._watch_exit()), asyncio.create_task(self._watch_silence())]
        loop = asyncio.get_running_loop()

        def heard(line: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._hear, line)

        def lost(what: str) -> None:
            if what != "closed":
                process.kill()  # from this thread: a frozen engine must not outlive a busy event loop
                heard(f"end the engine was frozen ({what}) and was killed")
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._hung_up.set)

        lifeline.start(heard, lost, FROZEN_S if watched else None)

    @classmethod
    async def start(cls, config: ServerConfig, address: str) -> "EngineProcess":
        carrier = ZmqCarrier(address, ProgressLines())
        mine, its = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jaxserve.engine.main", address),
            stdin=its.fileno(),
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process only
        )
        its.close()
        lifeline = Lifeline(mine)
        lifeline.say(json.dumps(config.to_dict()))
        return cls(process, carrier, lifeline, watched=config.nnodes > 1)

    @property
    def exit_status(self) -> int | None:
        return self._process.returncode

    def ask_to_stop(self) -> None:
        """For an engine of several hosts, where `drain` does not reach: before readiness, and followers."""
        self._lifeline.say("stop")

    async def wait_dead(self, timeout_s: float) -> None:
        """Wait until the engine has ended, at most so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.dead.wait(), timeout_s)

    async def drain(self, grace_s: float) -> None:
        """Let the engine finish and end; kill it when it does not."""
        if self._process.returncode is None and not self.connection.closed:
            self._carrier.connection.send(Drain(grace_s))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s + 10)
        await self.kill()

    async def kill(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._lifeline.close()
        await self._carrier.close()

    def _hear(self, line: str) -> None:
        word, _, text = line.partition(" ")
        match word:
            case "stop":
                self.asks_stop(text)
            case "end":
                self._last_words = self._last_words or text

    async def _watch_exit(self) -> None:
        code = await self._process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hung_up.wait(), 2)  # its last words may still be on the way
        await asyncio.sleep(0.1)  # and so may its last message
        self._lose(self._last_words or f"the engine process ended with status {code}")

    async def _watch_silence(self) -> None:
        await until_frozen(self.connection)
        self._process.kill()
        self._lose(f"the engine said nothing for {WATCHDOG_S:.0f} s")

    def _lose(self, reason: str) -> None:
        self.connection.fail(reason)
        self.dead.set()


async def until_frozen(
    connection: Connection, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Return once the engine has owed an answer and said nothing for WATCHDOG_S.

    Looks are counted, not seconds: an engine that nobody asked anything owes nothing for that time, and
    neither does one that was stopped together with this process.
    """
    silent_looks, heard_s = 0, connection.last_heard_s
    while silent_looks <= NUM_LOOKS:  # the first may come just after the request
        await sleep(WATCHDOG_S / NUM_LOOKS)
        silent = connection.waits and connection.last_heard_s == heard_s
        silent_looks = silent_looks + 1 if silent else 0
        heard_s = connection.last_heard_s
