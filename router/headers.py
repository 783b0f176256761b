"""The bytes of one exchange: what of the client's request goes to the worker, what of its answer back."""

import re
from dataclasses import dataclass

from router.call import Call
from router.workers import Load, Worker

# Of one connection only (RFC 9110 7.6.1), or set anew for the worker. accept-encoding: a compressed
# answer hides cached_tokens and stream events, and compression belongs at the edge.
_NOT_FORWARDED = frozenset(
    b"host connection keep-alive proxy-connection te trailer transfer-encoding upgrade expect "
    b"content-length accept-encoding proxy-authorization x-smg-target-worker x-resume".split()
)
_NOT_RETURNED = frozenset(
    b"connection keep-alive proxy-connection trailer transfer-encoding upgrade x-request-id "
    b"x-worker-load x-worker-instance x-cached-tokens x-smg-routed-worker-id".split()
)


@dataclass(slots=True)
class ClientHeaders:
    """What the gateway reads of the client's headers; `forward` is ready to be sent on."""

    forward: bytes = b""
    content_type: bytes = b""
    authorization: bytes | None = None
    x_api_key: bytes | None = None
    content_length: int = 0
    request_id: bytes | None = None
    traceparent: bytes | None = None  # also in `forward`
    routing_key: str | None = None
    target_worker: str | None = None


def read_headers(headers: list[tuple[bytes, bytes]], id_ranks: dict[bytes, int]) -> ClientHeaders:
    """One pass over an ASGI header list (lower-case names). `id_ranks`: request-id headers, best first.

    Authorization is kept out of `forward`: whether it goes on depends on the worker.
    """
    found = ClientHeaders()
    lines = []
    id_rank = len(id_ranks)
    for name, value in headers:
        if name in _NOT_FORWARDED:
            if name == b"content-length":
                found.content_length = int(value) if value.isdigit() else 0
            elif name == b"x-smg-target-worker":
                found.target_worker = value.decode("latin-1")
            continue
        if name == b"authorization":
            found.authorization = value
            continue
        if name == b"content-type":
            found.content_type = value
        elif name == b"x-smg-routing-key":
            found.routing_key = value.decode("latin-1") or None
        elif name == b"traceparent":
            found.traceparent = value
        elif name == b"x-api-key":
            found.x_api_key = value
        elif name in id_ranks:
            if value and id_ranks[name] < id_rank and len(value) <= 256:
                id_rank = id_ranks[name]
                found.request_id = value
            if name == b"x-request-id":
                continue  # sent anew
        lines.append(name + b": " + value + b"\r\n")
    found.forward = b"".join(lines)
    return found


def request_head(
    method: str,
    target: bytes,
    worker: Worker,
    client: ClientHeaders,
    request_id: bytes,
    length: int,
    more: bytes = b"",
) -> bytes:
    """Request line and headers for `worker`, with the empty line. `length`: bytes of the body; `more`:
    header lines of our own."""
    auth = more
    if client.authorization is not None and not worker.spec.api_key:
        auth += b"authorization: " + client.authorization + b"\r\n"
    return b"".join(
        (
            method.encode(),
            b" ",
            worker.path_prefix,
            target,
            b" HTTP/1.1\r\n",
            worker.request_head,
            auth,
            client.forward,
            b"x-request-id: ",
            request_id,
            b"\r\ncontent-length: %d\r\n\r\n" % length,
        )
    )


@dataclass(slots=True)
class Answer:
    """What the gateway reads of a worker's response headers; `headers` go back to the client."""

    headers: list[tuple[bytes, bytes]]
    length: int | None = None  # None: chunked or until close
    event_stream: bool = False
    load: Load | None = None
    cached_tokens: int | None = None
    instance: str | None = None
    retry_after_s: float | None = None


def read_answer(headers: list[tuple[bytes, bytes]]) -> Answer:
    """One pass over a worker's headers (lower-case names)."""
    back = []
    answer = Answer(back)
    for item in headers:
        name, value = item
        if name in _NOT_RETURNED:
            if name == b"x-worker-load":
                answer.load = parse_load(value)
            elif name == b"x-cached-tokens":
                answer.cached_tokens = int(value) if value.isdigit() and len(value) <= 15 else None
            elif name == b"x-worker-instance":
                answer.instance = value.decode("latin-1")
            continue
        if name == b"content-length":
            answer.length = int(value)
        elif name == b"content-type":
            answer.event_stream = value.startswith(b"text/event-stream")
        elif name == b"retry-after" and value.isdigit():
            answer.retry_after_s = float(value)
        back.append(item)
    return answer


def parse_load(value: bytes) -> Load | None:
    """`running=3, waiting=1, queued_tokens=512, kv_usage=0.42`; None when it is malformed."""
    load = Load()
    try:
        for item in value.decode("ascii").split(","):
            name, _, number = item.strip().partition("=")
            if name == "kv_usage":
                load.kv_usage = min(1.0, max(0.0, float(number)))
            elif name in ("running", "waiting", "queued_tokens"):
                setattr(load, name, int(number))
    except ValueError:
        return None
    return load


_find_cached = re.compile(rb'"cached_tokens" ?: ?(\d{1,15})').search
_find_prompt = re.compile(rb'"prompt_tokens" ?: ?(\d{1,15})').search
_find_completion = re.compile(rb'"completion_tokens" ?: ?(\d{1,15})').search


def usage_in(body: bytes) -> tuple[int, int, int | None]:
    """(prompt tokens, completion tokens, cached tokens) as JSON bytes first name them; 0, 0, None without.

    The body is not decoded: a quoted name inside a string value is escaped there and never matches.
    """
    prompt, completion, cached = _find_prompt(body), _find_completion(body), _find_cached(body)
    return (
        int(prompt[1]) if prompt else 0,
        int(completion[1]) if completion else 0,
        int(cached[1]) if cached else None,
    )


_find_tiers = re.compile(rb'"cached_tokens_details" ?: ?\{([^{}]*)\}').search
_find_tier = re.compile(rb'"(device|host|storage)" ?: ?(\d{1,15})').findall


def tiers_in(body: bytes) -> dict[str, int]:
    """Cached tokens by the tier they came from, as SGLang's `/generate` tells them; {} when it does not."""
    found = _find_tiers(body) if b'"cached_tokens_details"' in body else None
    return {name.decode(): int(number) for name, number in _find_tier(found[1])} if found else {}


def with_dp_rank(call: Call, worker: Worker, body: bytes | bytearray) -> bytes | bytearray:
    """`body` with `routed_dp_rank` spliced in as its first key, unless the client chose a rank."""
    fields = call.fields
    if worker.dp_rank is None or fields is None:
        return body
    if fields.routed_dp_rank is not None or fields.data_parallel_rank is not None:
        return body
    rest = bytes(body).lstrip()[1:]
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return b'{"routed_dp_rank":%d%s' % (worker.dp_rank, comma) + rest
