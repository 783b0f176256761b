"""Streams that are cut anywhere and go on at another worker: together they are the unbroken stream."""

import json

import httpx
import msgspec
import pytest
import tiny_tokenizer
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Running, make_app

from jaxserve.messages import Finish, Generate, Output, Sampling
from jaxserve.server.sampling import TextRules
from jaxserve.server.sequence import Sequence
from jaxserve.text.tokenizer import Tokenizer

CUTS = st.tuples(st.integers(0, 40), st.integers(1, 4))
TEXT = "hello wörld <s the 漢字 stop and 🙂 stopping"
VARYING = ("e2e_latency", "response_sent_to_client_ts")
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
CASES = {
    "to the end": {},
    "to a length": {"max_tokens": 19},
    "to a length in half a character": {"max_tokens": 28},
    "to a stop string": {"stop": ["<s>", "stopp", "ing"]},
    "to a stop string in one token with other text": {"stop": ["top"]},
    "past a stop string while too short": {"stop": ["stop"], "min_tokens": 40},
    "with the stop string left in": {"stop": ["stop a", "zzz"], "no_stop_trim": True},
    "every third token": {"stream_interval": 3},
    "to the end of a grammar": {"regex": "(?s:.*)"},
    "with token ids": {"return_token_ids": True, "stop": ["stopping"]},
    "with the usage so far": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


def body_of(path, case):
    """One request in the words of each route."""
    if path != "/generate":
        case = {k: v for k, v in case.items() if k != "stream_interval"}
        what = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
        usage = {"stream_options": {"include_usage": True}}
        return {**what, **usage, "stream": True, "temperature": 0, "max_tokens": 90, **case}
    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    case = {k: v for k, v in case.items() if k != "stream_options"}
    sampling = {"temperature": 0, "max_new_tokens": 90}
    sampling |= {names.get(k, k): v for k, v in case.items() if k != "return_token_ids"}
    return {"text": "hi", "stream": True, "sampling_params": sampling}


def stream(server, path, body, **headers):
    """The stream's events, each as (token ids of its comment or None, data)."""
    reply = server.http.post(path, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    *events, end = reply.text.split("\n\n")
    assert end == ""
    return [parsed(event) for event in events]


def parsed(event):
    ids = None
    if event.startswith(":"):
        line, _, event = event.partition("\n")
        ids = [int(i) for i in line.removeprefix(": tokens ").split(",")]
    data = event.removeprefix("data: ")
    if data == "[DONE]":
        return ids, data
    data = json.loads(data)
    for name in VARYING:
        data.get("meta_info", {}).pop(name, None)
    if data.get("usage"):
        del data["usage"]["prompt_tokens_details"]  # what was cached is each worker's own
    return ids, data


def resume_of(events):
    """What the gateway gives back after these events."""
    resume = {"token_ids": [i for ids, _ in events for i in ids or ()]}
    if events:
        first = events[0][1]
        resume["id"] = first.get("id") or first["meta_info"]["id"]
        if "created" in first:
            resume["created"] = first["created"]
    return resume


def stable(events):
    """Without what no client could hold against a second worker: names nobody had seen yet."""
    return [
        (ids, data if data == "[DONE]" else {k: v for k, v in data.items() if k not in ("id", "created")})
        for ids, data in events
    ]


def check_cut_anywhere(server, path, body):
    """Returns the events of the unbroken stream."""
    track = {"x-resume": "track"}
    whole = stream(server, path, body, **track)
    is_usage = [data != "[DONE]" and data.get("choices") == [] for _, data in whole]
    for cut in range(len(whole)):
        if cut and is_usage[cut - 1]:
            continue  # the usage and the end are written at once
        rest = stream(server, path, {**body, "resume": resume_of(whole[:cut])}, **track)
        if cut == 0:
            assert stable(rest) == stable(whole)
        else:
            assert whole[:cut] + rest == whole, f"cut before event {cut}"
    return whole


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stream_cut_anywhere_and_resumed_is_the_unbroken_stream(server, path, case):
    server.say(TEXT)
    whole = check_cut_anywhere(server, path, {**body_of(path, case), "rid": "r"})
    told = [i for ids, _ in whole for i in ids or ()]
    made = [*server.tokenizer.encode(TEXT), 1]
    assert told == made[: len(told)] and len(told) > 5
    if "regex" in case:  # what is there is all that it allows
        assert told == made[:-1]


@pytest.mark.parametrize("path", PATHS)
def test_tracked_stream_is_the_plain_one_but_for_the_comments_and_the_last_chunk(server, path):
    """Text and tokens come together; nothing is lost or moved before its time."""
    server.say(TEXT)
    body = {**body_of(path, {"stop": ["stopp"]}), "rid": "r"}
    tracked, plain = stream(server, path, body, **{"x-resume": "track"}), stream(server, path, body)
    assert all(ids is None for ids, _ in plain)
    assert text_of(tracked) == text_of(plain) == "hello wörld <s the 漢字 stop and 🙂 "


def text_of(events):
    data = [d for _, d in events if d != "[DONE]"]
    if "text" in data[0]:
        return data[-1]["text"]
    choices = [choice for d in data for choice in d["choices"]]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


def test_ids_wait_for_the_event_that_shows_all_of_their_text(server):
    server.say("a漢b")
    events = stream(server, "/generate", body_of("/generate", {}), **{"x-resume": "track"})
    a, *han, b = server.tokenizer.encode("a漢b")
    assert [ids for ids, _ in events] == [[a], han, [b], [1], None]
    assert [d["output_ids"] for _, d in events[:-1]] == [[a], [a, *han], [a, *han, b], [a, *han, b, 1]]


def test_text_held_as_a_possible_stop_string_keeps_its_tokens_back(server):
    server.say("ab")
    body = body_of("/generate", {"stop": ["bc"]})
    events = stream(server, "/generate", body, **{"x-resume": "track"})
    a, b = server.tokenizer.encode("ab")
    assert [ids for ids, _ in events] == [[a], [b, 1], None]


def test_resumed_request_tells_the_engine_what_was_generated(server):
    server.say("hello")
    body = {**body_of("/v1/chat/completions", {}), "seed": 7, "resume": {"token_ids": [9, 8], "id": "c"}}
    server.engine.script = lambda request: [9, 8, 10]
    events = stream(server, "/v1/chat/completions", body)
    [request] = server.engine.requests
    assert (request.output_ids, request.sampling.seed, request.sampling.max_new_tokens) == ([9, 8], 7, 90)
    assert events[-2][1]["usage"]["completion_tokens"] == 4
    assert "role" not in events[0][1]["choices"][0]["delta"]


def test_stream_resumed_after_its_last_token_ends_without_asking_the_engine(server):
    body = {**body_of("/v1/completions", {}), "resume": {"token_ids": [9, 1], "id": "c"}}
    events = stream(server, "/v1/completions", body)
    assert server.engine.requests == []
    assert [d if d == "[DONE]" else d["usage"]["completion_tokens"] for _, d in events] == [2, "[DONE]"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stream": False, "stream_options": None}, "resume needs stream=true"),
        ({"n": 2}, "resume takes one sequence"),
        ({"logprobs": 1}, "resume takes one sequence"),
        ({"echo": True}, "resume does not go with echo"),
        ({"resume": {"token_ids": [9, 1, 9]}}, "resume.token_ids goes on after the end"),
        ({"resume": {"token_ids": [9, 9], "id": "c"}, "max_tokens": 1}, "resume.token_ids goes on after"),
        ({"resume": {"token_ids": [99999]}}, "resume.token_ids holds token id 99999"),
        ({"resume": {}}, "resume.token_ids is required"),
        ({"resume": {"token_ids": [9], "text": "x"}}, "resume.text is not a known parameter"),
    ],
)
def test_what_cannot_be_resumed_is_refused_by_name(server, change, message):
    body = {**body_of("/v1/completions", {}), "resume": {"token_ids": [9]}, **change}
    reply = server.http.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("field", [{"n": 2}, {"logprobs": 2}, {"echo": True}])
def test_stream_that_cannot_be_resumed_is_not_tracked(server, field):
    body = {**body_of("/v1/completions", {}), **field}
    assert all(ids is None for ids, _ in stream(server, "/v1/completions", body, **{"x-resume": "track"}))


# ---- a worker that cannot go on ----


@pytest.mark.parametrize("death", ["engine", "grace period"])
@pytest.mark.parametrize("path", PATHS)
def test_tracked_stream_is_cut_and_a_plain_one_told_when_the_worker_ends(tokenizer, path, death):
    """A gateway resumes what breaks off; an error event would reach the client."""
    for headers in ({"x-resume": "track"}, {}):
        engine = FakeEngine(lambda request: [9] * 10_000)
        engine.delay_s = 0.005
        running = Running(make_app(engine, tokenizer), grace_s=0.1)
        body, told = body_of(path, {"max_tokens": 400}), []
        url = f"http://127.0.0.1:{running.port}{path}"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=10) as answer:
            try:
                for line in answer.iter_lines():
                    told.append(line)
                    if len(told) == 6 and death == "engine":
                        engine.dead = True
                    elif len(told) == 6:
                        running.stop()
                whole = True
            except httpx.RemoteProtocolError:
                whole = False
        running.stop()
        running.thread.join(10)
        assert whole == (not headers)
        assert ("[DONE]" in told[-2]) == whole
        assert any('"error"' in line or '"abort"' in line for line in told) == whole


