"""Grammars of what requests ask for: which outputs they let through, and that no input does harm."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from jaxserve.server.schema import words
from jaxserve.text import grammar
from jaxserve.text.forced_calls import ForcedCalls
from jaxserve.text.grammar import GrammarError, of_calls, of_ebnf, of_json_schema, of_regex, of_structural_tag

BYTES = LLTokenizer("byte")
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def takes(text: str, output: str) -> bool:
    """Whether the grammar lets exactly this output through."""
    matcher = LLMatcher(BYTES, text, log_level=0, limits=grammar.LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    given = list(output.encode())
    return matcher.try_consume_tokens(given) == len(given) and matcher.is_accepting()


def is_complete(text: str, output: str) -> bool:
    """Whether nothing may follow."""
    matcher = LLMatcher(BYTES, text, log_level=0, limits=grammar.LIMITS)
    assert matcher.consume_tokens(list(output.encode()))
    return matcher.is_stopped()


def reason_of(make, *args, **how) -> str:
    with pytest.raises(GrammarError) as caught:
        make(*args, **how)
    assert "\n" not in str(caught.value) and 0 < len(str(caught.value)) < 500
    return str(caught.value)


# ---- schemas ----


@pytest.mark.parametrize("schema", [NUMBER, json.dumps(NUMBER)])
def test_schema_as_object_or_text_lets_its_json_through(schema):
    made = of_json_schema(schema)
    assert takes(made, '{"a":1}') and takes(made, '{ "a":\n  -12 }')
    assert not takes(made, '{"a":"1"}') and not takes(made, "{}") and not takes(made, 'x{"a":1}')
    assert is_complete(made, '{"a":1}')


def test_white_space_ends_some_time_and_can_be_left_out():
    assert not takes(of_json_schema(NUMBER), "{" + " " * 65 + '"a":1}')
    made = of_json_schema(NUMBER, white_space=False)
    assert takes(made, '{"a":1}') and not takes(made, '{"a": 1}')


def test_own_options_of_the_library_in_a_schema_change_nothing():
    made = of_json_schema({**NUMBER, "x-guidance": {"whitespace_pattern": "(", "whitespace_flexible": False}})
    assert takes(made, '{ "a":1}')


def test_schema_that_refers_to_itself_is_served():
    tree = {
        "$defs": {"tree": {"type": "object", "properties": {"t": {"$ref": "#/$defs/tree"}},
                           "additionalProperties": False}},
        "$ref": "#/$defs/tree",
    }  # fmt: skip
    made = of_json_schema(tree)
    assert takes(made, '{"t":{"t":{}}}') and not takes(made, '{"t":1}')


def test_strict_refuses_what_lenient_leaves_out():
    for schema in ({"not": {"type": "string"}}, {"oneOf": [{"type": "string"}, {"minLength": 1}]}):
        assert takes(of_json_schema(schema), '"abc"')
        assert reason_of(of_json_schema, schema, lenient=False)
    assert takes(of_json_schema(NUMBER, lenient=False), '{"a":1}')


SELF = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
JOINED = {"allOf": [{"type": "string", "pattern": f"x{i}y"} for i in range(40)]}
DEFINITIONS = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(900)}
CHAIN = {"$defs": {**DEFINITIONS, "d900": {}}, "$ref": "#/$defs/d0"}  # overflows a stack of 8 MB
HOSTILE_SCHEMAS = {
    "no JSON": ("{", "not JSON"),
    "no object": ("[]", "must be an object, not a list"),
    "a lone surrogate": ({"const": "\ud800"}, "surrogates"),
    "a type that there is not": ({"type": "nope"}, "nope"),
    "nothing": (False, "nsatisfiable"),
    "only itself": ({"$ref": "#"}, "no output fits it"),
    "a circle": (SELF, "no output fits it"),
    "1 MB": ({"const": "x" * 1_000_000}, "up to 100000 are served"),
    "deep": ('{"items":' * 5000 + "{}" + "}" * 5000, "nested"),
    "deep in data": ({"default": json.loads("[" * 500 + "]" * 500)}, "nested more than 100"),
    "another document": ({"$ref": "http://127.0.0.1:9/a.json"}, "references are within it"),
    "a file": ({"$ref": "file:///etc/passwd"}, "references are within it"),
    "a document in it": ({"$defs": {"a": {"$id": "http://x/a"}}}, "$id below its root"),
    "a reference to nothing": ({"$ref": "#/$defs/a"}, "names nothing"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    "large remainders": ({"type": "integer", "multipleOf": 1_000_003}, "least common multiple"),
    "large remainders together": ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "least common"),
    "infinitely large": ({"multipleOf": 1e308}, "least common multiple"),
    "many patterns at once": (JOINED, "joins 40 schemas"),
    "many properties": ({"properties": {f"p{i}": {} for i in range(1001)}}, "1001 entries"),
    "many patterns of names": ({"patternProperties": {f"^{i}$": {} for i in range(51)}}, "51 entries"),
    "many choices": ({"anyOf": [{"anyOf": [{}] * 700}] * 3}, "2103 entries together"),
    "a long text": ({"const": "x" * 4001}, "a text of 4001 characters"),
    "a long name": ({"properties": {"x" * 4001: {}}}, "a text of 4001 characters"),
    "many lists": ({"enum": [[i] for i in range(1001)]}, "1001 entries"),
    "many optional properties": ({"properties": {f"p{i}": {} for i in range(700)}, "type": "object"},
                                 "items"),
    "many optional parts": ({"pattern": r"\w?" * 2000, "type": "string"}, "too many optional"),
}  # fmt: skip


@pytest.mark.parametrize("schema, words", HOSTILE_SCHEMAS.values(), ids=HOSTILE_SCHEMAS.keys())
def test_hostile_schema_is_refused_before_it_does_harm(schema, words):
    assert words in reason_of(of_json_schema, schema)


def test_circular_object_of_a_caller_is_refused():
    circular: dict = {}
    circular["a"] = circular
    assert "nested too deeply" in reason_of(of_json_schema, circular)


LARGE_SCHEMAS = {
    "choices": {"enum": [f"value{i}" for i in range(5000)]},
    "repetitions": {"type": "array", "maxItems": 10**9, "items": {"type": "string", "maxLength": 10**9}},
    "a chain of references": CHAIN,
    "deep": json.loads('{"items":' * 95 + "{}" + "}" * 95),
}  # fmt: skip


@pytest.mark.parametrize("schema", LARGE_SCHEMAS.values(), ids=LARGE_SCHEMAS.keys())
def test_large_schema_is_served(schema):
    assert of_json_schema(schema)


# ---- regular expressions ----


def test_regex_matches_the_whole_output():
    made = of_regex("[a-c]+|ü{2}")
    assert takes(made, "abc") and takes(made, "üü")
    assert not takes(made, "abcd") and not takes(made, "ü") and not takes(made, "")
    assert takes(of_regex("^a/b$"), "a/b")


HOSTILE_REGEXES = {
    "a(": "unclosed group",
    "(a)\\1": "backreferences are not supported",
    "(?<=a)b": "look-around",
    "[^\\s\\S]": "no output fits it",
    "\ud800": "surrogate",
    "(" * 20_000: "unclosed",
    "a" * 1_000_000: "up to 20000 are served",
    "(a|)" * 2000: "too many optional",
}


@pytest.mark.parametrize("regex, words", HOSTILE_REGEXES.items(), ids=[r[:10] for r in HOSTILE_REGEXES])
def test_hostile_regex_is_refused_before_it_does_harm(regex, words):
    assert words in reason_of(of_regex, regex)


@pytest.mark.parametrize("regex", ["", "a{1,1000000}", "((a{1,1000}){1,1000}){1,1000}", "a\0b", "a{10000}"])
def test_odd_regex_is_served(regex):
    assert of_regex(regex)


# ---- EBNF ----

LIST = r"""
root ::= "[" item ("," item)* "]"   # names, texts and numbers
item ::= [a-z_]+ |
    "\"" [^"\\\n]{1,8} "\"" | nested
nested ::= "(" nested? ")" | num
num ::= "-"? [0-9]+ ("." [0-9]{1,})?
"""


def test_ebnf_is_read_as_sglang_and_llama_cpp_mean_it():
    made = of_ebnf(LIST)
    for output in ("[a,b_c]", '["x ü",((-1.5))]', "[()]"):
        assert takes(made, output), output
    for output in ("[]", '[""]', "[A]", "[(1]", '["123456789"]', "[1.]"):
        assert not takes(made, output), output


def test_escapes_and_sets_of_ebnf_are_the_characters_they_name():
    made = of_ebnf(r'root ::= "\x41\u00e9\U0001f642\t\\\"/" [\]\-a\x30-\x39] [^\u0000-\uffff] .')
    assert takes(made, 'Aé🙂\t\\"/-🙂\n') and takes(made, 'Aé🙂\t\\"/]🙂x') and takes(made, 'Aé🙂\t\\"/7🙂x')
    assert not takes(made, 'Aé🙂\t\\"/b🙂x') and not takes(made, 'Aé🙂\t\\"/7üx')


def test_empty_choices_and_rules_that_call_themselves_are_served():
    made = of_ebnf('root ::= pairs\npairs ::= | "a" pairs "b"')
    assert takes(made, "") and takes(made, "aabb") and not takes(made, "aab")


HOSTILE_EBNF = {
    "": "no rule named root",
    "start: /a/": "line 1",
    'root ::= "a': "line 1",
    "root ::= x": "'x', which is no rule",
    "root ::= root": "no output fits it",
    'root ::= "a" )': "out of place",
    'root ::= ("a"': "where ) should be",
    'root ::= "a"\nroot ::= "b"': "two rules named 'root'",
    'root ::= "a"+*': "repeats a repetition",
    'root ::= "a"{2,1}': "no number of repetitions",
    "root ::= [b-a]": "ends before it begins",
    r"root ::= [\ud800]": "no character's",
    r'root ::= "\q"': "unknown escape",
    "root ::= " + "(" * 40_000: "more than 20 groups",
    'root ::= "' + "a" * 1_000_000 + '"': "up to 50000 are served",
    'root ::= "' + "a" * 4001 + '"': "a text of 4001 characters",
    "root ::= " + '"a"? ' * 2000: "too many optional",
    "root ::= r0\n"
    + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60))
    + "r60 ::= [a-z]?": "too many",
}


@pytest.mark.parametrize("source, words", HOSTILE_EBNF.items(), ids=[repr(s[:14]) for s in HOSTILE_EBNF])
def test_hostile_ebnf_is_refused_before_it_does_harm(source, words):
    assert words in reason_of(of_ebnf, source)


def test_long_chain_of_rules_is_served():
    """It would overflow a thread's usual stack."""
    chain = "".join(f'r{i} ::= "a" r{i + 1} r0? | "b"\n' for i in range(900))
    assert of_ebnf(f'root ::= r0\n{chain}r900 ::= "x"')


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=6))
def test_any_text_can_be_written_in_ebnf(text):
    escaped = "".join(f"\\U{ord(c):08x}" if c in '"\\\n' else c for c in text)
    made = of_ebnf(f'root ::= "{escaped}" "!" root?')
    assert takes(made, f"{text}!") and not takes(made, f"{text}?")


