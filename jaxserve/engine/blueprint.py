"""What an engine will be, as far as it is known before any weight is read.

The engine and the preflight (`jaxserve.check`) share this path, so what one refuses the other does
too, in the same words. Nothing here needs the devices: the mesh may be abstract.
"""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from jaxserve import mesh as meshes
from jaxserve import speculation
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.batch import Bucket
from jaxserve.engine.drafting import Drafter, NextnDrafter, NgramDrafter
from jaxserve.engine.plan import tokens_of_rows
from jaxserve.engine.programs import SCORE_ROWS
from jaxserve.engine.quantization import declare_model, is_mxfp4, keep_groups, kv_dtype, why_widened
from jaxserve.layers.kv import KVSpec, LatentSpec, PoolLayout, StateSpec, pool_layouts, state_layout
from jaxserve.layers.moe import ExpertSpec
from jaxserve.layers.weight import reorder
from jaxserve.mesh import Layout, Rules
from jaxserve.models.decoder import Decoder
from jaxserve.ops import hopper
from jaxserve.parallel.dispatch import Backend, choose_backend
from jaxserve.parallel.placement import Placement
from jaxserve.weights import CheckpointError

logger = logging.getLogger(__name__)

CPU_POOL_TOKENS = 65536  # KV capacity on CPU unless memory or a flag says otherwise
STEPS_S, MOST_STEPS = 2e-3, 8  # of decode in one launch: how much reading of weights, and how many
MESH_STEPS_S, MOST_MESH_STEPS = 10e-3, 4  # on several devices, which take the host longer to launch
READ_BYTES_PER_S = 3e12  # of a GPU's memory
DRAFT_ROWS = 64  # up to which a step of an 8B model on an H100 takes little longer than one of 8 rows
CPU_FRACTION, GPU_FRACTION = 0.25, 0.88


