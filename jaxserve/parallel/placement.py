"""Which device holds which expert: hot experts get copies, and devices get even load.

Pure planning on the host; moving the weights is another matter. Source: DeepSeek-V3 technical report
(2024), section 3.4.1 (redundant experts), and its published expert-parallel load balancer, whose
greedy rules (copy the expert with the most load a copy, then pack the heaviest first) are used here
in our own form.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placement:
    """The physical experts of every layer.

    Attributes:
        logical_LP: the expert that each physical slot holds, int [layers, slots]. Slots are divided
            evenly over devices in order.
        num_devices: that the slots are divided over.
    """

    logical_LP: np.ndarray
    num_devices: int

    @classmethod
    def trivial(cls, num_layers: int, num_experts: int, num_slots: int, num_devices: int) -> "Placement":
        """Experts in order, then the first ones again in the slots that are left."""
        check_sizes(num_experts, num_slots, num_devices)
        return cls(np.tile(np.arange(num_slots) % num_experts, (num_layers, 1)), num_devices)

    def copies(self, layer: int, num_experts: int) -> list[list[int]]:
        """The slots that hold each expert of a layer."""
        slots: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(self.logical_LP[layer]):
            slots[expert].append(slot)
        return slots

    def balance(self, load_LE: np.ndarray) -> np.ndarray:
        """Mean device load over largest device load, [layers]; 1 is even. A copy takes an equal share."""
        out = []
        for layer, load_E in enumerate(np.asarray(load_LE, float)):
            logical_P = self.logical_LP[layer]
            share_E = load_E / np.bincount(logical_P, minlength=load_E.size)
            device = share_E[logical_P].reshape(self.num_devices, -1).sum(1)
            out.append(device.mean() / device.max() if device.max() > 0 else 1.0)
        return np.array(out)


def check_sizes(num_experts: int, num_slots: int, num_devices: int) -> None:
    """Raises ValueError when the slots do not hold the experts or do not divide."""
    if num_slots < num_experts:
        raise ValueError(f"{num_slots} physical experts cannot hold {num_experts} experts")
    if num_slots % num_devices:
        more = -num_slots % num_devices
        raise ValueError(
            f"{num_slots} physical experts do not divide over {num_devices} devices; "
            f"use {more} redundant experts more or {num_slots % num_devices} fewer"
        )


def rebalance(load_LE: np.ndarray, before: Placement) -> Placement:
    """A placement for the observed load that moves few experts from where they are."""
    layers = [
        _rebalance_layer(np.asarray(load_E, float), logical_P, before.num_devices)
        for load_E, logical_P in zip(load_LE, before.logical_LP, strict=True)
    ]
    return Placement(np.stack(layers), before.num_devices)


def _rebalance_layer(load_E: np.ndarray, before_P: np.ndarray, num_devices: int) -> np.ndarray:
    num_slots = before_P.size
    copies_E = copy_counts(load_E, num_slots)
    devices = pack(load_E, copies_E, num_devices, num_slots // num_devices)
    return _keep_in_place(devices, before_P.reshape(num_devices, -1)).reshape(-1)


def copy_counts(load_E: np.ndarray, num_slots: int) -> np.ndarray:
    """How many copies each expert gets: one, and each further slot to the largest load a copy."""
    copies_E = np.ones(load_E.size, int)
    for _ in range(num_slots - load_E.size):
        copies_E[np.argmax(load_E / copies_E)] += 1
    return copies_E


def pack(load_E: np.ndarray, copies_E: np.ndarray, num_devices: int, slots: int) -> list[list[int]]:
    """Experts of each device: the heaviest copy first, to the lightest device that has room.

    Copies of one expert go to different devices while there are any.
    """
    order = sorted(range(load_E.size), key=lambda e: (-load_E[e] / copies_E[e], e))
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    weight = np.zeros(num_devices)
    for expert in order:
        for _ in range(copies_E[expert]):
            room = [d for d in range(num_devices) if len(devices[d]) < slots]
            chosen = min(room, key=lambda d: (expert in devices[d], weight[d], len(devices[d]), d))
            devices[chosen].append(expert)
            weight[chosen] += load_E[expert] / copies_E[expert]
    return devices


def _keep_in_place(devices: Sequence[Sequence[int]], before: np.ndarray) -> np.ndarray:
    """Give each set of experts the device that holds most of it, and leave what stays in its slot."""
    free = set(range(len(devices)))
    out = np.empty_like(before)
    overlap = sorted(
        ((_shared(wanted, before[d]), i, d) for i, wanted in enumerate(devices) for d in free),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )
    placed: set[int] = set()
    for _, i, d in overlap:
        if i in placed or d not in free:
            continue
        placed.add(i)
        free.remove(d)
        left = list(devices[i])
        stays = [expert in left and (left.remove(expert) or True) for expert in before[d].tolist()]
        out[d] = [expert if stay else left.pop() for expert, stay in zip(before[d].tolist(), stays)]
    return out


def _shared(wanted: Sequence[int], held: np.ndarray) -> int:
    left = list(wanted)
    return sum(1 for expert in held.tolist() if expert in left and (left.remove(expert) or True))
