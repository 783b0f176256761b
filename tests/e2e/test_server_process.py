"""The real server process: birth, answers, clients that leave, and every way to die."""

import json
import signal
import socket
import threading
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.process import PATIENCE_S, body, until
from tests.engine.asking import Golden, check_greedy
from tests.weights.test_hub import hub  # noqa: F401  (a fixture)

PROMPT = [10, 11, 12, 13, 14] * 8
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
CHAT = [{"role": "user", "content": "hello world"}]


@pytest.fixture
def local(engine, checkpoint):
    """The same checkpoint in this process, with the server's sizes."""
    sizes = {"max_running_requests": 8, "chunked_prefill_size": 64, "max_total_tokens": 4096}
    return engine(str(checkpoint), skip_tokenizer_init=False, **sizes)


def events(response) -> list[dict]:
    """The events of a stream; it must end as it should."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(entry) for entry in data[:-1]]


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has, too."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- answers ----


def test_generate_answers_with_the_tokens_of_the_engine_in_this_process(server, local):
    for _ in range(2):  # the second time from both prefix caches
        reply = server.http.post("/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY}).json()
        mine = local.generate(input_ids=PROMPT, sampling_params=GREEDY)
        assert reply["output_ids"] == mine["output_ids"]
        assert reply["text"] == mine["text"]
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 24}


def test_generate_answers_with_the_recorded_tokens(server):
    golden = Golden.read("llama")
    prompts = [prompt.tolist() for prompt in golden.prompts]
    check_greedy(golden, server.http.post("/generate", json=body(prompts, golden.greedy.shape[1])).json())


def test_seeded_sample_over_http_is_that_of_the_engine_in_this_process(server, local):
    params = {"max_new_tokens": 24, "ignore_eos": True, "sampling_seed": 11, "top_p": 0.9, "n": 2}
    replies = server.http.post("/generate", json={"text": "hello", "sampling_params": params}).json()
    mine = local.generate(prompt="hello", sampling_params=params)
    assert [r["output_ids"] for r in replies] == [r["output_ids"] for r in mine]


def test_stream_ends_with_what_the_whole_answer_has(server):
    request = {"text": "the world", "sampling_params": GREEDY}
    whole = server.http.post("/generate", json=request).json()
    with server.http.stream("POST", "/generate", json={**request, "stream": True}) as response:
        parts = events(response)
    assert len(parts) > 2
    assert parts[-1]["text"] == whole["text"]
    assert parts[-1]["output_ids"] == whole["output_ids"]


def test_openai_client_chats_streamed_and_whole_with_the_same_text(server, checkpoint, local):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S) as client:
        assert [model.id for model in client.models.list()] == [str(checkpoint)]
        options = {
            "model": str(checkpoint), "messages": CHAT, "temperature": 0, "max_tokens": 16,
            "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        whole = client.chat.completions.create(**options)
        streamed = client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(streamed)
    text = whole.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    usage = chunks[-1].usage  # its cached prompt tokens may differ
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 16)
    assert whole.usage.completion_tokens == 16
    prompt = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    mine = local.generate(prompt=prompt, sampling_params={**GREEDY, "max_new_tokens": 16})
    assert text == mine["text"]


def test_openai_client_gets_the_json_and_the_calls_that_it_asks_for(server):
    schema = {
        "type": "object",
        "properties": {
            "sure": {"type": "boolean"},
            "sizes": {"type": "array", "maxItems": 2, "items": {"enum": [1, 2, 3]}},
        },
        "required": ["sure", "sizes"],
        "additionalProperties": False,
    }
    tool = {"name": "weigh", "parameters": schema}
    asked = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S) as client:
        ask = client.chat.completions.create
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        said = ask(**asked, seed=1, response_format=form).choices[0]
        calls = ask(
            **asked,
            seed=2,
            tools=[{"type": "function", "function": tool}],
            tool_choice="required",
            parallel_tool_calls=False,
        ).choices[0]
    assert said.finish_reason == "stop"
    [call] = calls.message.tool_calls
    assert (calls.finish_reason, call.function.name) == ("tool_calls", "weigh")
    for text in (said.message.content, call.function.arguments):
        value = json.loads(text)
        assert isinstance(value["sure"], bool) and len(value["sizes"]) <= 2


def test_openai_client_gets_an_error_with_the_parameter_named(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model=client.models.list().data[0].id, prompt="x", temperature=-1)
        assert error.value.param == "temperature"


def test_client_that_leaves_mid_stream_frees_its_pages(server):
    fields = body(PROMPT, 3000, stream=True)
    with server.http.stream("POST", "/generate", json=fields) as response:
        lines = response.iter_lines()  # held: httpx closes the stream of a generator that is dropped
        next(lines)
        assert server.loads()["num_running_reqs"] == 1
    server.until_idle()


def test_client_that_leaves_before_its_answer_frees_its_pages(server):
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/generate", json=body(PROMPT, 3000), timeout=0.3)
    server.until_idle()


def test_abort_by_rid_ends_a_stream_with_an_abort_finish(server):
    with server.http.stream(
        "POST", "/generate", json=body(PROMPT, 3000, rid="doomed", stream=True)
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.http.post("/abort_request", json={"rid": "doomed"}).status_code == 200
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(rest[-2])["meta_info"]["finish_reason"]["type"] == "abort"
    server.until_idle()


def test_rid_can_be_used_again_after_a_stop_string(server):
    """The engine is told to stop by an abort, whose answer must not reach the rid's next user."""
    want = server.http.post("/generate", json={"text": "x", "sampling_params": GREEDY}).json()["text"]
    stop = {**GREEDY, "max_new_tokens": 500, "stop": want[5]}
    for _ in range(10):
        first = server.http.post("/generate", json={"text": "x", "rid": "r", "sampling_params": stop})
        assert first.json()["meta_info"]["finish_reason"]["matched"] == want[5]
        second = server.http.post("/generate", json={"text": "x", "rid": "r", "sampling_params": GREEDY})
        assert second.json()["text"] == want
    server.until_idle()


