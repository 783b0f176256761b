"""The birth of an engine: devices, checkpoint, mesh, weights, KV pool, compiled programs.

Whatever can be refused is refused before weights are read. `prepare_devices` must run before jax
touches a backend.
"""

import contextlib
import functools
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxserve import mesh as meshes
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine import kept_programs
from jaxserve.engine.blueprint import Blueprint, draw, read_dummy_config
from jaxserve.engine.constraints import Constraints
from jaxserve.engine.expert_state import Balancing, ExpertState, expert_leaves
from jaxserve.engine.follow import compile_alike, model_facts
from jaxserve.engine.kept_programs import KeptPrograms
from jaxserve.engine.multihost import Hosts, config_facts, shared_keys
from jaxserve.engine.programs import ModelFunction
from jaxserve.engine.quantization import declare_model
from jaxserve.engine.rank import Limits
from jaxserve.engine.runner import Runner, Sizes
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.layers.channel_quant import ChannelScaled
from jaxserve.layers.kv import PoolLayout
from jaxserve.layers.linear import Projections
from jaxserve.layers.placed import Placed
from jaxserve.messages import Info, Progress
from jaxserve.parallel.links import LinkPlan
from jaxserve.text.matcher import Vocabulary
from jaxserve.text.tokenizer import Tokenizer, TokenizerError
from jaxserve.weights import Checkpoint, load, load_dummy, open_checkpoint
from jaxserve.weights.safetensors import read_config

logger = logging.getLogger(__name__)

XLA_POOL_FRACTION = 0.94  # of GPU memory that XLA's allocator may use: static part and workspace

Report = Callable[[Progress], None]


def prepare_devices(config: ServerConfig) -> None:
    """Choose the platform, virtual CPU devices and the compilation cache; before any backend exists."""
    if config.device != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "cuda": "cuda"}[config.device])
    if config.device != "cpu":
        # Only this instance's GPUs: XLA reserves memory on every GPU that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = _choose_gpus(config, _given_gpus())
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(XLA_POOL_FRACTION))
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with contextlib.suppress(RuntimeError):  # a backend exists already; make_mesh counts its devices
        jax.config.update("jax_num_cpu_devices", config.local_devices)
    cache = config.compile_cache_dir or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "jaxserve", "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@functools.cache
def _given_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES as the process was given it, which the first engine changes."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _choose_gpus(config: ServerConfig, given: str | None) -> str:
    """Those of this instance on this host. Raises ConfigError; an empty `given` leaves none, for a CPU."""
    if given is None:
        names = [str(i) for i in range(config.base_gpu_id + config.local_devices)]
    else:
        names = [name for name in given.split(",") if name.strip()]
    chosen = names[config.base_gpu_id :][: config.local_devices]
    if len(chosen) < config.local_devices and (names or config.device == "cuda"):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={given} leaves {len(chosen)} GPUs from base_gpu_id={config.base_gpu_id} "
            f"on, where {config.local_devices} are wanted here; name more there, or ask for fewer (tp, "
            "dp_size)"
        )
    return ",".join(chosen)