# ---- tags ----

TAG = {
    "type": "structural_tag",
    "triggers": ["<function="],
    "structures": [
        {"begin": "<function=f>", "schema": NUMBER, "end": "</function>"},
        {"begin": "<function=g>", "schema": {"type": "string"}, "end": "</function>"},
    ],
}
NEWER = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<f"],
        "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": NUMBER}, "end": "</f>"}],
    },
}


@pytest.mark.parametrize("tag", [TAG, json.dumps(TAG)])
def test_text_is_free_until_a_trigger_and_again_behind_its_tag(tag):
    made = of_structural_tag(tag)
    for output in (
        "",
        "any <text>",
        'a <function=f>{"a":1}</function> b <function=g>"x"</function>',
        "<function",
    ):
        assert takes(made, output), output
    for output in ("<function=h>", "<function=f>{}</function>", '<function=g>"x"</end>', "a <function=f>"):
        assert not takes(made, output), output


@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("only_first", [False, True])
def test_newer_form_says_how_many_tags_come(at_least_one, only_first):
    form = {**NEWER["format"], "at_least_one": at_least_one, "stop_after_first": only_first}
    made = of_structural_tag({**NEWER, "format": form})
    one = '<f>{"a":1}</f>'
    assert takes(made, f"a{one}")
    assert takes(made, "a") != at_least_one
    assert takes(made, f"a{one}b{one}") != only_first


