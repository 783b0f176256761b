"""Calls of tools in what a model says, by the formats that families are trained on.

`ToolCalls` takes one answer apart as it comes. What looks like a call and cannot be read, or names no tool
of the request, stays in the text: nothing is lost.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.text.tags import num_uncertain

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by the tool's name."""


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is a JSON object as text; `id` is the model's own, where its format has one."""

    name: str
    arguments: str
    id: str | None = None


class NoCallError(ValueError):
    """The text is no call."""


def read_object(text: str, tools: Tools) -> list[ToolCall]:
    """One JSON object (Hermes, Qwen2.5, Qwen3)."""
    return [_call_of(json.loads(text))]


def read_objects(text: str, tools: Tools) -> list[ToolCall]:
    """JSON objects with semicolons, commas or nothing between them (Llama 3)."""
    decoder, calls, at = json.JSONDecoder(), [], 0
    while found := re.compile(r"[\s;,]*(?=\S)").match(text, at):
        value, at = decoder.raw_decode(text, found.end())
        calls.append(_call_of(value))
    return calls


def read_list(text: str, tools: Tools) -> list[ToolCall]:
    """A JSON list of calls, or a name and [ARGS] before each object (Mistral)."""
    if "[ARGS]" not in text:
        values = json.loads(text)
        if not isinstance(values, list):
            raise NoCallError(text)
        return [_call_of(value) for value in values]
    parts = (part.partition("[ARGS]") for part in text.split("[TOOL_CALLS]"))
    return [_call(name, json.loads(arguments)) for name, _, arguments in parts]


