"""`python -m jaxserve.check --config F`: what a server would be, without devices and without weights.

Takes the flags of `launch_server` and reads the model's config.json. The layout, the rules, the KV pool
and the step shapes come from the engine's own code, so what a server refuses is refused here in the
same words and with the same exit status; the times are floors (see `jaxserve.roofline`).
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import Blueprint, draw_on_paper, read_dummy_config
from jaxserve.mesh import layout_of
from jaxserve.replicas import replica_configs
from jaxserve.roofline import DEVICES, GIB, Assumptions, Device, Step, find_device
from jaxserve.step_cost import StepCost
from jaxserve.weights import CheckpointError, open_checkpoint
from jaxserve.weights.hub import is_hub_id
from jaxserve.weights.safetensors import read_config

DEFAULT_GPU = "h100"


@dataclass(frozen=True)
class Report:
    """A valid configuration on a device."""

    blueprint: Blueprint
    cost: StepCost
    device: Device
    assumed: Assumptions
    num_replicas: int  # of native data parallelism
    num_pages: int  # of one dp rank

    @property
    def kv_tokens(self) -> int:
        """Of one instance."""
        return self.num_pages * self.blueprint.config.page_size * self.blueprint.layout.dp

    @property
    def kv_bytes_of_device(self) -> int:
        return self.num_pages * self.blueprint.page_bytes_of_device

    @property
    def devices_per_node(self) -> int:
        return self.blueprint.config.local_devices

    def seconds(self, step: Step) -> float:
        return step.seconds(self.device, self.assumed, self.devices_per_node)


def check(config: ServerConfig, gpu: str | None = None, memory_bytes: int | None = None) -> Report:
    """Raises ConfigError or CheckpointError, as the engine would."""
    replicas = replica_configs(config)
    config = replicas[0]
    layout_of(config)
    hf_config = find_hf_config(config)
    on_cpu = config.device == "cpu"
    blueprint = draw_on_paper(config, hf_config, on_cpu)
    device = find_device(gpu or DEFAULT_GPU)
    if on_cpu:
        memory_bytes = memory_bytes or psutil.virtual_memory().total // config.local_devices
    if memory_bytes is not None:
        device = replace(device, memory_bytes=memory_bytes)
    num_pages = blueprint.num_pages(device.memory_bytes, blueprint.weight_bytes_of_device)
    return Report(blueprint, StepCost(blueprint), device, Assumptions(), len(replicas), num_pages)


def find_hf_config(config: ServerConfig) -> dict[str, Any]:
    """config.json of the model, from disk or the hub's cache; nothing is downloaded."""
    path = Path(config.model_path).expanduser()
    if config.load_format == "dummy":
        return read_dummy_config(config.model_path)[0]
    if config.load_format == "auto" and path.is_dir() and (path / "config.json").exists():
        return read_config(path)  # weights need not be there
    if path.exists() or not is_hub_id(config.model_path):  # headers are read, or it is said what is wrong
        return open_checkpoint(config.model_path, load_format=config.load_format).config
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.model_path, "config.json", revision=config.revision)
    if not isinstance(cached, str):
        raise CheckpointError(
            f"{config.model_path}: its config.json is not in the hub cache, and a check downloads nothing; "
            "download it, or give --load-format dummy and --model-path a config.json"
        )
    return read_config(Path(cached).parent)


# ---- what is printed ----


def lines(report: Report) -> Iterator[str]:
    blueprint, cost = report.blueprint, report.cost
    config, layout, model = blueprint.config, blueprint.layout, blueprint.model
    yield (
        f"model      {type(model).__name__}, {_types(blueprint)}: {_count(cost.num_params)} parameters, "
        f"{_count(cost.active_params)} multiplied with each token"
    )
    dp, ep, tp = layout.shape
    yield (
        f"layout     {_many(layout.num_devices, 'device')} on {_many(config.nnodes, 'host')}: "
        f"mesh dp {dp} x ep {ep} x tp {tp}, attention groups of {layout.group}"
    )
    if report.num_replicas > 1:
        yield (
            f"           {report.num_replicas} full replicas of it, taken in turn (dp_size without "
            "enable_dp_attention); python -m router.launch_server routes them by cached prefix"
        )
    if blueprint.two_batches:
        yield "           steps run as two halves in turn; the floors below are of whole ones"
    if blueprint.experts:
        yield (
            f"           {blueprint.experts.num_experts} experts in {blueprint.experts.num_layers} layers, "
            f"{cost.top_k} a token; dispatch: {blueprint.expert_backend}"
        )
        if config.enable_eplb:
            slots, redundant = blueprint.experts.num_slots, _size(cost.redundant_bytes_of_device)
            yield (
                f"           {slots} physical experts a layer, {slots // layout.ep} a device: "
                f"{blueprint.experts.num_redundant} redundant ones take {redundant} a device; "
                f"balanced every {config.eplb_rebalance_num_iterations} steps"
            )
    yield from _memory_lines(report)
    yield (
        f"KV         {report.kv_tokens:,} tokens ({report.num_pages:,} pages of {config.page_size} on each "
        f"of {dp} dp ranks); {cost.kv_bytes_of_token:,.0f} bytes a token and device"
    )
    yield (
        f"limits     {blueprint.max_req_len(report.num_pages):,} tokens a sequence, "
        f"{blueprint.num_slots * dp:,} running requests"
    )
    buckets = blueprint.buckets(report.num_pages)
    decode = " ".join(str(b.rows) for b in buckets if not b.chunks)
    mixed = " ".join(f"{b.num_tokens}/{b.rows}" for b in buckets if b.chunks)
    yield f"buckets    decode rows of a dp rank: {decode}; tokens with prompts / rows among them: {mixed}"
    if not blueprint.on_cpu:
        yield from _step_lines(report)


