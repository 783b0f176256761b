"""Attention cases that every implementation is held to, and the dense softmax that judges them."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Where kernels are lowered to on a machine without a GPU.
H100 = jax.sharding.AbstractMesh(
    (1,),
    ("x",),
    abstract_device=jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    ),
)


@dataclass(frozen=True)
class Heads:
    """The static part of a case."""

    H: int
    G: int
    K: int
    page_size: int = 16
    dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_dtype: str | None = None  # of the pools, when another

    @property
    def pool_dtype(self) -> str:
        return self.kv_dtype or self.dtype


KERNEL_HEADS = (
    Heads(9, 3, 64),
    Heads(8, 8, 64, dtype="bfloat16"),
    Heads(4, 2, 80, dtype="bfloat16"),
    Heads(8, 2, 96, dtype="float16", window=20),
    Heads(32, 8, 128, dtype="bfloat16"),
    Heads(8, 2, 128, dtype="bfloat16", window=50, softcap=20.0, sinks=True),
    Heads(24, 1, 128, page_size=64, dtype="bfloat16"),
    Heads(4, 2, 256, page_size=8, dtype="bfloat16", window=7),
    Heads(4, 4, 256, softcap=50.0),
    Heads(9, 3, 64, kv_dtype="float8_e4m3fn"),
    Heads(8, 2, 128, dtype="bfloat16", window=50, sinks=True, kv_dtype="float8_e4m3fn"),
)


@dataclass(frozen=True)
class Pool:
    """Two layers of random pages, a shuffled page table over the second one, and numpy copies.

    Pages that no slot's table names hold infinities: whoever reads one fails.
    """

    heads: Heads
    num_slots: int
    pages_per_slot: int
    seed: int = 0
    num_pages: int = field(init=False)
    table: np.ndarray = field(init=False)
    keys: np.ndarray = field(init=False)
    values: np.ndarray = field(init=False)

    def __post_init__(self):
        h, used = self.heads, self.num_slots * self.pages_per_slot
        random = np.random.default_rng(self.seed)
        num_pages = used + 5
        table = random.permutation(num_pages)[:used].astype(np.int32)
        unused = np.setdiff1d(np.arange(num_pages), table)
        shape = (2 * num_pages, h.page_size, h.G, h.K)
        # Rounded to the case's type once, so that the dense softmax sees what the kernels see.
        keys, values = (
            np.array(jnp.asarray(random.normal(size=shape), h.pool_dtype), np.float32) for _ in range(2)
        )
        for pool in (keys, values):
            pool[:num_pages] = np.inf
            pool[num_pages + unused] = np.inf
        for name, value in dict(
            num_pages=num_pages,
            table=table.reshape(self.num_slots, self.pages_per_slot),
            keys=keys,
            values=values,
        ).items():
            object.__setattr__(self, name, value)

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype = self.heads.pool_dtype
        return jnp.asarray(self.keys, dtype), jnp.asarray(self.values, dtype), jnp.asarray(self.table)

    def sequence(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of one slot in order of position, float32."""
        pages = self.num_pages + self.table[slot]
        shape = (-1, self.heads.G, self.heads.K)
        return self.keys[pages].reshape(shape), self.values[pages].reshape(shape)

    def normal(self, *shape: int) -> np.ndarray:
        random = np.random.default_rng(self.seed + 1)
        return np.asarray(jnp.asarray(random.normal(size=shape), self.heads.dtype), np.float32)

    def options(self) -> dict[str, Any]:
        h = self.heads
        sinks = jnp.asarray(self.sinks()) if h.sinks else None
        return dict(
            page_offset=self.num_pages,
            scale=h.K**-0.5,
            window=h.window,
            softcap=h.softcap,
            sinks_H=sinks,
        )

    def sinks(self) -> np.ndarray:
        return np.linspace(-2, 3, self.heads.H, dtype=np.float32)

    def dense(self, query_HK: np.ndarray, slot: int, position: int) -> np.ndarray:
        """Softmax attention of one query in float64, written as the formula says."""
        h = self.heads
        first = 0 if h.window is None else max(0, position - h.window + 1)
        keys, values = (x[first : position + 1].astype(np.float64) for x in self.sequence(slot))
        out = np.zeros(query_HK.shape)
        for head in range(h.H):
            g = head // (h.H // h.G)
            scores = keys[:, g] @ query_HK[head] * h.K**-0.5
            if h.softcap is not None:
                scores = h.softcap * np.tanh(scores / h.softcap)
            weights = np.exp(scores - scores.max())
            total = weights.sum() + (np.exp(self.sinks()[head] - scores.max()) if h.sinks else 0)
            out[head] = weights @ values[:, g] / total
        return out


