"""The device programs of a step, as functions to be compiled: forward, sample, score and upkeep.

Arrays of all dp ranks are joined on axis 0. What is indexed by a rank's own slots or tokens runs
under `shard_map`; the rest is partitioned by XLA.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxserve.engine.batch import (
    NUM_LOGPROB_IDS,
    NUM_TOP_LOGPROBS,
    UPDATE_PACKING,
    Bucket,
    Packing,
)
from jaxserve.engine.slot_state import SlotState, adjust, count_rows
from jaxserve.layers.kv import StateBlocks
from jaxserve.layers.moe import ExpertSpec
from jaxserve.layers.step_context import QueryBlocks, StepContext
from jaxserve.mesh import GROUP, per_rank
from jaxserve.ops import sampling
from jaxserve.parallel.dispatch import Backend, Collectives
from jaxserve.parallel.links import LinkPlan, Links
from jaxserve.parallel.slots import SlotTable

SCORE_ROWS = 128  # prompt tokens whose logits exist at a time


@dataclass(frozen=True)
class ModelFunction:
    """A model's structure, apart from its weights: `call(leaves)` is the model inside jit.

    `experts` is the model's ExpertSpec when it has any; `expert_backend` says how tokens reach them.
    `two_batches` runs its blocks on two halves of a step in turn.
    `links` are the devices' own collectives, where they have any.
    `kept` says which of the leaves are given, when not all: every argument costs the host time.
    """

    graph: Any
    treedef: Any
    experts: ExpertSpec | None = None
    expert_backend: Backend = "none"
    two_batches: bool = False
    links: LinkPlan | None = None
    kept: tuple[int, ...] | None = None

    def call(self, leaves: Sequence[jax.Array]) -> Any:
        whole: Sequence[jax.Array | None] = leaves
        if self.kept is not None:
            given = dict(zip(self.kept, leaves, strict=True))
            whole = [given.get(i) for i in range(self.treedef.num_leaves)]
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, whole))

    def hidden(self, leaves: Sequence[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
        """The hidden state of a token, [D], as its embedding is; the whole model takes a second to trace."""
        token = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(lambda leaves, token: self.call(leaves).vocabulary.embed(token), leaves, token)

    def head(
        self, leaves: Sequence[jax.ShapeDtypeStruct], hidden_RD: jax.ShapeDtypeStruct
    ) -> "ModelFunction":
        """The same model, given only what makes logits of hidden states."""
        return self.part(lambda leaves, hidden: self.call(leaves).logits(hidden), leaves, hidden_RD)

    def part(self, function: Callable, leaves: Sequence[jax.ShapeDtypeStruct], *args: Any) -> "ModelFunction":
        """The same model, given only the leaves that `function(leaves, *args)` reads."""
        traced = jax.make_jaxpr(function)(leaves, *args)
        used = {id(variable) for eqn in traced.jaxpr.eqns for variable in eqn.invars}
        kept = tuple(i for i in range(len(leaves)) if id(traced.jaxpr.invars[i]) in used)
        return replace(self, kept=kept)


# ---- forward ----


class Carried(NamedTuple):
    """What a step takes over from the one before it on the devices, and hands on; always donated.

    `expert_load` is empty for a dense model, else (uint32 [ranks * L, E],): how often each expert was
    chosen. `links` is empty where XLA makes all collectives.
    """

    key_pages: Any
    value_pages: Any
    table_SN: Any
    expert_load: Any
    links: Any = ()

    @property
    def pages(self) -> tuple[Any, Any, Any]:
        """Both pools, and the page table."""
        return self[:3]


def step_context(
    model: ModelFunction,
    bucket: Bucket,
    sizes: tuple[int, int],  # pages a layer, tokens a page
    mesh: Mesh | None,
    fields: Mapping[str, jax.Array],  # unpacked, with the query blocks of a step with prompts
    pages: tuple[jax.Array, jax.Array, jax.Array],  # both pools, page table
    **own: Any,
) -> StepContext:
    """What a step of the bucket is computed in; `own`: the arguments that its packing does not settle."""
    key_pages, value_pages, page_table_SN = pages
    names = ("block_slot", "block_start", "block_len", "block_pos")
    return StepContext(
        key_pages=key_pages,
        value_pages=value_pages,
        page_table_SN=page_table_SN,
        blocks=QueryBlocks(*(fields[name] for name in names)) if names[0] in fields else None,
        block_size=bucket.block_size,
        num_pages=sizes[0],
        page_size=sizes[1],
        mesh=mesh,
        expert_backend=model.expert_backend,
        **own,
    )


def forward(
    model: ModelFunction,
    bucket: Bucket,
    packing: Packing,
    sizes: tuple[int, int],  # pages a layer, tokens a page
    mesh: Mesh | None,
    leaves: list[jax.Array],
    carried: Carried,
    expert_slots: SlotTable | None,
    last_token_S: jax.Array,
    states: tuple[jax.Array, ...],
    samples_SD: jax.Array,
    packed_RM: jax.Array,
) -> tuple[Any, ...]:
    """One step without sampling.

    Returns what is carried on, the state pool, the hidden states of the sample rows and, when the bucket
    has prompts, those of all tokens (for prompt logprobs). `expert_slots` says where experts are when
    they may move. `states` is empty but for a model with recurrent layers, see `state_layout`. `samples_SD`
    are those of an earlier step, read by now, whose place these take (see `Runner`).
    """
    f = packing.unpack(packed_RM)
    carried, token_T = _begin(mesh, f, carried, last_token_S)
    in_blocks = "state_from" in f
    step = step_context(
        model, bucket, sizes, mesh, f, carried.pages,
        position_T=f["position"],
        slot_T=f["slot"],
        context_len_R=f["row_len"],
        expert_slots=expert_slots,
        states=states[0] if states else None,
        state_blocks=StateBlocks(f["state_from"], f["state_end"], f["state_kept"]) if in_blocks else None,
        two_batches=model.two_batches,
        links=_links(model, carried),
    )  # fmt: skip
    hidden_TD = model.call(leaves)(token_T, step)
    new_SD = per_rank(mesh, lambda hidden, index: hidden[index], hidden_TD, f["sample_index"])
    samples_SD = jax.lax.dynamic_update_slice_in_dim(samples_SD, new_SD, 0, axis=0)
    states = () if step.states is None else (step.states,)
    out = _hand_on(model, carried, step), states, samples_SD
    return (*out, hidden_TD) if bucket.chunks else out


def decode(
    model: ModelFunction,
    num_steps: int,
    bucket: Bucket,
    packing: Packing,
    sizes: tuple[int, int],  # pages a layer, tokens a page
    mesh: Mesh | None,
    leaves: list[jax.Array],
    carried: Carried,
    expert_slots: SlotTable | None,
    last_token_S: jax.Array,
    packed_RM: jax.Array,
) -> tuple[Carried, jax.Array, jax.Array]:
    """Several steps of decode alone, sampling included, as `forward` and `sample` do them one by one.

    A row takes part in its first `row_count` steps. Returns what is carried on, last_token, and the tokens
    [rows, num_steps], of which a row's first `row_count` count.
    """
    f = packing.unpack(packed_RM)
    carried, last_R = _begin(mesh, f, carried, last_token_S)
    module = model.call(leaves)

    def step(i: jax.Array, state: tuple[Carried, jax.Array, jax.Array]) -> tuple[Any, ...]:
        carried, token_R, out_NR = state
        taking_part_R = i < f["row_count"]
        len_R = jnp.where(taking_part_R, f["row_len"] + i, 0)
        context = step_context(
            model, bucket, sizes, mesh, f, carried.pages,
            position_T=jnp.maximum(len_R - 1, 0),
            slot_T=jnp.where(taking_part_R, f["slot"], -1),
            context_len_R=len_R,
            expert_slots=expert_slots,
            two_batches=model.two_batches,
            links=_links(model, carried),
        )  # fmt: skip
        logits_RV = module.logits(module(token_R, context))
        drawing = {"seed": f["seed"], "position": f["position"] + i, "temperature": f["temperature"]}
        new_R = _draw(mesh, RANDOM, logits_RV, {}, drawing, context.links)
        token_R = jnp.where(taking_part_R, new_R, token_R)
        out_NR = jax.lax.dynamic_update_index_in_dim(out_NR, token_R, i, 0)
        return _hand_on(model, carried, context), token_R, out_NR

    out_NR = jnp.zeros((num_steps, *last_R.shape), last_R.dtype)
    carried, token_R, out_NR = jax.lax.fori_loop(0, num_steps, step, (carried, last_R, out_NR))
    last_token_S = per_rank(mesh, _set_rows, last_token_S, f["slot"], token_R)
    return carried, last_token_S, out_NR.T


def _begin(
    mesh: Mesh | None, f: Mapping[str, jax.Array], carried: Carried, last_token_S: jax.Array
) -> tuple[Carried, jax.Array]:
    """With the page table brought up to date; and the tokens, those sampled before among them."""
    updates = (f["update_slot"], f["update_index"], f["update_page"])
    table_SN = per_rank(mesh, _set_entries, carried.table_SN, *updates)
    last_T = per_rank(mesh, lambda last, slot: last[jnp.maximum(slot, 0)], last_token_S, f["slot"])
    return carried._replace(table_SN=table_SN), jnp.where(f["token"] < 0, last_T, f["token"])


def _links(model: ModelFunction, carried: Carried) -> Links | None:
    return None if model.links is None else Links(model.links, carried.links)


def _hand_on(model: ModelFunction, carried: Carried, step: StepContext) -> Carried:
    """What the next step takes over once the model has run in `step`."""
    load = carried.expert_load
    if model.experts is not None:
        (load_LE,) = load
        load = (load_LE + step.expert_load(model.experts.num_experts),)
    links = carried.links if step.links is None else step.links.after()
    return Carried(step.key_pages, step.value_pages, carried.table_SN, load, links)


def _set_entries(table_SN: jax.Array, slot_U: jax.Array, index_U: jax.Array, page_U: jax.Array) -> jax.Array:
    slot_U = jnp.where(slot_U < 0, table_SN.shape[0], slot_U)
    return table_SN.at[slot_U, index_U].set(page_U, mode="drop")


def update_table(mesh: Mesh | None, table_SN: jax.Array, packed_RM: jax.Array) -> jax.Array:
    f = UPDATE_PACKING.unpack(packed_RM)
    return per_rank(mesh, _set_entries, table_SN, f["update_slot"], f["update_index"], f["update_page"])


# ---- sampling ----


@dataclass(frozen=True)
class Variant:
    """Which work a sample program includes; rows that need less get the same answer from any."""

    name: str
    random: bool
    filters: bool  # top-k, top-p, min-p, penalties, biases, masks of grammars
    logprobs: bool


GREEDY = Variant("greedy", random=False, filters=False, logprobs=False)
RANDOM = Variant("random", random=True, filters=False, logprobs=False)
FULL = Variant("full", random=True, filters=True, logprobs=False)
LOGPROBS = Variant("logprobs", random=True, filters=True, logprobs=True)
VARIANTS = (GREEDY, RANDOM, FULL, LOGPROBS)  # by `SamplingWork`

Drawing = tuple[jax.Array, jax.Array, jax.Array]  # seed, position and temperature of each row


def sample(
    model: ModelFunction,
    variant: Variant,
    packing: Packing,
    mesh: Mesh | None,
    leaves: list[jax.Array],
    samples_SD: jax.Array,
    last_token_S: jax.Array,
    slots: SlotState,
    packed_RM: jax.Array,
) -> tuple[jax.Array, SlotState, dict[str, jax.Array]]:
    """Choose one token a row. Returns last_token, the slots' state, and what the host reads."""
    f = packing.unpack(packed_RM)
    logits_SV = model.call(leaves).logits(samples_SD)
    if variant.random:
        token_S = _draw(mesh, variant, logits_SV, slots, f)
    else:
        token_S = sampling.greedy(logits_SV)  # each device's best, not whole rows, go through the group
    last_token_S = per_rank(mesh, _set_rows, last_token_S, f["slot"], token_S)
    out = {"token": token_S}
    if variant.filters:
        count_SV = per_rank(mesh, count_rows, slots["output_count"], f["slot"], token_S)
        slots = {**slots, "output_count": count_SV}
    if variant.logprobs:
        ids_SI = f["logprob_ids"].reshape(-1, NUM_LOGPROB_IDS)
        out |= per_rank(mesh, _logprobs, logits_SV, token_S, ids_SI)
    return last_token_S, slots, out