def read_deepseek(text: str, tools: Tools) -> list[ToolCall]:
    """Calls between tags of their own, with a type and a fence of code (V3) or without (V3.1)."""
    calls = []
    for block in _blocks(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"):
        first, _, rest = block.partition("<｜tool▁sep｜>")
        fenced = re.fullmatch(r"([^\n]+)\n```json\n(.*)\n```\s*", rest, re.DOTALL)
        name, arguments = fenced.groups() if fenced else (first, rest)
        calls.append(_call(name, json.loads(arguments)))
    return calls


def read_kimi(text: str, tools: Tools) -> list[ToolCall]:
    """Calls between tags of their own, named functions.NAME:NUMBER."""
    calls = []
    for block in _blocks(text, "<|tool_call_begin|>", "<|tool_call_end|>"):
        name, _, arguments = block.partition("<|tool_call_argument_begin|>")
        found = re.fullmatch(r"(?:functions\.)?(.+):\d+", name.strip())
        if not found:
            raise NoCallError(name)
        calls.append(_call(found[1], json.loads(arguments), name.strip()))
    return calls


def read_glm(text: str, tools: Tools) -> list[ToolCall]:
    """A name, then pairs of tags for each argument (GLM-4.5)."""
    name, *_ = text.split("<arg_key>", 1)
    pattern = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"
    return [_call_with_texts(name, text[len(name) :], pattern, tools)]


def read_qwen_coder(text: str, tools: Tools) -> list[ToolCall]:
    """Tags that name the function and each parameter (Qwen3-Coder)."""
    found = re.fullmatch(r"\s*<function=([^>]+)>(.*)</function>\s*", text, re.DOTALL)
    if not found:
        raise NoCallError(text)
    pattern = r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>"
    return [_call_with_texts(found[1], found[2], pattern, tools)]


def read_arguments(name: str, text: str) -> ToolCall | None:
    """None where the text is no JSON object."""
    try:
        return _call(name, json.loads(text))
    except (ValueError, RecursionError):
        return None


def _call_of(value: Any) -> ToolCall:
    if not isinstance(value, dict):
        raise NoCallError(value)
    return _call(value.get("name"), value.get("arguments", value.get("parameters", {})))


def _call(name: Any, arguments: Any, id: str | None = None) -> ToolCall:
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise NoCallError(name)
    return ToolCall(name.strip(), json.dumps(arguments, ensure_ascii=False), id)


def _call_with_texts(name: str, text: str, pattern: str, tools: Tools) -> ToolCall:
    """Arguments in plain text: what the schema says is a string stays one, all else is JSON if it can be."""
    name = name.strip()
    if re.sub(pattern, "", text, flags=re.DOTALL).strip():
        raise NoCallError(text)
    properties = tools.get(name, {}).get("properties") or {}
    arguments = {}
    for key, value in re.findall(pattern, text, re.DOTALL):
        schema = properties.get(key.strip())
        is_string = isinstance(schema, Mapping) and schema.get("type") == "string"
        arguments[key.strip()] = value if is_string else _json_or_text(value)
    return _call(name, arguments)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _blocks(text: str, opening: str, closing: str) -> list[str]:
    pattern = re.escape(opening) + "(.*?)" + re.escape(closing)
    if re.sub(pattern, "", text, flags=re.DOTALL).strip():
        raise NoCallError(text)
    return re.findall(pattern, text, re.DOTALL)


@dataclass(frozen=True)
class ToolStyle:
    """Where calls begin and end, and who reads what is between.

    Args:
        closing: empty: calls go on to the end of the text.
        bare: an answer that begins with a brace is calls too.
        special: its tags are special tokens, which texts leave out.
    """

    opening: str
    closing: str
    read: Callable[[str, Tools], list[ToolCall]]
    bare: bool = False
    special: bool = False


# By the names of SGLang's --tool-call-parser.
STYLES = {
    "deepseekv3": ToolStyle("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", read_deepseek, special=True),
    "deepseekv31": ToolStyle("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", read_deepseek, special=True),
    "glm45": ToolStyle("<tool_call>", "</tool_call>", read_glm),
    "kimi_k2": ToolStyle(
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", read_kimi, special=True
    ),
    "llama3": ToolStyle("<|python_tag|>", "", read_objects, bare=True, special=True),
    "mistral": ToolStyle("[TOOL_CALLS]", "", read_list, special=True),
    "qwen25": ToolStyle("<tool_call>", "</tool_call>", read_object),
    "qwen3_coder": ToolStyle("<tool_call>", "</tool_call>", read_qwen_coder),
}


class ToolCalls:
    """Takes the text of one answer in pieces, and gives out (text, calls) as they become certain.

    What is held back meanwhile follows from all of the text so far, wherever its pieces end: a call that has
    not ended, and what may be the beginning of one with the white space before it, which is no text.
    """

    def __init__(self, style: ToolStyle, tools: Tools):
        self._style, self._tools = style, tools
        self._held = ""
        self._is_open = False  # a call has begun, at the first character of `_held` that is no white space
        self._num_calls = 0
        self._has_text = False

    def feed(self, text: str, is_last: bool = False) -> tuple[str, list[ToolCall]]:
        self._held += text
        texts: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if not self._is_open:
                texts.append(self._take_text(is_last))
            if not self._is_open or not self._take_calls(is_last, texts, calls):
                break
        self._num_calls += len(calls)
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
            if self._num_calls and not held.strip():
                held = ""
        else:
            count = len(held) - num_uncertain(held, style.opening)
        self._held = self._held[count:]
        self._has_text = self._has_text or bool(held[:count].strip())
        return held[:count]

    def _take_calls(self, is_last: bool, texts: list[str], calls: list[ToolCall]) -> bool:
        """Whether the calls at the beginning of `_held` have ended, and are taken."""
        style = self._style
        block = self._held.lstrip()
        begin = len(style.opening) if block.startswith(style.opening) else 0
        end = block.find(style.closing, begin) if style.closing else -1
        if end < 0 and not is_last:
            return False
        inner = block[begin:] if end < 0 else block[begin:end]
        after = len(block) if end < 0 else end + len(style.closing)
        try:
            found = style.read(inner, self._tools) if end >= 0 or not style.closing else []
        except (ValueError, RecursionError):
            found = []
        if found and all(call.name in self._tools for call in found):
            calls += found
        else:
            texts.append(self._held[: len(self._held) - len(block) + after])
            self._has_text = True
        self._held, self._is_open = block[after:], False
        return True
