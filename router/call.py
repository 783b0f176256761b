"""One client request as the gateway sees it: the few fields it routes by, and the bytes it passes on."""

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from router.errors import RequestError

if TYPE_CHECKING:
    from router.resume import Tracker

EMPTY = msgspec.Raw(b"")
BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what decoding raises
_raw = msgspec.Raw


class Fields(msgspec.Struct):
    """The fields of any data route's JSON body that routing reads; prompts stay undecoded bytes."""

    model: str | None = None
    stream: bool | None = None
    text: _raw = EMPTY  # /generate
    input_ids: _raw = EMPTY
    messages: _raw = EMPTY  # chat, Anthropic
    system: _raw = EMPTY
    prompt: _raw = EMPTY  # completions, tokenize
    input: _raw = EMPTY  # embeddings, responses
    query: _raw = EMPTY  # rerank
    cache_salt: str | None = None
    extra_key: str | None = None
    lora_path: _raw = EMPTY
    routing_key: str | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None

    def salt(self) -> str:
        """What prompts must agree in to share a cache, beside their tokens (PROTOCOL.md, 3.1)."""
        return "\0".join(part for part in (self.cache_salt, self.extra_key) if part)


_decode = msgspec.json.Decoder(Fields).decode


@dataclass(frozen=True)
class Route:
    """A data route: its path, the prefix of request ids made for it, and how its errors look."""

    path: str
    id_prefix: str
    multipart: bool = False
    streams: bool = False


ROUTES = {
    route.path: route
    for route in (
        Route("/generate", "gnt-", streams=True),
        Route("/v1/chat/completions", "chatcmpl-", streams=True),
        Route("/v1/completions", "cmpl-", streams=True),
        Route("/v1/messages", "msg_", streams=True),
        Route("/v1/messages/count_tokens", "msg_"),
        Route("/v1/responses", "resp-", streams=True),
        Route("/v1/embeddings", "req-"),
        Route("/v1/classify", "req-"),
        Route("/classify", "req-"),
        Route("/encode", "req-"),
        Route("/v1/score", "req-"),
        Route("/rerank", "req-"),
        Route("/v1/rerank", "req-"),
        Route("/tokenize", "req-"),
        Route("/v1/tokenize", "req-"),
        Route("/detokenize", "req-"),
        Route("/v1/detokenize", "req-"),
        Route("/v1/audio/transcriptions", "req-", multipart=True),
    )
}


class Call:
    """One request on its way. `prompt` is undecoded JSON: equal prompts have equal leading bytes."""

    __slots__ = (
        "attempts",
        "body",
        "cache_root",
        "chain",
        "decision",
        "fields",
        "model",
        "pages",
        "path",
        "predicted_tokens",
        "prompt",
        "prompt_tokens",
        "request_id",
        "route",
        "routing_key",
        "status",
        "stream",
        "target_worker",
        "token_ids",
        "tracker",
        "worker_url",
    )

    def __init__(self, route: Route, body: bytes | bytearray) -> None:
        self.route = route
        self.path = route.path
        self.body = body
        self.fields: Fields | None = None
        self.model: str | None = None
        self.stream = False
        self.prompt: bytes = b""
        self.prompt_tokens = 0  # estimate
        self.routing_key: str | None = None
        self.target_worker: str | None = None
        self.request_id = b""
        self.chain: list[int] | None = None  # block hashes, filled by cache_aware
        self.token_ids: list[int] | None = None  # of the prompt, when exact routing knows them
        self.cache_root = 0  # parent of the first page, set with token_ids
        self.pages: dict[int, list[int]] = {}  # page hashes by page size
        self.tracker: Tracker | None = None  # of a stream that can be resumed
        self.decision = ""  # why this worker
        self.predicted_tokens = -1  # cached tokens expected there; -1: no opinion
        self.attempts = 0
        self.worker_url = ""  # of the last attempt
        self.status = 0  # of the answer that goes to the client

    def parse(self, prompt: bool) -> None:
        """Read the body's routing fields; with `prompt`, its prompt too. Raises RequestError(400).

        A field of an unexpected type is the worker's to judge: the request is routed without fields.
        """
        if self.route.multipart:
            return
        try:
            fields = _decode(self.body)
        except msgspec.ValidationError:
            self.stream = bool(_object(self.body).get("stream"))
            return
        except BAD_JSON as error:
            raise _not_json(error) from error
        self.fields = fields
        self.model = fields.model
        self.stream = fields.stream is True
        if prompt:
            f = fields
            raw = f.messages or f.text or f.prompt or f.input_ids or f.input or f.query
            data = bytes(raw)
            if f.system:
                data = bytes(f.system) + data
            self.prompt = data
            self.prompt_tokens = len(data) // 4

    def prompt_text(self) -> str:
        """The prompt's text: message contents, text or prompt joined with spaces; ids as numbers.

        Roles and templates are left out. "" when there is no prompt or it is not of a known shape.
        """
        f = self.fields
        if f is None:
            return ""
        raw = f.messages or f.text or f.prompt or f.input_ids or f.input or f.query
        if not raw:
            return ""
        try:
            return " ".join(_texts(msgspec.json.decode(raw)))
        except RecursionError:
            return ""


def _texts(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict):
        return _texts(value.get("content", value.get("text")))
    if isinstance(value, (int, float)):
        return [str(value)]
    return []


def _object(body: bytes | bytearray) -> dict:
    """The body, if it is a JSON object. Raises RequestError(400)."""
    try:
        value = msgspec.json.decode(body)
    except BAD_JSON as error:
        raise _not_json(error) from error
    if not isinstance(value, dict):
        raise RequestError(400, "invalid_json", "the request body must be a JSON object")
    return value


def _not_json(error: Exception) -> RequestError:
    return RequestError(400, "invalid_json", f"the request body is not valid JSON: {error}")


_random = random.Random(int.from_bytes(os.urandom(16), "big"))


def new_request_id(prefix: str) -> bytes:
    """`prefix` and 24 hexadecimal digits. Unguessable enough to tell requests apart, not a secret."""
    return f"{prefix}{_random.getrandbits(96):024x}".encode()
