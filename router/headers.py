"""The bytes of one exchange: what of the client's request goes to the worker, what of its answer back."""

import re
from typing import Annotated

import msgspec

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


# Of a number in a header. Python refuses to read thousands of digits, and floats hold no such numbers.
MAX_DIGITS = 20


class ClientHeaders(msgspec.Struct):
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


# What a name means to `read_headers` and `read_answer`; names without a meaning go on as they are.
_DROP, _LENGTH, _TYPE, _TARGET, _ROUTING, _TRACE, _AUTH, _KEY = range(8)
_CLIENT_NAMES = dict.fromkeys(_NOT_FORWARDED, _DROP) | {
    b"content-length": _LENGTH,
    b"content-type": _TYPE,
    b"x-smg-target-worker": _TARGET,
    b"x-smg-routing-key": _ROUTING,
    b"traceparent": _TRACE,
    b"authorization": _AUTH,
    b"x-api-key": _KEY,
}


def read_headers(headers: list[tuple[bytes, bytes]], id_ranks: dict[bytes, int]) -> ClientHeaders:
    """One pass over an ASGI header list (lower-case names). `id_ranks`: request-id headers, best first.

    Keys are kept out of `forward`: whether they go on depends on the worker.
    """
    found = ClientHeaders()
    lines = []
    id_rank = len(id_ranks)
    for name, value in headers:
        meaning = _CLIENT_NAMES.get(name)
        if meaning is None:
            if name in id_ranks:
                if value and id_ranks[name] < id_rank and len(value) <= 256:
                    id_rank = id_ranks[name]
                    found.request_id = value
                if name == b"x-request-id":
                    continue  # sent anew
        elif meaning == _DROP:
            continue
        elif meaning == _TYPE:
            found.content_type = value
        elif meaning == _LENGTH:
            found.content_length = int(value) if value.isdigit() and len(value) <= MAX_DIGITS else 0
            continue
        elif meaning == _AUTH:
            found.authorization = value
            continue
        elif meaning == _TARGET:
            found.target_worker = value.decode("latin-1")
            continue
        elif meaning == _ROUTING:
            found.routing_key = value.decode("latin-1") or None
        elif meaning == _TRACE:
            found.traceparent = value
        else:
            found.x_api_key = value
            continue
        lines += (name, b": ", value, b"\r\n")
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
    if not worker.spec.api_key:
        if client.authorization is not None:
            auth += b"authorization: " + client.authorization + b"\r\n"
        if client.x_api_key is not None:
            auth += b"x-api-key: " + client.x_api_key + b"\r\n"
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


class Answer(msgspec.Struct):
    """What the gateway reads of a worker's response headers; `headers` go back to the client."""

    headers: list[tuple[bytes, bytes]]
    length: int | None = None  # None: chunked or until close
    event_stream: bool = False
    load: Load | None = None
    cached_tokens: int | None = None
    instance: str | None = None
    retry_after_s: float | None = None


_LOAD, _CACHED, _INSTANCE, _RETRY = range(8, 12)
_ANSWER_NAMES = dict.fromkeys(_NOT_RETURNED, _DROP) | {
    b"content-length": _LENGTH,
    b"content-type": _TYPE,
    b"retry-after": _RETRY,
    b"x-worker-load": _LOAD,
    b"x-cached-tokens": _CACHED,
    b"x-worker-instance": _INSTANCE,
}


def read_answer(headers: list[tuple[bytes, bytes]]) -> Answer:
    """One pass over a worker's headers (lower-case names)."""
    back = []
    answer = Answer(back)
    for item in headers:
        name, value = item
        meaning = _ANSWER_NAMES.get(name)
        if meaning is None:
            pass
        elif meaning == _LENGTH:
            if len(value) > MAX_DIGITS:  # zeros in front
                value = value.strip().lstrip(b"0") or b"0"
                item = (name, value)
            answer.length = int(value)
        elif meaning == _TYPE:
            answer.event_stream = value.startswith(b"text/event-stream")
        elif meaning == _RETRY:
            answer.retry_after_s = float(value) if value.isdigit() else None
        else:
            if meaning == _LOAD:
                answer.load = parse_load(value)
            elif meaning == _CACHED:
                answer.cached_tokens = int(value) if value.isdigit() and len(value) <= 15 else None
            elif meaning == _INSTANCE:
                answer.instance = value.decode("latin-1")
            continue
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
                if len(number) > MAX_DIGITS:
                    return None
                setattr(load, name, int(number))
    except ValueError:
        return None
    return load


Count = Annotated[int, msgspec.Meta(ge=0, lt=10**15)]


class Usage(msgspec.Struct):
    """What a worker says of one answer's tokens, in SGLang's or OpenAI's names."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count | None = None
    cached_tokens_details: dict[str, Count] | None = None
    prompt_tokens_details: "Usage | None" = None  # OpenAI's place of cached_tokens


class _Reply(msgspec.Struct):
    meta_info: Usage | None = None
    usage: Usage | None = None


_decode_reply = msgspec.json.Decoder(_Reply).decode


def usage_of(body: bytes) -> Usage:
    """The token counts of a whole answer; as `usage_in` finds them when it is no object of a known shape."""
    try:
        reply = _decode_reply(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        reply = None
    usage = reply and (reply.meta_info or reply.usage)
    if not usage:
        return Usage(*usage_in(body), tiers_in(body))
    if usage.cached_tokens is None and usage.prompt_tokens_details is not None:
        usage.cached_tokens = usage.prompt_tokens_details.cached_tokens
    return usage


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
    """`body` with `routed_dp_rank` spliced in as its first key, unless the client chose a rank or the route
    knows none."""
    fields = call.fields
    if worker.dp_rank is None or fields is None or not call.route.ranked:
        return body
    if fields.routed_dp_rank is not None or fields.data_parallel_rank is not None:
        return body
    rest = bytes(body).lstrip()[1:]
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return b'{"routed_dp_rank":%d%s' % (worker.dp_rank, comma) + rest
