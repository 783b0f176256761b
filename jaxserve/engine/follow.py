"""How several hosts run one engine: joining jax, plans on the wire, and a follower's loop."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine import plan_stream
from jaxserve.engine.launches import Launch
from jaxserve.engine.multihost import Follower, Hosts, Leader, split_address
from jaxserve.engine.plan_stream import Program
from jaxserve.engine.runner import Progress, Runner

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 * 2**20  # of a compiled program in one message, which has a quarter of the largest then
MAX_IN_FLIGHT = 2  # steps; with more than 32 unfinished programs Gloo hangs


def join_jax(config: ServerConfig) -> None:
    """Make the hosts' devices one set, once they have met; before any backend exists.

    Raises ConfigError when this host has not its share of them.
    """
    assert config.dist_init_addr is not None
    host, port = split_address(config.dist_init_addr)
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        config.nnodes,
        config.node_rank,
        cluster_detection_method="deactivate",
        initialization_timeout=int(config.dist_timeout),
    )
    if jax.local_device_count() != config.local_devices:
        raise ConfigError(
            f"host {config.node_rank} has {jax.local_device_count()} devices; tp={config.tp} over "
            f"nnodes={config.nnodes} needs {config.local_devices} on each"
        )


def model_facts(hf_config: dict[str, Any], tensors: Any) -> dict[str, str]:
    """What of a model and the devices must be the same on every host."""
    facts = {f"config.json:{name}": _short(value) for name, value in hf_config.items()}
    facts["checkpoint tensors"] = _short(sorted((t.name, list(t.shape), str(t.dtype)) for t in tensors))
    facts["device kinds"] = ", ".join(sorted({d.device_kind for d in jax.local_devices()}))
    return facts


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 80 else f"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}"


def compile_alike(runner: Runner, hosts: Hosts, facts: str, progress: Progress) -> None:
    """Compile on host 0, and take its programs on the other hosts; on CPU, each host for itself.

    What GPU hosts tune each for itself may differ in the last bits, and so in the tokens that they take
    for the same. jax besides writes the cache on host 0 alone; a follower would compile at every start.
    On CPU nothing is tuned, and jax names a program differently on every host (jaxlib 0.11.2).
    """
    if jax.default_backend() == "cpu":
        return runner.compile_all(progress)
    directory = Path(jax.config.jax_compilation_cache_dir, xxhash.xxh3_64_hexdigest(facts.encode()))
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    compilation_cache.reset_cache()
    if isinstance(hosts, Leader):
        runner.compile_all(progress)
        hosts.share(piece for path in directory.glob("*-cache") for piece in pieces_of(path))
        hosts.agree("compiled", {})
        return
    hosts.agree("compiled", {})
    while not hosts.shared.empty():
        keep(directory, hosts.shared.get())
    taken = _count_taken()
    runner.compile_all(progress)
    if missed := len(runner.program_keys) - len(taken):
        logger.warning("%d programs were compiled here and not taken from host 0", missed)


def pieces_of(path: Path) -> Iterator[Program]:
    """A program's file, cut so that each piece fits a message."""
    content = path.read_bytes()
    for begin in range(0, len(content), PIECE_BYTES):
        piece = content[begin : begin + PIECE_BYTES]
        yield Program(path.name, piece, begin, len(content) - begin - len(piece))


def keep(directory: Path, piece: Program) -> None:
    """Add the next piece of a program; with the last one its file has its name."""
    path = directory / Path(piece.file).name
    part = path.with_suffix(f".{os.getpid()}")  # hosts on one machine may share the directory
    with part.open("ab" if piece.begin else "wb") as file:
        file.write(piece.content)
    if not piece.left:
        part.replace(path)


def _count_taken() -> list[str]:
    """Grows by one for each program that is read from the cache from now on."""
    taken: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            taken.append(event)

    jax.monitoring.register_event_listener(listen)
    return taken


def announce_to(leader: Leader, runner: Runner) -> None:
    """From now on every launch on host 0 goes to the followers first."""
    numbers = {key: number for number, key in enumerate(runner.program_keys)}

    def announce(launches: list[Launch]) -> None:
        leader.send([plan_stream.Launch(numbers[x.program], x.packed.tobytes()) for x in launches])

    runner.announce = announce


def follow(follower: Follower, runner: Runner) -> None:
    """Launch what host 0 launches, until it ends. Results are never read here."""
    in_flight: deque[jax.Array | None] = deque()
    for launches in follower.plans():
        made = runner.carry_out([_decode(runner, x) for x in launches])
        in_flight.append(made.last)
        if len(in_flight) == MAX_IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
    jax.block_until_ready(list(in_flight))


def _decode(runner: Runner, launch: plan_stream.Launch) -> Launch:
    packed = np.frombuffer(launch.packed, np.int32).reshape(runner.sizes.num_ranks, -1)
    return Launch(runner.program_keys[launch.program], packed)
