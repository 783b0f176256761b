"""Command one of the README, as it stands there: a real model answers a real question."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
USERS = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as theirs, this compiles


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_demo_serves_a_real_model_that_knows_the_capital_of_japan():
    demo = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--once", "--port", str(free_port())],
        cwd=ROOT,
        env=USERS,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert demo.returncode == 0, demo.stderr[-3000:]
    answers = [line for line in demo.stdout.splitlines() if "Tokyo" in line]
    assert len(answers) == 2, demo.stdout  # over /v1/chat/completions and over /generate


def test_demo_told_to_stop_leaves_no_server_behind():
    command = [sys.executable, "-m", "tools.demo", "--port", str(free_port())]
    with psutil.Popen(command, cwd=ROOT, env=USERS, stdout=subprocess.PIPE, text=True) as demo:
        seen = list(itertools.takewhile(lambda line: "The server goes on" not in line, demo.stdout))
        assert any("Tokyo" in line for line in seen)
        children = demo.children(recursive=True)
        demo.terminate()
        _, alive = psutil.wait_procs([demo, *children], timeout=60)
    assert children and not alive
