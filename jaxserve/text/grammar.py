"""What an output has to be, as a grammar of the library `llguidance`: the text in `Sampling.grammar`.

Owns how a JSON schema, a regular expression, an EBNF grammar, a structural tag and calls of tools become such
texts. All functions that make one raise GrammarError, and nothing else, whatever they are given.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jaxserve.text import ebnf
from jaxserve.text.deep_stack import run_deep
from jaxserve.text.grammar_bounds import (
    MAX_REGEX_CHARS,
    GrammarError,
    check_length,
    check_literals,
    check_regexes,
    count_optional,
)
from jaxserve.text.schema_bounds import REFERENCES, check_schema
from jaxserve.text.tool_calls import Tools

__all__ = ["LIMITS", "GrammarError", "check", "of_calls", "of_ebnf", "of_json_schema", "of_regex"]

# Below the library's limits, with which some grammars take a second or 200 MB to make, and some seconds a
# token. With these, the worst mask that was found takes 30 ms of 128,000 tokens, and a lexer has up to 40 MB.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_max_items=5_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
CHECKED_TOKENS = 3  # some grammars fail behind the first
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # between tokens of JSON; small models would never end it
MAX_TRIGGERS = 32
MAX_REASON_CHARS = 300
DRAFTS = ("http://json-schema.org/draft-", "https://json-schema.org/draft/")
KINDS = ("type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const")  # of keywords that say what a value is
OF_CALL = ("name", "parameters")


def check(grammar: str) -> None:
    """Raises GrammarError with the library's reason.

    The longest that was found within the bounds: 0.9 s, for 2,000 alternatives, or 12,000 lists in an enum.
    """
    try:
        reason = run_deep(_error_of, grammar)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = str(error) or type(error).__name__  # a panic of the library is no Exception
    if reason:
        raise GrammarError(_one_line(reason))


def _error_of(grammar: str) -> str:
    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=LIMITS)
    for _ in range(CHECKED_TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little") % (1 << 256)  # without the end
        if not mask:
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)  # the first that may follow
    return matcher.get_error()


def of_json_schema(schema: Any, *, lenient: bool = True, white_space: bool = True) -> str:
    """
    Args:
        schema: a JSON text, or what one decodes to.
        lenient: keywords that the library knows and does not serve are left out; otherwise they are refused.
        white_space: may stand between the tokens of the JSON.
    """
    schema = _schema(schema, lenient, white_space)
    return _checked({"json_schema": schema})


def of_regex(regex: str) -> str:
    """The whole output matches it. Rust's syntax: neither look-around nor references to groups."""
    check_length(regex, MAX_REGEX_CHARS)
    check_regexes([count_optional(regex)])
    grammar = LLMatcher.grammar_from_regex(regex)
    check(grammar)
    return grammar


def of_ebnf(source: str) -> str:
    return _checked({"lark_grammar": ebnf.to_lark(source)})


def of_structural_tag(tag: Any, *, white_space: bool = True) -> str:
    """Any text, in which JSON by a schema lies between the tags that triggers begin.

    Args:
        tag: a JSON text, or what one decodes to: {"triggers": [], "structures": [{"begin", "schema", "end"}]}
            or {"format": {"type": "triggered_tags", "triggers": [], "tags": [{"begin", "content", "end"}]}}.
    """
    tag = _decoded(tag)
    if not isinstance(tag, dict):
        raise GrammarError("it must be an object")
    _only(tag, ("type", "structures", "triggers", "format"), "it")
    if tag.get("type", "structural_tag") != "structural_tag":
        raise GrammarError(f"its type must be 'structural_tag', not {_shown(tag['type'])}")
    start = "tag* TEXT"
    if "format" in tag:
        triggers, tags, start = _triggered_tags(tag)
    else:
        triggers, tags = tag.get("triggers"), tag.get("structures")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise GrammarError("triggers must be a list of strings that are not empty")
    if not 1 <= len(triggers) <= MAX_TRIGGERS:
        raise GrammarError(f"it must have 1 to {MAX_TRIGGERS} triggers, not {len(triggers)}")
    if not isinstance(tags, list) or not tags or not all(isinstance(entry, dict) for entry in tags):
        raise GrammarError("structures (or a format's tags) must be a list of objects that is not empty")
    choices = []
    for entry in tags:
        _only(entry, ("begin", "schema", "end"), "a structure")
        begin, end = entry.get("begin"), entry.get("end", "")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise GrammarError("begin and end of a structure must be strings")
        check_literals([begin, end])
        found = [i for i, trigger in enumerate(triggers) if begin.startswith(trigger)]
        if not found:
            raise GrammarError(f"begin {_shown(begin)} does not begin with one of the triggers")
        schema = _schema(entry.get("schema", {}), lenient=True, white_space=white_space)
        after = begin[len(triggers[found[0]]) :]
        parts = [
            f"trigger{found[0]}",
            after and ebnf.quoted(after),
            f"%json {_json(schema)}",
            end and ebnf.quoted(end),
        ]
        choices.append(" ".join(part for part in parts if part))
    lark = [f"start: {start}", "TEXT: /(?s:.*)/", f"tag: {' | '.join(choices)}"]
    lark += [f"trigger{i}[lazy]: TEXT {ebnf.quoted(trigger)}" for i, trigger in enumerate(triggers)]
    return _checked({"lark_grammar": "\n".join(lark)})


