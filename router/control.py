"""The control surface: health, models, loads, cache flush, metrics, and what is asked of all workers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from router import __version__
from router.control_body import control_body
from router.errors import RequestError
from router.metrics import joined
from router.policies import Policy
from router.upstream import UpstreamError, json_of
from router.workers import Load, Registry, Worker

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FLUSH_TIMEOUT_S = 30.0


class Control:
    """Handlers. `is_draining()` is asked by /readiness, `await metrics_text()` by /metrics."""

    def __init__(self, registry: Registry, policy: Policy, is_draining, metrics_text) -> None:
        self.registry = registry
        self.policy = policy
        self.is_draining = is_draining
        self.text = metrics_text
        self.on_flushed: Callable[[Worker], None] | None = None

    def public_routes(self) -> list[Route]:
        """Open even when API keys are configured."""
        return [
            Route("/health", self.alive, methods=["GET"]),
            Route("/liveness", self.alive, methods=["GET"]),
            Route("/readiness", self.readiness, methods=["GET"]),
            Route("/health_generate", self.one_of("GET", "/health_generate"), methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/model_info", self.one_of("GET", "/model_info", "/get_model_info"), methods=["GET"]),
            Route("/get_model_info", self.one_of("GET", "/model_info", "/get_model_info"), methods=["GET"]),
            Route("/metrics", self.metrics_text, methods=["GET"]),
        ]

    def guarded_routes(self) -> list[Route]:
        """Need an API key when keys are configured."""
        server_info = self.one_of("GET", "/server_info", "/get_server_info")
        return [
            Route("/server_info", server_info, methods=["GET"]),  # asked for with the worker's key
            Route("/get_server_info", server_info, methods=["GET"]),
            Route("/get_load", self.older_loads, methods=["GET"]),
            Route("/get_loads", self.loads, methods=["GET"]),
            Route("/loads", self.loads, methods=["GET"]),
            Route("/v1/loads", self.loads, methods=["GET"]),
            Route("/flush_cache", self.flush_cache, methods=["POST", "GET"]),
            Route("/abort_request", self.everyone("/abort_request"), methods=["POST"]),
            *(
                Route(
                    f"/{what}_expert_distribution_record",
                    self.everyone(f"/{what}_expert_distribution_record"),
                    methods=["GET", "POST"],
                )
                for what in ("start", "stop", "dump")
            ),
            Route("/engine_metrics", self.engine_metrics, methods=["GET"]),
        ]

    async def alive(self, request: Request) -> Response:
        return PlainTextResponse("OK")

    async def readiness(self, request: Request) -> Response:
        """Ready means: a request sent now would find a worker."""
        usable, total = len(self.registry.usable(None)), len(self.registry)
        counts = {"healthy_workers": usable, "total_workers": total}
        if self.is_draining():
            return _json({"status": "not ready", "reason": "draining", **counts}, 503)
        if not usable:
            return _json({"status": "not ready", "reason": "insufficient healthy workers", **counts}, 503)
        return _json({"status": "ready", **counts})

    async def metrics_text(self, request: Request) -> Response:
        return Response(await self.text(), headers={"content-type": METRICS_TYPE})

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": list((await self._cards()).values())})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        card = (await self._cards()).get(name)
        if card is None:
            raise RequestError(
                404, "model_not_found", f"No worker available for model {name!r}", param="model"
            )
        return _json(card)

    async def _cards(self) -> dict[str, Any]:
        """Every model once, as its first worker describes it."""
        answers = await self._ask_all("GET", "/v1/models")
        cards: dict[str, Any] = {}
        for worker, answer in answers:
            data = _decoded(answer)
            listed = data.get("data") if isinstance(data, dict) else None
            for card in listed if isinstance(listed, list) else []:
                if isinstance(card, dict) and isinstance(card.get("id"), str):
                    cards.setdefault(card["id"], card)
            for name in worker.models:  # given at registration, or not listed any more
                cards.setdefault(name, {"id": name, "object": "model", "created": 0, "owned_by": "router"})
        return cards

    async def loads(self, request: Request) -> Response:
        """What the workers say of their load, and beside it what the gateway counts itself."""
        entries = []
        for asked, answer in await self._ask_all("GET", "/v1/loads", "/get_load"):
            of_process = self.registry.of_process(asked.spec.url) or [asked]
            for worker, ranks in _by_worker(of_process, _ranks(_decoded(answer))):
                if ranks:
                    worker.report(_summed(ranks, asyncio.get_running_loop().time()))
                for rank in ranks or [{"dp_rank": worker.dp_rank or 0}]:
                    entry = {
                        "worker": worker.url,
                        "worker_type": worker.spec.worker_type,
                        "load": worker.in_flight + worker.sibling_requests,
                        "pending_tokens": worker.pending_tokens + worker.sibling_tokens,
                        **rank,
                    }
                    entry.setdefault("num_running_reqs", worker.in_flight + worker.sibling_requests)
                    entry.setdefault("num_waiting_reqs", 0)
                    entries.append(entry)
        total = {
            "total_running_reqs": sum(e["num_running_reqs"] for e in entries),
            "total_waiting_reqs": sum(e["num_waiting_reqs"] for e in entries),
        }
        total["total_reqs"] = total["total_running_reqs"] + total["total_waiting_reqs"]
        return _json(
            {
                "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "version": __version__,
                "dp_rank_count": len(entries),
                "loads": entries,
                "aggregate": total,
            }
        )

    async def older_loads(self, request: Request) -> Response:
        """`/get_load` of every worker in one list, each entry with the `worker` that it is of."""
        entries = []
        for worker, answer in await self._ask_all("GET", "/get_load"):
            ranks = _decoded(answer)
            for rank in ranks if isinstance(ranks, list) else []:
                if isinstance(rank, dict):
                    entries.append({"worker": worker.spec.url, **rank})
        return _json(entries)

    async def flush_cache(self, request: Request) -> Response:
        """200 when every worker flushed, 206 when some did, 503 when none could or there is none."""
        answers = _some(await self._ask_all("POST", "/flush_cache", timeout_s=FLUSH_TIMEOUT_S))
        flushed, failed = [], []
        for worker, answer in answers:
            if isinstance(answer, tuple) and answer[0] == 200:
                for rank in self.registry.of_process(worker.spec.url):  # one was asked, and all flushed
                    self.policy.cleared(rank)
                    if self.on_flushed is not None:
                        self.on_flushed(rank)
                flushed.append(worker.url)
            else:
                failed.append({"worker": worker.url, "error": _text(answer)})
        status = "success" if not failed else "partial_success" if flushed else "failure"
        message = f"flushed the cache of {len(flushed)} of {len(answers)} workers"
        body = {
            "status": status,
            "message": message,
            "workers_flushed": len(flushed),
            "total_http_workers": len(answers),
            "total_workers": len(self.registry),
            "successful": flushed,
            "failed": failed,
        }
        return _json(body, 200 if not failed else 206 if flushed else 503)

    async def engine_metrics(self, request: Request) -> Response:
        """The workers' own /metrics as one, each sample with the `worker` that it is of."""
        answers = await self._ask_all("GET", "/metrics")
        texts = [
            (w.url, a[1].decode("utf-8", "replace"))
            for w, a in answers
            if isinstance(a, tuple) and a[0] == 200
        ]
        return Response(joined(texts), headers={"content-type": METRICS_TYPE})

    def one_of(self, method: str, *targets: str):
        """A handler that passes on the first worker's answer to the first of `targets` it knows."""

        async def handler(request: Request) -> Response:
            worker = _some(self.registry.usable(None))[0]
            answer: Any = None
            for target in targets:
                answer = await _asked(worker, method, target, b"", 10.0)
                if isinstance(answer, tuple) and answer[0] != 404:
                    return _passed_on(answer)
            raise RequestError(502, "upstream_error", f"worker {worker.url}: {_text(answer)}")

        return handler

    def everyone(self, target: str):
        """A handler that passes the request to every worker: 200 when one of them accepted it, else the
        answer of one that found it wrong, else 502; 503 when there is none."""

        async def handler(request: Request) -> Response:
            body = await control_body(request.receive)
            answers = _some(await self._ask_all("POST", target, body=body))
            told = [a for _, a in answers if isinstance(a, tuple)]
            if any(status == 200 for status, _ in told):
                results = [
                    {"worker": w.url, "status": a[0] if isinstance(a, tuple) else str(a)} for w, a in answers
                ]
                return _json({"results": results})
            for answer in told:
                if answer[0] == 400:
                    return _passed_on(answer)
            text = "; ".join(f"worker {w.url}: {_text(a)}" for w, a in answers)
            raise RequestError(502, "upstream_error", text)

        return handler

    async def _ask_all(
        self, method: str, *targets: str, body: bytes = b"", timeout_s: float = 5.0
    ) -> list[tuple[Worker, tuple[int, bytes] | UpstreamError]]:
        """Each ready process's answer to the first of `targets` that it knows, all at the same time."""
        workers: dict[str, Worker] = {}
        for worker in self.registry:
            if worker.status in ("ready", "draining"):
                workers.setdefault(worker.spec.url, worker)

        async def ask(worker: Worker) -> tuple[int, bytes] | UpstreamError:
            answer: tuple[int, bytes] | UpstreamError = (404, b"")
            for target in targets:
                answer = await _asked(worker, method, target, body, timeout_s)
                if not isinstance(answer, tuple) or answer[0] != 404:
                    break
            return answer

        answers = await asyncio.gather(*(ask(w) for w in workers.values()))
        return list(zip(workers.values(), answers, strict=True))