class _Source(NamedTuple):
    """A model's files, opened; `checkpoint` is None where weights are drawn."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_dir: str
    checkpoint: Checkpoint | None


class Built(NamedTuple):
    """`constraints` is None where no grammars are served."""

    scheduler: Scheduler
    runner: Runner
    info: Info
    stats: Stats
    constraints: Constraints | None


def build(config: ServerConfig, report: Report, hosts: Hosts | None = None) -> Built:
    """Everything an EngineLoop needs, ready to serve. Raises ConfigError or CheckpointError.

    `hosts` are those of the instance that have met, when it has several; all return at the same time.
    """
    begin_s = time.monotonic()
    layout = meshes.layout_of(config)
    _check_process(config, hosts)
    source = _open(config)
    devices = _find_devices(config)
    mesh = meshes.make_mesh(layout, devices)
    blueprint = draw(config, source.config, mesh, devices[0].platform == "cpu")
    # No room is an error now, not after minutes of loading.
    blueprint.num_pages(_device_memory(blueprint)[0], blueprint.weight_bytes_of_device)
    facts = model_facts(source.config, source.checkpoint.tensors.values() if source.checkpoint else ())
    if hosts is not None:
        hosts.agree("model", facts)

    constraints = _constraints(config, source, blueprint)  # its thread works while weights are read
    load_s = time.monotonic()
    _load(blueprint, source, mesh, report)
    load_s = time.monotonic() - load_s
    num_pages = blueprint.num_pages(*_device_memory(blueprint))
    if hosts is not None:  # the host with the least room decides for all
        num_pages = hosts.agree("memory", {}, {"pages": num_pages})["pages"]
    runner = _make_runner(blueprint, mesh, num_pages)
    compile_s = time.monotonic()
    _compile(runner, blueprint, mesh, facts, hosts, report)
    compile_s = time.monotonic() - compile_s
    if not blueprint.on_cpu:
        runner.warm_up(lambda done, total: report(Progress("warming up", done, total)))
    if hosts is not None:
        hosts.agree("ready", {"programs": repr(runner.program_keys)})

    limits = Limits(
        num_pages=num_pages,
        page_size=config.page_size,
        num_slots=blueprint.num_slots,
        step_tokens=max(b.num_tokens for b in runner.buckets),
        prefill_tokens=blueprint.prefill_tokens(num_pages),
        prefill_chunks=max(b.chunks for b in runner.buckets),
        num_checkpoints=blueprint.num_checkpoints,
        decode_steps=blueprint.decode_steps,
    )
    share = not config.disable_radix_cache
    scheduler = Scheduler(limits, layout.dp, share, seeds=_seeds(config), drafter=blueprint.drafter())
    stats = Stats(layout.dp)
    _count_compiles(stats)
    info = Info(
        model_path=config.model_path,
        architectures=list(source.config.get("architectures", [])),
        model_type=source.config.get("model_type", ""),
        dtype=jnp.dtype(blueprint.dtype).name,
        quantization=config.quantization or "",
        kv_cache_dtype=blueprint.kv_dtype.name,
        vocab_size=blueprint.model.vocab_size,
        context_len=blueprint.context_len,
        eos_token_ids=_eos_ids(source.config, source.generation_config),
        tokenizer_dir=source.tokenizer_dir,
        generation_config=source.generation_config,
        page_size=config.page_size,
        max_total_num_tokens=num_pages * config.page_size * layout.dp,
        max_req_len=blueprint.max_req_len(num_pages),
        max_running_requests=blueprint.num_slots * layout.dp,
        chunked_prefill_size=limits.prefill_tokens,
        dp_size=layout.dp,
        instance_id=uuid.uuid4().hex,
        device_kind=devices[0].device_kind,
        num_devices=layout.num_devices,
        weight_bytes=runner.weight_bytes,
        kv_cache_bytes=blueprint.page_bytes * num_pages * layout.dp,
        load_weights_s=load_s,
        compile_s=compile_s,
        startup_s=time.monotonic() - begin_s,
    )
    return Built(scheduler, runner, info, stats, constraints)


# ---- in the order of a start ----


def _check_process(config: ServerConfig, hosts: Hosts | None) -> None:
    """Raises ConfigError for what takes several processes, in one."""
    if config.nnodes > 1 and hosts is None:
        raise ConfigError(
            f"nnodes={config.nnodes}: an engine in this process has one host; use launch_server"
        )
    if config.dp_size > config.attention_dp:
        raise ConfigError(
            f"dp_size={config.dp_size} without enable_dp_attention makes full replicas, and an engine in "
            "this process is one; use launch_server, or enable_dp_attention"
        )


def _open(config: ServerConfig) -> _Source:
    if config.load_format == "dummy":
        return _Source(*read_dummy_config(config.model_path), None)
    check = functools.partial(_refuse_early, config)
    checkpoint = open_checkpoint(config.model_path, config.revision, config.load_format, check)
    return _Source(checkpoint.config, checkpoint.generation_config, str(checkpoint.tokenizer_dir), checkpoint)


def _refuse_early(config: ServerConfig, directory: Path) -> None:
    """Before weights are fetched. Raises ConfigError for a model or a tokenizer that is not served."""
    declare_model(config, read_config(directory), jnp.bfloat16)
    if not config.skip_tokenizer_init and config.tokenizer_path is None:
        try:
            Tokenizer.from_dir(str(directory))
        except TokenizerError as error:
            raise ConfigError(f"{error}; --skip-tokenizer-init serves token ids without one") from error


def _constraints(config: ServerConfig, source: _Source, blueprint: Blueprint) -> Constraints | None:
    """For the grammars of requests, on the host that receives them."""
    if config.grammar_backend == "none" or config.skip_tokenizer_init or config.node_rank:
        return None
    eos = _eos_ids(source.config, source.generation_config)
    directory = config.tokenizer_path or source.tokenizer_dir

    def make() -> Vocabulary:
        tokenizer = Tokenizer.from_dir(directory)
        return Vocabulary(tokenizer, blueprint.model.vocab_size, {*eos, *tokenizer.eos_token_ids})

    return Constraints(make)


def _load(blueprint: Blueprint, source: _Source, mesh: Mesh, report: Report) -> None:
    """Give the blueprint's model its weights, and join those of products with one input."""
    model = blueprint.model

    def progress(done: int, total: int) -> None:
        report(Progress("loading weights", done, total))

    if source.checkpoint is None:
        load_dummy(model, blueprint.sharding, blueprint.config.random_seed or 0, progress)
    else:
        load(model, source.checkpoint, blueprint.sharding, progress)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, ChannelScaled):
            node.is_alone = mesh.size == 1
        elif isinstance(node, Placed):
            node.place(blueprint.sharding(node.numbers))
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Projections):
            node.fuse(mesh if mesh.size > 1 else None)


