"""Lightning attention: linear attention whose past is a matrix a head that fades with every token.

    state_t = exp(-slope) * state_(t-1) + key_t^T value_t        [K, K] a head, float32
    out_t   = query_t state_t

Source: Qin et al. 2024, "Lightning Attention-2", equations 4 to 9 (blocks); MiniMax-01 report, 2.2.

`decode` and `prefill` are the mathematics, on one device. `LightningAttention` is a layer: it finds
each sequence's state in the step's pool by row and leaves the new one there. A row is a running
slot's, or holds a kept state (a checkpoint); which is which only the engine knows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxserve.layers.linear import project
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.operand import Rows
from jaxserve.layers.quant import linear_weight
from jaxserve.layers.split_product import project_split
from jaxserve.layers.step_context import StepContext
from jaxserve.mesh import GROUP

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


# ---- mathematics ----


def decode(
    query_RHK: jax.Array, key_RHK: jax.Array, value_RHK: jax.Array, state_RHKK: jax.Array, slope_H: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of each sequence. All float32. Returns (out_RHK, state_RHKK)."""
    new_RHKK = key_RHK[..., :, None] * value_RHK[..., None, :]
    state_RHKK = jnp.exp(-slope_H)[:, None, None] * state_RHKK + new_RHKK
    return _einsum("rhk,rhkv->rhv", query_RHK, state_RHKK), state_RHKK


def prefill(
    query_BQHK: jax.Array,
    key_BQHK: jax.Array,
    value_BQHK: jax.Array,
    start_BHKK: jax.Array,
    slope_H: jax.Array,
    slot_B: jax.Array,
    len_B: jax.Array,
    pos_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Blocks of several sequences, all float32; those of one sequence (`slot_B`) follow each other.

    `start_BHKK` is the state before the sequence's first block here. Returns (out_BQHK, state_BHKK
    after each block); what lies past `len_B` in a block is ignored, and its output means nothing.

    Blocks do not wait for each other: what a block adds is a product over its own tokens, and what came
    before it the faded sum of what earlier blocks added, which is one small product over blocks.
    """
    token_Q = jnp.arange(query_BQHK.shape[1])
    inside_BQ = token_Q < len_B[:, None]
    query_BQHK, key_BQHK, value_BQHK = (
        jnp.where(inside_BQ[:, :, None, None], x, 0) for x in (query_BQHK, key_BQHK, value_BQHK)
    )

    def fade(tokens: jax.Array) -> jax.Array:
        """What is left after so many tokens [...]: [..., H]; nothing of what is yet to come (below 0)."""
        left = jnp.exp(-slope_H * jnp.maximum(tokens, 0)[..., None].astype(jnp.float32))
        return jnp.where(tokens[..., None] >= 0, left, 0)

    key_faded_BQHK = key_BQHK * fade(len_B[:, None] - 1 - token_Q)[..., None]
    added_BHKK = _einsum("bqhk,bqhv->bhkv", key_faded_BQHK, value_BQHK)

    filled_B, same_BB = len_B > 0, slot_B[:, None] == slot_B[None, :]
    between_BB = (
        pos_B[:, None] - (pos_B + len_B)[None, :]
    )  # tokens from the end of one to the start of another
    earlier_BB = same_BB & (between_BB >= 0) & filled_B
    first_B = jnp.min(jnp.where(same_BB & filled_B, pos_B, pos_B[:, None]), axis=1)
    before_BHKK = fade(pos_B - first_B)[:, :, None, None] * start_BHKK + _einsum(
        "bah,ahkv->bhkv", jnp.where(earlier_BB[..., None], fade(between_BB), 0), added_BHKK
    )
    after_BHKK = fade(len_B)[:, :, None, None] * before_BHKK + added_BHKK

    score_BHQQ = _einsum("bqhk,bshk->bhqs", query_BQHK, key_BQHK)
    score_BHQQ = score_BHQQ * jnp.moveaxis(fade(token_Q[:, None] - token_Q), -1, 0)
    within_BQHK = _einsum("bhqs,bshv->bqhv", score_BHQQ, value_BQHK)
    query_faded_BQHK = query_BQHK * fade(token_Q + 1)[..., None]
    return within_BQHK + _einsum("bqhk,bhkv->bqhv", query_faded_BQHK, before_BHKK), after_BHKK


# ---- in a step ----


def attend(
    step: StepContext,
    layer: int,
    query_THK: jax.Array,
    key_THK: jax.Array,
    value_THK: jax.Array,
    slope_H: jax.Array,
) -> jax.Array:
    """Carries every sequence of the step on from its state, in place. Returns out_THK, float32.

    `layer` counts the layers that have states.
    """
    assert step.states is not None, "this step has no state pool"
    rows = step.state_blocks
    run = step.once("lightning", lambda: _on_devices(step))
    out_THK, step.states = run(
        jnp.int32(layer),
        step.states,
        query_THK,
        key_THK,
        value_THK,
        slope_H,
        step.slot_T,
        step.context_len_R,
        step.blocks,
        None if rows is None else (rows.start_B, rows.end_B, rows.keep_B),
    )
    return out_THK


def _on_devices(step: StepContext) -> Callable[..., Any]:
    block_size = step.block_size

    def on_device(layer, states, query_ThK, key_ThK, value_ThK, slope_h, slot_T, len_R, blocks, rows):
        inputs = [x.astype(jnp.float32) for x in (query_ThK, key_ThK, value_ThK)]
        out_ThK = jnp.zeros_like(inputs[0])
        if len_R is not None:
            R = len_R.shape[0]
            slot_R = jnp.where(len_R > 0, slot_T[:R], -1)
            before = states[jnp.maximum(slot_R, 0), layer]
            query_RhK, key_RhK, value_RhK = (x[:R] for x in inputs)
            out_RhK, after = decode(query_RhK, key_RhK, value_RhK, before, slope_h)
            states = write_rows(states, slot_R, layer, after)
            out_RhK = jnp.where((slot_R >= 0)[:, None, None], out_RhK, 0)
            out_ThK = jax.lax.dynamic_update_slice_in_dim(out_ThK, out_RhK, 0, axis=0)
        if blocks is not None:
            slot_B, start_B, len_B, pos_B = blocks
            from_B, end_B, keep_B = rows
            token_Q = jnp.arange(block_size)
            at_BQ = start_B[:, None] + token_Q
            query, key, value = (jnp.take(x, at_BQ, axis=0, mode="clip") for x in inputs)
            before = jnp.where(
                (from_B >= 0)[:, None, None, None], states[jnp.maximum(from_B, 0), layer], 0
            )  # a row that nobody wrote may hold anything
            out_BQhK, after = prefill(query, key, value, before, slope_h, slot_B, len_B, pos_B)
            for row_B in (end_B, keep_B):
                states = write_rows(states, row_B, layer, after)
            at_BQ = jnp.where(token_Q < len_B[:, None], at_BQ, slot_T.shape[0])
            out_ThK = out_ThK.at[at_BQ].set(out_BQhK, mode="drop")
        return out_ThK, states

    if step.mesh is None:
        return on_device
    P = PartitionSpec
    rank, heads, pool = P("dp"), P("dp", GROUP), P("dp", None, GROUP)
    return jax.shard_map(
        on_device,
        mesh=step.mesh,
        in_specs=(P(), pool, heads, heads, heads, P(GROUP), rank, rank, rank, rank),
        out_specs=(heads, pool),
        check_vma=False,
    )


def write_rows(states: jax.Array, row_N: jax.Array, layer: jax.Array, value_NhKK: jax.Array) -> jax.Array:
    """Row -1 is written nowhere. The others differ; nowhere is not one place, so that all do."""
    nowhere_N = states.shape[0] + jnp.arange(row_N.shape[0], dtype=row_N.dtype)
    row_N = jnp.where(row_N < 0, nowhere_N, row_N)
    return states.at[row_N, layer].set(value_NhKK, mode="drop", unique_indices=True)


# ---- the layer ----


def slopes(num_heads: int, share: float) -> tuple[float, ...]:
    """How fast each head forgets: 2**(-8 h / H) for h = 1 .. H, times the layer's `share`."""
    return tuple(share * 2.0 ** (-8.0 * head / num_heads) for head in range(1, num_heads + 1))


