"""Drafts from the model's own layer for multi-token prediction (MTP, NEXTN), made on the devices.

The layer takes a token's hidden state and the token after it, and predicts the one after that. Each
step's tokens go through it once, when what followed them is known, so that its part of the KV pool is
complete; from the last right one of each request it then goes on with its own guesses.

What it writes at a shared page's last position depends on the token after the page: another
sequence's, perhaps. That costs drafts, never tokens: every draft is checked.

Source: DeepSeek-V3 technical report, section 2.2.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.engine.batch import Bucket, Packing, set_blocks
from jaxserve.engine.drafting import num_right
from jaxserve.engine.plan import RankPlan, StepPlan
from jaxserve.engine.programs import ModelFunction, step_context
from jaxserve.engine.request import Request
from jaxserve.layers.step_context import StepContext
from jaxserve.mesh import per_rank
from jaxserve.ops import sampling


class NextnLayer:
    """The layer's programs, one a bucket, and what they take beside the runner's arrays.

    Args:
        num_drafts: guesses of a request after each step.
        num_slots: running requests of a rank, each of which a step has once at most.
        sizes: (pages a layer, tokens a page).

    Attributes:
        hidden: of the last forward program: states of the sample rows, and of a step with prompts all.
    """

    def __init__(
        self,
        num_drafts: int,
        num_slots: int,
        sizes: tuple[int, int],
        mesh: Mesh | None,
        buckets: Sequence[Bucket],
    ):
        self.hidden: tuple[jax.Array, ...] = ()
        self._num_drafts, self._num_slots, self._sizes, self._mesh = num_drafts, num_slots, sizes, mesh
        self._packing = {b: nextn_packing(b, self._num_requests(b)) for b in buckets}
        self._kept: tuple[int, ...] = ()  # the leaves that the programs take

    def tasks(
        self,
        model: ModelFunction,
        leaves: Sequence[jax.ShapeDtypeStruct],
        arrays: tuple[jax.ShapeDtypeStruct, ...],  # both pools, page table
        hidden: Callable[[int], jax.ShapeDtypeStruct],  # of so many rows a rank
        packed: Callable[[Packing], jax.ShapeDtypeStruct],
        readable: Any,
    ) -> dict[Any, tuple[Any, ...]]:
        """Programs to compile, as the runner's."""
        tasks = {}
        for b, packing in self._packing.items():
            options = (b, packing, self._num_drafts, self._sizes, self._mesh)
            states = (hidden(b.num_samples), *([hidden(b.num_tokens)] if b.chunks else []))
            args = (*arrays, states, packed(packing))
            if not self._kept:
                model = model.part(partial(make_drafts, model, *options), leaves, *args)
                assert model.kept is not None
                self._kept = model.kept
            function = partial(make_drafts, model, *options)
            shardings = (arrays[0].sharding, arrays[1].sharding, readable)
            tasks["nextn", b] = (function, ([leaves[i] for i in self._kept], *args), (1, 2), shardings)
        return tasks

    def pack(self, bucket: Bucket, plan: StepPlan, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """The argument of the bucket's program; see `pack_nextn`."""
        return pack_nextn(bucket, self._packing[bucket], plan.ranks, tokens, self._sizes[1])

    def carry_out(
        self,
        program: Callable,
        leaves: Sequence[jax.Array],
        pools: tuple[jax.Array, jax.Array],
        table_SN: jax.Array,
        packed: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the pools and the drafts."""
        return program([leaves[i] for i in self._kept], *pools, table_SN, self.hidden, packed)

    def give(self, bucket: Bucket, plan: StepPlan, drafts: jax.Array) -> None:
        """Wait for the drafts, and note them with the step's requests."""
        rows, n = np.asarray(drafts), self._num_requests(bucket)
        for rank, rank_plan in enumerate(plan.ranks):
            requests = [*rank_plan.decode, *(chunk.request for chunk in rank_plan.chunks)]
            for request, guesses in zip(requests, rows[rank * n :].tolist()):
                request.guesses = guesses

    def _num_requests(self, bucket: Bucket) -> int:
        """Of a rank that a step may have."""
        return min(bucket.num_samples, self._num_slots)


def nextn_packing(bucket: Bucket, num_requests: int) -> Packing:
    t, b, n, i = bucket.num_tokens, bucket.num_blocks, num_requests, np.int32
    return Packing(
        slot=(t, i),  # of the step's tokens; -1 is padding, or a draft that was wrong
        position=(t, i),
        following=(t, i),  # the token after it
        row_len=(bucket.rows, i),  # as in `forward_packing`
        block_slot=(b, i),
        block_start=(b, i),
        block_len=(b, i),
        block_pos=(b, i),
        last=(n, i),  # which of the T tokens is a request's last right one
        last_slot=(n, i),
        last_position=(n, i),
        room=(n, i),  # positions of the request that have pages
    )


def pack_nextn(
    bucket: Bucket,
    packing: Packing,
    plans: Sequence[RankPlan],
    tokens: Sequence[Sequence[int]],
    page_size: int,
) -> np.ndarray:
    """[ranks, packing.length]. `tokens`: what the step sampled, in the order of `RankPlan.sample_rows`.

    Comes before the tokens are retired. Requests that left since the launch have no slot any more, and
    so are padding.
    """
    packed = np.zeros((len(plans), packing.length), np.int32)
    for row, plan, sampled in zip(packed, plans, tokens, strict=True):
        f = packing.views(row)
        for name in ("slot", "last_slot", "block_slot"):
            f[name].fill(-1)
        set_blocks(f, bucket, plan)
        for number, (request, start, at, following) in enumerate(_runs(plan, sampled)):
            end = at + len(following)
            if at < plan.num_rows and request.slot >= 0:
                f["row_len"][at:end] = np.arange(start + 1, start + len(following) + 1)
            f["position"][at:end] = np.arange(start, start + len(following))
            f["following"][at:end] = following
            f["slot"][at:end] = f["last_slot"][number] = request.slot
            f["last"][number], f["last_position"][number] = end - 1, start + len(following) - 1
            f["room"][number] = len(request.pages) * page_size
    return packed


def _runs(plan: RankPlan, sampled: Sequence[int]) -> Iterator[tuple[Request, int, int, Sequence[int]]]:
    """(request, position, place in the step's T tokens, tokens after each) of each request's tokens."""
    row = 0
    for request in plan.decode:
        drafts = plan.drafts.get(request, [])
        right = num_right(drafts, sampled[row:])
        yield request, request.computed - 1, row, sampled[row : row + right + 1]
        row += 1 + len(drafts)
    at = plan.first_prompt_token
    for chunk in plan.chunks:
        following = chunk.request.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
        if chunk.samples:
            following.append(sampled[row])
            row += 1
        yield chunk.request, chunk.start, at, following
        at += chunk.length


def make_drafts(
    model: ModelFunction,
    bucket: Bucket,
    packing: Packing,
    count: int,  # drafts of a request
    sizes: tuple[int, int],  # pages a layer, tokens a page
    mesh: Mesh | None,
    leaves: list[jax.Array],
    key_pages: jax.Array,
    value_pages: jax.Array,
    table_SN: jax.Array,
    hidden: tuple[jax.Array, ...],
    packed_RM: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the pools and the drafts [ranks * requests, count].

    `hidden` are the sample rows' states, whose first are the decode rows', and those of all tokens where
    there are prompts.
    """
    f = packing.unpack(packed_RM)
    module = model.call(leaves)

    def context(
        fields: Mapping[str, jax.Array],
        pools: tuple[jax.Array, jax.Array],
        slot_T: jax.Array,
        position_T: jax.Array,
        row_len_R: jax.Array,
    ) -> StepContext:
        return step_context(
            model, bucket, sizes, mesh, fields, (*pools, table_SN),
            position_T=position_T, slot_T=slot_T, context_len_R=row_len_R,
        )  # fmt: skip

    samples_SD, *all_of_them = hidden
    (hidden_TD,) = all_of_them or (per_rank(mesh, lambda samples: samples[: bucket.rows], samples_SD),)
    step = context(f, (key_pages, value_pages), f["slot"], f["position"], f["row_len"])
    hidden_TD = module.next_token(f["following"], hidden_TD, step)
    hidden_ND = per_rank(mesh, lambda hidden, index: hidden[index], hidden_TD, f["last"])
    drafts = [sampling.greedy(module.logits(hidden_ND))]
    for number in range(1, count):
        position_N = f["last_position"] + number
        slot_N = jnp.where(position_N < f["room"], f["last_slot"], -1)
        len_N = jnp.where(slot_N >= 0, position_N + 1, 0)
        step = context({}, (step.key_pages, step.value_pages), slot_N, position_N, len_N)
        hidden_ND = module.next_token(drafts[-1], hidden_ND, step)
        drafts.append(sampling.greedy(module.logits(hidden_ND)))
    return step.key_pages, step.value_pages, jnp.stack(drafts, 1)
