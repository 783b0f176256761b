"""/generate over HTTP against a scripted engine."""

import json
import socket
import time

import pytest


def events(response):
    """The events of a complete stream."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# ---- whole answers ----


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("framing", ["content-length: 12", "transfer-encoding: chunked"])
def test_client_that_offers_another_protocol_is_answered_in_http_1(server, framing, pieces):
    """As Java's does with its first request."""
    head = "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    body = '{"text":"x"}'
    content = f"c\r\n{body}\r\n0\r\n\r\n" if "chunked" in framing else body
    parts = [f"{head}{framing}\r\n\r\n", content]
    with socket.create_connection(("127.0.0.1", server.http.base_url.port), timeout=10) as client:
        for part in parts if pieces == 2 else ["".join(parts)]:
            client.sendall(part.encode())
            time.sleep(0.05)
        answer = client.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 200 ") and '"text":"hello world"' in answer


def test_offer_of_another_protocol_does_not_excuse_a_body_that_is_none(server):
    head = "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
    with socket.create_connection(("127.0.0.1", server.http.base_url.port), timeout=10) as client:
        client.sendall(f"{head}transfer-encoding: chunked\r\n\r\nno length\r\n".encode())
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 400 ")


def test_text_prompt_gives_text_ids_and_meta_info(server):
    reply = server.generate(text="the world", sampling_params={"max_new_tokens": 50}, rid="r1").json()
    ids = server.tokenizer.encode("hello world")
    assert list(reply) == ["text", "output_ids", "meta_info"]
    assert reply["text"] == "hello world"
    assert reply["output_ids"] == [*ids, 1]
    meta = reply["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert abs(meta.pop("response_sent_to_client_ts") - time.time()) < 60
    assert meta == {
        "id": "r1",
        "finish_reason": {"type": "stop", "matched": 1},
        "prompt_tokens": len(server.tokenizer.encode("the world")),
        "completion_tokens": len(ids) + 1,
        "cached_tokens": 2,
        "reasoning_tokens": 0,
        "num_retractions": 0,
        "weight_version": "default",
        "dp_rank": 0,
    }
    assert server.engine.requests[0].input_ids == server.tokenizer.encode("the world")


def test_put_is_post(server):
    assert server.http.put("/generate", json={"text": "x"}).json()["text"] == "hello world"


def test_input_ids_go_to_the_engine_as_they_are(server):
    assert server.generate(input_ids=[5, 6, 7]).json()["meta_info"]["prompt_tokens"] == 3
    assert server.engine.requests[0].input_ids == [5, 6, 7]


def test_batch_of_texts_is_answered_in_order(server):
    server.engine.script = lambda r: list(r.input_ids)
    replies = server.generate(text=["hello", "world", "the"], rid=["a", "b", "c"]).json()
    assert [r["text"] for r in replies] == ["hello", "world", "the"]
    assert [r["meta_info"]["id"] for r in replies] == ["a", "b", "c"]


def test_batch_of_one_is_a_list(server):
    assert len(server.generate(text=["hello"]).json()) == 1
    assert len(server.generate(input_ids=[[4, 5]]).json()) == 1


def test_batch_takes_sampling_parameters_one_a_prompt(server):
    sampling = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "temperature": 0}]
    replies = server.generate(text=["x", "y"], sampling_params=sampling).json()
    assert [r["meta_info"]["completion_tokens"] for r in replies] == [1, 2]
    assert [r["text"] for r in replies] == ["hello", "hello "]
    assert server.engine.requests[1].sampling.temperature == 0.0


def test_n_samples_are_a_list_with_seeds_of_their_own(server):
    replies = server.generate(text=["x", "y"], rid="r", sampling_params={"n": 2, "sampling_seed": 7}).json()
    assert [r["meta_info"]["id"] for r in replies] == ["r_0", "r_1", "r_2", "r_3"]
    assert [r.sampling.seed for r in server.engine.requests] == [7, 8, 7, 8]
    assert len(server.generate(text="x", sampling_params={"n": 3}).json()) == 3


