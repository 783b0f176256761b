"""One host in trouble ends every process within ENDED_S seconds, and all say which host it was."""

import json
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from tests.engine.asking import greedy
from tests.models.tiny import GOLDEN
from tests.multihost.instance import Client, free_port, instance, unstarted

TINY = {"tp": 2, "max_running_requests": 1, "chunked_prefill_size": 16}
ENDLESS = greedy([5, 6, 7], 400)


@pytest.mark.parametrize(
    "part, number, reason",
    [
        ("engine", signal.SIGKILL, "host 1 (127.0.0.1)"),
        ("engine", signal.SIGSTOP, "host 1 (127.0.0.1) gave no sign of life"),
        ("launcher", signal.SIGKILL, "host 1: its launcher died"),
        ("launcher", signal.SIGSTOP, "host 1: its launcher was frozen"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
def test_follower_in_trouble_ends_all_by_name(tmp_path: Path, compile_cache: str, part, number, reason):
    with instance(tmp_path, GOLDEN / "llama", 2, compile_cache_dir=compile_cache, **TINY) as made:
        waiting = Client(made, ENDLESS)
        made.processes()
        (made.engine(1) if part == "engine" else made.launchers[1]).send_signal(number)
        statuses = made.wait_ended()
        waiting.join()
        assert reason in made.log(0)
        if (part, number) == ("launcher", signal.SIGSTOP):
            assert len(waiting.tokens) == 400  # its engine went on until then
        else:
            assert waiting.error is not None and reason in waiting.error
        assert statuses[0] == 1
        assert statuses[1] == (1 if part == "engine" else -signal.SIGKILL)
        if (part, number) == ("engine", signal.SIGSTOP):
            assert "the engine was frozen" in made.log(1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_host_0_in_trouble_ends_every_follower_by_name(tmp_path: Path, compile_cache: str, number):
    layout = {**TINY, "tp": 3, "dp_size": 3, "enable_dp_attention": True}
    with instance(tmp_path, GOLDEN / "llama", 3, compile_cache_dir=compile_cache, **layout) as made:
        waiting = Client(made, ENDLESS)
        made.processes()
        made.engine(0).send_signal(number)
        assert made.wait_ended() == [1, 1, 1]
        waiting.join()
        assert waiting.error is not None
        for rank in (1, 2):
            assert "jaxserve: host 0 (127.0.0.1" in made.log(rank)


def test_host_0_without_its_launcher_ends_every_follower_by_name(tmp_path: Path, compile_cache: str):
    with instance(tmp_path, GOLDEN / "llama", 2, compile_cache_dir=compile_cache, **TINY) as made:
        waiting = Client(made, ENDLESS)
        made.processes()
        made.launchers[0].send_signal(signal.SIGKILL)
        assert made.wait_ended() == [-signal.SIGKILL, 1]
        waiting.join()
        assert waiting.error is not None
        assert "host 0: its launcher died" in made.log(1)


def test_follower_told_to_stop_lets_requests_finish_and_ends_all(tmp_path: Path, compile_cache: str):
    health = free_port()
    options = {**TINY, "compile_cache_dir": compile_cache, "follower_health_port": health}
    with instance(tmp_path, GOLDEN / "llama", 2, **options) as made:
        assert httpx.get(f"http://127.0.0.1:{health}/health").text == "OK"
        assert httpx.get(f"http://127.0.0.1:{health}/generate").status_code == 404
        running = Client(made, greedy([5, 6, 7], 100))
        made.launchers[1].send_signal(signal.SIGTERM)
        assert made.wait_ended() == [0, 0]
        running.join()
        assert (len(running.tokens), running.error) == (100, None)
        assert "host 1 was told to stop" in made.log(0)


def test_another_configuration_on_a_follower_is_refused_by_key_on_every_host(tmp_path: Path):
    with unstarted(tmp_path, GOLDEN / "llama", 2, **TINY) as made:
        made.start(0)
        made.start(1, {"page_size": 32})
        assert made.wait_ended(60) == [2, 2]
        for rank in (0, 1):
            assert "host 1 has page_size=32, host 0 has page_size=16" in made.log(rank)


def test_another_model_on_a_follower_is_refused_before_weights_are_read(tmp_path: Path):
    other = shutil.copytree(GOLDEN / "llama", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    with unstarted(tmp_path, GOLDEN / "llama", 2, **TINY) as made:
        made.start(0)
        made.start(1, {"model_path": other})
        assert made.wait_ended(60) == [2, 2]
        for rank in (0, 1):
            assert "host 1 has config.json:rope_theta=7.0, host 0 has" in made.log(rank)
            assert "loading weights" not in made.log(rank)


def test_host_that_never_comes_is_named_within_the_timeout(tmp_path: Path):
    with unstarted(tmp_path, GOLDEN / "llama", 3, **{**TINY, "tp": 3, "dist_timeout": 4}) as made:
        made.start(0)
        made.start(1)
        assert made.wait_ended(30) == [2, 2]
        for rank in (0, 1):
            assert "host 2 of 3 did not come" in made.log(rank)


def test_follower_alone_says_where_it_looked_for_host_0(tmp_path: Path):
    with unstarted(tmp_path, GOLDEN / "llama", 2, **{**TINY, "dist_timeout": 2}) as made:
        made.start(1)
        assert made.wait_ended(30) == [2]
        assert "host 1: host 0 does not answer at 127.0.0.1:" in made.log(1)
