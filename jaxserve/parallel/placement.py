"""Which device holds which expert: hot experts get copies, and devices get even load.

Pure planning on the host; `jaxserve.parallel.slots` finds and moves experts on the devices. Source:
DeepSeek-V3 technical report (2024), section 3.4.1 (redundant experts), and its published
expert-parallel load balancer, whose greedy rules (copy the expert with the most load a copy, then
pack the heaviest first) are used here in our own form.
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

    def device_load(self, load_LE: np.ndarray) -> np.ndarray:
        """Load of each device, [layers, devices], when copies of an expert take equal shares."""
        out = []
        for logical_P, load_E in zip(self.logical_LP, np.asarray(load_LE, float), strict=True):
            share_E = load_E / np.bincount(logical_P, minlength=load_E.size)
            out.append(share_E[logical_P].reshape(self.num_devices, -1).sum(1))
        return np.array(out)

    def balance(self, load_LE: np.ndarray) -> np.ndarray:
        """Mean device load over largest device load, [layers]; 1 is even."""
        load_LD = self.device_load(load_LE)
        return np.divide(load_LD.mean(1), load_LD.max(1), out=np.ones(len(load_LD)), where=load_LD.any(1))

    def table(self, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What finds the slots of an expert: (first_LE, count_LE, slot_LP), int32. Those of expert e in
        layer l are slot_LP[l, first_LE[l, e] :][: count_LE[l, e]]."""
        slot_LP = np.argsort(self.logical_LP, axis=1, kind="stable").astype(np.int32)
        counts = [np.bincount(logical_P, minlength=num_experts) for logical_P in self.logical_LP]
        count_LE = np.array(counts, np.int32)
        return np.cumsum(count_LE, axis=1, dtype=np.int32) - count_LE, count_LE, slot_LP

    def with_layer(self, layer: int, logical_P: np.ndarray) -> "Placement":
        logical_LP = self.logical_LP.copy()
        logical_LP[layer] = logical_P
        return Placement(logical_LP, self.num_devices)


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
        rebalance_layer(load_E, logical_P, before.num_devices)
        for load_E, logical_P in zip(load_LE, before.logical_LP, strict=True)
    ]
    return Placement(np.stack(layers), before.num_devices)


def rebalance_layer(load_E: np.ndarray, before_P: np.ndarray, num_devices: int) -> np.ndarray:
    """The experts of one layer's slots, as `rebalance` chooses them."""
    load_E, num_slots = np.asarray(load_E, float), before_P.size
    copies_E = copy_counts(load_E, num_slots)
    devices = pack(load_E, copies_E, num_devices, num_slots // num_devices)
    return _keep_in_place(devices, before_P.reshape(num_devices, -1)).reshape(-1)


@dataclass(frozen=True)
class Moves:
    """How experts of one layer come to other slots: in each round a device shows one of its slots to all.

    Attributes:
        offer_RD: the slot, counted within its device, that each device shows in each round. There are
            as many rounds as slots on a device; those from `num_rounds` on show nothing (-1).
        take_P: round * devices + device of what each slot takes; -1: it keeps what it has.
    """

    offer_RD: np.ndarray
    take_P: np.ndarray
    num_rounds: int

    @property
    def count(self) -> int:
        """Slots that get another expert."""
        return int((self.take_P >= 0).sum())


def plan_moves(before_P: np.ndarray, after_P: np.ndarray, num_devices: int) -> Moves:
    """What is shown already is taken again; else the slot's own device shows it, or who shows least."""
    slots = before_P.size // num_devices
    offer_RD = np.full((slots, num_devices), -1, np.int32)
    take_P = np.full(before_P.size, -1, np.int32)
    shown: dict[int, int] = {}  # expert -> round * devices + device
    num_shown = [0] * num_devices
    for slot in np.flatnonzero(before_P != after_P).tolist():
        expert = int(after_P[slot])
        if expert not in shown:
            sources = np.flatnonzero(before_P == expert).tolist()
            source = min(sources, key=lambda s: (s // slots != slot // slots, num_shown[s // slots], s))
            device = source // slots
            offer_RD[num_shown[device], device] = source % slots
            shown[expert] = num_shown[device] * num_devices + device
            num_shown[device] += 1
        take_P[slot] = shown[expert]
    return Moves(offer_RD, take_P, max(num_shown))


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