async def _asked(
    worker: Worker, method: str, target: str, body: bytes, timeout_s: float
) -> tuple[int, bytes] | UpstreamError:
    try:
        return await worker.pool.fetch(
            method, target, body=body, headers=worker.auth_headers(), timeout_s=timeout_s
        )
    except UpstreamError as error:
        return error


def _some[T: Sequence[Any]](found: T) -> T:
    """Workers, or their answers. Raises RequestError(503) when there are none."""
    if not found:
        raise RequestError(503, "no_available_workers", "no worker can take the request now", retry_after_s=1)
    return found


def _text(answer: tuple[int, bytes] | UpstreamError) -> str:
    """What went wrong with an answer that is not passed on."""
    return str(answer) if isinstance(answer, UpstreamError) else f"answered {answer[0]}"


def _passed_on(answer: tuple[int, bytes]) -> Response:
    status, body = answer
    is_json = json_of(body) is not None
    return Response(body, status, media_type="application/json" if is_json else "text/plain")


def _decoded(answer: tuple[int, bytes] | UpstreamError) -> Any:
    return None if isinstance(answer, UpstreamError) or answer[0] != 200 else json_of(answer[1])


def _ranks(data: Any) -> list[dict[str, Any]]:
    """Per-rank loads from `/v1/loads` (an object) or `/get_load` (a list, older names)."""
    ranks = data.get("loads") if isinstance(data, dict) else data
    out = []
    for rank in ranks if isinstance(ranks, list) else []:
        if not isinstance(rank, dict):
            continue
        rank = dict(rank)
        if "num_running_reqs" not in rank and isinstance(rank.get("num_reqs"), int):
            rank["num_running_reqs"] = rank["num_reqs"] - _count(rank, "num_waiting_reqs")
        rank["num_running_reqs"] = _count(rank, "num_running_reqs")
        rank["num_waiting_reqs"] = _count(rank, "num_waiting_reqs")
        out.append(rank)
    return out


def _by_worker(
    workers: list[Worker], ranks: list[dict[str, Any]]
) -> list[tuple[Worker, list[dict[str, Any]]]]:
    """The ranks of one process by the worker that they are: one, or with --dp-aware one each."""
    if workers[0].dp_rank is None:
        return [(workers[0], ranks)]
    return [(w, [r for i, r in enumerate(ranks) if r.get("dp_rank", i) == w.dp_rank]) for w in workers]


def _count(rank: dict[str, Any], name: str) -> int:
    value = rank.get(name)
    return min(max(0, value), 1 << 53) if isinstance(value, int) else 0


def _summed(ranks: list[dict[str, Any]], now_s: float) -> Load:
    usage = [r["token_usage"] for r in ranks if isinstance(r.get("token_usage"), (int, float))]
    return Load(
        running=sum(r["num_running_reqs"] for r in ranks),
        waiting=sum(r["num_waiting_reqs"] for r in ranks),
        queued_tokens=sum(_count(r, "num_waiting_uncached_tokens") for r in ranks),
        kv_usage=min(1.0, max(0.0, *usage)) if usage else 0.0,
        at_s=now_s,
    )


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
