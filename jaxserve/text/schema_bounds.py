"""How much a JSON schema may ask of the grammar library; see `grammar_bounds`."""

import math
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from jaxserve.text.grammar_bounds import GrammarError, check_literals, check_regexes, count_optional

MAX_NESTING = 100  # containers in containers; the library's own reader stops at 127
MAX_ENTRIES = 1000  # of an object or a list
LONG_LISTS = ("enum", "required")  # that cost little where their entries are no containers
UNSAID = (
    "description",
    "title",
    "$comment",
    "examples",
    "default",
    "pattern",
)  # no output repeats them
MAX_TOTALS = {  # of entries in all of these together, which may come together in one place
    "properties": 3000,  # 0.6 s; the library takes up to some 500 optional ones in one object
    "patternProperties": 50,  # 0.02 s; 300 take 7 s
    "anyOf and oneOf": 2000,  # 0.8 s
}
MAX_JOINED = 8  # patterns that one text matches, all of them: 20 take 2 s, and each one more twice as long
MAX_MULTIPLE = 10_000  # the least common multiple of all multipleOf: 0.02 s; 1,000,000 takes 5 s
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
PATTERNS = ("pattern", "format", "patternProperties")


def check_schema(schema: Any) -> None:
    """`schema` is decoded JSON. Raises GrammarError."""
    references: set[str] = set()
    optional: list[int] = []
    multiples = [1]
    totals: Counter[str] = Counter()
    num_patterns = num_joined = 0
    for key, value, depth in _members(schema):
        if isinstance(value, (dict, list)):
            is_long = key in LONG_LISTS and not any(isinstance(entry, (dict, list)) for entry in value)
            if len(value) > MAX_ENTRIES and not is_long:
                what = f"{key[:60]!r}" if key else "it"
                raise GrammarError(f"{what} has {len(value)} entries; up to {MAX_ENTRIES} are served")
            if isinstance(value, dict):
                check_literals(value)
                totals[key] += len(value)
            elif key in ("anyOf", "oneOf"):
                totals["anyOf and oneOf"] += len(value)
            if key == "patternProperties" and isinstance(value, dict):
                optional += map(count_optional, value)
                num_patterns += len(value)
            num_joined += _num_joined(value)
        elif isinstance(value, str):
            if key not in UNSAID:
                check_literals([value])
            if key in REFERENCES:
                references.add(value)
            elif key in ("$id", "$anchor", "$dynamicAnchor") and depth > 1:
                raise GrammarError(f"{key} below its root is not served; refer to '#/...'")
            elif key in PATTERNS:
                optional.append(count_optional(value) if key == "pattern" else 0)
                num_patterns += 1
        elif key == "multipleOf" and isinstance(value, (int, float)):
            multiples.append(_digits(value))
    for what, most in MAX_TOTALS.items():
        if totals[what] > most:
            raise GrammarError(f"its {what} have {totals[what]} entries together; up to {most} are served")
    if min(num_patterns, num_joined + 1) > MAX_JOINED:
        raise GrammarError(
            f"it joins {num_joined + 1} schemas by allOf, and has {num_patterns} patterns and formats; "
            f"{MAX_JOINED} are served of either"
        )
    check_regexes(optional)
    if (multiple := math.lcm(*multiples)) > MAX_MULTIPLE:
        raise GrammarError(
            f"the least common multiple of its multipleOf, without decimal points, is {str(multiple)[:20]}; "
            f"up to {MAX_MULTIPLE} is served"
        )
    for reference in sorted(references):
        _check_reference(schema, reference)


def _num_joined(value: Any) -> int:
    """How many more schemas than one a value has to fit at once by this one's own keywords."""
    if not isinstance(value, dict):
        return 0
    num_refs = sum(isinstance(value.get(name), str) for name in REFERENCES)
    parts = value.get("allOf")
    num_parts = len(parts) if isinstance(parts, list) else 0
    return max(0, num_refs + num_parts + any(name in value for name in PATTERNS) - 1)


def _members(schema: Any) -> Iterator[tuple[str, Any, int]]:
    """Each value in it with its key (its list's, in a list) and its depth. Raises GrammarError."""
    left: list[tuple[str, Any, int]] = [("", schema, 0)]
    while left:
        key, value, depth = left.pop()
        yield key, value, depth
        if isinstance(value, (dict, list)):
            if depth >= MAX_NESTING:
                raise GrammarError(f"it is nested more than {MAX_NESTING} levels deep")
            inner = value.items() if isinstance(value, dict) else ((key, entry) for entry in value)
            left += ((k, v, depth + 1) for k, v in inner)


def _digits(value: float) -> int:
    """9999 for 99.99, the size of the automaton that counts remainders."""
    if not math.isfinite(value):
        raise GrammarError("multipleOf must be a finite number")
    digits = "".join(map(str, Decimal(str(abs(value))).normalize().as_tuple().digits))
    exponent = Decimal(str(abs(value))).normalize().as_tuple().exponent
    assert isinstance(exponent, int), "it is finite"
    return max(1, int(digits) * 10 ** min(max(0, exponent), 20))


def _check_reference(schema: Any, reference: str) -> None:
    """Raises GrammarError for one that names nothing in the schema. Nothing is fetched."""
    if reference != "#" and not reference.startswith("#/"):
        raise GrammarError(f"$ref {reference[:60]!r} is not served; references are within it, '#/...'")
    value = schema
    for step in reference[1:].split("/")[1:]:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise GrammarError(f"$ref {reference[:60]!r} names nothing in it")
