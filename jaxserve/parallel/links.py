"""Collectives of small arrays among the GPUs of one process, by a kernel in the step's own graph.

XLA's collectives are for everything else: other layouts and platforms, several hosts, long prompts. Which
one a call takes is known when it is traced, from sizes alone; both give the same sums, in another order.

A `LinkPlan` is what is fixed, `LinkArrays` what a program takes and hands on, `Links` the two of them
while a program is traced.
"""

import ctypes
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.mesh import AXES, GROUP
from jaxserve.ops import backend as kernels
from jaxserve.ops import peer_exchange
from jaxserve.ops.peer_exchange import Kind

logger = logging.getLogger(__name__)

RANKS = ("dp",)
GROUPS = (GROUP, RANKS)  # the sets of axes over which devices exchange
LARGEST = 4 * 2**20  # bytes of a sum
SPARED = 2**19  # bytes that a device has to be spared of sending before a sum is worth to be made in parts

Axes = tuple[str, ...]


class LinkArrays(NamedTuple):
    """By group: the number of the next exchange, int32, and the members' mailboxes, int32 [devices, 2].

    Both are whole on every device; a group's members are a run of devices or lie a step apart.
    """

    number: tuple[jax.Array, ...]
    mailbox: tuple[jax.Array, ...]


@dataclass(frozen=True)
class LinkPlan:
    """The groups of a mesh, and the room of a mailbox.

    Attributes:
        sizes: of the mesh, (dp, ep, tp).
    """

    sizes: tuple[int, int, int]

    @classmethod
    def on_paper(cls, sizes: tuple[int, int, int]) -> "LinkPlan | None":
        """Of GPUs in one process that reach each other's memory. None for one, and for numbers of devices
        that are no power of two."""
        is_mesh = math.prod(sizes) > 1 and not any(size & (size - 1) for size in sizes)
        return cls(sizes) if is_mesh else None

    @classmethod
    def of(cls, mesh: Mesh) -> "LinkPlan | None":
        """None where devices cannot write to each other's memory, or not by a kernel of ours."""
        devices = list(mesh.devices.flat)
        plan = cls.on_paper(tuple(mesh.shape[axis] for axis in AXES))
        if plan is None or mesh.is_multi_process or devices[0].platform not in ("gpu", "cuda"):
            return None
        if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default") not in ("default", "bfc"):
            return None  # peers reach only what cudaMalloc gave
        if not _peers_reach_each_other([device.local_hardware_id for device in devices]):
            logger.info("GPUs cannot write to each other's memory; collectives are all XLA's")
            return None
        return plan

    @property
    def groups(self) -> tuple[Axes, ...]:
        return tuple(axes for axes in GROUPS if self.size(axes) > 1)

    def size(self, axes: Axes) -> int:
        return math.prod(size for axis, size in zip(AXES, self.sizes) if axis in axes)

    def capacity(self, axes: Axes) -> int:
        """Words of one message, at most."""
        num = self.size(axes)
        return peer_exchange.words(max(LARGEST // num, _most_whole(num)) // 4, jnp.int32)

    def takes(self, num: int, dtype: DTypeLike, axes: Axes) -> bool:
        """Whether a message of `num` numbers is for this kernel."""
        return axes in self.groups and 0 < peer_exchange.words(num, dtype) <= self.capacity(axes)

    def exchanges(self, num: int, dtype: DTypeLike, axes: Axes) -> int:
        """Of a sum of `num` numbers: 1, 2 where it is made in parts, 0 where it is not for this kernel."""
        devices, num_bytes = self.size(axes), num * jnp.dtype(dtype).itemsize
        if num_bytes <= _most_whole(devices) and self.takes(num, dtype, axes):
            return 1
        in_parts = num_bytes <= LARGEST and num % devices == 0 and self.takes(num // devices, dtype, axes)
        return 2 if in_parts else 0

    def mailbox_bytes(self, axes: Axes) -> int:
        return 2 * self.size(axes) * self.capacity(axes) * peer_exchange.WORD

    def make(self, mesh: Mesh) -> tuple[LinkArrays, tuple[jax.Array, ...]]:
        """What programs take, and the mailboxes' memory, which must live as long as they do."""
        by_device, whole = NamedSharding(mesh, PartitionSpec(AXES)), NamedSharding(mesh, PartitionSpec())
        mail, addresses = [], []
        for axes in self.groups:
            shape = (mesh.size, self.mailbox_bytes(axes) // 4)
            memory = jax.jit(lambda shape=shape: jnp.zeros(shape, jnp.int32), out_shardings=by_device)()
            jax.block_until_ready(memory)
            start = {shard.device: shard.data.unsafe_buffer_pointer() for shard in memory.addressable_shards}
            address = np.array([start[device] for device in mesh.devices.flat], "<u8")
            addresses.append(jax.device_put(address.view("<i4").reshape(-1, 2), whole))
            mail.append(memory)
        numbers = tuple(jax.device_put(np.int32(1), whole) for _ in self.groups)
        return LinkArrays(numbers, tuple(addresses)), tuple(mail)


class Links:
    """A program's collectives, while it is traced.

    `sum`, `gather` and `scatter_sum` are for use inside `shard_map`, by links that have the arrays and `last`
    that it was given (of `SPECS`), and on no path that may not run. They run in the order in which they are
    traced: each exchange takes `last`, and whoever leaves the `shard_map` sets it to what came out.

    Attributes:
        last: what was made of the last exchange, [tokens, ...].
    """

    SPECS = PartitionSpec(), PartitionSpec("dp")  # of the arrays, and of `last`

    def __init__(
        self,
        plan: LinkPlan,
        arrays: LinkArrays,
        last: jax.Array | None = None,
        ahead: dict[Axes, Any] | None = None,
    ):
        """`ahead`: by group, the exchanges that come before, a number or an int32 scalar."""
        self.plan, self.arrays = plan, arrays
        self.last = jnp.zeros(plan.sizes[:1], jnp.int32) if last is None else last
        self._ahead = dict.fromkeys(plan.groups, 0) if ahead is None else ahead

    def inside(self, arrays: LinkArrays, last: jax.Array) -> "Links":
        """The same ones in a `shard_map` that was given their arrays and `last`."""
        return Links(self.plan, arrays, last, self._ahead)

    def claim(self, axes: Axes, count: int) -> jax.Array:
        """`ahead` for links of their own, which make `count` exchanges and are traced once for many."""
        ahead = jnp.int32(self._ahead[axes])
        self._ahead[axes] += count
        return ahead

    def after(self) -> LinkArrays:
        """The arrays for the program that comes next."""
        numbers = zip(self.arrays.number, self.plan.groups)
        return self.arrays._replace(number=tuple(number + self._ahead[axes] for number, axes in numbers))

    def count(self, x: jax.ShapeDtypeStruct, axes: Axes) -> int:
        """The exchanges of a sum; 0: it is not for this kernel."""
        return self.plan.exchanges(x.size, x.dtype, axes)

    def sum(self, x: jax.Array, axes: Axes) -> jax.Array | None:
        """As `lax.psum`; None where it is not for this kernel."""
        match self.count(jax.ShapeDtypeStruct(x.shape, x.dtype), axes):
            case 1:
                return self._exchange(x.reshape(1, -1), axes, "sum").reshape(x.shape)
            case 2:
                parts = x.reshape(self.plan.size(axes), -1)
                return self._exchange(parts, axes, "sum in parts").reshape(x.shape)
        return None

    def gather(self, x_tD: jax.Array, axes: Axes) -> jax.Array | None:
        """As `lax.all_gather`, tiled; None where it is not for this kernel."""
        if not self.plan.takes(x_tD.size, x_tD.dtype, axes):
            return None
        return self._exchange(x_tD.reshape(1, -1), axes, "gather").reshape(-1, *x_tD.shape[1:])

    def scatter_sum(self, x_TD: jax.Array, axes: Axes) -> jax.Array | None:
        """As `lax.psum_scatter`, tiled; None where it is not for this kernel."""
        num = self.plan.size(axes)
        if not self.plan.takes(x_TD.size // num, x_TD.dtype, axes):
            return None
        return self._exchange(x_TD.reshape(num, -1), axes, "sum").reshape(-1, *x_TD.shape[1:])

    def _exchange(self, x_PM: jax.Array, axes: Axes, kind: Kind) -> jax.Array:
        group, num = self.plan.groups.index(axes), self.plan.size(axes)
        number, ahead = self.arrays.number[group], jnp.int32(self._ahead[axes])
        self._ahead[axes] += 2 if kind == "sum in parts" else 1
        mailboxes, me = self.arrays.mailbox[group], lax.axis_index(axes)
        if kernels.chosen() != "fast":
            self.last = _exchange_by_xla(x_PM, axes, kind)
            return self.last
        if num < mailboxes.shape[0]:
            apart = 1 if axes == GROUP else self.plan.size(GROUP)
            first = lax.axis_index(RANKS) * num if axes == GROUP else lax.axis_index(GROUP)
            mailboxes = mailboxes[first + apart * jnp.arange(num)]
        capacity = self.plan.capacity(axes)
        self.last = peer_exchange.exchange(
            x_PM, number, ahead, mailboxes, me, self.last, capacity=capacity, kind=kind
        )
        return self.last


def _most_whole(num: int) -> int:
    """Bytes of the largest sum over `num` devices that each of them sends to all others as it is.

    In parts it sends twice a part to each instead, one after the other. On four H200 the two take as long
    at some 300 kB, 8.8 us; at 1 MB they are 16 and 13 us, at 2 MB 31 and 18.
    """
    return LARGEST if num <= 2 else min(LARGEST, SPARED * num // ((num - 1) * (num - 2)))


def _exchange_by_xla(x_PM: jax.Array, axes: Axes, kind: Kind) -> jax.Array:
    """`peer_exchange.exchange` in XLA's collectives."""
    parts_NM = lax.all_gather(x_PM, axes)
    mine_NM = parts_NM[:, lax.axis_index(axes) if x_PM.shape[0] > 1 else 0]
    if kind == "gather":
        return mine_NM
    sum_M = mine_NM.astype(jnp.float32).sum(axis=0).astype(x_PM.dtype)
    return sum_M if kind == "sum" else lax.all_gather(sum_M, axes)


def _peers_reach_each_other(devices: Sequence[int]) -> bool:
    """Whether every one of these CUDA devices can access every other one's memory."""
    try:
        cuda: Any = ctypes.CDLL("libcuda.so.1")
        cuda.cuInit(0)
    except OSError:
        return False
    can = ctypes.c_int(0)
    for one, other in permutations(devices, 2):
        if cuda.cuDeviceCanAccessPeer(ctypes.byref(can), one, other) != 0 or not can.value:
            return False
    return True