@pytest.mark.parametrize(
    "tag, words",
    [
        ([], "must be an object"),
        ({}, "triggers must be"),
        ({**TAG, "type": "x"}, "must be 'structural_tag'"),
        ({**TAG, "triggers": []}, "1 to 32 triggers"),
        ({**TAG, "triggers": [""]}, "not empty"),
        ({**TAG, "triggers": ["<tool"]}, "does not begin with one of the triggers"),
        ({**TAG, "structures": []}, "not empty"),
        ({**TAG, "more": 1}, "'more', which is not served"),
        ({**TAG, "structures": [{"begin": "<function=", "schema": {"$ref": "x:y"}}]}, "within it"),
        ({**TAG, "structures": [{"begin": 1}]}, "must be strings"),
        ({**TAG, **NEWER}, "without structures and triggers"),
        ({"format": {"type": "sequence", "elements": []}}, "'sequence' is not served; triggered_tags is"),
        ({"format": {**NEWER["format"], "excludes": ["x"]}}, "'excludes', which is not served"),
        (
            {"format": {**NEWER["format"], "tags": [{"begin": "<f", "content": {"type": "any_text"}}]}},
            "any_text",
        ),
    ],
)
def test_tag_that_is_not_served_is_refused_by_name(tag, words):
    assert words in reason_of(of_structural_tag, tag)


