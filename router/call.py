"""One client request as the gateway sees it: the few fields it routes by, and the bytes it passes on."""

import os
from binascii import b2a_hex
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import msgspec

from router.errors import RequestError

if TYPE_CHECKING:
    from router.resume import Tracker
    from router.workers import Worker

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
    """A data route: its path, the prefix of request ids made for it, and how its errors look.

    `ranked`: workers know `routed_dp_rank` in its body.
    """

    path: str
    id_prefix: bytes
    multipart: bool = False
    streams: bool = False
    ranked: bool = False


ROUTES = {
    route.path: route
    for route in (
        Route("/generate", b"gnt-", streams=True, ranked=True),
        Route("/v1/chat/completions", b"chatcmpl-", streams=True, ranked=True),
        Route("/v1/completions", b"cmpl-", streams=True, ranked=True),
        Route("/v1/messages", b"msg_", streams=True),
        Route("/v1/messages/count_tokens", b"msg_"),
        Route("/v1/responses", b"resp-", streams=True),
        Route("/v1/embeddings", b"req-"),
        Route("/v1/classify", b"req-"),
        Route("/classify", b"req-"),
        Route("/encode", b"req-"),
        Route("/v1/score", b"req-"),
        Route("/rerank", b"req-"),
        Route("/v1/rerank", b"req-"),
        Route("/tokenize", b"req-"),
        Route("/v1/tokenize", b"req-"),
        Route("/detokenize", b"req-"),
        Route("/v1/detokenize", b"req-"),
        Route("/v1/audio/transcriptions", b"req-", multipart=True),
    )
}


class Call(msgspec.Struct):
    """One request on its way. `prompt` is undecoded JSON: equal prompts have equal leading bytes."""

    route: Route
    body: bytes | bytearray
    fields: Fields | None = None
    model: str | None = None  # None: whatever is served
    stream: bool = False
    prompt: bytes = b""
    prompt_tokens: int = 0  # estimate
    routing_key: str | None = None
    target_worker: "Worker | None" = None  # whom the client asked for
    request_id: bytes = b""
    chain: list[int] | None = None  # block hashes, filled by cache_aware
    token_ids: list[int] | None = None  # of the prompt, when exact routing knows them
    cache_root: int = 0  # parent of the first page, set with token_ids
    pages: dict[int, list[int]] = {}  # page hashes by page size; a new dict for each call
    tracker: "Tracker | None" = None  # of a stream that can be resumed
    decision: str = ""  # why this worker
    predicted_tokens: int = -1  # cached tokens expected there; -1: no opinion
    attempts: int = 0
    worker_url: str = ""  # of the last attempt
    status: int = 0  # of the answer that goes to the client

    @property
    def path(self) -> str:
        return self.route.path

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


_process_id = os.urandom(8).hex().encode()
_numbers = count(int.from_bytes(os.urandom(3), "big"))


def new_request_id(prefix: bytes) -> bytes:
    """`prefix` and 24 hexadecimal digits: 16 drawn once a process, 8 that count. Unique, not a secret."""
    return prefix + _process_id + b2a_hex((next(_numbers) & 0xFFFFFFFF).to_bytes(4))
