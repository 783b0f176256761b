"""Engine processes on this host: started, watched, restarted with backoff, and ended together.

Knows processes and ports; nothing of requests. Readiness is the gateway's to find out.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger("router")

RESTART_PAUSE_S = (1.0, 30.0)  # first and longest; a replica that lived for STABLE_S starts over
STABLE_S = 60.0
USAGE_EXIT = 2  # what argparse ends with: the flags are wrong, and stay wrong
MAX_EARLY_DEATHS = 3
PR_SET_PDEATHSIG = 1


class ReplicasFailed(RuntimeError):
    """A replica cannot be started; the message says which and how it ended."""


@dataclass(frozen=True)
class ReplicaSpec:
    """One engine process: its command line and the port it is told to listen on."""

    name: str
    command: tuple[str, ...]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Replicas:
    """Supervises one process per spec. `is_ready(spec)` tells whether it ever served."""

    def __init__(self, specs: Sequence[ReplicaSpec], is_ready, grace_s: float) -> None:
        self.specs = list(specs)
        self.is_ready = is_ready
        self.grace_s = grace_s
        self.restarts = dict.fromkeys((s.name for s in specs), 0)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task] = []
        self._ending = asyncio.Event()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._supervise(spec)) for spec in self.specs]

    async def end(self) -> None:
        """SIGTERM to all, SIGKILL to those that are left after the grace period."""
        self._ending.set()
        for process in self.processes.values():
            _signal(process, signal.SIGTERM)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self.grace_s)
            for process in self.processes.values() if late else ():
                _signal(process, signal.SIGKILL)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _supervise(self, spec: ReplicaSpec) -> None:
        pause_s, early_deaths = RESTART_PAUSE_S[0], 0
        while not self._ending.is_set():
            started_s = time.monotonic()
            try:
                code = await self._run(spec)
                end = _exit(code)
            except Exception as error:  # no process could be started, or our bug: a death like others
                log.exception("%s", spec.name)
                code, end = None, repr(error)
            if self._ending.is_set():
                return
            lived_s = time.monotonic() - started_s
            early_deaths = 0 if self.is_ready(spec) else early_deaths + 1
            if early_deaths and (code == USAGE_EXIT or early_deaths >= MAX_EARLY_DEATHS):
                if not self.failed.done():
                    self.failed.set_exception(
                        ReplicasFailed(f"{spec.name} ended with {end} before it was ready")
                    )
                return
            if lived_s > STABLE_S:
                pause_s = RESTART_PAUSE_S[0]
            text = "%s ended with %s after %.0f s; restarting in %.0f s"
            log.error(text, spec.name, end, lived_s, pause_s)
            await self._pause(pause_s)
            pause_s = min(pause_s * 2, RESTART_PAUSE_S[1])
            self.restarts[spec.name] += 1

    async def _pause(self, seconds: float) -> None:
        """Until then, or until all are told to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()

    async def _run(self, spec: ReplicaSpec) -> int:
        """One life of the process; returns its exit code, negative for a signal."""
        process = await asyncio.create_subprocess_exec(
            *spec.command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # so that its own children can be ended with it
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self.processes[spec.name] = process
        log.info("%s: process %d on port %d", spec.name, process.pid, spec.port)
        try:
            if self._ending.is_set():
                _signal(process, signal.SIGTERM)
            assert process.stdout is not None
            await _pass_on(process.stdout, spec.name)
            return await process.wait()
        finally:
            _signal(process, signal.SIGKILL)  # it, or what it left of its group


async def _pass_on(stream: asyncio.StreamReader, name: str) -> None:
    """Print the process's lines under its name."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # a line beyond the reader's limit was dropped
            continue
        if not line:
            return
        with contextlib.suppress(OSError):  # a full disk of logs ends no replica
            sys.stderr.write(f"[{name}] {line.decode('utf-8', 'replace')}")
            sys.stderr.flush()


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _die_with_parent() -> None:
    """In the child: a gateway that is killed leaves no engine behind (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def free_ports(count: int, base: int) -> list[int]:
    """`count` ports from `base` on that nobody listens on now. Raises ReplicasFailed without enough."""
    ports: list[int] = []
    for port in range(base, 65536):
        if len(ports) == count:
            break
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    if len(ports) < count:
        raise ReplicasFailed(f"no {count} free ports from {base} on")
    return ports
