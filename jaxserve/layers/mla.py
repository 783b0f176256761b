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

from jaxserve.layers.linear import Projections, project
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import Rows
from jaxserve.layers.quant import BlockFP8, linear_weight
from jaxserve.layers.rope import Rope
from jaxserve.layers.split_product import project_split
from jaxserve.layers.step_context import StepContext, decode_slots, read_first, write_address
from jaxserve.layers.weight import weight
from jaxserve.mesh import GROUP
from jaxserve.ops import mla_attention
from jaxserve.ops.latent_write import Columns, rotate_and_write_latent

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

    def __call__(self, hidden_TD: Rows, step: StepContext) -> Rows:
        query, down = self.from_hidden.columns(hidden_TD)
        if self.query is not None and self.query_norm is not None:
            query = Columns.whole(project(self.query_norm.operand(query.value_TC), self.query))
        out_THL = self._attend(step, query, down)
        out_THV = _by_head("thl,hvl->thv", out_THL, self.value_up[...])
        return project_split(out_THV, self.out, self.out_bias, step)

    def _attend(self, step: StepContext, query: Columns, down: Columns) -> jax.Array:
        """Writes the tokens' latents and rope parts into the layer's pages, then attends: out_THL.

        The step's `key_pages` hold latents and its `value_pages` rope parts.
        """
        firsts = query.first, down.first
        group = 1 if step.mesh is None else step.mesh.shape["ep"] * step.mesh.shape["tp"]
        is_alone = query.count == query.array_TC.shape[1]
        assert group == 1 or is_alone, "queries are joined, whose heads the mesh splits"
        cut = (firsts, self.latent_norm.eps, self.interleaved, self.scale)
        attend = step.once(("latent", *cut), lambda: _attention(step, *cut))
        table = step.rope(self.rope)
        out_THL, (step.key_pages, step.value_pages) = attend(
            jnp.int32(self.layer * step.num_pages),
            (step.key_pages, step.value_pages),
            query.array_TC,
            down.array_TC,
            (table.cos_TK, table.sin_TK),
            self.latent_norm.weight[...],
            self.key_up[...],
            step.page_table_SN,
            step.position_T,
            step.slot_T,
            step.context_len_R,
            step.blocks,
        )
        return out_THL


@dataclass(frozen=True)
class _Rows:
    """Rows [first, end) of each head, of a tensor [H * rows, L]."""

    num_heads: int
    first: int
    end: int

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(self.num_heads, -1, stored.shape[-1])[:, self.first : self.end]


def _by_head(letters: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(letters, x, matrix, precision=precision, preferred_element_type=x.dtype)


def _attention(
    step: StepContext, firsts: tuple[int, int], eps: float, interleaved: bool, scale: float
) -> Callable[..., Any]:
    """What follows the projections, on each device."""

    def on_device(
        page_offset,
        pools,
        query_TC,
        down_TC,
        rotation,
        norm_weight_L,
        key_up_hNL,
        table_SN,
        position_T,
        slot_T,
        context_len_R,
        blocks,
    ):
        latents, ropes = pools
        (h, N, L), K = key_up_hNL.shape, ropes.shape[-1]
        at_T = write_address(table_SN, position_T, slot_T, step.page_size)
        query_ThN, query_ThK, latents, ropes = rotate_and_write_latent(
            Columns(query_TC, firsts[0], h * (N + K)),
            Columns(down_TC, firsts[1], L + K),
            norm_weight_L,
            rotation,
            latents,
            ropes,
            *at_T,
            num_heads=h,
            eps=eps,
            interleaved=interleaved,
            page_offset=page_offset,
        )
        out_ThL = _by_head("thn,hnl->thl", query_ThN, key_up_hNL)  # results take the queries' places
        arrays = query_ThK, latents, ropes, table_SN
        options: dict[str, Any] = {"page_offset": page_offset, "scale": scale}
        if context_len_R is not None:
            rows = decode_slots(slot_T, context_len_R), context_len_R
            out_ThL = mla_attention.decode(out_ThL, *arrays, *rows, **options)
        if blocks is not None:
            out_ThL = mla_attention.prefill(out_ThL, *arrays, *blocks, block_size=step.block_size, **options)
        return read_first(out_ThL, (latents, ropes))

    if step.mesh is None:
        return on_device
    P = PartitionSpec
    rank, heads = P("dp"), P("dp", GROUP)
    return jax.shard_map(
        on_device,
        mesh=step.mesh,
        # Every device of a group writes the same latents into its own copy of the pool.
        in_specs=(P(), rank, heads, rank, rank, P(), P(GROUP), rank, rank, rank, rank, rank),
        out_specs=(heads, rank),
        check_vma=False,  # the kernels' outputs carry no replication types
    )
