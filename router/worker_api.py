"""`/workers`: add, look at, change and remove workers. Changes are accepted as jobs (202)."""

import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.control_body import control_body
from router.jobs import Job, Jobs, Refused
from router.workers import ApiKey, Priority, Registry, Worker, WorkerSpec


class WorkerPatch(msgspec.Struct, kw_only=True):
    """What PATCH may change; what is left out stays."""

    priority: Priority | None = None
    cost: float | None = None
    labels: dict[str, str] | None = None
    api_key: ApiKey | None = None
    model_id: str | None = None


class WorkerApi:
    """Handlers over the registry. Errors are `{"error": message, "code": CODE}`, as the Rust gateway's."""

    def __init__(self, registry: Registry, jobs: Jobs) -> None:
        self.registry = registry
        self.jobs = jobs

    def routes(self) -> list[Route]:
        return [
            Route("/workers", _guarded(self.add), methods=["POST"]),
            Route("/workers", _guarded(self.list), methods=["GET"]),
            Route("/workers/{id}", _guarded(self.get), methods=["GET"]),
            Route("/workers/{id}", _guarded(self.replace), methods=["PUT"]),
            Route("/workers/{id}", _guarded(self.patch), methods=["PATCH"]),
            Route("/workers/{id}", _guarded(self.delete), methods=["DELETE"]),
        ]

    async def add(self, request: Request) -> Response:
        worker = self.jobs.add(await _decoded(request, WorkerSpec))
        return _accepted(worker, "Worker addition queued for background processing", created=True)

    async def list(self, request: Request) -> Response:
        model = request.query_params.get("model")
        workers = [w for w in self.registry if model is None or w.serves(model)]
        stats = {"prefill_count": 0, "decode_count": 0, "regular_count": len(workers)}
        return _json(200, {"workers": [w.describe() for w in workers], "total": len(workers), "stats": stats})

    async def get(self, request: Request) -> Response:
        worker, job = self._found(request)
        view = worker.describe()
        if job is not None and job.status != "done":
            view["job_status"] = job.describe()
        return _json(200, view)

    async def replace(self, request: Request) -> Response:
        worker = self._registered(request)
        self.jobs.update(worker, await _decoded(request, WorkerSpec))
        return _accepted(worker, "Worker replacement queued for background processing")

    async def patch(self, request: Request) -> Response:
        worker = self._registered(request)
        patch = await _decoded(request, WorkerPatch)
        changes = {k: v for k, v in msgspec.structs.asdict(patch).items() if v is not None}
        self.jobs.update(worker, msgspec.structs.replace(worker.spec, **changes))
        return _accepted(worker, "Worker update queued for background processing")

    async def delete(self, request: Request) -> Response:
        worker = self._registered(request)
        self.jobs.remove(worker)
        return _accepted(worker, "Worker removal queued for background processing")

    def _found(self, request: Request) -> tuple[Worker, Job | None]:
        worker_id = request.path_params["id"]
        try:
            uuid.UUID(worker_id)
        except ValueError:
            raise Refused(400, "BAD_REQUEST", f"{worker_id!r} is not a worker id") from None
        found = self.jobs.find(worker_id)
        if found is None:
            raise Refused(404, "WORKER_NOT_FOUND", f"Worker {worker_id} not found")
        return found

    def _registered(self, request: Request) -> Worker:
        worker, _ = self._found(request)
        if worker.id not in self.registry.workers:
            raise Refused(404, "WORKER_NOT_FOUND", f"Worker {worker.id} not found")
        return worker


def _guarded(handler):
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as error:
            return _json(error.status, {"error": str(error), "code": error.code})

    return guarded


async def _decoded(request: Request, kind: type) -> Any:
    try:
        return msgspec.json.decode(await control_body(request.receive), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, "BAD_REQUEST", f"bad request body: {error}") from error


def _accepted(worker: Worker, message: str, *, created: bool = False) -> Response:
    location = f"/workers/{worker.id}"
    body = {
        "status": "accepted",
        "worker_id": worker.id,
        "url": worker.url,
        "location": location,
        "message": message,
    }
    return _json(202, body, {"location": location} if created else None)


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")