def _memory_lines(report: Report) -> Iterator[str]:
    device, cost, blueprint = report.device, report.cost, report.blueprint
    largest = max(blueprint.buckets(report.num_pages), key=lambda b: (b.num_tokens, b.rows))
    name = "this host's memory divided by devices" if blueprint.on_cpu else device.name
    states = blueprint.state_bytes_of_device
    static = cost.weight_bytes_of_device + states + report.kv_bytes_of_device
    workspace = cost.workspace_bytes(largest.num_tokens, largest.num_samples)
    left = device.memory_bytes - static
    enough = "" if workspace < left else ": TOO LITTLE, lower mem_fraction_static"
    yield f"memory     {_size(device.memory_bytes)} a device ({name}), of which"
    yield f"           {_size(cost.weight_bytes_of_device):>10} weights"
    if states:
        yield (
            f"           {_size(states):>10} recurrent states: {_size(cost.state_bytes_of_sequence)} each of "
            f"{blueprint.num_slots} running requests and {blueprint.num_checkpoints} cached prefixes"
        )
    yield (
        f"           {_size(report.kv_bytes_of_device):>10} KV (mem_fraction_static="
        f"{blueprint.mem_fraction:g} is for {'all three' if states else 'both'})"
    )
    yield f"           {_size(workspace):>10} workspace, estimated; {_size(left)} are left{enough}"


def _types(blueprint: Blueprint) -> str:
    """The model's dtype, and what is kept in another."""
    name, config = blueprint.dtype.name, blueprint.config
    weights = f" with linear weights in {config.quantization}" if config.quantization else ""
    cache = f", KV in {blueprint.kv_dtype.name}" if blueprint.kv_dtype != blueprint.dtype else ""
    return f"{name}{weights}{cache}"


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.2f} MiB"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _step_lines(report: Report) -> Iterator[str]:
    config, cost = report.blueprint.config, report.cost
    context = min(1024, report.blueprint.context_len)
    header = f"{'':25}{'floor ms':>9}{'tokens/s':>11}{'GB read':>9}{'TFLOP':>8}{'MB sent':>9}{'links ms':>9}"
    yield f"steps      one device's share, {report.device.name}; context and prompts of {context} tokens"
    yield header

    def row(name: str, step: Step, tokens: float) -> str:
        total = report.seconds(step)
        links = step.collective_s(report.device, report.assumed, report.devices_per_node)
        return (
            f"{name:<25}{total * 1e3:9.2f}{tokens / total:11,.0f}{step.num_bytes / 1e9:9.2f}"
            f"{step.flops / 1e12:8.2f}{step.collective_bytes / 1e6:9.2f}{links * 1e3:9.2f}"
        )

    dp, slots = report.blueprint.layout.dp, report.blueprint.num_slots
    for rows in sorted({n for n in (1, 8, 64) if n < slots} | {slots}):
        if rows * context <= report.num_pages * config.page_size:
            yield row(f"decode {rows} x {dp} rows", cost.decode(rows, context), rows * dp)
    chunk = report.blueprint.prefill_tokens(report.num_pages)
    prefill = cost.prefill(chunk, context)
    yield row(f"prefill {chunk} x {dp} tokens", prefill, chunk * dp)
    for c in prefill.collectives:
        yield (
            f"sends      {c.name}: {c.count} {c.kind} over {c.size} devices, "
            f"{c.bytes_sent / 1e6:.2f} MB a device each, in the prefill step"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.check",
        add_help=False,
        allow_abbrev=False,
        description="Checks a configuration without devices. Takes the flags of jaxserve.launch_server, and:",
        usage="%(prog)s [--config F] [flags of launch_server] [--gpu G] [--device-memory-gb N]",
    )
    parser.add_argument("--gpu", help=f"{', '.join(DEVICES)} (default {DEFAULT_GPU})")
    parser.add_argument("--device-memory-gb", type=float, help="memory of a device in 10^9 bytes")
    parser.add_argument("-h", "--help", action="store_true", help="this")
    own, rest = parser.parse_known_args(argv)
    if own.help:
        print(
            f"{parser.format_help()}\n{ServerConfig.parser('python -m jaxserve.launch_server').format_help()}"
        )
        return 0
    config = ServerConfig.from_command_line(rest, prog="python -m jaxserve.check")
    logging.basicConfig(level=config.log_level.upper(), format="%(message)s")
    try:
        memory_gb = own.device_memory_gb
        if memory_gb is not None and memory_gb <= 0:
            raise ConfigError(f"device_memory_gb={memory_gb:g} must be a positive number")
        report = check(config, own.gpu, None if memory_gb is None else int(memory_gb * 1e9))
    except (ConfigError, CheckpointError) as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
