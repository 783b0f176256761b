"""Carries out step plans on the devices: owns the arrays, compiles the programs, launches, reads.

Everything is compiled before the first request: `compile_all` goes through every program in every
bucket, in parallel threads, into the persistent cache, or takes them from there. `launch` only picks,
packs and calls.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.engine import batch, programs, slot_state
from jaxserve.engine.batch import Bucket
from jaxserve.engine.compiler import OVERLAP_OPTIONS, compile_program, compiler_options, lower_program
from jaxserve.engine.expert_state import ExpertState
from jaxserve.engine.kept_programs import KeptPrograms, Task
from jaxserve.engine.launches import Launch, Launches
from jaxserve.engine.nextn import NextnLayer
from jaxserve.engine.plan import StepPlan
from jaxserve.engine.programs import Carried, ModelFunction, Variant
from jaxserve.engine.request import Request
from jaxserve.parallel.links import LinkPlan
from jaxserve.parallel.slots import SlotTable

Progress = Callable[[int, int], None]
MAX_MOVES = 4  # layers whose experts move in one launch; with more than 32 unfinished programs Gloo hangs


@dataclass(frozen=True)
class Sizes:
    """What the arrays of one dp rank hold."""

    num_ranks: int
    num_pages: int
    page_size: int
    num_slots: int
    pages_per_seq: int
    vocab_size: int


@dataclass(slots=True)
class Launched:
    """What started programs will have made; still on the device."""

    sampled: dict[str, jax.Array] = field(default_factory=dict)
    scored: dict[str, jax.Array] | None = None
    drafts: jax.Array | None = None  # [ranks * requests, drafts]
    last: jax.Array | None = None  # never donated: something to wait for


@dataclass(slots=True)
class Step:
    """A launched step."""

    plan: StepPlan
    bucket: Bucket
    results: Launched


@dataclass(slots=True)
class StepResult:
    """What a step produced, per rank: tokens in the order of `RankPlan.sample_rows`, and logprobs by row."""

    tokens: list[list[int]]
    sampled: list[dict[str, np.ndarray]]  # empty dicts unless logprobs were computed
    scored: list[dict[str, np.ndarray]] | None  # by token of the step


class Runner:
    """One model instance on its mesh.

    What a step hands to the next, or to its own sampling, is donated, and so is at the same address in every
    step. Where one of a program's arrays moves, XLA records anew all kernels of its CUDA graph that use the
    memory: for what was sampled from that were half of them, since XLA computes other things in its place.

    Args:
        pools: (key_pages, value_pages), see `jaxserve.layers.kv.pool_layouts`.
        states: (state pool,) of a model with recurrent layers, see `jaxserve.layers.kv.state_layout`.
        mesh: of shape (dp, ep, tp); its arrays' placement is fixed here.
        experts: what is kept of them, when the model has any.
        num_nextn: guesses that the model's own layer makes for a request after each step.
        decode_steps: of one launch that has nothing but decode to do.
        masks: whether grammars are served, which say for each slot which tokens may follow.
    """

    def __init__(
        self,
        model: ModelFunction,
        leaves: list[jax.Array],
        pools: tuple[jax.Array, jax.Array],
        mesh: Mesh,
        sizes: Sizes,
        buckets: Sequence[Bucket],
        experts: ExpertState | None = None,
        states: tuple[jax.Array, ...] = (),
        num_nextn: int = 0,
        decode_steps: int = 1,
        masks: bool = False,
    ):
        self.sizes = sizes
        self.buckets = sorted(buckets, key=lambda b: (b.chunks > 0, b.num_tokens, b.rows))
        self._model = model
        self._leaves = leaves
        self._head_leaves: list[jax.Array] = []  # what makes logits; known once programs are traced
        self._mesh = mesh
        self._map_mesh = mesh if mesh.size > 1 else None  # on one device nothing needs shard_map
        self._by_rank = NamedSharding(mesh, PartitionSpec("dp"))
        # A host reads whole only what it has whole.
        self._readable = NamedSharding(mesh, PartitionSpec()) if mesh.is_multi_process else self._by_rank
        self.announce: Callable[[list[Launch]], None] | None = None  # to the other hosts, before launching
        self._key_pages, self._value_pages = pools
        self._states = states
        rows = sizes.num_ranks * sizes.num_slots
        self._table = self._zeros((rows, sizes.pages_per_seq), np.int32)
        self._last_token = self._zeros((rows,), np.int32)
        self._samples: dict[int, jax.Array] = {}  # by their number; known once programs are traced
        layout = slot_state.layout_of(sizes.vocab_size, masks)
        self._slots = {name: self._zeros((rows, n), dtype) for name, (n, dtype) in layout.items()}
        packings = batch.mask_packings(sizes.num_slots, sizes.vocab_size) if masks else {}
        self.experts = experts
        self._decode_steps = decode_steps
        self.nextn: NextnLayer | None = None
        if num_nextn:
            pages = (sizes.num_pages, sizes.page_size)
            self.nextn = NextnLayer(num_nextn, sizes.num_slots, pages, self._map_mesh, self.buckets)
        self.launches = Launches(
            sizes.num_ranks, self.buckets, bool(states), decode_steps, self.nextn, packings
        )
        self._links: Any = ()
        if model.links is not None:  # the mailboxes are written by address: they only have to be there
            self._links, self._mailboxes = model.links.make(mesh)
        self._programs: dict[Any, Callable] = {}
        self.program_keys: tuple[Any, ...] = ()  # in the same order on every host; set by compile_all

    # ---- a step ----

    def launch(self, plan: StepPlan) -> Step:
        """Start a step; returns at once. Results come from `read`.

        A step whose plan is constrained needs a call of `sample` too.
        """
        bucket = self.launches.bucket_of(plan)
        return Step(plan, bucket, self._fetch(self.start(self.launches.of_step(plan, bucket))))

    def sample(
        self,
        step: Step,
        masked: Sequence[Sequence[Request]],
        fill: Callable[[np.ndarray, Sequence[Request]], None],
    ) -> None:
        """Sample in a launched step whose plan is constrained; returns at once. See `Launches.of_masks`."""
        launches = self.launches.of_masks(masked, fill)
        made = self._fetch(self.start([*launches, *self.launches.of_sampling(step.plan, step.bucket)]))
        step.results.sampled, step.results.last = made.sampled, made.last

    @staticmethod
    def _fetch(results: Launched) -> Launched:
        """Let what `read` reads come to the host as soon as it is there."""
        for array in [*results.sampled.values(), *(results.scored or {}).values()]:
            array.copy_to_host_async()
        return results

    def start(self, launches: list[Launch]) -> Launched:
        """Start programs in order, on every host; whatever runs on the devices after readiness comes by."""
        if self.announce is not None:
            self.announce(launches)
        return self.carry_out(launches)

    def carry_out(self, launches: Sequence[Launch]) -> Launched:
        """Start programs in order on this host's devices; returns at once."""
        made = Launched()
        hidden: list[jax.Array] = []
        for launch in launches:
            program, packed = self._programs[launch.program], self._put(launch.packed)
            match launch.program:
                case "update_table":
                    self._table = program(self._table, packed)
                case "prepare_slot":
                    self._slots = program(self._slots, packed)
                case ("set_masks", _):
                    self._slots["mask"] = program(self._slots["mask"], packed)
                case "gather_load":
                    assert self.experts is not None
                    made.last = program(self.experts.load, packed)
                case ("move_experts", _):
                    assert self.experts is not None
                    made.last = self.experts.carry_out(program, launch.packed, self._leaves, packed)
                case Bucket(num_samples=num):
                    own = self._states, self._samples[num], packed
                    self._states, samples, *hidden = self._step(program, *own)
                    self._samples[num] = samples
                    made.last = hidden[0] if hidden else None
                    if self.nextn is not None:
                        self.nextn.hidden = (samples, *hidden)
                case ("decode", _):
                    self._last_token, tokens = self._step(program, packed)
                    made.last, made.sampled = tokens, {"token": tokens}
                case ("nextn", _):
                    assert self.nextn is not None
                    pools = self._key_pages, self._value_pages
                    self._key_pages, self._value_pages, made.drafts = self.nextn.carry_out(
                        program, self._leaves, pools, self._table, packed
                    )
                    made.last = made.drafts
                case ("score", _):
                    made.scored = program(self._head_leaves, *hidden, packed)
                case (num, Variant(filters=filters)):
                    slots = self._slots if filters else {}
                    self._last_token, slots, made.sampled = program(
                        self._head_leaves, self._samples[num], self._last_token, slots, packed
                    )
                    made.last = made.sampled["token"]
                    if filters:
                        self._slots = slots
        return made

    def _step(self, program: Callable, *own: Any) -> Any:
        """Start a program that carries pools, page table and experts' load on; returns what else it makes."""
        load, expert_slots = self._expert_arrays
        carried = Carried(self._key_pages, self._value_pages, self._table, load, self._links)
        carried, *made = program(self._leaves, carried, expert_slots, self._last_token, *own)
        self._key_pages, self._value_pages, self._table, load, self._links = carried
        if self.experts is not None:
            (self.experts.load,) = load
        return made

    @property
    def _expert_arrays(self) -> tuple[tuple[jax.Array, ...], SlotTable | None]:
        return ((), None) if self.experts is None else ((self.experts.load,), self.experts.slots)

    def read(self, step: Step) -> StepResult:
        """Wait for a step and bring its results to the host."""
        jax.block_until_ready(step.results.last)  # a step that samples nothing is waited for too
        sampled = {name: np.asarray(array) for name, array in step.results.sampled.items()}
        token = sampled.pop("token", np.zeros(0, np.int32))
        ranks = range(self.sizes.num_ranks)
        if step.plan.num_steps > 1:
            by_rank = token.reshape(len(ranks), step.bucket.rows, -1).tolist()
            tokens = [
                [token for row, count in zip(rows, plan.counts) for token in row[:count]]
                for rows, plan in zip(by_rank, step.plan.ranks)
            ]
            return StepResult(tokens, [{} for _ in ranks], None)
        n, t = step.bucket.num_samples, step.bucket.num_tokens
        counts = [rank.num_samples for rank in step.plan.ranks]
        scored = None
        if step.results.scored is not None:
            whole = {name: np.asarray(array) for name, array in step.results.scored.items()}
            scored = [{name: a[r * t : (r + 1) * t] for name, a in whole.items()} for r in ranks]
        return StepResult(
            tokens=[token[r * n : r * n + counts[r]].tolist() for r in ranks],
            sampled=[{name: a[r * n : (r + 1) * n] for name, a in sampled.items()} for r in ranks],
            scored=scored,
        )

    def start_drafts(self, step: Step, result: StepResult) -> jax.Array | None:
        """Let the model's own layer, if it is used, guess on from the step just read, which is the last
        launched and not yet retired."""
        if self.nextn is None:
            return None
        packed = self.nextn.pack(step.bucket, step.plan, result.tokens)
        drafts = self.start([Launch(("nextn", step.bucket), packed)]).drafts
        assert drafts is not None
        drafts.copy_to_host_async()
        return drafts

    def expert_load(self) -> np.ndarray:
        """Tokens that chose each expert since the start, uint64 [layers with experts, E].

        Waits for the launched steps.
        """
        assert self.experts is not None, "a dense model has no experts"
        load = self.experts.load
        if self._mesh.is_multi_process:
            load = self.start([Launch("gather_load", np.zeros((self.sizes.num_ranks, 1), np.int32))]).last
        return self.experts.count(np.asarray(load))

    def move_experts(self, layers: dict[int, np.ndarray]) -> None:
        """Put other experts into the slots of some layers, between the launched steps and the next.

        Waits between parts, since few programs may be unfinished at a time (see MAX_MOVES).
        """
        assert self.experts is not None
        for part in itertools.batched(layers.items(), MAX_MOVES):
            started = self.start([Launch(*self.experts.pack_move(*move)) for move in part])
            if len(layers) > MAX_MOVES:
                jax.block_until_ready(started.last)

    # ---- arrays and programs ----

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self._leaves)

    @property
    def links(self) -> LinkPlan | None:
        """How its devices exchange small arrays, if they do so themselves."""
        return self._model.links

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=self._by_rank)()

    def _put(self, packed: np.ndarray) -> Any:
        """What a compiled program takes as its packed argument.

        On one device that is the array as it is, to which nobody writes again: `device_put` took a quarter
        of a millisecond on an H100's host.
        """
        if self._mesh.size == 1:
            return packed
        if self._mesh.is_multi_process:
            return jax.make_array_from_callback(packed.shape, self._by_rank, lambda index: packed[index])
        return jax.device_put(packed, self._by_rank)

    def compile_all(self, progress: Progress, kept: KeptPrograms | None = None) -> None:
        """Compile every program, the largest first; `progress(done, total)` counts programs.

        An engine whose programs are in `kept` takes them and traces nothing; another leaves its own there.
        One thread traces them, in order, which Python would not do faster at once (see `lower_program`).
        Threads share what weights and KV leave of a GPU's memory for trying kernels out, which may be too
        little for all of them at once: who found none tries again alone.
        """
        tasks = self._tasks()
        options = {key: self._compiler_options(key) for key in tasks}
        self.program_keys = tuple(tasks)
        progress(0, len(tasks))
        if kept is None:
            self._compile(tasks, options, progress)
            return
        if taken := kept.take(tasks, options, progress):
            self._programs |= taken
            return
        with kept.watch():
            self._compile(tasks, options, progress, kept.note)
        kept.write(len(tasks))

    def _compile(
        self,
        tasks: Mapping[Any, Task],
        options: Mapping[Any, dict[str, Any]],
        progress: Progress,
        note: Callable[[Any, Any], None] = lambda key, program: None,
    ) -> None:
        """`note` is told of each program in the thread that compiled it."""

        def compile_one(key: Any) -> None:
            self._programs[key] = compile_program(lowered[key].result(), str(key))
            note(key, self._programs[key])

        done, crowded_out = itertools.count(1), []
        with ThreadPoolExecutor(1) as tracer, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            lowered = {
                key: tracer.submit(lower_program, *task, options[key], str(key))
                for key, task in tasks.items()
            }
            futures = {pool.submit(compile_one, key): key for key in tasks}
            for future in as_completed(futures):
                try:
                    future.result()
                    progress(next(done), len(tasks))
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    crowded_out.append(futures[future])
        for key in crowded_out:
            compile_one(key)
            progress(next(done), len(tasks))

    def warm_up(self, progress: Progress) -> None:
        """Run every step program once, on padding; `progress(done, total)` counts steps.

        The first run of a program on a GPU loads its kernels and records its graphs: 0.2 s for an 8B
        model on an H100, which the first requests would wait. Every host does it alike.
        """
        steps = self.launches.padding()
        for done, launches in enumerate(steps):
            progress(done, len(steps))
            made = self.carry_out(launches)
            jax.block_until_ready((made.last, made.sampled, made.scored))
        progress(len(steps), len(steps))

    def _tasks(self) -> dict[Any, Task]:
        """What each program is made of, by its key."""
        ranks = self.sizes.num_ranks
        rank = self._by_rank
        leaves = [_abstract(x) for x in self._leaves]
        keys, values, table, last = map(
            _abstract, (self._key_pages, self._value_pages, self._table, self._last_token)
        )
        load, expert_slots = jax.tree.map(_abstract, self._expert_arrays)
        states = tuple(_abstract(x) for x in self._states)
        slots = {name: _abstract(x) for name, x in self._slots.items()}

        def packed(packing: batch.Packing) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((ranks, packing.length), np.int32, sharding=rank)

        def hidden(rows: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((ranks * rows, *of_token.shape), of_token.dtype, sharding=rank)

        links = jax.tree.map(_abstract, self._links)
        carried = Carried(keys, values, table, load, links)
        of_links = jax.tree.map(lambda x: x.sharding, links)
        of_carried = Carried(keys.sharding, values.sharding, rank, rank, of_links)
        tasks: dict[Any, Any] = {}
        of_token = self._model.hidden(leaves)
        for num in {b.num_samples for b in self.buckets}:
            self._samples[num] = self._zeros((ranks * num, *of_token.shape), of_token.dtype)
        for b in reversed(self.buckets):
            packing = self.launches.forward[b]
            function = partial(
                programs.forward,
                self._model,
                b,
                packing,
                (self.sizes.num_pages, self.sizes.page_size),
                self._map_mesh,
            )
            args = (leaves, carried, expert_slots, last, states, hidden(b.num_samples), packed(packing))
            hidden_parts = [rank, rank] if b.chunks else [rank]
            of_states = tuple(x.sharding for x in states)
            tasks[b] = (function, args, (1, 4, 5), (of_carried, of_states, *hidden_parts))
        for b, packing in self.launches.decode.items():
            pages = (self.sizes.num_pages, self.sizes.page_size)
            function = partial(
                programs.decode, self._model, self._decode_steps, b, packing, pages, self._map_mesh
            )
            args = (leaves, carried, expert_slots, last, packed(packing))
            tasks["decode", b] = (function, args, (1, 3), (of_carried, rank, self._readable))
        head = self._model.head(leaves, hidden(1))
        assert head.kept is not None
        self._head_leaves = [self._leaves[i] for i in head.kept]
        head_leaves = [leaves[i] for i in head.kept]
        for b, packing in self.launches.score.items():
            function = partial(programs.score, head, packing, self._map_mesh)
            args = (head_leaves, hidden(b.num_tokens), packed(packing))
            tasks["score", b] = (function, args, (), self._readable)
        for key, packing in self.launches.sample.items():
            num_samples, variant = key
            function = partial(programs.sample, head, variant, packing, self._map_mesh)
            state = slots if variant.filters else {}
            args = (head_leaves, hidden(num_samples), last, state, packed(packing))
            tasks[key] = (function, args, (2, 3), (rank, rank, self._readable))
        if self.nextn is not None:
            arrays = (keys, values, table)
            tasks |= self.nextn.tasks(self._model, leaves, arrays, hidden, packed, self._readable)
        tasks["update_table"] = (
            partial(programs.update_table, self._map_mesh),
            (table, packed(batch.UPDATE_PACKING)),
            (0,),
            rank,
        )
        tasks["prepare_slot"] = (
            partial(slot_state.prepare_slot, self._map_mesh),
            (slots, packed(batch.PREPARE_PACKING)),
            (0,),
            rank,
        )
        for size, packing in self.launches.masks.items():
            tasks["set_masks", size] = (
                partial(slot_state.set_masks, packing, self._map_mesh),
                (slots["mask"], packed(packing)),
                (0,),
                rank,
            )
        if load and self._mesh.is_multi_process:
            one_each = jax.ShapeDtypeStruct((ranks, 1), np.int32, sharding=rank)
            tasks["gather_load"] = (lambda load, _: load, (*load, one_each), (), self._readable)
        return tasks if self.experts is None else tasks | self.experts.tasks(leaves)

    def hlo(self, program: Any) -> str:
        """The optimized HLO of a compiled program, by its key."""
        return self._programs[program].as_text()

    def _compiler_options(self, program: Any) -> dict[str, Any]:
        options = compiler_options(program, any(leaf.dtype == jnp.int8 for leaf in self._leaves))
        if options and self._mesh.is_multi_process:
            # Hosts that share the tuning wait for each other's part, for ever if one reads its program
            # from a cache instead.
            options["xla_gpu_shard_autotuning"] = False
        if options and self._model.two_batches:
            options |= OVERLAP_OPTIONS
        return options


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
