"""The application: the route table, the gate in front of it, and the server that runs it."""

import asyncio
import contextlib
import hmac
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.config import ServerConfig
from jaxserve.messages import EngineClient
from jaxserve.server import control, kv_events, native, openai
from jaxserve.server.address import listen
from jaxserve.server.connection import Connection
from jaxserve.server.errors import RequestError, unavailable
from jaxserve.server.metrics import Metrics
from jaxserve.server.request_log import log_request
from jaxserve.server.service import Service
from jaxserve.server.stream import GONE, endpoint, error_response
from jaxserve.server.worker_headers import worker_headers
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

OPEN_PATHS = frozenset({"/health", "/health_generate", "/metrics", "/ping"})  # no key asked
GENERATING = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
ENDLESS = "/kv_events"  # its readers do not keep a server up that is told to stop
END_S = 1  # for what was aborted to be answered, and then for what was cut off
REQUEST_ID_HEADER = "x-request-id"
ROUTES: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("/", ("GET",), control.root),
    ("/version", ("GET",), control.version),
    ("/health", ("GET",), control.health),
    ("/ping", ("GET",), control.ping),
    ("/health_generate", ("GET",), control.health_generate),
    ("/model_info", ("GET",), control.model_info),
    ("/get_model_info", ("GET",), control.model_info),
    ("/server_info", ("GET",), control.server_info),
    ("/get_server_info", ("GET",), control.server_info),
    ("/v1/loads", ("GET",), control.loads),
    ("/get_load", ("GET",), control.get_load),
    ("/kv_events", ("GET",), kv_events.kv_events),
    ("/metrics", ("GET",), control.metrics),
    ("/flush_cache", ("GET", "POST"), control.flush_cache),
    ("/start_expert_distribution_record", ("GET", "POST"), control.start_expert_record),
    ("/stop_expert_distribution_record", ("GET", "POST"), control.stop_expert_record),
    ("/dump_expert_distribution_record", ("GET", "POST"), control.dump_expert_record),
    ("/generate", ("POST", "PUT"), native.generate),
    ("/abort_request", ("POST",), native.abort_request),
    ("/tokenize", ("POST",), native.tokenize),
    ("/v1/tokenize", ("POST",), native.tokenize),
    ("/detokenize", ("POST",), native.detokenize),
    ("/v1/detokenize", ("POST",), native.detokenize),
    ("/v1/models", ("GET",), openai.models),
    ("/v1/models/{model:path}", ("GET",), openai.model),
    ("/v1/completions", ("POST",), openai.completions),
    ("/v1/chat/completions", ("POST",), openai.chat_completions),
)
CONTROL_PATHS = frozenset(path for path, _, handler in ROUTES if handler.__module__ == control.__name__)


def create_app(
    client: EngineClient,
    config: ServerConfig,
    tokenizer: Tokenizer | None = None,
    *,
    chat_template: ChatTemplate | None = None,
    generation_config: Mapping[str, Any] | None = None,
    health_timeout_s: float = control.HEALTH_TIMEOUT_S,
) -> Starlette:
    """The ASGI application over an engine that is ready.

    `app.state.ready` and `app.state.draining` are the launcher's switches; `app.state.in_flight` holds the
    tasks of requests whose answer has not ended, and their paths.
    """
    middleware = [Middleware(Gate, api_key=config.api_key, log_requests=config.log_requests)]
    if config.cors_allowed_origins:  # in front of the gate: browsers ask without a key what they may ask
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.cors_allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[Route(path, endpoint(handler), methods=list(methods)) for path, methods, handler in ROUTES],
        exception_handlers={HTTPException: _routing_error},
        middleware=middleware,
    )
    app.router.redirect_slashes = False
    metrics = Metrics(config.served_model_name or client.info.model_path, client.info)
    app.state.metrics = metrics
    app.state.service = Service(
        client,
        config,
        tokenizer,
        chat_template=chat_template,
        generation_config=generation_config,
        metrics=metrics,
    )
    app.state.kv_feed = kv_events.KvFeed(client)
    app.state.ready = True
    app.state.draining = False
    app.state.in_flight = dict[asyncio.Task[None], str]()
    app.state.health_timeout_s = health_timeout_s
    return app


async def _routing_error(request: Request, error: Exception) -> Response:
    """404 and 405, in the one error body."""
    assert isinstance(error, HTTPException), error
    path = request.url.path[:200]
    messages = {
        404: f"no route {request.method} {path}",
        405: f"{path} does not take {request.method}; it takes {(error.headers or {}).get('Allow')}",
    }
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = messages.get(error.status_code, error.detail)
    headers = dict(error.headers or {})
    return error_response(RequestError(message, status=error.status_code, code=code, headers=headers))