def test_no_program_is_compiled_after_readiness(server):
    metrics = server.http.get("/metrics").text
    [line] = [row for row in metrics.splitlines() if ":compiles_after_ready{" in row]
    assert float(line.split()[-1]) == 0


# ---- birth ----


def test_port_opens_when_every_program_is_compiled(launch):
    server = launch()
    seen = set()
    until(lambda: seen.add(server.health()) or 200 in seen or server.process.poll() is not None)
    assert seen == {None, 200}  # closed, then serving; never a wrong answer
    assert server.http.get("/health_generate").status_code == 200
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0, server.output()


def refused(server) -> str:
    """The one line with which a server refuses to start."""
    assert server.wait() == 2, server.output()
    [line] = server.output().splitlines()
    return line


def test_port_in_use_is_one_line_and_status_2(launch):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(launch(port=port))
    assert line == f"jaxserve: cannot listen on host=0.0.0.0, port={port}: Address already in use"


def test_port_taken_while_the_model_loads_is_one_line_and_status_2(launch):
    server = launch("--log-level", "info")
    server.until_logged("loading weights")
    with socket.create_server(("0.0.0.0", server.port)):
        assert server.wait() == 2, server.output()
    last = server.output().splitlines()[-1]
    assert last == f"jaxserve: cannot listen on host=0.0.0.0, port={server.port}: Address already in use"
    assert "Traceback" not in server.output()


def test_bad_model_path_is_one_line_and_status_2(launch, tmp_path, compile_cache):
    line = refused(launch(base=["--model-path", str(tmp_path / "nothing")]))
    assert line.startswith("jaxserve: ") and str(tmp_path / "nothing") in line


def test_gated_model_is_one_line_that_names_the_token_and_status_2(launch, hub):  # noqa: F811
    line = refused(launch(base=["--model-path", "acme/gated"]))
    assert line.startswith("jaxserve: acme/gated: gated at http://127.0.0.1:")
    assert "set HF_TOKEN to a token of the same account with read access to acme/gated" in line


def test_context_longer_than_the_models_is_one_line_and_status_2(launch):
    line = refused(launch("--context-length", "5000"))
    assert line == "jaxserve: context_length=5000 exceeds the model's 4096; use 4096 or less"


def test_checkpoint_without_tokenizer_is_refused_with_a_way_out(launch, checkpoint, tmp_path):
    server = launch("--tokenizer-path", str(tmp_path), "--log-level", "error")
    line = refused(server)
    assert f"{tmp_path}/tokenizer.json is missing" in line and "--skip-tokenizer-init" in line


def test_missing_config_file_is_status_2_without_a_traceback(launch, tmp_path):
    server = launch(base=["--config", str(tmp_path / "none.yaml")])
    assert server.wait() == 2
    last = server.output().splitlines()[-1]
    assert last.endswith(f"error: config={tmp_path}/none.yaml: No such file or directory")
    assert "Traceback" not in server.output()


def test_yaml_key_and_name_are_used_and_flags_win_over_yaml(launch, flags, tmp_path):
    file = tmp_path / "server.yaml"
    values = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2])}
    values = {name: int(value) if value.isdigit() else value for name, value in values.items()}
    extra = {
        "served-model-name": "from-yaml",
        "api_key": "sesame",
        "stream_interval": 4,
        "log_level": "error",
    }
    file.write_text(json.dumps({**values, **extra}))  # JSON is YAML
    server = launch("--served-model-name", "from-flag", base=["--config", str(file)]).until_ready()
    assert server.http.get("/v1/models").status_code == 401
    key = {"authorization": "Bearer sesame"}
    assert server.http.get("/v1/models", headers=key).json()["data"][0]["id"] == "from-flag"
    info = server.http.get("/server_info", headers=key).json()
    assert (info["api_key"], info["stream_interval"], info["max_running_requests"]) == ("***", 4, 8)
    wrong = server.http.post("/generate", json=body([5], 1), headers={"authorization": "Bearer other"})
    assert wrong.status_code == 401
    with server.http.stream("POST", "/generate", json=body([5], 9, stream=True), headers=key) as response:
        assert [len(event["output_ids"]) for event in events(response)] == [1, 5, 9]
    server.process.terminate()
    assert server.wait() == 0
    assert server.output() == "", "a quiet server says nothing"


