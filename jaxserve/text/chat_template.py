"""Chat messages to prompt text, by a checkpoint's Jinja template.

Owns the sandboxed environment that Hugging Face templates expect and where a template is found.
Templates come from the operator's checkpoint or `--chat-template`, never from a request.
"""

import datetime
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from jaxserve.text.tokenizer import read_json

LOOPS_OVER_CONTENT = re.compile(
    r"\bfor\s+\w+\s+in\s+(?:content\b|\w+\.content\b|\w+\[\s*['\"]content['\"]\s*\])"
)
TESTS_FOR_STRING = re.compile(r"\bis\s+(?:not\s+)?string\b")


class ChatTemplateError(ValueError):
    """The template refused the messages, or failed on them; the message says why."""


class ChatTemplate:
    """One compiled template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        """Raises ChatTemplateError."""
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._template = _compile(source)
        self._takes_parts = bool(LOOPS_OVER_CONTENT.search(source))
        self._takes_strings = not self._takes_parts or bool(TESTS_FOR_STRING.search(source))

    @property
    def names_tools(self) -> bool:
        """Whether the tools of a request can make a difference to its prompt."""
        return "tools" in self.source

    @classmethod
    def from_dir(
        cls,
        path: str | Path,
        override: str | Path | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> "ChatTemplate | None":
        """The template of a tokenizer directory; `override` is a file that wins over it.

        None when there is none. Raises ChatTemplateError or TokenizerError, which name the file.
        """
        try:
            if override is not None:
                return cls(Path(override).read_text("utf-8"), special_tokens)
            file = Path(path) / "chat_template.jinja"
            if file.is_file():
                return cls(file.read_text("utf-8"), special_tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"chat_template={override or file}: {error}") from error
        found = read_json(Path(path) / "tokenizer_config.json").get("chat_template")
        if isinstance(found, str):
            return cls(found, special_tokens)
        if isinstance(found, list):  # several, by name
            named = {str(t.get("name")): str(t.get("template")) for t in found if isinstance(t, dict)}
            if named:
                default = named.get("default") or next(iter(named.values()))
                return cls(default, special_tokens)
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `continue_final_message` leaves the last message open for the model to go on;
        `variables` are further names for the template.

        Raises ChatTemplateError.
        """
        names = {
            **self._special_tokens,
            **(variables or {}),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            try:
                return self._fill(names, [self._prepare(m) for m in messages], continue_final_message)
            except TypeError:  # a template that joins calls' arguments to its text wants them as text
                prepared = [self._prepare(m, arguments_as_text=True) for m in messages]
                return self._fill(names, prepared, continue_final_message)
        except ChatTemplateError:
            raise
        except jinja2.TemplateError as error:
            raise ChatTemplateError(str(error.message or type(error).__name__)) from error
        except (
            Exception
        ) as error:  # templates run into TypeError, KeyError, ... on messages they do not expect
            raise ChatTemplateError(f"the chat template cannot render these messages: {error}") from error

    def _fill(self, names: dict[str, Any], messages: list[dict[str, Any]], continues: bool) -> str:
        text = self._template.render({**names, "messages": messages})
        if not continues:
            return text
        mark = uuid.uuid4().hex
        marked = [*messages[:-1], _with_mark(messages[-1], mark)]
        return _open_end(text, self._template.render({**names, "messages": marked}), mark)

    def _prepare(self, message: Mapping[str, Any], arguments_as_text: bool = False) -> dict[str, Any]:
        """Content in the form the template takes; tool-call arguments as objects, not JSON text. Templates
        ask whether a message has this or that, so what is null is left out, as is an empty list of calls."""
        out = {name: value for name, value in message.items() if name == "content" or value is not None}
        content = out.get("content")
        if isinstance(content, list) and not self._takes_parts:
            out["content"] = text_of(content)
        elif isinstance(content, str) and not self._takes_strings:
            out["content"] = [{"type": "text", "text": content}]
        if out.get("tool_calls") == []:
            del out["tool_calls"]
        elif isinstance(out.get("tool_calls"), list) and not arguments_as_text:
            out["tool_calls"] = [_parsed_arguments(call) for call in out["tool_calls"]]
        return out


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of text parts joined by a space."""
    if isinstance(content, list):
        return " ".join(
            p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str)
        )
    return content if isinstance(content, str) else ""


def _with_mark(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with a mark at the end of its last text. Raises ChatTemplateError when it has none."""
    content = message.get("content")
    if text_of(content).strip():
        if isinstance(content, str):
            return {**message, "content": content + mark}
        assert isinstance(content, list), "nothing else has a text"
        last = max(i for i, part in enumerate(content) if isinstance(part.get("text"), str))
        part = {**content[last], "text": content[last]["text"] + mark}
        return {**message, "content": [*content[:last], part, *content[last + 1 :]]}
    raise ChatTemplateError("continue_final_message: the final message's content is empty")


def _open_end(text: str, marked: str, mark: str) -> str:
    """The rendered text cut right after the final message's own, which is where `marked` has the mark."""
    kept, found, _ = marked.rpartition(mark)
    if not found:
        raise ChatTemplateError("continue_final_message: the chat template changes the final message")
    # The mark keeps the space before it, which a template that strips its messages loses.
    return kept if text.startswith(kept) else kept.rstrip()


def _parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


def _compile(source: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here the block is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Plain JSON; jinja2's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _make_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _make_environment()
