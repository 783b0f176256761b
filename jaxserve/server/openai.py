"""OpenAI's routes: /v1/models, /v1/completions, /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.chat_parts import CHANNELS, ChatParts, Parsers
from jaxserve.server.constraint import resolve
from jaxserve.server.errors import RequestError
from jaxserve.server.generate import (
    as_meta_info,
    beside_loop,
    build_sequences,
    check_dp_rank,
    check_rid,
    decode,
    encode,
    make_salt,
    parse_resume,
)
from jaxserve.server.openai_reply import (
    Answer,
    chat_choice,
    chat_chunks,
    completion_choice,
    completion_chunks,
    nothing_new,
)
from jaxserve.server.openai_schema import (
    COMPLETION_MAX_TOKENS,
    MAX_COMPLETION_LOGPROBS,
    ChatBody,
    CompletionBody,
    OpenAIBody,
    StreamUsage,
    ask_of,
    chat_max_tokens,
    check_chat,
    check_common,
    check_messages,
    check_tools,
    completion_prompts,
    forced_tools,
    sampling_params,
)
from jaxserve.server.sampling import GrammarSpec, check_entries, check_prompt, openai_name
from jaxserve.server.schema import MAX_TOP_LOGPROBS, SamplingParams, out_of_range, parse, show
from jaxserve.server.sequence import Sequence
from jaxserve.server.service import Service, new_rid
from jaxserve.server.stream import (
    BODY_BYTES,
    DONE,
    EventStream,
    json_response,
    read_json_body,
    sse,
    unless_gone,
)
from jaxserve.server.worker_headers import SEQUENCES, token_comment, wants_tracking
from jaxserve.text import reasoning
from jaxserve.text.channels import BEFORE_FINAL
from jaxserve.text.chat_template import ChatTemplateError, text_of

ANY_MODEL = ("", "default")  # names by which clients ask for whatever is served
ID_PREFIXES = {"text_completion": "cmpl", "chat.completion": "chatcmpl"}
MAX_TAG_TOKENS = 16  # of a prompt's end: a tag that its template closes or opens, and white space
QUIET_S = 15.0  # a chat that is held back for longer, in a long call of a tool, sends an empty chunk
STARTED_S = int(time.time())

Chunks = Callable[[Sequence], list[dict[str, Any]]]


async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_card(request.app.state.service)]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    check_model(service, request.path_params["model"])
    return json_response(_card(service))


def _card(service: Service) -> dict[str, Any]:
    info = service.client.info
    return {
        "id": service.model_name,
        "object": "model",
        "created": STARTED_S,
        "owned_by": "jaxserve",
        "root": info.model_path,
        "max_model_len": min(info.context_len, info.max_req_len),
    }


def check_model(service: Service, name: str | None) -> None:
    """Raises RequestError 404 for a model that is not the one served."""
    config = service.config
    if name is None or name in ANY_MODEL or name in (service.model_name, config.model_path):
        return
    raise RequestError(
        f"model {show(name)} is not served; {service.model_name!r} is",
        param="model",
        status=404,
        code="model_not_found",
    )


# ---- completions ----


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = parse(CompletionBody, await read_json_body(request))
    arrived_s = service.clock()
    check_model(service, body.model)
    usage = check_common(body)
    if body.best_of is not None and body.best_of != body.n:
        raise RequestError(
            f"best_of={show(body.best_of)} is not supported unless it equals n={show(body.n)}",
            param="best_of",
        )
    prompts, texts = await _completion_prompts(service, body)
    logprobs = {}
    if body.logprobs is not None:
        if not 0 <= body.logprobs <= MAX_COMPLETION_LOGPROBS:
            raise out_of_range("logprobs", body.logprobs, 0, MAX_COMPLETION_LOGPROBS)
        start = 0 if body.echo else -1
        logprobs = {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": body.logprobs}
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = sampling_params(body, max_tokens, sampling_defaults(service))
    if body.echo and body.resume is not None:
        raise RequestError("resume does not go with echo", param="resume")
    (grammar,) = await resolve(service, [ask_of(body)])
    answer = _answer(
        "text_completion", request, arrived_s, body, usage, prompts, params, GrammarSpec(grammar),
        logprobs, "prompt",
    )  # fmt: skip
    echoes = texts if body.echo else [None] * len(prompts)

    def echo(sequence: Sequence) -> str | None:
        return echoes[sequence.index // body.n]

    if body.stream:
        chunks: Chunks = lambda s: completion_chunks(answer, s, echo(s))  # noqa: E731
        return EventStream(_events(service, answer, chunks), answer.sequences[0].tracked)
    await unless_gone(request, service.complete(answer.sequences))
    choices = [completion_choice(answer, s, echo(s)) for s in answer.sequences]
    return json_response(answer.whole(choices))


async def _completion_prompts(service: Service, body: CompletionBody) -> tuple[list[list[int]], list[str]]:
    """(token ids, texts for echo). Raises RequestError."""
    info = service.client.info
    if not isinstance(body.prompt, str):
        check_entries(body.prompt, info, "prompt")
    prompts, is_text = completion_prompts(body)
    if service.tokenizer is None:
        raise RequestError("this route needs a tokenizer; the server runs with --skip-tokenizer-init")
    if is_text:
        return await encode(service, prompts, "prompt"), prompts  # type: ignore[arg-type, return-value]
    if not body.echo:
        return prompts, []  # type: ignore[return-value]
    for i, ids in enumerate(prompts):
        check_prompt(ids, info, f"prompt[{i}]" if len(prompts) > 1 else "prompt")  # type: ignore[arg-type]
    return prompts, await decode(service, prompts, False)  # type: ignore[arg-type, return-value]


# ---- chat ----


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = parse(ChatBody, await read_json_body(request))
    arrived_s = service.clock()
    check_model(service, body.model)
    usage = check_common(body)
    check_chat(body)
    if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise out_of_range("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if service.tokenizer is None:
        raise RequestError("this route needs a tokenizer; the server runs with --skip-tokenizer-init")
    parsers = _parsers(service, body)
    ask = ask_of(body, parsers.tools if parsers.forced else None)
    prompt, param = await _chat_prompt(request, body)
    (grammar,) = await resolve(service, [ask])
    constraint = GrammarSpec()
    if grammar:
        opening, end = _around_thoughts(service, body, parsers, prompt)
        constraint = GrammarSpec(grammar, tuple(service.tokenizer.encode(end, False)) if end else (), opening)
        if parsers.reasoning is None and not parsers.have_channels:
            parsers = parsers._replace(behind=end)
    logprobs = {"return_logprob": True, "top_logprobs_num": body.top_logprobs} if body.logprobs else {}
    params = sampling_params(body, chat_max_tokens(body), sampling_defaults(service))
    if parsers.read_special_tokens:
        params.skip_special_tokens = False
    answer = _answer(
        "chat.completion", request, arrived_s, body, usage, [prompt], params, constraint,
        logprobs, param, _new_parts(service, parsers, prompt),
    )  # fmt: skip
    if body.stream:
        chunks: Chunks = lambda s: chat_chunks(answer, s, service.tokenizer)  # noqa: E731
        return EventStream(_events(service, answer, chunks), answer.sequences[0].tracked)
    await unless_gone(request, service.complete(answer.sequences))
    return json_response(answer.whole([chat_choice(answer, s, service.tokenizer) for s in answer.sequences]))


def _parsers(service: Service, body: ChatBody) -> Parsers:
    """Raises RequestError for tools that cannot be called."""
    config, tools = service.config, check_tools(body)
    if body.tool_choice == "none":
        tools = {}
    forced = forced_tools(body, tools)
    if tools and config.tool_call_parser is None and not forced:
        raise RequestError(
            "tools are not supported by this server, which was started without --tool-call-parser",
            param="tools",
            code="unsupported_parameter",
        )
    final = body.messages[-1] if body.messages and body.continue_final_message else {}
    return Parsers(
        config.reasoning_parser if body.separate_reasoning else None,
        config.tool_call_parser if tools else None,
        forced or tools,
        continued=text_of(final.get("content")),
        at_once=not body.stream_reasoning,
        forced=bool(forced),
    )


def _around_thoughts(
    service: Service, body: ChatBody, parsers: Parsers, prompt: list[int]
) -> tuple[int | None, str]:
    """What the answer is going to say before the part that a grammar holds for; empty: nothing.

    And the token that it begins with if it says that, where that is the model's choice.
    """
    name = service.config.reasoning_parser
    if name is None or (name == CHANNELS and parsers.continued):
        return None, ""
    if name == CHANNELS:
        return None, BEFORE_FINAL
    style, variables = reasoning.STYLES[name], body.chat_template_kwargs or {}
    thinks = reasoning.will_think(style, _end_of(service, prompt), parsers.continued, variables)
    if thinks is not None:
        return None, style.closing if thinks else ""
    assert service.tokenizer is not None
    ids = service.tokenizer.encode(style.opening, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None, style.closing


def _new_parts(
    service: Service, parsers: Parsers, prompt: list[int]
) -> Callable[[str, int], ChatParts] | None:
    """None where an answer is its text."""
    if parsers.are_none:
        return None
    return partial(parsers.parts, prompt=_end_of(service, prompt))


def _end_of(service: Service, prompt: list[int]) -> str:
    assert service.tokenizer is not None
    return service.tokenizer.decode(prompt[-MAX_TAG_TOKENS:], skip_special_tokens=False)


async def _chat_prompt(request: Request, body: ChatBody) -> tuple[list[int], str]:
    """(token ids, the parameter they came from). Raises RequestError."""
    service: Service = request.app.state.service
    text = await beside_loop(request.scope[BODY_BYTES], _chat_text, service, body)
    if text is None:
        ids = body.input_ids or []
        check_prompt(ids, service.client.info, "input_ids")
        return ids, "input_ids"
    ids = await encode(service, [text], "messages", add_special_tokens=False)
    return ids[0], "messages"


def _chat_text(service: Service, body: ChatBody) -> str | None:
    """The rendered messages; None when the body brings token ids. Raises RequestError."""
    if body.input_ids is not None:
        if body.messages:
            check_messages(body.messages)  # what is refused without the ids is refused with them
        return None
    messages = check_messages(body.messages)
    if service.chat_template is None:
        raise RequestError(
            "this model has no chat template; start the server with --chat-template, or use /v1/completions",
            param="messages",
        )
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    try:
        return service.chat_template.render(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            tools=None if body.tool_choice == "none" else body.tools or None,
            variables=variables,
        )
    except ChatTemplateError as error:
        raise RequestError(f"messages: {error}", param="messages") from None


# ---- both ----


def sampling_defaults(service: Service) -> dict[str, Any]:
    """generation_config.json's sampling values under `--sampling-defaults model`."""
    return service.generation_config if service.config.sampling_defaults == "model" else {}


