"""How hosts meet, agree and miss each other, with threads for hosts and no jax."""

import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

import jaxserve
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine import multihost
from jaxserve.engine.multihost import Follower, Leader, split_address
from jaxserve.engine.plan_stream import Beat, Chain, Facts, Hello, Launch, Peer, Plan, Program, Verdict
from tests.multihost.instance import free_port


class Meeting:
    """Hosts of one instance; `ends` collects (rank, Ending) as they end."""

    def __init__(self, num_hosts: int):
        self.options: dict[str, Any] = {
            "model_path": "m",
            "nnodes": num_hosts,
            "tp": num_hosts,
            "dist_init_addr": f"127.0.0.1:{free_port(2)}",
            "dist_timeout": 5,
        }
        self.ends: queue.SimpleQueue[tuple[int, multihost.Ending]] = queue.SimpleQueue()
        self.left: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.leader = Leader(lambda ending: self.ends.put((0, ending)), self.left.put)
        self.followers = [
            Follower(rank, lambda ending, rank=rank: self.ends.put((rank, ending)))
            for rank in range(1, num_hosts)
        ]
        self.hosts = [self.leader, *self.followers]

    def config(self, rank: int, **own: Any) -> ServerConfig:
        return ServerConfig.from_keywords(**{**self.options, "node_rank": rank, **own})

    def meet(self, own: dict[int, dict[str, Any]] | None = None) -> list[Exception | None]:
        """All at once; what each raised."""
        return self.each(
            lambda host: host.meet(self.config(host.rank, **(own or {}).get(host.rank, {})), lambda *_: None)
        )

    def each(self, act: Any) -> list[Any]:
        def caught(host: Any) -> Any:
            try:
                return act(host)
            except ConfigError as error:
                return error

        with ThreadPoolExecutor() as pool:
            return list(pool.map(caught, self.hosts))

    def stranger(self) -> Peer:
        """A connection to host 0, once it listens."""
        host, port = split_address(self.options["dist_init_addr"])
        until_s = time.monotonic() + 5
        while True:
            try:
                return Peer(socket.create_connection((host, port + 1)), "host 0", 1.0)
            except OSError:
                assert time.monotonic() < until_s
                time.sleep(0.01)


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(multihost, "BEAT_S", 0.05)
    monkeypatch.setattr(multihost, "SILENCE_S", 1.0)


def test_hosts_that_agree_meet_and_follow_in_order():
    meeting = Meeting(3)
    assert meeting.meet() == [None, None, None]
    steps = [[Launch(number, b"1234")] for number in range(3)]
    got = [follower.plans() for follower in meeting.followers]
    for step in steps:
        meeting.leader.send(step)
        assert [next(plans) for plans in got] == [step, step]
    threading.Thread(target=meeting.leader.close, args=("done",)).start()
    assert [list(plans) for plans in got] == [[], []]
    for follower in meeting.followers:
        follower.close("done")
    ended = dict(meeting.ends.get(timeout=5) for _ in range(3))
    assert ended == dict.fromkeys((0, 1, 2), multihost.Ending("done", clean=True))


def test_what_a_host_may_have_its_own_is_not_compared():
    own = {1: {"port": 1, "model_path": "elsewhere", "compile_cache_dir": "/x", "log_level": "debug"}}
    assert Meeting(2).meet(own) == [None, None]


def test_every_host_is_told_who_differs_in_what():
    errors = Meeting(3).meet({2: {"page_size": 64, "dtype": "float16"}})
    want = (
        "the hosts do not agree: host 2 has dtype='float16', host 0 has dtype='auto'; "
        "host 2 has page_size=64, host 0 has page_size=16"
    )
    assert [str(error) for error in errors] == [want] * 3


def test_another_version_of_jax_is_refused(monkeypatch):
    meeting = Meeting(2)
    facts = multihost.config_facts
    monkeypatch.setattr(
        multihost, "config_facts", lambda c: facts(c) | ({"jax": "0.1"} if c.node_rank else {"jax": "0.2"})
    )
    for error in meeting.meet():
        assert "host 1 has jax=0.1, host 0 has jax=0.2" in str(error)


def test_first_that_a_host_says_is_its_hello_even_if_its_facts_take_longer_than_a_beat(monkeypatch):
    meeting, facts = Meeting(2), multihost.config_facts

    def slow_facts(config: ServerConfig) -> dict[str, str]:
        time.sleep(5 * multihost.BEAT_S)
        return facts(config)

    monkeypatch.setattr(multihost, "config_facts", slow_facts)
    config = meeting.config(1)
    host, port = split_address(meeting.options["dist_init_addr"])
    follower = threading.Thread(target=meeting.followers[0].meet, args=(config, lambda *_: None), daemon=True)
    with socket.create_server((host, port + 1)) as listener:
        follower.start()
        leader = Peer(listener.accept()[0], "host 1", 1.0)
    assert leader.receive() == Hello(1, facts(config))
    assert leader.receive() == Beat()
    leader.send(Verdict("start"))
    follower.join(5)
    assert not follower.is_alive()
    leader.close()


