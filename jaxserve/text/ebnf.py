"""Grammars in EBNF, as SGLang and llama.cpp take them, in the form the grammar library reads (its Lark).

    root ::= "[" item ("," item)* "]"     # names, texts, groups, choices
    item ::= [a-z_]+ | "\\"" [^"]{1,8} "\\""

A rule that comes back to no rule becomes one regular expression, which matches as a whole; texts and sets of
characters in other rules are matched one by one, the longest first.
"""

import json
import re
from dataclasses import dataclass, field

from jaxserve.text.grammar_bounds import GrammarError, check_length, check_literals, check_regexes

MAX_CHARS = 50_000  # of 10,000 optional parts in one rule: 0.4 s
MAX_GROUPS = 20  # in groups; the library refuses more than about 30
MAX_RULES = 1000
MAX_REPEATS = 100_000
TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+) | (?P<is>::=) | (?P<name>[A-Za-z0-9_-]+) | "(?P<text>(?:[^"\\\n]|\\.)*)"
    | \[(?P<chars>(?:[^\]\\\n]|\\.)+)\] | \{\s*(?P<least>\d{1,9})\s*(?P<comma>,?)\s*(?P<most>\d{0,9})\s*\}
    | (?P<sign>[|()*+?.])""",
    re.VERBOSE,
)
ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|([^\\])", re.DOTALL)
NAMED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b", "0": "\0"}
ITSELF = frozenset("\"'\\[]-^/{}()|*+?.$ ")
Token = tuple[str, re.Match[str]]


@dataclass
class Rule:
    """`parts` is its right side, in which names of rules wait as they are; True marks one."""

    parts: list[tuple[str, bool]] = field(default_factory=list)
    num_optional: int = 0

    @property
    def names(self) -> list[str]:
        return [part for part, is_name in self.parts if is_name]


def to_lark(source: str) -> str:
    """Raises GrammarError, which says where the grammar goes wrong."""
    check_length(source, MAX_CHARS)
    rules = _Reader(source).rules()
    if "root" not in rules:
        raise GrammarError("it has no rule named root")
    for name, rule in rules.items():
        for other in rule.names:
            if other not in rules:
                raise GrammarError(f"rule {name[:60]!r} names {other[:60]!r}, which is no rule")
    regexes = _regexes(rules)
    used = {name for rule in rules if rule not in regexes for name in rules[rule].names} | {"root"}
    check_regexes([regexes[name] for name in used if name in regexes])
    names = {name: f"{'T' if name in regexes else 'r'}{i}" for i, name in enumerate(rules)}
    lines = [f"start: {names['root']}"]
    for name, rule in rules.items():
        body = " ".join(names[part] if is_name else part for part, is_name in rule.parts)
        lines.append(f"{names[name]}: {body}")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A text as Lark writes it. Its reader stops at a bare DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _regexes(rules: dict[str, Rule]) -> dict[str, int]:
    """The rules that come back to none, each with its optional parts, those of the rules in it included."""
    known: dict[str, int] = {}
    left = list(rules)
    while left:
        after = [name for name in left if not all(other in known for other in rules[name].names)]
        for name in set(left) - set(after):
            known[name] = rules[name].num_optional + sum(known[other] for other in rules[name].names)
        if len(after) == len(left):
            break
        left = after
    return known


class _Reader:
    """Reads a grammar token by token."""

    def __init__(self, source: str):
        self._source = source
        self._tokens: list[Token] = []
        at = 0
        while at < len(source):
            found = TOKEN.match(source, at)
            if not found:
                raise self._error("cannot be read", at)
            kind = found.lastgroup if found.lastgroup not in ("comma", "most") else "least"
            if kind != "space":
                self._tokens.append((kind or "text", found))
            at = found.end()
        self._at = 0

    def rules(self) -> dict[str, Rule]:
        rules: dict[str, Rule] = {}
        while self._at < len(self._tokens):
            name = self._take("name", "a rule's name")[0]
            self._take("is", "::=")
            if name in rules:
                raise GrammarError(f"it has two rules named {name[:60]!r}")
            rules[name] = rule = Rule()
            self._choices(rule, 0)
            if len(rules) > MAX_RULES:
                raise GrammarError(f"it has more than {MAX_RULES} rules")
            if self._at < len(self._tokens) and not self._begins_rule():
                raise self._error("is out of place")
        return rules

    def _choices(self, rule: Rule, num_groups: int) -> None:
        if num_groups > MAX_GROUPS:
            raise GrammarError(f"it has groups in more than {MAX_GROUPS} groups")
        is_empty = True
        while (kind := self._kind()) and not self._begins_rule():
            sign = self._tokens[self._at][1][0]
            if (kind == "sign" and sign in ")*+?") or kind in ("least", "is"):
                break
            self._at += 1
            if sign == "|" and kind == "sign":
                if is_empty:
                    self._add_nothing(rule)
                rule.parts.append(("|", False))
                is_empty = True
                continue
            is_empty = False
            self._one(rule, kind, sign, num_groups)
            self._repeat(rule)
        if is_empty:
            self._add_nothing(rule)

    def _one(self, rule: Rule, kind: str, sign: str, num_groups: int) -> None:
        if kind == "name":
            rule.parts.append((sign, True))
        elif kind == "text":
            text = "".join(self._characters(self._tokens[self._at - 1][1], "text"))
            check_literals([text])
            rule.parts.append((quoted(text), False))
            rule.num_optional += not text
        elif kind == "chars":
            rule.parts.append((self._set(self._tokens[self._at - 1][1]), False))
        elif sign == ".":
            rule.parts.append(("/(?s:.)/", False))
        else:
            rule.parts.append(("(", False))
            self._choices(rule, num_groups + 1)
            if self._kind() != "sign" or self._tokens[self._at][1][0] != ")":
                raise self._error("is where ) should be")
            self._at += 1
            rule.parts.append((")", False))

    def _repeat(self, rule: Rule) -> None:
        kind = self._kind()
        if kind == "least":
            found = self._tokens[self._at][1]
            least, most = int(found["least"]), int(found["most"] or found["least"])
            if max(least, most) > MAX_REPEATS or least > most:
                raise self._error(f"is no number of repetitions up to {MAX_REPEATS}")
            rule.parts.append((f"{{{least},{found['most'] if found['comma'] else least}}}", False))
        elif kind == "sign" and self._tokens[self._at][1][0] in "*+?":
            rule.parts.append((self._tokens[self._at][1][0], False))
        else:
            return
        rule.num_optional += 1
        self._at += 1
        if self._kind() == "least" or (self._kind() == "sign" and self._tokens[self._at][1][0] in "*+?"):
            raise self._error("repeats a repetition; put that in a group")

    @staticmethod
    def _add_nothing(rule: Rule) -> None:
        rule.parts.append(('""', False))
        rule.num_optional += 1

    def _set(self, found: re.Match[str]) -> str:
        """A set of characters as a regular expression, in which each is a number."""
        text = found["chars"]
        is_negated = text.startswith("^") and len(text) > 1
        chars = self._characters(found, "chars")[is_negated:]
        marks = [m[0] == "-" for m in ESCAPE.finditer(text)][is_negated:]
        parts, i = [], 0
        while i < len(chars):
            end = i + 2 if i + 2 < len(chars) and marks[i + 1] else i
            if chars[end] < chars[i]:
                raise self._error("has a range that ends before it begins", found.start())
            parts.append(f"\\x{{{ord(chars[i]):x}}}-\\x{{{ord(chars[end]):x}}}")
            i = end + 1
        return f"/[{'^' if is_negated else ''}{''.join(parts)}]/"

    def _characters(self, found: re.Match[str], group: str) -> list[str]:
        chars = []
        for two, four, eight, escaped, plain in ESCAPE.findall(found[group]):
            code = int(two or four or eight or "0", 16)
            if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
                raise self._error("holds a number that is no character's", found.start())
            if escaped and escaped not in NAMED and escaped not in ITSELF:
                raise self._error(f"holds an unknown escape, \\{escaped}", found.start())
            chars.append(plain or (NAMED.get(escaped, escaped) if escaped else chr(code)))
        return chars

    # ---- tokens ----

    def _kind(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _begins_rule(self) -> bool:
        return [kind for kind, _ in self._tokens[self._at : self._at + 2]] == ["name", "is"]

    def _take(self, kind: str, what: str) -> re.Match[str]:
        if self._kind() != kind:
            raise self._error(f"is where {what} should be")
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _error(self, what: str, at: int | None = None) -> GrammarError:
        """`at`: a character; None: where the next token is."""
        if at is None:
            at = self._tokens[self._at][1].start() if self._at < len(self._tokens) else len(self._source)
        rest = self._source[at : at + 20].partition("\n")[0]
        line = self._source.count("\n", 0, at) + 1
        return GrammarError(f"line {line}: {rest!r} {what}" if rest else f"line {line}: its end {what}")
