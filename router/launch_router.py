"""`python -m router.launch_router --worker-urls http://a:8000 http://b:8000 --policy cache_aware`."""

import asyncio
import gc
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

import uvicorn

from router.app import build_app
from router.config import ConfigError, RouterConfig
from router.control import METRICS_TYPE
from router.full_disk import forget_unwritten_output
from router.http_server import ClientConnection, GatewayServer
from router.listen import check_address

log = logging.getLogger("router")

KEEP_ALIVE_S = 75  # of an idle client connection; above the 60 s of common load balancers


def main(argv: Sequence[str] | None = None) -> int:
    config = RouterConfig.from_command_line(argv, prog="python -m router.launch_router")
    set_up_logging(config)
    try:
        run(config)
    except ConfigError as error:
        log.error("%s", error)
        return 1
    return 0


def run(config: RouterConfig) -> None:
    """Serve until told to stop (SIGTERM drains, SIGINT ends). Raises ConfigError: it cannot listen there."""
    # The hot path makes no reference cycles; collecting less often saves a few microseconds a request.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(config))


async def serve(config: RouterConfig) -> None:
    server = make_server(config)
    metrics_server = None
    if config.prometheus_port is not None:
        metrics_server = await start_metrics_server(
            server.gateway.metrics_text, config.prometheus_host, config.prometheus_port
        )
    try:
        check_address("host", config.host, "port", config.port)
        await server.serve()
    finally:
        if metrics_server is not None:
            metrics_server.close()


def make_server(config: RouterConfig):
    """What serves: one process, or the supervisor of several. Has `gateway`, `serve()` and `stop()`."""
    if config.workers_processes > 1:
        from router.cluster import Cluster  # its processes import this module

        return Cluster(config)
    gateway, app = build_app(config)
    return GatewayServer(uvicorn_config(config, app), gateway, config.shutdown_grace_period_secs)


def uvicorn_config(config: RouterConfig, app) -> uvicorn.Config:
    made = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        interface="asgi3",  # a plain method that returns a coroutine is not recognised as such
        http=ClientConnection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=4096,
        ssl_certfile=config.tls_cert_path,
        ssl_keyfile=config.tls_key_path,
    )
    made.client_header_timeout_s = config.client_header_timeout_secs  # type: ignore[attr-defined]
    return made


async def start_metrics_server(text: Callable[[], Awaitable[bytes]], host: str, port: int) -> asyncio.Server:
    """A server that answers every GET with the metrics. Raises ConfigError when the port is taken."""
    check_address("prometheus_host", host, "prometheus_port", port)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                await reader.readuntil(b"\r\n\r\n")
            body = await text()
            writer.write(
                b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
                % (METRICS_TYPE.encode(), len(body))
                + body
            )
            await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    return await asyncio.start_server(answer, host, port)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC, seconds), level, logger, message, exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(config: RouterConfig) -> None:
    forget_unwritten_output()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines()
        if config.log_json
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)


def loop_factory():
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    sys.exit(main())
