"""What a body asks the output to be, as grammars.

Fields of all routes become `Ask`s, and these grammars, beside the event loop: a check may take a second.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from jaxserve.server.errors import RequestError
from jaxserve.server.schema import SamplingParams, check_members, show
from jaxserve.server.service import Service
from jaxserve.text import grammar
from jaxserve.text.deep_stack import start_deep
from jaxserve.text.grammar import GrammarError

MAX_GRAMMARS = 8  # different ones in one body
NATIVE_FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")
NUM_KEPT = 128  # checked grammars, at most 0.4 MB each with what they were made of
Kind = Literal["json_schema", "regex", "ebnf", "structural_tag", "calls"]


@dataclass(frozen=True)
class Ask:
    """A field's value that asks for a grammar.

    Args:
        param: the field, for messages.
        source: JSON, but for a regex and EBNF. Of calls: the schema of each tool's parameters by its name.
        lenient: a schema's keywords that are not served are left out.
        most: calls.
    """

    param: str
    kind: Kind
    source: str
    lenient: bool = True
    most: int | None = None


def make_ask(param: str, kind: Kind, value: Any, *, lenient: bool = True, most: int | None = None) -> Ask:
    """Raises RequestError for what is no JSON."""
    if not isinstance(value, str):
        try:
            value = msgspec.json.encode(value).decode()
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{param} cannot be written as JSON: {error}", param=param) from None
    return Ask(param, kind, value, lenient, most)


def only_ask(asks: Sequence[Ask]) -> Ask | None:
    """The one that there is. Raises RequestError when there are more."""
    if len(asks) > 1:
        names = " and ".join(ask.param for ask in asks)
        raise RequestError(f"{names} each say what the output must be; give one of them", param=asks[1].param)
    return asks[0] if asks else None


def field_asks(values: Mapping[str, Any], name: Callable[[str], str] = str) -> list[Ask]:
    """Those of SGLang's fields that are given."""
    return [
        make_ask(name(field), field, values[field])
        for field in NATIVE_FIELDS
        if values.get(field) is not None and values[field] != ""
    ]


def native_asks(params: Sequence[SamplingParams], name: Callable[[str], str]) -> list[Ask | None]:
    """One a prompt, of the native route. Raises RequestError."""
    by_id = {
        id(each): only_ask(field_asks({field: getattr(each, field) for field in NATIVE_FIELDS}, name))
        for each in {id(p): p for p in params}.values()
    }
    return [by_id[id(each)] for each in params]


def format_ask(form: Mapping[str, Any] | None) -> Ask | None:
    """What an OpenAI body's response_format asks for. Raises RequestError."""
    kind = form.get("type") if form is not None else "text"
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        check_members(form, ("type", "schema"), "response_format")
        return make_ask("response_format", "json_schema", form.get("schema") or {"type": "object"})
    if kind == "structural_tag":
        return make_ask("response_format", "structural_tag", form)
    if kind != "json_schema":
        raise RequestError(
            f"response_format of type {show(kind)} is not supported; text, json_object, json_schema and "
            "structural_tag are",
            param="response_format",
            code="unsupported_parameter",
        )
    check_members(form, ("type", "json_schema"), "response_format")
    given = form.get("json_schema")
    if not isinstance(given, dict) or not isinstance(given.get("schema"), (dict, bool)):
        raise RequestError(
            "response_format.json_schema must be an object with a schema", param="response_format.json_schema"
        )
    check_members(given, ("name", "description", "schema", "strict"), "response_format.json_schema")
    strict = given.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(
            f"response_format.json_schema.strict must be of type bool, got {show(strict)}",
            param="response_format.json_schema.strict",
        )
    param = "response_format.json_schema.schema"
    return make_ask(param, "json_schema", given["schema"], lenient=not strict)


async def resolve(service: Service, asks: Sequence[Ask | None]) -> list[str]:
    """The grammar of each; empty for None. Raises RequestError."""
    different = dict.fromkeys(ask for ask in asks if ask is not None)
    if not different:
        return [""] * len(asks)
    first = next(iter(different))
    if service.config.grammar_backend == "none":
        raise RequestError(
            f"{first.param} is not supported by this server, which was started with --grammar-backend none",
            param=first.param,
            code="unsupported_parameter",
        )
    if service.tokenizer is None:
        raise RequestError(
            f"{first.param} needs a tokenizer; this server runs with --skip-tokenizer-init", param=first.param
        )
    if len(different) > MAX_GRAMMARS:
        raise RequestError(
            f"{first.param} has {len(different)} different values; a request may have {MAX_GRAMMARS}",
            param=first.param,
        )
    white_space = not service.config.constrained_json_disable_any_whitespace
    made = {}
    for ask in different:
        args = ask.kind, ask.source, ask.lenient, ask.most, white_space
        try:
            async with service.turn_of_grammars:  # in a thread of its own, for which no shutdown waits
                made[ask] = await asyncio.wrap_future(start_deep(_make, *args))
        except GrammarError as error:
            raise RequestError(f"{ask.param}: {error}", param=ask.param) from None
    return [made[ask] if ask is not None else "" for ask in asks]


@functools.lru_cache(NUM_KEPT)
def _make(kind: Kind, source: str, lenient: bool, most: int | None, white_space: bool) -> str:
    """Raises GrammarError."""
    if kind == "json_schema":
        return grammar.of_json_schema(source, lenient=lenient, white_space=white_space)
    if kind == "regex":
        return grammar.of_regex(source)
    if kind == "ebnf":
        return grammar.of_ebnf(source)
    if kind == "structural_tag":
        return grammar.of_structural_tag(source, white_space=white_space)
    return grammar.of_calls(source, most=most, lenient=lenient, white_space=white_space)
