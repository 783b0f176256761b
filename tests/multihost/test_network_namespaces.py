"""Two hosts that share no loopback: network namespaces, joined by a virtual cable that can be pulled."""

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.asking import Golden, check_greedy, golden_rows, greedy
from tests.models.tiny import GOLDEN
from tests.multihost.instance import Client, free_port, unstarted

ADDRESSES = ("10.213.71.1", "10.213.71.2")
TINY = {"tp": 2, "max_running_requests": 4, "chunked_prefill_size": 32}


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[tuple[str, str]]:
    """(namespace, interface): the far side of the cable, and its end here. Both go with the namespace."""
    namespace = f"jaxserve-{uuid.uuid4().hex[:6]}"
    near, far = (f"{end}-{namespace[-6:]}" for end in ("near", "far"))
    try:
        ip("netns", "add", namespace)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {getattr(error, 'stderr', None) or error}")
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", namespace)
        ip("address", "add", f"{ADDRESSES[0]}/30", "dev", near)
        ip("-n", namespace, "address", "add", f"{ADDRESSES[1]}/30", "dev", far)
        ip("link", "set", near, "up")
        for interface in ("lo", far):
            ip("-n", namespace, "link", "set", interface, "up")
        yield namespace, near
    finally:
        ip("netns", "delete", namespace)


def machine(rank: int) -> tuple[str, ...]:
    """A host name of its own: Gloo listens on the address that it stands for, as a cluster's name does."""
    return ("unshare", "--uts", "sh", "-c", f'hostname {ADDRESSES[rank]} && exec "$@"', "sh")


def test_hosts_on_other_networks_answer_alike_and_end_when_the_cable_is_pulled(
    tmp_path: Path, compile_cache: str, cable
):
    namespace, interface = cable
    golden = Golden.read("llama")
    options = {**TINY, "compile_cache_dir": compile_cache, "dist_init_addr": f"{ADDRESSES[0]}:{free_port(2)}"}
    with unstarted(tmp_path, GOLDEN / "llama", 2, **options) as made:
        made.start(0, through=machine(0))
        made.start(1, through=("ip", "netns", "exec", namespace, *machine(1)))
        made.wait_ready()
        check_greedy(golden, made.ask(golden_rows(golden)))

        waiting = Client(made, greedy([5, 6, 7], 400))
        made.processes()
        ip("link", "set", interface, "down")
        assert made.wait_ended() == [1, 1]
        waiting.join()
        assert waiting.error is not None and f"host 1 ({ADDRESSES[1]}) gave no sign of life" in waiting.error
        assert f"host 0 ({ADDRESSES[0]}" in made.log(1) and "gave no sign of life" in made.log(1)