@dataclass(frozen=True)
class Blueprint:
    """A model on a layout, with its limits, as `draw` makes it. `model` has no weights yet."""

    config: ServerConfig
    layout: Layout
    mesh: Mesh | AbstractMesh
    on_cpu: bool
    dtype: Any
    kv_dtype: Any
    model: Decoder
    states: StateSpec | None  # of a model with recurrent layers
    experts: ExpertSpec | None
    expert_backend: Backend
    two_batches: bool  # steps run as two halves in turn
    table: Rules
    weight_bytes_of_device: int
    context_len: int  # tokens of one sequence at most
    num_slots: int  # running requests of one dp rank
    draft_rows: int  # of a step and dp rank, guesses included, that may have guesses; 0 without them

    def sharding(self, param: nnx.Param) -> NamedSharding:
        return meshes.weight_sharding(self.mesh, self.table, param)

    def pool_layouts(self, num_pages: int) -> tuple[PoolLayout, PoolLayout]:
        return pool_layouts(
            self.model.kv,
            self.model.num_q_heads,
            num_pages=num_pages,
            page_size=self.config.page_size,
            mesh=self.mesh,
        )

    @property
    def page_bytes(self) -> int:
        """Of a page over all layers on one dp rank, copies inside its group not counted."""
        itemsize = self.kv_dtype.itemsize
        return sum(math.prod(shape) * itemsize for shape, _ in self.pool_layouts(1)) // self.layout.dp

    @property
    def page_bytes_of_device(self) -> int:
        return sum(self._page_sizes_of_device()) * self.kv_dtype.itemsize

    def _page_sizes_of_device(self) -> list[int]:
        """Elements of a page over all layers, in each of the two pools."""
        shards = (NamedSharding(self.mesh, spec).shard_shape(shape) for shape, spec in self.pool_layouts(1))
        return [math.prod(shard) for shard in shards]

    @property
    def num_checkpoints(self) -> int | None:
        """Kept states of a dp rank: as many as running requests, each of which may leave one at its
        prompt's end. None for a model without recurrent layers."""
        if self.states is None:
            return None
        return 0 if self.config.disable_radix_cache else self.num_slots

    @property
    def state_layout(self) -> PoolLayout | None:
        """Of the pool with a row for each running request and each checkpoint."""
        if self.states is None:
            return None
        return state_layout(self.states, self.num_slots + (self.num_checkpoints or 0), self.mesh)

    @property
    def state_bytes_of_device(self) -> int:
        if self.state_layout is None:
            return 0
        shape, spec = self.state_layout
        return math.prod(NamedSharding(self.mesh, spec).shard_shape(shape)) * jnp.dtype(jnp.float32).itemsize

    @property
    def mem_fraction(self) -> float:
        """The share of a device's memory for weights, recurrent states and KV."""
        return self.config.mem_fraction_static or (CPU_FRACTION if self.on_cpu else GPU_FRACTION)

    def num_pages(self, total_bytes: int, used_bytes: int) -> int:
        """Pages of one dp rank, for a device's memory and what weights take of it.

        Raises ConfigError when there is no room for them, or for what max_total_tokens asks.
        """
        config, per_device = self.config, self.page_bytes_of_device
        states = self.state_bytes_of_device
        fits = int(total_bytes * self.mem_fraction - used_bytes - states) // per_device
        wanted = fits
        if config.max_total_tokens is not None:
            wanted = -(-config.max_total_tokens // config.page_size)
        elif self.on_cpu and config.mem_fraction_static is None:
            wanted = min(fits, -(-max(CPU_POOL_TOKENS, self.context_len) // config.page_size))
        if fits < 1:
            also = f" and recurrent states {states / 2**30:.2f} GiB" if states else ""
            or_fewer = f", or lower max_running_requests={self.num_slots}" if states else ""
            raise ConfigError(
                f"weights take {used_bytes / 2**30:.2f} GiB a device{also} and leave no page of KV in the "
                f"{total_bytes * self.mem_fraction / 2**30:.2f} GiB that "
                f"mem_fraction_static={self.mem_fraction:g} allows; use more devices{or_fewer}"
            )
        if wanted > fits:
            needed = wanted * per_device / 2**30
            raise ConfigError(
                f"{wanted * config.page_size} tokens of KV need {needed:.2f} GiB a device; "
                f"{fits * per_device / 2**30:.2f} GiB are left of mem_fraction_static={self.mem_fraction:g}; "
                "lower max_total_tokens"
            )
        return wanted if self.on_cpu else self._addressable(wanted)

    def _addressable(self, num_pages: int) -> int:
        """Fewer pages where the kernels could not address the last ones.

        Pallas-Triton (jax 0.11) counts elements with 32 bits, signed, in arrays of up to 2**32 bytes, which
        is too little for one-byte elements from 2**31 on. Larger pools are counted with 64 bits.
        """
        for size in self._page_sizes_of_device():
            if self.kv_dtype.itemsize == 1 and 2**31 < num_pages * size <= 2**32:
                logger.info("kv_cache_dtype=fp8_e4m3: a pool of this size is cut to 2 GiB (2**31 elements)")
                num_pages = 2**31 // size
        return num_pages

    def max_req_len(self, num_pages: int) -> int:
        """Tokens of one sequence at most, since one may not outgrow the pool."""
        return min(self.context_len, num_pages * self.config.page_size)

    def buckets(self, num_pages: int) -> list[Bucket]:
        return choose_buckets(self.prefill_tokens(num_pages), self.num_slots, self.on_cpu, self.draft_rows)

    def prefill_tokens(self, num_pages: int) -> int:
        """Tokens of prompts in one step of a dp rank, at most."""
        chunk = self.config.chunked_prefill_size or (256 if self.on_cpu else 2048)
        return min(chunk, _power_of_two(self.max_req_len(num_pages)))

    @property
    def num_nextn(self) -> int:
        """Guesses that the model's own layer makes for a request after each step."""
        return speculation.num_drafts(self.config) if speculation.uses_nextn(self.config) else 0

    @property
    def decode_steps(self) -> int:
        """Decode steps of one launch, while there is nothing else to do.

        What a launch costs the host is then shared by them; what they cost are tokens that come in bursts.
        By default as many as read a GPU's weights in STEPS_S, which gives 1 where the host keeps up anyway.
        """
        asked = self.config.num_continuous_decode_steps
        if self.draft_rows or self.states is not None:
            if asked is not None and asked > 1:
                logger.info(
                    "num_continuous_decode_steps=%d is off: the host has to see every step of %s",
                    *(asked, "a model with recurrent states" if self.states else "one that guesses"),
                )
            return 1
        if asked is not None:
            return asked
        if self.on_cpu:
            return 1
        read_s = self.weight_bytes_of_device / READ_BYTES_PER_S
        steps = min(MOST_STEPS, int(STEPS_S / read_s))
        if self.layout.num_devices > 1:
            steps = max(steps, min(MOST_MESH_STEPS, int(MESH_STEPS_S / read_s)))
        return max(1, steps)

    def drafter(self) -> Drafter | None:
        """Who makes guesses; None without speculative decoding."""
        if not self.draft_rows:
            return None
        if self.num_nextn:
            return NextnDrafter(self.num_nextn, self.draft_rows)
        return NgramDrafter(
            speculation.num_drafts(self.config), self.draft_rows, *speculation.ngram_window(self.config)
        )


def draw(
    config: ServerConfig, hf_config: dict[str, Any], mesh: Mesh | AbstractMesh, on_cpu: bool
) -> Blueprint:
    """Raises ConfigError for a model that is not served, and for a layout that does not fit it."""
    layout = meshes.layout_of(config)
    dtype = _dtype(config.dtype, hf_config, on_cpu)
    # Plans get what a Hopper GPU would, and tests on a CPU experts in MXFP4.
    has_kernels = on_cpu or isinstance(mesh, AbstractMesh) or hopper.is_supported()
    model = declare_model(config, hf_config, dtype, has_kernels)
    if is_mxfp4(hf_config) and (why := why_widened(config, hf_config, dtype, has_kernels)):
        logger.info("experts are widened from MXFP4 when they are loaded: %s", why)
    experts, states = model.experts, model.states
    if states is not None and config.enable_two_batch_overlap:
        raise ConfigError(
            "enable_two_batch_overlap: this model's recurrent states go from token to token, so a step "
            "cannot run as two halves; leave enable_two_batch_overlap out"
        )
    if layout.ep > 1 and experts is None:
        raise ConfigError(f"ep={layout.ep}: this model has no experts; use ep 1")
    if config.enable_eplb and experts is not None:
        experts = _give_slots(config, layout, model, experts)
    table = meshes.rules(
        layout,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.kv.num_kv_heads,
        num_experts=experts.num_slots if experts else None,
    )

    def ways(axis: str | None) -> int:
        return math.prod(mesh.shape[a] for a in table[axis]) if axis else 1

    keep_groups(config, hf_config, model, dtype, has_kernels and not on_cpu, ways)
    model.vocabulary.split(mesh)
    expert_backend = choose_backend(config.moe_a2a_backend, layout.ep)
    if config.moe_runner_backend is not None:
        logger.info(
            "moe_runner_backend=%s: experts run in this engine's grouped GEMM", config.moe_runner_backend
        )
    if config.enable_two_batch_overlap and layout.num_devices == 1:
        logger.info("enable_two_batch_overlap is off: one device sends nothing that could be overlapped")
    _tell_of_dp_attention(config, layout, model.kv)
    num_slots = config.max_running_requests or (32 if on_cpu or states else 256)
    return Blueprint(
        config=config,
        layout=layout,
        mesh=mesh,
        on_cpu=on_cpu,
        dtype=dtype,
        kv_dtype=kv_dtype(config, dtype),
        model=model,
        states=states,
        experts=experts,
        expert_backend=expert_backend,
        two_batches=config.enable_two_batch_overlap and layout.num_devices > 1,
        table=table,
        weight_bytes_of_device=_weight_bytes_of_device(model, mesh, table),
        context_len=_context_len(config, model.max_position),
        num_slots=num_slots,
        draft_rows=_draft_rows(config, model, num_slots),
    )


def _give_slots(config: ServerConfig, layout: Layout, model: Decoder, experts: ExpertSpec) -> ExpertSpec:
    """Declare the stacked weights of all experts by slot, redundant ones included. Raises ConfigError."""
    experts = replace(experts, num_redundant=config.ep_num_redundant_experts)
    try:
        placement = Placement.trivial(1, experts.num_experts, experts.num_slots, layout.ep)
    except ValueError as error:
        raise ConfigError(f"ep_num_redundant_experts={experts.num_redundant}: {error}") from error
    for _, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param) and param.logical[:1] == ("expert",):
            reorder(param, placement.logical_LP[0].tolist())
    if layout.dp != layout.ep:
        logger.info(
            "enable_eplb with dp_size=%d and ep=%d: it pays most with dp_size equal to ep, where each "
            "device brings tokens of its own to the experts",
            *(layout.dp, layout.ep),
        )
    return experts


def _draft_rows(config: ServerConfig, model: Decoder, num_slots: int) -> int:
    """Raises ConfigError for a model that cannot take back a wrong guess."""
    if config.speculative_algorithm is None:
        return 0
    if model.states is not None:
        raise ConfigError(
            f"speculative_algorithm={config.speculative_algorithm}: this model's recurrent state cannot "
            "take back a wrong guess; leave speculative_algorithm out"
        )
    return min(config.speculative_max_rows or DRAFT_ROWS, num_slots * (1 + speculation.num_drafts(config)))


def _tell_of_dp_attention(config: ServerConfig, layout: Layout, kv: KVSpec | LatentSpec) -> None:
    if config.enable_dp_attention and layout.dp == 1:
        logger.info("enable_dp_attention is off: it needs dp_size > 1, and dp_size is 1")
    if layout.dp > 1 and isinstance(kv, KVSpec):
        # Up to as many devices as KV heads keep every token's KV once, however they are grouped.
        before, after = (max(1, size // kv.num_kv_heads) for size in (layout.num_devices, layout.group))
        gain = f"keeps {before / after:g} times as much KV as" if before > after else "keeps no more KV than"
        logger.warning(
            "enable_dp_attention with dp_size=%d on a model with %d KV heads %s tp=%d alone, and more "
            "weights a device; it is made for latent attention (MLA)",
            *(layout.dp, kv.num_kv_heads, gain, layout.num_devices),
        )


def draw_on_paper(config: ServerConfig, hf_config: dict[str, Any], on_cpu: bool = False) -> Blueprint:
    """As `draw`, where none of the devices are. Raises ConfigError."""
    shape = meshes.layout_of(config).shape
    mesh = AbstractMesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * len(shape))
    return draw(config, hf_config, mesh, on_cpu)


def _weight_bytes_of_device(model: nnx.Module, mesh: Mesh | AbstractMesh, table: Rules) -> int:
    """Raises ConfigError for a weight that does not divide."""
    total = 0
    for _, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            value = param.get_value()
            shard = meshes.weight_sharding(mesh, table, param).shard_shape(value.shape)
            total += math.prod(shard) * jnp.dtype(value.dtype).itemsize
    return total


def choose_buckets(prefill_tokens: int, num_slots: int, on_cpu: bool, draft_rows: int = 0) -> list[Bucket]:
    """The step shapes to compile: decode alone at several widths, and prompts beside few rows or all.

    Rows and prompts share a step's tokens, `prefill_tokens` of them, so that rows beside prompts cost no
    more than prompts; where rows alone could take half of that, there are more, for prompts to go on.

    On CPU few, since compiling is slow there, and one number of samples or two, each of which takes four
    programs. On GPU powers of two, since a step's time is that of its bucket: from 8 rows on, which take
    no longer than one (Llama-3.1-8B on an H100: 6.6 against 6.7 ms, since XLA splits a norm of one row
    into more kernels), and from 256 tokens with prompts on. They suit the matrix products, which come in
    tiles: 2,064 rows of Llama-3.1-8B take 4.8 % longer than 2,048. Rows from 16 on are a multiple of 16,
    or XLA pads and cuts both sides of each float8 product. `draft_rows` may be more than the `num_slots`
    rows that decode alone takes.
    """
    num_rows = max(num_slots, draft_rows)
    places = tokens_of_rows(num_rows)
    most = _multiple(max(prefill_tokens, places + min(prefill_tokens, places)), 16)
    most = most if most <= SCORE_ROWS else _multiple(most, SCORE_ROWS)
    if on_cpu:
        widths, block = {min(4, num_slots), num_slots, num_rows}, 32
        sizes, mixed = {t for t in (32,) if t < most} | {most}, {num_rows}
    else:
        widths, block = {w for w in (8, 16, 32, 64, 128) if w < num_rows} | {num_slots, num_rows}, 128
        sizes = {t for t in (256 << i for i in range(8)) if t < most} | {most}
        widths = {w if w < 16 else _multiple(w, 16) for w in widths}
        # Few rows beside a prompt are common, and their attention is shared by more programs.
        mixed = {_multiple(w, 16) for w in (min(widths), num_rows)}
        num_rows = max(mixed)
    chunks = {t: min(num_slots, max(4, t // 64)) for t in sizes}
    total = num_rows + max(chunks.values())
    if on_cpu:
        samples = [8, total] if total > 16 else [total]
    else:
        samples = sorted({min(8, num_slots), min(64, num_rows), num_rows, total})

    def bucket(width: int, tokens: int, count: int) -> Bucket:
        num_samples = next(n for n in samples if n >= width + count)
        return Bucket(width, tokens, count, num_samples, min(block, tokens) if count else block)

    return [
        *(bucket(width, width, 0) for width in sorted(widths)),
        *(bucket(min(width, t), t, chunks[t]) for t in sorted(sizes) for width in sorted(mixed)),
    ]


def _multiple(least: int, of: int) -> int:
    return -(-least // of) * of


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def read_dummy_config(path: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """config.json and generation_config.json of a directory that needs no weights, and the directory."""
    directory = Path(path) if Path(path).is_dir() else Path(path).parent
    file = directory / "config.json" if Path(path).is_dir() else Path(path)
    try:
        hf_config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: load_format=dummy needs a config.json: {error}") from error
    generation = directory / "generation_config.json"
    return hf_config, json.loads(generation.read_text()) if generation.is_file() else {}, str(directory)


def _dtype(asked: str, hf_config: dict[str, Any], on_cpu: bool) -> Any:
    if asked != "auto":
        return jnp.dtype(asked)
    if on_cpu:
        return jnp.dtype(jnp.float32)
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16"
    return jnp.dtype(jnp.bfloat16 if stored == "float32" else stored)


def _context_len(config: ServerConfig, max_position: int) -> int:
    if config.context_length is not None and config.context_length > max_position:
        raise ConfigError(
            f"context_length={config.context_length} exceeds the model's {max_position}; "
            f"use {max_position} or less"
        )
    return config.context_length or max_position
