"""The real gateway in front of two real replicas of a tiny model: one service that nothing interrupts."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.gateway import Launch, Load, pair, right_answers, serving
from tests.e2e.process import PATIENCE_S, Server, body, until

QUESTION = "the world and the things that are in it, told once more from the beginning: "
LONG = 900  # tokens; enough that a kill comes in the middle


@pytest.fixture(scope="module")
def lasting(launch: Launch, tmp_path_factory: pytest.TempPathFactory):
    """For tests that leave everybody alive."""
    with pair(launch, tmp_path_factory.mktemp("gateway")) as both:
        yield both


@pytest.fixture
def mortal(launch: Launch, tmp_path: Path):
    """For one test alone."""
    with pair(launch, tmp_path) as both:
        yield both


def events(lines) -> Iterator[dict]:
    for line in lines:
        assert not line.startswith(": tokens"), "the gateway keeps these"
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def busy(replicas: list[Server]) -> Server:
    """The replica that computes something."""
    found: list[Server] = []

    def look() -> bool:
        found[:] = [s for s in replicas if s.loads()["num_running_reqs"]]
        return bool(found)

    until(look)
    return found[0]


# ---- caches ----


def test_shared_prefixes_land_together_and_the_workers_confirm_what_was_known_of_them(lasting):
    """Chats and completions, sent as token ids; what the gateway knows is what each replica holds."""
    gateway, replicas = lasting
    for start in "abcd":
        homes, cached = set(), []
        for end in range(4):
            message = {"role": "user", "content": start + QUESTION * 3 + str(end)}
            answer = gateway.post("/v1/chat/completions", messages=[message], max_tokens=4, temperature=0)
            homes.add(answer.headers["x-smg-routed-worker-id"])
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            prompt = answer.json()["usage"]["prompt_tokens"]
        assert len(homes) == 1
        assert cached[0] < 16 < prompt - 32 <= min(cached[1:])
    for server in replicas:
        held = server.loads()["num_cached_tokens"] // 16
        assert held > 0
        until(lambda server=server, held=held: gateway.metric("router_kv_pages", worker=server.url) == held)
    assert gateway.metric("smg_kv_event_subscription_failures_total") == 0


def test_gateway_and_worker_answer_alike(lasting):
    """The gateway's token ids for chats and texts are the worker's own."""
    gateway, replicas = lasting
    message = {"role": "user", "content": "hello wörld 漢字"}
    for path, fields in (
        ("/v1/chat/completions", {"messages": [message]}),
        ("/v1/completions", {"prompt": "hello wörld 漢字"}),
    ):
        fields |= {"max_tokens": 12, "temperature": 0, "rid": "r"}
        told = gateway.post(path, **fields).json()
        direct = replicas[0].http.post(path, json=fields).json()
        assert told["choices"] == direct["choices"]
        assert told["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"]


def test_flushed_cache_is_known_to_be_empty(lasting):
    gateway, replicas = lasting
    prompt = list(range(4, 100))
    for _ in range(2):
        for server in replicas:
            assert server.http.post("/flush_cache").status_code == 200
        until(lambda: gateway.metric("router_kv_pages") == 0)
        answer = gateway.post("/generate", **body(prompt, 2)).json()
        assert answer["meta_info"]["cached_tokens"] == 0
        until(lambda: gateway.metric("router_kv_pages") == 6)


def test_ranks_of_one_server_are_routed_to_on_every_route_and_by_every_name_it_goes_by(launch, tmp_path):
    server = launch("--dp-size", "2", "--served-model-name", "tiny")
    with serving(tmp_path, "router.launch_router", "--dp-aware", "--worker-urls", server.url) as gateway:
        gateway.until_healthy(2)
        tokens = gateway.post("/tokenize", prompt="hello").json()["tokens"]
        assert gateway.post("/detokenize", tokens=tokens).json()["text"] == "hello"
        path = gateway.http.get("/model_info").json()["model_path"]
        for model in ("tiny", path, "default", ""):
            homes = {
                gateway.post("/v1/completions", model=model, prompt=prompt, max_tokens=2).headers[
                    "x-smg-routed-worker-id"
                ]
                for prompt in "ab"
            }
            assert homes == {f"{server.url}@{rank}" for rank in (0, 1)}
        loads = gateway.http.get("/get_load").json()
        assert [(load["worker"], load["dp_rank"]) for load in loads] == [(server.url, 0), (server.url, 1)]
        assert gateway.http.get("/health_generate").headers["content-type"].startswith("text/plain")
    server.close()


# ---- deaths ----


ROUTES = {
    "/generate": {
        "text": QUESTION,
        "sampling_params": {"max_new_tokens": LONG, "temperature": 0, "ignore_eos": True},
    },
    "/v1/completions": {
        "prompt": QUESTION,
        **{"max_tokens": LONG, "temperature": 0.7, "seed": 5, "ignore_eos": True},
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": QUESTION}],
        **{"max_tokens": LONG, "temperature": 1, "seed": 6, "ignore_eos": True, "frequency_penalty": 0.2},
        "stream_options": {"include_usage": True},
    },
}


def text_of(path: str, chunks: list[dict]) -> str:
    if path == "/generate":
        return chunks[-1]["text"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


@pytest.mark.parametrize(
    "path, what",
    [
        ("/generate", "server"),
        ("/v1/chat/completions", "engine"),
        pytest.param("/generate", "engine", marks=pytest.mark.slow),
        pytest.param("/v1/completions", "server", marks=pytest.mark.slow),
        pytest.param("/v1/completions", "engine", marks=pytest.mark.slow),
        pytest.param("/v1/chat/completions", "server", marks=pytest.mark.slow),
    ],
)
def test_killed_replica_does_not_interrupt_its_streams(mortal, path, what):
    """The whole worker, or its engine alone: then its HTTP process cuts the stream."""
    gateway, replicas = mortal
    fields = {**ROUTES[path], "stream": True}
    if (path, what) == ("/v1/chat/completions", "engine"):
        fields["regex"] = f"[a-z ]{{{2 * LONG}}}"
    chunks: list[dict] = []
    with gateway.http.stream("POST", path, json=fields) as answer:
        stream = events(answer.iter_lines())
        for _ in range(20):
            chunks.append(next(stream))
        victim = busy(replicas)
        process = victim.process if what == "server" else victim.engine
        process.send_signal(signal.SIGKILL)
        chunks += stream
    assert not [c for c in chunks if "error" in c]
    assert gateway.metric("router_stream_breaks_total", outcome="resumed") == 1
    survivor = next(s for s in replicas if s is not victim)
    with survivor.http.stream("POST", path, json=fields) as answer:
        unbroken = list(events(answer.iter_lines()))
    assert text_of(path, chunks) == text_of(path, unbroken)
    if path == "/generate":
        assert len({c["meta_info"]["id"] for c in chunks}) == 1
        assert [len(c["output_ids"]) for c in chunks] == sorted({len(c["output_ids"]) for c in chunks})
        assert chunks[-1]["output_ids"] == unbroken[-1]["output_ids"]
    else:
        assert len({(c["id"], c["created"]) for c in chunks}) == 1
        finishes = [choice["finish_reason"] for c in chunks for choice in c["choices"]]
        assert [f for f in finishes if f] == ["length"]
    if "chat" in path:
        roles = [choice["delta"].get("role") for c in chunks for choice in c["choices"]]
        assert [r for r in roles if r] == ["assistant"]
        assert chunks[-1]["usage"]["completion_tokens"] == LONG


def test_stopped_replica_ends_its_streams_and_gets_no_new_ones(mortal):
    gateway, replicas = mortal
    fields = {**ROUTES["/v1/completions"], "max_tokens": 400, "n": 8, "stream": True}
    with gateway.http.stream("POST", "/v1/completions", json=fields) as answer:
        stream = events(answer.iter_lines())
        chunks = [next(stream) for _ in range(5)]
        home = busy(replicas)
        home.process.terminate()
        until(lambda: home.health() != 200)
        other = gateway.post("/generate", **body([5, 6, 7], 3))
        assert other.json()["meta_info"]["completion_tokens"] == 3
        chunks += stream
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "length"
    assert home.wait() == 0


# ---- co-launch ----


def test_co_launched_replicas_share_one_port_come_back_when_killed_and_end_with_it(flags, tmp_path):
    more = ("--dp-size", "2", "--router-policy", "cache_aware", "--device", "cpu")
    with serving(tmp_path, "router.launch_server", *flags, *more) as gateway:
        gateway.until_healthy(2)
        until(lambda: gateway.http.get("/metrics").text.count("router_kv_pages{") == 2)
        cached = []
        for end in range(3):
            answer = gateway.post(
                "/generate", text=QUESTION * 2 + str(end), sampling_params={"max_new_tokens": 2}
            )
            cached.append(answer.json()["meta_info"]["cached_tokens"])
        assert cached[0] == 0 < min(cached[1:])
        launcher = psutil.Process(gateway.process.pid)
        with Load(gateway.url, right_answers(gateway.http), clients=1) as load:
            load.more(20)
            launcher.children()[0].kill()
            gateway.until_healthy(1)
            gateway.until_healthy(2)  # it was started again
            load.more(20)
        children = launcher.children(recursive=True)
        assert len(children) == 4  # two servers, two engines
        assert gateway.end() == 0
        assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]


def test_ranks_inside_one_engine_are_routed_to_by_what_each_holds(flags, tmp_path):
    more = ("--dp-size", "2", "--tp", "2", "--enable-dp-attention", "--router-policy", "cache_aware")
    with serving(tmp_path, "router.launch_server", *flags, *more, "--device", "cpu") as gateway:
        gateway.until_healthy(2)
        until(lambda: "router_kv_pages{" in gateway.http.get("/metrics").text)
        for start in "abcd":
            ranks, cached = set(), []
            for end in range(3):
                text = start + QUESTION * 2 + str(end)
                meta = gateway.post("/generate", text=text, sampling_params={"max_new_tokens": 2}).json()[
                    "meta_info"
                ]
                ranks.add(meta["dp_rank"])
                cached.append(meta["cached_tokens"])
            assert len(ranks) == 1 and min(cached[1:]) > 100
