"""What a wrong request is answered: status, parameter and message, in OpenAI's error body."""

import gzip
import json
import socket

import httpx
import pytest
from fake_engine import FakeEngine
from live_server import Running, make_app

from jaxserve.server import connection, stream

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
UNKNOWN = "unknown_parameter"
LATER = "unsupported_parameter"
LONG = "context_length_exceeded"


def error_of(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return body["error"]


GENERATE_CASES = [
    # body, param, words of the message, code
    ({}, "text", "neither text nor input_ids is given", 400),
    ({"text": "x", "input_ids": [1]}, "input_ids", "both text and input_ids are given", 400),
    ({"text": 1}, "text", "text must be of type str or list, got 1", 400),
    ({"text": ["x", 1]}, "text[1]", "text[1] must be of type str, got 1", 400),
    ({"text": ""}, "text", "text is empty", 400),
    ({"text": []}, "text", "text must hold 1 to 4096 prompts, got 0", 400),
    ({"text": ["x"] * 4097}, "text", "text must hold 1 to 4096 prompts, got 4097", 400),
    ({"text": ["x", ""]}, "text[1]", "text[1] is empty", 400),
    ({"text": "x" * 40_000}, "text", "text has 40000 characters, more than 500 tokens can hold", LONG),
    ({"text": "x" * 600}, "text", "text has 600 tokens; at most 499 fit", LONG),
    ({"input_ids": []}, "input_ids", "input_ids is empty", 400),
    ({"input_ids": "x"}, "input_ids", "input_ids must be of type list, got 'x'", 400),
    ({"input_ids": [1, [2]]}, "input_ids", "mixes token ids and lists", 400),
    ({"input_ids": [[1], []]}, "input_ids[1]", "input_ids[1] is empty", 400),
    ({"input_ids": [1.5]}, "input_ids[0]", "input_ids[0] must be of type int or list, got 1.5", 400),
    ({"input_ids": [True]}, "input_ids[0]", "must be of type int or list, got true", 400),
    ({"input_ids": [5, 320]}, "input_ids", "input_ids holds token id 320; valid ids are [0, 319]", 400),
    ({"input_ids": [-1]}, "input_ids", "input_ids holds token id -1; valid ids are [0, 319]", 400),
    ({"input_ids": [10**30]}, "input_ids", "holds token id 1000000000000000000000000000000", 400),
    ({"input_ids": [5] * 500}, "input_ids", "input_ids has 500 tokens; at most 499 fit", LONG),
    ({"text": "x", "temprature": 1}, "temprature", "temprature is not a known parameter", UNKNOWN),
    ({"text": "x", "steam": True}, "steam", "did you mean stream?", UNKNOWN),
    ({"text": "x", "lora_path": "a"}, "lora_path", "lora_path is not supported", LATER),
    ({"text": "x", "image_data": ["a"]}, "image_data", "image_data is not supported", LATER),
    ({"text": "x", "session_params": {"id": 1}}, "session_params", "not supported", LATER),
    ({"text": "x", "input_embeds": [[0.1]]}, "input_embeds", "not supported", LATER),
    ({"text": "x", "return_hidden_states": True}, "return_hidden_states", "not supported", LATER),
    ({"text": "x", "custom_logit_processor": "f"}, "custom_logit_processor", "not supported", LATER),
    ({"text": "x", "bootstrap_room": 1}, "bootstrap_room", "not supported", LATER),
    ({"text": "x", "stream": "yes"}, "stream", "stream must be of type bool, got 'yes'", 400),
    ({"text": "x", "rid": ""}, "rid", "rid must have 1 to 256 characters, got 0", 400),
    ({"text": "x", "rid": ["a", "b"]}, "rid", "rid has 2 entries for 1 prompt", 400),
    ({"text": ["x", "y"], "rid": ["a", "a"]}, "rid", "rid holds the same id twice", 400),
    ({"text": "x", "priority": 2**40}, "priority", "priority must be in [-2147483648, 2147483647]", 400),
    ({"text": "x", "cache_salt": "s" * 2000}, "cache_salt", "may have up to 1024 characters", 400),
    ({"text": "x", "routed_dp_rank": 2}, "routed_dp_rank", "routed_dp_rank must be in [0, 1], got 2", 400),
    ({"text": "x", "data_parallel_rank": -1}, "data_parallel_rank", "must be in [0, 1], got -1", 400),
    (
        {"text": "x", "routed_dp_rank": 0, "data_parallel_rank": 1},
        "routed_dp_rank",
        "routed_dp_rank=0 and data_parallel_rank=1 contradict each other",
        400,
    ),
    (
        {"text": "x", "logprob_start_len": -2},
        "logprob_start_len",
        "must be in [-1, 1] (the prompt's length)",
        400,
    ),
    ({"text": "x", "top_logprobs_num": 21}, "top_logprobs_num", "must be in [0, 20], got 21", 400),
    ({"text": "x", "token_ids_logprob": [320]}, "token_ids_logprob", "holds token id 320", 400),
    ({"text": "x", "token_ids_logprob": [1, [2]]}, "token_ids_logprob", "has 2 entries for 1 prompt", 400),
    ({"text": "x", "token_ids_logprob": list(range(33))}, "token_ids_logprob", "up to 32 ids, got 33", 400),
    ({"text": ["x", "y"], "return_logprob": [True]}, "return_logprob", "has 1 entries for 2 prompts", 400),
    ({"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params", "has 1 entries for 2 prompts", 400),
    ({"text": "x", "sampling_params": "greedy"}, "sampling_params", "must be of type object or list", 400),
    (
        {"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]},
        "sampling_params.n",
        "must be the same for all prompts",
        400,
    ),
    (
        {"text": ["x"] * 2100, "sampling_params": {"n": 2}},
        "text",
        "4200 sequences; one request may have 4096",
        400,
    ),
]


@pytest.mark.parametrize("body, param, words, code", GENERATE_CASES)
def test_generate_names_the_parameter(server, body, param, words, code):
    error = error_of(server.http.post("/generate", json=body))
    assert words in error["message"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert not server.engine.requests


SAMPLING_CASES = [
    ("temperature", -0.1, "must be in [0.0, infinity), got -0.1"),
    ("temperature", "hot", "must be of type float, got 'hot'"),
    ("top_p", 0, "must be in (0.0, 1.0], got 0"),
    ("top_p", 1.1, "must be in (0.0, 1.0], got 1.1"),
    ("min_p", 1.5, "must be in [0.0, 1.0], got 1.5"),
    ("top_k", 0, "must be -1 (the whole vocabulary) or at least 1, got 0"),
    ("top_k", 1.5, "must be of type int, got 1.5"),
    ("frequency_penalty", 2.1, "must be in [-2.0, 2.0], got 2.1"),
    ("presence_penalty", -2.1, "must be in [-2.0, 2.0], got -2.1"),
    ("repetition_penalty", 0, "must be in (0.0, 2.0], got 0"),
    ("max_new_tokens", -1, "must be in [0, infinity), got -1"),
    ("max_new_tokens", 500, "exceed the limit of 500 tokens for prompt and output; ask for 499 or fewer"),
    ("min_new_tokens", 129, "must be in [0, 128] (sampling_params.max_new_tokens), got 129"),
    ("n", 0, "must be in [1, 128], got 0"),
    ("n", 129, "must be in [1, 128], got 129"),
    ("stream_interval", 0, "must be in [1, infinity), got 0"),
    ("sampling_seed", 2**63, "must be in [-9223372036854775808, 9223372036854775807]"),
    ("stop", [""], "strings must have 1 to 1024 characters"),
    ("stop", ["a"] * 65, "may have up to 64 strings, got 65"),
    ("stop", [1], "must be of type str, got 1"),
    ("stop_token_ids", [320], "holds token id 320; valid ids are [0, 319]"),
    ("stop_token_ids", [5] * 65, "may have up to 64 entries, got 65"),
    ("logit_bias", {"320": 1}, "holds token id 320"),
    ("logit_bias", {"a": 1}, "key of sampling_params.logit_bias must be of type int, got str"),
    ("logit_bias", {"5": 101}, "must be in [-100, 100], got 101"),
    ("logit_bias", {str(i): 1 for i in range(301)}, "may have up to 300 entries, got 301"),
    ("stop_regex", "a+", "is not supported"),
    ("custom_params", {"a": 1}, "is not supported"),
    ("custom_params", {"a": 1}, "is not supported"),
    ("top_pp", 1, "did you mean sampling_params.top_p?"),
]


@pytest.mark.parametrize("name, value, words", SAMPLING_CASES)
def test_generate_names_the_sampling_parameter(server, name, value, words):
    error = error_of(server.generate(text="x", sampling_params={name: value}))
    assert words in error["message"]
    assert f"sampling_params.{name}" in error["message"]
    assert error["param"].startswith(f"sampling_params.{name}")
    assert not server.engine.requests


def test_fields_of_later_work_may_be_off(server):
    off = {"lora_path": None, "image_data": [], "return_hidden_states": False, "session_params": {}}
    assert server.generate(text="x", **off, sampling_params={"regex": None}).status_code == 200


TOOL = {"type": "function", "function": {"name": "f"}}
OPENAI_CASES = [
    ("/v1/completions", {}, "prompt", "prompt is required", 400),
    ("/v1/completions", {"prompt": []}, "prompt", "it is empty", 400),
    ("/v1/completions", {"prompt": ["a", 1]}, "prompt", "it mixes them", 400),
    ("/v1/completions", {"prompt": ""}, "prompt", "prompt is empty", 400),
    ("/v1/completions", {"prompt": [320]}, "prompt", "holds token id 320", 400),
    ("/v1/completions", {"prompt": [10**30], "echo": True}, "prompt", "holds token id 1000000", 400),
    ("/v1/completions", {"prompt": [5] * 500, "echo": True}, "prompt", "500 tokens; at most 499 fit", LONG),
    (
        "/v1/completions",
        {"prompt": [5] * 501},
        "prompt",
        "prompt has 501 tokens; a sequence has at most",
        LONG,
    ),
    ("/v1/completions", {"prompt": ["x"] * 4097}, "prompt", "must hold 1 to 4096 prompts, got 4097", 400),
    ("/v1/completions", {"prompt": [[5]] * 4097}, "prompt", "must hold 1 to 4096 prompts, got 4097", 400),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported", LATER),
    ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of", "best_of=2 is not supported unless", 400),
    ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs", "must be in [0, 20], got 21", 400),
    ("/v1/completions", {"prompt": "x", "max_tokens": 500}, "max_tokens", "max_tokens=500", LONG),
    ("/v1/completions", {"prompt": "x", "top_p": 2}, "top_p", "top_p must be in (0.0, 1.0], got 2", 400),
    (
        "/v1/completions",
        {"prompt": "x", "max_new_tokens": 2},
        "max_new_tokens",
        "not a known parameter",
        UNKNOWN,
    ),
    ("/v1/chat/completions", {}, "messages", "messages must have at least one message", 400),
    ("/v1/chat/completions", {"messages": []}, "messages", "at least one message", 400),
    ("/v1/chat/completions", {"messages": "hi"}, "messages", "must be of type list, got 'hi'", 400),
    ("/v1/chat/completions", {"messages": [1]}, "messages[0]", "must be of type object, got 1", 400),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "is required", 400),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role", "non-empty string", 400),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x", "mood": 1}]},
        "messages[0]",
        "messages[0].mood is not a known parameter",
        UNKNOWN,
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "messages[0].content[0]",
        "of type 'image_url' is not supported",
        LATER,
    ),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL]}, "tools", "without --tool-call-parser", LATER),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "x"}]}, "tools[0].type", "must be 'function'", 400),
    (
        "/v1/chat/completions",
        {**CHAT, "tools": [TOOL, {"type": "function", "function": {"name": ""}}]},
        "tools[1].function",
        "must be an object with a name",
        400,
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
        "tools[0].function.parameters",
        "must be a JSON schema, got a list of 1 item",
        400,
    ),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": ["a"]}}}],
        },
        "tools[0].function.parameters",
        "must be a JSON schema",
        400,
    ),
    ("/v1/completions", {"prompt": "hi", "tools": [TOOL]}, "tools", "not supported", LATER),
    ("/v1/chat/completions", {**CHAT, "json_schema": "{}"}, "json_schema", "is not supported", LATER),
    ("/v1/chat/completions", {**CHAT, "lora_path": "a"}, "lora_path", "not supported", LATER),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", "needs logprobs=true", 400),
    (
        "/v1/chat/completions",
        {**CHAT, "logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        "must be in [0, 20], got 21",
        400,
    ),
    ("/v1/chat/completions", {**CHAT, "n": 0}, "n", "n must be in [1, 128], got 0", 400),
    ("/v1/chat/completions", {**CHAT, "seed": 2**64}, "seed", "seed must be in", 400),
    ("/v1/chat/completions", {**CHAT, "stream_options": {}}, "stream_options", "only valid with stream", 400),
    (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "must be of type bool, got 1",
        400,
    ),
    (
        "/v1/completions",
        {"prompt": "x", "stream": True, "stream_options": {"continuous_usage_stats": "yes"}},
        "stream_options.continuous_usage_stats",
        "must be of type bool, got 'yes'",
        400,
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 1, "max_completion_tokens": 2},
        "max_tokens",
        "max_tokens=1 and max_completion_tokens=2 contradict",
        400,
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "continue_final_message": True},
        "continue_final_message",
        "needs a last message of role assistant",
        400,
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages",
        "is set by the server",
        400,
    ),
    ("/tokenize", {}, "prompt", "prompt is required", 400),
    ("/tokenize", {"prompt": [""] * 4097}, "prompt", "must hold 1 to 4096 prompts, got 4097", 400),
    (
        "/detokenize",
        {"tokens": [5] * 501},
        "tokens",
        "tokens has 501 tokens; a sequence has at most 500",
        LONG,
    ),
    ("/detokenize", {"tokens": [[5], [5] * 501]}, "tokens", "tokens has 501 tokens", LONG),
    ("/detokenize", {"tokens": [[]] * 4097}, "tokens", "must hold 1 to 4096 prompts, got 4097", 400),
    ("/detokenize", {"tokens": [2, [1]]}, "tokens", "mixes token ids and lists", 400),
    ("/detokenize", {"tokens": [[1], 2]}, "tokens", "mixes token ids and lists", 400),
    ("/detokenize", {"tokens": [-1]}, "tokens", "holds token id -1", 400),
]


