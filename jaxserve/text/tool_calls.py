"""Calls of tools in what a model says, by the formats that families are trained on.

`ToolCalls` takes one answer apart as it comes. Calls that cannot be read, or of which one names no tool of
the request, stay in the text as they are: nothing is lost.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.text.tags import Holder, num_uncertain

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by the tool's name."""


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is a JSON object as text; `id` is the model's own, where it gave one."""

    name: str
    arguments: str
    id: str | None = None


class NoCallError(ValueError):
    """The text is no call."""


Found = tuple[list[ToolCall], str]
"""Calls, and the text behind them."""

DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings
SPACE = re.compile(r"\s*")
BETWEEN = re.compile(r"[\s;,]*")


# ---- formats: each reads what lies between the tags of its style, in one pass, or raises a ValueError ----


def read_objects(text: str, tools: Tools) -> Found:
    """JSON objects with semicolons, commas or nothing between them (Hermes, Qwen2.5, Qwen3, Llama 3)."""
    calls, at = [], 0
    while (begin := _skip(text, at, BETWEEN)) < len(text):
        try:
            value, end = DECODER.raw_decode(text, begin)
            calls.append(call_of(value))
        except (ValueError, RecursionError):
            if calls:
                break
            raise
        at = end
    return calls, "" if begin == len(text) else text[at:]


def read_mistral(text: str, tools: Tools) -> Found:
    """A JSON list of calls; or each as its name, since 2025, with an id in some versions, and arguments."""
    begin = _skip(text, 0)
    if text.startswith(("[", "{"), begin):
        values, end = DECODER.raw_decode(text, begin)
        return [call_of(value) for value in (values if isinstance(values, list) else [values])], text[end:]
    calls = []
    while True:
        head, found, text = text.partition("[ARGS]")
        if not found:
            raise NoCallError(head)
        name, _, id = head.partition("[CALL_ID]")
        arguments, end = DECODER.raw_decode(text, _skip(text, 0))
        calls.append(_call(name, arguments, id.strip() or None))
        text = text[end:]
        if not text.lstrip().startswith("[TOOL_CALLS]"):
            return calls, text
        text = text.lstrip().removeprefix("[TOOL_CALLS]")


