"""Time every kernel against its floor: python -m tools.bench_ops [--json PATH] [--only WORD].

The floor is the larger of bytes over memory bandwidth and operations over the matrix units' rate,
both measured on the same card first. Times are of one call inside a jitted loop, so they hold no
dispatch, but do hold the loop's own small kernels: some microseconds in the attention rows (not
measured apart); for sampling, whose loop rewrites the logits, see the row "loop alone". Rows "exchange"
are of machines with several GPUs.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.ops import mla_attention, paged_attention, sampling
from jaxserve.ops.kv_write.cached import cached
from jaxserve.ops.sampling import reference
from tools.bench_exchange import exchange_rows
from tools.bench_products import expert_rows, gated_rows, layer_rows, operand_rows
from tools.bench_timing import Card, Row, measure_card, seconds

H, G, K, PAGE_SIZE = 32, 8, 128, 16  # a Llama-3.1-8B layer
VOCABULARY = 128256


# ---- attention ----


Pool = tuple[jax.Array, jax.Array]


def make_pool(num_tokens: int, *inner: tuple[int, ...]) -> Pool:
    """Random pages of both arrays, given what a token has in each."""

    def make(seed: int, shape: tuple[int, ...]) -> jax.Array:
        shape = (num_tokens // PAGE_SIZE, PAGE_SIZE, *shape)
        return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))()

    return make(0, inner[0]), make(1, inner[-1])


def in_float8(pool: Pool) -> Pool:
    first, second = (jax.jit(cached, static_argnums=1)(x, jnp.float8_e4m3fn) for x in pool)
    return first, second


def named(kernel: str, pool: Pool) -> str:
    return f"{kernel} fp8" if pool[0].dtype.itemsize == 1 else kernel


def page_table(num_slots: int, context: int, num_tokens: int) -> jax.Array:
    pages = np.random.default_rng(0).permutation(num_tokens // PAGE_SIZE)
    per_slot = -(-context // PAGE_SIZE)
    return jnp.asarray(pages[: num_slots * per_slot].reshape(num_slots, per_slot), jnp.int32)


def bench_decode(pool, card: Card, R: int, context: int, table_len: int = 8192) -> Row:
    """R rows of `context` tokens, other slots in every call so that no cache helps.

    table_len: tokens that the page table has room for.
    """
    num_tokens = pool[0].shape[0] * PAGE_SIZE
    num_sets = max(1, min(32, num_tokens // (R * (context + PAGE_SIZE))))
    table = page_table(num_sets * R, context, num_tokens)
    table = jnp.pad(table, ((0, 0), (0, table_len // PAGE_SIZE - table.shape[1])))
    lens = jnp.full((R,), context, jnp.int32)
    query = jax.random.normal(jax.random.key(2), (R, H, K), jnp.bfloat16)

    def run(query, i, keys, values):
        slots = i % num_sets * R + jnp.arange(R)
        arrays = (query, keys, values, table, slots, lens)
        return paged_attention.decode(*arrays, page_offset=0, scale=K**-0.5)

    s = seconds(run, query, *pool, iterations=64 if R * context < 1 << 17 else 16)
    num_bytes = R * context * G * K * 2 * pool[0].dtype.itemsize
    floor_s = card.floor_s(num_bytes)
    return Row(
        named("decode", pool),
        f"B{R} ctx{context}",
        s * 1e6,
        floor_s * 1e6,
        f"{num_bytes / s / 1e9:.0f} GB/s",
    )


def bench_prefill(pool, card: Card, sequences: int, length: int, block_size: int) -> Row:
    num_tokens = pool[0].shape[0] * PAGE_SIZE
    table = page_table(sequences, length, num_tokens)
    per_sequence = length // block_size
    block = np.arange(sequences * per_sequence)
    blocks = (
        block // per_sequence,
        block * block_size,
        np.full_like(block, block_size),
        block % per_sequence * block_size,
    )
    blocks = [jnp.asarray(x, jnp.int32) for x in blocks]
    query = jax.random.normal(jax.random.key(2), (sequences * length, H, K), jnp.bfloat16)

    def run(query, i, keys, values):
        arrays = (query, keys, values, table, *blocks)
        return paged_attention.prefill(*arrays, block_size=block_size, page_offset=0, scale=K**-0.5)

    s = seconds(run, query, *pool, iterations=10)
    flops = sequences * 2 * 2 * H * K * length * length / 2
    num_bytes = sequences * length * (2 * H * 2 + 2 * G * pool[0].dtype.itemsize) * K
    floor_s = card.floor_s(num_bytes, flops)
    shape = f"{sequences}x{length} block{block_size}"
    return Row(named("prefill", pool), shape, s * 1e6, floor_s * 1e6, f"{flops / s / 1e12:.0f} TFLOP/s")


def bench_latent(pool: Pool, card: Card, R: int, context: int, heads: int) -> Row:
    """Latent decode (MLA, absorbed): R rows of `context` tokens, other slots in every call."""
    latent, rope = (x.shape[2] for x in pool)
    num_tokens = pool[0].shape[0] * PAGE_SIZE
    num_sets = max(1, min(32, num_tokens // (R * (context + PAGE_SIZE))))
    table = page_table(num_sets * R, context, num_tokens)
    lens = jnp.full((R,), context, jnp.int32)
    query = jax.random.normal(jax.random.key(2), (R, heads, latent + rope), jnp.bfloat16)

    def run(query, i, latents, ropes):
        slots = i % num_sets * R + jnp.arange(R)
        arrays = (query[..., :latent], query[..., latent:], latents, ropes, table, slots, lens)
        return mla_attention.decode(*arrays, page_offset=0, scale=0.1)

    s = seconds(run, query, *pool, iterations=16)
    num_bytes = R * context * (latent + rope) * pool[0].dtype.itemsize
    flops = 2 * R * context * heads * (2 * latent + rope)
    rate = f"{num_bytes / s / 1e9:.0f} GB/s, {flops / s / 1e12:.0f} TFLOP/s"
    shape = f"B{R} ctx{context} H{heads}"
    return Row(named("latent", pool), shape, s * 1e6, card.floor_s(num_bytes, flops) * 1e6, rate)


# ---- sampling ----


# Normal logits of deviation 10 put 90 % on about 20 of 128k tokens, as a language model does; at
# temperature 4 on about 14,000.
def sampling_cases(R: int) -> dict[str, tuple[Callable, tuple[jax.Array, ...]]]:
    uniform, one = sampling.uniform(jnp.arange(R), jnp.arange(R)), jnp.ones((R,))
    top_k, top_p, min_p = jnp.full((R,), 50), jnp.full((R,), 0.9), jnp.full((R,), 0.02)

    def only_top_p(x, i, uniform, temperature, top_p):
        return sampling.sample(x, uniform, temperature, top_p_R=top_p)

    def without_count(function):
        return lambda x, i, *arguments: function(x, *arguments)

    return {
        "loop alone": (lambda x, i: x[:, 0], ()),
        "greedy": (without_count(sampling.greedy), ()),
        "temperature": (without_count(sampling.sample_temperature), (uniform, one)),
        "top_p": (only_top_p, (uniform, one, top_p)),
        "top_p of a wide row": (only_top_p, (uniform, 4 * one, top_p)),
        "top_k top_p min_p": (without_count(sampling.sample), (uniform, one, top_k, top_p, min_p)),
        "by sort (reference)": (
            without_count(reference.sample),
            (uniform, one, top_k, top_p, min_p),
        ),
        "top 20 logprobs": (lambda x, i: sampling.top_logprobs(x, 20)[0], ()),
    }


def bench_sampling(card: Card, R: int) -> list[Row]:
    logits = 10 * jax.random.normal(jax.random.key(0), (R, VOCABULARY))
    floor_us = logits.nbytes / card.bytes_per_s * 1e6
    rows = []
    for name, (function, arguments) in sampling_cases(R).items():
        us = seconds(function, logits, *arguments, iterations=20) * 1e6
        rows.append(Row("sampling", f"B{R} {name}", us, floor_us, ""))
    return rows


KINDS = ("decode", "prefill", "latent", "sampling", "rows", "gated", "layer", "experts", "exchange")


def all_rows(card: Card, only: str) -> list[Row]:
    rows: list[Row] = []
    wanted = [kind for kind in KINDS if only in kind]
    if "decode" in wanted or "prefill" in wanted:
        rows += attention_rows(card, wanted)
    if "latent" in wanted:
        pool = make_pool(1 << 21, (512,), (64,))  # 2.4 GB
        for each in (pool, in_float8(pool)):
            for heads in (16, 128):
                for R, context in ((32, 4096), (256, 1024)):
                    rows.append(bench_latent(each, card, R, context, heads))
        del pool, each
    if "sampling" in wanted:
        for R in (32, 256):
            rows.extend(bench_sampling(card, R))
    if "rows" in wanted:
        rows += operand_rows(card)
    if "gated" in wanted:
        rows += gated_rows(card)
    if "layer" in wanted:
        rows += layer_rows(card)
    if "experts" in wanted:
        rows += expert_rows(card)
    if "exchange" in wanted:
        rows += exchange_rows()
    return rows


def attention_rows(card: Card, wanted: list[str]) -> list[Row]:
    rows: list[Row] = []
    wide = make_pool(1 << 19, (G, K))  # 2.1 GB: far beyond the caches
    for pool in (wide, in_float8(wide)):
        if "decode" in wanted:
            for R, context in ((32, 4096), (256, 1024), (1, 4096), (64, 300)):
                rows.append(bench_decode(pool, card, R, context))
        if "prefill" in wanted:
            for block_size in (64, 128):
                for sequences, length in ((1, 2048), (1, 4096), (1, 8192), (16, 128)):
                    rows.append(bench_prefill(pool, card, sequences, length, block_size))
    return rows


def table_of(card: Card, rows: list[Row]) -> str:
    lines = [
        f"{card.name}: copy {card.bytes_per_s / 1e9:.0f} GB/s, product {card.flops_per_s / 1e12:.0f} TFLOP/s "
        f"(float8 {card.fp8_flops_per_s / 1e12:.0f})",
        f"attention: H{H} G{G} K{K} page {PAGE_SIZE} bfloat16; sampling: V {VOCABULARY} float32",
        f"{'kernel':12s} {'shape':42s} {'us':>9s} {'floor us':>9s} {'of floor':>8s}",
    ]
    for row in rows:
        share = f"{row.floor_us / row.us:8.0%}"
        lines.append(f"{row.name:12s} {row.shape:42s} {row.us:9.1f} {row.floor_us:9.1f} {share} {row.rate}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", default="", help=f"part of a name: {', '.join(KINDS)}")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU; jax's default backend is {jax.default_backend()}")
    card = measure_card()
    rows = all_rows(card, arguments.only)
    print(table_of(card, rows))
    if arguments.json:
        record = dict(card=asdict(card), jax=jax.__version__, rows=[asdict(row) for row in rows])
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
