"""Routes for those who look after the server: health, information, loads, metrics, the cache."""

import asyncio
import datetime
import time
import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from jaxserve.messages import EngineDeadError, EngineRefusal, Generate, Sampling
from jaxserve.server.errors import RequestError, unavailable
from jaxserve.server.generate import WEIGHT_VERSION
from jaxserve.server.metrics import CONTENT_TYPE, load_lines
from jaxserve.server.sampling import TextRules
from jaxserve.server.schema import out_of_range, show
from jaxserve.server.sequence import Sequence
from jaxserve.server.service import Service
from jaxserve.server.stream import json_response
from jaxserve.version import __version__

HEALTH_TIMEOUT_S = 20.0
PROTOCOL = ("kv_events/1", "resume/1", "input_ids/1")  # what of PROTOCOL.md is implemented
FLUSH_RETRY_S = 0.05  # the engine frees the last step's pages shortly after its last output
MAX_FLUSH_TIMEOUT_S = 3600.0
LOAD_SECTIONS = {
    "memory": "memory",
    "spec": "speculative",
    "lora": "lora",
    "disagg": "disaggregation",
    "queues": "queues",
}


async def root(request: Request) -> Response:
    return json_response({"name": "jaxserve", "version": __version__})


async def version(request: Request) -> Response:
    return json_response({"version": __version__})


# ---- health ----


async def health(request: Request) -> Response:
    """200 while requests are taken; 503 before readiness, while draining, and after the engine's death."""
    check_serving(request)
    return PlainTextResponse("OK")


async def ping(request: Request) -> Response:
    """`/health` without a text, as SageMaker and others ask."""
    check_serving(request)
    return Response()


async def health_generate(request: Request) -> Response:
    """Generates one token; 503 when the engine makes none, for this request or any other, in time."""
    check_serving(request)
    service: Service = request.app.state.service
    probe = Generate(
        rid=f"HEALTH_CHECK_{uuid.uuid4().hex}",
        input_ids=[0],
        sampling=Sampling(max_new_tokens=1, temperature=0.0),
    )
    sequence = Sequence(probe, TextRules(), None, arrived_s=service.clock(), log_metrics=False)
    try:
        before = service.num_outputs
        with service.admitted([sequence], limited=False):
            await asyncio.wait_for(service.run_all([sequence]), request.app.state.health_timeout_s)
    except TimeoutError:
        if service.num_outputs == before:
            raise unavailable("the engine made no token in time") from None
    return PlainTextResponse("OK")


def check_serving(request: Request) -> None:
    """Raises RequestError 503 when new requests are not taken."""
    state = request.app.state
    if state.service.dead is not None:
        raise unavailable(f"the engine is gone: {state.service.dead}", 5)
    if state.draining:
        raise unavailable("the server is draining", 5)
    if not state.ready:
        raise unavailable("the server is starting", 5)


# ---- information ----


async def model_info(request: Request) -> Response:
    service: Service = request.app.state.service
    info = service.client.info
    return json_response(
        {
            "model_path": service.config.model_path or info.model_path,
            "tokenizer_path": service.config.tokenizer_path or service.config.model_path or info.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": WEIGHT_VERSION,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": info.model_type,
            "architectures": info.architectures,
        }
    )


async def server_info(request: Request) -> Response:
    """The configuration (without secrets), what the engine made of it, and each dp rank's state."""
    service: Service = request.app.state.service
    info, arguments = service.client.info, service.config.to_dict()
    if arguments.get("api_key") is not None:
        arguments["api_key"] = "***"
    return json_response(
        {
            **arguments,
            **msgspec.structs.asdict(info),
            "quantization": info.quantization or None,
            "tokenizer_path": service.config.tokenizer_path or info.tokenizer_dir,
            "protocol": PROTOCOL,
            "status": "ready" if request.app.state.ready else "starting",
            "draining": bool(request.app.state.draining),
            "version": __version__,
            "internal_states": await service.call("loads"),
        }
    )