def _draw(
    mesh: Mesh | None,
    variant: Variant,
    logits_RV: jax.Array,
    slots: SlotState,
    f: dict[str, jax.Array],
    links: Links | None = None,
) -> jax.Array:
    """Rows with filters are gathered whole on each device; of others, devices have parts."""
    size = 1 if mesh is None else mesh.shape["ep"] * mesh.shape["tp"]
    if variant.filters or size == 1 or logits_RV.shape[1] % size:
        return per_rank(mesh, partial(_draw_whole, variant), logits_RV, slots, f)
    drawing = f["seed"], f["position"], f["temperature"]
    rank, split = PartitionSpec("dp"), PartitionSpec("dp", GROUP)
    given = (None, None) if links is None else (links.arrays, links.last)

    def on_device(logits_RU: jax.Array, drawing: Drawing, given: Any) -> jax.Array:
        inside = None if links is None else links.inside(*given)
        return _draw_split(Collectives(inside), logits_RU, drawing)

    specs = split, rank, Links.SPECS
    token_R = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=rank, check_vma=False)(
        logits_RV, drawing, given
    )
    if links is not None:
        links.last = token_R
    return token_R


def _draw_split(collectives: Collectives, logits_RU: jax.Array, drawing: Drawing) -> jax.Array:
    """On one device of a group, whose members have U of the logits each."""
    seed_R, position_R, temperature_R = drawing

    def gather(x_R: jax.Array) -> jax.Array:
        return collectives.gather(x_R, GROUP).reshape(-1, *x_R.shape)

    group = sampling.Group(jax.lax.axis_index(GROUP), gather)
    uniform_R = sampling.uniform(seed_R, position_R)
    return sampling.sample_temperature_split(logits_RU, uniform_R, temperature_R, group)