@pytest.mark.parametrize("path, body, param, words, code", OPENAI_CASES)
def test_other_routes_name_the_parameter(server, path, body, param, words, code):
    error = error_of(server.http.post(path, json=body))
    assert words in error["message"]
    assert (error["param"], error["code"]) == (param, code)
    assert not server.engine.requests


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1,", b'{"text": NaN}', b"\xff\xfe", b'{"text": "\\ud800"}', b"[" * 100_000]
)
def test_malformed_json_is_400(server, path, content):
    assert "body is" in error_of(server.http.post(path, content=content))["message"]


@pytest.mark.parametrize("content", [b"1", b"null", b"[]", b'"x"'])
def test_body_that_is_no_object_is_400(server, content):
    assert "must be a JSON object" in error_of(server.http.post("/generate", content=content))["message"]


def test_content_type_is_json_or_absent(server):
    content = b'{"text": "x"}'
    for kind in ("application/json", "application/json; charset=utf-8", "application/vnd.api+json"):
        headers = {"content-type": kind}
        assert server.http.post("/generate", content=content, headers=headers).status_code == 200
    assert server.http.post("/generate", content=content).status_code == 200
    refused = server.http.post("/generate", content=content, headers={"content-type": "text/plain"})
    assert "got text/plain" in error_of(refused, 415)["message"]


