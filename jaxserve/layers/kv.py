"""What a model keeps of every token, and how the KV pool is laid out over a mesh."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxserve.mesh import GROUP


@dataclass(frozen=True)
class KVSpec:
    """What a model keeps of every token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LatentSpec:
    """What a model with latent attention (MLA) keeps of every token: one latent for all heads, and
    the rotated part of the key beside it."""

    num_layers: int
    latent_dim: int
    rope_dim: int

    @property
    def num_kv_heads(self) -> int:
        return 1


@dataclass(frozen=True)
class HeadSplit:
    """How heads are divided over the devices of one attention group.

    Each device has `num_q` query heads. Its pool has `num_kv` KV heads: its share when the group
    divides them, else copies of just those its query heads read, so that a group larger than the
    number of KV heads costs no device more than it needs.
    """

    num_q_heads: int
    num_kv_heads: int
    group: int

    @property
    def num_q(self) -> int:
        return self.num_q_heads // self.group

    @property
    def run(self) -> int:
        """Consecutive query heads of a device that read one KV head of its pool."""
        ratio = self.num_q_heads // self.num_kv_heads
        return next(n for n in range(ratio, 0, -1) if ratio % n == 0 and self.num_q % n == 0)

    @property
    def num_kv(self) -> int:
        return self.num_q // self.run

    @property
    def divides(self) -> bool:
        return self.num_kv_heads % self.group == 0

    def heads_of(self, device: jax.Array) -> jax.Array:
        """The KV heads that the pool of a group's device holds, int32 [num_kv]."""
        first_query = device * self.num_q + jnp.arange(self.num_kv) * self.run
        return first_query * self.num_kv_heads // self.num_q_heads


def pool_layout(
    kv: KVSpec, num_q_heads: int, *, num_pages: int, page_size: int, mesh: Mesh | AbstractMesh | None = None
) -> tuple[tuple[int, int, int, int], PartitionSpec]:
    """Global shape and sharding of `key_pages` (and `value_pages`), `num_pages` a layer and dp rank."""
    dp, group = (1, 1) if mesh is None else (mesh.shape["dp"], mesh.shape["ep"] * mesh.shape["tp"])
    heads = group * HeadSplit(num_q_heads, kv.num_kv_heads, group).num_kv
    shape = (dp * kv.num_layers * num_pages, page_size, heads, kv.head_dim)
    return shape, PartitionSpec("dp", None, GROUP, None)


PoolLayout = tuple[tuple[int, ...], PartitionSpec]


def pool_layouts(
    kv: KVSpec | LatentSpec,
    num_q_heads: int,
    *,
    num_pages: int,
    page_size: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[PoolLayout, PoolLayout]:
    """Global shape and sharding of both pools: keys and values, or latents and rope parts.

    A latent is read by every query head, so each device of a group keeps all of its rank's.
    """
    if isinstance(kv, KVSpec):
        both = pool_layout(kv, num_q_heads, num_pages=num_pages, page_size=page_size, mesh=mesh)
        return both, both
    pages = (1 if mesh is None else mesh.shape["dp"]) * kv.num_layers * num_pages
    spec = PartitionSpec("dp", None, None)
    return ((pages, page_size, kv.latent_dim), spec), ((pages, page_size, kv.rope_dim), spec)


@dataclass(frozen=True)
class StateSpec:
    """What a model keeps of a sequence however long it is: a float32 [K, K] a head and layer."""

    num_layers: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class StateBlocks:
    """Rows of the state pool that each prefill block touches; -1 is none. int32 [B] each.

    `start_B` is where the block's sequence stood before this step (-1: at its beginning, all zeros), the
    same for all its blocks. The state after the block goes to `end_B` and to `keep_B`.
    """

    start_B: jax.Array
    end_B: jax.Array
    keep_B: jax.Array


def state_layout(spec: StateSpec, num_rows: int, mesh: Mesh | AbstractMesh | None = None) -> PoolLayout:
    """Global shape and sharding of the state pool, `num_rows` a dp rank."""
    dp = 1 if mesh is None else mesh.shape["dp"]
    shape = (dp * num_rows, spec.num_layers, spec.num_heads, spec.head_dim, spec.head_dim)
    return shape, PartitionSpec("dp", None, GROUP, None, None)
