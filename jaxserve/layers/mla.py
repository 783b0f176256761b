"""Multi-head latent attention, absorbed: every head attends the cached latents themselves.

Queries are taken into the latent space with the keys' up-projection, results out of it with the
values', so neither keys nor values of a head ever exist. Of a token only the latent and one rotated
part are kept.

Source: DeepSeek-V2 technical report, section 2.1 and appendix C.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxserve.layers.attention import StepContext, write_address
from jaxserve.layers.linear import Projections, project
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import Operand
from jaxserve.layers.quant import BlockFP8, linear_weight
from jaxserve.layers.rope import Rope
from jaxserve.layers.weight import weight
from jaxserve.mesh import GROUP
from jaxserve.ops import mla_attention
from jaxserve.ops.kv_write.reference import write

NORM_EPS = 1e-6  # of the norms inside; config.json's is for those of the residual stream


@dataclass(frozen=True)
class LatentSizes:
    """Widths of latent attention. `query_rank` is None where queries are projected in one step."""

    num_heads: int
    query_rank: int | None
    latent: int  # L
    nope: int  # of a head's query and key, the part that is not rotated
    rope: int  # the part that is
    value: int  # of a head's value


class LatentAttention(nnx.Module):
    """Self-attention of one layer with a latent cache.

    Args:
        name: of the checkpoint's module, such as `model.layers.0.self_attn`.
        scale: of the scores.
        interleaved: the checkpoint rotates neighbouring pairs.
        bias: on the projections down to latents, and on the output.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        sizes: LatentSizes,
        *,
        hidden: int,
        rope: Rope,
        scale: float,
        interleaved: bool,
        dtype: DTypeLike,
        bias: bool = False,
        quant: BlockFP8 | None = None,
    ):
        self.layer, self.sizes, self.rope, self.scale = layer, sizes, rope, scale
        self.interleaved = interleaved
        D, H, L, N, V = hidden, sizes.num_heads, sizes.latent, sizes.nope, sizes.value
        declare = partial(weight, dtype=dtype)
        matrix = partial(linear_weight, dtype=dtype, quant=quant)
        norm = partial(RMSNorm, eps=NORM_EPS, axis=None, dtype=dtype)
        heads = ("q_heads", None, None)

        def down_bias(part: str, size: int) -> nnx.Param | None:
            return declare((size,), (None,), f"{name}.{part}.bias") if bias else None

        query, Q = (H, N + sizes.rope), sizes.query_rank
        kv_down = matrix((L + sizes.rope, D), (None, "embed"), f"{name}.kv_a_proj_with_mqa.weight")
        kv_down_bias = down_bias("kv_a_proj_with_mqa", L + sizes.rope)
        if Q is None:
            self.query, self.query_norm = None, None
            first, first_bias = matrix((*query, D), heads, f"{name}.q_proj.weight"), None
        else:
            self.query = matrix((*query, Q), heads, f"{name}.q_b_proj.weight")
            self.query_norm = norm(f"{name}.q_a_layernorm", Q)
            first = matrix((Q, D), (None, "embed"), f"{name}.q_a_proj.weight")
            first_bias = down_bias("q_a_proj", Q)
        # Queries, or what they are made from, and the latent with the rotated part beside it.
        self.from_hidden = Projections((first, kv_down), (first_bias, kv_down_bias))
        self.latent_norm = norm(f"{name}.kv_a_layernorm", L)
        up = f"{name}.kv_b_proj.weight"
        self.key_up = matrix((H, N, L), heads, up, assemble=_Rows(H, 0, N))
        self.value_up = matrix((H, V, L), heads, up, assemble=_Rows(H, N, N + V))
        self.out = matrix((D, H, V), ("embed", "q_heads", None), f"{name}.o_proj.weight", num_out=1)
        self.out_bias = declare((D,), ("embed",), f"{name}.o_proj.bias") if bias else None

    def __call__(self, hidden_TD: jax.Array | Operand, step: StepContext) -> jax.Array:
        turn = partial(step.rope(self.rope).rotate, interleaved=self.interleaved)
        query, down_TC = self.from_hidden(hidden_TD)
        with jax.named_scope("latent"):
            latent_TL = self.latent_norm(down_TC[:, : self.sizes.latent])
            rope_TK = turn(down_TC[:, None, self.sizes.latent :])[:, 0]
        with jax.named_scope("query"):
            if self.query is not None and self.query_norm is not None:
                query = project(self.query_norm.operand(query), self.query)
            query_THN, query_THK = query[..., : self.sizes.nope], turn(query[..., self.sizes.nope :])
            query_THL = _by_head("thn,hnl->thl", query_THN, self.key_up)
        out_THL = _attend(step, self.layer, query_THL, query_THK, latent_TL, rope_TK, self.scale)
        return project(_by_head("thl,hvl->thv", out_THL, self.value_up), self.out, self.out_bias)