def test_compressed_body_is_415(server):
    content = gzip.compress(b'{"text": "x"}')
    packed = server.http.post("/generate", content=content, headers={"content-encoding": "gzip"})
    assert "content-encoding gzip is not supported" in error_of(packed, 415)["message"]
    plain = server.http.post("/generate", json={"text": "x"}, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


def test_body_that_does_not_arrive_is_408(server, monkeypatch):
    monkeypatch.setattr(stream, "BODY_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.http.base_url.port), timeout=5) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert "the body did not arrive within 0.05 s" in answer


def test_head_that_does_not_end_is_408(server, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
    for before in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.http.base_url.port), timeout=5) as client:
            client.sendall(before + b"GET /health HTTP/1.1\r\nHost:")
            answers = client.makefile("rb").read().decode()
        assert answers.count("HTTP/1.1 200 ") == bool(before)
        assert "HTTP/1.1 408 " in answers and "did not arrive within 0.05 s" in answers


def test_head_over_the_limit_is_431(server, monkeypatch):
    monkeypatch.setattr(connection, "MAX_HEAD_BYTES", 1000)
    with socket.create_connection(("127.0.0.1", server.http.base_url.port), timeout=5) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200)
        answer = client.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 431 ")
    assert "head exceeds 1000 bytes" in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00 a TLS greeting\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n",
    ],
)
def test_what_is_no_http_is_400(server, sent):
    with socket.create_connection(("127.0.0.1", server.http.base_url.port), timeout=5) as client:
        client.sendall(sent)
        head, body = client.makefile("rb").read().split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["message"] == "the request is not valid HTTP/1.1"


