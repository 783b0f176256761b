"""Step times from first principles: bytes over bandwidth, operations over rate, collectives over links.

Pure arithmetic on numbers: no model, no mesh, no devices. Every rate that is not a data sheet's is a
field of `Assumptions`, which says where it comes from. Times are floors: nothing here counts kernel
launches, padding rows, host time or unevenly loaded experts.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator as its data sheet has it: memory as CUDA reports it, dense rates, links one way."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes/s of its memory
    bf16_flops: float  # per second
    fp8_flops: float  # per second; bfloat16's where products of float8 are not faster
    link: float  # bytes/s to the other devices of its node
    network: float  # bytes/s to other nodes: its share of the node's adapters


def _device(
    name: str, gib: float, tb_s: float, tflops: float, fp8_tflops: float, link_gb_s: float, net_gb_s: float
) -> Device:
    rates = tflops * 1e12, fp8_tflops * 1e12
    return Device(name, int(gib * GIB), tb_s * 1e12, *rates, link_gb_s * 1e9, net_gb_s * 1e9)


DEVICES = {
    device.name: device
    for device in (
        _device("a100", 79.1, 2.04, 312, 312, 300, 25),
        _device("h100", 79.1, 3.35, 989, 1979, 450, 50),
        _device("h200", 139.8, 4.8, 989, 1979, 450, 50),
        _device("b200", 178.3, 8.0, 2250, 4500, 900, 50),
        _device("l40s", 44.4, 0.864, 362, 733, 32, 12.5),
    )
}


def find_device(name: str) -> Device:
    """Raises ConfigError that lists the known ones."""
    if name.lower() not in DEVICES:
        raise ConfigError(
            f"gpu={name!r} is unknown; use one of {', '.join(DEVICES)}, the nearest with device_memory_gb"
        )
    return DEVICES[name.lower()]


def _assume(value: float, why: str) -> Any:
    return field(default=value, metadata={"why": why})


@dataclass(frozen=True)
class Assumptions:
    """What part of a data sheet's rate is reached, and what collectives cost beyond their bytes."""

    bandwidth_fraction: float = _assume(
        0.896, "of memory bandwidth; measured on H100: 3.0 of 3.35 TB/s is what its best kernels read"
    )
    gemm_fraction: float = _assume(
        0.66, "of bf16 FLOP/s; measured on H100: 650 of 989 TFLOP/s in a 32-layer stack of 2,048 rows"
    )
    fp8_gemm_fraction: float = _assume(
        0.51, "of fp8 FLOP/s; measured on H100: 1,010 of 1,979 TFLOP/s in that stack, scales included"
    )
    prefill_attention_fraction: float = _assume(
        0.4, "of bf16 FLOP/s; measured on H200: 397 TFLOP/s, own kernel for Hopper at 4,096 tokens"
    )
    latent_attention_fraction: float = _assume(
        0.15, "of bf16 FLOP/s; measured on H100: 150 TFLOP/s, own absorbed MLA kernel with 128 heads"
    )
    link_fraction: float = _assume(0.75, "of a node's links; assumed, not measured here")
    network_fraction: float = _assume(0.8, "of the network between nodes; assumed, not measured here")
    link_latency_s: float = _assume(
        30e-6,
        "a collective inside a node, beyond its bytes; measured on 2 H200, waiting for the other included",
    )
    exchange_latency_s: float = _assume(
        8e-6, "the same where GPUs exchange by a kernel of ours; measured on 4 H200, sums of 64 kB to 2 MB"
    )
    network_latency_s: float = _assume(30e-6, "a collective between nodes, beyond its bytes; assumed")

    def lines(self) -> list[str]:
        width = max(len(f.name) for f in dataclasses.fields(self))
        return [
            f"{f.name:<{width}}  {getattr(self, f.name):<6g}  {f.metadata['why']}"
            for f in dataclasses.fields(self)
        ]

    def changed(self, settings: Sequence[str]) -> "Assumptions":
        """With `name=value` settings. Raises ConfigError for an unknown name or a bad value."""
        known = [f.name for f in dataclasses.fields(self)]
        values = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in known:
                raise ConfigError(f"assume={setting!r}: unknown; use one of {', '.join(known)}")
            try:
                values[name] = float(value)
            except ValueError:
                values[name] = math.nan
            if not values[name] >= 0 or (values[name] == 0 and name.endswith("fraction")):
                raise ConfigError(f"assume={setting!r}: the value must be a positive number")
        return dataclasses.replace(self, **values)


