"""Expert dispatch: bringing tokens to the devices that hold their experts, and the results back.

Everything here runs inside `shard_map` over `Mesh((dp, ep, tp))`. A dp rank's tokens are the same
on every device of its attention group. Experts are sharded over (dp, ep) and their FFN over tp; or,
under `none`, every device has a share of the FFN of all experts.

All backends give the same sums in another order, and none ever drops a token.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxserve.mesh import AXES, GROUP
from jaxserve.ops import backend as kernels
from jaxserve.ops.grouped_gemm import Activation, ExpertWeights, feed_forward
from jaxserve.parallel.links import Links
from jaxserve.parallel.slots import SlotTable

logger = logging.getLogger(__name__)

Backend = Literal["none", "allgather", "all_to_all", "ragged", "auto"]
EXPERT_AXES = ("dp", "ep")
Feed = Callable[
    [jax.Array, jax.Array, jax.Array], jax.Array
]  # a device's experts, of tokens, ids and weights


def choose_backend(asked: str | None, ep: int) -> Backend:
    """The backend for a configuration's `moe_a2a_backend`, with a log line where it is another name's."""
    if ep == 1:
        if asked not in (None, "none"):
            logger.info("moe_a2a_backend=%s needs ep > 1; at ep 1 every device has all experts: none", asked)
        return "none"
    match asked:
        case None:
            return "auto"
        case "none":
            logger.info("moe_a2a_backend=none with ep=%d means allgather", ep)
            return "allgather"
        case "deepep":
            logger.info("moe_a2a_backend=deepep means all_to_all here")
            return "all_to_all"
        case "allgather" | "all_to_all" | "ragged":
            return asked
    raise AssertionError(f"moe_a2a_backend={asked!r}")


@dataclass(frozen=True)
class Dispatch:
    """How the experts of one instance are reached. `auto` decides for each step shape."""

    mesh: Mesh | AbstractMesh | None = None
    backend: Backend = "none"
    links: Links | None = None  # the devices' own collectives

    def __call__(
        self,
        hidden_TD: jax.Array,
        expert_TX: jax.Array,
        weight_TX: jax.Array,
        weights: ExpertWeights,
        activation: Activation,
        slots: SlotTable | None = None,
    ) -> jax.Array:
        """As `grouped_gemm.feed_forward`, over the mesh: in the dtype of `hidden_TD`, as devices send it.

        Without a mesh it stays float32. XLA would add a sum in the model's dtype inside the shared expert's
        product (cuBLASLt, from 64 rows on), and the residual after it in a kernel of its own; what is added
        in float32 it adds all at once where the weighted sum is computed.

        With `slots`, of one layer, weights are those of its slots and not of its experts.
        """
        if self.mesh is None:
            return feed_forward(hidden_TD, expert_TX, weight_TX, weights, activation)
        sizes = dict(self.mesh.shape)
        links = self.links
        route = _gathered
        if self.backend != "none":
            num_tokens, ragged = hidden_TD.shape[0] // sizes["dp"], self.backend == "ragged"
            plan = Exchange.plan(num_tokens, expert_TX.shape[1], sizes, ragged)
            if self.backend in ("all_to_all", "ragged") or (self.backend == "auto" and plan.is_worth_it):
                route, links = plan.run, None  # which may not run, but the gathered path instead
        # Of all devices: a device's own ids are -1 where the expert is another's.
        rows_per_expert = expert_TX.size / weights.gate_EFD.shape[0]
        experts, ffn = ((), AXES) if self.backend == "none" else (EXPERT_AXES, ("tp",))

        def on_device(hidden_tD, expert_tX, weight_tX, weights: ExpertWeights, slots, given) -> jax.Array:
            inside = None if links is None else links.inside(*given)
            if slots is not None:  # by rank, or the first tokens of all ranks would take the same copy
                expert_tX = slots.find(expert_tX, lax.axis_index("dp"))
            if weights.down_bias_ED is not None:  # each share of the FFN would add it again
                bias_eD = jnp.where(lax.axis_index(ffn) == 0, weights.down_bias_ED, 0)
                weights = weights._replace(down_bias_ED=bias_eD)

            def feed(hidden_TD: jax.Array, expert_TX: jax.Array, weight_TX: jax.Array) -> jax.Array:
                tokens = hidden_TD, expert_TX, weight_TX
                return feed_forward(*tokens, weights, activation, rows_per_expert=rows_per_expert)

            num_local = weights.gate_EFD.shape[0] if experts else None
            return route(feed, num_local, hidden_tD, expert_tX, weight_tX, Collectives(inside))

        given = (None, None) if links is None else (links.arrays, links.last)
        rank, whole = PartitionSpec("dp"), PartitionSpec()
        scale_a_channel = weights.down_scale is not None and weights.down_scale.shape[2] == 1
        out_TD = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(rank, rank, rank, _weight_specs(experts, ffn, scale_a_channel), whole, Links.SPECS),
            out_specs=rank,
            check_vma=False,  # the kernels' outputs carry no replication types
        )(hidden_TD, expert_TX, weight_TX, weights, slots, given)
        if links is not None:
            links.last = out_TD
        return out_TD


def _weight_specs(
    experts: tuple[str, ...], ffn: tuple[str, ...], scale_a_channel: bool = False
) -> ExpertWeights:
    """`scale_a_channel`: scales have a last dimension of 1, which nothing splits."""
    up: Any = PartitionSpec(experts, ffn)
    down: Any = PartitionSpec(experts, None, ffn)
    whole: Any = PartitionSpec(experts)
    return ExpertWeights(
        gate_EFD=up,
        up_EFD=up,
        down_EDF=down,
        gate_bias_EF=up,
        up_bias_EF=up,
        down_bias_ED=whole,
        gate_scale=up,
        up_scale=up,
        down_scale=whole if scale_a_channel else down,
        gate_zero=up,
        down_zero=down,
    )


# ---- all tokens to all devices ----


def _gathered(
    feed: Feed, num_local: int | None, hidden_tD, expert_tX, weight_tX, collectives: "Collectives"
) -> jax.Array:
    """Every device sees all tokens and adds what its `num_local` experts, or its share of all, contribute."""
    hidden_TD = collectives.gather(hidden_tD, ("dp",))
    expert_TX, weight_TX = _unjoin(collectives.gather(_join(expert_tX, weight_tX), ("dp",)))
    if num_local is not None:
        expert_TX = _local(expert_TX, lax.axis_index(EXPERT_AXES) * num_local, num_local)
    out_TD = feed(hidden_TD, expert_TX, weight_TX).astype(hidden_tD.dtype)
    out_tD = collectives.scatter_sum(out_TD, "dp")  # first, so that fewer rows are summed below
    return collectives.sum(out_tD, GROUP)


def _join(expert_tX: jax.Array, weight_tX: jax.Array) -> jax.Array:
    """One message for ids and weights, whose bits travel as integers: int32 [t, 2 X]."""
    return jnp.concatenate([expert_tX, lax.bitcast_convert_type(weight_tX, jnp.int32)], axis=1)


def _unjoin(routing: jax.Array) -> tuple[jax.Array, jax.Array]:
    expert_tX, weight_tX = jnp.split(routing, 2, axis=1)
    return expert_tX, lax.bitcast_convert_type(weight_tX, jnp.float32)


def _local(expert: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """Ids within [first, first + count) counted from `first`; -1 for all others."""
    local = expert - first
    return jnp.where((expert >= 0) & (local >= 0) & (local < count), local, -1)


# ---- each token to the devices that need it ----


@dataclass(frozen=True)
class Exchange:
    """An all-to-all in which a token travels once to each device that holds any of its experts.

    Devices of a group have the same tokens, so each sends a share. Buffers have room for
    `capacity` tokens from every device to every other. When any device has more for one
    destination, all of them take the gathered path instead.

    A `ragged` one has room for all, and of each buffer only the rows that carry a token travel. XLA has
    that collective for GPUs alone (jaxlib 0.11.2); elsewhere whole buffers do.
    """

    num_tokens: int  # of a rank
    share: int  # tokens that one device sends
    capacity: int
    num_ranks: int
    num_destinations: int
    ragged: bool = False

    @classmethod
    def plan(
        cls, num_tokens: int, num_choices: int, sizes: dict[str, int], ragged: bool = False
    ) -> "Exchange":
        """Room for a quarter more than evenly spread choices need, and a few tokens more for small steps."""
        e = sizes["dp"] * sizes["ep"]
        share = -(-num_tokens // sizes["ep"])
        reached = 1 - (1 - 1 / e) ** num_choices  # chance that a token needs a given destination
        capacity = min(share, math.ceil(1.25 * reached * share) + 8)
        return cls(num_tokens, share, share if ragged else capacity, sizes["dp"], e, ragged)

    @property
    def is_worth_it(self) -> bool:
        """Whether it moves clearly fewer rows than gathering does.

        Three quarters: its rows take a sort, a scatter and a second collective more.
        """
        return self.num_destinations * self.capacity < 0.75 * self.num_ranks * self.num_tokens

    def run(
        self, feed: Feed, num_local: int | None, hidden_tD, expert_tX, weight_tX, collectives: "Collectives"
    ) -> jax.Array:
        assert num_local is not None, "experts that are not split stay where they are"
        e, C = self.num_destinations, self.capacity
        hidden_sD, expert_sX, weight_sX = self._my_share(hidden_tD, expert_tX, weight_tX)

        # Where each token goes: once to each destination that any of its choices names.
        dest_sX = jnp.where(expert_sX >= 0, expert_sX // num_local, e)
        X = dest_sX.shape[1]
        earlier_sXX = (dest_sX[:, :, None] == dest_sX[:, None, :]) & jnp.tri(X, X, -1, dtype=bool)
        sends_sX = (dest_sX < e) & ~earlier_sXX.any(axis=2)
        sends_se = jnp.zeros((self.share, e + 1), bool).at[jnp.arange(self.share)[:, None], dest_sX].set(True)
        sends_se = sends_se[:, :e]
        place_se = jnp.cumsum(sends_se, axis=0, dtype=jnp.int32) - 1

        def exchange() -> jax.Array:
            row_se = jnp.where(sends_se & (place_se < C), jnp.arange(e) * C + place_se, e * C)
            token_M = jnp.full((e * C,), -1, jnp.int32)
            token_M = token_M.at[row_se].set(jnp.arange(self.share, dtype=jnp.int32)[:, None], mode="drop")
            at_M = jnp.maximum(token_M, 0)
            first_M = jnp.repeat(jnp.arange(e, dtype=jnp.int32) * num_local, C)
            expert_MX = jnp.where(token_M[:, None] >= 0, expert_sX[at_M], -1)
            expert_MX = _local(expert_MX, first_M[:, None], num_local)
            # Ids from 1 on, since rows of zeros are those that nobody sent.
            routing = _join(expert_MX + 1, weight_sX[at_M])
            swap = swap_back = _swap
            if self.ragged:
                sent_e = sends_se.sum(axis=0, dtype=jnp.int32)
                came_e = _swap(sent_e)
                swap = partial(_swap_ragged, sent_e=sent_e, came_e=came_e)
                swap_back = partial(_swap_ragged, sent_e=came_e, came_e=sent_e)
            hidden_MD, routing = swap(hidden_sD[at_M]), swap(routing)
            expert_MX, weight_MX = _unjoin(routing)
            out_MD = feed(hidden_MD, expert_MX - 1, weight_MX)
            back_MD = swap_back(out_MD.astype(hidden_tD.dtype))
            row_sX = jnp.take_along_axis(
                jnp.pad(row_se, ((0, 0), (0, 1)), constant_values=e * C), dest_sX, axis=1
            )
            part_sXD = back_MD[jnp.minimum(row_sX, e * C - 1)].astype(jnp.float32)
            out_sD = jnp.sum(jnp.where(sends_sX[..., None], part_sXD, 0), axis=1).astype(hidden_tD.dtype)
            out_tD = collectives.gather(collectives.sum(out_sD, ("tp",)), ("ep",))
            return out_tD[: self.num_tokens]

        if self.share == C:
            return exchange()
        has_room = jnp.all(sends_se.sum(axis=0) <= C)
        all_have_room = lax.pmin(has_room.astype(jnp.int32), AXES) == 1

        def gather() -> jax.Array:
            return _gathered(feed, num_local, hidden_tD, expert_tX, weight_tX, collectives)

        return lax.cond(all_have_room, exchange, gather)

    def _my_share(self, hidden_tD, expert_tX, weight_tX) -> tuple[jax.Array, jax.Array, jax.Array]:
        """This device's part of its rank's tokens; the last one is filled up with padding."""
        inner = self.num_destinations // self.num_ranks
        if inner == 1:
            return hidden_tD, expert_tX, weight_tX
        missing, start = inner * self.share - self.num_tokens, lax.axis_index("ep") * self.share

        def part(x, fill):
            x = jnp.pad(x, ((0, missing), (0, 0)), constant_values=fill)
            return lax.dynamic_slice_in_dim(x, start, self.share)

        return part(hidden_tD, 0), part(expert_tX, -1), part(weight_tX, 0)


def _swap(x_MD: jax.Array) -> jax.Array:
    """Block i of the rows goes to device i, and comes from it."""
    return lax.all_to_all(x_MD, EXPERT_AXES, split_axis=0, concat_axis=0, tiled=True)


def _swap_ragged(x_MD: jax.Array, sent_e: jax.Array, came_e: jax.Array) -> jax.Array:
    """As `_swap`, of the first `sent_e` rows of each block alone. `came_e` rows come; the rest is zeros."""
    e = sent_e.shape[0]
    C = x_MD.shape[0] // e
    if kernels.chosen() != "fast":
        came_M = (jnp.arange(C) < came_e[:, None]).reshape(-1, 1)
        return jnp.where(came_M, _swap(x_MD), 0)
    from_e = jnp.arange(e, dtype=jnp.int32) * C
    to_e = jnp.full((e,), lax.axis_index(EXPERT_AXES) * C, jnp.int32)
    return lax.ragged_all_to_all(
        x_MD, jnp.zeros_like(x_MD), from_e, sent_e, to_e, came_e, axis_name=EXPERT_AXES
    )


@dataclass(frozen=True)
class Collectives:
    """Over the mesh's axes of more than one device, by the devices' own kernel where it takes them.

    XLA keeps a sum over one device, and joins it with others: then both wait for what either needs.
    """

    links: Links | None = None

    def sum(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        real = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
        if not real:
            return x
        out = None if self.links is None else self.links.sum(x, axes)
        return lax.psum(x, real) if out is None else out

    def gather(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        if lax.axis_size(axes) == 1:
            return x
        out = None if self.links is None else self.links.gather(x, axes)
        return lax.all_gather(x, axes, tiled=True) if out is None else out

    def scatter_sum(self, x: jax.Array, axis: str) -> jax.Array:
        if lax.axis_size(axis) == 1:
            return x
        out = None if self.links is None else self.links.scatter_sum(x, (axis,))
        return lax.psum_scatter(x, axis, tiled=True) if out is None else out
