"""No body, however odd, is answered 500; what is refused has the one error body."""

import asyncio

import httpx
import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import make_app

from jaxserve.server.openai_schema import ChatBody, CompletionBody
from jaxserve.server.schema import AbortBody, DetokenizeBody, GenerateBody, SamplingParams, TokenizeBody

KINDS = {
    "/generate": GenerateBody,
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/abort_request": AbortBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 330),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "x", "hello", "assistant", "text", "json_object", "default", "\0", "€\ufffd"]),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "x", "5", "self"]), inner, max_size=3
        ),
    ),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": st.text("ab", max_size=3)})
ODD_MESSAGE = st.fixed_dictionaries(
    {"role": ROLES}, optional={"content": VALUES, "tool_calls": VALUES, "name": SCALARS}
)
MESSAGES = st.one_of(
    st.lists(MESSAGE, min_size=1, max_size=3), st.lists(st.one_of(MESSAGE, ODD_MESSAGE), max_size=3)
)
SCHEMA = st.one_of(VALUES, st.fixed_dictionaries({"properties": st.dictionaries(st.just("x"), VALUES)}))
FUNCTION = st.fixed_dictionaries({"name": st.just("f")}, optional={"parameters": SCHEMA, "x": VALUES})
TOOL = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION})
FORMAT = st.one_of(
    st.just({"type": "json_object"}),
    st.fixed_dictionaries(
        {
            "type": st.just("json_schema"),
            "json_schema": st.fixed_dictionaries(
                {"schema": SCHEMA}, optional={"strict": VALUES, "x": VALUES}
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("structural_tag"),
            "triggers": st.one_of(VALUES, st.just(["x"])),
            "structures": st.one_of(VALUES, st.just([{"begin": "x", "schema": {}, "end": ""}])),
        }
    ),
)
CHOICE = st.one_of(
    st.sampled_from(["auto", "none", "required"]),
    st.just({"type": "function", "function": {"name": "f"}}),
    st.fixed_dictionaries({"type": st.just("function"), "function": VALUES}),
)
STOP = st.text("helo ", min_size=1, max_size=3)
LIKELY = {  # values that pass, so that what comes after validation is reached too
    "text": st.one_of(st.just("x"), st.lists(st.text("ab€", min_size=1, max_size=5), min_size=1, max_size=3)),
    "prompt": st.one_of(st.just("x"), st.lists(st.integers(0, 319), min_size=1, max_size=4)),
    "tokens": st.lists(st.integers(0, 321), max_size=4),
    "input_ids": st.lists(st.integers(0, 319), min_size=1, max_size=4),
    "messages": MESSAGES,
    "tools": st.lists(TOOL, min_size=1, max_size=2),
    "response_format": FORMAT,
    "tool_choice": CHOICE,
    "json_schema": st.one_of(SCHEMA, st.text(max_size=5)),
    "regex": st.text("ab|*+?()[]{}1,\\^$", max_size=8),
    "ebnf": st.text('ab|*+?()[]{}1,\\^".\n', max_size=8).map("root ::= ".__add__),
    "stream": st.booleans(),
    "stop": st.one_of(
        st.text("helo ", min_size=1, max_size=3),
        st.lists(st.text("helo ", min_size=1, max_size=3), max_size=2),
    ),
    "n": st.integers(1, 3),
    "logprobs": st.one_of(st.none(), st.booleans(), st.integers(0, 3)),
    "return_logprob": st.booleans(),
    "logprob_start_len": st.integers(-1, 1),
    "top_logprobs_num": st.integers(0, 3),
    "echo": st.booleans(),
    "max_tokens": st.integers(0, 5),
    "max_new_tokens": st.one_of(st.none(), st.integers(0, 5)),
}


def bodies(kind):
    """A body that could pass, with up to two of all its fields, and foreign ones, set to anything."""
    fields = [*kind.__struct_fields__, "lora_path", "nonsense"]
    needed = [n for n in ("text", "prompt", "messages", "tokens") if n in fields][:1]
    likely = [n for n in fields if n in LIKELY and n not in needed and n != "input_ids"]

    @st.composite
    def some(draw):
        names = (
            [*needed, *draw(st.lists(st.sampled_from(likely), max_size=4, unique=True))] if likely else needed
        )
        body = {name: draw(LIKELY[name]) for name in names}
        if kind is GenerateBody:
            body["sampling_params"] = draw(bodies(SamplingParams))
        odd = draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)) if draw(st.booleans()) else []
        return body | {name: draw(VALUES) for name in odd}

    return some()


@pytest.fixture(scope="module")
def send(tokenizer):
    """POST to the application without a network; many examples a second. Its model always calls f."""
    call = "<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>"
    engine = FakeEngine(lambda request: tokenizer.encode(f"hello <think>{call}"))
    app = make_app(engine, tokenizer, reasoning_parser="qwen3", tool_call_parser="glm45")
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        yield lambda path, method="POST", **how: runner.run(client.request(method, path, **how))
    assert not engine.running
    assert app.state.service.num_running == 0


def check(response):
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and len(error["message"]) < 1000


@pytest.mark.parametrize("path", KINDS)
def test_no_object_is_answered_500(send, path):
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(KINDS[path]))
    def run(body):
        check(send(path, json=body))

    run()


@pytest.mark.parametrize("path", [*KINDS, "/flush_cache", "/v1/loads", "/nothing"])
def test_no_bytes_are_answered_500(send, path):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(st.binary(max_size=50), st.text(max_size=20).map(lambda s: s.encode("utf-8", "replace")))
    )
    def run(content):
        check(send(path, content=content))

    run()


QUERY = st.one_of(
    st.text(max_size=6), st.sampled_from(["0", "1", "all", "core", "json", "0.0", "٣", "1e400"])
)


@settings(max_examples=60, deadline=None)
@given(query=st.dictionaries(st.sampled_from(["dp_rank", "include", "format", "timeout"]), QUERY))
def test_no_query_is_answered_500(send, query):
    for path in ("/v1/loads", "/flush_cache"):
        check(send(path, "GET", params=query))