# ---- a step on one device ----


@dataclass(frozen=True)
class Work:
    """One kind of kernel of a step, on one device: it takes as long as its bytes or its operations."""

    name: str
    num_bytes: float
    flops: float
    kind: Literal["gemm", "fp8_gemm", "prefill_attention", "latent_attention"] = "gemm"

    def seconds(self, device: Device, assumed: Assumptions) -> float:
        peak = device.fp8_flops if self.kind == "fp8_gemm" else device.bf16_flops
        rate = peak * getattr(assumed, f"{self.kind}_fraction")
        return max(self.num_bytes / (device.bandwidth * assumed.bandwidth_fraction), self.flops / rate)


CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute"]


@dataclass(frozen=True)
class Collective:
    """`count` equal collectives of a step, over `size` devices that lie `stride` apart.

    `payload` is in bytes, of one call: the reduced array for `all_reduce`, the whole array (all
    devices' parts) for `all_gather` and `reduce_scatter`, what one device hands in for `all_to_all`
    and `permute`. `by_kernel`: that of `jaxserve.ops.peer_exchange`, and not XLA's.
    """

    name: str
    kind: CollectiveKind
    count: int
    size: int
    stride: int
    payload: float
    by_kernel: bool = False

    @property
    def bytes_sent(self) -> float:
        """By one device in one call, ring algorithms assumed."""
        if self.kind == "permute":
            return self.payload
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * (self.size - 1) / self.size * self.payload

    def num_nodes(self, devices_per_node: int) -> int:
        return max(1, -(-self.size * self.stride // devices_per_node))

    def bytes_off_node(self, devices_per_node: int) -> float:
        """Through one device's share of the network in one call."""
        nodes = self.num_nodes(devices_per_node)
        leaves = (nodes - 1) / nodes * self.payload
        if self.kind == "all_to_all":
            return leaves
        # What enters a node is passed on inside it, so its devices share the network's work.
        return leaves * (2 if self.kind == "all_reduce" else 1) / (self.size / nodes)

    def seconds(self, device: Device, assumed: Assumptions, devices_per_node: int) -> float:
        on_links = self.bytes_sent / (device.link * assumed.link_fraction)
        if self.num_nodes(devices_per_node) == 1:
            latency_s = assumed.exchange_latency_s if self.by_kernel else assumed.link_latency_s
            return self.count * (on_links + latency_s)
        on_network = self.bytes_off_node(devices_per_node) / (device.network * assumed.network_fraction)
        return self.count * (max(on_links, on_network) + assumed.network_latency_s)


@dataclass(frozen=True)
class Step:
    """What one device does in one step. Works and collectives follow each other, nothing overlaps."""

    works: tuple[Work, ...]
    collectives: tuple[Collective, ...]

    @property
    def num_bytes(self) -> float:
        return sum(work.num_bytes for work in self.works)

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.works)

    @property
    def collective_bytes(self) -> float:
        """Sent by one device."""
        return sum(c.count * c.bytes_sent for c in self.collectives)

    def compute_s(self, device: Device, assumed: Assumptions) -> float:
        return sum(work.seconds(device, assumed) for work in self.works)

    def collective_s(self, device: Device, assumed: Assumptions, devices_per_node: int) -> float:
        return sum(c.seconds(device, assumed, devices_per_node) for c in self.collectives)

    def seconds(self, device: Device, assumed: Assumptions, devices_per_node: int) -> float:
        return self.compute_s(device, assumed) + self.collective_s(device, assumed, devices_per_node)


def destinations_reached(num_choices: int, num_destinations: int) -> float:
    """The share of devices that a token with evenly spread choices goes to: each gets it once at most.

    A de-duplicated all-to-all moves this part of what an all-gather would.
    """
    return 1 - (1 - 1 / num_destinations) ** num_choices


def experts_touched(num_experts: int, num_choices: int, num_tokens: float) -> float:
    """The share of experts that any of `num_tokens` tokens chooses, choices evenly spread."""
    return 1 - (1 - num_choices / num_experts) ** num_tokens