# ---- input ids ----


def test_chat_with_input_ids_is_answered_as_with_the_messages_they_come_from(server):
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "rid": "r"}
    told = server.http.post("/v1/chat/completions", json=body).json()
    ids = server.engine.requests[0].input_ids
    for messages in (body["messages"], None):
        again = server.http.post(
            "/v1/chat/completions", json={**body, "messages": messages, "input_ids": ids}
        ).json()
        assert again | {"created": 0} == told | {"created": 0}
    assert [request.input_ids for request in server.engine.requests] == [ids] * 3


# ---- sequences, without a server ----


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    kinds = (tiny_tokenizer.byte_level, tiny_tokenizer.sentencepiece, tiny_tokenizer.wordpiece)
    return [
        Tokenizer.from_dir(tiny_tokenizer.write(tmp_path_factory.mktemp(kind.__name__), kind()))
        for kind in kinds
    ]


def shown(request, rules, tokenizer, tokens):
    """What a tracked sequence shows, event by event: (tokens, their text, all text)."""
    sequence = Sequence(request, rules, tokenizer, arrived_s=0.0, tracked=True)
    events = []
    for at in range(len(request.output_ids), len(tokens)):
        if sequence.finish is not None:
            break
        finish = Finish("length") if at == len(tokens) - 1 else None
        sequence.feed(Output("r", token_ids=[tokens[at]], finish=finish))
        if ids := sequence.take_ids():
            events.append((ids, sequence.take_text(), sequence.text))
    return events


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_tokens_and_stop_strings_are_shown_alike_in_one_part_or_two(tokenizers, data):
    tokenizer = data.draw(st.sampled_from(tokenizers))
    size = tokenizer.fast.get_vocab_size()
    some = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    tokens = data.draw(st.lists(st.sampled_from(some), min_size=1, max_size=24))
    text = tokenizer.decode(tokens)
    stops = [text[a : a + n] for a, n in data.draw(st.lists(CUTS, max_size=2)) if text[a : a + n]]
    stops += [stop + "x" for stop in stops]  # begun and not ended
    rules = TextRules(stops=tuple(stops), keep_stop=data.draw(st.booleans()))
    sampling = Sampling(max_new_tokens=len(tokens), min_new_tokens=data.draw(st.integers(0, len(tokens))))
    request = Generate(rid="r", input_ids=[4, 5], sampling=sampling)
    whole = shown(request, rules, tokenizer, tokens)
    for cut in range(1, len(whole)):
        told = [token for ids, *_ in whole[:cut] for token in ids]
        resumed = msgspec.structs.replace(request, output_ids=told)
        assert whole[:cut] + shown(resumed, rules, tokenizer, tokens) == whole
    assert "".join(fresh for _, fresh, _ in whole) == whole[-1][2]
