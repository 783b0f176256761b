"""Chat answers of a server with --tool-call-parser: calls apart from the text, streamed or not."""

import json
import typing
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import tiny_tokenizer
from live_server import Server, serving
from test_resumed_streams import check_cut_anywhere

from jaxserve.config import ServerConfig, ToolCallParser
from jaxserve.launch import load_text
from jaxserve.server import openai as openai_routes
from jaxserve.server.chat_parts import CHANNELS
from jaxserve.text.tool_calls import STYLES

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TEXT = f"<think>the world</think>hello\n{CALL}\n{CALL}"
ARGUMENTS = {"city": "Köln"}


@pytest.fixture(scope="module")
def caller(tokenizer) -> Iterator[Server]:
    with serving(tokenizer, reasoning_parser="qwen3", tool_call_parser="qwen25") as server:
        yield server


def chat(server, text=TEXT, **how):
    server.say(text)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    how = {"messages": HELLO, "max_tokens": 300, "tools": [WEATHER], **how}
    return client.chat.completions.create(model="tiny/model", **how)


def test_calls_are_a_field_of_the_message(caller):
    choice = chat(caller).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == ("the world", "hello")
    assert choice.finish_reason == "tool_calls"
    first, second = choice.message.tool_calls
    for call in (first, second):
        assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
            "function", "weather", ARGUMENTS,
        )  # fmt: skip
    assert first.id.startswith("call_") and first.id != second.id


def test_answer_that_is_calls_alone_has_no_content(caller):
    message = chat(caller, CALL).choices[0].message
    assert message.content is None and len(message.tool_calls) == 1


