"""Command one of the README, as it stands there: a real model answers a real question."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo_serves_a_real_model_that_knows_the_capital_of_japan():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--once", "--port", str(port)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert demo.returncode == 0, demo.stderr[-3000:]
    answers = [line for line in demo.stdout.splitlines() if "Tokyo" in line]
    assert len(answers) == 2, demo.stdout  # over /v1/chat/completions and over /generate
