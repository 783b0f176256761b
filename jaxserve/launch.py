"""Order of birth and death: the HTTP process, its engine process, and what ties them together.

Birth: the port is tried, the engine process starts, reports progress, says that it is ready; only
then the port opens. Death: SIGTERM or SIGINT stops new requests, running ones finish within the
grace period, the engine drains and ends, exit status 0. An engine that dies or stops answering ends
this process with status 1, after every waiting client was told.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.messages import Drain, EngineDeadError, Info
from jaxserve.progress import ProgressLines
from jaxserve.replicas import Replicas, replica_configs
from jaxserve.server.app import create_app, serve
from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError
from jaxserve.text.tokenizer import Tokenizer, TokenizerError
from jaxserve.transport import Connection, ZmqCarrier

logger = logging.getLogger(__name__)

WATCHDOG_S = 300.0  # an engine that owes an answer and says nothing for so long is frozen


class EngineProcess:
    """The engine in a process of its own, and the connection to it."""

    def __init__(self, process: asyncio.subprocess.Process, carrier: ZmqCarrier):
        self._process = process
        self._carrier = carrier
        self.connection: Connection = carrier.connection
        self.dead = asyncio.Event()
        self._tasks = [asyncio.create_task(self._watch_exit()), asyncio.create_task(self._watch_silence())]

    @classmethod
    async def start(cls, config: ServerConfig, address: str) -> "EngineProcess":
        carrier = ZmqCarrier(address, ProgressLines())
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jaxserve.engine.main", address),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process only
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(config.to_dict()).encode() + b"\n")
        return cls(process, carrier)

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
        await self._carrier.close()

    async def _watch_exit(self) -> None:
        code = await self._process.wait()
        await asyncio.sleep(0.1)  # its last message may still be on the way
        self._lose(f"the engine process ended with status {code}")

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(WATCHDOG_S / 10)
            silent_s = time.monotonic() - self.connection.last_heard_s
            if self.connection.waits and silent_s > WATCHDOG_S:
                self._process.kill()
                self._lose(f"the engine said nothing for {silent_s:.0f} s")

    def _lose(self, reason: str) -> None:
        self.connection.fail(reason)
        self.dead.set()


async def run(config: ServerConfig) -> int:
    """Serve until a signal or the engine's end; returns the exit status."""
    _try_port(config.host, config.port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    configs = replica_configs(config)
    if len(configs) > 1:
        logger.warning(
            "--dp-size %d without --enable-dp-attention: %d full replicas, taken in turn; "
            "python -m router.launch_server routes them by cached prefix",
            *(config.dp_size, config.dp_size),
        )
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as directory:
        engines = [await EngineProcess.start(c, f"ipc://{directory}/{i}") for i, c in enumerate(configs)]
        stopped = asyncio.create_task(stop.wait())
        try:
            ready = asyncio.gather(*(engine.connection.ready() for engine in engines))
            await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ready.cancel()
                return 0
            await ready
            await _serve(config, engines, stop)
            if lost := [e for e in engines if e.dead.is_set()]:
                logger.error("%s", lost[0].connection.closed)
                return 1
            await asyncio.gather(*(e.drain(config.shutdown_grace_period_secs) for e in engines))
            return 0
        except (EngineDeadError, ConfigError) as error:
            print(f"jaxserve: {error}", file=sys.stderr)
            return 1
        finally:
            stopped.cancel()
            await asyncio.gather(*(engine.kill() for engine in engines))


async def _serve(config: ServerConfig, engines: list[EngineProcess], stop: asyncio.Event) -> None:
    connections = [engine.connection for engine in engines]
    client = connections[0] if len(connections) == 1 else Replicas(connections)
    info = client.info
    tokenizer, template = load_text(config, info)
    app = create_app(
        client,
        config,
        tokenizer,
        chat_template=template,
        generation_config=info.generation_config,
    )
    if config.api_key is None:
        logger.warning(
            "no --api-key: everyone who reaches %s:%d may use this server", config.host, config.port
        )

    def started(port: int) -> None:
        logger.info(
            "ready on http://%s:%d after %.1f s: %s, %s on %d %s, %d KV tokens, %d running requests",
            *(config.host, port, info.startup_s, info.model_path, info.dtype, info.num_devices),
            *(info.device_kind, info.max_total_num_tokens, info.max_running_requests),
        )

    async def stop_with(engine: EngineProcess) -> None:
        await engine.dead.wait()
        stop.set()

    watchers = [asyncio.create_task(stop_with(engine)) for engine in engines]
    try:
        await serve(
            app,
            config.host,
            config.port,
            stop=stop,
            grace_s=config.shutdown_grace_period_secs,
            log_level=config.log_level,
            started=started,
        )
    finally:
        for watcher in watchers:
            watcher.cancel()


def load_text(config: ServerConfig, info: Info) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and chat template of a checkpoint. Raises ConfigError."""
    if config.skip_tokenizer_init:
        return None, None
    directory = config.tokenizer_path or info.tokenizer_dir
    try:
        tokenizer = Tokenizer.from_dir(directory)
        return tokenizer, ChatTemplate.from_dir(directory, config.chat_template, tokenizer.special_tokens)
    except (TokenizerError, ChatTemplateError) as error:
        raise ConfigError(f"{error}; --skip-tokenizer-init serves token ids without one") from error


def _try_port(host: str, port: int) -> None:
    """Fail before minutes of loading when the address cannot be bound. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on host={host}, port={port}: {os.strerror(error.errno or 0)}"
        ) from error