def test_samples_have_calls_of_their_own(caller):
    ids = [call.id for choice in chat(caller, n=2).choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4


def test_answer_without_a_call_is_text_and_stops(caller):
    choice = chat(caller, "hello <tool_call> world").choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("hello <tool_call> world", None)
    assert choice.finish_reason == "stop"


def test_call_that_is_cut_off_is_text_and_the_reason_the_length(caller):
    choice = chat(caller, CALL, max_tokens=30).choices[0]
    assert CALL.startswith(choice.message.content) and len(choice.message.content) > 20
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")


def test_stream_brings_each_call_whole(caller):
    choices = [chunk.choices[0] for chunk in chat(caller, stream=True)]
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [(c.index, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        (0, "weather", ARGUMENTS), (1, "weather", ARGUMENTS),
    ]  # fmt: skip
    assert "".join(choice.delta.content or "" for choice in choices) == "hello"
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]
    assert len({c.id for c in calls}) == 2


def test_stream_that_holds_a_long_call_back_is_not_silent(caller, monkeypatch):
    few = [chunk.choices[0] for chunk in chat(caller, CALL, stream=True)]
    monkeypatch.setattr(openai_routes, "QUIET_S", -1.0)
    many = [chunk.choices[0] for chunk in chat(caller, CALL, stream=True)]
    assert len(many) > len(few) + 20
    said = [choice.delta for choice in many if choice.delta.content or choice.delta.tool_calls]
    assert len(said) == 1 and len(said[0].tool_calls) == 1
    assert [choice.finish_reason for choice in many if choice.finish_reason] == ["tool_calls"]


def test_template_is_given_the_tools_unless_none_may_be_called(caller):
    chat(caller)
    shown = caller.tokenizer.decode(caller.engine.requests[-1].input_ids)
    assert json.dumps([WEATHER]) in shown
    choice = chat(caller, tool_choice="none").choices[0]
    assert json.dumps([WEATHER]) not in caller.tokenizer.decode(caller.engine.requests[-1].input_ids)
    assert choice.message.content == TEXT.partition("</think>")[2]
    assert "tool_calls" not in choice.message.model_fields_set and choice.finish_reason == "stop"


def test_what_a_tool_returned_is_a_message(caller):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert chat(caller, "hello", messages=messages).choices[0].message.content == "hello"
    assert "tool\nsunny" in caller.tokenizer.decode(caller.engine.requests[-1].input_ids)


def test_special_tokens_are_shown_where_the_format_is_made_of_them(tokenizer):
    with serving(tokenizer, tool_call_parser="llama3") as server:
        assert chat(server, "<|im_start|>hello").choices[0].message.content == "<|im_start|>hello"
        assert chat(server, "<|im_start|>hello", tools=[]).choices[0].message.content == "hello"
        bare = '{"name": "weather", "parameters": {"city": "Köln"}}'
        assert len(chat(server, bare).choices[0].message.tool_calls) == 1


HARMONY = "<|channel|>analysis<|message|>the world<|end|><|start|>assistant"
SAID = HARMONY + "<|channel|>final<|message|>hello"
CALLED = HARMONY + '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Köln"}'


def test_channels_are_thoughts_text_and_calls(tokenizer):
    with serving(tokenizer, reasoning_parser="gpt-oss", tool_call_parser="gpt-oss") as server:
        message = chat(server, SAID).choices[0].message
        assert (message.reasoning_content, message.content, message.tool_calls) == (
            "the world",
            "hello",
            None,
        )
        message = chat(server, CALLED).choices[0].message
        assert (message.reasoning_content, message.content) == ("the world", None)
        assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
        message = chat(server, CALLED, extra_body={"separate_reasoning": False}).choices[0].message
        assert message.content == "the world" and len(message.tool_calls) == 1
        message = chat(server, SAID, tools=[], extra_body={"separate_reasoning": False}).choices[0].message
        assert message.content == SAID  # in this tokenizer, which has no such special tokens
        deltas = [chunk.choices[0] for chunk in chat(server, CALLED, stream=True)]
        assert "".join(d.delta.model_extra.get("reasoning_content", "") for d in deltas) == "the world"
        assert deltas[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("tokens_a_step", [1, 7, 1000])
@pytest.mark.parametrize("reasoning_parser", [None, "gpt-oss"])
def test_channels_that_stay_in_the_text_keep_their_order(tokenizer, reasoning_parser, tokens_a_step):
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + SAID
    with serving(tokenizer, reasoning_parser=reasoning_parser, tool_call_parser="gpt-oss") as server:
        server.engine.tokens_a_step = tokens_a_step
        how = {"extra_body": {"separate_reasoning": False}}
        assert chat(server, said, **how).choices[0].message.content == "I look.the worldhello"
        deltas = [chunk.choices[0].delta for chunk in chat(server, said, stream=True, **how)]
        assert "".join(delta.content or "" for delta in deltas) == "I look.the worldhello"


def test_ids_have_the_form_that_the_family_wants_and_are_given_once(tokenizer):
    with serving(tokenizer, tool_call_parser="mistral") as server:
        (call,) = chat(server, "[TOOL_CALLS]weather[ARGS]{}").choices[0].message.tool_calls
        assert len(call.id) == 9 and call.id.isalnum()
    with serving(tokenizer, tool_call_parser="kimi_k2") as server:
        block = "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        text = f"<|tool_calls_section_begin|>{block}{block}<|tool_calls_section_end|>"
        first, second = chat(server, text).choices[0].message.tool_calls
        assert first.id == "functions.weather:0" and second.id.startswith("call_")


@pytest.mark.parametrize("ids", [[-1], [1 << 40], [5, 320]])
def test_prompt_of_ids_that_there_are_not_is_a_400(caller, ids):
    reply = caller.http.post("/v1/chat/completions", json={"input_ids": ids, "tools": [WEATHER]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input_ids")


CASES = {"to the end": {}, "to a stop string": {"stop": ["</tool"]}, "to a length": {"max_tokens": 60}}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stream_cut_anywhere_and_resumed_is_the_unbroken_stream(caller, case):
    caller.say(TEXT)
    body = {"messages": HELLO, "tools": [WEATHER], "stream": True, "temperature": 0, "rid": "r"}
    body |= {"max_tokens": 300, **case}
    assert len(check_cut_anywhere(caller, "/v1/chat/completions", body)) > 4


def test_template_that_never_names_tools_is_told_of_at_the_start(tmp_path, caplog):
    directory = tiny_tokenizer.write(tmp_path)
    template = Path(directory) / "chat_template.jinja"
    config = ServerConfig(model_path="m", tool_call_parser="qwen25")
    template.write_text(tiny_tokenizer.CHAT_TEMPLATE)
    load_text(config, str(directory))
    assert not caplog.messages
    template.write_text("{{ messages[0].content }}")
    load_text(config, str(directory))
    assert ["the model is told of none" in message for message in caplog.messages] == [True]


def test_flag_takes_the_names_that_there_are():
    assert set(typing.get_args(ToolCallParser)) == {*STYLES, CHANNELS}