def test_defaults_are_those_of_sglang(server):
    server.generate(text="x")
    sampling = server.engine.requests[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (
        128,
        1.0,
        1.0,
        -1,
    )
    assert sampling.stop_token_ids == (1,)
    assert sampling.seed is None


def test_every_sampling_parameter_reaches_the_engine(server):
    given = {
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "frequency_penalty": 0.3, "presence_penalty": -0.3, "repetition_penalty": 1.1, "stop_token_ids": [9],
        "logit_bias": {"7": 1.5}, "sampling_seed": 3,
    }  # fmt: skip
    server.generate(
        text="x", sampling_params=given, priority=4, cache_salt="s", extra_key="k", routed_dp_rank=1
    )
    request = server.engine.requests[0]
    for name, value in given.items():
        wanted = {"stop_token_ids": (1, 9), "logit_bias": {7: 1.5}}.get(name, value)
        assert getattr(request.sampling, name.removeprefix("sampling_")) == wanted, name
    assert (request.priority, request.cache_salt, request.dp_rank) == (4, "s\0k", 1)


def test_data_parallel_rank_is_an_alias(server):
    assert server.generate(text="x", data_parallel_rank=1).json()["meta_info"]["dp_rank"] == 1


def test_ignore_eos_leaves_only_the_named_stop_tokens(server):
    sampling = {"ignore_eos": True, "stop_token_ids": [9], "max_new_tokens": 30}
    server.engine.script = lambda r: [5, 1, 6, 9, 7]
    reply = server.generate(text="x", sampling_params=sampling).json()
    assert reply["output_ids"] == [5, 1, 6, 9]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": 9}


def test_temperature_below_a_millionth_is_greedy(server):
    server.generate(text="x", sampling_params={"temperature": 9e-7})
    assert server.engine.requests[0].sampling.temperature == 0.0


def test_length_finish(server):
    reply = server.generate(text="x", sampling_params={"max_new_tokens": 2}).json()
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert reply["text"] == "hello "


def test_null_max_new_tokens_fills_the_context(server):
    server.generate(input_ids=[5] * 100, sampling_params={"max_new_tokens": None})
    assert server.engine.requests[0].sampling.max_new_tokens == 400


def test_default_max_new_tokens_shrinks_to_the_room(server):
    server.generate(input_ids=[5] * 490)
    assert server.engine.requests[0].sampling.max_new_tokens == 10


def test_zero_max_new_tokens_scores_the_prompt_and_gives_no_token(server):
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 0}}
    reply = server.generate(**body, return_logprob=True, logprob_start_len=0).json()
    assert (reply["text"], reply["output_ids"]) == ("", [])
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert reply["meta_info"]["input_token_logprobs"] == [[None, 5, None], [-0.25, 6, None]]
    assert reply["meta_info"]["output_token_logprobs"] == []


def test_prompt_token_ids_come_back_on_demand(server):
    reply = server.generate(input_ids=[5, 6], return_prompt_token_ids=True).json()
    assert reply["meta_info"]["prompt_token_ids"] == [5, 6]


# ---- stop strings ----


def test_stop_string_ends_the_request_in_the_engine(server):
    server.say("hello wor stop and the world")
    reply = server.generate(text="x", rid="r", sampling_params={"stop": ["stop"]}).json()
    assert reply["text"] == "hello wor "
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": "stop"}
    assert server.tokenizer.decode(reply["output_ids"]) == "hello wor stop"
    assert server.engine.aborted == ["r"]


def test_stop_string_over_a_token_border_never_shows(server):
    server.say("the and the")
    response = server.generate(text="x", stream=True, sampling_params={"stop": "e an"})
    texts = [e["text"] for e in events(response)]
    assert texts[-1] == "th"
    assert all("th".startswith(t) for t in texts)


def test_no_stop_trim_keeps_the_stop_string(server):
    sampling = {"stop": "wor", "no_stop_trim": True}
    assert server.generate(text="x", sampling_params=sampling).json()["text"] == "hello wor"


def test_no_stop_trim_keeps_the_stop_token(server):
    w = server.tokenizer.encode("w")[0]
    server.engine.script = lambda r: [5, w, 6]
    sampling = {"stop_token_ids": [w], "no_stop_trim": True}
    assert server.generate(text="x", sampling_params=sampling).json()["text"].endswith("w")
    sampling = {"stop_token_ids": [w]}
    assert not server.generate(text="x", sampling_params=sampling).json()["text"].endswith("w")


def test_stop_string_inside_one_step_of_many_tokens_cuts_ids_and_logprobs(server):
    server.say("hello the world and")
    server.engine.tokens_a_step = 4
    sampling = {"stop": "the"}
    reply = server.generate(text="x", sampling_params=sampling, return_logprob=True).json()
    assert server.tokenizer.decode(reply["output_ids"]) == "hello the"
    assert len(reply["meta_info"]["output_token_logprobs"]) == len(reply["output_ids"])
    assert reply["meta_info"]["completion_tokens"] == len(reply["output_ids"])