class Gate:
    """In front of every route: request ids, the API key, who is in flight, no new work while draining;
    behind the data routes: what their answers tell a gateway, and the log."""

    def __init__(self, app: ASGIApp, api_key: str | None, log_requests: bool):
        self.app = app
        self.log_requests = log_requests
        self.expected = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [v for k, v in scope["headers"] if k == REQUEST_ID_HEADER.encode()]
        request_id = given[0][:256].decode("latin-1") if given and given[0] else uuid.uuid4().hex
        started, status, begun_s = False, GONE, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal started, status
            started = True
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                if scope["path"] in GENERATING:
                    client = scope["app"].state.service.client
                    headers.update(worker_headers(client, scope, message["status"]))
            await send(message)

        refusal = self._refusal(scope)
        app = self.app if refusal is None else error_response(refusal)
        state, task = scope["app"].state, asyncio.current_task()
        if scope["path"] != ENDLESS:
            state.in_flight[task] = scope["path"]
        try:
            await app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not state.draining:
                raise
            if started:
                return  # and the connection is cut
            # The rest of its body may still come, so the connection cannot be used again.
            headers = {"retry-after": "1", "connection": "close"}
            cut = RequestError("the server is shutting down", status=503, headers=headers)
            await error_response(cut)(scope, receive, send_with_id)
        finally:
            state.in_flight.pop(task, None)
            if self.log_requests and scope["path"] in GENERATING:
                log_request(request_id, scope, status, time.monotonic() - begun_s)

    def _refusal(self, scope: Scope) -> RequestError | None:
        path = scope["path"]
        if self.expected is not None and path not in OPEN_PATHS:
            given = [v.partition(b" ") for k, v in scope["headers"] if k == b"authorization"]
            keys = [key.lstrip() for scheme, _, key in given if scheme.lower() == b"bearer"]
            if len(given) != 1 or not keys or not hmac.compare_digest(keys[0], self.expected):
                return RequestError(
                    "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
                    status=401,
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        state = scope["app"].state
        if path in GENERATING and (state.draining or not state.ready):
            return unavailable("the server is draining" if state.draining else "the server is starting", 5)
        return None


class _Server(uvicorn.Server):
    """Signals belong to the launcher."""

    def capture_signals(self):  # type: ignore[override]
        return contextlib.nullcontext()


async def serve(
    app: Starlette,
    host: str,
    port: int,
    *,
    stop: asyncio.Event | None = None,
    grace_s: float = 30.0,
    log_level: str = "info",
    started: Callable[[int], None] | None = None,
) -> float:
    """Serve until `stop` is set; then take nothing new, let what was taken finish for `grace_s`, and return.

    Returns the seconds that are left of the grace. `started` is called with the port once connections are
    accepted (useful with port 0). Cancelled, it ends at once. Raises OSError when it cannot listen there.
    """
    stop, left_s, clock = stop or asyncio.Event(), grace_s, asyncio.get_running_loop().time
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        access_log=False,
        lifespan="off",
        http=Connection,
        ws="none",
        timeout_keep_alive=75,  # longer than the idle timeout of the usual proxies in front
        timeout_graceful_shutdown=END_S,
        server_header=False,
    )
    sock = listen(host, port)
    server = _Server(config)
    running = asyncio.ensure_future(server.serve(sockets=[sock]))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        if started is not None:
            while not server.started and not running.done():  # noqa: ASYNC110 (uvicorn has no event)
                await asyncio.sleep(0.005)
            if server.started:
                started(sock.getsockname()[1])
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            app.state.draining = True
            stopped_s = clock()
            await _finish(app, grace_s)
            left_s = max(0.0, grace_s - (clock() - stopped_s))
    except asyncio.CancelledError:
        running.cancel()
        app.state.draining = True
        for connection in server.server_state.connections:
            connection.transport.abort()
        await _cancel(set(app.state.in_flight))
        raise
    finally:
        stopping.cancel()
        app.state.kv_feed.close()
        server.should_exit = True
        await asyncio.wait((running,))
        sock.close()
    running.result()
    return left_s


async def _finish(app: Starlette, grace_s: float) -> None:
    """Wait for the requests in flight, in the engine or not there yet; end those that outlast the grace.

    Questions about the server, which the engine may never answer, are no work that would be lost.
    """
    in_flight, service = app.state.in_flight, app.state.service
    work = {task for task, path in in_flight.items() if path not in CONTROL_PATHS}
    if await _wait(work, grace_s):
        service.stopping = True
        await service.abort(None, abort_all=True)
    left = await _wait(set(in_flight), END_S)
    await _cancel(left)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await _wait(tasks, END_S)


async def _wait(tasks: set[asyncio.Task[None]], timeout_s: float) -> set[asyncio.Task[None]]:
    """Those that are not done in time."""
    return (await asyncio.wait(tasks, timeout=timeout_s))[1] if tasks else set()