def test_source_tree_that_is_not_installed_has_a_version_and_missing_packages_say_so(monkeypatch):
    def not_installed(package: str) -> str:
        raise PackageNotFoundError(package)

    meeting = Meeting(2)
    monkeypatch.setattr(multihost, "version", not_installed)
    facts = multihost.config_facts(meeting.config(0))
    assert {name: facts[name] for name in ("jaxserve", "jax", "jaxlib", "flax")} == {
        "jaxserve": jaxserve.__version__,
        "jax": "missing",
        "jaxlib": "missing",
        "flax": "missing",
    }
    assert meeting.meet() == [None, None]


def test_agreement_returns_the_least_of_every_host():
    meeting = Meeting(3)
    meeting.meet()
    got = meeting.each(lambda host: host.agree("memory", {}, {"pages": 30 - 5 * host.rank}))
    assert got == [{"pages": 20}] * 3


def test_programs_that_host_0_shares_are_there_before_the_verdict():
    meeting = Meeting(3)
    meeting.meet()
    meeting.leader.share([Program("a-cache", b"1"), Program("b-cache", b"2")])
    meeting.each(lambda host: host.agree("compiled", {}))
    for follower in meeting.followers:
        assert [follower.shared.get_nowait().file for _ in range(2)] == ["a-cache", "b-cache"]
        assert follower.shared.empty()


def test_disagreement_at_a_later_stage_is_refused_everywhere():
    meeting = Meeting(2)
    meeting.meet()
    for error in meeting.each(lambda host: host.agree("model", {"device kinds": f"card {host.rank}"})):
        assert "host 1 has device kinds=card 1, host 0 has device kinds=card 0" in str(error)


def test_absent_host_is_named_to_those_who_came():
    meeting = Meeting(3)
    meeting.options["dist_timeout"] = 1
    meeting.hosts.pop()
    for error in meeting.meet():
        assert "host 2 of 3 did not come to 127.0.0.1:" in str(error)


def test_second_host_of_a_rank_is_refused():
    meeting = Meeting(3)
    meeting.hosts[2] = Follower(1, lambda ending: None)
    for error in meeting.meet():
        assert "node_rank=1 of nnodes=3 is there already (127.0.0.1)" in str(error)


def test_strangers_at_the_door_change_nothing():
    meeting = Meeting(2)
    with ThreadPoolExecutor() as pool:
        met = pool.submit(meeting.leader.meet, meeting.config(0), lambda *_: None)
        silent, wrong = meeting.stranger(), meeting.stranger()
        wrong.send(Facts("start", {}, {}))
        meeting.followers[0].meet(meeting.config(1), lambda *_: None)
        met.result(5)
    silent.close()
    assert meeting.ends.empty()


def test_silent_follower_ends_all_by_name():
    meeting = Meeting(3)
    meeting.hosts = [meeting.leader, meeting.followers[0]]
    peers = []

    def pretend() -> None:
        peers.append(meeting.stranger())
        peers[0].send(Hello(2, multihost.config_facts(meeting.config(2))))

    thread = threading.Thread(target=pretend)
    thread.start()
    assert meeting.meet() == [None, None]
    ended = dict(meeting.ends.get(timeout=10) for _ in range(2))
    reason = "host 2 (127.0.0.1) gave no sign of life for 1 s"
    assert ended == dict.fromkeys((0, 1), multihost.Ending(reason, clean=False))


def test_failure_of_one_host_reaches_all_by_name():
    meeting = Meeting(3)
    meeting.meet()
    meeting.followers[1].fail("out of memory")
    ended = dict(meeting.ends.get(timeout=10) for _ in range(3))
    assert ended == dict.fromkeys((0, 1, 2), multihost.Ending("host 2: out of memory", clean=False))


def test_wrong_plan_ends_all_by_name(monkeypatch):
    meeting = Meeting(2)
    meeting.meet()
    seal = Chain.seal
    monkeypatch.setattr(Chain, "seal", lambda *a: Plan(1, seal(*a).launches, 7))
    meeting.leader.send([Launch(0, b"")])
    assert list(meeting.followers[0].plans()) == []
    ended = dict(meeting.ends.get(timeout=10) for _ in range(2))
    assert set(ended) == {0, 1}
    for ending in ended.values():
        assert ending.reason.startswith("host 1: plan 1 has digest 0000000000000007, expected ")


def test_follower_told_to_stop_asks_host_0():
    meeting = Meeting(2)
    meeting.meet()
    meeting.followers[0].stop()
    assert meeting.left.get(timeout=5) == "host 1 was told to stop"
    assert meeting.ends.empty()


@pytest.mark.parametrize("address", ["localhost", "a:b", ":5000", "a:0", "a:65535"])
def test_address_without_host_and_port_is_refused(address):
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        split_address(address)


def test_address_may_be_a_name_or_of_either_version():
    assert split_address("node-0.pool:5000") == ("node-0.pool", 5000)
    assert split_address("[::1]:5000") == ("::1", 5000)
