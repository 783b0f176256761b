"""Calls of tools: each family's format by hand, and alike wherever the pieces of a text end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.tool_calls import STYLES, ToolCalls

TOOLS = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {},
}
PARIS = ("weather", {"city": "Paris", "days": 2})
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_31 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris", "days": 2}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1'
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
)
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
)
QWEN = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
)
LLAMA = '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}; {"name": "now", "parameters": {}}'
MISTRAL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 2}}, {"name": "now"}]'
MISTRAL_11 = '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now[ARGS]{}'
MINIMAX = (
    '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'
)
FORMATS = {
    "deepseekv3": DEEPSEEK, "deepseekv31": DEEPSEEK_31, "glm45": GLM, "hermes": QWEN, "kimi_k2": KIMI,
    "llama3": LLAMA, "minimax-m2": MINIMAX, "mistral": MISTRAL, "qwen": QWEN, "qwen25": QWEN,
    "qwen3_coder": CODER,
}  # fmt: skip


def read(style, pieces):
    """(text, [(name, arguments)]) of an answer."""
    calls = ToolCalls(STYLES[style], TOOLS)
    given_out = [calls.feed(piece) for piece in pieces] + [calls.feed("", is_last=True)]
    text = "".join(text for text, _ in given_out)
    return text, [(call.name, json.loads(call.arguments)) for _, found in given_out for call in found]


@pytest.mark.parametrize("style", STYLES)
def test_calls_are_read_in_the_format_of_the_family(style):
    both = [PARIS, ("now", {})]
    for pieces in ([FORMATS[style]], list(FORMATS[style]), [FORMATS[style], "\n"]):
        assert read(style, pieces) == ("", both)
    if not STYLES[style].bare:
        assert read(style, ["Let me see.\n\n", FORMATS[style]]) == ("Let me see.", both)


def test_other_forms_of_a_format():
    both = [PARIS, ("now", {})]
    with_ids = MISTRAL_11.replace("[ARGS]", "[CALL_ID]a1b2c3d4e[ARGS]")
    assert read("mistral", [MISTRAL_11]) == read("mistral", [with_ids]) == ("", both)
    assert read("mistral", ['[TOOL_CALLS]{"name": "now"}']) == ("", [("now", {})])
    assert read("mistral", [MISTRAL + "\nThere."]) == ("\nThere.", both)
    assert read("llama3", ["Well. ", "<|python_tag|>" + LLAMA]) == ("Well.", both)
    assert read("llama3", [LLAMA + ";\n"]) == ("", both)
    assert read("llama3", [LLAMA + "; so {"]) == ("; so {", both)
    two = CODER.replace("\n</tool_call>\n<tool_call>\n", "\n")
    assert read("qwen3_coder", [two]) == ("", both)


def test_arguments_may_be_text_null_or_have_line_breaks():
    def arguments(value):
        (call,) = read("qwen25", [f'<tool_call>{{"name": "now", "arguments": {value}}}</tool_call>'])[1]
        return call[1]

    assert arguments("null") == arguments('"{}"') == {}
    assert arguments(r'"{\"a\": 1}"') == {"a": 1}
    assert arguments('{"code": "a\n\tb"}') == {"code": "a\n\tb"}


SCHEMA = {
    "flag": {"type": "boolean"}, "name": {"type": ["string", "null"]}, "count": {"type": "integer"}, "odd": 7,
    "title": {"anyOf": [{"type": "string"}]},
}  # fmt: skip


def test_texts_become_what_the_schema_says():
    texts = {"flag": "True", "name": "null", "title": "12", "count": "3", "odd": "[1]", "more": "a b"}
    pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in texts.items())
    calls = ToolCalls(STYLES["glm45"], {"f": {"properties": SCHEMA}})
    _, (call,) = calls.feed(f"<tool_call>f\n{pairs}</tool_call>", is_last=True)
    expected = {"flag": True, "name": None, "title": "12", "count": 3, "odd": [1], "more": "a b"}
    assert json.loads(call.arguments) == expected
    calls = ToolCalls(STYLES["glm45"], {"f": {"properties": ["flag"]}})  # no schema at all
    assert len(calls.feed(f"<tool_call>f\n{pairs}</tool_call>", is_last=True)[1]) == 1


def test_text_around_calls_is_kept():
    answer = "First.\n" + QWEN + "\n\nThen."
    assert read("qwen25", list(answer)) == ("First.\n\nThen.", [PARIS, ("now", {})])


def test_arguments_in_plain_text_are_what_the_schema_says():
    answer = "<tool_call>weather<arg_key>city</arg_key><arg_value>12</arg_value></tool_call>"
    assert read("glm45", [answer]) == ("", [("weather", {"city": "12"})])
    answer = "<tool_call>now<arg_key>at</arg_key><arg_value>[1]</arg_value>"
    answer += "<arg_key>in</arg_key><arg_value>a b</arg_value></tool_call>"
    assert read("glm45", [answer]) == ("", [("now", {"at": [1], "in": "a b"})])


def test_ids_that_the_model_gives_are_kept():
    _, calls = ToolCalls(STYLES["kimi_k2"], TOOLS).feed(KIMI, is_last=True)
    assert [call.id for call in calls] == ["functions.weather:0", "functions.now:1"]
    text = '[TOOL_CALLS][{"name": "now", "id": "abcdefghi"}]'
    assert ToolCalls(STYLES["mistral"], TOOLS).feed(text, is_last=True)[1][0].id == "abcdefghi"


@pytest.mark.parametrize("style", ["glm45", "qwen3_coder", "deepseekv3", "kimi_k2", "minimax-m2", "llama3"])
def test_text_that_only_looks_like_a_format_is_read_in_one_pass(style):
    """Backtracking took seconds for a tenth of these, and more than a minute for half."""
    inner = {
        "glm45": "now" + "<arg_key></arg_key><arg_value>" * 20_000,
        "qwen3_coder": "<function=now>" + "<parameter=a>" * 50_000 + "</function>",
        "minimax-m2": '<invoke name="now">' + '<parameter name="a">' * 50_000 + "</invoke>",
        "deepseekv3": "<｜tool▁call▁begin｜>" * 50_000,
        "kimi_k2": "<|tool_call_begin|>" * 50_000,
        "llama3": "{" * 200_000,
    }[style]
    answer = STYLES[style].opening + inner + STYLES[style].closing
    assert read(style, [answer]) == (answer, [])


NO_CALLS = [
    ("qwen25", '<tool_call>\n{"name": "weather", "arguments": {"city": "Par'),  # cut off
    ("qwen25", "Use <tool_call>s.</tool_call> "),
    ("qwen25", '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
    ("qwen25", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    ("qwen25", '<tool_call>{"name": 1}</tool_call> <tool_call>[]</tool_call>'),
    ("qwen25", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    ("qwen25", " \n<tool"),
    ("qwen25", r'<tool_call>{"name": "now", "arguments": {"city": "\ud800"}}</tool_call>'),  # half an emoji
    ("qwen25", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>'),
    ("qwen25", '<tool_call>{"name": "now", "arguments": {"a": 1e999}}</tool_call>'),
    ("llama3", '{"a": 1}'),
    ("llama3", 'An object: {"name": "now", "parameters": {}}'),
    ("llama3", ' {"name": "now"'),
    ("mistral", "[TOOL_CALLS] 1"),
    ("mistral", "[TOOL_CALLS]now[ARGS]{"),
    ("mistral", "[TOOL_CALLS][1]"),
    ("glm45", "<tool_call>now <arg_key>a</arg_key></tool_call>"),
    ("qwen3_coder", "<tool_call>now</tool_call>"),
    ("qwen3_coder", "<tool_call><function=now>more</function></tool_call>"),
    ("deepseekv3", "<｜tool▁calls▁begin｜>now<｜tool▁calls▁end｜>"),
    ("deepseekv3", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
    ("kimi_k2", KIMI.replace("weather:0", "weather")),
]


@pytest.mark.parametrize("style, answer", NO_CALLS, ids=lambda value: value[:30])
def test_what_is_no_call_of_a_tool_stays_in_the_text(style, answer):
    assert read(style, [answer]) == (answer, [])
    assert read(style, [answer[i : i + 7] for i in range(0, len(answer), 7)]) == (answer, [])


FRAGMENTS = {
    "qwen25": [
        "<tool_call>",
        "</tool_call>",
        '{"name": "now"}',
        "<",
        "</tool",
        "_call>",
        " ",
        "\n",
        "x",
        "{",
    ],
    "llama3": ["<|python_tag|>", '{"name": "now"}', ";", " ", "{", "x", "<|py"],
    "mistral": ["[TOOL_CALLS]", '[{"name": "now"}]', "[", "TOOL", " ", "x", "now[ARGS]{}"],
}


@given(st.sampled_from(sorted(FRAGMENTS)), st.data())
def test_pieces_of_a_text_give_what_the_text_gives(style, data):
    """After each piece too, however the text before it was cut: a stream that another worker goes on with."""
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS[style]), max_size=12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    calls, so_far, found = ToolCalls(STYLES[style], TOOLS), "", []
    for begin, end in zip([0, *cuts], [*cuts, len(text)]):
        piece, more = calls.feed(text[begin:end])
        so_far, found = so_far + piece, found + more
        assert (so_far, found) == ToolCalls(STYLES[style], TOOLS).feed(text[:end])
    piece, more = calls.feed("", is_last=True)
    assert (so_far + piece, found + more) == ToolCalls(STYLES[style], TOOLS).feed(text, is_last=True)
    if not found + more:
        assert so_far + piece == text