def test_min_new_tokens_holds_for_stop_strings(server):
    server.say("the and the world")
    sampling = {"stop": "the", "min_new_tokens": 3}
    assert server.generate(text="x", sampling_params=sampling).json()["text"] == "the and "


def test_held_text_comes_with_the_finish(server):
    server.say("hello sto")
    assert server.generate(text="x", sampling_params={"stop": "stop"}).json()["text"] == "hello sto"


def test_special_tokens_show_on_demand(server):
    server.engine.script = lambda r: [2, 3]
    assert server.generate(text="x").json()["text"] == ""
    sampling = {"skip_special_tokens": False}
    assert server.generate(text="x", sampling_params=sampling).json()["text"] == "<|im_start|><|im_end|>"


# ---- logprobs ----


def test_logprobs_are_triples(server):
    server.engine.script = lambda r: [10, 11]
    asked = {"logprob_start_len": 1, "top_logprobs_num": 2, "token_ids_logprob": [4]}
    body = {"input_ids": [5, 6, 7], "return_logprob": True, **asked}
    meta = server.generate(**body).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 10, None], [-0.5, 11, None], [-0.5, 1, None]]
    assert meta["output_top_logprobs"][0] == [[-0.5, 10, None], [-1.5, 11, None]]
    assert meta["output_token_ids_logprobs"][2] == [[-3.0, 4, None]]
    assert meta["input_token_logprobs"] == [[-0.25, 6, None], [-0.25, 7, None]]
    assert meta["input_top_logprobs"][1] == [[-0.5, 7, None], [-1.5, 8, None]]


def test_text_in_logprobs_on_demand(server):
    body = {"text": "x", "return_logprob": True, "return_text_in_logprobs": True}
    meta = server.generate(**body).json()["meta_info"]
    assert [t for _, _, t in meta["output_token_logprobs"]] == ["hello", " ", "world", "</s>"]
    assert meta["input_token_logprobs"] == []
    assert "output_top_logprobs" not in meta


def test_logprobs_are_per_prompt_in_a_batch(server):
    replies = server.generate(text=["x", "y"], return_logprob=[True, False], top_logprobs_num=[1, 0]).json()
    assert "output_top_logprobs" in replies[0]["meta_info"]
    assert "output_token_logprobs" not in replies[1]["meta_info"]


# ---- streams ----


def test_stream_text_is_cumulative(server):
    response = server.generate(text="x", stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    got = events(response)
    assert [e["text"] for e in got] == ["hello", "hello ", "hello world", "hello world"]
    assert [len(e["output_ids"]) for e in got] == [1, 2, 3, 4]
    assert got[0]["meta_info"]["finish_reason"] is None
    assert got[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 1}


def test_stream_of_a_batch_has_indices_and_ends_each(server):
    server.engine.script = lambda r: list(r.input_ids)
    got = events(server.generate(text=["hello the", "world"], stream=True))
    last = {e["index"]: e for e in got}
    assert {i: e["text"] for i, e in last.items()} == {0: "hello the", 1: "world"}
    assert [e["index"] for e in got if e["meta_info"]["finish_reason"]].count(0) == 1


def test_stream_interval_thins_the_events(server):
    server.say("abcdefgh")
    got = events(server.generate(text="x", stream=True, sampling_params={"stream_interval": 3}))
    assert [e["text"] for e in got] == ["a", "abcd", "abcdefg", "abcdefgh"]


def test_stream_never_splits_a_character(server):
    server.say("a€b")
    got = events(server.generate(text="x", stream=True))
    assert [e["text"] for e in got] == ["a", "a", "a", "a€", "a€b", "a€b"]


def test_stream_logprobs_are_cumulative(server):
    got = events(server.generate(text="x", stream=True, return_logprob=True))
    assert [len(e["meta_info"]["output_token_logprobs"]) for e in got] == [1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 3])
def test_error_after_the_first_event_is_an_event(server, n):
    server.engine.delay_s = 0.05
    server.say("abcdefghabcdefgh")
    body = {"text": "x", "stream": True, "sampling_params": {"n": n}}
    seen = []
    with server.http.stream("POST", "/generate", json=body) as response:
        for line in response.iter_lines():
            seen.append(line)
            server.engine.dead = True
    assert response.status_code == 200
    data = [line for line in seen if line]
    assert data[-1] == "data: [DONE]"
    error = json.loads(data[-2].removeprefix("data: "))["error"]
    assert error["type"] == "service_unavailable_error"
