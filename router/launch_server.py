"""Co-launch: `python -m router.launch_server <engine flags> --dp-size N --router-policy cache_aware ...`.

Starts the engine replicas of one host and the gateway in front of them. Without --enable-dp-attention
that is N replicas of --tp devices each; with it, one instance of --tp devices that has N data-parallel
ranks inside, each of which is routed to by itself. Flags that are not named here go to the engines.
"""

import argparse
import asyncio
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.config import ConfigError, RouterConfig, add_flags, by_name, read_yaml, refuse_flags
from router.launch_router import loop_factory, make_server, set_up_logging, start_metrics_server
from router.listen import check_address
from router.replicas import Replicas, ReplicasFailed, ReplicaSpec, free_ports

log = logging.getLogger("router")

PROGRESS_S = 5.0
PREFIX = "router-"
# Keys of the engine that decide how many replicas there are and where; also read from its --config.
SHARED = {
    "tp": ("tp", "tp_size", "tensor_parallel_size"),
    "dp_size": ("dp_size", "dp", "data_parallel_size"),
    "base_gpu_id": ("base_gpu_id",),
    "nnodes": ("nnodes",),
}


@dataclass(frozen=True)
class Plan:
    """What will be started."""

    config: RouterConfig
    replicas: tuple[ReplicaSpec, ...]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    try:
        plan = make_plan(parser, argv)
    except (ConfigError, ReplicasFailed) as error:
        parser.error(str(error))
    set_up_logging(plan.config)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            return runner.run(run(plan))
        except ConfigError as error:
            log.error("%s", error)
            return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m router.launch_server",
        allow_abbrev=False,
        description="Starts engine replicas and the gateway in front of them. Other flags go to the engines.",
    )
    for name, spellings in SHARED.items():
        flags = [f"--{s.replace('_', '-')}" for s in spellings]
        parser.add_argument(*flags, dest=name, type=int, default=None)
    parser.add_argument("--enable-dp-attention", action="store_true", default=None)
    parser.add_argument("--host", default=None, help="address of the gateway (default 0.0.0.0)")
    parser.add_argument("--port", type=int, default=None, help="port of the gateway (default 30000)")
    parser.add_argument("--config", default=None, help="the engines' YAML file")
    parser.add_argument("--api-key", default=None, help="key of the engines, and of the gateway's clients")
    parser.add_argument(
        "--engine-module", default="jaxserve.launch_server", help="module that starts one engine"
    )
    parser.add_argument("--router-dp-worker-base-port", type=int, default=31000, help="first engine port")
    parser.add_argument("--router-config", default=None, help="the gateway's YAML file")
    add_flags(parser, RouterConfig, PREFIX)
    refuse_flags(parser, PREFIX)
    return parser