def test_dp_size_alone_is_full_replicas_behind_one_port_taken_in_turn(launch, local):
    server = launch("--dp-size", "2", "--device", "cpu").until_ready()
    assert len(psutil.Process(server.process.pid).children()) == 2
    replies = [server.generate(PROMPT, 24) for _ in range(4)]
    mine = local.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    assert [reply["output_ids"] for reply in replies] == [mine] * 4
    facts = [(reply["meta_info"]["dp_rank"], reply["meta_info"]["cached_tokens"]) for reply in replies]
    assert facts == [(0, 0), (1, 0), (0, 32), (1, 32)]  # each has a cache of its own
    [warning] = [line for line in server.output().splitlines() if "--enable-dp-attention" in line]
    assert "2 full replicas" in warning and "python -m router.launch_server" in warning
    assert "data-parallel attention needs both --dp-size and --enable-dp-attention" in warning
    server.process.terminate()
    assert server.wait() == 0, server.output()


# ---- death ----


def test_sigterm_during_a_stream_lets_it_finish_and_leaves_nobody_behind(launch):
    server = launch().until_ready()
    engine = server.engine
    fields = body(PROMPT, 2000, stream=True, sampling_params={"stream_interval": 100})
    with server.http.stream("POST", "/generate", json=fields) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        until(lambda: server.health() != 200)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    last = json.loads(rest[-2].removeprefix("data: "))
    assert len(last["output_ids"]) == 2000
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 2000}
    assert server.wait() == 0, server.output()
    assert gone(engine)


def test_sigterm_after_the_grace_period_aborts_what_still_runs(launch):
    server = launch("--shutdown-grace-period-secs", "0").until_ready()
    with server.http.stream("POST", "/generate", json=body(PROMPT, 4000, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert rest[-1] == "[DONE]"
    last = json.loads(rest[-2])
    assert "error" in last or last["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.wait() == 0, server.output()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once_even_with_a_frozen_engine(launch, second):
    server = launch("--shutdown-grace-period-secs", "3600").until_ready()
    engine = server.engine
    with server.http.stream("POST", "/generate", json=body(PROMPT, 4000, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        engine.suspend()
        server.process.terminate()
        until(lambda: server.health() != 200)
        server.process.send_signal(second)
        assert server.wait() == 128 + second, server.output()
    assert gone(engine)
    assert "Traceback" not in server.output()


def test_sigterm_while_loading_ends_at_once_with_status_0(launch):
    server = launch()
    server.until_logged("loading weights")
    engine = server.engine
    server.process.terminate()
    assert server.wait() == 0, server.output()
    assert gone(engine)
    assert "Traceback" not in server.output()


def test_killed_engine_is_told_to_every_client_and_ends_the_server_with_status_1(launch):
    server = launch().until_ready()
    waiting: list[httpx.Response] = []

    def wait_for_answer():
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            waiting.append(http.post("/generate", json=body(PROMPT, 3000)))

    threads = [threading.Thread(target=wait_for_answer) for _ in range(12)]  # more than run at a time
    for thread in threads:
        thread.start()
    until(lambda: sum(server.loads()[name] for name in ("num_running_reqs", "num_waiting_reqs")) == 12)
    with server.http.stream("POST", "/generate", json=body([5], 3000, stream=True, priority=9)) as response:
        lines = response.iter_lines()
        next(lines)
        server.engine.kill()
        rest = [line.removeprefix("data: ") for line in lines if line]
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [response.status_code for response in waiting] == [503] * 12
    assert all("the engine is gone" in r.json()["error"]["message"] for r in waiting)
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["error"]["type"] == "service_unavailable_error"
    assert server.wait() == 1
    assert "the engine process ended with status -9" in server.output()
    assert "Traceback" not in server.output()


def test_requests_while_the_engine_dies_are_answered_503_and_never_500(launch):
    server = launch().until_ready()
    server.engine.kill()
    statuses = set()

    def answered() -> bool:
        try:
            statuses.add(server.http.post("/generate", json=body([5], 2)).status_code)
            statuses.add(server.http.get("/v1/loads").status_code)
        except httpx.TransportError:  # the port is closed by now
            return True
        return server.process.poll() is not None

    until(answered)
    assert statuses <= {503}, server.output()
    assert server.wait() == 1


def test_engine_ends_by_itself_when_the_launcher_is_killed(launch):
    server = launch().until_ready()
    engine = server.engine
    sockets = Path(engine.cmdline()[-1].removeprefix("ipc://")).parent
    assert sockets.is_dir()
    server.process.kill()
    until(lambda: gone(engine))
    assert not sockets.exists()


def test_engine_ends_by_itself_when_the_launcher_is_killed_while_it_loads(launch):
    server = launch()
    server.until_logged("loading weights")
    engine = server.engine
    server.process.kill()
    until(lambda: gone(engine))
