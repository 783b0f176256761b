"""Rows of `tools.bench_ops` for matrix products: a dense layer's and experts', in 16, 8 and 4 bits.

The dense row is one Llama-3.1-8B layer without attention (qkv, output, gate and up, down), so that what
quantises activations and applies scales between the products is in it, and weights come from memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxserve.engine.compiler import gemm_options
from jaxserve.layers.channel_quant import Scheme, quantise
from jaxserve.layers.moe import silu_gated
from jaxserve.models.gpt_oss import ClampedGate
from jaxserve.ops import float8_rows, four_bits, gated_product, grouped_gemm, mxfp4, quantized_gemm
from jaxserve.ops.block_product import BLOCK
from jaxserve.ops.grouped_gemm import ExpertWeights
from tools.bench_timing import Card, Row, seconds

Product = Callable[[jax.Array, Any], jax.Array]
Way = Literal["bf16", "fp8 weight-only", "int8 weight-only", "fp8 W8A8"]
WAYS: tuple[Way, ...] = ("bf16", "fp8 weight-only", "int8 weight-only", "fp8 W8A8")
ROWS = (8, 16, 32, 64, 256, 2048)


@dataclass(frozen=True)
class LayerSizes:
    """Widths of a dense layer: model, feed-forward, and queries, keys and values together."""

    D: int = 4096
    F: int = 14336
    QKV: int = 6144

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "qkv": (self.QKV, self.D),
            "out": (self.D, self.D),
            "gate_up": (2 * self.F, self.D),
            "down": (self.D, self.F),
        }


@dataclass(frozen=True)
class ExpertSizes:
    """Of Qwen3-30B-A3B; `biased` experts are GPT-OSS's, with its clamped gate."""

    E: int = 128
    X: int = 8
    D: int = 2048
    F: int = 768
    biased: bool = False


GPT_OSS_20B = ExpertSizes(E=32, X=4, D=2880, F=2880, biased=True)


def random(seed: int, shape: tuple[int, ...]) -> jax.Array:
    def make(seed: jax.Array) -> jax.Array:
        return (jax.random.normal(jax.random.key(seed), shape) * shape[-1] ** -0.5).astype(jnp.bfloat16)

    return jax.jit(make)(seed)


def in_8_bits(wide: jax.Array, scheme: Scheme, num_out: int) -> tuple[jax.Array, jax.Array]:
    return jax.jit(quantise, static_argnums=(1, 2))(wide, scheme, num_out)


# ---- a dense layer ----


def product_of(way: Way) -> Product:
    """x [T, in] and the weights of one way: [T, out] in bfloat16."""
    match way:
        case "bf16":
            return lambda x, w: jnp.einsum("ti,oi->to", x, w)
        case "fp8 W8A8":
            return lambda x, w: quantized_gemm.multiply_float8(
                float8_rows.quantise(x), w[0], w[1], jnp.bfloat16
            ).value(jnp.bfloat16)
        case _:
            return lambda x, w: quantized_gemm.multiply_wide(x, w[0], w[1], jnp.bfloat16)


def gated(way: Way, x: jax.Array, weight: Any, by_kernel: bool) -> jax.Array:
    """silu(gate) * up, by the kernel or by XLA: [T, F]."""
    if not by_kernel:
        gate, up = jnp.split(product_of(way)(x, weight), 2, axis=1)
        return jax.nn.silu(gate) * up
    if way == "bf16":
        return gated_product.multiply(x, weight, None, jax.nn.silu, x.dtype)
    (matrix, scale_W), (rows, scale_T1) = weight, float8_rows.quantise(x)
    return gated_product.multiply(rows, matrix, (scale_T1, scale_W), jax.nn.silu, x.dtype)


def has_kernel(way: Way, rows: int, sizes: LayerSizes) -> bool:
    """Whether the engine would gate so many rows by the kernel."""
    if way not in ("bf16", "fp8 W8A8"):
        return False
    dtype = jnp.bfloat16 if way == "bf16" else jnp.float8_e4m3fn
    return gated_product.fits(rows, jax.ShapeDtypeStruct((2 * sizes.F, sizes.D), dtype))


def bench_gated(card: Card, way: Way, rows: int, sizes: LayerSizes, by_kernel: bool) -> Row:
    """What makes float8 rows of x included."""
    weight: Any = random(1, (2 * sizes.F, sizes.D))
    if way != "bf16":
        weight = in_8_bits(weight, "fp8", 1)
    options = gemm_options(False) if jax.default_backend() == "gpu" else None
    x = random(9, (rows, sizes.D))
    s = seconds(
        lambda x, i, weight: gated(way, x, weight, by_kernel),
        x,
        weight,
        iterations=50 if rows < 2048 else 10,
        options=options,
    )
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) + 2 * rows * (sizes.D + sizes.F)
    flops = 2 * rows * 2 * sizes.F * sizes.D
    floor_s = card.floor_s(num_bytes, flops, fp8=way != "bf16")
    shape = f"T{rows} {way}, {'the kernel' if by_kernel else 'XLA'}"
    return Row("gated", shape, s * 1e6, floor_s * 1e6, f"{flops / s / 1e12:.0f} TFLOP/s")