def make_plan(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Plan:
    """Raises ConfigError for what cannot be started, ReplicasFailed without free ports."""
    given, engine_flags = parser.parse_known_args(argv)
    for flag in engine_flags:
        if flag.startswith(f"--{PREFIX}"):
            raise ConfigError(f"{flag} is no flag of the gateway; --help lists them")
    shared = _shared_values(given)
    tp, dp_size = shared.get("tp") or 1, shared.get("dp_size") or 1
    for name, value in (("tp", tp), ("dp_size", dp_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} is too small; 1 is the least")
    inside = bool(shared.get("enable_dp_attention")) and dp_size > 1
    count = 1 if inside else dp_size
    if (shared.get("nnodes") or 1) > 1:
        raise ConfigError(
            f"nnodes={shared['nnodes']}: the co-launcher starts replicas of this host; start each "
            "multi-host instance with the engine's launcher and a gateway with router.launch_router"
        )
    ports = free_ports(count, given.router_dp_worker_base_port)
    first_gpu = shared.get("base_gpu_id") or 0
    replicas = []
    for i, port in enumerate(ports):
        flags = [*engine_flags, "--host", "127.0.0.1", "--port", str(port), "--tp", str(tp)]
        flags += ["--base-gpu-id", str(first_gpu + i * tp), "--dp-size", str(dp_size if inside else 1)]
        if inside:
            flags.append("--enable-dp-attention")
        if given.config:
            flags += ["--config", given.config]
        if given.api_key:
            flags += ["--api-key", given.api_key]
        name = "engine" if count == 1 else f"replica {i}"
        replicas.append(ReplicaSpec(name, (sys.executable, "-m", given.engine_module, *flags), port))
    return Plan(_router_config(given, shared, replicas, inside), tuple(replicas))


def _shared_values(given: argparse.Namespace) -> dict[str, Any]:
    """The engine's keys that are read here: flags over its YAML file."""
    values: dict[str, Any] = {}
    if given.config:
        spelled = {s: name for name, spellings in SHARED.items() for s in spellings}
        spelled.update({n: n for n in ("enable_dp_attention", "host", "port", "api_key")})
        for key, value in read_yaml(given.config).items():
            name = spelled.get(str(key).replace("-", "_"))
            if name is not None:
                values[name] = value
    for name in (*SHARED, "enable_dp_attention", "host", "port", "api_key"):
        if getattr(given, name) is not None:
            values[name] = getattr(given, name)
    return values


def _router_config(
    given: argparse.Namespace, shared: dict[str, Any], replicas: list[ReplicaSpec], inside: bool
) -> RouterConfig:
    """--router-host and so on over --host, over the gateway's YAML file, over that of the engines."""
    names = ("host", "port", "api_key")
    values = {name: shared[name] for name in names if shared.get(name) is not None}
    if given.router_config:
        values.update(by_name(RouterConfig, read_yaml(given.router_config)))
    values.update({name: getattr(given, name) for name in names if getattr(given, name) is not None})
    for field in dataclasses.fields(RouterConfig):
        value = getattr(given, "router_" + field.name)
        if value is not None:
            values[field.name] = value
    values["worker_urls"] = [*(values.get("worker_urls") or ()), *(r.url for r in replicas)]
    values["worker_api_key"] = shared.get("api_key") or values.get("worker_api_key")
    if inside:
        values["dp_aware"] = True
    return RouterConfig.from_keywords(**values)


async def run(plan: Plan) -> int:
    """Serve until told to stop; 1 when the replicas cannot be started. Raises ConfigError before that."""
    config = plan.config
    server = make_server(config)
    gateway = server.gateway
    served: set[str] = set()

    def is_ready(spec: ReplicaSpec) -> bool:
        ranks = gateway.registry.of_process(spec.url)
        if any(w.status in ("ready", "unhealthy") for w in ranks):
            served.add(spec.url)
        return spec.url in served

    replicas = Replicas(plan.replicas, is_ready, config.shutdown_grace_period_secs)
    metrics_server = None
    if config.prometheus_port is not None:
        metrics_server = await start_metrics_server(
            gateway.metrics_text, config.prometheus_host, config.prometheus_port
        )
    check_address("host", config.host, "port", config.port)
    serving = asyncio.create_task(server.serve())
    replicas.start()
    progress = asyncio.create_task(_tell_progress(plan, is_ready))
    code = 0
    try:
        await asyncio.wait((serving, replicas.failed), return_when=asyncio.FIRST_COMPLETED)
        if replicas.failed.done():
            log.error("%s", replicas.failed.exception())
            server.stop()
            code = 1
        await serving
    finally:
        progress.cancel()
        await replicas.end()
        if metrics_server is not None:
            metrics_server.close()
    return code


async def _tell_progress(plan: Plan, is_ready) -> None:
    started_s = time.monotonic()
    last = -1
    while True:
        ready = sum(is_ready(spec) for spec in plan.replicas)
        total, waited_s = len(plan.replicas), time.monotonic() - started_s
        if ready == total:
            host = "127.0.0.1" if plan.config.host == "0.0.0.0" else plan.config.host
            log.info("all %d ready after %.0f s: http://%s:%d", total, waited_s, host, plan.config.port)
            return
        if ready != last or waited_s % PROGRESS_S < 0.5:
            log.info("%d of %d ready after %.0f s", ready, total, waited_s)
            last = ready
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
