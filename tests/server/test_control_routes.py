"""Information, loads, metrics, cache and text routes."""

import logging
import re

import httpx
import pytest
from fake_engine import LOAD
from live_server import serving
from test_lifecycle import wait_for

import jaxserve


def test_root_says_what_runs(server):
    assert server.http.get("/").json() == {"name": "jaxserve", "version": jaxserve.__version__}


def test_version_alone(server):
    assert server.http.get("/version").json() == {"version": jaxserve.__version__}


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(server, path):
    assert server.http.get(path).json() == {
        "model_path": "tiny/model",
        "tokenizer_path": "tiny/model",
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_has_configuration_and_states(server, path):
    info = server.http.get(path).json()
    assert info["page_size"] == 16
    assert info["quantization"] is None
    assert info["max_total_num_tokens"] == 4096
    assert info["instance_id"] == "instance-1"
    assert [s["dp_rank"] for s in info["internal_states"]] == [0, 1]


def test_loads_of_all_ranks(server):
    reply = server.http.get("/v1/loads").json()
    assert (reply["accelerator"], reply["num_accelerators"]) == ("cpu", 1)
    assert reply["loads"] == [{"dp_rank": 0, **LOAD}, {"dp_rank": 1, **LOAD}]


def test_loads_of_one_rank_and_of_chosen_sections(server):
    rows = server.http.get("/v1/loads?dp_rank=1&include=core,memory").json()["loads"]
    assert [r["dp_rank"] for r in rows] == [1]
    assert "memory" in rows[0] and "queues" not in rows[0]
    assert "memory" not in server.http.get("/v1/loads?include=core").json()["loads"][0]


def test_loads_for_prometheus(server):
    text = server.http.get("/v1/loads?format=prometheus").text
    assert 'sglang:num_running_reqs{model_name="tiny/model",dp_rank="1"} 1\n' in text


@pytest.mark.parametrize(
    "query, param",
    [
        ("dp_rank=2", "dp_rank"),
        ("dp_rank=x", "dp_rank"),
        ("dp_rank=0000000009", "dp_rank"),
        (f"dp_rank=000000000{'1' * 5000}", "dp_rank"),
        ("include=a", "include"),
        ("format=x", "format"),
    ],
)
def test_loads_names_a_wrong_parameter(server, query, param):
    response = server.http.get(f"/v1/loads?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_get_load_is_the_older_form(server):
    row = server.http.get("/get_load").json()[1]
    assert row.pop("ts_tic") > 0
    assert row == {
        "dp_rank": 1,
        "num_reqs": 3,
        "num_waiting_reqs": 2,
        "num_tokens": 55,
        "num_pending_tokens": 7,
    }


# ---- metrics ----


def sample(server, name, rank=0):
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith(f'sglang:{name}{{dp_rank="{rank}",model_name="tiny/model"'):
            return float(line.rpartition(" ")[2])
        if line.startswith(f'sglang:{name}{{model_name="tiny/model",dp_rank="{rank}"'):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no sample of {name}")


def test_metrics_count_requests_and_tokens(server):
    names = ["num_requests_total", "prompt_tokens_total", "generation_tokens_total", "cached_tokens_total"]
    histograms = ["time_to_first_token", "inter_token_latency", "e2e_request_latency", "queue_time"]
    names += [f"{h}_seconds_count" for h in histograms]
    before = [sample(server, n, 1) for n in names]
    server.generate(input_ids=[5, 6, 7], routed_dp_rank=1)
    after = [sample(server, n, 1) for n in names]
    assert [a - b for a, b in zip(after, before)] == [1, 3, 4, 2, 1, 3, 1, 1]


def test_requests_that_ask_for_it_are_not_counted(server):
    before = sample(server, "num_requests_total")
    server.generate(text="x", log_metrics=False)
    server.http.get("/health_generate")
    assert sample(server, "num_requests_total") == before


def test_gauges_come_from_the_engine(server):
    assert sample(server, "num_running_reqs", 1) == 1
    assert sample(server, "num_queue_reqs") == 2
    assert sample(server, "token_usage") == 0.25
    assert sample(server, "num_retracted_reqs", 1) == 1
    assert sample(server, "spec_accept_length", 1) == 2.5
    assert sample(server, "spec_accept_rate", 1) == 0.5
    assert sample(server, "compiles_after_ready") == 0
    assert sample(server, "num_retractions") == 3
    assert sample(server, "engine_startup_time") == 2


def test_tokens_are_counted_before_their_request_is_over(server):
    lines = server.http.get("/metrics").text.splitlines()
    assert "# TYPE sglang:realtime_tokens_total counter" in lines
    counts = dict(line.rpartition(" ")[::2] for line in lines if line.startswith("sglang:realtime_tokens"))
    name = 'sglang:realtime_tokens_total{{dp_rank="{}",mode="{}",model_name="tiny/model"}}'
    assert counts == {
        name.format(0, "prefill_compute"): "5.0",
        name.format(0, "prefill_cache"): "4.0",
        name.format(0, "decode"): "20.0",
        name.format(1, "prefill_compute"): "7.0",
        name.format(1, "prefill_cache"): "0.0",
        name.format(1, "decode"): "30.0",
    }


def test_experts_are_told_by_layer_and_device(server):
    lines = server.http.get("/metrics").text.splitlines()
    values = dict(line.rpartition(" ")[::2] for line in lines if "expert" in line or "eplb" in line)
    values = {name: value for name, value in values.items() if not name.startswith("#")}
    model = 'model_name="tiny/model"'
    assert values == {
        f'sglang:eplb_balancedness{{dp_rank="0",{model}}}': "0.625",
        f'sglang:expert_layer_balancedness{{layer="0",{model}}}': "0.5",
        f'sglang:expert_layer_balancedness{{layer="1",{model}}}': "0.75",
        f'sglang:expert_device_tokens{{ep_rank="0",{model}}}': "10.0",
        f'sglang:expert_device_tokens{{ep_rank="1",{model}}}': "30.0",
        f'sglang:eplb_rebalances{{dp_rank="0",{model}}}': "2.0",
        f'sglang:eplb_moved_experts{{dp_rank="0",{model}}}': "7.0",
    }


def test_dense_model_has_no_metrics_of_experts(server):
    server.engine.has_experts = False
    assert "expert" not in server.http.get("/metrics").text


# ---- the log ----


def logged(server, caplog, count):
    """The lines of so many requests, without their times: a line comes just after its answer."""
    wait_for(lambda: len(caplog.messages) == count)
    lines = [re.sub(r"\d+\.\d{3} s", "T s", message) for message in caplog.messages]
    caplog.clear()
    return lines


def test_requests_for_tokens_are_logged_when_they_have_ended(tokenizer, caplog):
    caplog.set_level(logging.INFO, "jaxserve.server.request_log")
    with serving(tokenizer, log_requests=True, api_key="k") as server:
        server.http.headers = {"authorization": "Bearer k", "x-request-id": "mine"}
        server.say("hello world")
        body = {"input_ids": [[5, 6, 7], [8]], "sampling_params": {"n": 2}}
        assert server.generate(**body).status_code == 200
        line = "mine /generate 200: 4 prompt tokens, 16 completion tokens, first after T s, ended after T s"
        assert logged(server, caplog, 1) == [line]
        server.http.post("/v1/completions", json={"prompt": [5], "stream": True})
        [line] = logged(server, caplog, 1)
        assert line.startswith(
            "mine /v1/completions 200: 1 prompt tokens, 4 completion tokens, first after T s"
        )
        server.http.get("/health")
        server.generate(text=5)
        server.http.post("/generate", json={"text": "x"}, headers={"authorization": "Bearer other"})
        line = "mine /generate {}: 0 prompt tokens, 0 completion tokens, first after - s, ended after T s"
        assert logged(server, caplog, 2) == [line.format(400), line.format(401)]


def test_request_whose_client_left_is_logged_too(tokenizer, caplog):
    caplog.set_level(logging.INFO, "jaxserve.server.request_log")
    with serving(tokenizer, log_requests=True) as server:
        server.engine.hang = True
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/generate", json={"input_ids": [5]}, timeout=0.1, headers={"x-request-id": "a"})
        line = "a /generate 499: 1 prompt tokens, 0 completion tokens, first after - s, ended after T s"
        assert logged(server, caplog, 1) == [line]


def test_requests_are_not_logged_unless_that_is_asked_for(server, caplog):
    caplog.set_level(logging.INFO, "jaxserve.server.request_log")
    server.generate(text="x")
    assert not caplog.messages


# ---- commands ----


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_expert_distribution_record(server, method):
    texts = [
        server.http.request(method, f"/{verb}_expert_distribution_record").text for verb in ("start", "stop")
    ]
    assert texts == [
        "Start recording the expert distribution.\n",
        "Stop recording the expert distribution.\n",
    ]
    response = server.http.request(method, "/dump_expert_distribution_record")
    assert (response.status_code, response.json()) == (200, {"logical_count": [[3, 1]]})
    assert [c for c in server.engine.calls if "record" in c] == [
        "start_expert_record",
        "stop_expert_record",
        "dump_expert_record",
    ]


@pytest.mark.parametrize("verb", ["start", "stop", "dump"])
def test_expert_distribution_record_of_a_dense_model_is_refused(server, verb):
    server.engine.has_experts = False
    response = server.http.post(f"/{verb}_expert_distribution_record")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "this model has no experts"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache(server, method):
    response = server.http.request(method, "/flush_cache")
    assert (response.status_code, response.text) == (200, "Cache flushed.\n")
    assert "flush_cache" in server.engine.calls


def test_flush_cache_is_refused_while_requests_run(server):
    server.engine.busy = 1
    response = server.http.post("/flush_cache")
    assert (response.status_code, response.text) == (400, "Cache not flushed: 0 requests run\n")


def test_flush_cache_waits_on_demand(server):
    server.engine.busy = 2
    assert server.http.post("/flush_cache?timeout=5").status_code == 200
    assert server.engine.calls.count("flush_cache") == 3


@pytest.mark.parametrize("timeout", ["-1", "x", "nan", "inf"])
def test_flush_cache_names_a_wrong_timeout(server, timeout):
    response = server.http.post(f"/flush_cache?timeout={timeout}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "timeout")


# ---- text ----


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokenize_and_back(server, prefix):
    reply = server.http.post(f"{prefix}/tokenize", json={"prompt": "hello world"}).json()
    ids = server.tokenizer.encode("hello world")
    assert reply == {"tokens": ids, "count": 3, "max_model_len": 500}
    back = server.http.post(f"{prefix}/detokenize", json={"tokens": ids}).json()
    assert back == {"text": "hello world"}


def test_tokenize_of_a_list(server):
    reply = server.http.post("/tokenize", json={"prompt": ["hello", ""]}).json()
    assert reply["count"] == [len(server.tokenizer.encode("hello")), 0]
    back = server.http.post("/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back == {"text": ["hello", ""]}


def test_detokenize_shows_special_tokens_on_demand(server):
    body = {"tokens": [2, 1], "skip_special_tokens": False}
    assert server.http.post("/detokenize", json=body).json() == {"text": "<|im_start|></s>"}


def test_request_id_is_the_clients_or_new(server):
    given = server.http.get("/health", headers={"x-request-id": "abc"})
    assert given.headers["x-request-id"] == "abc"
    fresh = [server.http.get(path).headers["x-request-id"] for path in ("/health", "/nothing")]
    assert len(set(fresh)) == 2 and all(len(i) == 32 for i in fresh)