def test_connection_that_asks_for_nothing_is_closed(server, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.http.base_url.port), timeout=5) as client:
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_413(server, monkeypatch, chunked):
    monkeypatch.setattr(stream, "MAX_BODY_BYTES", 1000)
    body = b'{"text": "' + b"x" * 2000 + b'"}'
    content = iter([body[:700], body[700:]]) if chunked else body
    assert "exceeds 1000 bytes" in error_of(server.http.post("/generate", content=content), 413)["message"]


def test_unknown_route_is_404(server):
    for path in ("/nothing", "/v1/embeddings", "/generate/"):
        error = error_of(server.http.post(path, json={}), 404)
        assert error["code"] == "unknown_url"
        assert path in error["message"]


def test_unknown_method_is_405(server):
    response = server.http.delete("/generate")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert set(response.headers["allow"].split(", ")) == {"POST", "PUT"}


def test_unknown_model_is_404(server):
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)):
        error = error_of(server.http.post(path, json={**body, "model": "gpt"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error_of(server.http.get("/v1/models/gpt"), 404)["code"] == "model_not_found"


def test_our_own_fault_is_500_without_details(server, caplog):
    server.engine.script = lambda request: 1 / 0
    error = error_of(server.generate(text="x"), 500)
    assert error["message"] == "internal error; the server's log has the details"
    assert "ZeroDivisionError" in caplog.text


def test_server_without_tokenizer_serves_ids_only():
    running = Running(make_app(FakeEngine(lambda request: [5, 6]), None))
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as http:
        reply = http.post("/generate", json={"input_ids": [7], "return_logprob": True}).json()
        assert "text" not in reply
        assert reply["output_ids"] == [5, 6, 1]
        stop = {"input_ids": [7], "sampling_params": {"stop": "a"}}
        for path, body in (
            ("/generate", {"text": "x"}),
            ("/generate", stop),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/completions", {"prompt": [5]}),
            ("/v1/chat/completions", CHAT),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            assert "--skip-tokenizer-init" in error_of(http.post(path, json=body))["message"]
    running.stop()
    running.thread.join(5)