class LightningAttention(nnx.Module):
    """silu(qkv), lightning attention, RMS norm over all heads, a sigmoid gate, output projection.

    Args:
        name: of the checkpoint's module. Its `qkv_proj` holds query, key and value head by head.
        layer: among the layers with lightning attention.
        slope: of each head.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        *,
        hidden: int,
        num_heads: int,
        head_dim: int,
        slope: tuple[float, ...],
        norm_eps: float,
        dtype: DTypeLike,
    ):
        D, H, K = hidden, num_heads, head_dim
        self.state_layer, self.slope = layer, slope
        matrix = partial(linear_weight, dtype=dtype, quant=None)
        self.qkv = matrix((H, 3 * K, D), ("q_heads", None, "embed"), f"{name}.qkv_proj.weight")
        self.gate = matrix((H, K, D), ("q_heads", None, "embed"), f"{name}.output_gate.weight")
        self.norm = RMSNorm(f"{name}.norm", H * K, eps=norm_eps, axis=None, dtype=dtype)
        self.out = matrix((D, H, K), ("embed", "q_heads", None), f"{name}.out_proj.weight", num_out=1)

    def __call__(self, hidden_TD: Rows, step: StepContext) -> Rows:
        query_THK, key_THK, value_THK = jnp.split(jax.nn.silu(project(hidden_TD, self.qkv)), 3, axis=-1)
        slope_H = jnp.asarray(self.slope, jnp.float32)
        with jax.named_scope("lightning"):
            out_THK = attend(step, self.state_layer, query_THK, key_THK, value_THK, slope_H)
        out_THK = out_THK.astype(hidden_TD.dtype)
        out_THK = self.norm(out_THK.reshape(out_THK.shape[0], -1)).reshape(out_THK.shape)
        gated_THK = jax.nn.sigmoid(project(hidden_TD, self.gate)) * out_THK
        return project_split(gated_THK, self.out, None, step)