@dataclass(frozen=True)
class _Rows:
    """Rows [first, end) of each head, of a tensor [H * rows, L]."""

    num_heads: int
    first: int
    end: int

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(self.num_heads, -1, stored.shape[-1])[:, self.first : self.end]


def _by_head(letters: str, x: jax.Array, matrix: nnx.Param) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(letters, x, matrix[...], precision=precision, preferred_element_type=x.dtype)


def _attend(
    step: StepContext,
    layer: int,
    query_THL: jax.Array,
    query_THK: jax.Array,
    latent_TL: jax.Array,
    rope_TK: jax.Array,
    scale: float,
) -> jax.Array:
    """Writes the tokens' latents and rope parts into `layer`'s pages, then attends. Returns out_THL.

    The step's `key_pages` hold latents and its `value_pages` rope parts.
    """
    attend = step.once(("latent", scale), lambda: _attention(step, scale))
    out_THL, (step.key_pages, step.value_pages) = attend(
        jnp.int32(layer * step.num_pages),
        (step.key_pages, step.value_pages),
        (query_THL, query_THK),
        (latent_TL, rope_TK),
        step.page_table_SN,
        step.position_T,
        step.slot_T,
        step.context_len_R,
        step.blocks,
    )
    return out_THL


def _attention(step: StepContext, scale: float) -> Callable[..., Any]:
    R = step.R

    def on_device(page_offset, pools, queries, new, table_SN, position_T, slot_T, context_len_R, blocks):
        at_T = write_address(table_SN, position_T, slot_T, step.page_size)
        latents, ropes = (write(pool, *at_T, page_offset, x) for pool, x in zip(pools, new))
        query_ThL, query_ThK = queries
        out = []
        if R:
            slot_R = jnp.maximum(slot_T[:R], 0)  # a padding row reads nothing: its context is 0
            out.append(
                mla_attention.decode(
                    query_ThL[:R],
                    query_ThK[:R],
                    latents,
                    ropes,
                    table_SN,
                    slot_R,
                    context_len_R,
                    page_offset=page_offset,
                    scale=scale,
                )
            )
        if query_ThL.shape[0] > R:
            out.append(
                mla_attention.prefill(
                    query_ThL[R:],
                    query_ThK[R:],
                    latents,
                    ropes,
                    table_SN,
                    *blocks,
                    block_size=step.block_size,
                    page_offset=page_offset,
                    scale=scale,
                )
            )
        return jnp.concatenate(out) if len(out) > 1 else out[0], (latents, ropes)

    if step.mesh is None:
        return on_device
    P = PartitionSpec
    rank, heads = P("dp"), P("dp", GROUP)
    return jax.shard_map(
        on_device,
        mesh=step.mesh,
        # Every device of a group writes the same latents into its own copy of the pool.
        in_specs=(P(), rank, heads, rank, rank, rank, rank, rank, rank),
        out_specs=(heads, rank),
        check_vma=False,  # the kernels' outputs carry no replication types
    )