def read_deepseek(text: str, tools: Tools) -> Found:
    """Calls between tags of their own, with a type and a fence of code (V3) or without (V3.1)."""
    calls = []
    for block in _blocks(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"):
        first, _, rest = block.partition("<｜tool▁sep｜>")
        name, found, fenced = rest.partition("\n```json\n")
        arguments = fenced.rstrip().removesuffix("```") if found else rest
        calls.append(_call(name if found else first, DECODER.decode(arguments)))
    return calls, ""


def read_kimi(text: str, tools: Tools) -> Found:
    """Calls between tags of their own, named functions.NAME:NUMBER."""
    calls = []
    for block in _blocks(text, "<|tool_call_begin|>", "<|tool_call_end|>"):
        id, _, arguments = block.partition("<|tool_call_argument_begin|>")
        name, _, number = id.strip().removeprefix("functions.").rpartition(":")
        if not number.isdecimal():
            raise NoCallError(id)
        calls.append(_call(name, DECODER.decode(arguments), id.strip()))
    return calls, ""


def read_glm(text: str, tools: Tools) -> Found:
    """A name, then pairs of tags for each argument (GLM-4.5)."""
    name, found, rest = text.partition("<arg_key>")
    rest, arguments = found + rest, []
    at = 0
    while (at := _skip(rest, at)) < len(rest):
        key, at = _block(rest, at, "<arg_key>", "</arg_key>")
        value, at = _block(rest, _skip(rest, at), "<arg_value>", "</arg_value>")
        arguments.append((key, value))
    return [_call_with_texts(name, arguments, tools)], ""


def read_qwen_coder(text: str, tools: Tools) -> Found:
    """Tags that name the function and each parameter (Qwen3-Coder)."""
    return _read_xml(text, tools, ("<function=", ">", "</function>"), ("<parameter=", ">", "</parameter>"))


def read_minimax(text: str, tools: Tools) -> Found:
    """The same with the names in quotes (MiniMax-M2)."""
    return _read_xml(
        text, tools, ('<invoke name="', '">', "</invoke>"), ('<parameter name="', '">', "</parameter>")
    )


def _read_xml(
    text: str, tools: Tools, function: tuple[str, str, str], parameter: tuple[str, str, str]
) -> Found:
    """Both as the tag's beginning, what ends the name in it, and the closing tag."""
    calls = []
    for call in _blocks(text, function[0], function[2]):
        name, found, body = call.partition(function[1])
        if not found:
            raise NoCallError(call)
        arguments = []
        for block in _blocks(body, parameter[0], parameter[2]):
            key, _, value = block.partition(parameter[1])
            arguments.append((key, value.removeprefix("\n").removesuffix("\n")))
        calls.append(_call_with_texts(name, arguments, tools))
    return calls, ""


def read_arguments(name: str, text: str) -> ToolCall | None:
    """None where the text is no JSON object."""
    try:
        return _call(name, DECODER.decode(text))
    except (ValueError, RecursionError):
        return None


def call_of(value: Any) -> ToolCall:
    """Of an object with a name, and arguments or parameters. Raises ValueError for what is no call."""
    if not isinstance(value, dict):
        raise NoCallError(value)
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = DECODER.decode(arguments)
    id = value.get("id")
    return _call(
        value.get("name"), {} if arguments is None else arguments, id if isinstance(id, str) else None
    )


def _call(name: Any, arguments: Any, id: str | None = None) -> ToolCall:
    """Raises ValueError for what is no call, and for what JSON or UTF-8 cannot say."""
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise NoCallError(name)
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    (name + text + (id or "")).encode()
    return ToolCall(name.strip(), text, id)


def _call_with_texts(name: str, arguments: list[tuple[str, str]], tools: Tools) -> ToolCall:
    name = name.strip()
    properties = tools.get(name, {}).get("properties")
    schemas = properties if isinstance(properties, Mapping) else {}
    return _call(name, {key.strip(): _typed(value, schemas.get(key.strip())) for key, value in arguments})


def _typed(text: str, schema: Any) -> Any:
    """An argument in plain text by its schema: a string stays one, all else is JSON if it can be."""
    types = _types(schema)
    bare = text.strip().lower()
    if "null" in types and bare in ("null", "none"):
        return None
    if "string" in types:
        return text
    if "boolean" in types and bare in ("true", "false"):
        return bare == "true"
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    names = list(given) if isinstance(given, list) else [given]
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        if isinstance(choices, list):
            names += [choice.get("type") for choice in choices if isinstance(choice, Mapping)]
    return {name for name in names if isinstance(name, str)}


def _skip(text: str, at: int, what: re.Pattern[str] = SPACE) -> int:
    found = what.match(text, at)
    assert found is not None, "it matches nothing too"
    return found.end()


def _blocks(text: str, opening: str, closing: str) -> list[str]:
    """What lies between the tags; between two blocks nothing may."""
    blocks, at = [], 0
    while (at := _skip(text, at)) < len(text):
        block, at = _block(text, at, opening, closing)
        blocks.append(block)
    return blocks


def _block(text: str, at: int, opening: str, closing: str) -> tuple[str, int]:
    """(what lies between the tags, where that ends). Raises NoCallError."""
    begin = at + len(opening)
    end = text.find(closing, begin) if text.startswith(opening, at) else -1
    if end < 0:
        raise NoCallError(opening)
    return text[begin:end], end + len(closing)


@dataclass(frozen=True)
class ToolStyle:
    """Where calls begin and end, and who reads what is between.

    Args:
        closing: empty: calls go on to the end of the text.
        bare: an answer that begins with a brace is calls too.
        short_ids: templates of the family want ids of nine letters and digits.
    """

    opening: str
    closing: str
    read: Callable[[str, Tools], Found]
    bare: bool = False
    short_ids: bool = False


HERMES = ToolStyle("<tool_call>", "</tool_call>", read_objects)
DEEPSEEK = ToolStyle("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", read_deepseek)
# By the names of SGLang's --tool-call-parser.
STYLES = {
    "deepseekv3": DEEPSEEK,
    "deepseekv31": DEEPSEEK,
    "glm45": ToolStyle("<tool_call>", "</tool_call>", read_glm),
    "hermes": HERMES,
    "kimi_k2": ToolStyle("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", read_kimi),
    "llama3": ToolStyle("<|python_tag|>", "", read_objects, bare=True),
    "minimax-m2": ToolStyle("<minimax:tool_call>", "</minimax:tool_call>", read_minimax),
    "mistral": ToolStyle("[TOOL_CALLS]", "", read_mistral, short_ids=True),
    "qwen": HERMES,
    "qwen25": HERMES,
    "qwen3_coder": ToolStyle("<tool_call>", "</tool_call>", read_qwen_coder),
}


class ToolCalls(Holder):
    """Takes the text of one answer in pieces, and gives out (text, calls) as they become certain.

    What is held back meanwhile follows from all of the text so far, wherever its pieces end: a call that has
    not ended, and what may be the beginning of one with the white space before it, which is no text.
    """

    def __init__(self, style: ToolStyle, tools: Tools):
        super().__init__()
        self._style, self._tools = style, tools
        self._is_open = False  # a call has begun, at the first character of `_held` that is no white space
        self._has_text = False
        self._follows_call = False  # nothing but white space has come since

    def feed(self, text: str, is_last: bool = False) -> tuple[str, list[ToolCall]]:
        self._hold(text)
        texts: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if not self._is_open:
                texts.append(self._take_text(is_last))
            if not self._is_open or not self._take_calls(is_last, texts, calls):
                break
        return "".join(texts), calls

    def _take_text(self, is_last: bool) -> str:
        """The text before the next call, or what of it is certain."""
        held, style = self._held, self._style
        at = held.find(style.opening)
        if style.bare and not self._has_text and held.lstrip().startswith("{"):
            at = 0
        if at >= 0:
            self._is_open = True
            count = len(held[:at].rstrip())
        elif is_last:
            count = len(held)
        else:
            count = len(held) - num_uncertain(held, [style.opening])
        text, self._held = held[:count], held[count:]
        if text.strip():
            self._has_text, self._follows_call = True, False
        return "" if self._follows_call else text

    def _take_calls(self, is_last: bool, texts: list[str], calls: list[ToolCall]) -> bool:
        """Whether the calls at the beginning of `_held` have ended, and are taken."""
        style = self._style
        if not is_last and not (style.closing and self._has_closing(style.closing)):
            return False
        block = self._held.lstrip()
        begin = len(style.opening) if block.startswith(style.opening) else 0
        end = block.find(style.closing, begin) if style.closing else -1
        inner = block[begin:] if end < 0 else block[begin:end]
        after = len(block) if end < 0 else end + len(style.closing)
        found, rest = self._read(inner) if end >= 0 or not style.closing else ([], "")
        if found:
            calls += found
            texts.append(rest if rest.strip() else "")
        else:
            texts.append(self._held[: len(self._held) - len(block) + after])
        self._has_text = self._has_text or bool(texts[-1])
        self._follows_call = not texts[-1]
        self._held, self._is_open, self._searched = block[after:], False, 0
        return True

    def _has_closing(self, closing: str) -> bool:
        at = self._held.find(closing, max(0, self._searched - len(closing)))
        self._searched = len(self._held)
        return at >= 0

    def _read(self, text: str) -> Found:
        """No calls, where they cannot be read or one is of no tool."""
        try:
            calls, rest = self._style.read(text, self._tools)
        except (ValueError, RecursionError):
            return [], ""
        return (calls, rest) if all(call.name in self._tools for call in calls) else ([], "")
