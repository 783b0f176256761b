"""Every gateway command of the data-parallelism guide, names changed: launched, asked, or dry-run."""

import json
import re
import shlex
from contextlib import contextmanager

import httpx
import pytest
from test_router_launch import launch, listening, plan_of, wait_for
from test_router_processes import workers

MODEL = "--model-path meta-llama/Meta-Llama-3.1-70B-Instruct"
# (command, replicas, devices of each, ranks inside each, policy)
CO_LAUNCHED = [
    (f"{MODEL} --tp 4 --dp-size 2 --host 0.0.0.0 --port 30000", 2, 4, 1, "round_robin"),
    (f"{MODEL} --tp 4 --dp-size 2", 2, 4, 1, "round_robin"),
    (
        f"{MODEL} --tp 4 --dp-size 4 --router-policy cache_aware --router-health-check-interval-secs 30 "
        "--router-prometheus-port 10001 --host 0.0.0.0 --port 30000",
        4, 4, 1, "cache_aware",
    ),
    (
        "--model-path deepseek-ai/DeepSeek-V3 --tp 8 --dp-size 8 --ep 8 --enable-dp-attention "
        "--moe-a2a-backend deepep --router-policy cache_aware --router-health-check-interval-secs 30 "
        "--router-prometheus-port 10001 --enable-two-batch-overlap --enable-eplb",
        1, 8, 8, "cache_aware",
    ),
]  # fmt: skip
# What follows the --worker-urls of each `launch_router` command, by the policy that then runs.
LAUNCHED = [
    ("--policy cache_aware", "cache_aware"),
    (
        "--policy cache_aware --cache-threshold 0.5 --balance-abs-threshold 32 --balance-rel-threshold 1.5 "
        "--eviction-interval-secs 120 --max-tree-size 67108864",
        "cache_aware_threshold",
    ),
    (
        "--policy cache_aware --cache-threshold 0.3 --balance-abs-threshold 64 --eviction-interval-secs 60",
        "cache_aware_threshold",
    ),
]
CURL_ADD = """curl -X POST http://localhost:30000/workers \\
  -H "Content-Type: application/json" \\
  -d '{"url": "http://worker1:8000"}'"""
CURL_LOOKS = ["curl http://localhost:30000/workers", "curl http://localhost:30000/get_loads"]


@pytest.mark.parametrize(("command", "count", "tp", "ranks", "policy"), CO_LAUNCHED)
def test_co_launch_command_plans_its_replicas(command, count, tp, ranks, policy):
    plan = plan_of(command)
    assert len(plan.replicas) == count and plan.config.policy == policy
    for i, replica in enumerate(plan.replicas):
        words = replica.command
        assert words[words.index("--tp") + 1] == str(tp)
        assert words[words.index("--base-gpu-id") + 1] == str(i * tp)
        assert words[words.index("--dp-size") + 1] == str(ranks)
        assert not any(w.startswith("--router-") for w in words)
    assert plan.config.dp_aware == (ranks > 1)
    if "prometheus" in command:
        assert (plan.config.prometheus_port, plan.config.health_check_interval_secs) == (10001, 30)
    for flag in ("--ep", "--moe-a2a-backend", "--enable-two-batch-overlap", "--enable-eplb"):
        assert (flag in command.split()) == (flag in plan.replicas[0].command)


@contextmanager
def gateway(*flags: str):
    process = launch("router.launch_router", *flags, "--host", "127.0.0.1", "--port", "0")
    try:
        yield listening(process)
    finally:
        process.kill()
        process.wait()


def curl(command: str, port: int, worker: str = "") -> httpx.Response:
    """Do what a curl command says, at this gateway and about this worker."""
    command = command.replace("localhost:30000", f"127.0.0.1:{port}")
    words = iter(shlex.split(re.sub(r"http://worker\d:8000", worker, command).replace("\\\n", " "))[1:])
    method, headers, body, url = "GET", {}, None, ""
    for word in words:
        if word == "-X":
            method = next(words)
        elif word == "-H":
            name, _, value = next(words).partition(": ")
            headers[name] = value
        elif word == "-d":
            body = next(words)
        else:
            url = word
    return httpx.request(method, url, headers=headers, content=body)


def generate(port: int, text: str) -> dict:
    body = {"text": text, "sampling_params": {"max_new_tokens": 2}}
    response = httpx.post(f"http://127.0.0.1:{port}/generate", json=body)
    assert response.status_code == 200
    return response.json()["meta_info"]


@pytest.mark.parametrize(("flags", "policy"), LAUNCHED)
def test_launch_command_routes_by_cache(flags, policy):
    with (
        workers(2, "--cache-blocks", "4096") as urls,
        gateway("--worker-urls", *urls, *flags.split()) as port,
    ):
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/readiness").json()["healthy_workers"] == 2)
        cached = [generate(port, "shared prefix " * 100 + str(i))["cached_tokens"] for i in range(6)]
        assert cached[0] == 0 and min(cached[1:]) > 300
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert re.search(rf'smg_worker_selection_total{{[^}}]*policy="{policy}"}} 6\n', metrics)
        for name in (
            "smg_router_requests_total{",
            'smg_worker_requests_active{worker="',
            "sglang_cache_hit_rate{source=",
        ):
            assert name in metrics
        looked = [curl(command, port) for command in CURL_LOOKS]
        assert [r.status_code for r in looked] == [200, 200]
        assert {w["url"] for w in looked[0].json()["workers"]} == set(urls)
        assert {entry["worker"] for entry in looked[1].json()["loads"]} == set(urls)


def test_workers_registered_by_the_curl_commands_serve():
    with workers(2) as urls, gateway("--policy", "cache_aware") as port:
        answers = [curl(CURL_ADD, port, url) for url in urls]
        assert [a.status_code for a in answers] == [202, 202]
        assert all(json.loads(a.content)["status"] == "accepted" for a in answers)
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/readiness").json()["healthy_workers"] == 2)
        assert generate(port, "hello")["prompt_tokens"] == 1
