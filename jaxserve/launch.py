"""Order of birth and death: the HTTP process, its engine process, and what ties them together.

Birth: the port is tried, the engine process starts, reports progress, says that it is ready; only
then the port opens. Death: SIGTERM or SIGINT stops new requests, running ones finish within the
grace period, the engine drains in what is left of it and ends, exit status 0. A second signal ends all
at once, with 128 and its number for a status, as shells tell of signals. An engine that dies or stops
answering ends this process with status 1, after every waiting client was told.

Of several hosts each has a launcher and an engine. Only host 0 has HTTP; when it has drained, all end
with status 0, also when it was another host that was told to stop. When one fails all end with status
1 and say which it was.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import zmq

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine_process import EngineProcess
from jaxserve.messages import EngineDeadError
from jaxserve.replicas import Replicas, replica_configs
from jaxserve.server.address import in_url, resolve
from jaxserve.server.app import create_app, serve
from jaxserve.server.health import start_health_server
from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError
from jaxserve.text.tokenizer import Tokenizer, TokenizerError

logger = logging.getLogger(__name__)

Text = tuple[Tokenizer | None, ChatTemplate | None]

SHORT_TMPDIR = "/tmp"
STOP_S = 5.0  # for an engine of several hosts to tell the others, when told to stop while starting


class Stop(asyncio.Event):
    """Set by SIGTERM or SIGINT. A second one cancels the task that made this."""

    def __init__(self):
        super().__init__()
        self.forced_by: int | None = None  # the second one's number
        self._task = asyncio.current_task()
        self._told = False
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._tell, number)

    def _tell(self, number: int) -> None:
        if self._told and self.forced_by is None:
            logger.warning("told to stop a second time: ending at once")
            self.forced_by = number
            assert self._task is not None
            self._task.cancel()
        self._told = True
        self.set()


async def run(config: ServerConfig) -> int:
    """Serve until a signal or the engine's end; returns the exit status."""
    stop = Stop()
    try:
        return await (follow(config, stop) if config.node_rank else lead(config, stop))
    except asyncio.CancelledError:
        if stop.forced_by is None:
            raise
        return 128 + stop.forced_by


async def lead(config: ServerConfig, stop: Stop) -> int:
    """The launcher of a single host, or of host 0. Returns the exit status."""
    _try_port(config.host, config.port)
    configs = replica_configs(config)
    if len(configs) > 1:
        logger.warning(
            "--dp-size %d without --enable-dp-attention: %d full replicas, taken in turn; "
            "python -m router.launch_server routes them by cached prefix, and data-parallel attention needs "
            "both --dp-size and --enable-dp-attention",
            *(config.dp_size, config.dp_size),
        )
    with _socket_directory() as directory:
        engines = [await EngineProcess.start(c, f"ipc://{directory}/{i}") for i, c in enumerate(configs)]
        stopped = asyncio.create_task(stop.wait())

        def stop_for(reason: str) -> None:
            logger.warning("%s: finishing what runs, then all hosts end", reason)
            stop.set()

        for engine in engines:
            engine.asks_stop = stop_for
        try:
            text = await asyncio.to_thread(load_text_early, config)  # while engines import jax
            ready = asyncio.gather(*(engine.connection.ready() for engine in engines))
            await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ready.cancel()
                await asyncio.gather(ready, return_exceptions=True)  # seen: nobody else waits for it
                if config.nnodes > 1:
                    engines[0].ask_to_stop()
                    await engines[0].wait_dead(STOP_S)
                return 0
            await ready
            left_s = await _serve(config, engines, text, stop)
            if lost := [e for e in engines if e.dead.is_set()]:
                logger.error("%s", lost[0].connection.closed)
                return 1
            await asyncio.gather(*(e.drain(left_s) for e in engines))
            return 0
        except EngineDeadError as error:
            print(f"jaxserve: {error}", file=sys.stderr)
            return 2 if any(e.connection.refused for e in engines) else 1
        finally:
            stopped.cancel()
            await asyncio.gather(*(engine.kill() for engine in engines))


