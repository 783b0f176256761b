"""Grammars through HTTP: what reaches the engine, and which field is named where something is wrong."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest
import tiny_tokenizer
from fake_engine import FakeEngine
from live_server import Server, make_app, serving

from jaxserve.messages import Finish
from jaxserve.server import constraint
from jaxserve.server.generate import reply
from jaxserve.server.schema import GenerateBody, parse
from jaxserve.text.grammar import of_calls, of_ebnf, of_json_schema, of_regex, of_structural_tag
from jaxserve.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": NUMBER, "end": "</f>"}]}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def sampling_of(server, path, **body):
    """What the engine was asked for."""
    needed = (
        {"text": "x"} if path == "/generate" else {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    )
    response = server.http.post(path, json=needed | body)
    assert response.status_code == 200, response.text
    return server.engine.requests[-1].sampling


def error_of(server, path, **body):
    needed = (
        {"text": "x"} if path == "/generate" else {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    )
    response = server.http.post(path, json=needed | body)
    assert response.status_code == 400, response.text
    assert not server.engine.requests
    return response.json()["error"]


# ---- /generate ----

NATIVE = {
    "json_schema": (json.dumps(NUMBER), of_json_schema(NUMBER)),
    "regex": ("a+", of_regex("a+")),
    "ebnf": ('root ::= "a"', of_ebnf('root ::= "a"')),
    "structural_tag": (json.dumps(TAG), of_structural_tag(TAG)),
}


@pytest.mark.parametrize("field", NATIVE)
def test_native_field_is_the_grammar_of_every_sample(server, field):
    value, grammar = NATIVE[field]
    assert sampling_of(server, "/generate", sampling_params={field: value, "n": 2}).grammar == grammar
    assert [r.sampling.grammar for r in server.engine.requests] == [grammar] * 2
    assert {r.sampling.grammar_after for r in server.engine.requests} == {()}


def test_schema_and_tag_may_be_objects(server):
    assert (
        sampling_of(server, "/generate", sampling_params={"json_schema": NUMBER}).grammar
        == (NATIVE["json_schema"][1])
    )
    assert (
        sampling_of(server, "/generate", sampling_params={"structural_tag": TAG}).grammar
        == (NATIVE["structural_tag"][1])
    )


def test_fields_that_are_off_are_no_grammar(server):
    off = dict.fromkeys(NATIVE, "") | {"regex": None}
    assert sampling_of(server, "/generate", sampling_params=off).grammar == ""


def test_prompts_have_grammars_of_their_own(server):
    params = [{"regex": "a"}, {}, {"regex": "b"}, {"regex": "a"}]
    server.generate(text=["x"] * 4, sampling_params=params)
    assert [r.sampling.grammar for r in server.engine.requests] == [
        of_regex("a"),
        "",
        of_regex("b"),
        of_regex("a"),
    ]


def test_grammar_is_made_once_for_a_body(server, monkeypatch):
    made = []
    monkeypatch.setattr(constraint, "_make", lambda *ask: made.append(ask) or "grammar")
    server.generate(text=["x"] * 4, sampling_params={"regex": "a", "n": 3})
    assert len(made) == 1 and len(server.engine.requests) == 12


def test_many_grammars_in_one_body_are_refused(server):
    error = error_of(
        server, "/generate", text=["x"] * 65, sampling_params=[{"regex": f"a{i}"} for i in range(65)]
    )
    assert "65 different values" in error["message"] and error["param"] == "sampling_params.regex"


def test_end_of_a_grammar_is_a_stop_with_all_of_the_text(server):
    answer = server.generate(text="x", sampling_params={"regex": ".*"}).json()
    assert answer["text"] == "hello world"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}


async def _native_reply(service):
    return await reply(
        service, parse(GenerateBody, {"text": "x", "sampling_params": {"ebnf": 'root ::= "a"'}})
    )


def test_offline_takes_the_same_fields(tokenizer):
    engine = FakeEngine(lambda request: tokenizer.encode("a"))
    assert asyncio.run(_native_reply(make_app(engine, tokenizer).state.service))["text"] == "a"
    assert engine.requests[0].sampling.grammar == of_ebnf('root ::= "a"')


NATIVE_ERRORS = [
    ({"json_schema": "{"}, "json_schema", "not JSON"),
    ({"json_schema": 1}, "json_schema", "must be of type str or object, got 1"),
    ({"json_schema": {"type": "nope"}}, "json_schema", "nope"),
    ({"json_schema": {"$ref": "http://127.0.0.1:9/"}}, "json_schema", "references are within it"),
    ({"regex": "a("}, "regex", "unclosed group"),
    ({"regex": ["a"]}, "regex", "must be of type str"),
    ({"ebnf": "root ::= x"}, "ebnf", "'x', which is no rule"),
    ({"structural_tag": {"format": {"type": "or"}}}, "structural_tag", "'or' is not served"),
    ({"regex": "a", "ebnf": "b"}, "ebnf", "sampling_params.regex and sampling_params.ebnf each say"),
]


@pytest.mark.parametrize("params, field, words", NATIVE_ERRORS)
def test_native_field_at_fault_is_named(server, params, field, words):
    error = error_of(server, "/generate", sampling_params=params)
    assert words in error["message"]
    assert (error["param"], error["type"]) == (f"sampling_params.{field}", "invalid_request_error")


# ---- the OpenAI routes ----

JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}}
OPENAI = [
    ({"response_format": {"type": "text"}}, ""),
    ({"response_format": {"type": "json_object"}}, of_json_schema({"type": "object"})),
    ({"response_format": JSON_SCHEMA}, of_json_schema(NUMBER)),
    ({"response_format": {"type": "structural_tag", **TAG}}, of_structural_tag(TAG)),
    ({"regex": "a+"}, of_regex("a+")),
    ({"ebnf": 'root ::= "a"'}, of_ebnf('root ::= "a"')),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("body, grammar", OPENAI)
def test_openai_field_is_the_grammar(server, path, body, grammar):
    sampling = sampling_of(server, path, **body, n=2)
    assert (sampling.grammar, sampling.grammar_after) == (grammar, ())
    assert len(server.engine.requests) == 2


def test_official_client_parses_what_a_format_forces(server):
    server.say('{"a": 3}')
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="tiny/model", messages=HELLO, response_format=JSON_SCHEMA)
    choice = answer.choices[0]
    assert (json.loads(choice.message.content), choice.finish_reason) == ({"a": 3}, "stop")


def test_strict_schema_is_refused_where_a_keyword_is_not_served(server):
    schema = {"type": "object", "not": {"required": ["b"]}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert sampling_of(server, CHAT, response_format=form).grammar == of_json_schema(schema)
    server.engine.requests.clear()
    form["json_schema"]["strict"] = True
    error = error_of(server, CHAT, response_format=form)
    assert "not" in error["message"] and error["param"] == "response_format.json_schema.schema"


SCHEMA_PARAM = "response_format.json_schema"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": NUMBER}}
NOW = {"type": "function", "function": {"name": "now"}}
OPENAI_ERRORS = [
    ({"response_format": {"type": "yaml"}}, "response_format", "of type 'yaml' is not supported"),
    ({"response_format": {}}, "response_format", "of type null is not supported"),
    ({"response_format": {"type": "json_schema"}}, SCHEMA_PARAM, "must be an object with a schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
        SCHEMA_PARAM,
        "with a schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strictly": True}}},
        SCHEMA_PARAM,
        "strictly is not a known parameter",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
        f"{SCHEMA_PARAM}.strict",
        "must be of type bool, got 1",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
        f"{SCHEMA_PARAM}.schema",
        "nope",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "triggers must be"),
    ({"response_format": JSON_SCHEMA, "regex": "a"}, "regex", f"{SCHEMA_PARAM}.schema and regex each say"),
    ({"regex": "a", "ebnf": "b"}, "ebnf", "regex and ebnf each say"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("body, param, words", OPENAI_ERRORS)
def test_openai_field_at_fault_is_named(server, path, body, param, words):
    error = error_of(server, path, **body)
    assert words in error["message"] and error["param"] == param


TOOL_ERRORS = [
    ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "tool_choice needs tools"),
    ({"tool_choice": "always", "tools": [TOOL]}, "tool_choice", "'always' is not supported"),
    ({"tool_choice": {"type": "allowed_tools"}, "tools": [TOOL]}, "tool_choice", "'allowed_tools' is not"),
    ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice.function", "an object with a name"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]},
        "tool_choice",
        "names 'x', which is none of the tools",
    ),
    (
        {"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}},
        "tool_choice",
        "response_format and tool_choice each say",
    ),
    (
        {"tool_choice": "required", "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"$ref": "x:y"}}}]},
        "tool_choice",
        "parameters of 'f': $ref 'x:y'",
    ),
]  # fmt: skip


@pytest.mark.parametrize("body, param, words", TOOL_ERRORS)
def test_tool_choice_at_fault_is_named(server, body, param, words):
    error = error_of(server, CHAT, **body)
    assert words in error["message"] and error["param"] == param


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/generate", {"sampling_params": {"regex": "a"}}, "sampling_params.regex"),
        (COMPLETIONS, {"ebnf": 'root ::= "a"'}, "ebnf"),
        (CHAT, {"response_format": JSON_SCHEMA}, "response_format.json_schema.schema"),
        (CHAT, {"tool_choice": "required", "tools": [TOOL]}, "tool_choice"),
    ],
)
def test_server_without_grammars_names_its_flag(tokenizer, path, body, param):
    with serving(tokenizer, grammar_backend="none") as server:
        error = error_of(server, path, **body)
        assert "--grammar-backend none" in error["message"]
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")


def test_server_without_a_tokenizer_names_its_flag():
    app = make_app(FakeEngine(lambda request: []), None)

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/generate", json={"input_ids": [5], "sampling_params": {"regex": "a"}})

    error = asyncio.run(send()).json()["error"]
    assert "--skip-tokenizer-init" in error["message"] and error["param"] == "sampling_params.regex"


def test_white_space_is_left_out_where_the_server_says_so(tokenizer):
    with serving(tokenizer, constrained_json_disable_any_whitespace=True) as server:
        sampling = sampling_of(server, CHAT, response_format=JSON_SCHEMA)
        assert sampling.grammar == of_json_schema(NUMBER, white_space=False)


# ---- calls that are forced ----

WEATHER = '{"name": "weather", "parameters": {"a": 1}}'
LIST = f'[{WEATHER}, {{"name": "now", "parameters": {{}}}}]'
TOOLS = {"weather": NUMBER, "now": {}}


def forced(server, text=LIST, **how):
    server.say(text)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    how = {"messages": HELLO, "max_tokens": 200, "tools": [TOOL, NOW], "tool_choice": "required", **how}
    return client.chat.completions.create(model="tiny/model", **how)


def calls_of(message):
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]


def test_required_calls_are_forced_and_need_no_parser(server):
    choice = forced(server).choices[0]
    assert calls_of(choice.message) == [("weather", {"a": 1}), ("now", {})]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert len({call.id for call in choice.message.tool_calls}) == 2
    sampling = server.engine.requests[-1].sampling
    assert (sampling.grammar, sampling.grammar_after) == (of_calls(TOOLS), ())
    assert "weather" in server.tokenizer.decode(server.engine.requests[-1].input_ids)


def test_one_function_is_called_once(server):
    named = {"type": "function", "function": {"name": "weather"}}
    choice = forced(server, f"[{WEATHER}]", tool_choice=named).choices[0]
    assert calls_of(choice.message) == [("weather", {"a": 1})] and choice.finish_reason == "tool_calls"
    assert server.engine.requests[-1].sampling.grammar == of_calls({"weather": NUMBER}, most=1)


def test_no_parallel_calls_are_one_call(server):
    forced(server, f"[{WEATHER}]", parallel_tool_calls=False)
    assert server.engine.requests[-1].sampling.grammar == of_calls(TOOLS, most=1)


def test_samples_of_forced_calls_have_ids_of_their_own(server):
    ids = [call.id for choice in forced(server, n=2).choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4


def test_list_that_is_cut_off_leaves_what_is_complete_as_calls(server):
    choice = forced(server, max_tokens=len(server.tokenizer.encode(LIST)) - 6).choices[0]
    assert calls_of(choice.message) == [("weather", {"a": 1})]
    assert choice.message.content.startswith('{"name": "now"') and choice.finish_reason == "length"


def test_stream_brings_each_forced_call_when_it_is_whole(server):
    choices = [chunk.choices[0] for chunk in forced(server, stream=True)]
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [(c.index, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        (0, "weather", {"a": 1}), (1, "now", {}),
    ]  # fmt: skip
    assert [len(c.delta.tool_calls) for c in choices if c.delta.tool_calls] == [1, 1]
    assert "".join(choice.delta.content or "" for choice in choices) == ""
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]


def test_ids_of_forced_calls_have_the_form_that_the_family_wants(tokenizer):
    with serving(tokenizer, tool_call_parser="mistral") as server:
        first, second = forced(server).choices[0].message.tool_calls
        assert len(first.id) == 9 and first.id != second.id
        assert calls_of(forced(server, tool_choice="auto").choices[0].message) == []


# ---- thoughts ----


@pytest.fixture(scope="module")
def thinker(tokenizer) -> Iterator[Server]:
    with serving(tokenizer, reasoning_parser="qwen3") as server:
        yield server


def after(server, **body):
    return sampling_of(server, CHAT, response_format={"type": "json_object"}, **body).grammar_after


def ids_of(server, tag):
    return tuple(server.tokenizer.encode(tag, add_special_tokens=False))


def test_grammar_begins_behind_the_thoughts(thinker):
    closing = ids_of(thinker, "</think>")
    assert len(closing) > 1
    assert after(thinker) == closing
    assert after(thinker, separate_reasoning=False) == closing
    assert after(thinker, chat_template_kwargs={"enable_thinking": True}) == closing
    assert sampling_of(thinker, COMPLETIONS, regex="a").grammar_after == ()
    assert sampling_of(thinker, "/generate", sampling_params={"regex": "a"}).grammar_after == ()
    assert sampling_of(thinker, CHAT).grammar_after == ()


def test_grammar_begins_at_once_where_nothing_is_thought(thinker):
    assert after(thinker, chat_template_kwargs={"enable_thinking": False}) == ()
    closed = [*HELLO, {"role": "assistant", "content": "<think>so</think>"}]
    assert after(thinker, messages=closed, continue_final_message=True) == ()
    thinking = [*HELLO, {"role": "assistant", "content": "<think>so"}]
    assert after(thinker, messages=thinking, continue_final_message=True) == ids_of(thinker, "</think>")
    ids = thinker.tokenizer.encode("hello<think>\n\n</think>\n\n")
    assert after(thinker, messages=None, input_ids=ids) == ()


def test_family_that_thinks_on_request_is_believed_not_to(tokenizer):
    with serving(tokenizer, reasoning_parser="deepseek-v3") as server:
        assert after(server) == ()
        assert after(server, chat_template_kwargs={"thinking": True}) == ids_of(server, "</think>")
    with serving(tokenizer, reasoning_parser="deepseek-r1") as server:
        assert after(server) == ids_of(server, "</think>")


def test_grammar_of_channels_begins_in_the_final_one(tokenizer):
    with serving(tokenizer, reasoning_parser="gpt-oss") as server:
        assert after(server) == ids_of(server, "<|channel|>final<|message|>")
        said = [*HELLO, {"role": "assistant", "content": "[1, "}]
        assert after(server, messages=said, continue_final_message=True) == ()


def test_model_that_may_open_its_thoughts_has_the_choice(tokenizer, tmp_path_factory):
    """Where the tag is one token; where it is several, the grammar waits for thoughts to be closed."""
    fast = tiny_tokenizer.byte_level()
    fast.add_tokens(["<think>", "</think>"])
    wider = Tokenizer.from_dir(tiny_tokenizer.write(tmp_path_factory.mktemp("thinker"), fast))
    [opening] = wider.encode("<think>", add_special_tokens=False)
    for known, token in ((wider, opening), (tokenizer, None)):
        with serving(known, reasoning_parser="qwen3") as server:
            assert after(server) == ids_of(server, "</think>")
            assert server.engine.requests[-1].sampling.grammar_opening == token
            assert after(server, chat_template_kwargs={"enable_thinking": False}) == ()
            assert server.engine.requests[-1].sampling.grammar_opening is None


def test_grammar_says_where_an_output_may_end_even_if_eos_is_ignored(server):
    params = {"regex": "a*", "ignore_eos": True}
    assert 1 in sampling_of(server, "/generate", sampling_params=params).stop_token_ids


def test_forced_calls_behind_what_is_said_before_them(tokenizer):
    """Models of channels may speak in another channel first."""
    spoken = (
        "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>final<|message|>"
    )
    with serving(tokenizer, reasoning_parser="gpt-oss", tool_call_parser="gpt-oss") as server:
        message = forced(server, spoken + LIST).choices[0].message
        assert [name for name, _ in calls_of(message)] == ["weather", "now"]
        assert message.content == "Let me look."


def test_json_object_may_have_a_schema_and_nothing_else(server):
    form = {"type": "json_object", "schema": NUMBER}
    assert sampling_of(server, CHAT, response_format=form).grammar == of_json_schema(NUMBER)
    server.engine.requests.clear()
    for kind, name in (("json_object", "foo"), ("json_schema", "strict")):
        error = error_of(server, CHAT, response_format={"type": kind, name: True})
        assert error["param"] == "response_format" and name in error["message"]


def test_strict_tool_refuses_what_is_not_served(server):
    function = {"name": "f", "parameters": {"type": "object", "not": {}}}
    body = {"tool_choice": "required", "tools": [{"type": "function", "function": function}]}
    assert sampling_of(server, CHAT, **body).grammar
    server.engine.requests.clear()
    function["strict"] = True
    assert "not" in error_of(server, CHAT, **body)["message"]
    function["parameters"] = {"type": "boolean"}
    assert "must be an object" in error_of(server, CHAT, **body)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_behind_thoughts(thinker, stream):
    said, thoughts = f"<think>so [it] is</think>\n\n{LIST}", "so [it] is"
    for extra, content in (({}, ""), ({"separate_reasoning": False}, "<think>so [it] is</think>")):
        answer = forced(thinker, said, stream=stream, extra_body=extra)
        parts = [c.choices[0].delta for c in answer] if stream else [answer.choices[0].message]
        assert [name for part in parts for name, _ in calls_of(part)] == ["weather", "now"]
        assert "".join(part.content or "" for part in parts) == content
        told = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
        assert told == ("" if extra else thoughts)


def test_forced_calls_in_the_final_channel(tokenizer):
    head = "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>"
    for parser in ("gpt-oss", None):
        with serving(tokenizer, reasoning_parser="gpt-oss", tool_call_parser=parser) as server:
            message = forced(server, head + LIST).choices[0].message
            assert [name for name, _ in calls_of(message)] == ["weather", "now"]
            assert (message.reasoning_content, message.content) == ("so", None)
            kept = forced(server, head + LIST, extra_body={"separate_reasoning": False}).choices[0].message
            assert [name for name, _ in calls_of(kept)] == ["weather", "now"]
            assert kept.content == ("so" if parser else head)


def test_grammar_that_the_engine_refuses_is_a_400(server):
    server.engine.fail = Finish("abort", message="grammar: too large", status_code=400)
    for path in (CHAT, COMPLETIONS):
        response = server.http.post(path, json={"messages": HELLO, "regex": "a"} if path == CHAT else {
            "prompt": "x", "regex": "a"})  # fmt: skip
        assert (response.status_code, response.json()["error"]["message"]) == (400, "grammar: too large")
