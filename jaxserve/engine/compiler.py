"""How a device program is compiled, and with which of XLA's options."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.stages import Lowered

from jaxserve.engine import programs
from jaxserve.engine.batch import Bucket
from jaxserve.engine.programs import Variant

logger = logging.getLogger(__name__)

# Collectives run beside computation, and those of two half batches are not joined to one that waits for both.
OVERLAP_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
}


def compiler_options(program: Any, has_int8: bool = False) -> dict[str, Any]:
    """XLA's options for one program; only on a GPU.

    XLA's Triton GEMMs are the faster ones below 64 rows and cuBLASLt's from there on (Llama-3.1-8B
    shape on an H100: 5.07 against 5.35 ms at 1 row, 5.77 against 5.35 at 64, 44.7 against 42.7 at
    2,048), and compile several times faster. Weights in int8 stay with Triton longer: only it widens them
    inside the product, while cuBLASLt is given a bfloat16 copy that every step makes anew (seen in
    programs compiled for an H100), 5 bytes a number.
    Rematerialization is off: where weights and KV take more than 80 % of a device's memory, XLA (jaxlib
    0.11.2) finds no room for anything else and computes twice what it can, on two devices 11 kernels and an
    all-gather in each layer of DeepSeek-V2-Lite.
    Products of one input are joined when weights are loaded or not at all: XLA would join what is left, on
    a mesh, by copying the weights in every step (120 MB for a dense layer of DeepSeek-V2-Lite).
    Sums over devices are NCCL's: XLA's own kernel for them is at most 5 % faster, and takes memory for each
    sum of each program beside all that it was told it may use. Llama-3.1-8B on four H200, all sums XLA's,
    did not start.
    """
    if jax.default_backend() != "gpu":
        return {}
    triton_below = 64
    match program:
        case (Bucket() as bucket) | ("nextn" | "decode", Bucket() as bucket):
            rows = bucket.num_tokens
            triton_below = 512 if has_int8 else 64
        case ("score", _):
            rows = programs.SCORE_ROWS
        case (int(num_samples), Variant()):
            rows = num_samples
        case _:
            rows = 0
    return gemm_options(by_triton=rows < triton_below) | {
        "xla_disable_hlo_passes": "rematerialization",
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_gpu_experimental_use_collective_kernels": "",
    }


def gemm_options(by_triton: bool) -> dict[str, Any]:
    """Whose kernels products have: Triton's, those that XLA found to be the fastest, or cuBLASLt's choice.

    cuBLASLt chooses alone. XLA would time what it offers one by one on a cool card, while what a busy card
    is short of is power. Llama-3.1-8B on one H200, 16 prompts of 4,096 tokens: 42,270 tokens a second with
    what XLA chose and 43,880 without, in float8 66,830 and 68,560; decode of 64 rows and more is as fast
    or, in float8, 3 % faster.
    """
    if by_triton:
        return {"xla_gpu_enable_triton_gemm": True}
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def lower_program(
    function: Callable,
    args: tuple[Any, ...],
    donated: tuple[int, ...],
    shardings: Any,
    options: dict[str, Any],
    name: str,
) -> Lowered:
    """Trace a program. Those of an engine are to be traced in the same order at every start, and not at once.

    jax (0.11.2) numbers kernels for Hopper in a process, and the number is a part of their text: in another
    order the persistent cache knows none of their programs, and hosts do not have the same ones.
    """
    begin_s = time.monotonic()
    jitted = jax.jit(
        function, donate_argnums=donated, out_shardings=shardings, compiler_options=options or None
    )
    lowered = jitted.lower(*args)
    logger.debug("traced in %.1f s: %s", time.monotonic() - begin_s, name)
    return lowered


def compile_program(lowered: Lowered, name: str) -> Callable:
    begin_s = time.monotonic()
    compiled = lowered.compile()
    logger.debug("compiled in %.1f s: %s", time.monotonic() - begin_s, name)
    return compiled