def _make_runner(blueprint: Blueprint, mesh: Mesh, num_pages: int) -> Runner:
    config = blueprint.config
    graph, state = nnx.split(blueprint.model)
    leaves, treedef = jax.tree.flatten(state)
    # Halves of a step overlap in an order that devices need not share.
    links = None if config.disable_custom_all_reduce or blueprint.two_batches else LinkPlan.of(mesh)
    function = ModelFunction(
        graph, treedef, blueprint.experts, blueprint.expert_backend, blueprint.two_batches, links
    )
    sizes = Sizes(
        num_ranks=blueprint.layout.dp,
        num_pages=num_pages,
        page_size=config.page_size,
        num_slots=blueprint.num_slots,
        pages_per_seq=-(-blueprint.max_req_len(num_pages) // config.page_size),
        vocab_size=blueprint.model.vocab_size,
    )
    return Runner(
        function,
        leaves,
        _make_pools(blueprint, num_pages),
        mesh,
        sizes,
        blueprint.buckets(num_pages),
        _expert_state(blueprint, leaves),
        _make_states(blueprint),
        blueprint.num_nextn,
        blueprint.decode_steps,
        config.grammar_backend != "none",
    )


def _compile(
    runner: Runner,
    blueprint: Blueprint,
    mesh: Mesh,
    facts: dict[str, Any],
    hosts: Hosts | None,
    report: Report,
) -> None:
    """All programs: from the cache, or on each host the same ones in the same order."""
    config = blueprint.config
    programs = {"sizes": repr(runner.sizes), "buckets": repr(runner.buckets)}

    def progress(done: int, total: int) -> None:
        report(Progress("compiling", done, total))

    if hosts is not None:
        hosts.agree("programs", programs)
        compile_alike(runner, hosts, repr((config_facts(config), facts, programs)), progress)
        return
    settling = [
        shared_keys(config), facts, programs, blueprint.num_nextn, blueprint.decode_steps, repr(runner.links)
    ]  # fmt: skip
    runner.compile_all(progress, _kept_programs(settling, mesh))


def _seeds(config: ServerConfig) -> random.Random:
    """Of requests that bring none. Replicas have devices of their own, and so do not draw the same."""
    if config.random_seed is None:
        return random.Random()
    return random.Random(f"{config.random_seed} {config.base_gpu_id}")


def _find_devices(config: ServerConfig) -> list[Any]:
    """jax's devices. Raises ConfigError when they are not of the kind that was asked for."""
    try:
        devices = jax.devices()
        reason = f"jax runs on {devices[0].platform} in this process"
    except (RuntimeError, AssertionError) as error:  # the second by jax, where a platform has no plugin
        devices, reason = [], str(error) or "jax has no plugin for it"
    if devices and (config.device == "auto" or (devices[0].platform == "cpu") == (config.device == "cpu")):
        return devices
    cure = (
        "; install the cuda13 or cuda12 extra, name GPUs that are there (CUDA_VISIBLE_DEVICES="
        f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')} in this process, by base_gpu_id, dp_size and tp), or "
        "use device=cpu"
    )
    raise ConfigError(
        f"device={config.device} is not there ({reason}){'' if config.device == 'cpu' else cure}"
    )


def _kept_programs(facts: Any, mesh: Mesh) -> KeptPrograms | None:
    """None in a process whose engines are not as their sources say."""
    if not kept_programs.in_use:
        return None
    return KeptPrograms(Path(jax.config.jax_compilation_cache_dir), facts, mesh)


def _expert_state(blueprint: Blueprint, leaves: list[jax.Array]) -> ExpertState | None:
    spec, config, layout = blueprint.experts, blueprint.config, blueprint.layout
    if spec is None:
        return None
    balancing = None
    if config.enable_eplb:
        balancing = Balancing(
            expert_leaves(blueprint.model, leaves),
            config.eplb_rebalance_num_iterations,
            config.eplb_rebalance_layers_per_chunk,
        )
    assert isinstance(blueprint.mesh, Mesh)
    return ExpertState(spec, layout.dp, blueprint.mesh, layout.ep, balancing)


def _eos_ids(hf_config: dict[str, Any], generation_config: dict[str, Any]) -> list[int]:
    ids: list[int] = []
    for source in (generation_config, hf_config):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(ids))


