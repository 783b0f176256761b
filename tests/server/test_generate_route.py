"""/generate over HTTP against a scripted engine."""

import json


def test_text_prompt_gives_text_ids_and_meta_info(server):
    reply = server.generate(text="the world", sampling_params={"max_new_tokens": 50}, rid="r1").json()
    ids = server.tokenizer.encode("hello world")
    assert reply["text"] == "hello world"
    assert reply["output_ids"] == [*ids, 1]
    meta = reply["meta_info"]
    assert meta["id"] == "r1"
    assert meta["finish_reason"] == {"type": "stop", "matched": 1}
    assert meta["prompt_tokens"] == len(server.tokenizer.encode("the world"))
    assert meta["completion_tokens"] == len(ids) + 1
    assert meta["cached_tokens"] == 2
    assert meta["e2e_latency"] > 0
    assert server.engine.requests[0].input_ids == server.tokenizer.encode("the world")


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_stream_text_is_cumulative(server):
    response = server.generate(text="x", stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    got = events(response)
    assert [e["text"] for e in got] == ["hello", "hello ", "hello world", "hello world"]
    assert got[0]["meta_info"]["finish_reason"] is None
    assert got[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 1}


def test_chat_answers(server):
    body = {"model": "tiny/model", "messages": [{"role": "user", "content": "hello"}]}
    reply = server.http.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == "hello world"
    assert reply["choices"][0]["finish_reason"] == "stop"