def of_calls(
    tools: Tools | str, *, most: int | None = None, lenient: bool = True, white_space: bool = True
) -> str:
    """A JSON list of one call or more, each {"name", "parameters"} by the schema of the tool it names.

    Args:
        tools: as JSON, or what it decodes to.
        most: calls; None: any number.
        lenient: see `of_json_schema`.
    """
    definitions: dict[str, Any] = {}
    choices = []
    for i, (name, schema) in enumerate(_decoded(tools).items()):
        try:
            check_schema(schema)
        except GrammarError as error:
            raise GrammarError(f"parameters of {_shown(name)}: {error}") from None
        if isinstance(schema, dict):
            if schema.get("type", "object") != "object":
                raise GrammarError(f"parameters of {_shown(name)} must be an object")
            if not any(kind in schema for kind in KINDS):
                schema["type"] = "object"
            for name_of_root in ("$id", "$schema"):
                schema.pop(name_of_root, None)
        definitions[str(i)] = _moved(schema, f"#/$defs/{i}")
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{i}"}},
                "required": OF_CALL,
                "additionalProperties": False,
            }
        )
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": choices}, "$defs": definitions}
    if most is not None:
        schema["maxItems"] = most
    return of_json_schema(schema, lenient=lenient, white_space=white_space)


# ---- parts ----


def _checked(grammar: dict[str, Any]) -> str:
    text = _json({"grammars": [grammar]})
    check(text)
    return text


def _schema(schema: Any, lenient: bool, white_space: bool) -> dict[str, Any]:
    """A schema within the bounds, with the library's options in it."""
    schema = _decoded(schema)
    if not isinstance(schema, (dict, bool)):
        raise GrammarError(f"a schema must be an object, not {_shown(schema)}")
    check_schema(schema)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    draft = schema.get("$schema")
    if not isinstance(draft, str) or not draft.startswith(DRAFTS) or "draft-04" in draft:
        schema.pop("$schema", None)  # the library knows some and would look for others
    options: dict[str, Any] = {
        "lenient": lenient,
        "coerce_one_of": lenient,
        "whitespace_flexible": white_space,
    }
    if white_space:
        options["whitespace_pattern"] = WHITE_SPACE
    return {**schema, "x-guidance": options}  # in place of the client's own


def _triggered_tags(tag: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """(triggers, tags as structures, what an output is) of the newer form."""
    form = tag["format"]
    if "structures" in tag or "triggers" in tag:
        raise GrammarError("format goes without structures and triggers")
    kind = form.get("type") if isinstance(form, dict) else form
    if not isinstance(form, dict) or kind != "triggered_tags":
        raise GrammarError(f"a format of type {_shown(kind)} is not served; triggered_tags is")
    _only(form, ("type", "triggers", "tags", "at_least_one", "stop_after_first"), "format")
    tags = form.get("tags")
    structures = []
    for entry in tags if isinstance(tags, list) else []:
        if not isinstance(entry, dict):
            raise GrammarError("tags of a format must be objects")
        _only(entry, ("type", "begin", "content", "end"), "a tag")
        content = entry.get("content")
        of = content.get("type") if isinstance(content, dict) else content
        if not isinstance(content, dict) or of != "json_schema":
            raise GrammarError(f"a tag's content of type {_shown(of)} is not served; json_schema is")
        _only(content, ("type", "json_schema"), "content")
        structures.append(
            {
                "begin": entry.get("begin"),
                "schema": content.get("json_schema", {}),
                "end": entry.get("end", ""),
            }
        )
    at_least_one, only_first = form.get("at_least_one", False), form.get("stop_after_first", False)
    if not isinstance(at_least_one, bool) or not isinstance(only_first, bool):
        raise GrammarError("at_least_one and stop_after_first must be booleans")
    if only_first:
        return form.get("triggers"), structures, "tag" if at_least_one else "tag | TEXT"
    return form.get("triggers"), structures, "tag+ TEXT" if at_least_one else "tag* TEXT"


def _only(given: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    for name in given:
        if name not in names:
            raise GrammarError(f"{what} has {_shown(name)}, which is not served; {', '.join(names)} are")


def _moved(schema: Any, root: str) -> Any:
    """The schema with its references as they are where its root is at `root`."""
    if isinstance(schema, list):
        return [_moved(entry, root) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    for key in REFERENCES:
        if isinstance(schema.get(key), str):
            moved[key] = root + schema[key][1:]
    return moved


def _decoded(value: Any) -> Any:
    """Decoded JSON that is nobody else's, within MAX_CHARS; of a text or of a value."""
    try:
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        check_length(text)
        return msgspec.json.decode(text)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except (msgspec.MsgspecError, TypeError, UnicodeError, OverflowError) as error:
        raise GrammarError(f"it is not JSON: {_one_line(str(error))}") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(reason: str) -> str:
    """Of a regular expression's error the line that says what is wrong, of others the first."""
    if reason.startswith("NoExtension"):
        return "no output fits it"
    lines = reason.splitlines()
    of_regex = [line for line in lines if line.startswith("error: ")]
    line = (of_regex or lines or [""])[0].removeprefix("error: ")
    return line if len(line) <= MAX_REASON_CHARS else f"{line[: MAX_REASON_CHARS - 3]}..."


@functools.cache
def _bytes() -> LLTokenizer:
    """A vocabulary of the 256 bytes: whether a grammar can be built does not depend on a model's."""
    return LLTokenizer("byte")