def _draw_whole(
    variant: Variant, logits_RV: jax.Array, slots: SlotState, f: dict[str, jax.Array]
) -> jax.Array:
    uniform_R = sampling.uniform(f["seed"], f["position"])
    if not variant.filters:
        return sampling.sample_temperature(logits_RV, uniform_R, f["temperature"])
    logits_RV = adjust(logits_RV, slots, f)
    return sampling.sample(logits_RV, uniform_R, f["temperature"], f["top_k"], f["top_p"], f["min_p"])


def _set_rows(last_S: jax.Array, slot_R: jax.Array, token_R: jax.Array) -> jax.Array:
    return last_S.at[jnp.where(slot_R < 0, last_S.shape[0], slot_R)].set(token_R, mode="drop")


def _logprobs(logits_RV: jax.Array, token_R: jax.Array, ids_RI: jax.Array) -> dict[str, jax.Array]:
    """Of the model's own distribution: before temperature, penalties and filters."""
    logprob_RV = jax.nn.log_softmax(logits_RV)
    top_RK, top_ids_RK = sampling.top_logprobs(logits_RV, min(NUM_TOP_LOGPROBS, logits_RV.shape[1]))
    return {
        "logprob": jnp.take_along_axis(logprob_RV, token_R[:, None], 1)[:, 0],
        "top": top_RK,
        "top_ids": top_ids_RK,
        "ids": jnp.take_along_axis(logprob_RV, ids_RI, 1),
    }