async def follow(config: ServerConfig, stop: Stop) -> int:
    """The launcher of a host that serves no HTTP: its engine follows host 0. Returns the exit status."""
    port = config.follower_health_port
    if port is not None:
        _try_port(config.host, port)
    health = None
    with _socket_directory() as directory:
        engine = await EngineProcess.start(config, f"ipc://{directory}/0")
        waits = [asyncio.create_task(event.wait()) for event in (stop, engine.dead)]
        try:
            ready = asyncio.ensure_future(engine.connection.ready())
            await asyncio.wait((ready, *waits), return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not ready.exception():
                logger.info("host %d is ready and follows %s", config.node_rank, config.dist_init_addr)
                if port is not None:
                    health = await start_health_server(config.host, port)
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                logger.warning("host %d was told to stop: asking host 0 to end all", config.node_rank)
                engine.ask_to_stop()
                await engine.wait_dead(config.shutdown_grace_period_secs + 3 * STOP_S)
            await engine.wait_dead(STOP_S)
            if engine.exit_status == 0:
                logger.info("host %d ends: %s", config.node_rank, engine.connection.closed)
                return 0
            print(f"jaxserve: {engine.connection.closed or 'host 0 did not end'}", file=sys.stderr)
            return 2 if engine.connection.refused else 1
        finally:
            for task in waits:
                task.cancel()
            if health is not None:
                health.close()
            await engine.kill()


def _socket_directory() -> tempfile.TemporaryDirectory[str]:
    """For the sockets between this process and its engines. Their paths may have 107 bytes, so a longer
    TMPDIR is left for /tmp. Raises ConfigError."""
    most = zmq.IPC_PATH_MAX_LEN - len("/jaxserve-12345678/1234")
    try:
        given = tempfile.gettempdir()
        is_short = len(os.fsencode(given)) <= most
        return tempfile.TemporaryDirectory(prefix="jaxserve-", dir=given if is_short else SHORT_TMPDIR)
    except OSError as error:
        raise ConfigError(
            f"no place for sockets: {error}; set TMPDIR to a directory of {most} bytes or fewer"
        ) from error


async def _serve(
    config: ServerConfig, engines: list[EngineProcess], text: Text | None, stop: asyncio.Event
) -> float:
    """Returns the seconds that are left of the grace period."""
    connections = [engine.connection for engine in engines]
    client = connections[0] if len(connections) == 1 else Replicas(connections)
    info = client.info
    tokenizer, template = text or load_text(config, info.tokenizer_dir)
    app = create_app(
        client,
        config,
        tokenizer,
        chat_template=template,
        generation_config=info.generation_config,
    )
    if config.api_key is None:
        logger.warning(
            "no --api-key: everyone who reaches %s may use this server", in_url(config.host, config.port)
        )

    def started(port: int) -> None:
        logger.info(
            "ready on http://%s after %.1f s: %s, %s on %d %s, %d KV tokens, %d running requests",
            *(in_url(config.host, port), info.startup_s, info.model_path, info.dtype, info.num_devices),
            *(info.device_kind, info.max_total_num_tokens, info.max_running_requests),
        )

    async def stop_with(engine: EngineProcess) -> None:
        await engine.dead.wait()
        stop.set()

    watchers = [asyncio.create_task(stop_with(engine)) for engine in engines]
    gc.collect()
    gc.freeze()  # full collections need not look through what lives until the end
    try:
        return await serve(
            app,
            config.host,
            config.port,
            stop=stop,
            grace_s=config.shutdown_grace_period_secs,
            log_level=config.log_level,
            started=started,
        )
    except OSError as error:  # the port was free at the start
        raise _cannot_listen(config.host, config.port, error) from error
    finally:
        for watcher in watchers:
            watcher.cancel()


def load_text_early(config: ServerConfig) -> Text | None:
    """`load_text` before minutes of loading and compiling; None where the engine has yet to find the files,
    of a GGUF file or a hub id. Raises ConfigError."""
    path = Path(config.model_path).expanduser()
    if config.load_format == "dummy" and path.is_file():
        path = path.parent
    if config.skip_tokenizer_init or config.tokenizer_path or (path / "config.json").is_file():
        return load_text(config, str(path))
    return None


def load_text(config: ServerConfig, checkpoint_dir: str) -> Text:
    """The tokenizer and chat template, of the checkpoint unless others are named. Raises ConfigError."""
    if config.skip_tokenizer_init:
        return None, None
    directory = config.tokenizer_path or checkpoint_dir
    try:
        tokenizer = Tokenizer.from_dir(directory)
        template = ChatTemplate.from_dir(directory, config.chat_template, tokenizer.special_tokens)
    except TokenizerError as error:
        raise ConfigError(f"{error}; --skip-tokenizer-init serves token ids without one") from error
    except ChatTemplateError as error:
        raise ConfigError(f"{error}; --chat-template names another") from error
    if config.tool_call_parser is not None and template is not None and not template.names_tools:
        logger.warning(
            "--tool-call-parser: the chat template never names tools, so the model is told of none"
        )
    return tokenizer, template


def _try_port(host: str, port: int) -> None:
    """Fail before minutes of loading when the address cannot be bound. Raises ConfigError."""
    try:
        family, address = resolve(host, port)
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    # Of a name that is not known, the number is none of the system's; else the text has the address again.
    why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return ConfigError(f"cannot listen on host={host}, port={port}: {why}")
