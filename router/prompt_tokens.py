"""A request's prompt as token ids, for exact routing: the worker's tokenizer and chat template, again.

Only requests whose ids are certain are tokenized: token ids, plain text, or chat messages of plain text
without tools. Anything else, and what is longer than any context, is None, and is routed by its
approximate image.
"""

import asyncio
import datetime
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import msgspec
import tokenizers

from router.call import BAD_JSON, Call, Fields

log = logging.getLogger("router")

INLINE_BYTES = 4000  # longer requests are read, rendered and encoded on a thread: 1 MB takes 100 ms
MOST_BYTES = 4 << 20  # a million tokens of ordinary text; each takes 100 bytes and more while they are made
LOOPS_OVER_CONTENT = re.compile(r"\bin\s+(?:content\b|\w+\.content\b|\w+\[\s*['\"]content['\"]\s*\])")
TESTS_FOR_STRING = re.compile(r"\bis\s+(?:not\s+)?string\b")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class PromptTokens:
    """The tokenizer files of one directory. Raises ValueError, naming the file, when they do not load."""

    def __init__(self, directory: str, chat_template: str | None = None) -> None:
        folder = Path(directory)
        file = folder / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises bare Exception
            raise ValueError(f"{file}: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = _object(folder / "tokenizer_config.json")
        self.special = {name: _token(settings.get(name)) for name in SPECIAL if settings.get(name)}
        self.bos, self.eos = settings.get("add_bos_token"), settings.get("add_eos_token")
        self.template = self._compiled(folder, settings, chat_template)
        self.threads = ThreadPoolExecutor(1, "tokenize")

    async def ids(self, call: Call) -> list[int] | None:
        """The prompt's token ids; None when they are not certain."""
        fields = call.fields
        if fields is None or fields.system or (len(call.body) > MOST_BYTES and not fields.input_ids):
            return None
        if len(call.body) <= INLINE_BYTES:
            return self._ids(call, fields)
        return await asyncio.get_running_loop().run_in_executor(self.threads, self._ids, call, fields)

    def _ids(self, call: Call, fields: Fields) -> list[int] | None:
        prompt = self._text(call, fields)
        return prompt if prompt is None or isinstance(prompt, list) else self._encode(*prompt)

    def _text(self, call: Call, fields: Fields) -> list[int] | tuple[str, bool] | None:
        """Ids, or (text, whether special tokens are added to it)."""
        try:
            if fields.input_ids:
                ids = msgspec.json.decode(fields.input_ids, type=list[int])
                return ids if all(0 <= i < 1 << 32 for i in ids) else None
            if fields.messages:
                return self._chat(call)
            raw = fields.text or fields.prompt
            if not raw or call.path not in ("/generate", "/v1/completions"):
                return None
            prompt = msgspec.json.decode(raw)
        except BAD_JSON:
            return None
        return (prompt, True) if isinstance(prompt, str) else None

    def _chat(self, call: Call) -> tuple[str, bool] | None:
        if self.template is None or call.path != "/v1/chat/completions":
            return None
        body = msgspec.json.decode(call.body)
        messages = body.get("messages")
        if body.get("tools") or body.get("continue_final_message") or not isinstance(messages, list):
            return None
        if body.get("reasoning_effort"):
            return None
        variables = body.get("chat_template_kwargs") or {}
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                return None
            if message.get("tool_calls"):
                return None
        # As the worker does, for templates ask whether a message has a field. Of calls there are none.
        messages = [
            {name: value for name, value in message.items() if value is not None and name != "tool_calls"}
            for message in messages
        ]
        try:
            text = self.template.render(
                **self.special, **variables, messages=messages, tools=None, documents=None,
                add_generation_prompt=body.get("add_generation_prompt", True),
            )  # fmt: skip
        except Exception:  # templates fail in every way on messages they do not expect
            return None
        return text, False

    def _encode(self, text: str, special: bool) -> list[int]:
        # Without the offsets that nobody asks for: 0.9 instead of 1.25 ms for 8,000 tokens.
        ids = self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
        if not special:
            return ids
        bos, eos = self._id("bos_token"), self._id("eos_token")
        if self.bos is not None and bos is not None:
            has = bool(ids) and ids[0] == bos and self._adds(bos, 0)
            if self.bos and not has:
                ids = [bos, *ids]
            elif not self.bos and has:
                ids = ids[1:]
        if self.eos is not None and eos is not None:
            has = bool(ids) and ids[-1] == eos and self._adds(eos, -1)
            if self.eos and not has:
                ids = [*ids, eos]
            elif not self.eos and has:
                ids = ids[:-1]
        return ids

    def _adds(self, token: int, at: int) -> bool:
        """Whether the tokenizer itself puts `token` there, judged by the empty text."""
        around = self.tokenizer.encode("", add_special_tokens=True).ids
        return bool(around) and around[at] == token

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)

    def _compiled(self, folder: Path, settings: dict, override: str | None) -> jinja2.Template | None:
        file = Path(override) if override else folder / "chat_template.jinja"
        source = settings.get("chat_template")
        if override or file.is_file():
            source = file.read_text("utf-8")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        if LOOPS_OVER_CONTENT.search(source) and not TESTS_FOR_STRING.search(source):
            return None  # it takes content in parts, into which the worker would bring plain text
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            log.warning("chat template of %s: %s; chats are routed approximately", folder, error)
            return None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _token(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return value if isinstance(value, dict) else {}