# ---- prompt logprobs ----


def score(
    model: ModelFunction,
    packing: Packing,
    mesh: Mesh | None,
    leaves: list[jax.Array],
    hidden_TD: jax.Array,
    packed_RM: jax.Array,
) -> dict[str, jax.Array]:
    """Logprobs of the token after each token of a prompt, SCORE_ROWS rows of logits at a time."""
    f = packing.unpack(packed_RM)
    module = model.call(leaves)
    num_ranks, total = packed_RM.shape[0], hidden_TD.shape[0]
    rows = min(SCORE_ROWS, total // num_ranks)
    ids_TI = per_rank(mesh, lambda ids, chunk: ids.reshape(-1, NUM_LOGPROB_IDS)[chunk], f["ids"], f["chunk"])

    def split(x: jax.Array) -> jax.Array:
        """[ranks * T, ...] -> [T / rows, ranks * rows, ...], each rank's rows staying on it."""
        x = x.reshape(num_ranks, -1, rows, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], num_ranks * rows, *x.shape[3:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], num_ranks, rows, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(total, *x.shape[3:])

    def part(args: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, jax.Array]:
        hidden_CD, target_C, ids_CI = args
        return per_rank(mesh, _logprobs, module.logits(hidden_CD), target_C, ids_CI)

    return jax.tree.map(join, jax.lax.map(part, (split(hidden_TD), split(f["target"]), split(ids_TI))))
