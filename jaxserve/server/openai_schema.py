"""Bodies of the OpenAI routes, with SGLang's extra parameters, and how they map to SamplingParams."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxserve.server.constraint import Ask, field_asks, format_ask, make_ask, only_ask
from jaxserve.server.errors import RequestError
from jaxserve.server.schema import Body, SamplingParams, check_members, either, show, words
from jaxserve.text.tool_calls import Tools

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
MAX_COMPLETION_LOGPROBS = 20
LATER = words("""
    stop_regex json_schema structural_tag lora_path session_params return_hidden_states
    return_routed_experts custom_logit_processor custom_params custom_labels functions function_call audio
    prediction web_search_options verbosity bootstrap_host bootstrap_port bootstrap_room use_beam_search
""")
HINTS = words("""
    user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention
    routing_key conversation_id
""")
USAGE_OPTIONS = ("include_usage", "continuous_usage_stats")  # of stream_options; the second is vLLM's
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PASSED_ON = words("""
    stop stop_token_ids frequency_penalty presence_penalty n ignore_eos skip_special_tokens
    spaces_between_special_tokens no_stop_trim logit_bias
""")


class OpenAIBody(Body):
    """What both routes take."""

    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    response_format: dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    rid: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None
    return_token_ids: bool = False
    return_meta_info: bool = False
    resume: dict[str, Any] | None = None  # a Resume

    unsupported = LATER
    no_effect = HINTS


class CompletionBody(OpenAIBody, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None

    unsupported = LATER | {"suffix", "tools"}
    no_effect = HINTS | {"separate_reasoning", "stream_reasoning", "parallel_tool_calls"}


class ChatBody(OpenAIBody):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None  # the prompt, instead of the rendered messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True  # false: one call, where calls are forced
    modalities: list[str] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool = True  # with --reasoning-parser
    stream_reasoning: bool = True  # false: thoughts are sent in one piece


MESSAGE_FIELDS = words("""
    role content name tool_calls tool_call_id reasoning_content reasoning refusal annotations audio
    function_call
""")
RESERVED_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})


def sampling_params(body: OpenAIBody, max_tokens: int | None, defaults: Mapping[str, Any]) -> SamplingParams:
    """A body's sampling parameters; `defaults` (generation_config.json) fill what it leaves open."""
    values: dict[str, Any] = {name: getattr(body, name) for name in PASSED_ON}
    for name in DEFAULTED:
        value = getattr(body, name)
        if value is None:
            value = defaults.get(name)
        if value is not None:
            values[name] = value
    if getattr(body, "top_k", None) is None and values.get("top_k") == 0:
        values["top_k"] = -1  # generation_config.json writes 0 for "off"
    return SamplingParams(
        max_new_tokens=max_tokens, min_new_tokens=body.min_tokens, sampling_seed=body.seed, **values
    )


class StreamUsage(NamedTuple):
    """Where a stream tells how many tokens there are."""

    at_end: bool = False  # in a chunk of its own
    always: bool = False  # in every chunk, so far


def check_common(body: OpenAIBody) -> StreamUsage:
    """Parameters both routes refuse or interpret the same way. Raises RequestError."""
    options = body.stream_options
    if options is None:
        return StreamUsage()
    if not body.stream:
        raise RequestError("stream_options is only valid with stream=true", param="stream_options")
    for name in options:
        if name not in (*USAGE_OPTIONS, "include_obfuscation"):
            raise RequestError(
                f"stream_options.{show(name)} is not a known parameter",
                param="stream_options",
                code="unknown_parameter",
            )
    for name in USAGE_OPTIONS:
        value = options.get(name)
        if value is not None and not isinstance(value, bool):
            raise RequestError(
                f"stream_options.{name} must be of type bool, got {show(value)}",
                param=f"stream_options.{name}",
            )
    return StreamUsage(*(bool(options.get(name)) for name in USAGE_OPTIONS))


