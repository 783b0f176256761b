"""What data answers tell a gateway beside their content (PROTOCOL.md, sections 2 and 4)."""

from starlette.requests import Request
from starlette.types import Scope

from jaxserve.messages import EngineClient, RankLoad
from jaxserve.server.sequence import Sequence

SEQUENCES = "jaxserve.sequences"  # where a data route leaves a request's sequences in its scope


def worker_headers(client: EngineClient, scope: Scope, status: int) -> dict[str, str]:
    """Instance and load on every answer; the cached prompt tokens on one that brings tokens.

    The load is that of the rank the request was sent to, or of the whole instance.
    """
    sequences: list[Sequence] = scope.get(SEQUENCES, [])
    loads = client.loads
    rank = sequences[0].request.dp_rank if sequences else None
    headers = {
        "x-worker-instance": client.info.instance_id,
        "x-worker-load": _as_text(loads if rank is None else [loads[rank]]),
    }
    if sequences and status < 400:
        headers["x-cached-tokens"] = str(cached_tokens(sequences))
    return headers


def cached_tokens(sequences: list[Sequence]) -> int:
    """Of all prompts; a prompt counts once, whatever n is."""
    prompts = {id(s.request.input_ids): s.cached_tokens for s in reversed(sequences)}
    return sum(prompts.values())


def wants_tracking(request: Request) -> bool:
    """Whether a gateway asks for the token ids behind each event."""
    return request.headers.get("x-resume") == "track"


def token_comment(sequence: Sequence) -> bytes:
    """The line in front of an event that names the tokens it brings; empty when nobody asked."""
    if not sequence.tracked or not (ids := sequence.take_ids()):
        return b""
    return b": tokens %b\n" % ",".join(map(str, ids)).encode()


def _as_text(loads: list[RankLoad]) -> str:
    usage = sum(load.kv_usage for load in loads) / len(loads)
    return (
        f"running={sum(load.running for load in loads)}, waiting={sum(load.waiting for load in loads)}, "
        f"queued_tokens={sum(load.queued_tokens for load in loads)}, kv_usage={usage:.4g}"
    )
