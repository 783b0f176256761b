"""SGLang's own data routes: /generate, /abort_request, /tokenize, /detokenize."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.errors import RequestError
from jaxserve.server.generate import as_reply, decode, encode, follow, prepare, token_lists
from jaxserve.server.sampling import check_entries, check_token_ids, sequence_limit
from jaxserve.server.schema import AbortBody, DetokenizeBody, GenerateBody, TokenizeBody, parse
from jaxserve.server.sequence import Sequence
from jaxserve.server.service import Service
from jaxserve.server.stream import EventStream, json_response, read_json_body, sse, unless_gone
from jaxserve.server.worker_headers import SEQUENCES, token_comment, wants_tracking


async def generate(request: Request) -> Response:
    """POST or PUT /generate."""
    service: Service = request.app.state.service
    body = parse(GenerateBody, await read_json_body(request))
    sequences, batch = await prepare(service, body, wants_tracking(request))
    request.scope[SEQUENCES] = sequences
    if body.stream:
        return EventStream(_events(service, body, sequences, batch), sequences[0].tracked)
    await unless_gone(request, service.complete(sequences))
    replies = [as_reply(s, body) for s in sequences]
    return json_response(replies if batch else replies[0])


async def _events(
    service: Service, body: GenerateBody, sequences: list[Sequence], batch: bool
) -> AsyncGenerator[bytes]:
    async with aclosing(follow(service, body, sequences, batch)) as events:
        async for sequence, event in events:
            yield token_comment(sequence) + sse(event)


async def abort_request(request: Request) -> Response:
    """POST /abort_request {rid} or {abort_all}. A rid that does not run is no error."""
    body = parse(AbortBody, await read_json_body(request))
    if not body.rid and not body.abort_all:
        raise RequestError("give rid, or abort_all=true", param="rid")
    await request.app.state.service.abort(body.rid, body.abort_all)
    return Response(status_code=200)


async def tokenize(request: Request) -> Response:
    """POST /tokenize {prompt, add_special_tokens}: {tokens, count, max_model_len}, lists for a list."""
    service: Service = request.app.state.service
    body = parse(TokenizeBody, await read_json_body(request))
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    check_entries(texts, service.client.info, "prompt")
    tokens = await encode(service, texts, "prompt", body.add_special_tokens)
    limit = sequence_limit(service.client.info)
    if isinstance(body.prompt, str):
        return json_response({"tokens": tokens[0], "count": len(tokens[0]), "max_model_len": limit})
    return json_response({"tokens": tokens, "count": [len(t) for t in tokens], "max_model_len": limit})


async def detokenize(request: Request) -> Response:
    """POST /detokenize {tokens, skip_special_tokens}: {text}, a list for a list of lists."""
    service: Service = request.app.state.service
    info = service.client.info
    body = parse(DetokenizeBody, await read_json_body(request))
    if service.tokenizer is None:
        raise RequestError("tokens cannot be decoded: this server runs with --skip-tokenizer-init")
    lists, batch = token_lists(body.tokens, info, "tokens")
    for ids in lists:
        check_entries(ids, info, "tokens")
        check_token_ids(ids, info, "tokens")
    texts = await decode(service, lists, body.skip_special_tokens)
    return json_response({"text": texts if batch else texts[0]})