def check_messages(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The messages. Raises RequestError for what no template takes: roles, unknown fields, parts not text."""
    if not messages:
        raise RequestError("messages must have at least one message", param="messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        check_members(message, MESSAGE_FIELDS, where)
        for name in ("audio", "function_call"):
            if message.get(name) is not None:
                raise RequestError(
                    f"{where}.{name} is not supported", param=f"{where}.{name}", code="unsupported_parameter"
                )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise RequestError(
                f"{where}.role must be a non-empty string, got {show(role)}", param=f"{where}.role"
            )
        if content is None:
            if role == "assistant" and message.get("tool_calls"):
                continue
            raise RequestError(f"{where}.content is required", param=f"{where}.content")
        if not isinstance(content, (str, list)):
            raise RequestError(
                f"{where}.content must be a string or a list of text parts, got {show(content)}",
                param=f"{where}.content",
            )
        if isinstance(content, list):
            for k, part in enumerate(content):
                _check_part(part, f"{where}.content[{k}]")
    return messages


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        supported = isinstance(kind, str)
        raise RequestError(
            f"{where} of type {show(kind)} is not supported; only text parts are",
            param=where,
            code="unsupported_parameter" if supported else None,
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(
            f"{where}.text must be a string, got {show(part.get('text'))}", param=f"{where}.text"
        )


def check_chat(body: ChatBody) -> None:
    """Raises RequestError for parameters whose values ask for later work."""
    if body.modalities not in (None, [], ["text"]):
        raise RequestError(
            "modalities other than text are not supported", param="modalities", code="unsupported_parameter"
        )
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    for name in body.chat_template_kwargs or {}:
        if name in RESERVED_VARIABLES:
            raise RequestError(
                f"chat_template_kwargs.{name} is set by the server", param=f"chat_template_kwargs.{name}"
            )
    if body.continue_final_message and (not body.messages or body.messages[-1].get("role") != "assistant"):
        raise RequestError(
            "continue_final_message needs a last message of role assistant", param="continue_final_message"
        )


def check_tools(body: ChatBody) -> Tools:
    """The schema of each tool's parameters. Raises RequestError for what is no function with a name."""
    tools = {}
    for i, tool in enumerate(body.tools or ()):
        where = f"tools[{i}]"
        if tool.get("type") != "function":
            raise RequestError(
                f"{where}.type must be 'function', got {show(tool.get('type'))}", param=f"{where}.type"
            )
        function = tool.get("function")
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise RequestError(
                f"{where}.function must be an object with a name, got {show(function)}",
                param=f"{where}.function",
            )
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
            raise RequestError(
                f"{where}.function.parameters must be a JSON schema, got {show(parameters)}",
                param=f"{where}.function.parameters",
            )
        tools[function["name"]] = parameters
    return tools


def forced_tools(body: ChatBody, tools: Tools) -> Tools:
    """Those of which the answer has to call one or more; empty where it need not. Raises RequestError."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return {}
    name = None
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RequestError(
                f"tool_choice.function must be an object with a name, got {show(function)}",
                param="tool_choice.function",
            )
    elif choice != "required":
        shown = choice.get("type") if isinstance(choice, dict) else choice
        raise RequestError(
            f"tool_choice {show(shown)} is not supported; none, auto, required and a function are",
            param="tool_choice",
            code="unsupported_parameter",
        )
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if name is not None and name not in tools:
        raise RequestError(f"tool_choice names {show(name)}, which is none of the tools", param="tool_choice")
    return tools if name is None else {name: tools[name]}


def ask_of(body: OpenAIBody, forced: Tools | None = None) -> Ask | None:
    """What the output has to be. Raises RequestError. `forced`: see `forced_tools`."""
    asks = [ask for ask in (format_ask(body.response_format),) if ask is not None]
    asks += field_asks({"regex": body.regex, "ebnf": body.ebnf})
    if forced and isinstance(body, ChatBody):
        most = 1 if body.tool_choice != "required" or not body.parallel_tool_calls else None
        is_strict = any(
            f.get("strict") for f in (t["function"] for t in body.tools or ()) if f["name"] in forced
        )
        asks.append(make_ask("tool_choice", "calls", forced, lenient=not is_strict, most=most))
    return only_ask(asks)


def chat_max_tokens(body: ChatBody) -> int | None:
    return either({"max_tokens": body.max_tokens, "max_completion_tokens": body.max_completion_tokens})


def completion_prompts(body: CompletionBody) -> tuple[list[str] | list[list[int]], bool]:
    """(prompts, whether they are texts). Raises RequestError for an empty or mixed list."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt], True
    kinds = {type(entry) for entry in prompt}
    if kinds == {str}:
        return list(prompt), True  # type: ignore[arg-type]
    if kinds == {int}:
        return [prompt], False  # type: ignore[list-item]
    if kinds == {list}:
        return list(prompt), False  # type: ignore[arg-type]
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists; "
        + ("it is empty" if not kinds else "it mixes them"),
        param="prompt",
    )
