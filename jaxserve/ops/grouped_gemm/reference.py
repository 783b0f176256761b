"""Experts in jax.numpy: the truth for the kernels and the path on a CPU.

One loop over blocks of rows that share an expert. Its length is the number of blocks there are, so
work follows the tokens that are real, not the shape.
"""

import jax.numpy as jnp
from jax import lax

from jaxserve.ops import four_bits, int4, mxfp4
from jaxserve.ops.grouped_gemm.rows import group


def feed_forward(hidden_TD, expert_TX, weight_TX, weights, activation):
    """See `grouped_gemm.feed_forward`."""
    T, X = expert_TX.shape
    E = weights.gate_EFD.shape[0]
    # Blocks about as long as an expert has rows: shorter ones read weights again, longer ones pad.
    block_rows = max(1, min(64, 1 << (T * X // E).bit_length()))
    blocks = group(expert_TX, E, block_rows)
    weight_M = weight_TX.reshape(-1).astype(jnp.float32)

    def add_block(b, out_TD):
        row = blocks.start_B[b] + jnp.arange(block_rows)
        pair = jnp.take(blocks.order_M, row, mode="clip")
        token = pair // X
        hidden_BD = jnp.take(hidden_TD, token, axis=0)
        out_BD = _expert(hidden_BD, weights, blocks.expert_B[b], activation) * weight_M[pair][:, None]
        token = jnp.where(row < blocks.end_B[b], token, T)
        return out_TD.at[token].add(out_BD, mode="drop")

    out_TD = jnp.zeros(hidden_TD.shape, jnp.float32)
    return lax.fori_loop(0, blocks.count, add_block, out_TD)


def widened(weights, dtype):
    """Packed weights (`ops.four_bits`) in `dtype`."""
    if weights.gate_zero is None:
        joined = mxfp4.widen(weights.gate_EFD, weights.gate_scale)
        down = mxfp4.widen(weights.down_EDF, weights.down_scale)
    else:
        joined = int4.widen(weights.gate_EFD, weights.gate_scale, weights.gate_zero)
        down = int4.widen(weights.down_EDF, weights.down_scale, weights.down_zero)
    gate, up = four_bits.apart(joined)
    down = down[:, : gate.shape[2]]
    return weights._replace(
        gate_EFD=gate.astype(dtype),
        up_EFD=up.astype(dtype),
        down_EDF=down.astype(dtype),
        gate_scale=None,
        down_scale=None,
        gate_zero=None,
        down_zero=None,
    )


def _expert(hidden_BD, weights, expert, activation):
    """One expert's output in float32, its inner values rounded to the model's dtype as in a dense layer."""
    if four_bits.is_packed(weights.gate_EFD):
        one = [None if array is None else array[expert][None] for array in weights]
        weights, expert = widened(type(weights)(*one), hidden_BD.dtype), 0
    gate_BF = _product(hidden_BD, weights.gate_EFD, weights.gate_scale, weights.gate_bias_EF, expert)
    up_BF = _product(hidden_BD, weights.up_EFD, weights.up_scale, weights.up_bias_EF, expert)
    inner_BF = activation(gate_BF, up_BF).astype(hidden_BD.dtype)
    return _product(inner_BF, weights.down_EDF, weights.down_scale, weights.down_bias_ED, expert)


def _product(x, matrices, scales, biases, expert):
    matrix = matrices[expert]
    if scales is not None:
        scale = scales[expert]
        for axis in (0, 1):
            scale = jnp.repeat(scale, matrix.shape[axis] // scale.shape[axis], axis)
        matrix = (matrix.astype(jnp.float32) * scale).astype(x.dtype)
    y = jnp.einsum(
        "bi,oi->bo",
        x,
        matrix,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y if biases is None else y + biases[expert].astype(jnp.float32)