@dataclass(frozen=True)
class Decode:
    """One query a row; `lens` 0 is a padding row."""

    pool: Pool
    slots: tuple[int, ...]
    lens: tuple[int, ...]

    def query(self) -> np.ndarray:
        return self.pool.normal(len(self.slots), self.pool.heads.H, self.pool.heads.K)

    def arguments(self) -> tuple[jax.Array, ...]:
        query = jnp.asarray(self.query(), self.pool.heads.dtype)
        rows = (jnp.asarray(x, jnp.int32) for x in (self.slots, self.lens))
        return (query, *self.pool.arrays(), *rows)

    def expected(self) -> np.ndarray:
        """A padding row keeps its query."""
        query = self.query()
        out = np.array(query, np.float64)
        for row, (slot, length) in enumerate(zip(self.slots, self.lens)):
            if length:
                out[row] = self.pool.dense(query[row], slot, length - 1)
        return out


@dataclass(frozen=True)
class Prefill:
    """Chunks (slot, first token, tokens, tokens cached before them), cut into query blocks."""

    pool: Pool
    num_tokens: int
    chunks: tuple[tuple[int, int, int, int], ...]
    block_size: int = 64
    padding_blocks: int = 1

    def blocks(self) -> list[tuple[int, int, int, int]]:
        cut = [
            (slot, start + i, min(self.block_size, length - i), cached + i)
            for slot, start, length, cached in self.chunks
            for i in range(0, length, self.block_size)
        ]
        return cut + [(0, 0, 0, 0)] * self.padding_blocks

    def query(self) -> np.ndarray:
        return self.pool.normal(self.num_tokens, self.pool.heads.H, self.pool.heads.K)

    def arguments(self) -> tuple[jax.Array, ...]:
        query = jnp.asarray(self.query(), self.pool.heads.dtype)
        blocks = (jnp.asarray(x, jnp.int32) for x in zip(*self.blocks()))
        return (query, *self.pool.arrays(), *blocks)

    def expected(self) -> np.ndarray:
        """Tokens of no chunk keep their query."""
        query = self.query()
        out = np.array(query, np.float64)
        for slot, start, length, cached in self.chunks:
            for i in range(length):
                out[start + i] = self.pool.dense(query[start + i], slot, cached + i)
        return out


def decode_case(heads: Heads, seed: int = 0) -> Decode:
    """Page edges, one token, a full table, padding, two rows of one slot."""
    pool = Pool(heads, num_slots=6, pages_per_slot=160 // heads.page_size, seed=seed)
    full = pool.pages_per_slot * heads.page_size
    return Decode(pool, slots=(3, 1, 0, 5, 2, 3, 4), lens=(1, 0, full, full - 1, 77, 16, 65))


def prefill_case(heads: Heads, seed: int = 0) -> Prefill:
    """A fresh chunk, one after a cached prefix, one of several blocks, gaps between them."""
    pool = Pool(heads, num_slots=4, pages_per_slot=256 // heads.page_size, seed=seed)
    chunks = ((2, 0, 100, 10), (0, 100, 33, 0), (3, 140, 70, 131), (1, 215, 1, 255 // 2))
    return Prefill(pool, num_tokens=230, chunks=chunks)


def tolerance(heads: Heads) -> float:
    """float32: summation order. The short types: rounding of the weights and of the result, for
    values that are sums of about 1..3 in size (eps 2**-8 of bfloat16, 2**-11 of float16)."""
    return {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[heads.dtype]


def in_float8(x, group: int) -> np.ndarray:
    """x [..., K] as float8 numbers and a scale for each group of them stand for it, in float64."""
    groups = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, group)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-12) / np.float32(448)
    numbers = np.asarray(jnp.asarray(groups / scale).astype(jnp.float8_e4m3fn), np.float64)
    return (numbers * scale).reshape(x.shape)
