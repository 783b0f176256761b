"""How several hosts run one engine: joining jax, plans on the wire, and a follower's loop."""

import json
from collections import deque
from typing import Any

import jax
import numpy as np
import xxhash

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine import plan_stream
from jaxserve.engine.multihost import Follower, Leader, split_address
from jaxserve.engine.runner import Launch, Runner

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