@settings(max_examples=100, deadline=None)
@given(*[st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x7f"), max_size=3)] * 3)
def test_tags_and_schemas_may_hold_any_text(begin, value, end):
    tag = {"begin": f"<{begin}", "schema": {"const": value}, "end": f"{end}>"}
    made = of_structural_tag({"triggers": ["<"], "structures": [tag]})
    assert takes(made, f"a<{begin}{json.dumps(value, ensure_ascii=False)}{end}>b")


# ---- calls ----

TOOLS = {
    "weather": {"$defs": {"c": {"type": "string"}}, "properties": {"city": {"$ref": "#/$defs/c"}},
                "required": ["city"]},
    "now": {},
}  # fmt: skip
WEATHER = '{"name": "weather", "parameters": {"city": "Köln"}}'


def test_calls_name_a_tool_and_fit_its_schema():
    made = of_calls(TOOLS)
    assert takes(made, f"[{WEATHER}]") and takes(
        made, f'[{WEATHER}, {{"name":"now","parameters":{{"x":1}}}}]'
    )
    for output in ("[]", WEATHER, '[{"name":"x","parameters":{}}]', WEATHER.replace('"Köln"', "1"),
                   '[{"name":"now","parameters":[]}]', '[{"name":"weather","parameters":{}}]'):  # fmt: skip
        assert not takes(made, output), output
    assert is_complete(of_calls(TOOLS, most=1), f"[{WEATHER}]")
    assert not takes(of_calls(TOOLS, most=1), f"[{WEATHER}, {WEATHER}]")


def test_tool_with_a_schema_that_is_not_served_is_named():
    assert "parameters of 'f'" in reason_of(of_calls, {"f": {"$ref": "x:y"}})


def test_tool_may_refer_to_its_own_root():
    tree = {"type": "object", "properties": {"t": {"$ref": "#"}}, "additionalProperties": False}
    made = of_calls({"other": {}, "f": tree})
    assert takes(made, '[{"name":"f","parameters":{"t":{"t":{}}}}]')
    assert not takes(made, '[{"name":"f","parameters":{"t":{"u":{}}}}]')


def pieces(texts, tools=TOOLS, behind=""):
    """(text, calls) of all pieces together."""
    reader, said, calls = ForcedCalls(tools, behind), [], []
    for i, piece in enumerate(texts):
        text, more = reader.feed(piece, is_last=i == len(texts) - 1)
        said.append(text)
        calls += [(call.name, call.arguments) for call in more]
    return "".join(said), calls


CALL = ("weather", '{"city": "Köln"}')
ODD = '{"name": "now", "parameters": {"x": "]},{\\"[\\\\", "y": [{}]}}'
ODD_CALL = ("now", '{"x": "]},{\\"[\\\\", "y": [{}]}')
LISTS = [
    (f"[{WEATHER}]", "", [CALL]),
    (f" [ {WEATHER} ,\n{ODD},{WEATHER} ]", "", [CALL, ODD_CALL, CALL]),
    (f"[{WEATHER}, " + ODD[:40], ODD[:40], [CALL]),
    (f"[{WEATHER}, ", "", [CALL]),
    (f"[{WEATHER}", "", [CALL]),
    ("[", "[", []),
    ("", "", []),
    (WEATHER, WEATHER, []),
    ('[{"name": "x", "parameters": {}}, 1]', '[{"name": "x", "parameters": {}}, 1]', []),
    ('[{"name": "now", "parameters": 1}]', '[{"name": "now", "parameters": 1}]', []),
]


@pytest.mark.parametrize("text, said, calls", LISTS)
def test_calls_of_a_list_are_the_same_wherever_its_pieces_end(text, said, calls):
    assert pieces([text]) == (said, calls)
    assert pieces([*text, ""]) == (said, calls)
    for cut in range(len(text)):
        assert pieces([text[:cut], text[cut:]]) == (said, calls)


def test_call_comes_when_its_object_closes():
    reader = ForcedCalls(TOOLS)
    assert reader.feed(f"[{WEATHER[:-1]}") == ("", [])
    assert [call.name for call in reader.feed("}")[1]] == ["weather"]
    assert [call.name for call in reader.feed(f", {ODD}, {{")[1]] == ["now"]


def test_thoughts_before_the_list_stay_text():
    for text in (f"so [be] it</think>\n[{WEATHER}]", f"</think>[{WEATHER}]"):
        said = text[: text.index("</think>") + 8]
        assert pieces([text], behind="</think>") == (said, [CALL])
        assert pieces([*text, ""], behind="</think>") == (said, [CALL])
    assert pieces([*"so be </thi"], behind="</think>") == ("so be </thi", [])


# ---- anything ----

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(),
    st.sampled_from(["string", "object", "array", "integer", "#", "#/a", "^a+$", "date-time", "(?=a)", "\0"]),
    st.text(max_size=4),
)  # fmt: skip
KEYS = st.sampled_from(
    sorted(
        words("""
            type properties items required enum const anyOf oneOf allOf not $ref $defs $id $schema pattern
            minLength maxLength minItems maxItems minimum maximum multipleOf additionalProperties format a
            patternProperties prefixItems if then else
        """)
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
MAKERS = (of_json_schema, of_structural_tag)


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=st.one_of(VALUES, st.dictionaries(KEYS, VALUES, max_size=4)), lenient=st.booleans())
def test_any_json_is_a_grammar_or_refused(make, value, lenient):
    how = {"lenient": lenient} if make is of_json_schema else {}
    try:
        assert make(value, **how)
    except GrammarError as error:
        assert str(error)
    try:
        assert of_calls({"f": value})
    except GrammarError as error:
        assert str(error)


SIGNS = st.text(st.sampled_from('ab|*+?()[]{}0,9\\^$".-:= \n#<>~&/%@é\0'), max_size=14)


@settings(max_examples=400, deadline=None)
@given(st.one_of(SIGNS, st.text(max_size=8), SIGNS.map("root ::= ".__add__)))
def test_any_text_is_a_grammar_or_refused(text):
    for make in (of_regex, of_ebnf, of_json_schema, of_structural_tag):
        try:
            assert make(text)
        except GrammarError as error:
            assert str(error)