def _answer(
    kind: str,
    request: Request,
    arrived_s: float,
    body: OpenAIBody,
    usage: StreamUsage,
    prompts: list[list[int]],
    params: SamplingParams,
    constraint: GrammarSpec,
    logprobs: dict[str, Any],
    param: str,
    new_parts: Callable[[str, int], ChatParts] | None = None,
) -> Answer:
    """The checked sequences of a body. Raises RequestError."""
    service: Service = request.app.state.service
    resume = parse_resume(body.resume, body.stream)
    tracked = body.stream and not getattr(body, "echo", False) and wants_tracking(request)
    rid = check_rid(body.rid) if body.rid is not None else f"{ID_PREFIXES[kind]}-{new_rid()}"
    sequences = build_sequences(
        service,
        prompts,
        [params] * len(prompts),
        arrived_s=arrived_s,
        param=param,
        name=openai_name,
        constraints=[constraint] * len(prompts),
        logprobs=[logprobs] * len(prompts),
        rid=rid,
        priority=body.priority,
        salt=make_salt(body.cache_salt, body.extra_key),
        dp_rank=check_dp_rank(service, body.routed_dp_rank, body.data_parallel_rank),
        logprob_text=True,
        tracked=tracked,
        resume=resume,
    )
    request.scope[SEQUENCES] = sequences
    answer = Answer(
        kind,
        sequences[0].reply_id if resume is not None else rid,
        body.model or service.model_name,
        sequences,
        body.n,
        *usage,
        body.return_token_ids,
        as_meta_info if body.return_meta_info else None,
        new_parts,
    )
    if resume is not None:
        answer.resume(resume)
    return answer


async def _events(service: Service, answer: Answer, chunks: Chunks) -> AsyncGenerator[bytes]:
    with service.admitted(answer.sequences):
        async with aclosing(service.follow(answer.sequences)) as events:
            sent_s = service.clock()
            async for sequence in events:
                due = [sse(chunk) for chunk in chunks(sequence)]
                if not due and answer.new_parts is not None and service.clock() - sent_s > QUIET_S:
                    due = [sse(nothing_new(answer, sequence, service.tokenizer))]
                if due:
                    due[-1] = token_comment(sequence) + due[-1]  # the last one has the text
                    yield b"".join(due)
                    sent_s = service.clock()
    if answer.usage_at_end:
        yield sse(answer.chunk(None)) + DONE  # in one piece: who has the usage has the end