async def loads(request: Request) -> Response:
    """GET /v1/loads?dp_rank=&include=core,memory,...|all&format=json|prometheus."""
    service: Service = request.app.state.service
    info = service.client.info
    query = request.query_params
    sections = _sections(query.get("include", "all"))
    form = query.get("format", "json")
    if form not in ("json", "prometheus"):
        raise RequestError(f"format must be json or prometheus, got {show(form)}", param="format")
    rows = await service.call("loads")
    if "dp_rank" in query:
        text = query["dp_rank"]
        is_number = text.isascii() and text.isdigit() and len(text) <= 9  # int() takes 4300 digits at most
        rank = int(text) if is_number else -1
        if not 0 <= rank < info.dp_size:
            raise out_of_range("dp_rank", text, 0, info.dp_size - 1)
        rows = [row for row in rows if row.get("dp_rank") == rank]
    if form == "prometheus":
        return Response(load_lines(service.model_name, rows), media_type=CONTENT_TYPE)
    return json_response(
        {
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": __version__,
            "accelerator": info.device_kind,
            "num_accelerators": info.num_devices,
            "loads": [{k: v for k, v in row.items() if k not in HIDDEN or k in sections} for row in rows],
        }
    )


HIDDEN = frozenset(LOAD_SECTIONS.values())


def _sections(include: str) -> set[str]:
    names = {name.strip() for name in include.split(",") if name.strip()}
    valid = {"core", "all", *LOAD_SECTIONS}
    if not names <= valid:
        raise RequestError(
            f"include must name some of {', '.join(sorted(valid))}, got {show(include)}", param="include"
        )
    return set(HIDDEN) if "all" in names else {LOAD_SECTIONS[n] for n in names & LOAD_SECTIONS.keys()}


async def get_load(request: Request) -> Response:
    """The older form of /v1/loads."""
    rows = await request.app.state.service.call("loads")
    return json_response([_old_load(row) for row in rows])


def _old_load(row: dict[str, Any]) -> dict[str, Any]:
    running, waiting = row.get("num_running_reqs", 0), row.get("num_waiting_reqs", 0)
    return {
        "dp_rank": row.get("dp_rank", 0),
        "num_reqs": running + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": row.get("num_total_tokens", row.get("num_used_tokens", 0)),
        "num_pending_tokens": row.get("num_waiting_uncached_tokens", 0),
        "ts_tic": time.monotonic(),
    }


async def metrics(request: Request) -> Response:
    """Counters survive the engine: its gauges are left out when it does not answer."""
    service: Service = request.app.state.service
    try:
        rows, stats = await service.call("loads"), await service.call("stats")
    except (EngineDeadError, EngineRefusal, RequestError):
        rows, stats = [], {}
    return Response(request.app.state.metrics.render(rows, stats), media_type=CONTENT_TYPE)


# ---- commands ----


async def flush_cache(request: Request) -> Response:
    """Forget cached prefixes. 400 while requests run; `?timeout=` waits so many seconds for idleness."""
    service: Service = request.app.state.service
    deadline_s = service.clock() + _timeout_s(request.query_params.get("timeout"))
    while True:
        try:
            await service.call("flush_cache", deadline_s - service.clock())
            return PlainTextResponse("Cache flushed.\n")
        except EngineRefusal as error:
            left_s = deadline_s - service.clock()
            if left_s <= 0:
                return PlainTextResponse(f"Cache not flushed: {error}\n", status_code=400)
        try:
            await asyncio.wait_for(service.wait_idle(), left_s)
            await asyncio.sleep(min(FLUSH_RETRY_S, left_s))
        except TimeoutError:
            pass


async def start_expert_record(request: Request) -> Response:
    """From now on count how often each expert is chosen, for `/dump_expert_distribution_record`."""
    await _expert_record(request, "start")
    return PlainTextResponse("Start recording the expert distribution.\n")


async def stop_expert_record(request: Request) -> Response:
    await _expert_record(request, "stop")
    return PlainTextResponse("Stop recording the expert distribution.\n")


async def dump_expert_record(request: Request) -> Response:
    """The counts in the answer itself: `logical_count` [layers with experts][experts], and who is where."""
    return json_response(await _expert_record(request, "dump"))


async def _expert_record(request: Request, verb: str) -> Any:
    try:
        return await request.app.state.service.call(f"{verb}_expert_record")
    except EngineRefusal as error:
        raise RequestError(str(error)) from error


def _timeout_s(text: str | None) -> float:
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_FLUSH_TIMEOUT_S:
        raise out_of_range("timeout", text, 0, MAX_FLUSH_TIMEOUT_S, why=" seconds")
    return value