def gated_rows(
    card: Card, sizes: LayerSizes | None = None, rows: tuple[int, ...] = (128, 256, 2048)
) -> list[Row]:
    ways: tuple[Way, ...] = ("bf16", "fp8 W8A8")
    sizes = sizes or LayerSizes()
    return [
        bench_gated(card, way, count, sizes, by_kernel)
        for count in rows
        for way in ways
        for by_kernel in ((True, False) if has_kernel(way, count, sizes) else (False,))
    ]


def bench_layer(card: Card, way: Way, rows: int, sizes: LayerSizes, triton: bool, iterations: int) -> Row:
    """`triton`: whether XLA may choose its Triton GEMMs, beside cuBLASLt's."""
    weights: dict[str, Any] = {n: random(i, shape) for i, (n, shape) in enumerate(sizes.shapes().items())}
    if way != "bf16":
        scheme: Scheme = "int8" if way.startswith("int8") else "fp8"
        weights = {name: in_8_bits(wide, scheme, 1) for name, wide in weights.items()}
    product = product_of(way)

    def layer(x: jax.Array, i: jax.Array, weights: dict[str, Any]) -> jax.Array:
        x = x + product(product(x, weights["qkv"])[:, : sizes.D], weights["out"])
        inner = gated(way, x, weights["gate_up"], has_kernel(way, rows, sizes))
        x = x + product(inner, weights["down"])
        return x / (1 + jnp.abs(x).max())  # stays finite however often

    options = gemm_options(triton) if jax.default_backend() == "gpu" else None
    x = random(9, (rows, sizes.D))
    s = seconds(layer, x, weights, iterations=iterations, carry=True, options=options)
    count = sum(out * inner for out, inner in sizes.shapes().values())
    flops, num_bytes = 2 * rows * count, sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    floor_s = card.floor_s(num_bytes, flops, fp8=way == "fp8 W8A8")
    rate = f"{num_bytes / s / 1e9:.0f} GB/s, {flops / s / 1e12:.0f} TFLOP/s"
    gemm = "Triton or cuBLASLt" if triton else "cuBLASLt"
    return Row("layer", f"T{rows} {way}, {gemm}", s * 1e6, floor_s * 1e6, rate)


def layer_rows(card: Card, sizes: LayerSizes | None = None, rows: tuple[int, ...] = ROWS) -> list[Row]:
    return [
        bench_layer(card, way, count, sizes or LayerSizes(), triton, iterations=20 if count < 2048 else 5)
        for count in rows
        for way in WAYS
        for triton in (True, False)
    ]


# ---- rows in float8 ----


def bench_operand(card: Card, made_by: Literal["norm", "gate"], rows: int, sizes: LayerSizes) -> Row:
    """From the rows behind a residual sum, or behind a joined product, to a product's operand.

    The floor is that of memory in one pass; rows that a step has just written may still be in the cache.
    """
    inputs, outputs = (sizes.D, sizes.D) if made_by == "norm" else (2 * sizes.F, sizes.F)
    x, channel = random(0, (rows, inputs)), jnp.ones((inputs,), jnp.float32)
    scale_T1 = jnp.ones((rows, 1), jnp.float32)

    def make(channel: jax.Array, i: jax.Array, x: jax.Array, scale_T1: jax.Array) -> jax.Array:
        if made_by == "norm":
            return float8_rows.normalise(x, channel, eps=1e-5).scale_T1
        product = (x.astype(jnp.float32) * scale_T1 * channel).astype(x.dtype)
        gate, up = jnp.split(product, 2, axis=1)
        return float8_rows.quantise(jax.nn.silu(gate) * up).scale_T1

    s = seconds(make, channel, x, scale_T1, iterations=100 if rows < 2048 else 20)
    num_bytes = (
        x.nbytes + channel.nbytes + rows * (outputs + 4) + (scale_T1.nbytes if made_by == "gate" else 0)
    )
    rate = f"{num_bytes / s / 1e9:.0f} GB/s"
    return Row(
        "rows", f"T{rows} {inputs} to {outputs} fp8, {made_by}", s * 1e6, card.floor_s(num_bytes) * 1e6, rate
    )


