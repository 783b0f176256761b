"""The birth of an engine: devices, checkpoint, mesh, weights, KV pool, compiled programs.

Whatever can be refused is refused before weights are read. `prepare_devices` must run before jax
touches a backend.
"""

import contextlib
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve import mesh as meshes
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.batch import Bucket
from jaxserve.engine.programs import ModelFunction
from jaxserve.engine.runner import Runner, Sizes
from jaxserve.engine.scheduler import Limits, Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.layers.kv import pool_layouts
from jaxserve.layers.linear import Projections
from jaxserve.messages import Info, Progress
from jaxserve.models import resolve
from jaxserve.parallel.dispatch import choose_backend
from jaxserve.weights import CheckpointError, load, load_dummy, open_checkpoint

logger = logging.getLogger(__name__)

XLA_POOL_FRACTION = 0.94  # of GPU memory that XLA's allocator may use: static part and workspace
CPU_POOL_TOKENS = 65536  # KV capacity on CPU unless memory or a flag says otherwise
CPU_FRACTION, GPU_FRACTION = 0.25, 0.88

Report = Callable[[Progress], None]


def prepare_devices(config: ServerConfig) -> None:
    """Choose the platform, virtual CPU devices and the compilation cache; before any backend exists."""
    if config.device != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "cuda": "cuda"}[config.device])
    if config.device != "cpu":
        # Only this instance's GPUs: XLA reserves memory on every GPU that it sees.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(config.base_gpu_id + config.tp)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[config.base_gpu_id :][: config.tp])
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(XLA_POOL_FRACTION))
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with contextlib.suppress(RuntimeError):  # a backend exists already; make_mesh counts its devices
        jax.config.update("jax_num_cpu_devices", config.tp)
    cache = config.compile_cache_dir or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "jaxserve", "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def build(config: ServerConfig, report: Report) -> tuple[Scheduler, Runner, Info, Stats]:
    """Everything an EngineLoop needs, ready to serve. Raises ConfigError or CheckpointError."""
    begin_s = time.monotonic()
    layout = meshes.layout_of(config)
    _refuse_unbuilt(config)
    checkpoint = (
        None if config.load_format == "dummy" else open_checkpoint(config.model_path, config.revision)
    )
    if checkpoint is None:
        hf_config, generation_config, tokenizer_dir = _read_dummy_config(config.model_path)
    else:
        hf_config, generation_config = checkpoint.config, checkpoint.generation_config
        tokenizer_dir = str(checkpoint.tokenizer_dir)

    devices = jax.devices()
    mesh = meshes.make_mesh(layout, devices)
    on_cpu = devices[0].platform == "cpu"
    dtype = _dtype(config.dtype, hf_config, on_cpu)
    model = resolve(hf_config)(hf_config, dtype)
    experts = getattr(model, "experts", None)
    if layout.ep > 1 and experts is None:
        raise ConfigError(f"ep={layout.ep}: this model has no experts; use ep 1")
    table = meshes.rules(
        layout,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.kv.num_kv_heads,
        vocab_size=model.vocab_size,
        num_experts=experts.num_experts if experts else None,
    )
    expert_backend = choose_backend(config.moe_a2a_backend, layout.ep)
    if config.moe_runner_backend is not None:
        logger.info(
            "moe_runner_backend=%s: experts run in this engine's grouped GEMM", config.moe_runner_backend
        )

    def sharding(param: nnx.Param) -> NamedSharding:
        return meshes.weight_sharding(mesh, table, param)

    def progress(done: int, total: int) -> None:
        report(Progress("loading weights", done, total))

    load_s = time.monotonic()
    if checkpoint is None:
        load_dummy(model, sharding, config.random_seed, progress)
    else:
        load(model, checkpoint, sharding, progress)
    if mesh.size == 1:
        for _, node in nnx.iter_graph(model):
            if isinstance(node, Projections):
                node.fuse()
    load_s = time.monotonic() - load_s
    graph, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    weight_bytes = sum(leaf.nbytes for leaf in leaves)

    context_len = _context_len(config, model.max_position)
    num_slots = config.max_running_requests or (32 if on_cpu else 256)
    page_bytes, num_pages = _pool_size(config, model, mesh, dtype, on_cpu, num_slots, context_len)
    max_req_len = min(context_len, num_pages * config.page_size)
    sizes = Sizes(
        num_ranks=layout.dp,
        num_pages=num_pages,
        page_size=config.page_size,
        num_slots=num_slots,
        pages_per_seq=-(-max_req_len // config.page_size),
        vocab_size=model.vocab_size,
    )
    buckets = choose_buckets(config, num_slots, max_req_len, on_cpu)
    pools = _make_pools(model, mesh, sizes, dtype)
    function = ModelFunction(graph, treedef, experts, expert_backend)
    runner = Runner(function, leaves, pools, mesh, sizes, buckets)
    compile_s = time.monotonic()
    runner.compile_all(lambda done, total: report(Progress("compiling", done, total)))
    compile_s = time.monotonic() - compile_s

    limits = Limits(
        num_pages=num_pages,
        page_size=config.page_size,
        num_slots=num_slots,
        prefill_tokens=max(b.prefill_tokens for b in buckets),
        prefill_chunks=max(b.chunks for b in buckets),
        max_req_len=max_req_len,
    )
    stats = Stats(layout.dp)
    _count_compiles(stats)
    info = Info(
        model_path=config.model_path,
        architectures=list(hf_config.get("architectures", [])),
        model_type=hf_config.get("model_type", ""),
        dtype=jnp.dtype(dtype).name,
        vocab_size=model.vocab_size,
        context_len=context_len,
        eos_token_ids=_eos_ids(hf_config, generation_config),
        tokenizer_dir=tokenizer_dir,
        generation_config=generation_config,
        page_size=config.page_size,
        max_total_num_tokens=num_pages * config.page_size * layout.dp,
        max_req_len=max_req_len,
        max_running_requests=num_slots * layout.dp,
        dp_size=layout.dp,
        instance_id=uuid.uuid4().hex,
        device_kind=devices[0].device_kind,
        num_devices=layout.num_devices,
        weight_bytes=weight_bytes,
        kv_cache_bytes=page_bytes * num_pages * layout.dp,
        load_weights_s=load_s,
        compile_s=compile_s,
        startup_s=time.monotonic() - begin_s,
    )
    return Scheduler(limits, layout.dp, not config.disable_radix_cache), runner, info, stats


def choose_buckets(config: ServerConfig, num_slots: int, max_req_len: int, on_cpu: bool) -> list[Bucket]:
    """The step shapes to compile: decode alone at several widths, and mixed steps at full width.

    On CPU few, since compiling is slow there; on GPU powers of two, since a decode step's time is
    that of its bucket; from 8 rows on, which take no longer than one (Llama-3.1-8B on an H100: 6.6
    against 6.7 ms, since XLA splits a norm of one row into more kernels).
    """
    chunk = config.chunked_prefill_size or (256 if on_cpu else 2048)
    chunk = min(chunk, _power_of_two(max_req_len))
    if on_cpu:
        widths, prefills, block = {min(4, num_slots), num_slots}, {min(32, chunk), chunk}, 32
        mixed = {num_slots}
    else:
        widths = {w for w in (8, 16, 32, 64, 128) if w < num_slots} | {num_slots}
        prefills, block = {min(256, chunk), chunk}, 128
        mixed = {min(widths), num_slots}  # few rows beside a prompt are common, and cost less GEMM
    chunks = {p: min(num_slots, max(4, p // 64)) for p in prefills}
    samples = sorted({min(8, num_slots), min(64, num_slots), num_slots, num_slots + max(chunks.values())})

    def bucket(width: int, tokens: int) -> Bucket:
        count = chunks[tokens] if tokens else 0
        num_samples = next(n for n in samples if n >= width + count)
        return Bucket(width, tokens, count, num_samples, min(block, tokens or block))

    return [
        *(bucket(width, 0) for width in sorted(widths)),
        *(bucket(width, tokens) for tokens in sorted(prefills) for width in sorted(mixed)),
    ]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _refuse_unbuilt(config: ServerConfig) -> None:
    """Layouts that are parsed but not served yet are refused by name, never ignored."""
    for name in ("enable_two_batch_overlap", "enable_eplb"):
        if getattr(config, name):
            raise ConfigError(f"{name} is not available in this version")
    if config.nnodes > 1:
        raise ConfigError(f"nnodes={config.nnodes}: several hosts are not available in this version; use 1")


def _read_dummy_config(path: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """config.json and generation_config.json of a directory that needs no weights."""
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


def _eos_ids(hf_config: dict[str, Any], generation_config: dict[str, Any]) -> list[int]:
    ids: list[int] = []
    for source in (generation_config, hf_config):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(ids))


def _pool_size(
    config: ServerConfig, model: Any, mesh: Mesh, dtype: Any, on_cpu: bool, num_slots: int, context_len: int
) -> tuple[int, int]:
    """(bytes of a page over all layers on one dp rank, pages of one dp rank)."""
    layouts = pool_layouts(model.kv, model.num_q_heads, num_pages=1, page_size=config.page_size, mesh=mesh)
    dp, itemsize = mesh.shape["dp"], jnp.dtype(dtype).itemsize
    page_bytes = sum(math.prod(shape) // dp * itemsize for shape, _ in layouts)
    shards = [NamedSharding(mesh, spec).shard_shape(shape) for shape, spec in layouts]
    per_device = sum(math.prod(shard) * itemsize for shard in shards)
    device = mesh.devices.flat[0]
    if on_cpu:
        total = psutil.virtual_memory().total // mesh.size
        used = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))) // mesh.size
    else:
        stats = device.memory_stats()
        fraction = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        total, used = int(stats["bytes_limit"] / fraction), stats["bytes_in_use"]
    fraction = config.mem_fraction_static or (CPU_FRACTION if on_cpu else GPU_FRACTION)
    fits = int(total * fraction - used) // per_device
    # More than every slot at full length is never read at once; the rest would only cache prefixes.
    wanted = fits
    if config.max_total_tokens is not None:
        wanted = -(-config.max_total_tokens // config.page_size)
    elif on_cpu and config.mem_fraction_static is None:
        wanted = min(fits, max(CPU_POOL_TOKENS, context_len) // config.page_size)
    if wanted > fits or wanted < 1:
        needed, left = max(wanted, 1) * per_device / 2**30, max(fits, 0) * per_device / 2**30
        raise ConfigError(
            f"{max(wanted, 1) * config.page_size} tokens of KV need {needed:.2f} GiB a device; "
            f"{left:.2f} GiB are left of mem_fraction_static={fraction:g}; lower max_total_tokens"
        )
    return page_bytes, wanted


def _make_pools(model: Any, mesh: Mesh, sizes: Sizes, dtype: Any) -> tuple[jax.Array, jax.Array]:
    layouts = pool_layouts(
        model.kv, model.num_q_heads, num_pages=sizes.num_pages, page_size=sizes.page_size, mesh=mesh
    )

    def make(shape: tuple[int, ...], spec: PartitionSpec) -> jax.Array:
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=NamedSharding(mesh, spec))()

    first, second = layouts
    return make(*first), make(*second)


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