def _device_memory(blueprint: Blueprint) -> tuple[int, int]:
    """(all, used) bytes of a device; on CPU the host's memory divided by the devices."""
    if blueprint.on_cpu:
        return psutil.virtual_memory().total // jax.local_device_count(), blueprint.weight_bytes_of_device
    stats = jax.local_devices()[0].memory_stats()
    fraction = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    return int(stats["bytes_limit"] / fraction), stats["bytes_in_use"]


def _make_pools(blueprint: Blueprint, num_pages: int) -> tuple[jax.Array, jax.Array]:
    first, second = (
        _zeros(blueprint, layout, blueprint.kv_dtype) for layout in blueprint.pool_layouts(num_pages)
    )
    return first, second


def _make_states(blueprint: Blueprint) -> tuple[jax.Array, ...]:
    layout = blueprint.state_layout
    return () if layout is None else (_zeros(blueprint, layout, jnp.float32),)


def _zeros(blueprint: Blueprint, layout: PoolLayout, dtype: Any) -> jax.Array:
    shape, spec = layout
    sharding = NamedSharding(blueprint.mesh, spec)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _count_compiles(stats: Stats) -> None:
    """From now on every compilation in the engine's loop is a bug that a metric shows.

    jax calls the listener in the thread that compiles; others of the process may be a user's, or belong
    to another engine.
    """

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        in_loop = threading.get_ident() == stats.loop_thread
        if in_loop and event == "/jax/core/compile/backend_compile_duration":
            stats.compiles_after_ready += 1
            logger.warning("a program was compiled after readiness")

    jax.monitoring.register_event_duration_secs_listener(listen)
