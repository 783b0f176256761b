"""The step context, which holds the paged KV pool and whatever else layers share in a step.

Model code sees one device: tokens [T], heads [H]. `StepContext` alone knows pages, rows, query
blocks and the mesh.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxserve.layers.kv import HeadSplit, StateBlocks
from jaxserve.layers.rope import Rope, RopeTable
from jaxserve.mesh import GROUP
from jaxserve.ops import kv_write, paged_attention
from jaxserve.ops.grouped_gemm import Activation, ExpertWeights
from jaxserve.ops.kv_write import Heads
from jaxserve.parallel.dispatch import Backend, Dispatch
from jaxserve.parallel.links import Links
from jaxserve.parallel.slots import SlotTable


class QueryBlocks(NamedTuple):
    """Runs of a step's tokens that are of one prompt, see `paged_attention.prefill`. int32 [B] each."""

    slot_B: jax.Array
    start_B: jax.Array
    len_B: jax.Array
    pos_B: jax.Array


class StepContext:
    """One forward call's view of the KV pool. Trace-time object: make one a call, inside jit.

    A rank's tokens are decode rows, R at most, and then those of prompts, which query blocks say; some may
    be padding. Every array has the ranks' parts joined on axis 0, and ids (slots, pages, block starts)
    count within a rank.

    Args:
        key_pages, value_pages: [dp * num_layers * num_pages, page_size, G, K], see `pool_layout`.
        page_table_SN: pages of each slot, without a layer.
        position_T: position of each token in its sequence.
        slot_T: slot of each token; -1 is padding, whose key and value are dropped.
        context_len_R: of each rank's first R tokens, how many a decode row attends, itself included; 0:
            the token is no decode row. None: R is 0.
        blocks, block_size: the query blocks of a step with prompts, as `paged_attention.prefill` takes them.
        num_pages: of one layer on one rank.
        mesh: `Mesh((dp, ep, tp))` when the arrays are sharded over one.
        expert_backend: how tokens reach experts on other devices.
        expert_slots: which of the stacked weights are an expert's; None: its own number is.
        states, state_blocks: what a model with recurrent layers keeps of each sequence, and which
            rows of it the query blocks touch (see `jaxserve.layers.lightning`).
        two_batches: run the blocks on two halves of the tokens in turn (see `jaxserve.layers.overlap`).
        links: the devices' own collectives; None: XLA makes them all.

    Attributes:
        chosen: by layer with experts, those of each token, -1 for padding; once the layer ran.
    """

    def __init__(
        self,
        *,
        key_pages: jax.Array,
        value_pages: jax.Array,
        page_table_SN: jax.Array,
        position_T: jax.Array,
        slot_T: jax.Array,
        context_len_R: jax.Array | None,
        blocks: QueryBlocks | None,
        block_size: int,
        num_pages: int,
        page_size: int,
        mesh: Mesh | None = None,
        expert_backend: Backend = "none",
        expert_slots: SlotTable | None = None,
        states: jax.Array | None = None,
        state_blocks: StateBlocks | None = None,
        two_batches: bool = False,
        links: Links | None = None,
    ):
        self.key_pages, self.value_pages = key_pages, value_pages
        self.page_table_SN = page_table_SN
        self.position_T = position_T
        self.slot_T = slot_T
        self.context_len_R = context_len_R
        self.blocks, self.block_size = blocks, block_size
        self.num_pages, self.page_size = num_pages, page_size
        self.mesh = mesh
        self.dispatch = Dispatch(mesh, expert_backend, links)
        self.links = links
        self.expert_slots = expert_slots
        self.states, self.state_blocks = states, state_blocks
        self.two_batches = two_batches
        self.chosen: dict[int, jax.Array] = {}
        self._rope_tables: dict[Rope, RopeTable] = {}
        self._made: dict[Hashable, Callable[..., Any]] = {}

    def part(
        self,
        position_T: jax.Array,
        slot_T: jax.Array,
        context_len_R: jax.Array | None,
        blocks: QueryBlocks | None,
    ) -> "StepContext":
        """The same step for some of its tokens."""
        return StepContext(
            key_pages=self.key_pages,
            value_pages=self.value_pages,
            page_table_SN=self.page_table_SN,
            position_T=position_T,
            slot_T=slot_T,
            context_len_R=context_len_R,
            blocks=blocks,
            block_size=self.block_size,
            num_pages=self.num_pages,
            page_size=self.page_size,
            mesh=self.mesh,
            expert_backend=self.dispatch.backend,
            expert_slots=self.expert_slots,
        )

    @property
    def num_ranks(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["dp"]

    @property
    def R(self) -> int:
        """Decode rows of a rank, at most."""
        return 0 if self.context_len_R is None else self.context_len_R.shape[0] // self.num_ranks

    def rope(self, rope: Rope) -> RopeTable:
        """The rotation of this step's positions, computed once for all layers that share `rope`."""
        if rope not in self._rope_tables:
            self._rope_tables[rope] = rope.table(self.position_T)
        return self._rope_tables[rope]

    def per_rank(self, function: Callable[..., Any], x_T: Any, shared: Any = None) -> Any:
        """`function(x_T, shared)` on each dp rank's tokens alone; what it returns is joined again.

        `x_T` and the result may be several arrays.

        For what the partitioner cannot split by tokens, such as `top_k`: it would gather all ranks'.
        """
        if self.mesh is None:
            return function(x_T, shared)
        rank, whole = PartitionSpec("dp"), PartitionSpec()
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=(rank, whole), out_specs=rank, check_vma=False
        )(x_T, shared)

    def attend(
        self,
        layer: int,
        query: Heads,
        key: Heads,
        value: Heads,
        *,
        scale: float,
        rotation: RopeTable | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks_H: jax.Array | None = None,
    ) -> jax.Array:
        """Rotates queries and keys, writes keys and values into `layer`'s pages, attends: out_THK."""
        group = 1 if self.mesh is None else self.mesh.shape["ep"] * self.mesh.shape["tp"]
        split = HeadSplit(query.count, key.count, group)
        assert self.key_pages.shape[2] == group * split.num_kv, (
            f"pool has {self.key_pages.shape[2]} heads, the layout {group} x {split.num_kv}; see pool_layout"
        )
        parts = query, key, value
        assert all(x.ways == group or x.count == x.array_TXK.shape[1] for x in parts), (
            "heads are joined otherwise than the mesh splits them"
        )
        cut = (split, scale, window, softcap)
        attend = self.once(cut, lambda: self._attention(*cut))
        out_THK, (self.key_pages, self.value_pages) = attend(
            jnp.int32(layer * self.num_pages),
            (self.key_pages, self.value_pages),
            parts,
            None if rotation is None else (rotation.cos_TK, rotation.sin_TK),
            sinks_H,
            self.page_table_SN,
            self.position_T,
            self.slot_T,
            self.context_len_R,
            self.blocks,
        )
        return out_THK

    def _attention(
        self,
        split: HeadSplit,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Callable[..., Any]:
        """`attend` on each device."""

        def on_device(
            page_offset,
            pools,
            parts,
            rotation,
            sinks_h,
            table_SN,
            position_T,
            slot_T,
            context_len_R,
            blocks,
        ):
            query, *keys_values = parts
            if not split.divides:
                mine = split.heads_of(jax.lax.axis_index(GROUP))
                keys_values = [
                    replace(heads, array_TXK=jnp.take(heads.array_TXK, mine, axis=1)) for heads in keys_values
                ]
            key_pages, value_pages = pools
            at_T = write_address(table_SN, position_T, slot_T, self.page_size)
            counts = split.num_q, split.num_kv, split.num_kv
            query, key, value = (
                replace(heads, first=heads.first // heads.ways, count=count, ways=1)
                for heads, count in zip((query, *keys_values), counts)
            )
            query_ThK, key_pages, value_pages = kv_write.rotate_and_write(
                query,
                key,
                value,
                rotation,
                key_pages,
                value_pages,
                *at_T,
                page_offset=page_offset,
            )
            options: dict[str, Any] = {
                "page_offset": page_offset,
                "scale": scale,
                "window": window,
                "softcap": softcap,
                "sinks_H": sinks_h,
            }
            arrays = key_pages, value_pages, table_SN
            out_ThK = query_ThK  # results take the queries' places
            if context_len_R is not None:
                rows = decode_slots(slot_T, context_len_R), context_len_R
                out_ThK = paged_attention.decode(out_ThK, *arrays, *rows, **options)
            if blocks is not None:
                options["block_size"] = self.block_size
                out_ThK = paged_attention.prefill(out_ThK, *arrays, *blocks, **options)
            return read_first(out_ThK, (key_pages, value_pages))

        if self.mesh is None:
            return on_device
        P = PartitionSpec
        rank, heads, pool = P("dp"), P("dp", GROUP), P("dp", None, GROUP)
        kv = heads if split.divides else rank

        def on_mesh(page_offset, pools, parts, *arrays):
            of_parts = tuple(part.specs(spec) for part, spec in zip(parts, (heads, kv, kv)))
            return jax.shard_map(
                on_device,
                mesh=self.mesh,
                in_specs=(P(), pool, of_parts, rank, P(GROUP), rank, rank, rank, rank, rank),
                out_specs=(heads, pool),
                check_vma=False,  # the kernels' outputs carry no replication types
            )(page_offset, pools, parts, *arrays)

        return on_mesh

    def once(self, key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """`make()` jitted, made once for all layers with an equal `key`: jax traces it once.

        Tracing the kernels in each of 32 layers took most of an engine's start.
        """
        if key not in self._made:
            self._made[key] = jax.jit(make())
        return self._made[key]

    def feed_experts(
        self,
        layer: int,
        hidden_TD: jax.Array,
        expert_TX: jax.Array,
        weight_TX: jax.Array,
        weights: ExpertWeights,
        activation: Activation,
    ) -> jax.Array:
        """The weighted sum of each token's experts, in the dtype that `Dispatch` gives it.

        Args:
            layer: counts the layers that have experts.
            expert_TX: -1 for padding, which is not counted.
        """
        assert layer not in self.chosen, f"experts of layer {layer} ran twice"
        self.chosen[layer] = expert_TX
        slots = None if self.expert_slots is None else self.expert_slots.layer(layer)
        return self.dispatch(hidden_TD, expert_TX, weight_TX, weights, activation, slots)

    def expert_load(self, num_experts: int) -> jax.Array:
        """How many of each rank's tokens chose each expert in this step: uint32 [dp * L, E].

        One scatter for all layers, after they ran, and no collective.
        """
        chosen_LTX = jnp.stack([self.chosen[layer] for layer in sorted(self.chosen)])

        def count(chosen_LTX: jax.Array) -> jax.Array:
            layer = jnp.arange(chosen_LTX.shape[0])[:, None, None]
            at = jnp.where(chosen_LTX < 0, num_experts, chosen_LTX)
            load_LE = jnp.zeros((chosen_LTX.shape[0], num_experts), jnp.uint32)
            return load_LE.at[layer, at].add(1, mode="drop")

        if self.mesh is None:
            return count(chosen_LTX)
        P = PartitionSpec
        return jax.shard_map(
            count, mesh=self.mesh, in_specs=P(None, "dp"), out_specs=P("dp"), check_vma=False
        )(chosen_LTX)


def read_first(out: jax.Array, pools: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
    """Both as they are, but whoever writes to the pools next does so after `out` was computed from them.

    Between two halves of a step nothing else says so, and XLA would let each half have a copy of the pools.
    """
    return jax.lax.optimization_barrier((out, pools))


def decode_slots(slot_T: jax.Array, context_len_R: jax.Array) -> jax.Array:
    """Those of the first R tokens. One that is no decode row reads nothing: its context is 0."""
    return jnp.maximum(slot_T[: context_len_R.shape[0]], 0)


def write_address(
    table_SN: jax.Array, position_T: jax.Array, slot_T: jax.Array, page_size: int
) -> tuple[jax.Array, jax.Array]:
    """(page, without a layer, and offset in it) of each token; page -1 for padding."""
    page_T = table_SN[jnp.maximum(slot_T, 0), position_T // page_size]
    return jnp.where(slot_T >= 0, page_T, -1), position_T % page_size