def operand_rows(
    card: Card, sizes: LayerSizes | None = None, rows: tuple[int, ...] = (64, 256, 4096)
) -> list[Row]:
    ways: tuple[Literal["norm", "gate"], ...] = ("norm", "gate")
    return [bench_operand(card, way, count, sizes or LayerSizes()) for count in rows for way in ways]


# ---- experts ----


ExpertScheme = Literal["bf16", "fp8", "fp8 blocks", "int8", "mxfp4"]


def in_blocks(wide: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float8 numbers [E, N, K], and scales [E, N / 128, K / 128]."""
    E, N, K = wide.shape
    blocks = wide.astype(jnp.float32).reshape(E, N // BLOCK, BLOCK, K // BLOCK, BLOCK)
    scale = jnp.max(jnp.abs(blocks), axis=(2, 4)) / float8_rows.FLOAT8_MAX
    return (blocks / scale[:, :, None, :, None]).astype(jnp.float8_e4m3fn).reshape(wide.shape), scale


def in_4_bits(seed: int, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Any packed numbers of matrices [E, N, K], and exponents that keep the size of activations."""
    E, N, K = shape
    tiles, powers = N // four_bits.ROWS, K // mxfp4.GROUP
    packed = jax.random.bits(
        jax.random.key(seed), (E, tiles, powers * four_bits.LINES, four_bits.LINE), jnp.uint8
    )
    return packed, jnp.full((E, tiles, powers, four_bits.LINE), mxfp4.stored_exponent(120), jnp.uint8)


def expert_weights(scheme: ExpertScheme, sizes: ExpertSizes) -> ExpertWeights:
    E, D, F = sizes.E, sizes.D, sizes.F
    shapes = (E, F, D), (E, F, D), (E, D, F)
    biases = [random(3 + i, shape[:2]) for i, shape in enumerate(shapes)] if sizes.biased else (None,) * 3
    match scheme:
        case "bf16":
            return ExpertWeights(*(random(i, shape) for i, shape in enumerate(shapes)), *biases)
        case "mxfp4":
            gate_up, gate_scale = in_4_bits(0, (E, 2 * F, D))
            down, down_scale = in_4_bits(1, (E, D, F))
            return ExpertWeights(gate_up, None, down, *biases, gate_scale=gate_scale, down_scale=down_scale)
        case "fp8 blocks":
            numbers, scales = zip(*(jax.jit(in_blocks)(random(i, shape)) for i, shape in enumerate(shapes)))
        case _:
            pairs = (in_8_bits(random(i, shape), scheme, 2) for i, shape in enumerate(shapes))
            numbers, scales = zip(*((numbers, scale[..., None]) for numbers, scale in pairs))
    return ExpertWeights(*numbers, *biases, *scales)


def bench_experts(card: Card, scheme: ExpertScheme, tokens: int, sizes: ExpertSizes, iterations: int) -> Row:
    E, X, D, F = sizes.E, sizes.X, sizes.D, sizes.F
    weights = expert_weights(scheme, sizes)
    activation = ClampedGate(1.702, 7.0) if sizes.biased else silu_gated
    _, expert_TX = jax.lax.top_k(jax.random.normal(jax.random.key(5), (tokens, E)), X)
    weight_TX = jnp.full((tokens, X), 1 / X)

    def feed(x, i, weights, expert_TX, weight_TX):
        chosen_TX = (expert_TX + i) % E  # others in every call
        return grouped_gemm.feed_forward(x, chosen_TX, weight_TX, weights, activation).astype(x.dtype)

    x = random(6, (tokens, D))
    s = seconds(feed, x, weights, expert_TX, weight_TX, iterations=iterations)
    touched = len(set(map(int, expert_TX.ravel()))) / E
    num_bytes = touched * sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    flops = 2 * tokens * X * 3 * D * F
    rate = f"{num_bytes / s / 1e9:.0f} GB/s, {flops / s / 1e12:.0f} TFLOP/s"
    floor_s = card.floor_s(num_bytes, flops, fp8=scheme.startswith("fp8"))
    return Row("experts", f"T{tokens} E{E} top-{X} {scheme}", s * 1e6, floor_s * 1e6, rate)


def expert_rows(
    card: Card, sizes: ExpertSizes | None = None, tokens: tuple[int, ...] = (8, 32, 256, 2048)
) -> list[Row]:
    schemes: tuple[ExpertScheme, ...] = ("bf16", "fp8", "fp8 blocks", "int8")
    kinds: list[tuple[ExpertSizes, tuple[ExpertScheme, ...]]] = [(sizes or ExpertSizes(), schemes)]
    if sizes is None:
        kinds.append((GPT_OSS_20B, ("bf16", "mxfp4")))
    return [
        bench_experts(card, scheme, count, of, iterations=20)
        for count in tokens
        for of, those in kinds
        for scheme in those
    ]
