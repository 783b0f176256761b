"""Chat answers of a server with --reasoning-parser: thoughts apart from what is answered, streamed or not."""

import typing
from collections.abc import Iterator

import openai
import pytest
from live_server import Server, serving
from test_resumed_streams import check_cut_anywhere

from jaxserve.config import ReasoningParser
from jaxserve.server import openai as openai_routes
from jaxserve.server.chat_parts import CHANNELS
from jaxserve.text.reasoning import STYLES

HELLO = [{"role": "user", "content": "hello"}]
TEXT = "<think>\nthe wörld </thunder>\n</think>\n\nhello 漢字"
THOUGHTS, ANSWER = "the wörld </thunder>", "hello 漢字"


@pytest.fixture(scope="module")
def thinker(tokenizer) -> Iterator[Server]:
    with serving(tokenizer, reasoning_parser="qwen3") as server:
        yield server


def chat(server, text=TEXT, **how):
    server.say(text)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = how.pop("messages", HELLO)
    return client.chat.completions.create(model="tiny/model", messages=messages, max_tokens=200, **how)


def said(message):
    """(thoughts, answer) of a message or a delta."""
    return getattr(message, "reasoning_content", None), message.content


def test_thoughts_are_a_field_of_the_message(thinker):
    assert said(chat(thinker).choices[0].message) == (THOUGHTS, ANSWER)
    assert said(chat(thinker, "hello").choices[0].message) == (None, "hello")
    for choice in chat(thinker, n=2).choices:
        assert said(choice.message) == (THOUGHTS, ANSWER)


def test_thoughts_stay_in_the_text_where_that_is_asked_for(thinker):
    reply = chat(thinker, extra_body={"separate_reasoning": False})
    assert reply.choices[0].message.content == TEXT
    assert "reasoning_content" not in reply.choices[0].message.model_extra
    streamed = chat(thinker, stream=True, extra_body={"separate_reasoning": False})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == TEXT


def test_a_server_without_a_parser_leaves_them_too(server):
    message = chat(server).choices[0].message
    assert message.content == TEXT and "reasoning_content" not in message.model_extra


@pytest.mark.parametrize("extra", [{}, {"stream_reasoning": False}])
def test_stream_brings_thoughts_and_then_the_answer(thinker, extra):
    deltas = [said(c.choices[0].delta) for c in chat(thinker, stream=True, extra_body=extra)]
    assert deltas[0] == (None, "") and deltas[-1] == (None, None)  # the role; the finish
    thoughts = [t for t, _ in deltas if t]
    assert "".join(thoughts) == THOUGHTS and "".join(a for _, a in deltas if a) == ANSWER
    assert (len(thoughts) == 1) == bool(extra)
    assert [bool(a) for _, a in deltas[1:-1]] == sorted(bool(a) for _, a in deltas[1:-1])


def test_prompt_that_opens_the_thoughts_is_thought_on(thinker):
    messages = [*HELLO, {"role": "assistant", "content": "<think>"}]
    reply = chat(thinker, "the</think>hello", messages=messages, extra_body={"continue_final_message": True})
    assert said(reply.choices[0].message) == ("the", "hello")


def test_thoughts_that_are_cut_off_are_thoughts(thinker):
    reply = chat(thinker, "<think>the world </thi")
    assert said(reply.choices[0].message) == ("the world </thi", "")
    deltas = [said(c.choices[0].delta) for c in chat(thinker, "<think>the world </thi", stream=True)]
    assert "".join(t for t, _ in deltas if t) == "the world </thi"
    assert not any(a for _, a in deltas)


def test_every_token_has_its_logprob_and_its_id_though_its_text_is_held_back(thinker):
    ids = thinker.tokenizer.encode(TEXT)
    extra = {"return_token_ids": True}
    chunks = [c.choices[0] for c in chat(thinker, stream=True, logprobs=True, extra_body=extra)]
    assert [i for c in chunks for i in c.model_extra.get("token_ids") or ()][: len(ids)] == ids
    assert len([t for c in chunks if c.logprobs for t in c.logprobs.content]) == len(ids) + 1  # and the end's


CASES = {
    "to the end": {},
    "in one piece": {"stream_reasoning": False},
    "a stop string that begins as the tag does": {"stop": ["</thunderstorm"]},
    "stopped in the thoughts": {"stop": ["under"]},
    "stopped in the answer": {"stop": ["漢"]},
    "cut in the tag": {"max_tokens": 34},
    "not taken apart": {"separate_reasoning": False},
    "with token ids": {"return_token_ids": True},
    "with token ids, in one piece": {"return_token_ids": True, "stream_reasoning": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("quiet_s", [15.0, -1.0])
def test_stream_cut_anywhere_and_resumed_is_the_unbroken_stream(thinker, monkeypatch, case, quiet_s):
    monkeypatch.setattr(openai_routes, "QUIET_S", quiet_s)
    thinker.say(TEXT)
    body = {"messages": HELLO, "stream": True, "temperature": 0, "max_tokens": 200, "rid": "r", **case}
    whole = check_cut_anywhere(thinker, "/v1/chat/completions", body)
    assert len(whole) > 5
    if "return_token_ids" in case:
        told = [i for ids, _ in whole for i in ids or ()]
        choices = [choice for _, data in whole if data != "[DONE]" for choice in data["choices"]]
        assert [i for choice in choices for i in choice.get("token_ids", ())] == told


def test_completions_take_the_parameters_and_leave_the_text(thinker):
    thinker.say(TEXT)
    body = {"prompt": "hello", "max_tokens": 200, "separate_reasoning": True, "stream_reasoning": False}
    assert thinker.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == TEXT


def test_flag_takes_the_names_that_there_are():
    assert set(typing.get_args(ReasoningParser)) == {*STYLES, CHANNELS}
