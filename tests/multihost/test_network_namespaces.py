"""Two hosts that share no loopback: network namespaces, joined by a virtual cable that can be pulled."""

import ipaddress
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.asking import Golden, check_greedy, golden_rows, greedy
from tests.models.tiny import GOLDEN
from tests.multihost.instance import Client, free_port, unstarted

TINY = {"tp": 2, "max_running_requests": 4, "chunked_prefill_size": 32}


@dataclass(frozen=True)
class Cable:
    addresses: tuple[str, str]  # of host 0 and of host 1
    near: str  # the interface of host 0
    inside: tuple[str, ...]  # runs a command where host 1 is

    def pull(self) -> None:
        done(("ip", "link", "set", self.near, "down"))


def done(command: tuple[str, ...]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    """The far side lasts as long as a process that reads from this one: nothing is left even when this is
    killed. The network is one of RFC 2544's, any of them, so that runs side by side do not meet."""
    if missing := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
        pytest.skip(f"no network namespace can be made here: {', '.join(missing)} missing")
    command = ("unshare", "--net", "sh", "-c", "echo made && exec cat")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as far:
        if not far.stdout.readline():
            pytest.skip(f"no network namespace can be made here: {far.stderr.read()}")
        inside = ("nsenter", f"--net=/proc/{far.pid}/ns/net")
        near = f"near{far.pid}"
        first = ipaddress.ip_address("198.18.0.0") + 4 * random.randrange(2**15)
        addresses = (str(first + 1), str(first + 2))
        done(("ip", "link", "add", near, "type", "veth", "peer", "name", "far", "netns", str(far.pid)))
        done(("ip", "address", "add", f"{addresses[0]}/30", "dev", near))
        done((*inside, "ip", "address", "add", f"{addresses[1]}/30", "dev", "far"))
        done(("ip", "link", "set", near, "up"))
        for interface in ("lo", "far"):
            done((*inside, "ip", "link", "set", interface, "up"))
        yield Cable(addresses, near, inside)
        done(("ip", "link", "delete", near))  # its far side outlives the process by what is still to be sent


def machine(address: str) -> tuple[str, ...]:
    """A host name of its own: Gloo listens on the address that it stands for, as a cluster's name does."""
    return ("unshare", "--uts", "sh", "-c", f'hostname {address} && exec "$@"', "sh")


def test_hosts_on_other_networks_answer_alike_and_end_when_the_cable_is_pulled(
    tmp_path: Path, compile_cache: str, cable: Cable
):
    near, far = cable.addresses
    golden = Golden.read("llama")
    options = {**TINY, "compile_cache_dir": compile_cache, "dist_init_addr": f"{near}:{free_port(2)}"}
    with unstarted(tmp_path, GOLDEN / "llama", 2, **options) as made:
        made.start(0, through=machine(near))
        made.start(1, through=(*cable.inside, *machine(far)))
        made.wait_ready()
        check_greedy(golden, made.ask(golden_rows(golden)))

        waiting = Client(made, greedy([5, 6, 7], 400))
        made.processes()
        cable.pull()
        assert made.wait_ended() == [1, 1]
        waiting.join()
        assert waiting.error is not None and f"host 1 ({far}) gave no sign of life" in waiting.error
        assert f"host 0 ({near}" in made.log(1) and "gave no sign of life" in made.log(1)
